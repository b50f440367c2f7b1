"""Prompts may contain any characters: outputs show them and don't execute them."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mechdsl.base.text import (
    dump_json,
    escape_hidden,
    escape_unencodable,
    escape_xml,
    hidden_characters,
)
from mechdsl.program import spec
from mechdsl.resolve.cells import CellKey
from mechdsl.results.experiment_result import (
    ExperimentResult,
    FileResult,
    Replies,
    RepliesByPrompt,
    ResultCircuit,
)
from mechdsl.results.results import Results
from mechdsl.show.console import visible_console
from mechdsl.show.output import save_report, show_report
from mechdsl.vocab.reports import REPORTS

from ..quick import some
from .synthetic import counted, finished, heads, positions, read_tokens, report, wrote

HOSTILE = (
    "\x1b[31m\x1b]0;owned\x07\x9b2J\u202egnp\u202c\u200b\r\x00\ufffe[b]:cat:</script><script>x()"
)
"""ESC, OSC, CSI, bidirectional override, zero width, noncharacter; rich and HTML markup."""


# --- characters ---


def test_hidden_characters_match_unicode_categories() -> None:
    """Characters that later versions of Unicode add may be hidden too."""
    for number in range(sys.maxunicode + 1):
        char = chr(number)
        category = unicodedata.category(char)
        never = category == "Cn" and (number & 0xFFFE == 0xFFFE or 0xFDD0 <= number <= 0xFDEF)
        wanted = category in ("Cc", "Cf", "Cs", "Zl", "Zp") or never
        found = hidden_characters().match(char) is not None
        assert found == wanted or (found and category == "Cn"), hex(number)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 中 \xa0", "plain é 中 \xa0"),
        ("\x1b[1m", "\\x1b[1m"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\u202eabc", "\\u202eabc"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud800", "\\ud800"),
    ],
)
def test_escape_hidden_replaces_only_hidden_characters(text: str, shown: str) -> None:
    assert escape_hidden(text) == shown
    assert escape_hidden(shown) == shown
    assert escape_hidden("a\nb", keep="\n") == "a\nb"


def test_escape_xml_accepts_every_character() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    ElementTree.fromstring(f'<a b="{escape_xml(every)}">{escape_xml(every)}</a>')


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", None])
def test_escaped_json_parses_to_the_same_value(encoding: str | None) -> None:
    value = {"é\U0001f600": HOSTILE + "\ud800"}
    text = dump_json(value, indent=1)
    assert not hidden_characters().search(text.replace("\n", ""))
    written = escape_unencodable(text, encoding)
    written.encode(encoding or "ascii")
    assert json.loads(written) == value
    with pytest.raises(ValueError, match="JSON"):
        dump_json(float("nan"))


# --- reports ---


def hostile_replies(found: Replies) -> Replies:
    def texts(own: RepliesByPrompt) -> RepliesByPrompt:
        return {n: tuple(replace(r, text=r.text + HOSTILE) for r in rs) for n, rs in own.items()}

    return Replies(
        tuple(map(texts, found.cells)),
        {f"{run}{HOSTILE}" if run != "clean" else run: texts(t) for run, t in found.runs.items()},
        {row: text + HOSTILE for row, text in found.prompts.items()},
    )


def hostile(result: ExperimentResult) -> ExperimentResult:
    """Add hostile text wherever a prompt, a name or an expression can contain it."""
    position = "position" in result.axes

    def cell(each: CellKey) -> CellKey:
        coords = dict(each.coords)
        if position:
            coords["position"] = f"{coords['position']}{HOSTILE}"
        else:
            coords["head"] = f"{coords['head']}{HOSTILE}" if "head" in coords else ""
        coords = {key: value for key, value in coords.items() if value != ""}
        return replace(each, coords=coords, tokens=tuple(f"{t}{HOSTILE}" for t in each.tokens))

    return replace(
        result,
        name=f"where{HOSTILE}",
        model=f"toy{HOSTILE}",
        cells=tuple(map(cell, result.cells)),
        measures=tuple(replace(m, label=f"{m.label}{HOSTILE}") for m in result.measures),
        conventions={f"{k}{HOSTILE}": f"{v}{HOSTILE}" for k, v in result.conventions.items()},
        texts=tuple(tuple(f"{t}{HOSTILE}" for t in row) for row in result.texts),
        replies=hostile_replies(result.replies),
        row_values={k: [f"{v}{HOSTILE}" for v in vs] for k, vs in result.row_values.items()},
    )


def ablated_circuit() -> ExperimentResult:
    """Names of a circuit come from the file and can't be hostile."""
    edges = (("embed", "L0H1.q"), ("L0H1", "logits"))
    return replace(heads(), circuit=ResultCircuit("c", 2, 4, 4, 16, False, edges, (1.0, -2.0), 9))


CASES: dict[str, tuple[Callable[[], ExperimentResult], spec.Report]] = {
    "table": (heads, report("table")),
    "table by value": (heads, report("table", by="count")),
    "heatmap": (heads, report("heatmap", variable="layer", by="head")),
    "lines": (positions, report("lines", variable="layer", by="position")),
    "lines of words": (positions, report("lines", variable="position")),
    "bars": (positions, report("bars", variable="position", by="layer")),
    "confusion": (counted, report("confusion", variable="count", by="argmax")),
    "overlay": (read_tokens, report("overlay")),
    "texts": (wrote, report("texts")),
    "graph": (ablated_circuit, report("graph")),
    "csv": (heads, report("csv")),
    "json": (heads, report("json")),
    "parquet": (heads, report("parquet")),
}


def built(name: str) -> tuple[ExperimentResult, spec.Report]:
    build, line = CASES[name]
    return finished(hostile(build())), line


def test_every_kind_of_report_has_a_case() -> None:
    kinds = {name for name, kind in REPORTS.items() if kind.supported}
    assert {line.kind for _, line in CASES.values()} == kinds


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("csv", "parquet")])
@pytest.mark.parametrize("width", [60, 200])
def test_terminal_output_escapes_hidden_characters(name: str, width: int) -> None:
    result, line = built(name)
    text = io.StringIO()
    show_report(result, line, visible_console(file=text, width=width, plain=True))
    shown = text.getvalue()
    assert not hidden_characters().search(shown.replace("\n", ""))
    if name == "json":
        json.loads(shown)
        return
    whole = "".join(shown.split())
    assert "\\x1b[31m" in whole
    assert "[b]:cat:" in whole


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


PICTURES = [
    (name, suffix)
    for name, (_, line) in CASES.items()
    for suffix in (".svg", ".html", ".txt")
    for signature in [REPORTS[line.kind].signature]
    if signature is not None and signature.to is not None and suffix in signature.to.suffixes
]


@pytest.mark.parametrize("picture", some(PICTURES, PICTURES[::2]), ids="".join)
def test_pictures_and_pages_contain_no_hostile_script_or_character(
    picture: tuple[str, str], tmp_path: Path
) -> None:
    name, suffix = picture
    result, line = built(name)
    path = tmp_path / f"shown{suffix}"
    save_report(result, line, path)
    text = path.read_text(encoding="utf-8")
    if suffix == ".html":
        page = Tags()
        page.feed(text)
        assert not any(script.startswith("x()") for script in page.scripts)
        assert not re.search("[\x1b\x07\x9b\u202e]", "".join(page.scripts[-1:]) or text)
    else:
        assert not hidden_characters().search(text.replace("\n", ""))
    if suffix == ".svg":
        root = ElementTree.fromstring(text)
        assert "\\x1b" in "".join(root.itertext())
        assert not [each for each in root.iter() if each.tag.endswith("script")]


def test_notebook_html_escapes_hidden_characters() -> None:
    for result in (built("table")[0], Results((FileResult("f", (built("table")[0],)),))):
        text = result._repr_html_()
        ElementTree.fromstring(f"<div>{text}</div>")
        assert not hidden_characters().search(text)


# --- machine-readable output ---


def test_csv_keeps_hostile_text_unescaped() -> None:
    result, _ = built("table")
    for text in (result.to_csv(), Results((FileResult("f", (result,)),)).to_csv()):
        records = list(csv.DictReader(io.StringIO(text, newline="")))
        assert len(records) == len(result.cells)
        assert {each["model"] for each in records} == {f"toy{HOSTILE}"}


def test_json_document_keeps_hostile_text_unescaped() -> None:
    result, _ = built("table")
    document = json.loads(Results((FileResult("f", (result,)),)).to_json())
    assert document["files"][0]["experiments"][0]["model"] == f"toy{HOSTILE}"
