"""Circuits of vision encoders that the language model reads after several blocks, against a pass of
the bare model in which plain hooks give each read of the encoder a separate sum of senders: one
unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.loading.loader import adopt_model

from ..execute.support import context
from ..quick import some
from . import test_vision_circuits as circuits
from .support import experiment
from .test_families import ALL, BLOCK, bare, draw, folder, inputs, run_text
from .test_token_patches import other
from .test_vision_circuits import (
    CIRCUIT,
    EMBED,
    END,
    Case,
    Edge,
    Node,
    Pass,
    check,
    doubled,
    list_edges,
    run_inputs,
    spelled,
    tower,
    written,
)
from .test_vision_edge_scores import fit, run_with_gradients, score, train

NAMES = ("vipllava", "qwen3_vl")
ENDS: list[Edge] = [
    *CIRCUIT,
    (EMBED, END),
    (("z", 0, 1), END),
    (("mlp_out", 1, 0), END),
]


class SeveralReads(Pass):
    """A pass of a model whose language model reads the encoder after each of its blocks."""

    def read(self, state: int) -> Tensor:
        """[token, width]: the stream after some blocks, as the language model reads it."""
        return self.seen(END, 2 * state)


@contextmanager
def read_apart(work: SeveralReads) -> Generator[None]:
    """Replace what the language model reads after the first block, but not what the next reads."""
    if work.name == "qwen3_vl":
        merger = doubled(work.name).get_submodule("model.visual.deepstack_merger_list.0")

        def before(_: Any, args: Any) -> Any:
            return work.read(1).view(args[0].shape), *args[1:]

        handle = merger.register_forward_pre_hook(before)
    else:
        part = doubled(work.name).get_submodule("model.vision_tower")

        def after(_: Any, args: Any, output: Any) -> Any:
            states = [*output.hidden_states]
            states[1] = work.read(1).view(states[1].shape)
            output.hidden_states = tuple(states)
            return output

        handle = part.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def run(work: SeveralReads, n: int, image: int) -> float:
    with read_apart(work):
        return run_inputs(work, inputs(work.name, n, image))


@cache
def sent(name: str, n: int, image: int) -> Any:
    work = SeveralReads(name)
    run(work, n, image)
    return work.given


@pytest.fixture(autouse=True)
def separate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuits, "sent", sent)


def expected(
    name: str, case: Case, edges: Collection[Edge], prompts: Collection[int] = ALL
) -> list[float]:
    """The measure of each prompt with its other image."""
    ablated, values = {*edges}, list[float]()
    if "all but" in case.rule:
        ablated = {*list_edges()} - ablated
    for n in prompts:
        tokens = case.tokens(name, other(n))
        work = SeveralReads(name, case.fill(name, n, tokens), ablated, tokens)
        values.append(run(work, n, other(n)))
    return values


def test_bare_model_reads_the_encoder_after_both_blocks() -> None:
    for name in NAMES:
        whole = run_inputs(Pass(name), inputs(name, 0, 0))
        assert run(SeveralReads(name), 0, 0) == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("mode", some(["planned", "small passes"], ["planned"]))
@pytest.mark.parametrize("name", NAMES)
def test_circuits_of_encoders_read_after_several_blocks_equal_hooks(name: str, mode: str) -> None:
    text = written(ENDS) + "\n"
    text += "".join(
        experiment(f"e{n}", "from clean into changed", case.rule)
        for n, case in enumerate(circuits.CASES)
    )
    for found, case in zip(run_text(name, text, mode), circuits.CASES, strict=True):
        check(found, expected(name, case, ENDS), case.rule)


@pytest.mark.parametrize("name", NAMES)
def test_edges_to_the_end_act_on_each_read_after_their_sender(name: str) -> None:
    """One edge each: from the patches, and from both blocks."""
    case = Case(
        "ablate c at photo tokens with zero", lambda n, i: tower(n).every(i), circuits.zeros
    )
    for sender in (EMBED, ("z", 0, 1), ("mlp_out", 0, 0), ("z", 1, 0), ("mlp_out", 1, 0)):
        edges = [(sender, END)]
        rule = experiment("e", "from clean into changed", case.rule)
        [found] = run_text(name, f"{written(edges)}\n{rule}")
        check(found, expected(name, case, edges), str(sender))


@pytest.mark.parametrize("name", NAMES)
def test_effects_and_random_circuits_of_encoders_read_several_times_equal_hooks(name: str) -> None:
    """Two experiments in one file, and a rule on the stream after the first block."""
    measure, every = "measure logit(answer) - logit(wrong) as", circuits.CASES
    lines = "from clean into changed", "ablate all but c at photo tokens with zero"
    text = written(ENDS) + "\n"
    text += experiment("f", *lines, "against random(2)", measure=f"{measure} faithfulness")
    text += experiment("g", lines[0], "ablate c at photo tokens with zero")
    faithful, complete = run_text(name, text)
    kept, none = (expected(name, every[1], own) for own in (ENDS, ()))
    np.testing.assert_allclose(faithful.measures[0].patched[0], kept, atol=1e-4)
    assert faithful.measures[0].source is not None
    np.testing.assert_allclose(faithful.measures[0].source[0], none, atol=1e-4)
    check(complete, expected(name, every[0], ENDS), "complete")


def test_stream_after_a_read_block_is_the_one_that_the_next_block_reads() -> None:
    """A rule that reads `resid_post vision layer 0` isn't changed by edges to the end."""
    name = "qwen3_vl"
    edges = [(("mlp_out", 0, 0), END)]
    norm = "observe norm resid_{} vision layer {} at photo row 1 col 2 token"
    text = written(edges) + "\n"
    for number, site in enumerate((("post", 0), ("pre", 1))):
        lines = "ablate c at photo tokens with zero", norm.format(*site)
        text += experiment(f"e{number}", *lines, measure="")
        text += experiment(f"p{number}", norm.format(*site), measure="")
    found = run_text(name, text)
    for changed, plain in zip(found[::2], found[1::2], strict=True):
        np.testing.assert_allclose(
            changed.measures[0].patched, plain.measures[0].patched, rtol=1e-5
        )


def test_encoder_that_is_read_before_its_first_block_has_no_circuits() -> None:
    name = "vipllava"
    made, found = adopt_model("m", draw(name, vision_feature_layers=[0, 1]), bare(name).processor)
    assert made is not None, found
    rule = experiment("e", "ablate c at photo tokens with zero")
    text = f"{written([(EMBED, END)])}\n{rule}"
    source = Source(f'mech 1\nmodel m = local("x")\n{BLOCK}\n{text}', folder() / "f.mech")
    checked = check_source(source, models={"m": context(source, "m", made)})
    [problem] = [each for each in checked.diagnostics if each.severity == "error"]
    assert problem.code == "E0108"
    assert "that the language model also reads before block 0" in problem.message


# --- scores ---------------------------------------------------------------------------------------


@dataclass
class DifferentiatedReads(SeveralReads):
    """A pass with zeros added to each input of each receiver, and with moved patches."""

    leaves: dict[tuple[Node, int], Tensor] = field(default_factory=dict[tuple[Node, int], Tensor])
    """By receiver, and number of sublayers before it."""
    move: Tensor | None = None
    """[token, width]: what `embed vision` gains."""

    def carried(self, sender: Node, receiver: Node) -> Tensor:
        own = self.given[sender]
        return own if sender != EMBED or self.move is None else own + self.move

    def seen(self, receiver: Node, sublayers: int) -> Tensor:
        found = super().seen(receiver, sublayers)
        leaf = self.leaves.setdefault(
            (receiver, sublayers), torch.zeros_like(found).requires_grad_()
        )
        return found + leaf


def expected_scores(name: str, steps: int) -> dict[Edge, float]:
    """The mean score of each edge over all prompts, with fills of 0 at all patches."""
    found = dict.fromkeys(list_edges(), 0.0)
    for n in ALL:
        tokens = tower(name).every(n)
        changes = {node: torch.zeros_like(own) for node, own in sent(name, n, n).items()}
        for node, own in changes.items():
            own[tokens] = -sent(name, n, n)[node][tokens]
        for step in range(1, steps + 1):
            work = DifferentiatedReads(name, move=(1 - step / steps) * changes[EMBED])
            with torch.enable_grad(), read_apart(work):
                value = run_with_gradients(work, n, n)
                slopes = torch.autograd.grad(value, list(work.leaves.values()))
            for (to, sublayers), slope in zip(work.leaves, slopes, strict=True):
                for of in changes:
                    is_before = of == EMBED or 2 * of[1] + 2 <= sublayers
                    if (of, to) in found and (is_before or to != END):
                        product = float((changes[of] * slope).sum())
                        found[of, to] += product / steps / len(ALL)
    return found


@pytest.mark.parametrize("steps", some([1, 2], [1]))
@pytest.mark.parametrize("name", NAMES)
def test_scores_of_edges_to_several_reads_equal_gradients(name: str, steps: int) -> None:
    call = "eap(size: 8)" if steps == 1 else f"eap_ig(size: 8, steps: {steps})"
    found = score(name, fit(call, "with: zero", at="photo tokens"))
    expected = expected_scores(name, steps)
    assert found.keys() == expected.keys()
    values = np.array([*expected.values()])
    np.testing.assert_allclose([found[edge] for edge in expected], values, atol=1e-5, rtol=1e-4)
    assert np.abs(values).max() > 1e-2


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
@pytest.mark.parametrize("trainer", some(["eap(size: 12)", "mask(size: 12)"], ["eap(size: 12)"]))
def test_trained_circuits_of_encoders_read_several_times_equal_hooks(
    trainer: str, tmp_path: Path
) -> None:
    name = "vipllava"
    rule = "ablate all but c at photo tokens with zero"
    more = ", steps: 4" if trainer.startswith("mask") else ""
    _, found = train(tmp_path, name, fit(trainer, "with: zero", at="photo tokens", more=more))
    assert found.circuit is not None
    every = {(spelled(of), spelled(to)): (of, to) for of, to in list_edges()}
    edges = [every[edge] for edge in found.circuit.edges]
    case = Case(rule, circuits.CASES[1].tokens, circuits.zeros)
    patched = found.measures[0].patched[0]
    np.testing.assert_allclose(patched, expected(name, case, edges), atol=1e-4)
