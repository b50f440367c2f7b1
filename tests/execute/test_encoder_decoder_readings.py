"""`value(SITE …)` and `step(COMPONENT)` in encoder-decoders, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from .encoder_decoders import (
    Text,
    Write,
    difference,
    logits,
    model,
    place,
    read,
    starts,
    text,
    tokenizer,
    zeroed,
)
from .support import DIFFERENCE, MODES, PROMPTS, ROWS, Record, by_name, experiment, token, try_file

FAMILIES = some(("t5", "bart", "t5gemma"), ("t5", "bart"))


def run(
    family: str, lines: str, folder: Path, mode: str = "planned", prompts: str = PROMPTS
) -> Any:
    own, options = model(family), MODES[mode]
    return by_name(*try_file(lines, folder, own, options, tokenizer=tokenizer(), prompts=prompts))


def last(family: str) -> int:
    """The last of the decoder's first tokens."""
    return len(starts(family)) - 1


@dataclass(frozen=True)
class Case:
    """A rule with one cell: the sites (name, layer, head) and tokens that it reads and writes."""

    rule: str
    source: tuple[str, int, int | None]
    target: tuple[str, int, int | None]
    source_token: Callable[[str, Text], int]
    target_token: Callable[[str, Text], int]
    run: str = "clean"
    factor: float = 1.0
    adds: bool = False

    def write(self, family: str, record: Record) -> Write:
        base, other = text(record), text(record, self.run)
        from_, to = place(family, *self.source), place(family, *self.target)
        vector = self.factor * read(family, other, from_)[self.source_token(family, other)]
        at = [self.target_token(family, base)]
        return to, at, putting(vector, float(self.adds))


def of_decoder(family: str, of: Text) -> int:
    return last(family)


def of_item(family: str, of: Text) -> int:
    return of.items[-1]


CASES = (
    Case(
        "add value(mlp_out layer 0) to resid_post layer 1 at last token",
        ("mlp_out", 0, None), ("resid_post", 1, None), of_decoder, of_decoder, adds=True,
    ),
    Case(
        "set resid_post layer 1 at last token to 2 * value(resid_post layer 0) of longer",
        ("resid_post", 0, None), ("resid_post", 1, None), of_decoder, of_decoder, "longer", 2,
    ),
    Case(
        "set resid_post layer 0 at last token to "
        "value(resid_post encoder layer 1 at last-item token) of longer",
        ("resid_post encoder", 1, None), ("resid_post", 0, None), of_item, of_decoder, "longer",
    ),
    Case(
        "add -3 * value(mlp_out encoder layer 0 at last-item token) to attn_out cross layer 1 "
        "at last token",
        ("mlp_out encoder", 0, None), ("attn_out cross", 1, None), of_item, of_decoder,
        factor=-3, adds=True,
    ),
    Case(
        "set resid_post encoder layer 0 at last-item token to value(resid_post layer 0 at last "
        "token) of longer",
        ("resid_post", 0, None), ("resid_post encoder", 0, None), of_decoder, of_item, "longer",
    ),
    Case(
        "set resid_post layer 1 at last token to value(attn_out cross layer 2) of other",
        ("attn_out cross", 2, None), ("resid_post", 1, None), of_decoder, of_decoder, "other",
    ),
    Case(
        "set v cross layer 1 head 0 at last-item token to 5 * value(v encoder layer 0 head 1) "
        "of longer",
        ("v encoder", 0, 1), ("v cross", 1, 0), of_item, of_item, "longer", 5,
    ),
)  # fmt: skip


@pytest.mark.parametrize("mode", some(["planned", "plain", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_both_stacks_equal_hooks(family: str, mode: str, tmp_path: Path) -> None:
    lines = "".join(
        experiment(f"e{n}", "prompts p", case.rule, DIFFERENCE) for n, case in enumerate(CASES)
    )
    found = run(family, lines, tmp_path, mode)
    for n, case in enumerate(CASES):
        measure = found[f"e{n}"].measures[0]
        expected = [
            difference(logits(family, text(row), [case.write(family, row)]), row) for row in ROWS
        ]
        np.testing.assert_allclose(
            measure.patched[0], expected, rtol=1e-5, atol=2e-4, err_msg=case.rule
        )
        if family != "t5gemma" or "v cross" not in case.rule:  # a weight of 0
            assert np.abs(measure.patched[0] - measure.base[0]).max() > 0.01, case.rule


INTO_DECODER = CASES[2]
ANSWER = PROMPTS.replace('answer " {a}"', 'answer " {a} {b} {cue}"')


@pytest.mark.parametrize("family", FAMILIES)
def test_value_at_several_answer_tokens_equals_hooks(family: str, tmp_path: Path) -> None:
    rule = (
        "set resid_post layer 1 at tokens * and answer to 2 * value(resid_post layer 0) of longer"
    )
    lines = experiment("e", "prompts p", rule, "measure logprob(answer) as delta")
    measure = run(family, lines, tmp_path, prompts=ANSWER)["e"].measures[0]
    for n, row in enumerate(ROWS):
        answer = [token(row[name]) for name in ("a", "b", "cue")]
        at, kept = [*range(last(family) + 3)], list[Tensor]()
        write = place(family, "resid_post", 0), at, keeping(kept)
        logits(family, text(row, "longer"), [write], answer[:-1])
        write = place(family, "resid_post", 1), at, putting(2 * kept[0])
        given = logits(family, text(row), [write], answer[:-1])
        scores = torch.tensor(given[last(family) :]).log_softmax(-1)
        expected = float(sum(scores[i, each] for i, each in enumerate(answer)))
        np.testing.assert_allclose(measure.patched[0, n], expected, atol=3e-4)
    assert np.abs(measure.patched - measure.base).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_values_in_runs_with_rules_equal_hooks(family: str, tmp_path: Path) -> None:
    """A run with a value in its rule, and a value that is read in a run with a rule."""
    lines = experiment(
        "written", "prompts p", f"run st {{ {INTO_DECODER.rule} }}", "from st into clean",
        "patch mlp_out layer 2 at last token", DIFFERENCE,
    )  # fmt: skip
    lines += experiment(
        "read", "prompts p",
        "run st { ablate mlp_out encoder layer 0 at last-item token with zero }",
        "add value(resid_post encoder layer 1 at last-item token) of st to resid_post layer 0 "
        "at last token",
        DIFFERENCE,
    )  # fmt: skip
    found = run(family, lines, tmp_path)
    patched, added = [], []
    for row in ROWS:
        base, kept = text(row), list[Tensor]()
        mlp, at = place(family, "mlp_out", 2), [last(family)]
        logits(family, base, [INTO_DECODER.write(family, row), (mlp, at, keeping(kept))])
        patched.append(difference(logits(family, base, [(mlp, at, putting(kept[0]))]), row))
        item, seen = [base.items[-1]], list[Tensor]()
        source = place(family, "resid_post encoder", 1), item, keeping(seen)
        logits(family, base, [zeroed(place(family, "mlp_out encoder", 0), item), source])
        write = place(family, "resid_post", 0), at, putting(seen[0], 1)
        added.append(difference(logits(family, base, [write]), row))
    for name, expected in (("written", patched), ("read", added)):
        measure = found[name].measures[0]
        np.testing.assert_allclose(measure.patched[0], expected, atol=2e-4, err_msg=name)
        assert np.abs(measure.patched[0] - measure.base[0]).max() > 0.01


def putting(vector: Tensor, factor: float = 0) -> Callable[[Tensor], Tensor]:
    """Replace vectors by one, or add it to a multiple of them."""
    return lambda old: factor * old + vector


def keeping(kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def change(value: Tensor) -> Tensor:
        kept.append(value.clone())
        return value

    return change


@pytest.mark.parametrize("family", ["t5 writing", "bart writing"])
def test_replies_with_a_value_of_the_encoder_equal_hooks(family: str, tmp_path: Path) -> None:
    """`last token` is the newest token of the decoder in each step; the read token stays."""
    rule = INTO_DECODER.rule.replace("value(", "2 * value(")
    lines = experiment("e", "prompts p", "generate 4", rule, "measure length as raw")
    found = run(family, lines, tmp_path)["e"].replies
    differ = 0
    for n, row in enumerate(ROWS):
        to, [at], change = INTO_DECODER.write(family, row)
        zero = torch.zeros(1, 1)
        plain, expected = list[int](), list[int]()
        for ids, acts in ((plain, False), (expected, True)):
            for step in range(4):
                writes = [(to, [*range(at, at + step + 1)], putting(2 * change(zero)))]
                if 1 in ids:
                    break
                given = logits(family, text(row), writes if acts else (), ids)
                ids.append(int(given[-1].argmax()))
        assert without_end(found.runs["clean"][n][0].ids) == without_end(plain)
        assert without_end(found.cells[0][n][0].ids) == without_end(expected)
        differ += plain != expected
    assert differ


def without_end(ids: Sequence[int]) -> list[int]:
    return [each for each in ids if each != 1]


STEPS = {
    "add 20 * step(q) to q layer 1 head 0 at tokens * and answer": ("q", 1, 0),
    "add 3 * step(resid_post) to resid_post layer 0 at tokens * and answer": (
        "resid_post", 0, None,
    ),
    "add 2 * step(q) to q encoder layer 1 head 0 at tokens *": ("q encoder", 1, 0),
    "add -2 * step(mlp_out) to mlp_out encoder layer 0 at {first token, last token}": (
        "mlp_out encoder", 0, None,
    ),
    "add 4 * step(q) to q cross layer 1 head 1 at tokens * and answer": ("q cross", 1, 1),
    "add -3 * step(v) to v cross layer 2 head 0 at tokens *": ("v cross", 2, 0),
}  # fmt: skip
"""Rules, and the sites that they write."""


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_both_stacks_equal_hooks(family: str, tmp_path: Path) -> None:
    """The first token of each stack doesn't change."""
    lines = "".join(
        experiment(f"e{n}", "prompts p", rule, "measure logprob(answer) as delta")
        for n, rule in enumerate(STEPS)
    )
    found = run(family, lines, tmp_path, prompts=ANSWER)
    for number, (rule, site) in enumerate(STEPS.items()):
        measure, factor = found[f"e{number}"].measures[0], float(rule.split()[1])
        own = place(family, *site)
        for n, row in enumerate(ROWS):
            answer, of = [token(row[name]) for name in ("a", "b", "cue")], text(row)
            encodes = "encoder" in site[0] or site[0] == "v cross"
            count = len(of.ids) if encodes else last(family) + 3
            written = [0, of.last] if "first token" in rule else [*range(count)]
            write = own, [*range(count)], stepping(written, factor)
            scores = torch.tensor(logits(family, of, [write], answer[:-1])[last(family) :])
            scores = scores.log_softmax(-1)
            expected = float(sum(scores[i, each] for i, each in enumerate(answer)))
            np.testing.assert_allclose(
                measure.patched[0, n], expected, atol=2e-4, rtol=2e-5, err_msg=rule
            )
        assert np.abs(measure.patched - measure.base).max() > 0.01, rule


def stepping(written: Sequence[int], factor: float) -> Callable[[Tensor], Tensor]:
    def change(old: Tensor) -> Tensor:
        new = old.clone()
        for at in written:
            if at:
                new[at] = old[at] + factor * (old[at] - old[at - 1])
        return new

    return change
