"""Exit statuses."""

FINE = 0
FAILED = 1
"""An expectation doesn't hold."""
WRONG = 2
"""Something is wrong, and no cell was run."""
BROKE_OFF = 3
"""The run broke off."""
INTERRUPTED = 130
