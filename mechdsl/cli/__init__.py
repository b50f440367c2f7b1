"""The command line, one file per command.

In: arguments. Out: text on standard output and standard error, an exit status. May import
everything; what a command needs is imported when it runs, so that `validate` starts without torch.
"""

from mechdsl.cli.entry import app, main

__all__ = ["app", "main"]
