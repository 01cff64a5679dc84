"""Evaluation: measurements of models, and their report."""
