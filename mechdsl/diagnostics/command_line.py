"""E0208 and the pages of `mechdsl explain`: command-line errors, documentation by code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from mechdsl.base.files import shipped_path
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic, HintedDiagnostic, did_you_mean
from mechdsl.diagnostics.other_tools import (
    METRIC_NAMES,
    TERMS,
    TOOLS,
    translate_path,
    translate_word,
)


class BadCommandLine(HintedDiagnostic):
    """A mistake on the command line."""

    code = "E0208"
    title = "{reason}"
    reason: str


class PluginNotLoaded(HintedDiagnostic):
    """A plugin that is not installed, or can't be imported."""

    code = "E0211"
    title = "plugin `{plugin}` {reason}"
    plugin: str
    reason: str


def write_error(error: OSError) -> BadCommandLine:
    """Return E0208 for a file that can't be written."""
    said = (error.strerror or str(error)).lower()
    return BadCommandLine(
        reason=f"cannot write `{error.filename}`: {said}",
        hint="choose a path in an existing, writable folder",
    )


LANGUAGE_PAGE = "language"
"""Name of the page of the language."""


def _pages_folder() -> Path:
    return shipped_path("error_pages", "docs/errors")


def page_codes() -> list[str]:
    """Return every code that has a page."""
    return sorted(path.stem for path in _pages_folder().glob("[EW]*.md"))


def read_page(code: str) -> str | None:
    """Read the page of a code; None if there is none."""
    path = _pages_folder() / f"{code}.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


_CODE = re.compile(r"[EWew][0-9]+")

_WORD = re.compile(r"[A-Za-z_]\w*")

_FILE = re.compile(r"[/\\]|\.\w*[A-Za-z]\w*$")
"""A part of a path, or the extension of a file."""

_LANGUAGE_ROW = re.compile(r"\| (?P<example>`.*?`) \| (?P<meaning>.*?) \|")


def is_page_name(text: str) -> bool:
    """Whether a text is `language`, a code in any case, or words: `patch`, `last token`.

    A file of that name takes precedence over a word. A text of several lines is a `.mech` file.
    """
    if "\n" in text:
        return False
    if text == LANGUAGE_PAGE or _CODE.fullmatch(text):
        return True
    if translate_path(text) is not None:
        return not Path(text).is_file()
    if _WORD.search(text) is None or _FILE.search(text):
        return False
    if Path(text).is_dir():
        return _WORD.fullmatch(text) is not None and bool(_word_page(text))
    return not Path(text).exists()


@cache
def _language_page() -> str:
    return shipped_path("language.md", "docs/language.md").read_text(encoding="utf-8")


def language_words() -> list[str]:
    """Return every word in the examples of the language page, without the texts in quotes."""
    words: set[str] = set()
    for _, example, _ in _language_rows():
        words.update(_WORD.findall(re.sub(r'"[^"]*"', "", example)))
    return sorted(word for word in words if len(word) > 1 or word.islower())


def _language_rows() -> list[tuple[str, str, str]]:
    """Return section, example and meaning of each row of the language page's tables."""
    rows: list[tuple[str, str, str]] = []
    section = ""
    for line in _language_page().splitlines():
        if line.startswith("## "):
            section = line[3:]
        row = _LANGUAGE_ROW.match(line)
        if row is not None:
            rows.append((section, row["example"].replace("\\|", "|"), row["meaning"]))
    return rows


_SHOWN_ROWS = 12
"""Maximum number of rows of a word's page."""


def _word_page(word: str) -> str:
    """Return the rows of the language page whose example contains a word or a phrase.

    Rows whose example begins with the word replace the others, if there are any; otherwise rows
    with the word near their beginning come first, and of these sections on images last.
    """
    whole = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")
    pages = [
        (match.start(), row)
        for row in _language_rows()
        if (match := whole.search(_without_texts(row[1]))) is not None
    ]
    first = min((start for start, _ in pages), default=0)
    if first <= 1:  # the example is in backticks
        pages = [page for page in pages if page[0] == first]
    pages.sort(key=lambda each: (each[0], "image" in each[1][0].lower()))
    rows = [row for _, row in pages]
    lines: list[str] = []
    for n, (section, example, meaning) in enumerate(rows[:_SHOWN_ROWS]):
        if n == 0 or section != rows[n - 1][0]:
            lines += [f"# `{word}`: {section}", ""]
        lines += [example, f"    {meaning}", ""]
    if (more := len(rows) - _SHOWN_ROWS) > 0:
        lines += [f"{count_noun(more, 'more row')} in `mechdsl explain {LANGUAGE_PAGE}`.", ""]
    return "\n".join(lines)


def _without_texts(example: str) -> str:
    return re.sub(r'"[^"]*"', lambda text: " " * len(text[0]), example)


def _find_word(text: str) -> tuple[str, list[Diagnostic]]:
    word = " ".join(text.split())
    plain = re.sub(r"[_\s-]+", " ", word).strip().lower()
    for spelling in dict.fromkeys((word, word.lower(), plain, plain.replace(" ", "_"))):
        page = _word_page(spelling) if spelling else ""
        if page:
            return page, []
    return "", [
        BadCommandLine(
            reason=f"`{word}` is not a keyword, an error code or a file", hint=_hint(word, plain)
        )
    ]


def _hint(word: str, plain: str) -> str:
    """Return the hint for an unknown word.

    Args:
        plain: The word in lower case, with spaces for other separators.
    """
    site = translate_path(word) or translate_word(word.split(" ")[0])
    if site:
        return f"write `{site}`; `mechdsl explain {site.split(' ')[0]}` describes it"
    term = TERMS.get(plain) or TERMS.get(plain.removesuffix("s"))
    if term:
        return f"see `{term}`: `mechdsl explain {term}`"
    metric = METRIC_NAMES.get(plain.replace(" ", "_"))
    if metric:
        return f"write `{metric}`; `mechdsl explain {metric.split('(')[0]}` describes it"
    if plain in TOOLS:
        return "name a hook or module of it: `mechdsl explain hook_z`"
    parts = [part for part in _WORD.findall(word) if _word_page(part)]
    if parts and " " in word:
        return f"one word is enough: `mechdsl explain {parts[0]}`"
    general = "`mechdsl explain language` lists every construct; a file ends in `.mech`"
    return did_you_mean(word, language_words(), general)


def agent_page() -> str:
    """Return the summary of the language for agents, from the rows of the language page."""
    from mechdsl.diagnostics.agent_page import write_agent_page

    return write_agent_page(_language_rows())


def find_agent_page(name: str) -> tuple[str, list[Diagnostic]]:
    """Return the summary of the language for agents; E0208 for another page than `language`."""
    if name == LANGUAGE_PAGE:
        return agent_page(), []
    reason = "`--for-agents` is an option of `mechdsl explain language`"
    hint = 'from Python, write `mechdsl.explain("language", for_agents=True)`'
    return "", [BadCommandLine(reason=reason, hint=hint)]


def find_page(name: str) -> tuple[str, list[Diagnostic]]:
    """Find the page of the language, of a code in any case, or of a word; E0208 if there is
    none."""
    if name == LANGUAGE_PAGE:
        return _language_page(), []
    if not _CODE.fullmatch(name):
        return _find_word(name)
    code = name.upper()
    text = read_page(code)
    if text is not None:
        return text, []
    hint = did_you_mean(code, page_codes(), "codes look like E0305")
    return "", [BadCommandLine(reason=f"there is no code `{code}`", hint=hint)]
