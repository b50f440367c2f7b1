"""p of all cells of two runs, corrected together, and which of them changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.plural import plural
from mechdsl.program import spec
from mechdsl.results.compared_cells import ComparedMeasure
from mechdsl.statistics.corrections import CORRECTIONS
from mechdsl.validate.reachable_p import CORRECTION_NAMES, out_of_reach, smallest_p


def decide(measures: Sequence[ComparedMeasure]) -> dict[str, str]:
    """Test the differences, decide which cells changed, and say how in words.

    The family is every cell whose values differ by more than rounding. Of the others no sign can
    be swapped, so that they can't be false positives and need no share of the level (Tarone 1990).
    """
    asked = [len(each.asked) for each in measures]
    tests = sum(asked)
    if not tests:
        return {}
    correction = correction_of(
        [each.settings for each, n in zip(measures, asked, strict=True) if n]
    )
    for each in measures:
        each.test(1 if correction == "none" else tests)
    p = np.concatenate([each.p[each.asked] for each in measures])
    corrected = CORRECTIONS[correction](p)
    reach = _out_of_reach(measures, correction)
    ends = np.cumsum(asked)
    for each, own, lost in zip(
        measures, np.split(corrected, ends[:-1]), np.split(reach, ends[:-1]), strict=True
    ):
        cells = each.asked
        each.decide(own)
        for cell in cells[lost].tolist():
            if each.states[cell] == "noise":
                each.states[cell] = "unclear"
                units = plural(int(each.units[cell]), each.word)
                each.reasons[cell] = f"{units}: no p can survive the correction"
    return dict(_words(measures, correction, tests))


def correction_of(settings: Sequence[spec.Statistics]) -> str:
    """That of the file where all its experiments agree; else Holm's, as also for `max`, which is
    about the cells of one experiment."""
    found = {each.correction for each in settings}
    only = found.pop() if len(found) == 1 else "holm"
    return only if only in CORRECTIONS else "holm"


def _out_of_reach(measures: Sequence[ComparedMeasure], correction: str) -> NDArray[np.bool_]:
    """[cell that is asked]: whether all its units speak for a change, but are too few for any p to
    survive."""
    found = np.zeros(sum(len(each.asked) for each in measures), dtype=bool)
    units = [int(each.units[cell]) for each in measures for cell in each.asked.tolist()]
    settings = next(each.settings for each in measures if len(each.asked))
    own = settings.model_copy(update={"correction": correction})
    found[out_of_reach(units, own)] = True
    p = np.concatenate([each.p[each.asked] for each in measures])
    least = np.array([smallest_p(each, own) for each in units])
    level = 1 - own.confidence / 100
    return found & ((p < level) | (p <= least * (1 + 1e-9)))


def _words(
    measures: Sequence[ComparedMeasure], correction: str, tests: int
) -> Iterator[tuple[str, str]]:
    tested = [each for each in measures if len(each.asked) or "changed" in each.states]
    apart = [each for each in tested if not each.rows.paired]
    confidence = " or ".join(dict.fromkeys(f"{each.settings.confidence:g} %" for each in tested))
    yield (
        "difference",
        "new less old, on the rows that both runs have; each row is set against itself",
    )
    yield (
        "interval",
        f"{confidence}, Student's t corrected for skewness over distinct rows or values of `stats "
        "by`; of shares from the exact limits of both; of categories none",
    )
    yield (
        "p",
        "two-sided, the level at which the interval would end at 0; of categories by sign flips: "
        "without a change, old and new could be swapped in each",
    )
    if apart:
        names = ", ".join(dict.fromkeys(f"`{each.new.name}`" for each in apart))
        yield (
            "not paired",
            f"{names}: no row is in both runs, so they are two samples, with Welch's degrees of "
            "freedom",
        )
    yield (
        "correction",
        f"{CORRECTION_NAMES[correction]}, over {plural(tests, 'cell')} whose values differ by more "
        "than rounding; a cell changed where p corrected is below "
        + " or ".join(dict.fromkeys(f"{each.level:g}" for each in tested)),
    )
