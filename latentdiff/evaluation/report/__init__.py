"""A report of measurements: metrics.json and a page that stands alone."""
