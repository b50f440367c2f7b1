"""Saved results to compare later commits with: `python -m tests.baseline`."""
