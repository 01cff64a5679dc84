"""Codecs: the networks between pictures and latents."""
