"""Estimate how long the work of a plan takes on this machine."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from time import perf_counter, process_time

import numpy as np

from mechdsl.plan.cost import Cost
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.plan import Plan
from mechdsl.resolve.over_rows import OverRows
from mechdsl.statistics.cell_inference import draws_of
from mechdsl.statistics.corrections import MULTIPLIERS

EFFICIENCY = 0.8
"""Share of a large product's rate that passes over wide models reach, as measured on two cores."""
REFERENCE_PACE = 0.011
"""Seconds of `host_pace` where `SECONDS` were measured."""
PACE_STEPS = 100_000


@dataclass(frozen=True)
class Amounts:
    """What takes time in a run, next to large matrix products."""

    runs: float = 1.0
    """Runs of the command, each of which imports libraries and loads models."""
    prompts: float = 0.0
    """Rows of all runs that are made and tokenised."""
    calls: float = 0.0
    """Calls of blocks."""
    block_tokens: float = 0.0
    """Tokens through blocks."""
    cells: float = 0.0
    """Cells that are laid out, measured and reported."""
    rows: float = 0.0
    """Patched or observed."""
    numbers: float = 0.0
    """Logits, or numbers of vectors, that metrics and observations read."""
    drawn: float = 0.0
    """Units times resamples and sign flips."""
    summed: float = 0.0
    """The same, times cells."""
    fitted: float = 0.0
    """Vectors that observations over rows fit, such as probes."""


SECONDS = Amounts(
    runs=6.5,
    prompts=2.1e-4,
    calls=1.5e-3,
    block_tokens=1.6e-6,
    cells=1.1e-3,
    rows=1.7e-5,
    numbers=3e-9,
    drawn=8e-9,
    summed=1.4e-10,
    fitted=1.4e-3,
)
"""Per unit of each amount. `benchmarks/estimates.py --fit` measures them."""


@dataclass(frozen=True)
class Estimate:
    """Estimated seconds of one run of a file, by what takes them."""

    loading: float
    """Importing libraries and loading models."""
    prompts: float
    """Making and tokenising prompts."""
    passes: float
    """Running the model, metrics and observations included."""
    statistics: float
    """Resampling units for intervals and p values."""

    @property
    def total(self) -> float:
        return self.loading + self.prompts + self.passes + self.statistics


def matmul_rate(size: int = 1024, repeats: int = 3) -> float:
    """Multiply-adds per second of a product of square matrices in float32, the best of some."""
    a = np.ones((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one starts the threads
        start = perf_counter()
        np.matmul(a, a)
        best = min(best, perf_counter() - start)
    return size**3 / best


def host_pace() -> float:
    """Processor seconds of a fixed loop in Python, the best of some."""
    best = float("inf")
    for _ in range(3):
        start = process_time()
        found: dict[int, str] = {}
        for step in range(PACE_STEPS):
            found[step % 1000] = str(step)
        best = min(best, process_time() - start)
    return best


def amounts(plan: Plan, cost: Cost, blocks: int) -> Amounts:
    """Count what takes time in a run of a plan.

    Args:
        plan: The plan of all experiments.
        cost: The work that its passes leave, `save` lines included.
        blocks: Blocks of the deepest model.
    """
    plans = [each for panel in plan.panels for each in panel.experiments]
    found = [_of_experiment(each) for each in plans]
    return Amounts(
        prompts=sum(len(panel.table) * len(panel.table.runs) for panel in plan.panels),
        calls=(cost.forwards + cost.backwards) * blocks,
        block_tokens=cost.tokens,
        cells=sum(each.cells for each in found),
        rows=sum(each.rows for each in found),
        numbers=sum(each.numbers for each in found),
        drawn=sum(each.drawn for each in found),
        summed=sum(each.summed for each in found),
        fitted=sum(each.fitted for each in found),
    )


def _of_experiment(plan: ExperimentPlan) -> Amounts:
    experiment = plan.experiment
    shape, settings = experiment.model.shape, experiment.spec.statistics
    units, cells = len(experiment.table), plan.n_cells * max(1, len(experiment.measures))
    rows = plan.count()
    atoms = [atom for measure in experiment.measures for atom in measure.atoms]
    reads_all = plan.lists > 0 or not all(atom.form.narrow for atom in atoms)
    each = shape.outputs if reads_all else shape.d_model
    written = 0 if experiment.generation is None else experiment.generation.tokens
    samples = 1 if experiment.generation is None else experiment.generation.samples
    draws = draws_of(settings, cells) + MULTIPLIERS * (settings.correction == "max")
    # simultaneous bounds, argmax and what isn't smooth are resampled
    draws += settings.resamples * bool(experiment.spec.expects)
    over_rows = plan.observes is not None and isinstance(plan.observes.rule.does, OverRows)
    return Amounts(
        runs=0,
        cells=cells,
        rows=rows,
        numbers=float(rows * (each + written * samples * shape.outputs)),
        drawn=float(units * draws),
        summed=float(cells * units * draws),
        fitted=rows if over_rows else 0,
    )


def estimate(work: Amounts, multiply_adds: float, rate: float, pace: float) -> Estimate:
    """Estimate the seconds of a run.

    Args:
        work: As `amounts` counts it.
        multiply_adds: Of all passes over the model.
        rate: Multiply-adds per second, as `matmul_rate` measures it.
        pace: Seconds, as `host_pace` measures it.
    """
    slower = pace / REFERENCE_PACE
    loading, prompts, *passes, drawn, summed, fitted = (
        slower * count * each for count, each in zip(astuple(work), astuple(SECONDS), strict=True)
    )
    products = multiply_adds / (rate * EFFICIENCY)
    return Estimate(loading, prompts, products + sum(passes) + fitted, drawn + summed)
