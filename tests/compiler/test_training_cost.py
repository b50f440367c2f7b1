"""Training costs in `plan`, compared with the passes and the memory of real trainings."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.execute import dictionary_training, probe_training, training
from mechdsl.execute.patching import differentiated_run
from mechdsl.fits import factors
from mechdsl.fits import training as fits_training
from mechdsl.fits.training import Training
from mechdsl.pipeline.trained_files import fits_of_file, list_training_costs
from mechdsl.planner.training_cost import MIXTURE_STARTS, MOST_ASSESSED, TrainingCost

from ..memory import LiveTensors
from ..quick import some

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

TEXT = """mech 1

model toy = zoo("counting")

prompts fruit {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  split 60%
  corrupt fewer { count = count - 1 }
  corrupt longer { insert 3 tokens before fruits tokens with " plum" }
}

metric shift = logit(answer of fewer) - logit(answer)
"""

STEPS = "steps: 12, batch: 16"
ON_ROWS = f"prompts: fruit.train, limit: 40, {STEPS}"
ON_ALL = "prompts: fruit.train, limit: 40, steps: 12"
ON_EFFECT = f"{ON_ROWS}, from: fewer, maximise: shift"

DECLARED = {
    "sae": f"basis b = fit(sae(features: 512, k: 8), {ON_ROWS}) at resid_post layer 1 at tokens *",
    "das": f"basis b = fit(das(dims: 2), {ON_EFFECT}) at resid_post layer 1 at last token",
    "kl": f"basis b = fit(das(dims: 2), {ON_ROWS}, from: fewer, minimise: kl(fewer)) at resid_post "
    "layer 1 at last token",
    "vector": f"direction b = fit(vector(length: 8), {ON_EFFECT}) at resid_post layer 2 at last "
    "token",
    "soft": "direction b = fit(soft_prompt(tokens: 3), prompts: longer of fruit.train, limit: 40, "
    "steps: 12, batch: 16, maximise: shift) at embed at inserted tokens",
    "edit": f"direction b = fit(reft(rank: 3), {ON_ROWS}, maximise: shift) at resid_post layer 2 "
    "at last token",
    "scales": f"direction b = fit(scales(penalty: 0.1), {ON_ROWS}, maximise: shift) at z layer 1 "
    "head 0 at last token",
    "lens": f"lens b = fit(tuned_lens, {ON_ROWS}) at resid_post layer * at tokens *",
    "dims": f"group b = fit(mask(size: 3), {ON_EFFECT}) at resid_post layer 2 dims * at last token",
    "positions": f"group b = fit(mask(size: 1), {ON_EFFECT}) at resid_post layer 2 at first token, "
    "last-item token, last token",
    "mask": f"group b = fit(mask(size: 3), {ON_EFFECT}) at layers * heads * at last token",
    "edges": f"circuit b = fit(mask(size: 3), {ON_EFFECT}) at last token",
    "semi_nmf": f"basis b = fit(semi_nmf(factors: 32), {ON_ALL}) at resid_post layer 1 at tokens *",
    "ica": f"basis b = fit(ica(components: 32), {ON_ALL}) at resid_post layer 1 at tokens *",
    "mixture": f"basis b = fit(mixture(components: 8), {ON_ALL}) at resid_post layer 1 at tokens *",
    "nmf": f"basis b = fit(nmf(factors: 32), {ON_ALL}) at mlp_hidden layer 1 at tokens *",
    "cca": f"basis b = fit(cca(components: 8), {ON_ALL}, with: resid_post layer 0) at resid_post "
    "layer 2 at tokens *",
    **{
        name: f"probe b = fit({name}, prompts: fruit.train, limit: 40, target: {target}) at "
        "resid_post layer * at last token"
        for name, target in (("ridge", "count"), ("logistic", '"{count}"'))
    },
}
PROBES = ("ridge", "logistic")
SOLVED = ("semi_nmf", "ica", "mixture", "nmf", "cca", *PROBES)
"""Trainings solved from all vectors at once, without steps."""
ON_VECTORS = ("sae", "lens", *SOLVED)

RULES = {
    **dict.fromkeys(SOLVED, "ablate feature 0 of b at last token with zero"),
    **dict.fromkeys(("mixture", "cca"), "observe features of b at last token"),
    **dict.fromkeys(PROBES, "observe probe(b) at resid_post layer 2 at last token"),
    "scales": "scale z layer 1 head 0 at last token by b",
    "lens": "observe tuned_lens(b) at resid_post layer * at last token",
    "dims": "patch b at last token",
    "soft": "set embed at inserted tokens to b",
    **dict.fromkeys(("vector", "edit"), "add b to resid_post layer 2 at last token"),
    "mask": "patch b at last token",
    "edges": "ablate b at last token with fewer",
    "positions": "patch resid_post layer 2 at b tokens",
}


def write(folder: Path, name: str, declared: str | None = None) -> Path:
    rule = RULES.get(name, "patch resid_post layer 1 in basis b at last token")
    effect = "raw" if name == "lens" else "delta"
    runs = "" if name in SOLVED else "from fewer into clean"
    runs = "from clean into longer" if name == "soft" else runs
    body = f"prompts fruit.test limit 8\n  {runs}\n  {rule}\n  measure shift as {effect}"
    path = folder / "file.mech"
    declared = DECLARED[name] if declared is None else declared
    path.write_text(f"{TEXT}\n{declared}\n\nexperiment e {{\n  {body}\n}}\n", "utf-8")
    return path


def price(path: Path) -> TrainingCost:
    (found,) = list_training_costs(check_source(Source(path.read_text("utf-8"), path)))
    return found


@pytest.mark.parametrize(
    "name", some([name for name in DECLARED if name not in ON_VECTORS], ["edit"])
)
def test_training_cost_counts_the_passes_of_a_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, name)
    own, passes = differentiated_run.run_full, 0

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        return own(*given, **options)

    monkeypatch.setattr(differentiated_run, "run_full", counted)
    (done,) = mechdsl.fit(path, store=tmp_path / "store")
    found = price(path)
    assert found.cost.backwards == found.steps == 12 == done.report.steps
    assert (found.rows, found.held_out) == (done.report.rows, done.report.held_out_rows)
    forwards = found.cost.forwards / (2 if name == "kl" else 1)  # references are run elsewhere
    assert passes / 2 < forwards < 2 * passes


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", some([name for name in DECLARED if name not in SOLVED], ["sae", "das"])
)
def test_estimated_training_memory_is_within_a_factor_of_two(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that autograd keeps in a step, and vectors, weights and moments of the optimiser."""
    path = write(tmp_path, name)
    largest = 0
    step = Training._step

    def counted(self: Training) -> None:
        kept: dict[int, int] = {}

        def pack(own: Tensor) -> Tensor:
            kept[own.untyped_storage().data_ptr()] = own.untyped_storage().nbytes()
            return own

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda own: own):
            step(self)
        weights = sum(own.numel() for own in self.model.parameters.values())
        vectors = 2 * self._load(0)[0].numel() if name in ON_VECTORS else 0
        nonlocal largest
        largest = max(largest, sum(kept.values()) + 4 * (vectors + 4 * weights))

    monkeypatch.setattr(Training, "_step", counted)
    mechdsl.fit(path, store=tmp_path / "store")
    assert largest / 2 < price(path).memory < 2 * largest


@pytest.mark.slow
@pytest.mark.parametrize("name", some([name for name in SOLVED if name not in PROBES], ["cca"]))
def test_estimated_memory_of_a_factorisation_is_within_a_factor_of_two(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors and their copies in 64 bits."""
    pytest.importorskip("sklearn.decomposition")
    path = write(tmp_path, name, DECLARED[name].replace("limit: 40", "limit: 400"))
    live, vectors = LiveTensors(), 0
    function = "train_correlated" if name == "cca" else "solve_twice"
    solve, read_rows = getattr(dictionary_training, function), training.read_rows

    def counted(declared: Any, rows: Any, job: Any) -> Any:
        nonlocal vectors
        every = {id(own): own.nbytes for own in (*rows.chunk(0), *rows.held_out())}
        vectors = sum(every.values())
        tracemalloc.start()
        with live:
            return solve(declared, rows, job)

    def read_nonnegative(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
        found = read_rows(*given, **options)[0].abs()
        return found, found

    if name == "nmf":  # the model has no ReLU
        monkeypatch.setattr(training, "read_rows", read_nonnegative)
    for module in (training, dictionary_training):
        monkeypatch.setattr(module, function, counted, raising=module is dictionary_training)
    try:
        mechdsl.fit(path, store=tmp_path / "store")
    finally:
        tracemalloc.stop()
    assert (live.largest + vectors) / 2 < price(path).memory < 2 * (live.largest + vectors)


@pytest.mark.parametrize("name", PROBES)
def test_probe_cost_has_one_pass_and_the_memory_of_decompositions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of all layers, and for one of them arrays in 64 bits."""
    costs, largest, real = [], 0, probe_training.ProbeRows.fit

    def fit(*given: Any) -> Any:
        tracemalloc.start()
        found = real(*given)
        nonlocal largest
        largest = max(largest, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        return found

    monkeypatch.setattr(probe_training.ProbeRows, "fit", fit)
    for limit in (40, 80):
        path = write(tmp_path, name, DECLARED[name].replace("limit: 40", f"limit: {limit}"))
        checked = check_source(Source(path.read_text("utf-8"), path))
        ((found,), (declared,)) = list_training_costs(checked), fits_of_file(checked).values()
        shape = declared.experiment.model.shape
        rows = declared.training.sample.run.rows
        tokens = sum(len(row.ids) for row in rows)
        assert found.cost.tokens == tokens * shape.n_layers  # through every block
        assert (found.rows + found.held_out, found.cost.backwards) == (len(rows), 0)
        assert found.cost.multiply_adds > 2 * 4 * len(rows) * shape.n_layers * shape.d_model**2
        costs.append(found)
    assert costs[1].cost.multiply_adds == pytest.approx(2 * costs[0].cost.multiply_adds, rel=0.1)
    mechdsl.fit(path, store=tmp_path / "store")
    vectors = 80 * shape.d_model * (4 * shape.n_layers + 2 * 8)  # two copies of one layer
    assert (largest + vectors) / 2 < costs[1].memory < 2 * (largest + vectors)


@pytest.mark.slow
def test_training_cost_grows_about_linearly_with_steps(tmp_path: Path) -> None:
    """Reading vectors of all layers, and decompositions of all vectors, cost as much as the steps
    of a short training."""
    least = {"lens": 1.5, **dict.fromkeys(SOLVED, 1)}
    most = {"edges": 14}  # the short training computes no effects of single edges
    for name in (each for each in DECLARED if each not in ("cca", *PROBES)):
        # with fewer steps, a mask doesn't compute effects of single dimensions
        short, long = (
            price(write(tmp_path, name, DECLARED[name].replace("steps: 12", f"steps: {steps}")))
            for steps in (120, 1200)
        )
        assert least.get(name, 3) < long.cost.flops / short.cost.flops <= most.get(name, 10), name
        assert long.memory == short.memory


def test_vectors_of_one_stream_position_cost_the_same_under_both_names(tmp_path: Path) -> None:
    """`resid_pre layer 2` is `resid_post layer 1`: their gradients pass through the same blocks."""
    sites = ("resid_pre layer 2", "resid_post layer 1")
    lines = [DECLARED["vector"].replace("resid_post layer 2", site) for site in sites]
    first, second = (price(write(tmp_path, "vector", line)).cost for line in lines)
    assert first == second


def test_vectors_at_the_embedding_are_read_without_any_block(tmp_path: Path) -> None:
    line = DECLARED["sae"].replace("resid_post layer 1", "embed")
    path = write(tmp_path, "sae", line)
    text = path.read_text("utf-8").replace("patch resid_post layer 1 in", "patch embed in")
    path.write_text(text, "utf-8")
    assert price(path).cost.tokens == 0


def test_mixture_cost_counts_its_starts() -> None:
    assert MIXTURE_STARTS == factors.STARTS


def test_training_cost_counts_the_vectors_assessed_at_once() -> None:
    assert MOST_ASSESSED == fits_training.MOST_ASSESSED


def test_decoder_training_cost_has_its_control_and_no_passes(tmp_path: Path) -> None:
    inner = f"fit(sae(features: 16, k: 2), prompts: decoder of big, {STEPS})"
    declared = DECLARED["sae"].replace("basis b", "basis big")
    path = write(tmp_path, "decoder", f"{declared}\nbasis b = {inner} at resid_post layer 1")
    costs = list_training_costs(check_source(Source(path.read_text("utf-8"), path)))
    own = next(each for each in costs if each.name == "b")
    steps = 2 * 3 * 12 * 16 * 16 * 2 * 128  # of it and of its control
    assert (own.rows + own.held_out, own.steps) == (512, 12)
    assert (own.cost.forwards, own.cost.backwards, own.cost.tokens) == (0, 0, 0)
    assert steps < own.cost.multiply_adds < 2 * steps


def test_plan_lists_the_trainings_that_experiments_use(tmp_path: Path) -> None:
    unused = DECLARED["sae"].replace("basis b", "basis unused")
    path = write(tmp_path, "das", f"{DECLARED['das']}\n{unused}")
    text = str(mechdsl.plan(path))
    (heading,) = (n for n, line in enumerate(text.splitlines()) if line.startswith(" training "))
    cells = text.splitlines()[heading + 1].split()
    assert cells[:4] == ["b", "32", "8", "12"]
    assert " unused " not in text.split(" training ")[1]
    path = write(tmp_path, "das", "basis b = random(dims: 2) at resid_post layer 1")
    assert "training" not in str(mechdsl.plan(path))
