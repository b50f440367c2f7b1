"""`mechdsl explain` with words, phrases, codes, terms of papers and names of other tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechdsl.diagnostics.command_line import find_page, is_page_name
from mechdsl.diagnostics.other_tools import METRIC_NAMES, TERMS
from mechdsl.diagnostics.rendering import render_full


@pytest.mark.parametrize(
    ("asked", "heading"),
    [
        ("patch", "# `patch`: Rules"),
        ("recovery", "# `recovery`: Effects"),
        ("z", "# `z`: Coordinates"),
        ("top", "# `top`: "),
        ("layer", "# `layer`: Coordinates"),
        ("head", "# `head`: Coordinates"),
        ("last token", "# `last token`: Positions"),
        ("  last   token ", "# `last token`: Positions"),
        ("last-item token", "# `last-item token`: Positions"),
        ("logit lens", "# `logit_lens`: Rules"),
        ("Patch", "# `patch`: Rules"),
        ("RECOVERY", "# `recovery`: Effects"),
        ("mech 1", "# `mech 1`: Top-level statements"),
        ("logit(answer)", "# `logit(answer)`: Metrics"),
        ("e0301", "# E0301:"),
    ],
)
def test_explain_word_or_phrase_prints_its_page(asked: str, heading: str) -> None:
    assert is_page_name(asked)
    text, problems = find_page(asked)
    assert not problems
    assert text.startswith(heading)


@pytest.mark.parametrize(
    ("asked", "fix"),
    [
        ("ptach", "did you mean `patch`?"),
        ("E0999", "did you mean `E0"),
        ("hook_z", "write `z layer *`; `mechdsl explain z` describes it"),
        ("blocks.3.hook_resid_post", "write `resid_post layer 3`"),
        ("transformer.h[3].attn", "write `attn_out layer 3`"),
        ("residual stream", "write `resid_post layer *`"),
        ("activation patching", "see `patch`"),
        ("Steering", "see `add`"),
        ("run_with_cache", "see `save`"),
        ("p-value", "see `test`"),
        ("kl_div", "write `kl(clean)`"),
        ("patch everything", "`mechdsl explain patch`"),
        ("TransformerLens", "`mechdsl explain hook_z`"),
        ("zzzz", "`mechdsl explain language`"),
    ],
)
def test_explain_foreign_term_suggests_the_term_of_mechdsl(asked: str, fix: str) -> None:
    assert is_page_name(asked)
    text, problems = find_page(asked)
    assert not text
    assert fix in render_full(problems)


@pytest.mark.parametrize("term", [*TERMS, *METRIC_NAMES])
def test_translated_term_leads_to_a_page(term: str) -> None:
    meant = TERMS[term] if term in TERMS else METRIC_NAMES[term].split("(")[0]
    text, problems = find_page(meant)
    assert text
    assert not problems


@pytest.mark.parametrize("path", ["patch.mech", "runs/patch", "data.jsonl", "-", ".."])
def test_path_is_not_a_page_name(path: str) -> None:
    assert not is_page_name(path)


def test_file_takes_precedence_over_a_word_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patch").write_text("mech 1\n", encoding="utf-8")
    (tmp_path / "zoo").mkdir()
    (tmp_path / "data").mkdir()
    assert not is_page_name("patch")
    assert is_page_name("zoo")
    assert not is_page_name("data")


def test_long_page_ends_with_the_number_of_further_rows() -> None:
    text, _ = find_page("of")
    assert text.count("\n    ") == 12
    assert text.rstrip().endswith("in `mechdsl explain language`.")
