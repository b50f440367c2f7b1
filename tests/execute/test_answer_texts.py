"""Sets of accepted texts of one or more tokens: the probability that the model continues the prompt
with one of them.

The reference runs the bare model on each text separately, one unpadded prompt at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.store.store import Store

from ..quick import in_turn, some
from ..reference.forward import Write, forward
from ..reference.points import Point, copied, zeroed
from .support import (
    MODES,
    ROWS,
    Array,
    Prompt,
    Record,
    bare,
    by_name,
    experiment,
    ids_of,
    prompt,
    run_file,
    try_file,
    write_rows,
)

FAMILIES = ("gpt2", "llama", "gpt_neox")
PROMPTS = """
prompts p {
  rows "data.jsonl"
  xs = list(item, from: words, sep: " ")
  accepted = list(" {item}", from: texts)
  rivals = list(" {item}", from: others)
  template "{xs} w40 {subject} w41 {cue} w42"
  answer " {long}"
  wrong " {b}"
  corrupt other { subject = alt }
  corrupt longer { words = more  cue = cue2 }
}
"""
TEXTS: list[dict[str, Any]] = [
    {"texts": ["w1 w2", "w1 w2 w3", "w9", "w9 w1"], "others": ["w5 w6", "w7 w8"], "long": "w3 w4"},
    {"texts": ["w4 w7 w2"], "others": ["w2 w8 w5", "w1", "w2"], "long": "w6"},
    {"texts": ["w5 w6 w10", "w8 w9", "w5 w6 w10", "w3"], "others": ["w11 w2"], "long": "w1 w1 w2"},
    {"texts": ["w9 w3", "w2", "w12", "w9 w4"], "others": ["w6 w20 w1", "w3"], "long": "w2 w5"},
]
"""Each row has sets of other sizes, with a repeated text and texts that begin with others.
The second row accepts no text of one token."""


@dataclass(frozen=True)
class Scores:
    """Reference scores of the texts of a row."""

    family: str
    record: Record
    writes: Callable[[Prompt, Record, str], Sequence[Write]]
    _logits: dict[tuple[int, ...], Array] = field(default_factory=dict)
    """Text → its log probabilities, which several measures read."""

    def logprob(self, texts: Sequence[str]) -> float:
        """The log of P(the continuation begins with any of the texts)."""
        own = {tuple(ids_of(text.split())[1:]) for text in texts}
        shortest = [ids for ids in own if not any(ids[:n] in own for n in range(1, len(ids)))]
        return float(np.logaddexp.reduce([self._one(ids) for ids in shortest]))

    def correct(self, texts: Sequence[str]) -> float:
        """Whether greedy decoding generates one of the texts."""
        for text in texts:
            ids = ids_of(text.split())[1:]
            if self._predicted(ids).argmax(-1).tolist() == ids:
                return 1.0
        return 0.0

    def _one(self, ids: Sequence[int]) -> float:
        found = self._predicted(ids)
        return float(sum(found[n, token] for n, token in enumerate(ids)))

    def _predicted(self, ids: Sequence[int]) -> Array:
        """Return [token, vocab] log probabilities that predict the tokens of a text."""
        key = tuple(ids)
        if key not in self._logits:
            of = prompt(self.record)
            writes = self.writes(of, self.record, self.family)
            found = forward(self.family, bare(self.family), [*of.ids, *ids[:-1]], writes).logits
            self._logits[key] = found[of.last :].double().log_softmax(-1).numpy()
        return self._logits[key]


@cache
def seen(family: str, ids: tuple[int, ...]) -> Any:
    return forward(family, bare(family), list(ids)).seen


def ablated(of: Prompt, record: Record, family: str) -> Sequence[Write]:
    return zeroed([Point("z", 1, 2)], seen(family, tuple(of.ids)), [of.last])


def from_longer(of: Prompt, record: Record, family: str) -> Sequence[Write]:
    source = prompt(record, "longer")
    points = [Point("resid_pre", 1)]
    return copied(points, seen(family, tuple(source.ids)), [source.last], [of.last])


def unchanged(of: Prompt, record: Record, family: str) -> Sequence[Write]:
    return ()


RULES: dict[str, tuple[tuple[str, ...], Any]] = {
    "ablated": (("ablate layer 1 head 2 at last token with zero",), ablated),
    "patched": (("from longer into clean", "patch resid_pre layer 1 at last token"), from_longer),
}
MEASURES: dict[str, Callable[[Scores], float]] = {
    "prob(accepted)": lambda s: np.exp(s.logprob(s.record["texts"])),
    "logprob(accepted)": lambda s: s.logprob(s.record["texts"]),
    "prob(rivals)": lambda s: np.exp(s.logprob(s.record["others"])),
    "logprob(accepted) - logprob(rivals)": lambda s: (
        s.logprob(s.record["texts"]) - s.logprob(s.record["others"])
    ),
    "prob(accepted) / (prob(accepted) + prob(rivals))": lambda s: (
        1 / (1 + np.exp(s.logprob(s.record["others"]) - s.logprob(s.record["texts"])))
    ),
    "logprob(answer, wrong)": lambda s: s.logprob([s.record["long"], s.record["b"]]),
    "prob(answer)": lambda s: np.exp(s.logprob([s.record["long"]])),
    "correct(accepted)": lambda s: s.correct(s.record["texts"]),
    "correct(answer)": lambda s: s.correct([s.record["long"]]),
}


@cache
def records(family: str) -> list[Record]:
    """The rows; greedy decoding generates a text of the first two and the answer of the third."""
    found: list[Record] = [{**row, **texts} for row, texts in zip(ROWS, TEXTS, strict=True)]
    greedy = [_greedy(family, prompt(row), 2 + n % 2) for n, row in enumerate(found)]
    found[0] = {**found[0], "texts": [*found[0]["texts"], greedy[0]]}
    found[1] = {**found[1], "texts": [*found[1]["texts"], greedy[1]]}
    found[2] = {**found[2], "long": greedy[2]}
    return found


def _greedy(family: str, of: Prompt, tokens: int) -> str:
    """Return the continuation of a prompt by greedy decoding, in words."""
    word_of = {ids_of([f"w{n}"])[1]: f"w{n}" for n in range(50)}
    ids = list(of.ids)
    for _ in range(tokens):
        ids.append(int(forward(family, bare(family), ids).logits[-1].argmax()))
    return " ".join(word_of[token] for token in ids[len(of.ids) :])


@cache
def scores(family: str, change: Any) -> list[Scores]:
    return [Scores(family, row, change) for row in records(family)]


def values(family: str, name: str, change: Any) -> Array:
    return np.array([MEASURES[name](each) for each in scores(family, change)])


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), FAMILIES, list(MODES)[:2]))
def test_sets_of_texts_equal_separate_passes(family: str, mode: str, tmp_path: Path) -> None:
    write_rows(tmp_path, records(family))
    lines = [f"measure {name} as raw" for name in MEASURES]
    text = "".join(experiment(name, "prompts p", *r, *lines) for name, (r, _) in RULES.items())
    found = run_file(text, tmp_path, bare(family), MODES[mode], prompts=PROMPTS)
    for name, (_, change) in RULES.items():
        for measure, label in zip(found[name].measures, MEASURES, strict=True):
            expected = values(family, label, change)
            np.testing.assert_allclose(measure.patched[0], expected, atol=1e-7, rtol=1e-3)


def test_greedy_texts_are_correct_in_the_clean_run(tmp_path: Path) -> None:
    """`correct` and `accuracy(clean)` accept a text if greedy decoding generates it."""
    family = "llama"
    write_rows(tmp_path, records(family))
    lines = ("measure correct(accepted) as raw", "expect accuracy(clean) > 0.1")
    text = experiment("e", "prompts p", *lines)
    found = run_file(text, tmp_path, bare(family), prompts=PROMPTS)["e"]
    expected = values(family, "correct(accepted)", unchanged)
    assert expected.tolist()[:2] == [1, 1]
    assert found.measures[0].patched[0].tolist() == expected.tolist()
    answers = values(family, "correct(answer)", unchanged)
    assert found.accuracy_of("clean").mean == answers.mean() > 0


@pytest.mark.parametrize(
    ("name", "row"), in_turn(["prob(accepted)", "correct(accepted)"], range(4))
)
def test_stored_values_depend_on_the_texts_of_their_row(
    name: str, row: int, tmp_path: Path
) -> None:
    """A file whose row accepts other texts gets the values of a run without a store."""
    text = experiment("e", "prompts p", *RULES["ablated"][0], f"measure {name} as raw")
    model = bare("gpt2")

    def ran(texts: list[str], store: Path) -> Array:
        rows = list(records("gpt2"))
        rows[row : row + 1] = [{**rows[row], "texts": texts}]
        write_rows(tmp_path, rows)
        with Store(store) as kept, kept.begin(str(texts), {}) as opened:
            found = by_name(*try_file(text, tmp_path, model, run=opened, prompts=PROMPTS))
            opened.finish({}, {})
        return found["e"].measures[0].patched[0]

    own = records("gpt2")[row]["texts"]
    changes = [own, own[:1], own[1:] or ["w8"], [*own, "w20 w21"], [*own, "w20"], own]
    for number, texts in enumerate(changes):
        fresh = ran(texts, tmp_path / f"fresh {number}")
        shared = ran(texts, tmp_path / "shared")
        np.testing.assert_allclose(shared, fresh, rtol=1e-4, atol=0)


def test_texts_of_a_row_that_others_lack_are_counted(tmp_path: Path) -> None:
    write_rows(tmp_path, records("gpt2"))
    text = experiment(
        "e", "prompts p", "measure prob(accepted) as raw", "measure prob(answer) as raw"
    )
    found = run_file(text, tmp_path, bare("gpt2"), prompts=PROMPTS)["e"]
    assert found.conventions["answer sets"] == (
        "`prob(accepted)` over 2 to 4 texts of one or more tokens per row; "
        "a text that begins with another one isn't added to it"
    )


def test_more_texts_than_the_limit_are_an_error(tmp_path: Path) -> None:
    words = [f"w{n // 50} w{n % 50}" for n in range(129)]
    write_rows(tmp_path, [{**row, "texts": words} for row in records("gpt2")])
    text = experiment("e", "prompts p", "measure prob(accepted) as raw")
    result, problems = try_file(text, tmp_path, bare("gpt2"), prompts=PROMPTS)
    assert result is None
    (found,) = [each for each in problems if each.severity == "error"]
    assert (found.code, "129 texts of a row are more than 128" in found.message) == ("E0612", True)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("measure rank(accepted) as raw", "E0507"),
        ("measure logit(answer) as raw", "E0507"),
        ("measure prob(accepted) at cue token as raw", "E0108"),
        ('for i in 1..2 { measure prob(" w{i} w3", "w2") as raw }', "E0108"),
    ],
)
def test_invalid_sets_of_texts_are_errors(line: str, code: str, tmp_path: Path) -> None:
    write_rows(tmp_path, records("gpt2"))
    text = experiment("e", "prompts p", line)
    result, problems = try_file(text, tmp_path, bare("gpt2"), prompts=PROMPTS)
    assert result is None
    assert [each.code for each in problems if each.severity == "error"] == [code]


def test_nearly_equal_tokens_count_as_rounding(tmp_path: Path) -> None:
    """`correct` of a text is 1 or 0; a tie at its second token may come out as either."""
    rows = records("gpt2")
    first, second, *_ = ids_of(rows[2]["long"].split())[1:]
    model = copy.deepcopy(bare("gpt2"))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    logits = model(torch.tensor([[*prompt(rows[2]).ids, first]])).logits[0, -1]
    rival = int(logits.index_fill(0, torch.tensor([first, second]), -torch.inf).argmax())
    write_rows(tmp_path, rows)
    line = "expect accuracy(clean) > 0.1"
    text = experiment("e", "prompts p", "measure correct(answer) as raw", line)
    for tied in (False, True):
        if tied:
            with torch.no_grad():
                model.lm_head.weight[rival] = model.lm_head.weight[second]
        found = run_file(text, tmp_path, model, prompts=PROMPTS)["e"]
        near = np.flatnonzero(found.accuracy_rounding["clean"])
        assert [found.accuracy_rows["clean"][n] for n in near] == [2] * tied


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", some(["prob(accepted)", "logprob(accepted)"], ["logprob(accepted)"])
)
def test_integrated_gradients_add_up_to_the_effect(name: str, tmp_path: Path) -> None:
    """Sundararajan et al. 2017: the estimates add up to the difference of the metric."""
    write_rows(tmp_path, records("gpt2"))
    lines = ("using integrated_gradients(steps: 64)", f"measure {name} as delta")
    text = experiment("e", "prompts p", *RULES["patched"][0], *lines)
    found = run_file(text, tmp_path, bare("gpt2"), prompts=PROMPTS)["e"]
    effect = values("gpt2", name, from_longer) - values("gpt2", name, unchanged)
    data = found.measures[0]
    estimated = data.patched[0] - data.base[0]
    np.testing.assert_allclose(estimated, effect, atol=1e-5, rtol=1e-2)
