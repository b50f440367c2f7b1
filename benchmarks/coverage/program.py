"""The calls of the program: all that is known here of how its statistics are asked for."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.text import Source, Span
from mechdsl.program import spec
from mechdsl.resolve.cells import CellKey
from mechdsl.results.assembly.collection import add_statistics
from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult
from mechdsl.results.verdicts.decision import decide_all_expectations
from mechdsl.statistics.cell_statistics import compute_cell_statistics
from mechdsl.statistics.measurements import (
    CellStatistics,
    MeasureData,
    NullBand,
    RandomControlValues,
)
from mechdsl.statistics.null_bands import compute_null_bands
from mechdsl.statistics.power import detectable_effect
from mechdsl.syntax import ast
from mechdsl.syntax.frontend import parse
from mechdsl.syntax.tree_builder import RegisteredWords
from mechdsl.vocab.metrics import EFFECTS

SPAN = Span(Source(""), 0, 0)
RESAMPLES = 2000
"""Behind every interval: a fifth of the program's default, as repetitions average them out."""
CONFIDENCE = 95.0
LEVEL = 1 - CONFIDENCE / 100


def _settings(**values: Any) -> spec.Statistics:
    given: dict[str, Any] = {
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
        "correction": "none",
        **values,
    }
    return spec.Statistics(span=SPAN, **given)


def measured(
    patched: Floats,
    base: Floats | None = None,
    source: Floats | None = None,
    *,
    effect: str = "raw",
    unit: str = "",
    seen: Ints | None = None,
) -> MeasureData:
    """A measure of [cell, prompt]; base and source [1 or cell, prompt], the base 0 if not given."""
    return MeasureData(
        label="value",
        metric="value",
        effect=effect,
        kind="number",
        per_prompt=False,
        patched=patched,
        base=np.zeros((1, patched.shape[1])) if base is None else base,
        source=source,
        inert=np.zeros(len(patched), dtype=bool),
        unit=unit,
        word="value",
        seen=seen,
    )


def statistics_of(
    data: MeasureData,
    seed: int,
    *,
    groups: Ints | None = None,
    strata: Ints | None = None,
    **values: Any,
) -> CellStatistics:
    """What the program makes of one measure."""
    named = None if groups is None else np.array([str(each) for each in groups])
    by = {} if groups is None else {"by": "group"}
    settings = _settings(**by, **values)
    return compute_cell_statistics([data], settings, seed, named, effects=EFFECTS, strata=strata)[0]


def p_values(
    deltas: Floats,
    seed: int,
    *,
    test: str = "t",
    correction: str = "none",
    strata: Ints | None = None,
) -> Floats:
    """Corrected p [cell] of deltas [cell, prompt], all cells one experiment."""
    data = measured(deltas, effect="delta")
    # p of sign flips takes nothing from the resamples
    resamples = RESAMPLES if test == "bootstrap" else 20
    given: dict[str, Any] = {"test": test, "correction": correction, "resamples": resamples}
    return statistics_of(data, seed, strata=strata, **given).p_corrected


def planned(units: int, tests: int, test: str) -> tuple[float, float]:
    """The smallest effect that `plan` says is found, and the level of each of the tests."""
    found = detectable_effect(units, tests, _settings(test=test, correction="holm"))
    if found.effect is None:
        raise ValueError(f"{units} units are too few for {tests} tests")
    return found.effect, found.level


def finished(
    deltas: Floats, seed: int, name: str = "e", accuracy: Floats | None = None
) -> ExperimentResult:
    """A finished experiment over heads of one layer, corrected by the default."""
    settings = _settings(resamples=1000, correction="holm")
    experiment = spec.Experiment(
        span=SPAN, name=name, model="toy", prompts="rows", measures=(), statistics=settings
    )
    bare = ExperimentResult(
        name=name,
        model="toy",
        axes=("layer", "head"),
        cells=tuple(
            CellKey({"layer": 0, "head": head}, f"L0H{head}.z", "last token", ())
            for head in range(len(deltas))
        ),
        measures=(measured(deltas, effect="delta"),),
        row_ids=tuple(range(deltas.shape[1])),
        accuracy={} if accuracy is None else {"clean": accuracy},
    )
    return add_statistics(bare, experiment, seed)


@cache
def _expectation(line: str) -> spec.Expectation:
    source = Source(f"mech 1\nexperiment e {{\n  expect {line}\n}}\n")
    tree, diagnostics = parse(source, RegisteredWords())
    if diagnostics:
        raise ValueError(diagnostics)
    block = tree.statements[-1]
    assert isinstance(block, ast.ExperimentDef)
    found = block.statements[0]
    assert isinstance(found, ast.Expect)
    return spec.Expectation(
        span=found.span,
        text=line,
        condition=found.condition,
        top=found.top if isinstance(found.top, int) else None,
        contains=found.contains,
    )


def verdict(line: str, result: ExperimentResult, **others: ExperimentResult) -> ExpectOutcome:
    """What `expect LINE` says of a finished experiment."""
    return decide_all_expectations([_expectation(line)], result, others)[0]


def in_band(drawn: Floats, found: Floats) -> tuple[Bools, float]:
    """[cell] whether an effect lies in the band of random targets, and what share the band states,
    in per cent.

    drawn: [draw, cell, prompt], effects of the random targets. found: [cell, prompt].
    """
    band = _band(drawn, found)
    mean = found.mean(1)
    return (band.low <= mean) & (mean <= band.high), 100 * float(band.level[0])


def rank_p(drawn: Floats, found: Floats) -> Floats:
    """[cell]: p of effects among the random targets."""
    return _band(drawn, found).p


def _band(drawn: Floats, found: Floats) -> NullBand:
    draws, cells, _ = drawn.shape
    values = RandomControlValues((drawn,), np.full(cells, draws), draws, "random heads")
    data = measured(found, effect="delta")
    means = [found.mean(axis=1)]
    rounding = [np.zeros(cells)]
    (band,) = compute_null_bands(
        [data], values, means=means, rounding=rounding, confidence=CONFIDENCE, effects=EFFECTS
    )
    assert band is not None
    return band
