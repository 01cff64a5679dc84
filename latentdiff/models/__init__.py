"""The networks, borrowed from diffusers, transformers and open_clip, which are imported here alone."""
