"""The program of the child process that calls vl-convert: see `drawing`.

It is run as a file and imports nothing of the package, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from importlib import import_module
from typing import Any


def serve() -> None:
    """Answer calls from standard input until it ends.

    A call is a pickled `(function, arguments, options)` of vl-convert; its answer on standard
    output is `(True, value)`, or `(False, text)` for an exception.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print isn't an answer
    while True:
        try:
            function, arguments, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            answer = True, getattr(import_module("vl_convert"), function)(*arguments, **options)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
