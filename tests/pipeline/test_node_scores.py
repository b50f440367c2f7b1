"""Groups that a file declares with `fit(atp(…))` and `fit(integrated_gradients(…))`.

Scores are compared with gradients that plain hooks take on the bare model in float64, one unpadded
prompt at a time, with exact ablations of a linear model, and with `using`. Further tests: planted
heads, the number of nodes, use in rules, keys, cost, and errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mechdsl
from mechdsl.base.arrays import Floats
from mechdsl.execute import mask_training, objective_rows
from mechdsl.execute.mask_training import EffectScoring, MaskRows, NodeRows, find_group, open_rows
from mechdsl.execute.training import TrainingJob, VectorCache
from mechdsl.fits.reports import NodeReport
from mechdsl.pipeline.trained_files import fits_of_file
from mechdsl.planner.training_cost import training_cost
from mechdsl.program.trainers import NodeScoreTrainer
from mechdsl.resolve.matched_draws import combine_draws
from mechdsl.resolve.types import PositionChoice, SitePoint, TrainedMask
from mechdsl.show.reports.text import null_band_text

from ..execute.support import ROWS, shared, token, word_tokenizer
from ..quick import in_turn, some
from ..reference.forward import Changes, Write
from ..rules.models import bare, double
from ..rules.support import plain, records, rows, tokens, worked_out
from .test_edge_scores import (
    LINEAR,
    check_halved_rows,
    check_resumed_scoring,
    finish,
    linear_model,
    resume_search,
)
from .test_trained_coordinate_masks import BASES, coordinates, differentiable, sae, weights
from .test_trained_dictionaries import check_keys, experiment, models, run, train, write
from .test_trained_masks import (
    HEADS,
    HEADS_THERE,
    INPUTS,
    PATCHES,
    planted,
    units_of,
    value_by_hand,
    write_planted,
)
from .test_trained_node_circuits import (
    COMPLETE,
    DIFFERENCE,
    EVERY_HEAD,
    FAITHFUL,
    LAST,
    check,
    less,
    removed,
    trained,
    zeroed,
)
from .test_trained_rotations import LOSS, NOISY, OTHER, checked, loss_by_hand, training_errors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("gpt2", "llama", "gpt_neox")
HALF = "validation: 25%, batch: 2"
SOURCES = ("from: other", "with: zero", "with: mean")
CALLS = ("atp(size: 1)", "integrated_gradients(size: 1, steps: 3)")
MLPS = {
    "gpt2": "transformer.h.{}.mlp",
    "llama": "model.layers.{}.mlp",
    "gpt_neox": "gpt_neox.layers.{}.mlp",
}


def fit(
    options: str = HALF,
    *,
    call: str = "atp(size: 3)",
    source: str = "from: other",
    objective: str = f"maximise: {LOSS}",
    at: str = f"{HEADS} at last token",
    name: str = "g",
) -> str:
    return f"group {name} = fit({call}, prompts: p, {source}, {objective}, {options}) at {at}\n"


def training_rows(path: Path, model: Any, side: Any = None) -> tuple[TrainedMask, MaskRows]:
    (declared,) = fits_of_file(checked(path, model)).values()
    assert declared.objective is not None
    mask = declared.file
    assert isinstance(mask, TrainedMask)
    return mask, open_rows(mask, declared.objective, shared(model), side, VectorCache())


def score(mask: TrainedMask, masked: MaskRows, passes: list[int] | None = None) -> Floats:
    """Return [candidate] scores; append the number of finished rows after each pass to `passes`."""
    trainer = mask.training.trainer_of(NodeScoreTrainer)
    found = NodeRows(masked, mask.noun, int(mask.training.options["batch"]))
    steps = trainer.steps(mask.training.of_trainer)
    return finish(EffectScoring(found, lambda part: found.score(part, trainer, steps)), passes)


def stored(found: mechdsl.TrainedFit) -> dict[str, Any]:
    return json.loads((found.folder / "mask.json").read_text("utf-8"))


def report_of(found: mechdsl.TrainedFit) -> NodeReport:
    assert isinstance(found.report, NodeReport)
    return found.report


# --- scores ---------------------------------------------------------------------------------------


def points_of(call: str) -> list[float]:
    """Points of the line at which gradients are taken."""
    if call.startswith("atp"):
        return [0.0]
    steps = int(call.split("steps: ")[1].rstrip(")"))
    return [(2 * n + 1) / (2 * steps) for n in range(steps)]


class Module:
    """The input of a module, or the output of an MLP: read, or replaced by a leaf."""

    def __init__(self, family: str, model: Any, site: str, layer: int) -> None:
        self.output = site == "mlp_out"
        path = MLPS[family] if self.output else INPUTS[family][site]
        self.module, self.model = model.get_submodule(path.format(layer)), model
        self.seen = torch.zeros(0)

    def run(self, ids: Sequence[int], change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return [vocab] logits at the end of a run; `seen` is [token, width]."""

        def replace(value: Tensor) -> Tensor:
            own = value[0].detach().clone()
            self.seen = (own if change is None else change(own)).requires_grad_()
            return self.seen[None]

        if self.output:
            handle = self.module.register_forward_hook(lambda _, given, out: replace(out))
        else:
            handle = self.module.register_forward_pre_hook(
                lambda _, given: (replace(given[0]), *given[1:])
            )
        with torch.enable_grad():
            logits = self.model(torch.tensor([list(ids)])).logits[0, -1]
        handle.remove()
        return logits

    def read(self, ids: Sequence[int]) -> Tensor:
        self.run(ids)
        return self.seen.detach()


def incoming(source: str, row: int, at: str, own: Module) -> Tensor:
    """[token at, width] the other values of a row."""
    mine = tokens(rows("clean")[row], at)
    if source == "with: zero":
        return torch.zeros_like(own.read(rows("clean")[row].ids)[mine])
    if source == "from: other":
        there = rows("other")[row]
        return own.read(there.ids)[tokens(there, at)]
    every = [rows("clean")[n] for n in range(4)]
    return torch.stack([own.read(each.ids)[tokens(each, at)] for each in every]).mean(0)


def site_scores(
    family: str,
    model: Any,
    row: int,
    points: Sequence[SitePoint],
    source: str,
    at: str,
    call: str,
    measure: Callable[[Tensor, int], Tensor] = loss_by_hand,
) -> Tensor:
    """[candidate] scores of one unpadded prompt: Σ (y − x) · ∂m/∂x at points between x and y."""
    here = rows("clean")[row]
    mine = tokens(here, at)
    found = torch.zeros(len(points), dtype=torch.float64)
    for site, layer in dict.fromkeys((point.site, point.layer) for point in points):
        own = Module(family, model, site, layer or 0)
        gap = incoming(source, row, at, own) - own.read(here.ids)[mine]
        width = gap.shape[-1]
        units = width if site == "mlp_hidden" else units_of(family, site)
        masks: dict[int, Tensor] = {}
        for number, point in enumerate(points):
            if (point.site, point.layer) == (site, layer):
                masks[number] = torch.zeros(units, width // units, dtype=torch.float64)
                masks[number][slice(None) if point.unit is None else point.unit] = 1
                masks[number] = masks[number].flatten()
        moved = torch.stack([*masks.values()]).amax(0)

        for share in points_of(call):

            def change(x: Tensor, moved: Tensor = moved, gap: Tensor = gap, share: float = share):
                x[mine] += share * moved * gap
                return x

            value = measure(own.run(here.ids, change), row)
            (slope,) = torch.autograd.grad(value, own.seen)
            for number, part in masks.items():
                found[number] += (part * gap * slope[mine]).sum() / len(points_of(call))
    return found


SITES = (
    f"{HEADS} at last token",
    "layers 0, 2 heads 1..2 at subject tokens",
    "mlp_hidden layers 1..2 neurons 3, 7 at last token",
    "mlp_out layers * at cue token",
    "z layers 0..1 at last token",
    f"{HEADS} at {{item 1 token, cue token}}",
    f"{HEADS} at tokens *",
)


WHERE = ((CALLS[0], "left"), (CALLS[1], "right"))


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES))
@pytest.mark.parametrize(("at", "where"), in_turn(SITES, WHERE))
def test_site_scores_equal_differences_times_gradients(
    at: str, where: tuple[str, Any], family: str, source: str, tmp_path: Path
) -> None:
    """In ragged batches of two rows."""
    call, side = where
    if source == "with: mean" and ("subject" in at or "tokens *" in at):
        source = "with: zero"
    line = fit("validation: 0%, batch: 2", call=call, source=source, at=at)
    mask, found = training_rows(write(tmp_path, line, PATCHES), double(family), side)
    points = [each for each in mask.candidates if isinstance(each, SitePoint)]
    expected = torch.stack(
        [
            site_scores(family, double(family), row, points, source, at.split(" at ")[1], call)
            for row in found.objective.table.row_ids
        ]
    ).mean(0)
    assert expected.abs().max() > 1e-4
    np.testing.assert_allclose(score(mask, found), expected, atol=1e-6, rtol=1e-4)


def coordinate_scores(
    family: str, row: int, mask: TrainedMask, basis: str, source: str, at: str, call: str
) -> Tensor:
    """[candidate] scores of one unpadded prompt, from the reference pass."""
    point = mask.training.made
    key, unit = (point.site, point.layer), 0 if point.unit is None else point.unit
    neurons = point.site == "mlp_hidden"
    flat = (lambda run, where: run[key][where].flatten()) if neurons else (
        lambda run, where: run[key][where, unit].flatten()
    )  # fmt: skip
    here, there = rows("clean")[row], rows("other")[row]
    numbers = [getattr(each, "number") for each in mask.candidates]  # noqa: B009
    mean = [flat(plain(family, each), tokens(each, at)[0]) for each in rows("clean")[:4]]
    mean = torch.stack([coordinates(basis, family, each)[0] for each in mean]).mean(0)
    changes: list[tuple[int, Tensor, Tensor]] = []
    for to, of in zip(tokens(here, at), tokens(there, at), strict=True):
        own = flat(plain(family, here), to)
        old, added = coordinates(basis, family, own)
        new = {
            "from: other": coordinates(basis, family, flat(plain(family, there), of))[0],
            "with: zero": torch.zeros_like(old),
            "with: mean": mean,
        }[source]
        changes.append((to, own, (new - old)[numbers][:, None] * added[numbers]))
    found = torch.zeros(len(numbers), dtype=torch.float64)
    for share in points_of(call):
        writes: list[Write] = []
        leaves: list[Tensor] = []
        for to, own, change in changes:
            leaf = (own + share * change.sum(0)).detach().requires_grad_()
            leaves.append(leaf)
            parts = [(n, leaf[n : n + 1]) for n in range(len(own))] if neurons else [(unit, leaf)]
            writes += [Write(*key, value, to, n) for n, value in parts]
        (done,) = differentiable(family, double(family), here.ids, [(writes, ())])
        slopes = torch.autograd.grad(loss_by_hand(done.logits[-1], row), leaves)
        for (_, _, change), slope in zip(changes, slopes, strict=True):
            found += change @ slope / len(points_of(call))
    return found


@pytest.mark.parametrize(("family", "source"), in_turn(HERE[:2], SOURCES))
@pytest.mark.parametrize(("basis", "call"), in_turn([*BASES][:-1], CALLS))
def test_coordinate_scores_equal_differences_times_gradients(
    basis: str, call: str, family: str, source: str, tmp_path: Path
) -> None:
    where = "last token" if source == "with: mean" else "subject tokens"
    declared = sae(tmp_path, family) if "f" in BASES[basis].split() else ""
    options = "validation: 0%, batch: 2"
    line = fit(options, call=call, source=source, at=f"{BASES[basis]} at {where}")
    mask, found = training_rows(write(tmp_path, declared, line, PATCHES), double(family), "right")
    expected = torch.stack(
        [
            coordinate_scores(family, row, mask, basis, source, where, call)
            for row in found.objective.table.row_ids
        ]
    ).mean(0)
    assert expected.abs().max() > 1e-5
    np.testing.assert_allclose(score(mask, found), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("source", "call"), in_turn(SOURCES, CALLS))
def test_position_scores_equal_differences_times_gradients(
    source: str, call: str, tmp_path: Path
) -> None:
    places = ("item 1 token", "cue token", "last token")
    at = f"mlp_out layer 1 at {', '.join(places)}"
    line = fit("validation: 0%, batch: 2", call=call, source=source, at=at)
    rule = experiment("ablate mlp_out layer 1 at g tokens with zero", block="p")
    line = line.replace("validation", "measure_on_training_rows: true, validation")
    mask, found = training_rows(write(tmp_path, line, rule), double("llama"))
    assert all(isinstance(each, PositionChoice) for each in mask.candidates)
    expected = torch.zeros(len(places), dtype=torch.float64)
    for row in found.objective.table.row_ids:
        here, own = rows("clean")[row], Module("llama", double("llama"), "mlp_out", 1)
        mine = [tokens(here, place)[0] for place in places]
        gap = torch.cat([incoming(source, row, place, own) for place in places])
        gap = gap - own.read(here.ids)[mine]
        for share in points_of(call):

            def change(x: Tensor, mine: Any = mine, gap: Tensor = gap, share: float = share):
                x[mine] += share * gap
                return x

            value = loss_by_hand(own.run(here.ids, change), row)
            (slope,) = torch.autograd.grad(value, own.seen)
            expected += (gap * slope[mine]).sum(-1) / len(points_of(call)) / 4
    assert expected.abs().max() > 1e-3
    np.testing.assert_allclose(score(mask, found), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("family", "source"), in_turn(LINEAR, SOURCES[:2]))
@pytest.mark.parametrize("call", CALLS)
def test_site_scores_of_linear_families_equal_exact_ablations_within_1e_5(
    call: str, family: str, source: str, tmp_path: Path
) -> None:
    """Each head is ablated alone by a plain hook; it acts through later layers, too."""
    model, at = linear_model(family), "tokens *"
    line = fit(
        "validation: 0%", call=call, source=source, objective="minimise: logit(answer)",
        at=f"{HEADS} at {at}",
    )  # fmt: skip
    mask, found = training_rows(write(tmp_path, line, PATCHES), model)
    points = [each for each in mask.candidates if isinstance(each, SitePoint)]
    effects = np.zeros(len(points))
    for row in found.objective.table.row_ids:
        here = rows("clean")[row]
        mine = tokens(here, at)
        for number, point in enumerate(points):
            own = Module(family, model, "z", point.layer or 0)
            gap = incoming(source, row, at, own) - own.read(here.ids)[mine]
            parts = gap.unflatten(-1, (units_of(family, "z"), -1))
            kept = torch.zeros_like(parts)
            kept[:, point.unit] = parts[:, point.unit]

            def change(x: Tensor, mine: Any = mine, kept: Tensor = kept):
                x[mine] += kept.flatten(1)
                return x

            answer = token(ROWS[row]["a"])
            effects[number] += own.run(here.ids, change)[answer].item()
            effects[number] -= own.run(here.ids)[answer].item()
    effects /= len(found.objective.table.row_ids)
    assert np.abs(effects).max() > 0.1
    np.testing.assert_allclose(score(mask, found), effects, atol=1e-5)


USING = {"atp(size: 1)": "using atp", CALLS[1]: "using integrated_gradients(steps: 3)"}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("source", SOURCES)
def test_scores_equal_the_estimates_of_a_sweep(call: str, source: str, tmp_path: Path) -> None:
    line = fit("validation: 0%", call=call, source=source, objective="minimise: logit(answer)")
    rule = f"ablate layer * head * at last token {source.replace(':', '')}"
    if source == "from: other":
        rule = "from other into clean\n  patch layer * head * at last token"
    text = experiment(
        rule, USING[call], name="sweep", block="p", measure="measure logit(answer) as delta"
    )
    path = write(tmp_path, line, text, PATCHES)
    (fitted,) = train(path)
    sweep = run(path).files[0].experiments[0]
    np.testing.assert_allclose(stored(fitted)["scores"], sweep.statistics[0].mean, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_node_scores_in_small_chunks_are_the_same(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows pass one by one, and inputs are read again."""
    line = fit("validation: 25%, batch: 1", call=CALLS[1], source=source)
    path = write(tmp_path, line, PATCHES)
    expected = score(*training_rows(path, double("llama")))
    passes: list[int] = []
    monkeypatch.setattr(objective_rows, "CHUNK_BYTES", 1)
    scores = score(*training_rows(path, double("llama")), passes)
    assert passes == [1, 2, 3]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


def test_node_scoring_halves_its_rows_when_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, fit("validation: 0%"), PATCHES)
    check_halved_rows(NodeRows, lambda: score(*training_rows(path, double("llama"))), monkeypatch)


def test_node_scoring_resumes_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, fit("validation: 0%, batch: 1"), PATCHES)
    check_resumed_scoring(NodeRows, path, monkeypatch)


# --- the group ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES))
def test_group_has_the_largest_scores_and_its_report_equals_plain_passes(
    family: str, source: str, tmp_path: Path
) -> None:
    path = write(tmp_path, fit("validation: 0%", source=source), PATCHES)
    mask, found = training_rows(path, double(family))
    job = TrainingJob(tmp_path, {}, tmp_path, lambda: False, lambda *_: None)
    report = find_group(mask, found, job)
    points = [each for each in mask.candidates if isinstance(each, SitePoint)]
    content = json.loads((tmp_path / "mask.json").read_text("utf-8"))
    scores = np.array(content["scores"])
    order = np.argsort(-np.abs(scores))[:3]
    assert content["chosen"] == sorted(order.tolist())
    assert [*report.chosen] == [content["labels"][n] for n in order]
    assert [*report.chosen.values()] == [scores[n] for n in order]
    assert (scores < 0).any()
    assert (scores > 0).any()

    def mean(written: Sequence[int]) -> float:
        gates = torch.zeros(len(points), dtype=torch.float64)
        gates[list(written)] = 1
        values = [
            value_by_hand(family, row, points, gates, source, LAST)
            for row in found.objective.table.row_ids
        ]
        return torch.stack(values).mean().item()

    every = range(len(points))
    rest = [n for n in every if n not in order]
    assert report.trained == pytest.approx(mean(rest), abs=1e-5)
    assert report.alone == pytest.approx(mean(order.tolist()), abs=1e-5)
    assert report.unpatched == pytest.approx(mean([]), abs=1e-5)
    assert report.whole == pytest.approx(mean(every), abs=1e-5)
    others = [set(each) for each in found.random_choices(order.tolist(), found.declared.seed)]
    left = [mean([n for n in every if n not in own]) for own in others]
    assert report.random == pytest.approx(np.mean(left), abs=1e-5)
    assert (report.draws, report.candidates, report.steps) == (8, len(points), 1)


@pytest.mark.parametrize("family", LINEAR)
def test_faithfulness_selects_the_smallest_group_above_it_in_the_order_of_scores(
    family: str, tmp_path: Path
) -> None:
    """The reference ablates the other heads of each smaller group."""
    line = fit("validation: 0%", call="atp(faithfulness: 0.6)", source="with: zero")
    mask, found = training_rows(write(tmp_path, line, PATCHES), double(family))
    job = TrainingJob(tmp_path, {}, tmp_path, lambda: False, lambda *_: None)
    report = find_group(mask, found, job)
    points = [each for each in mask.candidates if isinstance(each, SitePoint)]
    order = np.argsort(-np.abs(score(mask, found)), kind="stable").tolist()

    def mean(kept: Sequence[int]) -> float:
        gates = torch.ones(len(points), dtype=torch.float64)
        gates[list(kept)] = 0
        values = [
            value_by_hand(family, row, points, gates, "with: zero", LAST)
            for row in found.objective.table.row_ids
        ]
        return torch.stack(values).mean().item()

    clean, whole = mean(order), mean([])
    size = len(report.chosen)
    curve = [(mean(order[:n]) - whole) / (clean - whole) for n in range(1, size + 1)]
    assert curve[-1] > 0.6
    assert all(each <= 0.6 for each in curve[:-1])
    said = f"{size} site{'s' * (size > 1)}, the smallest group in this order with a faithfulness"
    assert report.made.startswith(said)
    assert f"({curve[-1]:.3f}, on training rows)" in report.made


@pytest.mark.slow  # the search of circuits resumes in the same way
def test_search_for_the_size_of_a_group_resumes_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = "atp(faithfulness: 0.999)"
    path = write(tmp_path, fit("validation: 0%, batch: 4", call=call), PATCHES)
    again, first, rest = resume_search(path, monkeypatch)
    assert first == [0, 12, 1, 2]
    assert rest == [0, 12, *range(3, len(report_of(again).chosen) + 1)]


PLANTED = {
    "patch": "atp(size: 3), from: swapped, minimise: logit(answer)",
    "zero": "integrated_gradients(size: 3, steps: 8), with: zero, maximise: kl(clean)",
    "faithful": "atp(faithfulness: 0.99), with: zero, maximise: logit(answer)",
}


@pytest.mark.parametrize("name", PLANTED)
def test_node_scores_find_planted_heads(name: str, tmp_path: Path) -> None:
    call, given = PLANTED[name].split("), ")
    line = (
        f"group g = fit({call}), prompts: planted.train, {given}, limit: 24) "
        f"at {HEADS} at last token\n"
    )
    rule = experiment(
        "ablate g at last token with zero",
        block="planted.test",
        measure="measure logit(answer) as delta",
    )
    path = write_planted(tmp_path, line, rule)
    own = {"m": (planted("z"), word_tokenizer())}
    (found,) = mechdsl.fit(path, own, store=tmp_path / "store")
    report = report_of(found)
    there = {f"L{layer}H{head}.z" for layer, head in HEADS_THERE}
    assert {*report.chosen} == there
    assert report.trained == pytest.approx(report.unpatched, abs=1e-4)  # no other head has effects
    assert report.alone == pytest.approx(report.whole, abs=1e-4)
    assert mechdsl.run(path, own, store=tmp_path / "store").complete


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_curves_of_a_group_by_scores_equal_plain_passes(family: str, tmp_path: Path) -> None:
    """`top n of g` are the heads with the largest scores in size, of either sign."""
    loop = "for n in [0, 1, 3] {{ ablate {} at last token with zero }}"
    text = [
        fit(call="atp(size: 4)", objective=f"minimise: {LOSS}"),
        experiment(
            loop.format(f"{HEADS} except top n of g"), "against random(5)", measure=FAITHFUL
        ),
        experiment(loop.format("top n of g"), name="whole", measure=COMPLETE),
        experiment(f"ablate {HEADS} except g at tokens * with zero", name="k", measure=FAITHFUL),
    ]
    fits, found = trained(write(tmp_path, *text), family)
    scores = np.array(stored(fits["g"])["scores"])
    order = np.argsort(-np.abs(scores), kind="stable")[:4].tolist()
    assert order != np.argsort(-scores, kind="stable")[:4].tolist()
    best = [EVERY_HEAD[n] for n in order]
    every = [zeroed(EVERY_HEAD, LAST)]
    check(family, found["e"], [zeroed(less(EVERY_HEAD, best[:n]), LAST) for n in (0, 1, 3)], every)
    check(family, found["whole"], [zeroed(best[:n], LAST) for n in (0, 1, 3)], every)
    whole = [zeroed(EVERY_HEAD, "tokens *")]
    check(family, found["k"], [zeroed(less(EVERY_HEAD, best), "tokens *")], whole)
    assert "of 0 to 3 of 12 sites, drawn" in found["e"].conventions["controls"]
    said = found["e"].conventions["group g"]
    assert f"by estimated effects on {LOSS}" in said
    assert "the 4 sites with the largest estimated effects" in said


def turned(family: str, points: Sequence[tuple[str, int, int]]) -> Callable[[int], list[Write]]:
    """What a patch of the last token from `turned` writes."""

    def changes(n: int) -> list[Write]:
        text, there = rows("second")[n], rows("second.turned")[n]
        read = plain(family, there)
        return [
            Write(site, layer, read[site, layer][there.last, unit], text.last, unit)
            for site, layer, unit in points
        ]

    return changes


@pytest.mark.parametrize("family", HERE)
def test_patched_groups_equal_plain_passes(family: str, tmp_path: Path) -> None:
    """The others of a group, the group itself, and its largest members."""
    run_ = "from turned into clean"
    others = f"patch {HEADS} except {{}} at last token with turned"
    loop = f"for n in [0, 2] {{ {others.format('top n of g')} }}"
    text = [
        fit(source="from: turned"),
        experiment(run_, others.format("g"), "against random(5)", measure=FAITHFUL),
        experiment(run_, "patch g at last token", name="whole", measure=COMPLETE),
        experiment(run_, loop, name="curve", measure=FAITHFUL),
    ]
    fits, found = trained(write(tmp_path, *text), family)
    order = np.argsort(-np.abs(np.array(stored(fits["g"])["scores"])), kind="stable")[:3]
    best = [EVERY_HEAD[n] for n in order]
    every = [turned(family, EVERY_HEAD)]
    check(family, found["e"], [turned(family, less(EVERY_HEAD, best))], every)
    check(family, found["whole"], [turned(family, best)], every)
    curve = [turned(family, less(EVERY_HEAD, best[:n])) for n in (0, 2)]
    check(family, found["curve"], curve, every)
    assert "patches 12 sites instead of 9" in found["e"].conventions["∅"]


@pytest.mark.parametrize("family", HERE)
def test_random_curves_are_all_combinations_of_groups_of_each_size(
    family: str, tmp_path: Path
) -> None:
    """Of 4 heads, 3 other groups of one and 5 of two."""
    loop = "for n in [1, 2] { ablate layer 2 heads * except top n of g at last token with zero }"
    area = f"{FAITHFUL} auc over n  measure {DIFFERENCE} as raw auc over n"
    text = [
        fit(call="atp(size: 2)", at="layer 2 heads * at last token"),
        experiment(loop, "against random(39)", measure=area),
    ]
    fits, found = trained(write(tmp_path, *text), family)
    heads = [each for each in EVERY_HEAD if each[1] == 2]
    scores = np.array(stored(fits["g"])["scores"])
    best = [heads[n] for n in np.argsort(-np.abs(scores), kind="stable")]
    ends: list[tuple[float, float]] = []
    for size in (1, 2):
        others = [each for each in combinations(heads, size) if {*each} != {*best[:size]}]
        cells = [zeroed(less(heads, each), LAST) for each in others]

        def changes(n: int, cell: int, cells: Any = cells) -> list[Changes]:
            return [(cells[cell](n), ())]

        keys = [(number,) for number in range(len(cells))]
        every = worked_out(family, keys, changes, rows("second"), records("second"))
        means = [float(np.mean(own)) for own in every.values()]
        ends.append((min(means), max(means)))
    band = found["e"].control(1)
    assert band is not None
    assert band.draws.tolist() == [15]
    np.testing.assert_allclose([band.low, band.high], np.mean(ends, axis=0)[:, None], atol=1e-4)
    assert "15 draws of random groups, all that exist" in (null_band_text(found["e"], 1) or "")


def test_random_curves_repeat_groups_of_sizes_with_few_others(tmp_path: Path) -> None:
    """11, 65 and 219 other groups of 12 heads, so that there are many more than 39 curves."""
    loop = "for n in [1, 2, 3] {{ ablate {} at last token with zero }}"
    text = [
        fit(),
        experiment(
            loop.format(f"{HEADS} except top n of g"),
            "against random(39)",
            measure=f"{FAITHFUL} auc over n  measure {DIFFERENCE} as raw auc over n",
        ),
        experiment(
            loop.format(f"{HEADS} except top n of g"),
            "against random(39)",
            name="cells",
            measure=FAITHFUL,
        ),
    ]
    _, found = trained(write(tmp_path, *text), "llama")
    band, cells = found["e"].control(0), found["cells"].control(0)
    assert band is not None
    assert cells is not None
    assert band.made.tolist() == [39]
    assert cells.made.tolist() == [11, 39, 39]
    said = null_band_text(found["e"], 1) or ""
    assert said.startswith("range of 39 draws of random groups")
    assert "all that exist" not in said
    assert "sizes with fewer groups repeat theirs" in found["e"].conventions["controls"]
    assert "fewer draws where there are fewer groups" in found["cells"].conventions["controls"]


@pytest.mark.parametrize(
    ("counts", "curves"),
    [((3, 5), 15), ((3, 5, 40), 40), ((7, 27), 40), ((1, 1, 4), 4), ((1, 40), 40), ((0, 40), 0)],
)
def test_draws_of_curves_differ(counts: tuple[int, ...], curves: int) -> None:
    """Of two curves, along the second of two axes."""
    cells = {(one, n): own for one in range(2) for n, own in enumerate(counts)}
    found = combine_draws(cells, ("k", "n"), "n", 40, seed=1)
    for one in range(2):
        own = [found[one, n] for n in range(len(counts))]
        assert len({*zip(*own, strict=True)}) == curves == len(own[0])
        assert all(0 <= n < count for each, count in zip(own, counts, strict=True) for n in each)
        for each, count in zip(own, counts, strict=True):
            assert count == 0 or not curves or len({*each}) >= min(count, 3)
    alone = combine_draws(cells, ("k", "n"), None, 40, seed=1)
    assert [len(alone[0, n]) for n in range(len(counts))] == list(counts)


def test_features_that_change_no_row_are_neither_chosen_nor_drawn(tmp_path: Path) -> None:
    """Others with an estimated effect of 0 can be drawn."""
    basis = sae(tmp_path)
    width = bare("llama").config.hidden_size
    tensors = {name: each.clone() for name, each in weights(width).items()}
    tensors["b_enc"] += 30
    tensors["b_enc"][[0, 1, 2]] = -100  # never active
    tensors["W_dec"][5] = 0  # active, without an effect
    save_file(tensors, tmp_path / "sae.safetensors")
    rule = "ablate features * of f except top 2 of g at last token with zero"
    text = [
        basis,
        fit(call="atp(size: 5)", source="with: zero", at="features * of f at last token"),
        experiment(rule, "against random(40)", measure=FAITHFUL),
    ]
    path = write(tmp_path, *text)
    fits, found = trained(path, "llama")
    report, content = report_of(fits["g"]), stored(fits["g"])
    assert (report.candidates, report.inactive, report.noun) == (6, 3, "feature")
    assert [n for n, own in enumerate(content["scores"]) if own is None] == [0, 1, 2]
    assert content["scores"][5] == 0
    assert content["chosen"] == [3, 4, 6, 7, 8]
    _, rows_ = training_rows(path, bare("llama"))
    kept = [[3, 4, 5, 6, 7, 8][n] for own in rows_.random_choices(range(5), 0) for n in own]
    shares = torch.ones(8, 9).scatter(1, torch.tensor(kept).unflatten(0, (8, 5)), 0)
    means = [rows_.mean(rows_.measured, own, 8) for own in shares]
    assert report.random == pytest.approx(np.mean(means), abs=1e-5)
    assert f"random groups, {math.comb(6, 2) - 1} draws" in found["e"].conventions["controls"]
    path = write(tmp_path, basis, text[1].replace("size: 5", "size: 6"), PATCHES)
    with pytest.raises(mechdsl.MechdslError, match="at 6 of 9 features, and the group chooses 6"):
        train(path)


def test_curve_over_features_by_scores_equals_plain_passes(tmp_path: Path) -> None:
    loop = "for n in 0..3 { ablate features * of f except top n of g at last token with zero }"
    at = "features * of f at last token"
    text = [
        sae(tmp_path),
        fit(call="integrated_gradients(size: 3, steps: 4)", source="with: zero", at=at),
        experiment(loop, measure=FAITHFUL),
    ]
    fits, found = trained(write(tmp_path, *text), "llama")
    scores = np.array(stored(fits["g"])["scores"], float)  # NaN for inactive features
    best = np.argsort(-np.abs(scores), kind="stable")[:3].tolist()
    kept = [[n for n in range(len(scores)) if n not in best[:k]] for k in range(4)]
    every = [removed(range(len(scores)), LAST)]
    check("llama", found["e"], [removed(own, LAST) for own in kept], every)


def test_group_by_scores_equals_its_listed_sites_in_rules(tmp_path: Path) -> None:
    """In generated text, a derived run, with a mean, and next to a rule without the group."""
    rules = [
        experiment(
            "generate 3",
            "ablate g at tokens * with zero",
            measure="measure logit(answer) as raw",
        ),
        experiment(
            "run changed { ablate g at last token with zero }",
            "from changed into clean",
            "patch resid_post layer 1 at last token",
            name="derived",
        ),
        experiment("ablate g at last token with mean", name="mean"),
        OTHER,
    ]
    path = write(tmp_path, fit(), *rules)
    (found,) = train(path, out=tmp_path)
    card = (tmp_path / "g" / "README.md").read_text("utf-8")
    assert card.startswith("# g: atp over 12 sites")
    assert f"Chosen by estimated effects of the run `other` on {LOSS}" in card
    own = run(path, fresh=True).files[0].experiments
    heads = ", ".join(name.removesuffix(".z") for name in report_of(found).chosen)
    path = write(tmp_path, f"group g = {heads}\n", *rules)
    listed = run(path, store=False).files[0].experiments
    assert len(own) == len(listed) == 4
    for one, two in zip(own, listed, strict=True):
        for mine, theirs in zip(one.measures, two.measures, strict=True):
            assert np.allclose(mine.patched, theirs.patched, 0, 2e-6, equal_nan=True)


# --- keys and cost --------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "size": {"call": "atp(size: 2)"},
    "faithfulness": {"call": "atp(faithfulness: 0.95)"},
    "trainer": {"call": "integrated_gradients(size: 3, steps: 2)"},
    "steps": {"call": "integrated_gradients(size: 3, steps: 3)"},
    "validation": {"options": HALF.replace("25%", "0%")},
    "seed": {"options": f"{HALF}, seed: 1"},
    "limit": {"options": f"{HALF}, limit: 3"},
    "candidates": {"at": "layers 0..1 heads * at last token"},
    "position": {"at": f"{HEADS} at cue token"},
    "source": {"source": "from: turned"},
    "zero": {"source": "with: zero"},
    "mean": {"source": "with: mean"},
    "measure": {"objective": "maximise: logprob(wrong) - 0.4 * logit(answer)"},
}


def test_key_of_a_group_by_scores_depends_on_every_argument(
    tmp_path: Path, trains_all: bool
) -> None:
    def content(found: mechdsl.TrainedFit) -> object:
        return stored(found)["scores"], stored(found)["chosen"]

    base, _ = check_keys(tmp_path, trains_all, fit, CHANGES, PATCHES, content)
    for parts in (
        (fit(name="h"), PATCHES.replace("patch g", "patch h")),
        ("# A comment.\n", fit(), OTHER, PATCHES),
    ):
        (found,) = train(write(tmp_path, *parts))
        assert (found.folder, found.seconds) == (base.folder, 0.0)


def test_cached_run_depends_on_the_sites_of_a_group_by_scores(tmp_path: Path) -> None:
    path = write(tmp_path, fit(), PATCHES)
    train(path)
    before = run(path).files[0].experiments[0].measures[0].patched
    path = write(tmp_path, fit(call="atp(size: 2)"), PATCHES)
    train(path)
    after = run(path).files[0].experiments[0].measures[0].patched
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("change", ["chosen", "scores", "none"])
def test_damaged_file_of_a_group_by_scores_is_trained_again(change: str, tmp_path: Path) -> None:
    path = write(tmp_path, fit(), PATCHES)
    (found,) = train(path)
    file = found.folder / "mask.json"
    content = json.loads(before := file.read_text("utf-8"))
    content[change.replace("none", "chosen")] = {"chosen": [0, 99], "scores": [1.0], "none": []}[
        change
    ]
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path)
    train(path)
    assert file.read_text("utf-8") == before


COSTS = {
    "heads": (CALLS[0], f"{HEADS} at last token", "from: other"),
    "line": (CALLS[1], f"{HEADS} at last token", "with: mean"),
    "late": (CALLS[1], "mlp_hidden layers 2 neurons * at last token", "with: zero"),
}


@pytest.mark.parametrize("name", some(COSTS, ["line"]))
def test_planned_cost_of_node_scores_is_within_a_factor_of_two(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, at, source = COSTS[name]
    path = write(tmp_path, fit(call=call, at=at, source=source), PATCHES)
    mask, found = training_rows(path, double("gpt2"))
    price = training_cost("g", mask, found.objective, found.model.shape)
    backwards: list[int] = []
    real = mask_training.compute_gradients

    def counted(*given: Any, **options: Any) -> Any:
        backwards.append(1)
        return real(*given, **options)

    monkeypatch.setattr(mask_training, "compute_gradients", counted)
    monkeypatch.setattr(TrainingJob, "write_card", lambda *_: None)
    job = TrainingJob(tmp_path, {}, tmp_path, lambda: False, lambda *_: None)
    with FlopCounterMode(display=False) as flops:
        find_group(mask, found, job)
    assert price.cost.backwards == len(backwards)
    assert 1 / 2 < 2 * price.cost.multiply_adds / flops.get_total_flops() < 2


def test_plan_counts_a_pass_for_each_size_of_a_group(tmp_path: Path) -> None:
    """And one each with every site and with none, on three training rows."""
    tokens_ = []
    for call in ("atp(size: 3)", "atp(faithfulness: 0.5)"):
        mask, found = training_rows(write(tmp_path, fit(call=call), PATCHES), bare("llama"))
        tokens_.append(training_cost("g", mask, found.objective, found.model.shape).cost.tokens)
        row = found.objective.table.runs["clean"].lengths.mean() * found.model.shape.n_layers
        assert tokens_[-1] - tokens_[0] in (0, (12 + 2) * 3 * row)
    assert tokens_[0] < tokens_[1]


def test_plan_names_the_assumed_size_of_a_group(tmp_path: Path) -> None:
    notes: Mapping[str, str] = {}
    for call in ("atp(size: 3)", "atp(faithfulness: 0.5)"):
        path = write(tmp_path, fit(call=call), PATCHES)
        text = " ".join(mechdsl.plan(path, models()).split())
        notes = {**notes, call: text}
    said = "g: counted with 6 of 12 sites until its training decides the number"
    assert said in notes["atp(faithfulness: 0.5)"]
    assert "until its training" not in notes["atp(size: 3)"]


# --- mistakes -------------------------------------------------------------------------------------

CALL = f"fit(atp(size: 3), prompts: p, from: other, maximise: {LOSS})"
LINE = "integrated_gradients(size: 3, steps: 2)"
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "no size": ("atp(size: 3)", "atp", "E0342", "needs `size: …` or `faithfulness: …`"),
    "no steps": ("atp", "integrated_gradients", "E0207", "needs `steps: …`"),
    "both": ("size: 3", "size: 3, faithfulness: 0.5", "E0342", "both select the number of nodes"),
    "typo": ("size: 3", "siz: 3", "E0207", "did you mean `size`"),
    "other name": ("size: 3", "k: 3", "E0207", "write `size: …`"),
    "until": ("size: 3", "until: 0.9", "E0207", "write `faithfulness: …`"),
    "zero": ("size: 3", "size: 0", "E0342", "whole number from 1 on"),
    "all": ("size: 3", "size: 12", "E0342", "`size: 12` leaves out none of the 12 sites"),
    "faithfulness": ("size: 3", "faithfulness: 1.5", "E0342", "a number between 0 and 1"),
    "steps of atp": ("size: 3", "size: 3, steps: 2", "E0207", "is not an argument of `atp`"),
    "no points": ("atp(size: 3)", "integrated_gradients(size: 3, steps: 0)", "E0342", "`steps`"),
    "rate": ("other, ", "other, rate: 0.1, ", "E0207", "isn't trained in steps"),
    "seeds": ("other, ", "other, seeds: 2, ", "E0207", "declare a group for each seed"),
    "flat": (f"maximise: {LOSS}", "maximise: kl(clean)", "E0608", "`integrated_gradients(size"),
    "step function": (f"maximise: {LOSS}", "maximise: rank(answer)", "E0608", "step function"),
    "circuit": ("group g", "circuit g", "E0342", "`atp` trains a group"),
    "edges": ("atp(size: 3)", "eap(size: 3)", "E0342", "or choose sites: `group movers = fit(atp("),
    "estimator": ("atp(", "gradient_input(", "E0203", "`group movers = fit(atp(size: 4)"),
    "discover": ("atp(", "discover(", "E0203", "fit(atp(size: 4)"),
    "one row": ("other, ", "other, limit: 1, ", "E0342", "1 row"),
}  # fmt: skip


def check_mistake(call: str, mistake: Sequence[str], folder: Path) -> None:
    """Check the error of a group; `mistake`: replaced text, its replacement, code, message."""
    old, new, code, said = mistake
    line = f"group g = {call} at {HEADS} at last token\n"
    assert old in line
    line = line.replace(old, new, 1)
    line = line.split(" at ")[0] + "\n" if new.startswith("circuit") else line
    errors = training_errors(write(folder, line, PATCHES, OTHER, blocks=NOISY))
    assert errors[0].code == code, errors
    assert said in f"{errors[0].message} {errors[0].hint}"


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_argument_of_a_group_by_scores_is_rejected(name: str, tmp_path: Path) -> None:
    check_mistake(CALL, MISTAKES[name], tmp_path)


def test_group_without_an_estimated_effect_is_an_error(tmp_path: Path) -> None:
    """The last head output at a token before the end doesn't reach the measure."""
    path = write(tmp_path, fit(at="layers 2 heads * at cue token"), PATCHES)
    with pytest.raises(mechdsl.MechdslError, match=r"estimated effect of every site .* is 0"):
        train(path)
