"""Warnings about the run store."""

from __future__ import annotations

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class StoreNotUsed(Diagnostic):
    """A store that can't be opened, or not be written to: the run goes on without it."""

    code = "W0782"
    title = "the store `{folder}` {reason}"
    help = "nothing to change for this run; `--store DIR` names another folder, `--no-store` none"

    folder: str
    reason: str
