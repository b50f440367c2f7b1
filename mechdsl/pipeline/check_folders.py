"""Folders that options name: whether they may be written to. Without torch."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine
from mechdsl.pipeline.run_options import RunOptions


def check_folders(options: RunOptions) -> list[Diagnostic]:
    """E0208 for those that can't be written to, and for a library that isn't installed."""
    found: list[Diagnostic] = []
    for option, folder in (("--out", options.out), ("--offload", options.offload)):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = f"`{option} {folder}`: {(error.strerror or str(error)).lower()}"
            hint = "name a folder that may be written to; it is made where there is none"
            found.append(BadCommandLine(reason=reason, hint=hint))
    if options.offload is not None and find_spec("accelerate") is None:
        reason = "`--offload` needs accelerate, which isn't installed"
        hint = "`pip install 'mechdsl[offload]'` installs it"
        found.append(BadCommandLine(reason=reason, hint=hint))
    return found
