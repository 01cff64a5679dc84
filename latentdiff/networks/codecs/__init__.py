"""Networks between pictures and latents."""
