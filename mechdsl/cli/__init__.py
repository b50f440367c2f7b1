"""The command line, one function per command.

In: arguments. Out: text on standard output and standard error, an exit status. Imports any package,
when a command needs it, so that `validate` starts without torch.
"""

from mechdsl.cli.entry import app, main

__all__ = ["app", "main"]
