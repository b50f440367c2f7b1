"""Changes registered outside the package with one class each."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import permutations

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.vocab.corruptions import CHANGES

from ..parsing import format_file, parse

FILE = """mech 1
model toy = zoo("counting")
prompts p {{
  count in 1..3
  said = "apple pear plum"
  shout = "fig"
  template "Part 1: {{said}} {{shout}} Count {{count}}:"
  answer " {{count}}"
  corrupt c {{
    {}
  }}
}}
experiment e {{
  model toy
  prompts p limit 3
  from clean into c
  patch layer * head * at last token
  measure logit(answer) as delta
}}
"""


@pytest.fixture(autouse=True, scope="module")
def _entries() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    importlib.import_module("tests.data.shout")
    yield
    for word in ("shout", "erase"):  # other tests use the unmodified language
        del CHANGES._entries[word]  # pyright: ignore[reportPrivateUsage]


def texts(*lines: str) -> list[str]:
    """The corrupted prompts."""
    checked = check_source(Source(FILE.format("\n    ".join(lines))))
    assert not [d for d in checked.diagnostics if d.severity == "error"], checked.diagnostics
    return [row.text for row in checked.experiments[0].table.runs["c"].rows]


def errors(*lines: str) -> list[tuple[str, str]]:
    checked = check_source(Source(FILE.format("\n    ".join(lines))))
    return [(d.code, d.message) for d in checked.diagnostics if d.severity == "error"]


def test_registered_corruption_edits_values_with_seeded_draws() -> None:
    found = [text.removeprefix("Part 1: ").rpartition(" fig")[0] for text in texts("shout said")]
    orders = {" ".join(order) for order in permutations(("APPLE", "PEAR", "PLUM"))}
    assert set(found) <= orders
    assert len(set(found)) > 1
    assert texts("shout said") == texts("shout said")


def test_registered_corruption_takes_its_clause_and_several_values() -> None:
    assert all(" FIG FIG Count" in text for text in texts("shout said, shout by 2"))


def test_registered_token_corruption_edits_tokens() -> None:
    assert all("apple  plum fig" in t for t in texts('replace "pear" token with ""'))
    assert texts('erase "pear" token') == texts('replace "pear" token with ""')


def test_keyword_of_a_registered_corruption_remains_a_valid_name() -> None:
    """A value of the same name, as a definition and as an operand, with no line break between."""
    found = texts('shout = "lemon" shout shout erase "Part" token')
    assert all("LEMON" in text and "Part" not in text for text in found)


def test_registered_corruption_is_formatted() -> None:
    written = FILE.format('shout  said,shout   by 2 erase   "pear"   token')
    tree, problems = parse(Source(written))
    assert not problems
    assert '    shout said, shout by 2\n    erase "pear" token\n' in format_file(tree)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("shout", "E0101", "unexpected end of the `shout` statement"),
        ("shout 3", "E0101", "unexpected `3`"),
        ("shout said with 3", "E0101", "unexpected `3`"),
        ("shout said token", "E0101", "unexpected `said token`"),
        ("erase", "E0101", "unexpected end of the `erase` statement"),
        ("erase said", "E0101", "unexpected `said`"),
        ("shuot said", "E0102", "`shuot`"),
        ("shout siad", "E0501", "`siad`"),
        ("shout said by count", "E0515", "`shout` takes a plain number"),
        ("shout count", "E0503", "only a text can be shouted"),
    ],
)
def test_invalid_registered_corruption_reports_code_and_cause(
    line: str, code: str, said: str
) -> None:
    ((found, message),) = errors(line)
    assert found == code
    assert said in message
