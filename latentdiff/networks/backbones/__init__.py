"""Backbones: the networks that a sampler evaluates at every step."""
