"""Tables of the LALR parser: built from the grammar once, then cached.

A wheel ships the tables, which `hatch_build.py` builds. A checkout builds them at first use and
writes them next to this file. If that folder is read-only, or if the tables of a wheel come from
another version of lark, the user's cache folder is used. If that fails too, every start rebuilds
the tables.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import lark
from lark import Lark

from mechdsl.base import files
from mechdsl.base.files import cache_folder, write_atomically

START_RULES = (
    "start",
    "top_lines",
    "data_lines",
    "change_lines",
    "experiment_lines",
    "edit_lines",
    "placeholder",
)
"""Units that can be parsed alone: a file, the body of each block type, one expression."""

TABLES = files.PACKAGE_FOLDER / "syntax" / "tables.json"

FORMAT_VERSION = 2
"""Version of the saved file's format."""


def grammar_file() -> Path:
    """Return the path of the grammar."""
    return files.shipped_path("grammar/mech.lark", "grammar/mech.lark")


def load_tables() -> dict[str, Any]:
    """Load the input of lark's parser: `data` and `memo`."""
    grammar = grammar_file().read_text("utf-8")
    wanted = fingerprint(grammar)
    for path in _places():
        if (loaded := _read(path, wanted)) is not None:
            return loaded
    tables = build(grammar)
    _keep(as_json(tables, wanted))
    return tables


def fingerprint(grammar: str) -> str:
    """Return the key of saved tables: a hash of the grammar and the version of lark."""
    lark_version = ".".join(lark.__version__.split(".")[:2])
    return hashlib.sha256(f"{FORMAT_VERSION}\n{lark_version}\n{grammar}".encode()).hexdigest()


def build(grammar: str) -> dict[str, Any]:
    """Build the tables of a grammar as plain lists, dictionaries and strings. Takes a second."""
    built: Any = Lark(
        grammar,
        parser="lalr",
        lexer="contextual",
        start=list(START_RULES),
        keep_all_tokens=True,
        maybe_placeholders=False,
    )
    file = io.BytesIO()  # lark can only save to a file
    built.save(file)
    return pickle.loads(file.getvalue())


def as_json(tables: dict[str, Any], made_from: str) -> str:
    """Serialise the tables.

    A state's row is [state, shifts, reductions]. Shifts alternate tokens and next states;
    reductions are pairs of a rule and the number of its list of lookahead tokens.
    A rule is [number, origin, symbols, order, alias, options]; origin, symbols and options are
    indices into `parts`, because thousands of rules share a few hundred of them.
    """
    parser: dict[str, Any] = tables["data"]["parser"]["parser"]
    before: dict[tuple[int, ...], int] = {}
    rows: list[Any] = []
    for state, actions in parser["states"].items():
        shifts: list[int] = []
        reduced: dict[int, list[int]] = {}
        for token, (reduces, target) in actions.items():
            if reduces:
                reduced.setdefault(target["@"], []).append(token)
            else:
                shifts += token, target
        pairs = [[rule, before.setdefault(tuple(t), len(before))] for rule, t in reduced.items()]
        rows.append([state, shifts, pairs])
    short = {**parser, "states": rows, "before": list(before)}
    data = {**tables["data"], "parser": {**tables["data"]["parser"], "parser": short}}
    parts: dict[str, int] = {}

    def index(part: Any) -> int:
        return parts.setdefault(json.dumps(part), len(parts))

    rules: list[Any] = []
    memo = dict(tables["memo"])
    for number, entry in tables["memo"].items():
        if entry["__type__"] == "Rule":
            symbols = [index(symbol) for symbol in entry["expansion"]]
            names = [index(entry["origin"]), symbols, entry["order"], entry["alias"]]
            rules.append([number, *names, index(entry["options"])])
            del memo[number]
    saved = {
        "made_from": made_from,
        "data": data,
        "memo": memo,
        "rules": rules,
        "parts": [json.loads(part) for part in parts],
    }
    return json.dumps(saved, separators=(",", ":"))


def from_json(text: str, made_from: str) -> dict[str, Any] | None:
    """Deserialise tables; None if they were built from a different grammar or lark version."""
    saved: dict[str, Any] = json.loads(text)
    if saved["made_from"] != made_from:
        return None
    parser = saved["data"]["parser"]["parser"]
    before = parser.pop("before")
    states: dict[int, dict[int, Any]] = {}
    for state, shifts, reductions in parser["states"]:
        following = iter(shifts)
        states[state] = {token: (0, target) for token, target in zip(following, following)}  # noqa: B905
        for rule, tokens in reductions:
            states[state].update(dict.fromkeys(before[tokens], (1, {"@": rule})))
    parser["states"] = states
    parser["tokens"] = {int(number): name for number, name in parser["tokens"].items()}
    memo = {int(number): entry for number, entry in saved["memo"].items()}
    parts = saved["parts"]
    for number, origin, symbols, order, alias, options in saved["rules"]:
        memo[number] = {
            "origin": parts[origin],
            "expansion": [parts[symbol] for symbol in symbols],
            "order": order,
            "alias": alias,
            "options": parts[options],
            "__type__": "Rule",
        }
    return {"data": saved["data"], "memo": memo}


def _places() -> list[Path]:
    """Return the possible paths of the tables, the preferred one first."""
    folder = cache_folder()
    return [TABLES] if folder is None else [TABLES, folder / "syntax" / TABLES.name]


def _read(path: Path, wanted: str) -> dict[str, Any] | None:
    """Read the tables of a file; None if they are missing, damaged or stale."""
    try:
        return from_json(path.read_text("utf-8"), wanted)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _keep(text: str) -> None:
    # The files of an installed wheel are never overwritten.
    installed = grammar_file().is_relative_to(files.PACKAGE_FOLDER)
    for path in _places()[installed:]:
        with suppress(OSError):
            write_atomically(path, text)
            return
