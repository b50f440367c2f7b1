"""Exit statuses, and the one way in beside commands."""

FINE = 0
FAILED = 1
"""An expectation doesn't hold."""
WRONG = 2
"""Something is wrong, and nothing could be computed."""
BROKE_OFF = 3
"""A part could not be done: a measure couldn't be computed, the run broke off, a report wasn't
written, or standard output takes nothing more. What could be done is printed."""
SIGNALLED = 128
"""More by the number of the signal that ended the run: 130 for Ctrl-C, 143 for SIGTERM."""

COMPLETE = "_MECHDSL_COMPLETE"
"""In the environment where a shell asks what a line can go on with."""
