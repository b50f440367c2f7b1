"""Circuits that `fit(eap(…))`, a search or a mask chooses in vision encoders of prompts, against
autograd in the pass of the bare model in which plain hooks give each receiver a separate sum: one
unpadded prompt at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.execute import mask_training, objective_rows
from mechdsl.execute.mask_training import (
    EdgeMaskRows,
    EdgeRows,
    EffectScoring,
    find_circuit,
    open_edges,
    open_rows,
)
from mechdsl.execute.training import TrainingJob, VectorCache
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.pipeline.trained_files import fits_of_file
from mechdsl.planner.training_cost import training_cost
from mechdsl.program.trainers import EdgeScoreTrainer
from mechdsl.resolve.circuit_files import VISION_EMBEDDING, VISION_END
from mechdsl.resolve.types import ResolvedExperiment, SitePoint, TrainedMask

from ..execute.support import as_in_the_data, context
from ..images import prompts_of_images as vlm
from ..quick import some
from . import test_attended_images as attended
from .support import experiment
from .test_encoder_paths import tower
from .test_families import ALL, BLOCK, bare, both, folder, inputs, loaded, run_text
from .test_token_patches import other
from .test_vision_circuit_inputs import PAIR, PAIRED, every, sent_by
from .test_vision_circuits import (
    EMBED,
    END,
    NAMES,
    QUICK,
    Edge,
    Node,
    Pass,
    doubled,
    hooked,
    list_edges,
    placed,
    run,
    sent,
    spelled,
)
from .test_vision_estimates import with_rules

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

AIM = "maximise: logit(answer) - logit(wrong)"
OPTIONS = f"{AIM}, stack: vision, validation: 0%, measure_on_training_rows: true"


def fit(
    call: str, source: str = "from: changed", *, at: str, batch: int = 3, more: str = ""
) -> str:
    given = f"fit({call}, prompts: ask, {source}, {OPTIONS}, batch: {batch}{more})"
    rule = experiment("e", "from clean into changed", "ablate all but c at photo tokens with zero")
    return f"circuit c = {given} at {at}\n{rule}"


@cache
def exact(name: str) -> LoadedModel:
    """The model in double precision."""
    model, found = adopt_model("m", doubled(name), bare(name).processor)
    assert model is not None, found
    return model


def write_source(name: str, text: str, block: str = BLOCK) -> Source:
    if vlm.FAMILIES[name].before_end:  # its prompts end with a line break
        block = block.replace(' w3"\n', ' w3 \\n"\n')
    lines = f'mech 1\nmodel m = local("x")\n{block}\n{text}'
    return Source(lines, folder() / f"{name}.mech")


def declared_in(name: str, text: str, block: str = BLOCK) -> tuple[TrainedMask, ResolvedExperiment]:
    source = write_source(name, text, block)
    checked = check_source(source, models={"m": context(source, "m", exact(name))})
    assert not has_errors(checked.diagnostics), checked.diagnostics
    (declared,) = fits_of_file(checked).values()
    assert declared.objective is not None
    assert isinstance(declared.file, TrainedMask)
    return declared.file, declared.objective


def open_scored(name: str, text: str) -> tuple[TrainedMask, EdgeRows]:
    mask, objective = declared_in(name, text)
    return mask, open_edges(mask, objective, exact(name), None, VectorCache())


def open_masked(name: str, text: str) -> tuple[TrainedMask, EdgeMaskRows]:
    mask, objective = declared_in(name, text)
    rows = open_rows(mask, objective, exact(name), None, VectorCache())
    assert isinstance(rows, EdgeMaskRows)
    return mask, rows


def score(name: str, text: str) -> dict[Edge, float]:
    """The scores of all edges."""
    mask, rows = open_scored(name, text)
    trainer = mask.training.trainer_of(EdgeScoreTrainer)
    steps = trainer.steps(mask.training.of_trainer)
    scoring = EffectScoring(rows, lambda part: rows.score(part, trainer, steps))
    for _ in scoring.run():
        pass
    edges = [(spell(of), spell(to)) for of, to in rows.edges]
    return dict(zip(edges, scoring.scores.tolist(), strict=True))


def spell(point: SitePoint) -> Node:
    if point in (VISION_EMBEDDING, VISION_END):
        return EMBED if point == VISION_EMBEDDING else END
    return point.site.removesuffix(" vision"), point.layer or 0, point.unit or 0


# --- scores ---------------------------------------------------------------------------------------


@dataclass
class Differentiated(Pass):
    """A pass with zeros added to the input of each receiver, and with moved outputs of senders."""

    leaves: dict[Node, Tensor] = field(default_factory=dict[Node, Tensor])
    moves: Mapping[Node, Tensor] = field(default_factory=dict[Node, Tensor])
    """[token, width] by sender: what its output gains."""
    rules: str = ""
    """`relp` or `gim`, for their derivatives."""

    @property
    def model(self) -> Any:
        return with_rules(self.name, self.rules) if self.rules else super().model

    def carried(self, sender: Node, receiver: Node) -> Tensor:
        own = self.given[sender]
        return own + self.moves[sender] if sender in self.moves else own

    def seen(self, receiver: Node, sublayers: int) -> Tensor:
        found = super().seen(receiver, sublayers)
        leaf = self.leaves.setdefault(receiver, torch.zeros_like(found).requires_grad_())
        return found + leaf


def gradients(
    name: str, n: int, image: int, moves: Mapping[Node, Tensor], rules: str = ""
) -> dict[Node, Tensor]:
    """The gradient by the input of each receiver of a prompt."""
    work = Differentiated(name, moves=moves, rules=rules)
    with torch.enable_grad():
        value = run_with_gradients(work, n, image)
        found = torch.autograd.grad(value, list(work.leaves.values()))
    return dict(zip(work.leaves, found, strict=True))


def run_with_gradients(work: Pass, n: int, image: int) -> Tensor:
    """The measure of a prompt, as a tensor of autograd."""
    return measure_inputs(work, inputs(work.name, n, image))


def measure_inputs(work: Pass, inputs: Mapping[str, Tensor]) -> Tensor:
    given = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with hooked(work):
        logits = work.model(**given).logits[0, -1]
    return logits[vlm.WORDS["w1"]] - logits[vlm.WORDS["w2"]]


def zeros_of(values: Mapping[Node, Tensor]) -> Mapping[Node, Tensor]:
    return {node: torch.zeros_like(own) for node, own in values.items()}


def row_ids(rows: EdgeMaskRows) -> list[int]:
    """The number in the data of each row."""
    return [*map(int, rows.objective.table.row_ids)]


def write_file(name: str, text: str, block: str = BLOCK) -> Path:
    source = write_source(name, text, block)
    assert source.path is not None
    source.path.write_text(source.text, encoding="utf-8")
    return source.path


def values_of(name: str, n: int, fill: str, tokens: list[int]) -> Mapping[Node, Tensor]:
    """The other values of senders in a prompt with its own image."""
    if fill == "zero":
        return zeros_of(sent(name, n, n))
    if fill == "changed":
        return {
            node: placed(own, tokens, sent(name, n, other(n))[node][tower(name).every(other(n))])
            for node, own in sent(name, n, n).items()
        }
    each = tower(name).cell
    return {
        node: placed(
            own,
            tokens,
            torch.stack([sent(name, m, m)[node][each(m, 1, 2)] for m in ALL]).mean(0),
        )
        for node, own in sent(name, n, n).items()
    }


def reference(
    name: str, call: str, fill: str, tokens_of: Callable[[int], list[int]]
) -> dict[Edge, float]:
    """The mean score of each edge over all prompts."""
    found = dict.fromkeys(list_edges(), 0.0)
    rules = call.partition("(")[0] if call in RULED else ""
    for n in ALL:
        tokens = tokens_of(n)
        clean, others = sent(name, n, n), values_of(name, n, fill, tokens)
        changes = {node: torch.zeros_like(own) for node, own in clean.items()}
        for node, own in changes.items():
            own[tokens] = others[node][tokens] - clean[node][tokens]
        steps = int(call.split("steps: ")[1].rstrip(")")) if "steps" in call else 1
        groups = [[EMBED]]
        if call.startswith("eap_ig_activations"):
            modules = dict.fromkeys((site, layer) for site, layer, _ in clean)
            groups = [[node for node in clean if node[:2] == own] for own in modules]
        for step in range(1, steps + 1):
            for group in groups:
                moves = {node: (1 - step / steps) * changes[node] for node in group}
                moves = moves if step < steps else {}
                slopes = gradients(name, n, n, moves, rules)
                for of, to in found:
                    if len(groups) == 1 or of in group:
                        product = float((changes[of] * slopes[to]).sum())
                        found[of, to] += product / steps / len(ALL)
    return found


CALLS = ("eap(size: 8)", "eap_ig(size: 8, steps: 3)", "eap_ig_activations(size: 8, steps: 2)")
RULED = ("relp(size: 8)", "gim(size: 8)")
RULED_NAMES = ("llava_class", "qwen2_5_vl", "llava_next", "paligemma")
FILLS = {
    "zero": ("with: zero", "photo tokens"),
    "changed": ("from: changed", "photo tokens"),
    "mean": ("with: mean", "photo row 1 col 2 token"),
}


def compare(name: str, call: str, fill: str) -> None:
    source, at = FILLS[fill]
    found = score(name, fit(call, source, at=at))
    own = tower(name)
    there = (lambda n: own.cell(n, 1, 2)) if fill == "mean" else own.every
    expected = reference(name, call, fill, there)
    assert found.keys() == expected.keys()
    values = np.array([*expected.values()])
    near = (2e-4, 1e-3) if call in RULED else (1e-5, 1e-4)  # norms of Qwen models have 32 bits
    given = [found[edge] for edge in expected]
    np.testing.assert_allclose(given, values, atol=near[0], rtol=near[1])
    assert np.abs(values).max() > 1e-2


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("call", some(CALLS, CALLS[:2]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_edge_scores_equal_input_differences_times_gradients(
    name: str, call: str, fill: str
) -> None:
    """In ragged batches, with images of different sizes."""
    compare(name, call, fill)


@pytest.mark.parametrize("fill", some(["zero", "mean"], ["mean"]))
@pytest.mark.parametrize("call", RULED)
@pytest.mark.parametrize("name", some(RULED_NAMES, ["qwen2_5_vl"]))
def test_edge_scores_with_changed_derivatives_equal_modules_with_them(
    name: str, call: str, fill: str
) -> None:
    compare(name, call, fill)


PATHS = {
    (("z", 0, 1), ("q", 1, 0)): "z vision layer 0 head 1 -> q vision layer 1 head 0",
    (("z", 0, 0), ("mlp_norm", 0, 0)): "z vision layer 0 head 0 -> mlp_norm vision layer 0",
    (("mlp_out", 0, 0), ("v", 1, 1)): "mlp_out vision layer 0 -> v vision layer 1 head 1",
    (("mlp_out", 0, 0), ("mlp_norm", 1, 0)): "mlp_out vision layer 0 -> mlp_norm vision layer 1",
}


@pytest.mark.parametrize("call", RULED)
@pytest.mark.parametrize("name", some(RULED_NAMES, ["llava_class"]))
def test_estimates_of_paths_with_changed_derivatives_equal_edge_scores(
    name: str, call: str
) -> None:
    """The former are in 32 bits, and the latter compared with changed modules above."""
    cell = "photo row 1 col 2 token"
    scores, kind = score(name, fit(call, at=cell)), call.partition("(")[0]
    text = "".join(
        experiment(f"e{n}", "from changed into clean", f"path {path} at {cell} using {kind}")
        for n, path in enumerate(PATHS.values())
    )
    for found, edge in zip(run_text(name, text), PATHS, strict=True):
        [measure] = found.measures
        effect = (measure.patched[0] - measure.base[0]).mean()
        np.testing.assert_allclose(scores[edge], effect, atol=2e-5, rtol=1e-3)
        assert abs(effect) > 1e-4


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", some(["paligemma", "llava_class"], ["paligemma"]))
def test_edge_scores_with_the_values_of_another_image_equal_gradients(name: str, call: str) -> None:
    compare(name, call, "changed")


def test_edge_scores_of_rows_one_by_one_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows pass alone, and vectors are read again."""
    name, text = "llava_class", fit(CALLS[1], at="photo tokens")
    expected = score(name, text)
    monkeypatch.setattr(objective_rows, "CHUNK_BYTES", 1)
    monkeypatch.setattr(mask_training, "count_scored_rows", lambda *_, **__: 1)
    found = score(name, text)
    np.testing.assert_allclose([*found.values()], [*expected.values()], atol=1e-6)


# --- circuits -------------------------------------------------------------------------------------


@dataclass
class Gated(Pass):
    """A pass in which edges carry a share of other values."""

    shares: Mapping[Edge, Tensor] = field(default_factory=dict[Edge, Tensor])

    def carried(self, sender: Node, receiver: Node) -> Tensor:
        own, share = self.given[sender], self.shares[sender, receiver]
        there = torch.zeros(len(own), 1, dtype=own.dtype)
        there[[*self.tokens]] = 1
        return own + there * share * (self.fills[sender] - own)


@pytest.mark.parametrize("name", some(["llava_class", "qwen2_5_vl", "paligemma"], ["llava_class"]))
def test_mask_over_edges_has_the_loss_and_gradient_of_hooks(name: str) -> None:
    mask, rows = open_masked(name, fit("mask(size: 8)", "with: zero", at="photo tokens"))
    edges = [(spell(of), spell(to)) for of, to in rows.edges]
    random = torch.Generator().manual_seed(3)
    start = torch.rand(len(ALL), len(edges), generator=random, dtype=torch.float64)
    mine, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    with torch.enable_grad():
        values = rows.values(np.arange(len(ALL)), mine)
        wanted: list[Tensor] = []
        for row, n in enumerate(row_ids(rows)):
            own = sent(name, n, n)
            shares = dict(zip(edges, theirs[row], strict=True))
            work = Gated(name, zeros_of(own), (), tower(name).every(n), shares=shares)
            wanted.append(run_with_gradients(work, n, n))
        (slope,) = torch.autograd.grad(values.sum(), mine)
        (expected,) = torch.autograd.grad(torch.stack(wanted).sum(), theirs)
    assert mask.noun == "edge"
    np.testing.assert_allclose(values.detach(), torch.stack(wanted).detach(), atol=1e-5)
    np.testing.assert_allclose(slope, expected, atol=5e-4, rtol=1e-3)
    assert expected.abs().max() > 1e-2


def train(tmp_path: Path, name: str, text: str) -> tuple[Any, Any]:
    """The report of the only training of a file, and the result of its experiment."""
    path = write_file(name, text)
    models = {"m": (bare(name).model, bare(name).processor)}
    [trained] = mechdsl.fit(path, models, store=tmp_path / "store")
    [found] = map(as_in_the_data, mechdsl.run(path, models, store=tmp_path / "store"))
    return trained, found


def expected_values(name: str, ablated: Collection[Edge], *, of: Callable[[int], int]) -> list[Any]:
    """The measure of each prompt with an image while edges carry 0 at all patches."""
    found: list[float] = []
    for n in ALL:
        tokens = tower(name).every(of(n))
        work = Pass(name, zeros_of(sent(name, n, of(n))), ablated, tokens)
        found.append(run(work, n, of(n)))
    return found


METHODS = (
    "eap(size: 8)",
    'eap(size: 8, select: "greedy")',
    "eap_ig(faithfulness: 0.5, steps: 2)",
    "acdc(threshold: 0.02)",
    "coarse_to_fine(threshold: 0.02)",
    "greedy(size: 40)",
    "mask(size: 12)",
)


@pytest.mark.parametrize("call", some(METHODS, METHODS[:1]))
@pytest.mark.parametrize("name", some(("llava_class", "qwen2_5_vl"), ("llava_class",)))
def test_chosen_circuit_acts_in_rules_and_in_its_report_as_with_hooks(
    name: str, call: str, tmp_path: Path
) -> None:
    """Its size, the run with the circuit alone, without any edge, and in an experiment."""
    more = ", steps: 4" if call.startswith("mask") else ""
    text = fit(call, "with: zero", at="photo tokens", more=more)
    trained, found = train(tmp_path, name, text)
    assert found.circuit is not None
    every = {(spelled(of), spelled(to)): (of, to) for of, to in list_edges()}
    edges = [every[edge] for edge in found.circuit.edges]
    rest = {*list_edges()} - {*edges}
    assert 0 < len(edges) < len(list_edges())
    values = expected_values(name, rest, of=other)
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)
    report = trained.report
    kept = np.mean(expected_values(name, rest, of=lambda n: n))
    np.testing.assert_allclose(
        report.whole, np.mean(expected_values(name, list_edges(), of=lambda n: n)), atol=1e-4
    )
    np.testing.assert_allclose(
        report.unpatched, np.mean(expected_values(name, (), of=lambda n: n)), atol=1e-4
    )
    if not call.startswith("mask"):
        np.testing.assert_allclose(report.trained, kept, atol=1e-4)
    assert abs(report.whole - report.unpatched) > 0.01


@pytest.mark.slow
def test_saved_circuit_of_an_encoder_acts_as_the_trained_one(tmp_path: Path) -> None:
    """Its file names the nodes of the encoder."""
    name = "llava_class"
    text = fit("eap(size: 8)", "with: zero", at="photo tokens")
    trained, own = train(tmp_path, name, text)
    file = (trained.folder / "mask.json").as_posix()
    rule = text.split("\n", 1)[1]
    [found] = run_text(name, f'circuit c = saved("{file}")\n{rule}', model=loaded(name))
    assert own.circuit is not None
    assert found.circuit is not None
    assert {*found.circuit.edges} == {*own.circuit.edges}
    np.testing.assert_allclose(found.measures[0].patched[0], own.measures[0].patched[0], atol=1e-5)


MANY = """
prompts ask {
  rows "many.jsonl"
  image photo = "{file}"
  template "w3 w2 {photo} w1 w2 w3"
  answer " w1"
  wrong " w2"
  corrupt changed { file = other }
SPLIT}
"""


def write_many(name: str, text: str, split: str = "") -> Path:
    """A file on eight prompts, each with two images that no other prompt has."""
    for number in range(16):
        pixels = np.random.default_rng(50 + number).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder() / f"many{number}.png")
    records = [{"file": f"many{2 * n}.png", "other": f"many{2 * n + 1}.png"} for n in range(8)]
    (folder() / "many.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", "utf-8")
    return write_file(name, text, MANY.replace("SPLIT", split))


@pytest.mark.parametrize("call", some(["eap", "eap_ig(steps: 2)"], ["eap"]))
@pytest.mark.parametrize("name", some(["paligemma", "qwen2_5_vl"], ["paligemma"]))
def test_discovered_circuit_of_an_encoder_equals_its_definition(
    name: str, call: str, tmp_path: Path
) -> None:
    models = {"m": (bare(name).model, bare(name).processor)}
    aim = "logit(answer) - logit(wrong)"
    line = f"discover c over vision at photo tokens using {call} top 10 edges"
    lines = "from clean into changed", line
    path = write_many(name, experiment("e", *lines, measure=f"measure {aim} as recovery"))
    found = mechdsl.run(path, models, store=tmp_path / "store")["e"]
    sized = f"{call.removesuffix(')')}, size: 10)" if "(" in call else f"{call}(size: 10)"
    text = f"circuit c = fit({sized}, prompts: ask.train, from: changed, maximise: {aim}, "
    text += "stack: vision) at photo tokens\n"
    rule = experiment(
        "e",
        "from changed into clean",
        "ablate all but c at photo tokens with changed",
        measure=f"measure {aim} as faithfulness",
    )
    text += rule.replace("prompts ask", "prompts ask.test")
    path = write_many(name, text, "  split 50%\n")
    expected = mechdsl.run(path, models, store=tmp_path / "store", fit=True)["e"]
    assert found.circuit is not None
    assert expected.circuit is not None
    assert found.circuit.edges == expected.circuit.edges
    own, other = found.measures[0], expected.measures[0]
    np.testing.assert_array_equal(own.patched, other.patched)
    assert np.abs(own.patched - own.base).max() > 0.01


@pytest.mark.slow
def test_key_of_a_circuit_depends_on_its_stack(tmp_path: Path) -> None:
    name = "llava_class"
    models = {"m": (bare(name).model, bare(name).processor)}
    text = fit("eap(size: 8)", "with: zero", at="photo tokens")
    folders = set[str]()
    for own in (text, text.replace("stack: vision, ", "")):
        trained = mechdsl.fit(write_file(name, own), models, store=tmp_path)
        folders |= {each.folder.name for each in trained}
    assert len(folders) == 2


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS[:2])
@pytest.mark.parametrize("name", ["llava_next", "gemma3", "qwen2_5_vl"])
def test_planned_cost_is_near_the_counted_products(
    name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, rows = open_scored(name, fit(call, "with: zero", at="photo tokens"))
    price = training_cost("c", mask, rows.objective, rows.model.shape, rows.model.tokenizer)
    monkeypatch.setattr(TrainingJob, "write_card", lambda *_: None)
    job = TrainingJob(tmp_path, {}, tmp_path, lambda: False, lambda *_: None)
    rows.mean(rows.trained, None, rows.batch)  # also tests the patches
    with FlopCounterMode(display=False) as counter:
        find_circuit(mask, rows, job)
    assert 0.5 < price.cost.multiply_adds / (counter.get_total_flops() / 2) < 2


# --- two images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(PAIRED, ("internvl",)))
def test_scores_at_the_tokens_of_one_of_two_images_equal_hooks(name: str) -> None:
    """Edges are in the second image, and images of other rows are encoded in the same pass."""
    text = fit("eap(size: 8)", "with: zero", at="two tokens").replace(": ask", ": both")
    text = text.replace("prompts ask", "prompts both").replace("photo tokens", "two tokens")
    mask, objective = declared_in(name, text, PAIR)
    rows = open_edges(mask, objective, exact(name), None, VectorCache())
    trainer = mask.training.trainer_of(EdgeScoreTrainer)
    scores = rows.score(rows.trained, trainer, 1) / len(rows.trained)
    found = {(spell(of), spell(to)): own for (of, to), own in zip(rows.edges, scores, strict=True)}
    expected = dict.fromkeys(list_edges(), 0.0)
    for n in ALL:
        given, tokens = both(name, n), every(name, (n, other(n)), 1)
        clean, work = sent_by(Pass(name), given), Differentiated(name)
        with torch.enable_grad():
            value = measure_inputs(work, given)
            slopes = torch.autograd.grad(value, list(work.leaves.values()))
        by_receiver = dict(zip(work.leaves, slopes, strict=True))
        for of, to in expected:
            product = -clean[of][tokens] * by_receiver[to][tokens]
            expected[of, to] += float(product.sum()) / len(ALL)
    values = np.array([*expected.values()])
    np.testing.assert_allclose([found[edge] for edge in expected], values, atol=1e-5, rtol=1e-4)
    assert np.abs(values).max() > 1e-2


# --- errors ---------------------------------------------------------------------------------------

SPELLED = "stack: vision"
REJECTED = {
    "stack": (SPELLED, "stack: encoder", "E0207", "isn't a stack whose edges alone"),
    "nodes": (SPELLED, "stack: vision, nodes: g", "E0108", "a neuron or feature of the vision"),
    "attention": ("eap(size: 8)", "atp_qk(size: 8)", "E0608", "not of the patches of images"),
    "positions": (
        "at photo tokens\n",
        "at photo row 1 col 1 token, photo row 1 col 2 token\n",
        "E0108",
        "in the vision encoder at several positions",
    ),
    "text": ("at photo tokens\n", "at last token\n", "E0310", "lies outside the images"),
    "size": ("size: 8", "size: 800", "E0342", "there are only 46 edges"),
    "images": ("measure_on_training_rows: true, ", "", "E0345", "have images of training rows"),
}


def errors_of(name: str, text: str) -> list[Diagnostic]:
    source = write_source(name, text)
    checked = check_source(source, models={"m": context(source, "m", exact(name))})
    return [each for each in checked.diagnostics if each.severity == "error"]


@pytest.mark.parametrize("key", REJECTED)
def test_fit_that_an_encoder_does_not_have_reports_an_error(key: str) -> None:
    old, new, code, reason = REJECTED[key]
    text = fit("eap(size: 8)", at="photo tokens").replace(old, new, 1)
    text = text.replace("validation: 0%, ", "") if key == "images" else text
    found = errors_of("llava_class", "group g = L0N3\n" + text)
    assert code in {each.code for each in found}
    assert any(reason in f"{each.message}: {each.label_text}" for each in found)


@pytest.mark.parametrize("discovered", [False, True])
def test_edges_of_an_encoder_without_positions_report_the_missing_line(*, discovered: bool) -> None:
    lines = "from clean into changed", "discover c over vision using eap top 4 edges"
    text = experiment("e", *lines, measure="measure logit(answer) as recovery")
    if not discovered:
        text = fit("eap(size: 8)", at="photo tokens").replace(" at photo tokens\n", "\n", 1)
    [found] = errors_of("llava_class", text)
    assert found.code == "E0310"
    assert found.help_text.startswith("without `at`, edges are changed at `tokens *`")
    assert found.help_text.endswith("add `at photo tokens` for an image `photo`")


@pytest.mark.parametrize(
    ("training", "allowed"),
    [
        ("circuit c = fit(eap(size: 4), prompts: ask, from: changed, stack: vision, ", True),
        ("discover c over vision", False),
    ],
)
def test_fix_of_measured_images_names_an_option_only_of_fit(
    training: str, *, allowed: bool
) -> None:
    lines = "from clean into changed", f"{training} at photo tokens using eap top 4 edges"
    text = experiment("e", *lines, measure="measure logit(answer) as recovery")
    if allowed:
        text = f"{training}maximise: logit(answer)) at photo tokens\n" + experiment(
            "e", "from changed into clean", "ablate all but c at photo tokens with changed"
        )
    [found] = errors_of("llava_class", text)
    assert found.code == "E0345"
    assert ("measure_on_training_rows" in found.help_text) == allowed


def test_encoder_of_an_attended_image_has_no_trained_circuits() -> None:
    text = fit("eap(size: 8)", "with: zero", at="photo tokens")
    lines = f'mech 1\nmodel m = local("x")\n{attended.BLOCK}\n{text}'
    source = Source(lines, attended.folder() / "f.mech")
    checked = check_source(source, models={"m": context(source, "m", attended.loaded())})
    found = [each for each in checked.diagnostics if each.severity == "error"]
    assert found[0].code == "E0108"
    assert "in a model whose blocks attend to an image" in found[0].message


def test_trained_circuit_of_an_encoder_is_checked_without_the_model() -> None:
    source = write_source("llava_class", fit("eap(size: 8)", at="photo tokens"))
    assert not [each for each in check_source(source).diagnostics if each.severity == "error"]


def test_trained_circuit_of_a_model_of_text_reports_its_missing_encoder(tmp_path: Path) -> None:
    text = fit("eap(size: 2)", "with: zero", at="tokens *").replace("photo tokens", "tokens *")
    block = 'prompts ask {\n  a in ["Ann", "Mary"]\n  template "{a} said"\n  answer " it"\n'
    block += '  wrong " no"\n  corrupt changed { a = other }\n}\n'
    source = Source(f'mech 1\nmodel m = zoo("names")\n{block}{text}', tmp_path / "f.mech")
    found = [each for each in check_source(source).diagnostics if each.severity == "error"]
    [problem] = [each for each in found if each.code == "E0413"]
    assert "vision" in problem.message
