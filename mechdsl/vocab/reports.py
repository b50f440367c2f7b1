"""Reports: displays of an experiment's results, one entry per report."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import PurePath
from typing import Literal, Protocol

from mechdsl.base.records import Record, Registry
from mechdsl.base.text import count_noun, measure_names, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.experiments import BadReport
from mechdsl.diagnostics.syntax import NotSupported, UnknownWord
from mechdsl.program import spec


class NamedMeasure(Protocol):
    """Properties of a measure that checks need."""

    @property
    def label(self) -> str: ...

    @property
    def word(self) -> str: ...

    @property
    def kind(self) -> str: ...


def short_names(label: str, word: str) -> tuple[str, ...]:
    """Return the names of a measure in reports: its label, or the word of `argmax(1..9)`."""
    return tuple(dict.fromkeys(name for name in (*measure_names(label), word) if name))


WordTarget = Literal["axis", "value", "category"]
"""An axis of the experiment, a value of its prompts, or a measure that is a category."""


class ReportWord(Record):
    """A name after the kind or after `by`, and what it may refer to."""

    of: tuple[WordTarget, ...] = ("axis",)
    needed: bool = True


class OutputFile(Record):
    """Permitted suffixes of the file after `to`, the default first."""

    suffixes: tuple[str, ...]
    needed: bool = False


class ReportSignature(Record, kw_only=True):
    """Permitted arguments of a report; None for those that it doesn't accept."""

    variable: ReportWord | None = None
    by: ReportWord | None = ReportWord(needed=False)
    top: bool = False
    """Whether `top n` limits the number of displayed entries."""
    to: OutputFile | None

    @property
    def by_category(self) -> bool:
        """Whether `by` names a measure."""
        return self.by is not None and self.by.of == ("category",)


class ReportKind(Record, kw_only=True):
    """A kind of report, by the word after `report`."""

    name: str
    meaning: str
    example: str
    module: str | None = None
    """None if the kind is reserved but not implemented."""
    signature: ReportSignature | None = None
    """None if the kind is not implemented."""
    along: str | None = None
    """An axis that the experiment must have without naming it."""
    numbers_only: bool = False
    """Whether categories are omitted, so that a numeric measure is required."""
    needs: tuple[str, ...] = ()
    """Optional packages, checked before a run."""
    picture: bool = False
    """Whether its module has a `chart` function in addition to `render` and `save`."""
    of_replies: bool = False
    """Whether it displays replies, so that the experiment must `generate`."""

    of_circuits: bool = False
    """Whether it displays a circuit, so that a rule must ablate one."""

    @property
    def supported(self) -> bool:
        return self.signature is not None


REPORTS: Registry[ReportKind] = Registry("report")

CHART_FILES = OutputFile((".pdf", ".svg", ".png", ".html"))


def _report(entry: ReportKind) -> None:
    REPORTS.add(entry.name, entry)


_report(
    ReportKind(
        name="table",
        meaning="every cell with its effect, interval and p",
        example="report table top 10",
        module="mechdsl.show.reports.table",
        signature=ReportSignature(
            by=ReportWord(("axis", "value"), needed=False),
            top=True,
            to=OutputFile((".txt", ".csv", ".pdf", ".svg", ".png")),
        ),
    )
)

_report(
    ReportKind(
        name="heatmap",
        meaning="the effect along two axes",
        example="report heatmap layer by head",
        module="mechdsl.show.reports.maps",
        signature=ReportSignature(variable=ReportWord(), by=ReportWord(), to=CHART_FILES),
        picture=True,
    )
)

_report(
    ReportKind(
        name="lines",
        meaning="the effect along one axis, with its interval",
        example="report lines layer by position",
        module="mechdsl.show.reports.series",
        signature=ReportSignature(variable=ReportWord(), to=CHART_FILES),
        picture=True,
        numbers_only=True,
    )
)

_report(
    ReportKind(
        name="csv",
        meaning="one line per cell and measure",
        example='report csv to "cells.csv"',
        module="mechdsl.show.reports.files",
        signature=ReportSignature(to=OutputFile((".csv",))),
    )
)

_report(
    ReportKind(
        name="json",
        meaning="the experiment in the format of `run --format json`",
        example='report json to "cells.json"',
        module="mechdsl.show.reports.files",
        signature=ReportSignature(to=OutputFile((".json",))),
    )
)

_report(
    ReportKind(
        name="parquet",
        meaning="one row per cell and measure, for data frames (needs mechdsl[frames])",
        example='report parquet to "cells.parquet"',
        module="mechdsl.show.reports.files",
        signature=ReportSignature(to=OutputFile((".parquet",), needed=True)),
        needs=("pandas", "pyarrow"),
    )
)

_report(
    ReportKind(
        name="bars",
        meaning="the effect as bars along one axis, with its interval",
        example="report bars position",
        module="mechdsl.show.reports.series",
        signature=ReportSignature(variable=ReportWord(), to=CHART_FILES),
        picture=True,
    )
)

_report(
    ReportKind(
        name="confusion",
        meaning="the frequency of each category for each value of an axis or of the prompts",
        example="report confusion item by argmax",
        module="mechdsl.show.reports.maps",
        signature=ReportSignature(
            variable=ReportWord(("axis", "value")), by=ReportWord(("category",)), to=CHART_FILES
        ),
        picture=True,
    )
)

_report(
    ReportKind(
        name="overlay",
        meaning="the effect at each token of the first prompts, or at each patch of the first "
        "images, drawn over the text or image, for images in prompts over both",
        example="report overlay top 5",
        module="mechdsl.show.reports.overlay",
        signature=ReportSignature(
            by=None, top=True, to=OutputFile((".html", ".pdf", ".svg", ".png"))
        ),
        along="position",
        numbers_only=True,
        picture=True,
    )
)

_report(
    ReportKind(
        name="texts",
        meaning="the replies to the first prompts in the base run and in each cell, with "
        "differences marked; an experiment that reports only texts needs no `measure`",
        example="report texts top 5",
        module="mechdsl.show.reports.texts",
        signature=ReportSignature(by=None, top=True, to=OutputFile((".html", ".txt"))),
        of_replies=True,
    )
)

_report(
    ReportKind(
        name="graph",
        meaning="the circuit that the rules ablate, or the attribution graph of the first row: its "
        "edges, with their scores; as a picture, layers from bottom to top, width and colour by "
        "score; as JSON, a graph of EAP-IG or of circuit-tracer",
        example='report graph to "circuit.svg"',
        module="mechdsl.show.reports.graph",
        signature=ReportSignature(
            by=None, top=True, to=OutputFile((".pdf", ".svg", ".png", ".html", ".json"))
        ),
        of_circuits=True,
    )
)

_report(
    ReportKind(name="html", meaning="all reports as one page", example='report html to "r.html"')
)


def check_report(
    report: spec.Report,
    axes: Sequence[str] | None = None,
    values: Collection[str] = (),
    measures: Sequence[NamedMeasure] | None = None,
    *,
    writes: bool | None = None,
    circuit: bool | None = None,
    has_parameters: bool = False,
) -> list[Diagnostic]:
    """Check a `report` line: E0108, E0203, E0607.

    Args:
        axes: Names of the experiment's axes; None if they aren't known yet.
        values: Values of the prompts block.
        measures: Measures of the experiment; None if they aren't known yet.
        writes: Whether rows generate replies.
        circuit: Whether rules ablate a circuit.
        has_parameters: Whether positions of the circuit's edges depend on parameters.
    """
    kind = REPORTS.get(report.kind)
    if kind is None:
        hint = did_you_mean(report.kind, REPORTS, f"reports are {', '.join(REPORTS)}")
        return [UnknownWord(span=report.span, kind="report", word=report.kind, hint=hint)]
    signature = kind.signature
    if signature is None:
        shown = [name for name, report_kind in REPORTS.items() if report_kind.supported]
        later = f"reports that can be drawn are {', '.join(shown)}"
        return [NotSupported(span=report.span, what=f"`report {kind.name}`", later=later)]
    to_json = kind.of_circuits and report.file and report.file.lower().endswith(".json")
    if to_json and has_parameters:
        what = f'`report {kind.name} to "{report.file}"` of a circuit whose positions depend on '
        what += "parameters or groups"
        later = "write numbers in the positions of edges: the file has no parameters or groups"
        return [NotSupported(span=report.span, what=what, later=later)]
    wrong = (
        _wrong_words(kind, signature, report)
        or _wrong_experiment(kind, writes, circuit)
        or (None if axes is None else _wrong_axes(kind, signature, report, axes, values, measures))
        or (None if measures is None else _wrong_measures(kind, signature, report, measures))
        or _wrong_file(kind, signature.to, report)
        or _wrong_width(report)
    )
    if wrong is None:
        return []
    reason, hint = wrong
    return [BadReport(span=report.span, kind=report.kind, reason=reason, hint=hint)]


ReportProblem = tuple[str, str] | None
"""(problem, hint)"""


def _wrong_words(
    kind: ReportKind, signature: ReportSignature, report: spec.Report
) -> ReportProblem:
    example = f"write it as in `{kind.example}`"
    variable, by = signature.variable, signature.by
    if variable is not None and report.variable is None:
        return "names no axis", example
    if by is not None and by.needed and report.by is None:
        return f"names no `by` {'measure' if signature.by_category else 'axis'}", example
    if variable is not None and report.variable == report.by:
        return f"has `{report.by}` twice", example
    if variable is None and report.variable is not None:
        return f"takes no axis, but `{report.variable}` follows it", example
    if report.top is not None and not signature.top:
        return f"shows everything, but `top {report.top}` follows it", example
    if by is None and report.by is not None:
        return f"takes no `by`, but `by {report.by}` follows it", example
    return None


def _wrong_experiment(kind: ReportKind, writes: bool | None, circuit: bool | None) -> ReportProblem:
    if kind.of_circuits and circuit is False:
        return "shows a circuit, but no rule of this experiment names one", (
            "add `circuit c = …` and a rule such as `ablate all but c at tokens * with mean`, or "
            "observe an `attribution_graph`"
        )
    if kind.of_replies and writes is False:
        return "shows replies, but this experiment generates none", (
            "add a line such as `generate 40`"
        )
    return None


def _wrong_axes(
    kind: ReportKind,
    signature: ReportSignature,
    report: spec.Report,
    axes: Sequence[str],
    values: Collection[str],
    measures: Sequence[NamedMeasure] | None,
) -> ReportProblem:
    listed = name_list(axes)
    by = None if signature.by_category else report.by
    value_too = [w is not None and "value" in w.of for w in (signature.variable, signature.by)]
    names = [
        name for measure in measures or () for name in short_names(measure.label, measure.word)
    ]
    if signature.by_category and report.variable in names and report.by in (*axes, *values):
        exchanged = f"`report {kind.name} {report.by} by {report.variable}`"
        return f"needs a measure after `by`, but `{report.by}` isn't one", f"write {exchanged}"
    for word, too in zip((report.variable, by), value_too, strict=True):
        if word is None or word in axes or (too and word in values):
            continue
        hint = f"the experiment's axes are {listed}"
        if not axes:
            hint = "the experiment has no sweep: `report table` shows its only cell"
        if value_too[0] and values:
            listed = name_list(values)
            hint = f"{hint}; values of the prompts are {listed}"
        hint = did_you_mean(word, [*axes, *(values if too else ())], hint)
        return f"has no axis `{word}`", hint
    if kind.along is not None and kind.along not in axes:
        return (
            f"needs the axis `{kind.along}`, but this experiment has no sweep over positions",
            "sweep them: `at token *`, `at each token of NAME`, or `at A token, B token`",
        )
    return None


def _wrong_measures(
    kind: ReportKind,
    signature: ReportSignature,
    report: spec.Report,
    measures: Sequence[NamedMeasure],
) -> ReportProblem:
    categories = [measure for measure in measures if measure.kind == "category"]
    if signature.by_category:
        known = [short_names(category.label, category.word) for category in categories]
        if any(report.by in names for names in known):
            return None
        number = any(report.by in short_names(measure.label, measure.word) for measure in measures)
        what = "is a number, not a category" if number else "isn't one of its measures"
        if not known:
            return f"is by `{report.by}`, which {what}", "add `measure argmax(1..9) as raw`"
        ways = " or ".join(f"`by {names[-1]}`" for names in dict.fromkeys(known))
        return f"is by `{report.by}`, which {what}", f"write {ways}"
    if kind.numbers_only and measures and len(categories) == len(measures):
        names = " and ".join(dict.fromkeys(f"`{category.label}`" for category in categories))
        verb = "is a category" if len(categories) == 1 else "are categories"
        instead = f"`report bars {report.variable}`" if report.variable else "`report table`"
        return f"has no number to draw: {names} {verb}", f"write {instead}"
    return None


def _wrong_file(kind: ReportKind, to: OutputFile | None, report: spec.Report) -> ReportProblem:
    if to is None:
        if report.file is None:
            return None
        return f'can only be printed, but `to "{report.file}"` follows it', "remove it"
    if to.needed and report.file is None:
        return "can't be printed", f"write it as in `{kind.example}`"
    missing = [module for module in kind.needs if find_spec(module) is None]
    if missing:
        return f"needs {' and '.join(missing)}", 'pip install "mechdsl[frames]"'
    if report.file is not None and PurePath(report.file).suffix.lower() not in to.suffixes:
        endings = " or ".join(f"`{suffix}`" for suffix in to.suffixes)
        return f"cannot be written to `{report.file}`", f"its file ends in {endings}"
    return None


def result_file(file: str, result: str) -> str:
    """Return the file of one of several results that a report writes: `two.a.png` of `two.png` for
    the result `read.a` of experiment `read`, and `two.png` for `read`."""
    part, path = result.partition(".")[2], PurePath(file)
    return str(path.with_name(f"{path.stem}.{part}{path.suffix}")) if part else file


PAPER_SUFFIXES = (".pdf", ".svg", ".png")
"""Files whose width can be that of a paper's columns."""

MAX_COLUMNS = 2


def _wrong_width(report: spec.Report) -> ReportProblem:
    if report.width is None:
        return None
    if not 1 <= report.width <= MAX_COLUMNS:
        return (
            f"has a width of {count_noun(report.width, 'column')}, but a paper has one or two",
            "write `width 1 column` or `width 2 columns`",
        )
    if report.file is None:
        return "has a width but no file", 'write it as in `to "heads.pdf" width 1 column`'
    if PurePath(report.file).suffix.lower() not in PAPER_SUFFIXES:
        endings = " or ".join(f"`{suffix}`" for suffix in PAPER_SUFFIXES)
        return f"has a width, but `{report.file}` isn't a picture", f"its file ends in {endings}"
    return None
