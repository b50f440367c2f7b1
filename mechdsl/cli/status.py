"""Exit statuses."""

FINE = 0
FAILED = 1
"""An expectation doesn't hold."""
WRONG = 2
"""Something is wrong, and no cell was run."""
BROKE_OFF = 3
"""A part could not be done: the run broke off, a report wasn't written, or standard output takes
nothing more. What could be done is printed."""
SIGNALLED = 128
"""More by the number of the signal that ended the run: 130 for Ctrl-C, 143 for SIGTERM."""
