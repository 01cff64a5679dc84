"""The mathematics: noise levels, denoisers, guidance, samplers, randomness and the objective."""
