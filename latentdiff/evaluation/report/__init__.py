"""A report of measurements: metrics.json and a self-contained page."""
