"""Networks that predict: what a sampler evaluates at every step."""
