"""Errors and warnings as typed data: a code, a span, a cause and a help line.

Each code is one frozen dataclass in the module of its family (`e01_syntax` … `w07_warnings`),
and one page in `docs/errors/`.
"""

from mechdsl.diagnostics.core import CODES, Diagnostic, Severity, has_errors

__all__ = ["CODES", "Diagnostic", "Severity", "has_errors"]
