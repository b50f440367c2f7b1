"""Tokens of the answer as positions: each text that a measure reads follows the prompt in its own
forward pass, here one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult

from ..quick import in_turn
from ..reference.forward import Edge, Place, Write, forward
from ..reference.points import Point, copied, zeroed
from .support import (
    MODES,
    ROWS,
    Array,
    Prompt,
    Record,
    agree,
    bare,
    experiment,
    ids_of,
    prompt,
    run_file,
    try_file,
    write_rows,
)

FAMILIES = ("gpt2", "llama", "gpt_neox")
LAYERS = 3
PROMPTS = """
prompts p {
  rows "answers.jsonl"
  xs = list(item, from: words, sep: " ")
  template "{xs} w40 {subject} w41 {cue} w42"
  answer " {tail}"
  wrong " {rival}"
  text two = " {pair}"
  text some = " {ragged}"
  corrupt other { subject = alt }
  corrupt longer { words = more  cue = cue2 }
}
"""
NAMED = """
prompts p {
  rows "answers.jsonl"
  answer = pair
  template "{cue} {answer} w42"
  text some = " {ragged}"
}
"""
"""A span of the prompt has the name `answer`."""
TEXTS = (
    ("w1 w2", "w4 w7 w2", "w3 w5", "w1"),
    ("w2 w8 w5", "w5", "w9 w1", "w4 w7 w2"),
    ("w5 w6 w10", "w8 w9", "w2 w7", "w9 w2 w3"),
    ("w9 w3", "w1 w4", "w6 w20", "w6 w1 w8"),
)
"""Texts of each row: answer, wrong, two, some. All but `two` vary in length; the longer of wrong
and some has three tokens in every row."""
RECORDS: list[Record] = [
    {**row, "tail": answer, "rival": wrong, "pair": two, "ragged": some}
    for row, (answer, wrong, two, some) in zip(ROWS, TEXTS, strict=True)
]


@dataclass(frozen=True)
class PromptAndText:
    """The input of a row: its prompt and a text, without the text's last token."""

    family: str
    row: int
    run: str
    text: str

    @property
    def prompt(self) -> Prompt:
        return prompt(RECORDS[self.row], self.run)

    @property
    def target(self) -> list[int]:
        return ids_of(RECORDS[self.row][self.text].split())[1:]

    @property
    def ids(self) -> list[int]:
        return [*self.prompt.ids, *self.target[:-1]]

    @property
    def answer(self) -> list[int]:
        """Positions of the text's tokens that are inputs."""
        return list(range(len(self.prompt.ids), len(self.ids)))

    @property
    def seen(self) -> Mapping[Place, Tensor]:
        """All sites of the unpatched run."""
        return _seen(self.family, tuple(self.ids))

    def at(self, run: str) -> PromptAndText:
        """The same text after the prompt of another run."""
        return PromptAndText(self.family, self.row, run, self.text)

    def score(self, writes: Sequence[Write] = (), edges: Sequence[Edge] = ()) -> float:
        """The text's log-probability."""
        logits = forward(self.family, bare(self.family), self.ids, writes, edges).logits
        logs, last = logits.double().log_softmax(-1), self.prompt.last
        return float(sum(logs[last + n, token] for n, token in enumerate(self.target)))


@cache
def _seen(family: str, ids: tuple[int, ...]) -> Mapping[Place, Tensor]:
    return forward(family, bare(family), ids).seen


Changed = tuple[Sequence[Write], Sequence[Edge]]
Change = Callable[[PromptAndText], Changed | None]
"""The changes of a cell to a pass over the clean prompt and a text; None if the row lacks the
position."""


def written(change: Callable[[PromptAndText], Sequence[Write]]) -> Change:
    return lambda b: (change(b), ())


def head(layer: int, unit: int) -> list[Point]:
    return [Point("z", layer, unit)]


def zero(points: Sequence[Point], places: Callable[[PromptAndText], list[int]]) -> Change:
    return written(lambda b: zeroed(points, b.seen, places(b)))


def from_run(
    run: str,
    points: Sequence[Point],
    places: Callable[[PromptAndText], list[int]],
    onto: Callable[[PromptAndText], list[int]] | None = None,
) -> Change:
    def change(b: PromptAndText) -> Sequence[Write]:
        source = b.at(run)
        pairs = list(zip(places(source), (onto or places)(b), strict=False))
        return copied(points, source.seen, [p for p, _ in pairs], [p for _, p in pairs])

    return written(change)


def mean_of(points: Sequence[Point], places: Callable[[PromptAndText], list[int]]) -> Change:
    """The mean over the rows that have the token, each followed by the text of the row."""

    def change(b: PromptAndText) -> Sequence[Write]:
        rows = [PromptAndText(b.family, n, "clean", b.text) for n in range(len(RECORDS))]
        writes: list[Write] = []
        for point in points:
            for slot, target in enumerate(places(b)):
                found = [
                    r.seen[point.site, point.layer][place, point.unit]
                    for r in rows
                    for place in places(r)[slot : slot + 1]
                ]
                vector = torch.stack(found).mean(0)
                writes.append(Write(point.site, point.layer, vector, target, point.unit))
        return writes

    return written(change)


def held(b: PromptAndText) -> list[Write]:
    """Hold all heads and MLPs at their values in the unpatched run."""
    places = [(site, layer) for site in ("z", "mlp_out") for layer in range(LAYERS)]
    return [Write(site, layer, b.seen[site, layer]) for site, layer in places]


def path_to_logits(b: PromptAndText) -> Changed:
    source = b.at("other")
    return [*held(b), *copied(head(1, 0), source.seen, source.answer, b.answer)], ()


def path_to_queries(b: PromptAndText) -> Changed:
    source = b.at("other")
    senders = [*held(b), *copied(head(1, 0), source.seen, source.answer, b.answer)]
    found = forward(b.family, bare(b.family), b.ids, senders).seen
    return copied([Point("q", 2, 1)], found, b.answer, b.answer), ()


def everything(b: PromptAndText) -> list[int]:
    return list(range(len(b.ids)))


def subject(b: PromptAndText) -> list[int]:
    return [b.prompt.subject[-1]]


def nth(n: int) -> Callable[[PromptAndText], list[int]]:
    """The text's n-th token, if it is an input."""
    return lambda b: b.answer[n : n + 1]


def middle(b: PromptAndText) -> Changed | None:
    """The second of three tokens."""
    if len(b.target) < 3:
        return None
    return zeroed([Point("attn_out", 1)], b.seen, b.answer[1:2]), ()


def second_onto_first(b: PromptAndText) -> Changed | None:
    """Copy the longer prompt's vector at the text's second token, which some rows only predict."""
    source = b.at("longer")
    if len(b.answer) < 2:
        return None
    return copied([Point("resid_pre", 1)], source.seen, source.answer[1:2], b.answer[:1]), ()


def swapped(b: PromptAndText) -> Changed:
    last, first = b.prompt.last, len(b.prompt.ids)
    return copied(head(1, 2), b.seen, [last, first], [first, last]), ()


def blocked(keys: Callable[[PromptAndText], list[int]]) -> Change:
    return lambda b: ((), [Edge("block", 1, b.answer, keys(b))])


LOGPROB = "measure logprob(answer) as delta"
BOTH = "measure logprob(answer) - logprob(wrong) as delta"
TWO = "measure logprob(two) as delta"
SOME = "measure logprob(some) as delta"
UNEVEN = "measure logprob(some) - logprob(wrong) as delta"


@dataclass(frozen=True)
class Case:
    lines: tuple[str, ...]
    """Lines of the experiment, the measure last."""
    cells: dict[str | None, Change]
    large: float = 0.1


CASES: dict[str, Case] = {
    "all_and_answer": Case(
        ("ablate layer 1 head 2 at tokens * and answer with zero", BOTH),
        {None: zero(head(1, 2), everything)},
    ),
    "all_of_the_prompt": Case(
        ("ablate layer 1 head 2 at tokens * with zero", BOTH),
        {None: zero(head(1, 2), lambda b: list(range(len(b.prompt.ids))))},
    ),
    "answer_tokens": Case(
        ("from other into clean", "patch layers 0..1 head 1 at answer tokens", BOTH),
        {None: from_run("other", [Point("z", 0, 1), Point("z", 1, 1)], lambda b: b.answer)},
    ),
    "of_a_longer_prompt": Case(
        ("from longer into clean", "patch resid_pre layer 1 at answer tokens", BOTH),
        {None: from_run("longer", [Point("resid_pre", 1)], lambda b: b.answer)},
    ),
    "first_and_second": Case(
        (
            "from longer into clean",
            "patch resid_pre layer 1 at first token of answer, first token of answer + 1",
            LOGPROB,
        ),
        {
            "first token of answer": from_run("longer", [Point("resid_pre", 1)], nth(0)),
            "first token of answer + 1": from_run("longer", [Point("resid_pre", 1)], nth(1)),
        },
    ),
    "each_token_of_the_answer": Case(
        ("ablate attn_out layer 1 at each token of answer with zero", LOGPROB),
        {
            "answer first": zero([Point("attn_out", 1)], nth(0)),
            "answer middle": middle,
            "answer last": written(lambda b: ()),
        },
    ),
    "mean": Case(
        ("ablate layer 1 head 2 at {last token, answer tokens} with mean", TWO),
        {None: mean_of(head(1, 2), lambda b: [b.prompt.last, *b.answer])},
    ),
    "mean_of_ragged_texts": Case(
        ("ablate resid_pre layer 1 at first token of answer with mean", LOGPROB),
        {None: mean_of([Point("resid_pre", 1, 0)], nth(0))},
    ),
    "mean_of_what_some_only_predict": Case(
        ("ablate resid_pre layer 1 at first token of answer with mean", SOME),
        {None: mean_of([Point("resid_pre", 1, 0)], nth(0))},
    ),
    "mean_of_the_second_token": Case(
        ("ablate resid_pre layer 1 at first token of answer + 1 with mean", LOGPROB),
        {None: mean_of([Point("resid_pre", 1, 0)], nth(1))},
    ),
    "second_onto_first": Case(
        (
            "from longer into clean",
            "patch resid_pre layer 1 at first token of answer + 1 onto first token of answer",
            LOGPROB,
        ),
        {None: second_onto_first},
    ),
    "onto_the_answer": Case(
        (
            "from other into clean",
            "patch resid_pre layer 1 at subject token onto first token of answer",
            TWO,
        ),
        {
            None: from_run(
                "other", [Point("resid_pre", 1)], lambda b: [b.prompt.subject[-1]], nth(0)
            )
        },
    ),
    "swap": Case(
        ("swap layer 1 head 2 at last token with first token of answer", TWO),
        {None: swapped},
        0.02,
    ),
    "edges_from_the_answer": Case(
        ("block attention layer 1 from answer tokens to subject tokens", BOTH),
        {None: blocked(lambda b: list(b.prompt.subject))},
    ),
    "edges_to_the_answer": Case(
        ("block attention layer 1 from answer tokens to {cue token, answer token - 1}", TWO),
        {None: blocked(lambda b: [b.prompt.cue, *b.answer])},
    ),
    "path_to_logits": Case(
        ("from other into clean", "path layer 1 head 0 -> logits at answer tokens", BOTH),
        {None: path_to_logits},
        0.1,
    ),
    "path_to_queries": Case(
        (
            "from other into clean",
            "path layer 1 head 0 -> q layer 2 head 1 at answer tokens",
            BOTH,
        ),
        {None: path_to_queries},
        0.02,
    ),
}


@cache
def expected(family: str, measure: str, change: Change | None) -> Array:
    """[prompt]: values of one cell, or of the unpatched run without a change."""
    found: list[float] = []
    for row in range(len(RECORDS)):
        scores: dict[str, float] = {}
        for text, name in (
            ("answer", "tail"),
            ("wrong", "rival"),
            ("two", "pair"),
            ("some", "ragged"),
        ):
            if f"({text})" in measure:
                prompt_and_text = PromptAndText(family, row, "clean", name)
                done = ((), ()) if change is None else change(prompt_and_text)
                scores[text] = prompt_and_text.score(*done) if done is not None else np.nan
        first, *rest = scores.values()
        found.append(first - sum(rest))
    return np.array(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("answers")
    write_rows(made, RECORDS)
    (made / "answers.jsonl").write_text((made / "data.jsonl").read_text("utf-8"), "utf-8")
    return made


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), FAMILIES, list(MODES)[:2]))
def test_rules_at_answer_tokens_equal_the_reference(family: str, mode: str, folder: Path) -> None:
    text = "\n".join(experiment(name, "prompts p", *case.lines) for name, case in CASES.items())
    found = run_file(text, folder, bare(family), MODES[mode], prompts=PROMPTS)
    for name, case in CASES.items():
        check(found[name], family, case)


def check(result: ExperimentResult, family: str, case: Case) -> None:
    dropped = "2 rows of cells left out: they read an answer token that isn't an input of the model"
    said = dropped if second_onto_first in case.cells.values() else None
    assert result.conventions.get("left out") == said
    measure = case.lines[-1]
    if None not in case.cells:
        assert [cell.coords["position"] for cell in result.cells] == list(case.cells)
    values = np.stack([expected(family, measure, each) for each in case.cells.values()])
    agree(result.measures[0], values, expected(family, measure, None), large=case.large)


def test_resample_at_answer_tokens_uses_the_text_of_the_donor(tmp_path: Path) -> None:
    """Of two rows, each is the other's donor."""
    write_rows(tmp_path, RECORDS[:2])
    (tmp_path / "answers.jsonl").write_text((tmp_path / "data.jsonl").read_text("utf-8"), "utf-8")
    rule = "ablate layer 1 head 2 at answer tokens with resample"
    text = experiment("e", "prompts p", rule, TWO)
    found = run_file(text, tmp_path, bare("gpt2"), prompts=PROMPTS)["e"]
    for row in range(2):
        own, donor = (PromptAndText("gpt2", n, "clean", "pair") for n in (row, 1 - row))
        writes = copied(head(1, 2), donor.seen, donor.answer, own.answer)
        value = found.measures[0].patched[0, row]
        np.testing.assert_allclose(value, own.score(writes), atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "at", "measure", "left_out"),
    [
        ((0, 1), "first token of answer", SOME, [1]),  # row 0 has no such token, and needs none
        ((0, 1), "first token of answer", UNEVEN, [0, 1]),
        ((2, 3), "answer tokens", SOME, []),
    ],
)
@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_resample_excludes_rows_whose_donor_lacks_the_answer_token(
    rows: tuple[int, int], at: str, measure: str, left_out: list[int], mode: str, tmp_path: Path
) -> None:
    write_rows(tmp_path, [RECORDS[row] for row in rows])
    (tmp_path / "answers.jsonl").write_text((tmp_path / "data.jsonl").read_text("utf-8"), "utf-8")
    text = experiment("e", "prompts p", f"ablate embed at {at} with resample", measure)
    found = run_file(text, tmp_path, bare("gpt2"), MODES[mode], prompts=PROMPTS)["e"]
    values = found.measures[0].patched[0]
    assert np.flatnonzero(np.isnan(values)).tolist() == left_out
    said = {1: "1 row of cells", 2: "2 rows of cells"}.get(len(left_out))
    expected = said and f"{said} left out: the other row lacks the position"
    assert found.conventions.get("resample") == expected


def test_conventions_state_whether_rules_edit_the_answer(tmp_path: Path) -> None:
    lines = {
        "left": "ablate layer 1 head 2 at tokens * with zero",
        "both": "ablate layer 1 head 2 at tokens * and answer with zero",
        "one": "ablate layer 1 head 2 at last token with zero",
    }
    write_rows(tmp_path, RECORDS)
    (tmp_path / "answers.jsonl").write_text((tmp_path / "data.jsonl").read_text("utf-8"), "utf-8")
    text = "\n".join(experiment(name, "prompts p", rule, TWO) for name, rule in lines.items())
    found = run_file(text, tmp_path, bare("gpt2"), prompts=PROMPTS)
    said = {name: each.conventions.get("answer tokens") for name, each in found.items()}
    assert said["left"] == "`tokens *` covers only the prompt; the answer after it isn't edited"
    assert said["both"] is not None
    assert said["both"].startswith("rules act on the text that each measure reads")
    assert said["one"] is None


def test_top_of_answer_tokens_is_an_error(tmp_path: Path) -> None:
    write_rows(tmp_path, RECORDS)
    (tmp_path / "answers.jsonl").write_text((tmp_path / "data.jsonl").read_text("utf-8"), "utf-8")
    first = experiment("ranked", "prompts p", "ablate embed at each token of answer with zero", TWO)
    then = experiment("then", "prompts p", "ablate embed at top 1 of ranked tokens with zero", TWO)
    result, problems = try_file(first + then, tmp_path, bare("gpt2"), prompts=PROMPTS)
    assert result is None
    errors = [d.message for d in problems if d.severity == "error"]
    assert errors == [
        "`top 1 of ranked tokens` can't be picked: the cell `answer first` of `ranked` is "
        "in the answer, after the prompt"
    ]


def test_span_named_answer_does_not_depend_on_the_answer_text(tmp_path: Path) -> None:
    """The text's length differs between rows, which a mean over the prompt's span allows."""
    write_rows(tmp_path, RECORDS)
    (tmp_path / "answers.jsonl").write_text((tmp_path / "data.jsonl").read_text("utf-8"), "utf-8")
    rule = "ablate layer 1 head 2 at answer tokens with mean"
    text = experiment("e", "prompts p", rule, SOME)
    found = run_file(text, tmp_path, bare("gpt2"), prompts=NAMED)["e"]
    assert not np.isnan(found.measures[0].patched).any()
