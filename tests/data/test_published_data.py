"""Prompt sets of published experiments; skipped unless MECHDSL_DATA is set."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechdsl.diagnostics.core import has_errors
from mechdsl.prompts.positions.cells import hit_texts
from mechdsl.prompts.tokens.tokenizer import TextTokenizer

from .support import build, cells, hit


@pytest.mark.parametrize(
    ("file", "columns", "rows"),
    [
        ("ioi.csv", "{clean}", 499),
        ("greater_than.csv", "{clean}", None),
        ("colored_objects.csv", "{clean}", None),
        ("sva_nounpp_test.jsonl", "{clean_prefix} ({case})", None),
        ("fv_antonym.json", "Q: {input} A:", None),
        ("relation_country_language.json", "People in {subject} speak", 24),
    ],
)
def test_published_file_is_read(
    data: Path, gpt2: TextTokenizer, file: str, columns: str, rows: int | None
) -> None:
    made, diagnostics = build(f'rows "{data / file}" template "{columns}"', gpt2)
    assert not has_errors(diagnostics)
    assert made is not None
    assert rows is None or len(made) == rows


def test_known_facts_have_their_subjects(data: Path, gpt2: TextTokenizer) -> None:
    made, diagnostics = build(
        f"""rows "{data / "known_facts.json"}" template "{{prompt}}" span subject in prompt
        answer " {{attribute}}"
        corrupt noised {{ add gaussian(std: 3 sd, samples: 10) to embed at subject tokens }}
        corrupt other {{ subject = other(subject) }}""",
        gpt2,
        limit=200,
    )
    assert not has_errors(diagnostics)
    assert made is not None
    first, middle, last = cells("each token of subject", made, gpt2)
    for n, row in enumerate(made.runs["clean"].rows):
        words = row.values["subject"].split()
        assert hit(made, last, n)[0][0] in words[-1]
        assert len(hit(made, first, n)) <= 1
        assert row.values["subject"] not in made.runs["other"].rows[n].text.split()
    assert any(len(h) > 1 for h in middle.hits)
    noise = made.runs["noised"].noise
    assert noise is not None
    # One standard deviation is taken over all thousand subjects, not over 200.
    assert len(noise.sd_tokens) > 3 * sum(map(len, noise.positions))


def test_ioi_pairs_differ_in_one_name(data: Path, gpt2: TextTokenizer) -> None:
    made, diagnostics = build(
        f"""rows "{data / "ioi.csv"}" template "{{clean}}" answer io wrong s
        corrupt abc {{ template "{{corrupted_abc}}" }}""",
        gpt2,
        limit=50,
    )
    assert not has_errors(diagnostics)
    assert made is not None
    for clean, abc in zip(made.runs["clean"].rows, made.runs["abc"].rows, strict=True):
        pairs = zip(clean.text.split(), abc.text.split(), strict=True)
        assert sum(a != b for a, b in pairs) == 1
        assert clean.texts["answer"].text.startswith(" ")
    (cell,) = cells("last token", made, gpt2)
    assert hit_texts(made, "clean", cell) == ("to",)


def test_function_vector_prompts_have_ten_shots_and_a_question(
    data: Path, gpt2: TextTokenizer
) -> None:
    made, diagnostics = build(
        f"""rows "{data / "fv_country_capital.json"}"
        shots = list("Q: {{input}}\\nA: {{output}}", 10, from: p, sep: "\\n\\n", distinct: true)
        template "{{shots}}\\n\\nQ: {{input}}\\nA:" answer " {{output}}" """,
        gpt2,
        limit=20,
    )
    assert not has_errors(diagnostics)
    assert made is not None
    for row in made.runs["clean"].rows:
        assert row.text.count("Q:") == 11
        assert row.text.count(f"Q: {row.values['input']}\n") == 1
