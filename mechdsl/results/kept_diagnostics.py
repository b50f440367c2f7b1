"""Diagnostics in an archive: the same objects again, or what was said in the same words."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import mechdsl.diagnostics
from mechdsl.base.record import keyword_record
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import CODES, Diagnostic
from mechdsl.results.typed_json import Kept, as_object, read_value, write_value

_SAID = ("severity", "message", "label_text", "help_text")


@keyword_record
class AsSaid(Diagnostic):
    """A diagnostic of another version, whose class is gone or words things differently."""

    title = "{message_then}"
    label = "{label_then}"
    help = "{help_then}"
    message_then: str
    label_then: str
    help_then: str


def write_diagnostic(diagnostic: Diagnostic, kept: Kept) -> dict[str, Any]:
    """Its class by its code, its facts, and what they say."""
    facts = {each.name: getattr(diagnostic, each.name) for each in fields(diagnostic)}
    return {
        "code": diagnostic.code,
        **{name: getattr(diagnostic, name) for name in _SAID},
        "span": write_value(diagnostic.span, kept),
        "facts": {name: write_value(fact, kept) for name, fact in facts.items() if name != "span"},
    }


def read_diagnostic(found: Any, kept: Kept) -> Diagnostic:
    """The diagnostic again; where its class doesn't say the same, as it was said."""
    parts = as_object(found)
    said = {name: parts[name] for name in ("code", *_SAID)}
    if any(type(text) is not str for text in said.values()):
        raise ValueError("what a diagnostic says is text")
    span = read_value(parts["span"], kept)
    if span is not None and type(span) is not Span:
        raise ValueError("a diagnostic stands at a span")
    facts = {name: read_value(fact, kept) for name, fact in as_object(parts["facts"]).items()}
    made = _rebuilt(said, span, facts)
    if made is not None:
        return made
    if said["severity"] != ("warning" if said["code"].startswith("W") else "error"):
        raise ValueError("a code says how severe it is")
    stands = AsSaid(
        span=span,
        message_then=said["message"],
        label_then=said["label_text"],
        help_then=said["help_text"],
    )
    vars(stands)["code"] = said["code"]
    return stands


def _rebuilt(said: dict[str, str], span: Span | None, facts: dict[str, Any]) -> Diagnostic | None:
    kind = _codes().get(said["code"])
    if kind is None:
        return None
    if facts.keys() != {each.name for each in fields(kind)} - {"span"}:
        return None
    try:
        made = kind(span=span, **facts)
        return made if all(getattr(made, name) == said[name] for name in _SAID) else None
    except Exception:  # wordings are formatted with facts of any kind
        return None


def _codes() -> dict[str, type[Diagnostic]]:
    """Every code there is."""
    for module in iter_modules(mechdsl.diagnostics.__path__):
        if module.name[1:3].isdigit():
            import_module(f"mechdsl.diagnostics.{module.name}")
    return CODES
