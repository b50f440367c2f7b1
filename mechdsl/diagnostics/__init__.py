"""Errors and warnings as typed data: a code, a span, a cause and a help line.

In: facts and a span. Out: a `Diagnostic` and its rendering. Imports base.

Each code is one frozen class in the module of its subject, with a page in `docs/errors/`.
"""

from mechdsl.diagnostics.core import CODES, Diagnostic, Severity, has_errors

__all__ = ["CODES", "Diagnostic", "Severity", "has_errors"]
