"""Experiments on generated text (`prompts p with replies of w`), against plain passes over prompt
and reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import token
from ..reference.forward import Changes, Edge, Write, forward
from .models import double
from .support import (
    DIFFERENCE,
    QUICK,
    Array,
    codes,
    compare,
    experiment,
    product,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    write_data,
)
from .test_in_replies import GENERATE, MOST, SET, Reply, replies, word, write, write_column

LENGTH = "measure length as raw"
WRITES = experiment("w", GENERATE, SET, measure=LENGTH)
"""Two cells with separate replies."""
BARE = experiment("w", GENERATE, measure=LENGTH)
EACH = [
    pytest.param(name, mode, marks=pytest.mark.slow if mode == "plain" and name != "gpt2" else ())
    for name in ("gpt2", "llama", "gpt_neox")
    for mode in QUICK
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


@cache
def bare(name: str) -> tuple[Reply, ...]:
    """The replies without rules."""
    return tuple(write(name, text.ids, lambda _: ([], [])) for text in rows())


def written(name: str, layer: int | None) -> tuple[Reply, ...]:
    return bare(name) if layer is None else replies(name, layer)


class Texts:
    """The prompts of a row's runs, followed by the reply of a cell."""

    def __init__(self, name: str, layer: int | None, n: int) -> None:
        self.name, self.n = name, n
        self.reply = written(name, layer)[n].ids

    def ids(self, run: str = "clean") -> list[int]:
        return [*rows(run)[self.n].ids, *self.reply]

    def at(self, number: int, run: str = "clean") -> int | None:
        """The position of a token of the reply, counted from 1; None if the reply is shorter."""
        there = 1 <= number <= len(self.reply)
        return len(rows(run)[self.n].ids) - 1 + number if there else None

    def site(self, site: str, layer: int, run: str = "longer") -> Any:
        return forward(self.name, double(self.name), self.ids(run))[site, layer]

    def value(self, changes: Changes, at: int = -1) -> float:
        own = records()[self.n]
        logits = forward(self.name, double(self.name), self.ids(), *changes).logits
        return float(logits[at, token(own["a"])] - logits[at, token(own["b"])])


def one_token(text: Texts, layer: int) -> Changes | None:
    at, of = text.at(2), text.at(2, "longer")
    if at is None or of is None:
        return None
    return [Write("resid_post", layer, text.site("resid_post", layer)[of], at)], []


def all_tokens(text: Texts, layer: int) -> Changes | None:
    places = [(text.at(n), text.at(n, "longer")) for n in range(1, len(text.reply) + 1)]
    found = text.site("mlp_out", layer)
    return [Write("mlp_out", layer, found[of], at) for at, of in places] or None, []


def each_token(text: Texts, layer: int, place: str) -> Changes | None:
    at = text.at(int(place.removeprefix("reply ")))
    zero = torch.zeros_like
    return None if at is None else ([Write("attn_out", layer, zero, at)], [])


def in_the_prompt(text: Texts, layer: int) -> Changes:
    to, of = (tokens(rows(run)[text.n], "subject token")[0] for run in ("clean", "longer"))
    return [Write("resid_post", layer, text.site("resid_post", layer)[of], to)], []


def everything(text: Texts, layer: int) -> Changes:
    every = range(len(text.ids()))
    return [Write("mlp_out", layer, torch.zeros_like, at) for at in every], []


def unseen(text: Texts, layer: int) -> Changes | None:
    at = text.at(len(text.reply))
    keys = tokens(rows()[text.n], "subject tokens")
    return None if at is None else ([], [Edge("block", layer, [at], keys)])


LAYERS = [(layer,) for layer in range(3)]
PLACES = [f"reply {n + 1}" for n in range(MOST)]
RULES: dict[str, tuple[tuple[str, ...], Callable[..., Changes | None], Sequence[Any]]] = {
    "a token of the reply": (("patch resid_post layer * at reply token 2",), one_token, LAYERS),
    "the reply": (("patch mlp_out layer * at reply tokens",), all_tokens, LAYERS),
    "each token": (
        ("ablate attn_out layer * at each reply token with zero",),
        each_token,
        product(range(3), PLACES),
    ),
    "the prompt": (("patch resid_post layer * at subject token",), in_the_prompt, LAYERS),
    "all tokens": (("ablate mlp_out layer * at tokens * with zero",), everything, LAYERS),
    "attention": (
        ("block attention layer * from last token of reply to subject tokens",),
        unseen,
        LAYERS,
    ),
}


def slow(rule: str, name: str, mode: str) -> bool:
    """Whether a case is slow: plain passes of all but one model, and half of its rules."""
    first = rule in ("a token of the reply", "attention", "all tokens")
    return (mode == "plain" and (name != "gpt2" or not first)) or (name == "gpt_neox" and not first)


def by_hand(
    name: str, layer: int | None, cells: Sequence[Any], act: Callable[..., Changes | None]
) -> tuple[Array, Array]:
    """([cell, row] with rules, [row] without them)"""
    found = np.full((len(cells), len(rows())), np.nan)
    base = np.zeros(len(rows()))
    for n in range(len(rows())):
        text = Texts(name, layer, n)
        base[n] = text.value(([], []))
        for number, cell in enumerate(cells):
            changes = act(text, *cell)
            found[number, n] = np.nan if changes is None else text.value(changes)
    return found, base


def reads(*lines: str, of: str = "w", measure: str = DIFFERENCE) -> str:
    lines = ("from longer into clean", *lines)
    return experiment("e", *lines, block=f"p with replies of {of}", measure=measure)


def hold(found: ExperimentResult, patched: Array, base: Array) -> None:
    """Compare the cells that at least one row has."""
    there = ~np.isnan(patched).all(1)
    compare(found.measures[0], patched[there], base, most=False)


@pytest.mark.parametrize(
    ("rule", "name", "mode"),
    [
        pytest.param(rule, *each.values, marks=pytest.mark.slow if slow(rule, *each.values) else ())
        for rule in RULES
        for each in EACH
    ],
)
def test_rules_on_prompts_with_replies_equal_the_reference(
    data: Path, name: str, mode: str, rule: str
) -> None:
    """The prompts end with the replies of one of two cells; the final token is measured."""
    lines, act, cells = RULES[rule]
    found = run_file(WRITES + reads(*lines, of="w(layer: 1)"), data, name, mode)["e"]
    hold(found, *by_hand(name, 1, cells, act))


@pytest.mark.parametrize(("name", "mode"), EACH)
def test_rules_on_prompts_with_unpatched_replies_equal_the_reference(
    data: Path, name: str, mode: str
) -> None:
    found = run_file(BARE + reads("patch resid_post layer * at subject token"), data, name, mode)
    hold(found["e"], *by_hand(name, None, LAYERS, in_the_prompt))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_measures_at_reply_positions_of_prompts_equal_the_reference(data: Path, name: str) -> None:
    """Positions name the same tokens as in measures of the generating experiment."""
    every = [word(each) for reply in bare(name) for each in reply.ids]
    wanted = max((w for w in set(every) if not w.startswith("w4")), key=every.count)
    said: dict[str, Callable[[tuple[int, ...]], int]] = {
        "last token of reply": len,
        "last token of reply - 1": lambda ids: len(ids) - 1,
        "first token of reply": lambda ids: 1,
        "reply token 3": lambda ids: 3,
        f'"{wanted}" of reply token': lambda ids: max(
            (n for n, each in enumerate(ids, 1) if word(each) == wanted), default=0
        ),
    }
    rule = "patch resid_post layer 0 at subject token"
    text = "".join(
        reads(rule, measure=f"{DIFFERENCE.replace(' as', f' at {place} as')}").replace(
            "experiment e", f"experiment e{number}"
        )
        for number, place in enumerate(said)
    )
    found = run_file(BARE + text, data, name, "planned")
    for number, place in enumerate(said.values()):
        patched = np.full((1, len(rows())), np.nan)
        base = np.zeros(len(rows()))
        for n in range(len(rows())):
            own = Texts(name, None, n)
            at = own.at(place(own.reply))
            if at is not None:
                patched[0, n] = own.value(in_the_prompt(own, 0), at)
                base[n] = own.value(([], []), at)
        compare(found[f"e{number}"].measures[0], patched, base, most=False, large=0.01)


def test_measure_at_a_row_value_in_given_replies_equals_the_reference(data: Path) -> None:
    words = ["zebra", *(word(reply.ids[-1]) for reply in bare("gpt2")[1:])]
    write_column(data, words)
    measure = DIFFERENCE.replace(" as", " at said of reply token as")
    rule = "patch resid_post layer 0 at subject token"
    found = run_file(BARE + reads(rule, measure=measure), data, "gpt2", "planned")["e"]
    patched, base = np.full((1, len(rows())), np.nan), np.zeros(len(rows()))
    for n in range(1, len(rows())):
        own = Texts("gpt2", None, n)
        at = own.at(len(own.reply))
        assert at is not None
        patched[0, n] = own.value(in_the_prompt(own, 0), at)
        base[n] = own.value(([], []), at)
    compare(found.measures[0], patched, base, most=False, large=0.01)


def test_loss_of_given_replies_equals_that_of_the_generating_experiment(data: Path) -> None:
    """It equals the loss in the generating experiment, which needs one more pass."""
    loss = "measure loss at each reply token as raw"
    text = experiment("w", GENERATE, measure=loss)
    found = run_file(
        text + experiment("e", block="p with replies of w", measure=loss), data, "llama", "planned"
    )
    own, again = (found[name].measures[0] for name in "we")
    assert len(again.patched) == max(len(reply.ids) for reply in bare("llama"))
    np.testing.assert_allclose(again.patched, own.patched[: len(again.patched)], atol=1e-5)
    assert np.nanmax(again.patched) > 0.1


@pytest.mark.parametrize("sign", "<>")
def test_prompts_with_replies_exclude_rows_without_a_reply(data: Path, sign: str) -> None:
    """Rows that `keep` removes from the generating experiment have no reply; for one sign, they are
    between other rows."""
    writes = experiment("w", GENERATE, f"keep logit(answer) {sign} logit(wrong)", measure=LENGTH)
    text = writes + reads("patch resid_post layer 0 at subject token")
    found = run_file(text, data, "gpt2", "planned")
    own = found["w"].row_ids
    assert own is not None
    assert 0 < len(own) < len(rows())
    assert found["e"].row_ids == own
    left = len(rows()) - len(own)
    said = f"{left} of {len(rows())} rows have no reply and are excluded"
    assert said in found["e"].conventions["replies"]
    patched, base = by_hand("gpt2", None, [(0,)], in_the_prompt)
    kept = [row for row in range(len(rows())) if row in own]
    compare(found["e"].measures[0], patched[:, kept], base[kept], most=False)


NOISY = """
prompts q {
  rows "data.jsonl"
  xs = list(item, from: words, sep: " ")
  template "{xs} w40 {subject} w41 {cue} w42"
  answer " {a}"
  wrong " {b}"
  corrupt noised { add gaussian(std: 0.3) to embed at subject tokens }
}
"""


@pytest.mark.parametrize("sign", "<>")
def test_noise_of_prompts_with_replies_does_not_depend_on_other_rows(data: Path, sign: str) -> None:
    """Noise doesn't depend on which other rows have a reply."""

    def found(mode: str, *keep: str) -> ExperimentResult:
        writes = experiment("w", "generate 3", *keep, block="q", measure=LENGTH)
        lines = ("from clean into noised", "patch resid_post layer * at reply token 1")
        text = NOISY + writes + experiment("e", *lines, block="q with replies of w")
        return run_file(text, data, "gpt2", mode)["e"]

    every, plain = found("planned"), found("plain")
    some = found("planned", f"keep logit(answer) {sign} logit(wrong)")
    assert every.row_ids is not None
    assert some.row_ids is not None
    assert 0 < len(some.row_ids) < len(rows())
    kept = [every.row_ids.index(row) for row in some.row_ids]
    own = every.measures[0]
    np.testing.assert_allclose(own.patched, plain.measures[0].patched, atol=1e-4)
    np.testing.assert_allclose(some.measures[0].patched, own.patched[:, kept], atol=1e-4)
    np.testing.assert_allclose(some.measures[0].base, own.base[:, kept], atol=1e-4)
    assert np.abs(own.patched - own.base).max() > 0.01


def test_prompts_with_replies_of_several_blocks_equal_separate_blocks(data: Path) -> None:
    """Several blocks in one experiment, each with the replies of one generating experiment."""

    def of(block: str) -> str:
        line = "ablate attn_out layer * at last token of reply with zero"
        writes = experiment("w", "generate 3", block=block, measure=LENGTH)
        return writes + experiment("e", line, block=f"{block} with replies of w")

    both = run_file(of("p, second"), data, "gpt2", "planned")["e"]
    for block in ("p", "second"):
        alone = run_file(of(block), data, "gpt2", "planned")["e"]
        cells = [n for n, cell in enumerate(both.cells) if cell.coords["prompts"] == block]
        assert len(cells) == 3
        own = both.measures[0].patched[cells]
        there = ~np.isnan(own).all(0)
        np.testing.assert_allclose(
            np.sort(own[:, there]), np.sort(alone.measures[0].patched), atol=1e-4
        )


def test_prompts_with_replies_longer_than_the_context_are_an_error(data: Path) -> None:
    """Replies fill the context, so that their last token can't be an input."""
    text = experiment("w", "generate 52", measure=LENGTH)
    text += reads("patch resid_post layer 0 at subject token")
    result, problems = try_file(text, data, "gpt2")
    assert result is not None
    assert [each.name for each in result.experiments] == ["w"]
    (error,) = [each for each in problems if each.severity == "error"]
    assert error.code == "E0546"
    assert "65 tokens, but `m` reads at most 64" in error.message


TWO = """
mech 1

seed 1

model toy = zoo("counting")
model bot = zoo("refusal")

prompts p {
  verb in ["burn", "cut", "crush", "melt"]
  template "how do i {verb} the car ?"
  corrupt noised { add gaussian(std: 0.3, samples: 2) to embed at verb token }
}

experiment w {
  model bot
  prompts p
  BASE
  generate 4
  measure length as raw
}

experiment e {
  model MODEL
  prompts p with replies of w
  measure entropy as raw
}
"""


@pytest.mark.parametrize(
    ("model", "base", "said"),
    [
        ("bot", "", ""),
        ("toy", "", "a different tokenizer"),
        ("bot", "from clean into noised", "one reply for each of 2 noise draws"),
    ],
)
def test_replies_need_one_tokenizer_and_one_reply_per_row(model: str, base: str, said: str) -> None:
    text = TWO.strip().replace("BASE", base).replace("MODEL", model)
    found = [each for each in check_source(Source(text)).diagnostics if each.severity == "error"]
    assert [each.code for each in found] == (["E0546"] if said else [])
    assert all(said in each.message for each in found)


REFUSED = {
    "it writes none": (
        experiment("w", "ablate mlp_out layer 1 at last token with zero"),
        "w",
        "E0546",
    ),
    "several cells": (WRITES, "w", "E0546"),
    "no such cell": (WRITES, "w(layer: 7)", "E0546"),
    "no such axis": (WRITES, "w(head: 1)", "E0203"),
    "no such experiment": (BARE, "v", "E0201"),
    "another block": (BARE.replace("prompts p", "prompts even"), "w", "E0546"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_prompts_with_replies_are_errors(data: Path, case: str) -> None:
    text, of, code = REFUSED[case]
    found = codes(text + reads("patch resid_post layer 0 at subject token", of=of), data)
    assert [each for each in found if each.startswith("E")] == [code]


def test_text_that_no_reply_has_is_an_error_of_that_experiment_alone(data: Path) -> None:
    """A text that no reply has is an error after generation; other experiments continue."""
    text = BARE + reads(measure='measure entropy at "nobody" of reply token as raw')
    result, problems = try_file(text, data, "gpt2")
    assert result is not None
    assert [each.name for each in result.experiments] == ["w"]
    assert [each.code for each in problems if each.severity == "error"] == ["E0545"]
