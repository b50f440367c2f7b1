"""The command line, one file per command.

In: arguments. Out: text on standard output and standard error, an exit status. Imports everything,
when a command needs it: so `validate` starts without torch.
"""

from mechdsl.cli.entry import app, main

__all__ = ["app", "main"]
