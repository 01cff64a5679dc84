"""Runtimes: the same networks elsewhere or faster."""
