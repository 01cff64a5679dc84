"""Captioned pictures in, batches out."""
