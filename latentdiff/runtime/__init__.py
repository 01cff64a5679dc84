"""Runtimes: the same networks by another library, on another device, with smaller weights, or faster."""
