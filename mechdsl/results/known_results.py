"""What an expectation may name, of experiments that are finished."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.validate.known import Known, KnownMeasure


def known_results(
    expectation: spec.Expectation,
    result: ExperimentResult,
    others: Mapping[str, ExperimentResult],
    lost: Collection[str] = (),
) -> Known:
    """What an expectation of `result` may name.

    others: finished experiments of the file by name; lost: those that could not be computed.
    """
    names = [name for name in (*others, *lost) if name != result.name]
    return replace(
        _known(result),
        experiments=names,
        others={name: _known(others[name]) for name in names if name in others},
        groups={group.name: group.sites for group in expectation.groups},
        columns=result.row_values,
    )


def _known(result: ExperimentResult) -> Known:
    return Known(
        measures=[KnownMeasure(m.label, m.effect, m.kind, m.word) for m in result.measures],
        axes=result.axes,
        aliases=result.aliases,
        runs=list(result.accuracy),
        cells=result.cells,
        name=result.name,
    )
