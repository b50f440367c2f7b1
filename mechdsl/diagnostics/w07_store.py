"""Warnings about the run store."""

from __future__ import annotations

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class StoreNotUsed(Diagnostic):
    """A store that can't be opened, or not be written to: the run goes on without."""

    code = "W0782"
    title = "{lost}: `{folder}`: {reason}"
    help = "name another folder with `--store`, or leave it out with `--no-store`; results are the same"

    lost: str
    """What is missed by it."""
    folder: str
    reason: str
