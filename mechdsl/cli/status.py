"""Exit statuses."""

FINE = 0
FAILED = 1
"""An expectation doesn't hold."""
WRONG = 2
"""Something is wrong, and nothing could be computed."""
BROKE_OFF = 3
"""A part could not be computed, or the run broke off."""
INTERRUPTED = 130
