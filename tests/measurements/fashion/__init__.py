"""The command behind docs/fashion.md: `python -m tests.measurements.fashion`."""
