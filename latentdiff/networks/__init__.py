"""The networks of diffusers, transformers and open_clip, behind the protocols of this project."""
