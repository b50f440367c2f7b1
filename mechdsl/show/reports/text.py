"""Shared text of terminal reports: numbers, headings, notes, conventions and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from textwrap import wrap

import numpy as np
from rich.console import Console
from rich.text import Text

from mechdsl.base.arrays import Bools, Floats
from mechdsl.base.text import count_noun
from mechdsl.program import spec
from mechdsl.program.significance import CORRECTION_NAMES
from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult, LostExperiment
from mechdsl.results.statistics_conventions import (
    WITHHELD_TEXTS,
    describe_equal_draws,
    selection_text,
)
from mechdsl.results.survival import is_significant, is_within_random, significance_level
from mechdsl.statistics.measurements import (
    CellStatistics,
    MeasureData,
    MissingReason,
    NullBand,
    may_round_differently,
)
from mechdsl.statistics.verification import MIN_CORRELATED, Agreement, VerifiedCells

MISSING = "–"

THIN_SHARE = 0.5
"""Share of the fullest cell's prompts below which a cell is thin."""

RANDOM_MARK = "°"
"""Mark after the number of a significant cell whose effect random targets reach too."""

THIN_MARK = "~"

ROUNDED_ZERO = "≈0"
"""Text of a number that rounding alone explains."""


def number_format(values: Iterable[float], digits: int = 3) -> Callable[[float], str]:
    """Return a format for all numbers of a column, so that they are easy to compare.

    `digits` is the number of digits after a leading zero of the largest number.
    """
    finite = [abs(float(v)) for v in values if math.isfinite(v)]
    greatest = max(finite, default=0.0)
    if greatest and not 0.01 <= greatest < 1e6:
        return lambda value: f"{value:.{digits - 1}e}" if math.isfinite(value) else MISSING
    whole = len(str(int(greatest)))
    places = max(0, digits + 1 - max(whole, 1))

    def write(value: float) -> str:
        if not math.isfinite(value):
            return MISSING
        text = f"{value:.{places}f}"
        # A rounded zero has no sign.
        return text.lstrip("-") if float(text) == 0 else text

    return write


def interval_texts(
    write: Callable[[float], str], value: float, low: float, high: float, rounding: float = 0.0
) -> tuple[str, str]:
    """Format a number and its interval with enough digits to distinguish them from 0.

    See `_distinct_texts`.

    Args:
        write: Format of the column.
        value: The number.
        low: Low end of its interval, NaN without one.
        high: High end.
        rounding: Maximum effect of rounding on the number.
    """
    if not math.isfinite(low):
        return _distinct_texts(write, [value], rounding)[0], MISSING
    text, *ends = _distinct_texts(write, [value, low, high], rounding)
    return text, f"[{', '.join(ends)}]"


def _distinct_texts(
    write: Callable[[float], str], numbers: Sequence[float], rounding: float
) -> list[str]:
    """Format the numbers of one row, the ends of an interval last. If an end would be printed as 0
    and isn't, powers of ten are used. An exact 0 has no decimals, and digits below the rounding
    error are omitted."""
    texts = [write(number) for number in numbers]
    zero = [text != MISSING and float(text) == 0 for text in texts]
    rounded = rounding > 0 and abs(numbers[0]) <= rounding
    if all(zero) and (rounded or not any(numbers)):
        return [ROUNDED_ZERO if rounded else "0"] * len(numbers)
    hidden = [is_zero and number != 0 for is_zero, number in zip(zero, numbers, strict=True)]
    if rounded or not any(hidden[-2:]):
        return texts
    return [f"{number:.1e}" for number in numbers]


def mean_texts(
    result: ExperimentResult, measure: int, cells: Iterable[int], write: Callable[[float], str]
) -> list[tuple[str, str]]:
    """Format the mean of each cell with its interval; a cell that can't differ has no rounding."""
    statistic, inert = result.statistics[measure], result.measures[measure].inert
    rounding = np.where(inert, 0.0, statistic.rounding)
    every = (statistic.mean, statistic.low, statistic.high, rounding)
    return [interval_texts(write, *(float(each[cell]) for each in every)) for cell in cells]


def p_text(p: float, at_most: bool = False) -> str:
    """Format p with four decimals, `< 0.0001` below that; `≤` if it may be smaller."""
    if not math.isfinite(p):
        return MISSING
    if p < 0.0001:
        return "< 0.0001"
    return f"≤ {p:.4f}" if at_most and p < 1 else f"{p:.4f}"


def measure_name(data: MeasureData) -> str:
    """Return `recovery of ld`, with `per prompt` if it applies; `raw` is the metric itself."""
    if data.called == "raw":
        return data.label
    each = " per prompt" if data.per_prompt else ""
    return f"{data.called}{each} of {data.label}"


def scale_note(result: ExperimentResult, data: MeasureData) -> str | None:
    """Return `0 is fewer (-2.1), 1 is clean (3.4)`: the unpatched runs in the effect's scale."""
    from mechdsl.vocab.metrics import EFFECTS

    effect = EFFECTS[data.effect]
    if data.kind == "category" or effect.zero is None:
        return None
    base = _run_means(data.base)
    source = [math.nan] if data.source is None else _run_means(data.source)
    write = number_format([*base, *source])
    unit = "" if effect.scale_free else _UNIT_TEXTS.get(data.unit, "")

    def shown(values: Sequence[float], unit: str) -> str:
        """Format a mean; empty without a value."""
        ends = dict.fromkeys(write(value) for value in (min(values), max(values)))
        return "" if math.isnan(values[0]) else f"{' to '.join(ends)}{unit}"

    def with_value(name: str, values: Sequence[float], unit: str) -> str:
        text = shown(values, unit)
        return f"{name} ({text})" if text else name

    if effect.from_circuit:
        gap = shown(source, _UNIT_TEXTS.get(data.unit, ""))
        return f"0 is {with_value('the circuit', base, unit)}, 1 is {effect.divisor} ({gap})"
    if effect.circuit is not None:
        base_run = with_value(result.shown(result.base), base, "")
        nothing = "everything ablated" if result.circuit is None else effect.zero
        return f"0 is {with_value(nothing, source, '')}, 1 is {base_run}"
    after = " after the same replies" if data.as_patched else ""
    zero = f"0 is {with_value(result.shown(result.base) + after, base, unit)}"
    if data.source is None or data.effect == "relative":
        return zero
    name = result.shown(result.source or "")
    if effect.one is not None:
        return f"{zero}, 1 is {with_value(name, source, '')}"
    verb = "have" if ", " in name else "has"
    return f"{zero}, {name} {verb} {shown(source, unit) or 'no value'}"


_UNIT_TEXTS = {"nat": " nat", "logit": " logit", "token": " tokens"}
"""Units that are printed after a number; shares, ranks and others are plain numbers."""


def _run_means(values: Floats) -> list[float]:
    """Return the mean over prompts of every distinct run; cells may have separate runs."""
    averages = [float(np.nanmean(row)) if not np.isnan(row).all() else math.nan for row in values]
    return averages if len(averages) == 1 or not np.isnan(averages).any() else [math.nan]


def drawable_measures(
    result: ExperimentResult, console: Console
) -> Iterator[tuple[int, MeasureData]]:
    """Yield the computed measures with their indices; print why others are missing."""
    for measure, data in enumerate(result.measures):
        if data.missing is None:
            yield measure, data
            continue
        print_missing(f"{result.name}: {measure_name(data)}", [data.missing], console)


def print_missing(name: str, reasons: Iterable[MissingReason], console: Console) -> None:
    """Print why a measure or an experiment could not be computed."""
    console.print()
    console.print(Text(f"{name}: not computed", style="bold"), highlight=False)
    for missing in reasons:
        print_hanging(f"{missing.code}: ", missing.reason, console)


def missing_note(result: ExperimentResult) -> str | None:
    """List the measures that could not be computed, for a figure of the others."""
    names = [
        f"{measure_name(data)} ({data.missing.code})"
        for data in result.measures
        if data.missing is not None
    ]
    return f"not computed: {', '.join(names)}" if names else None


def print_heading(result: ExperimentResult, data: MeasureData, console: Console) -> None:
    """Print the experiment, the measure and its facts."""
    print_title(result.name, measure_name(data), heading_facts(result, data), console)


def print_title(name: str, what: str, facts: str, console: Console) -> None:
    """Print the name of an experiment, what is shown of it, and facts."""
    console.print()
    title = Text(f"{name}: ", style="bold").append(what)
    console.print(title, highlight=False)
    console.print(Text(facts, style="dim"), highlight=False)


def heading_facts(result: ExperimentResult, data: MeasureData) -> str:
    """Describe model, direction, number of prompts, ends of the scale, and the experiments that
    selected the sites on the same prompts."""
    measure = next(n for n, measure_data in enumerate(result.measures) if measure_data is data)
    facts = [result.model, result.direction, prompt_count_text(result, measure)]
    ends = scale_note(result, data)
    if ends:
        facts.append(ends)
    said = selection_note(result)
    if said:
        facts.append(said)
    return " · ".join(facts)


def selection_note(result: ExperimentResult) -> str | None:
    """Name the experiments that selected the sites on the same rows."""
    return f"{selection_text(result)} (W0721)" if result.selected else None


def print_notes(lines: Sequence[str], console: Console) -> None:
    """Print short remarks below a table."""
    for line in lines:
        console.print(Text(line, style="dim"), highlight=False)


def print_conventions(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print all conventions: below every table, and below the last figure of an experiment, which
    follows the other figures."""
    followed = report in result.reports and report != result.reports[-1]
    if not followed or report.kind == "table":
        print_all_conventions(result.conventions, console)


def print_all_conventions(conventions: Mapping[str, str], console: Console) -> None:
    """Print conventions with their names, if there are any."""
    if not conventions:
        return
    console.print(Text("conventions", style="dim bold"), highlight=False)
    key_width = max(len(key) for key in conventions)
    if key_width > console.width // 3:
        key_width = console.width // 3
    for key, value in conventions.items():
        print_hanging(f"  {key:<{key_width}}  ", str(value), console)


def print_hanging(lead: str, text: str, console: Console) -> None:
    """Print dim text after a lead, with a hanging indent."""
    lines = wrap(text, max(20, console.width - len(lead))) or [""]
    for number, line in enumerate(lines):
        start = " " * len(lead) if number else lead
        console.print(Text(start + line, style="dim"), highlight=False, soft_wrap=True)


def rounding_note(result: ExperimentResult, measure: int) -> str | None:
    """Count the cells with mean effects at, or affected by, the level of rounding; give it."""
    data, statistic = result.measures[measure], result.statistics[measure]
    changing = statistic.rounding[may_round_differently(data, statistic)]
    if len(changing):
        what = "the category" if data.kind == "category" else "correctness"
        cells = count_noun(len(changing), "cell")
        share = f"{100 * changing.max():.2g} %"
        return (
            f"rounding alone may change {what} in up to {share} of the prompts of {cells}, "
            "estimated from the base run"
        )
    bounds = statistic.rounding[statistic.at_rounding]
    if not len(bounds):
        return None
    upto = " to ".join(dict.fromkeys(f"{end:.1e}" for end in (bounds.min(), bounds.max())))
    means = "1 mean is" if len(bounds) == 1 else f"{len(bounds)} means are"
    return f"{means} at the level of rounding (up to {upto}): not counted as significant"


def prompt_count_text(result: ExperimentResult, measure: int) -> str:
    """Format `n = 64`, or the range if cells have different numbers of prompts."""
    n = result.statistics[measure].n
    ends = dict.fromkeys((int(n.min(initial=result.prompts)), int(n.max(initial=0))))
    return f"n = {' to '.join(map(str, ends))}" if len(n) else f"n = {result.prompts}"


def has_fewer_prompts(result: ExperimentResult, measure: int) -> Bools:
    """Return whether a cell has fewer prompts than the fullest, so it shows n. Shape [cell]."""
    n = result.statistics[measure].n
    return n < n.max(initial=0)


def fewer_prompts_note(result: ExperimentResult, measure: int, where: str) -> str | None:
    """Return `subscripts: n of cells with fewer than 64 prompts`; `where` is the position of n."""
    if not has_fewer_prompts(result, measure).any():
        return None
    most = int(result.statistics[measure].n.max())
    return f"{where}: n of cells with fewer than {count_noun(most, 'prompt')}"


def subscript(n: int) -> str:
    return str(n).translate(_SUBSCRIPTS)


_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def is_thin(result: ExperimentResult, measure: int) -> Bools:
    """Return whether a cell has less than `THIN_SHARE` of the most prompts. Shape [cell]."""
    n = result.statistics[measure].n
    return n < THIN_SHARE * n.max(initial=0)


def thin_note(result: ExperimentResult, measure: int, mark: str = THIN_MARK) -> str | None:
    """Count the thin cells and explain them; `mark` is how they are shown."""
    count = int(np.count_nonzero(is_thin(result, measure)))
    if not count:
        return None
    most = int(result.statistics[measure].n.max())
    cells = "1 cell has" if count == 1 else f"{count} cells have"
    share = f"{100 * THIN_SHARE:g} %"
    return f"{mark} {cells} fewer than {share} of the {most} prompts of the largest cell"


def significance_marks(result: ExperimentResult, measure: int) -> list[str]:
    """Return `*` for an effect that is significant after correction, `°` if random targets
    nevertheless reach it, otherwise a blank. Shape [cell]."""
    both = zip(is_significant(result, measure), is_within_random(result, measure), strict=True)
    return [RANDOM_MARK if random else "*" if survived else " " for survived, random in both]


def significance_note(
    result: ExperimentResult, measure: int, mark: str = "", random: str = ""
) -> str | None:
    """Count the cells that are significant after correction, and those of them that random targets
    reach, after the marks for the two."""
    statistic, band = result.statistics[measure], result.control(measure)
    if not statistic.test or result.settings is None:
        return None
    if statistic.withheld:
        return f"no cell is reported as significant: {WITHHELD_TEXTS[statistic.withheld]}"
    tested = int(np.count_nonzero(~np.isnan(statistic.p_corrected) | statistic.equal))
    if not tested:
        return "no cell was tested: none has a p-value"
    good = int(np.count_nonzero(is_significant(result, measure)))
    name = CORRECTION_NAMES[result.settings.correction]
    level = f"p < {significance_level(result):g}"
    if result.settings.correction == "none":
        cells = "cell is" if tested == 1 else "cells are"
        said = f"{good} of {tested} {cells} significant at {level} before correction"
    else:
        cells = "cell survives" if tested == 1 else "cells survive"
        how = (
            f"the {name} correction"
            if result.settings.correction == "max"
            else f"{name}'s correction"
        )
        said = f"{good} of {tested} {cells} {how} at {level}"
    alike = is_within_random(result, measure)
    signs = f"{mark} or {random}" if mark and alike.any() else mark
    lead = f"{signs}: " if len(mark) > 1 else f"{signs} " if mark else ""
    decided = (
        0 if band is None else int(np.count_nonzero(is_significant(result, measure) & band.decides))
    )
    if band is None or not decided:
        return lead + said
    from mechdsl.vocab.metrics import EFFECTS

    inside, weaker = (int(np.count_nonzero(alike & each)) for each in (band.inside, band.weaker))
    by_zero = EFFECTS[result.measures[measure].effect].is_shown_by_zero
    where = "beyond the band, away from 0" if by_zero else "between 0 and the band"
    which = f"{random}{':' * (len(random) > 1)} " if random and alike.any() else ""
    if decided == good == 1:
        place = where if weaker else f"{'inside' if inside else 'outside'} its null band"
        return f"{lead}{said}; {which}it lies {place}"
    lie = "lies inside its null band" if inside == 1 else "lie inside their null bands"
    more = f", {weaker} {where}" if weaker else ""
    these = "these" if decided == good else f"the {decided} with {band.fewest} draws or more"
    return f"{lead}{said}; {which}{inside or 'none'} of {these} {lie}{more}"


def centre_note(result: ExperimentResult) -> str | None:
    """Explain that the values of an axis are centres, if it is over windows."""
    if not result.centres:
        return None
    return f"{', '.join(result.centres)} (centre): each value is the centre of a window"


def inert_note(result: ExperimentResult, measure: int) -> str | None:
    """Count the cells that were omitted because they can't differ."""
    from mechdsl.vocab.metrics import EFFECTS

    count = int(np.count_nonzero(result.measures[measure].inert))
    if not count:
        return None
    cells, they = ("1 cell is", "it") if count == 1 else (f"{count} cells are", "they")
    verb = "is" if count == 1 else "are"
    runs = EFFECTS[result.measures[measure].effect].name_inert_runs(result.base)
    return (
        f"{cells} inert: {they} can't differ from {runs}, so {they} {verb} neither tested nor "
        "corrected for"
    )


def verification_notes(result: ExperimentResult, measure: int) -> list[str]:
    """Describe the agreement of estimates with exact effects; empty without `verify`."""
    verified = result.verification(measure)
    if verified is None:
        return []
    over, agreement, said = verified.over_random, verified.over_all, list[str]()
    said += _search_notes(verified)
    if over is not None and over.cells >= MIN_CORRELATED:
        cells = f"{count_noun(over.cells, 'cell')} drawn from {verified.others:,}"
        if over.cells == verified.others:
            cells = f"all {count_noun(over.cells, 'other cell')}"
        said.append(f"agreement over {cells}: {_agreement_text(over)}")
    if agreement.cells >= MIN_CORRELATED and (over is None or agreement.cells > over.cells):
        cells = f"all {count_noun(agreement.cells, 'verified cell')}, which aren't a random sample"
        said.append(f"agreement over {cells}: {_agreement_text(agreement)}")
    recall = verified.recall
    if recall is not None and over is not None:
        top, drawn = f"top {verified.top}", len(verified.cells) - verified.ranked
        above = (
            f"{recall.found} of the {verified.top} largest exact effects that were run are in the "
            f"{top} of the estimates; {recall.above} of {count_noun(drawn, 'random cell')} "
            f"{'exceeds' if recall.above == 1 else 'exceed'} the smallest exact effect of the "
            f"{top}"
        )
        share = f"{100 * recall.low:.1f} % to {100 * recall.high:.1f} %"
        of_all = f", and so do {share} of all {verified.others:,} (Clopper-Pearson)"
        said.append(above + (of_all if math.isfinite(recall.low) else ""))
    if verified.fewer_rows:
        cells = count_noun(verified.fewer_rows, "verified cell")
        said.append(f"exact effects of {cells} are over fewer prompts than the estimates")
    return said


def _search_notes(verified: VerifiedCells) -> Iterator[str]:
    """Yield the outcome of `verify until …`."""
    search = verified.search
    if search is None:
        return
    cells = verified.top + verified.others
    run = f"{len(verified.cells):,} of {count_noun(cells, 'cell')} were run"
    largest = f"the {verified.top} largest exact effects"
    if search.is_proved:
        yield f"{largest} are proved: all {count_noun(cells, 'cell')} that can have one were run"
    elif search.until == "stable":
        same = f"{largest} didn't change in the last {verified.top} runs"
        yield f"{same}; {run} (heuristic, no bound)"
    elif not math.isfinite(search.risk):
        yield f"{run}, some of which have no exact effect, so that nothing is proved"
    else:
        yield (
            f"{run}: another one is among {largest} with an estimated probability of "
            f"{100 * search.risk:.2g} %, if residuals of the others are as those that were seen "
            f"(Student's t, {search.freedom:.2g} degrees of freedom)"
        )


def _agreement_text(agreement: Agreement) -> str:
    """Format the correlations of estimates and exact effects."""
    pairs = (("Pearson", agreement.pearson), ("Spearman", agreement.spearman))
    texts: list[str] = []
    for name, correlation_estimate in pairs:
        value = (
            f"{correlation_estimate.value:.3f}"
            if math.isfinite(correlation_estimate.value)
            else MISSING
        )
        interval = (
            f" [{correlation_estimate.low:.3f}, {correlation_estimate.high:.3f}]"
            if math.isfinite(correlation_estimate.low)
            else ""
        )
        texts.append(f"{name} {value}{interval}")
    return ", ".join(texts)


def equal_rows_note(result: ExperimentResult, measure: int) -> str | None:
    """Count the cells without an interval because all of their rows have the same value. Cells at
    the level of rounding aren't counted."""
    data, statistic = result.measures[measure], result.statistics[measure]
    equal = statistic.equal & ~statistic.at_rounding
    count = int(np.count_nonzero(equal))
    if not count:
        return None
    withheld = "no interval and no p" if statistic.has_p else "no interval"
    what = data.effect if statistic.has_p else "value"
    rows = (data.patched - data.base if statistic.has_p else data.patched)[equal]
    varies = bool((np.nanmax(rows, axis=1) > np.nanmin(rows, axis=1)).any())
    if varies and result.strata is not None:
        verb = "doesn't vary" if count == 1 else "don't vary"
        return f"{count_noun(count, 'cell')} {verb} within a stratum: {withheld}"
    where = "groups" if varies and result.groups is not None else "rows"
    verb = "has" if count == 1 else "have"
    return f"{count_noun(count, 'cell')} {verb} the same {what} in all {where}: {withheld}"


def map_format(values: Iterable[float]) -> Callable[[float], str]:
    """Return a format for all numbers of a map: two digits of the largest one, the colour limit."""
    greatest = max((abs(float(v)) for v in values if math.isfinite(v)), default=0.0)
    return number_format([greatest], 3 if 0.01 <= greatest < 0.1 else 2)


def map_texts(result: ExperimentResult, measure: int, write: Callable[[float], str]) -> list[str]:
    """Format the means of a map; a significant one that would be printed as 0 is a power of ten
    such as `4e-4`. Shape [cell]."""
    return [
        f"{value:.0e}".replace("e-0", "e-")
        if survived and not float(write(value))
        else write(value)
        for value, survived in zip(
            result.statistics[measure].mean, is_significant(result, measure), strict=True
        )
    ]


def null_texts(
    band: NullBand, statistics: CellStatistics, cells: Iterable[int], write: Callable[[float], str]
) -> list[str]:
    """Format the null band of each cell as `[low, high]`, and a single draw as a number."""

    def range_text(cell: int) -> str:
        ends = _distinct_texts(write, [band.low[cell], band.high[cell]], statistics.rounding[cell])
        return f"[{', '.join(ends)}]" if band.draws[cell] > 1 else ends[0]

    return [range_text(cell) if math.isfinite(band.low[cell]) else MISSING for cell in cells]


def null_p_texts(band: NullBand, cells: Iterable[int]) -> list[str]:
    """Format the rank p of each cell; with `≤` if no draw is as large, so that it is a minimum."""
    return [
        MISSING if math.isnan(p) else ("≤" if p * (1 + k) < 1.5 else "") + _short_p(p)
        for p, k in ((float(band.p[cell]), int(band.draws[cell])) for cell in cells)
    ]


def _short_p(p: float) -> str:
    return f"{p:.0e}" if p < 0.0005 else f"{p:.3f}"


def null_band_text(result: ExperimentResult, measure: int) -> str | None:
    """Explain the null band and its meaning: `range of 39 draws of random heads; …`."""
    band = result.control(measure)
    if band is None:
        return None
    some = band.draws > 0
    if not some.any():
        return f"none of the {band.what} has a value"
    if band.title == "untrained":
        return f"{band.what}, before the training"
    fewer = band.made[some] < band.asked
    there = ", all that exist" if fewer.any() else ""
    if fewer.any() and not fewer.all():
        there += f" where fewer than {band.asked:,}"
    empty = np.isnan(result.statistics[measure].mean)
    lost = int((band.made - band.draws)[~empty].sum())
    without = f"; {count_noun(lost, 'draw')} without a value left out" if lost else ""
    draws = _null_ends([f"{k:,}" for k in sorted(band.draws[some].tolist())])
    level = _null_ends([f"{100 * level:.3g} %" for level in sorted(band.level[some].tolist())])
    cut = sorted((band.rank[some] - 1).tolist())
    but = f" without the {_null_ends([f'{n}' for n in cut])} lowest and highest" if cut[-1] else ""
    further = "a target like these" if fewer.all() else "a further draw"
    states = f"{further} falls in this range with probability {level}"
    if band.draws.max() == 1:
        return f"one draw of {band.what}{without}"
    needs = ""
    if not band.decides[some].all() and result.settings is not None:
        needs = f"; a verdict at {result.settings.confidence:g} % needs {band.fewest:,} draws"
        needs += ", more than exist" if fewer.all() else ""
    equal = describe_equal_draws(result, measure)
    equal = equal and f"; {equal}"
    return f"range of {draws} draws of {band.what}{there}{but}; {states}{without}{needs}{equal}"


def null_band_note(result: ExperimentResult, measure: int) -> str | None:
    """Explain the null band after its heading: `null: range of 39 draws of random heads; …`."""
    band = result.control(measure)
    return None if band is None else f"{band.title}: {null_band_text(result, measure)}"


def _null_ends(texts: Sequence[str]) -> str:
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def figure_notes(result: ExperimentResult, measure: int, *, drawn: bool) -> list[str]:
    """Return remarks for a figure with stars on significant cells and shaded null bands, if there
    are draws."""
    survived = significance_note(result, measure, "*", RANDOM_MARK)
    null = null_band_note(result, measure)
    said = [survived, f"{'░ ' * drawn}{null}" if null else None]
    said += [inert_note(result, measure), rounding_note(result, measure)]
    said += [equal_rows_note(result, measure)]
    said.append(thin_note(result, measure))
    return [line for line in said if line]


def print_lost_experiment(lost: LostExperiment, console: Console) -> None:
    """Print why an experiment could not be computed, and its expectations, which fail."""
    print_missing(lost.name, lost.reasons, console)
    print_verdicts(lost, console)


def print_verdicts(result: ExperimentResult | LostExperiment, console: Console) -> None:
    """Print one line per expectation with its value and interval, and a reason below, if any."""
    if not result.outcomes:
        return
    console.print()
    for outcome in result.outcomes:
        style = {"holds": "green", "fails": "bold red", "undecided": "bold yellow"}[outcome.word]
        text = Text().append(outcome.word, style=style).append(f"  expect {outcome.text}")
        value = verdict_text(outcome)
        if value:
            text.append(f"  {value}", style="dim")
        console.print(text, highlight=False)
        if outcome.reason:
            print_hanging(" " * 7, outcome.reason, console)


def verdict_text(outcome: ExpectOutcome) -> str:
    """Return the decisive number with its interval; empty without one."""
    if outcome.value is None or isinstance(outcome.value, str):
        return outcome.value or ""
    ends = [math.nan if end is None else end for end in (outcome.low, outcome.high)]
    if not all(map(math.isfinite, ends)):
        top = outcome.text.startswith("top ")
        return f"rank {outcome.value:.4g} by absolute value" if top else f"{outcome.value:.4g}"
    write = number_format([outcome.value, *ends])
    if outcome.value and float(write(outcome.value)) == 0:  # of an interval that is much wider
        write = "{:.3g}".format
    return " ".join(interval_texts(write, outcome.value, *ends))
