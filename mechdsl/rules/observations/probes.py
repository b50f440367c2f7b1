"""Linear probes of a value: `observe probe`, `observe routed_probe`, `observe routing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from mechdsl.base.records import Record
from mechdsl.base.text import Span, count_noun
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.program import spec
from mechdsl.program.activation_trainers import LOGISTIC_PENALTY
from mechdsl.program.spec import constant_value
from mechdsl.prompts.rows import PromptTable
from mechdsl.resolve.observations import (
    ObservedTokens,
    RowVectors,
    TokenVectors,
    TrainingRows,
    TrainingVectors,
    evaluate_rows,
)
from mechdsl.resolve.probes import (
    PROBE_KINDS,
    ProbeKind,
    choose_kind,
    explain_misfit,
    is_finite_number,
    list_numbers,
    number_classes,
)
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.types import ResolvedRule, TrainedProbe
from mechdsl.rules.observations.registry import observation, report_bad_observation
from mechdsl.rules.observations.rows import (
    SiteRowSetObservation,
    SiteTokenSetObservation,
    resolve_training_rows,
)
from mechdsl.rules.observations.trained_probes import (
    ProbeReading,
    made_of_probe,
    read_trained_probe,
)
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from mechdsl.base.arrays import Bools, Floats, Ints
    from mechdsl.fits.regression import Routing


DEFAULT_FOLDS = 5
"""Default number of folds of a probe."""


class Probe(Record):
    """Targets and settings of a probe."""

    kind: ProbeKind
    targets: tuple[tuple[float, ...], ...]
    """Targets of each row: numbers, or the number of the row's class."""
    classes: tuple[str, ...]
    """Names of the classes."""
    folds: int
    penalty: float | None
    """None if the fit has a default penalty or selects one."""
    train: tuple[tuple[float, ...], ...] | None = None
    """Targets of the rows that the probe is fitted on, if they are others (without folds)."""
    trained_on: str = ""
    """Name of these rows in the file."""


def resolve_probe(
    call: ast.Call,
    table: PromptTable,
    parameters: Mapping[str, Any],
    diagnostics: list[Diagnostic],
    train: PromptTable | None = None,
    kinds: Sequence[ProbeKind] = PROBE_KINDS,
) -> Probe | None:
    """Resolve the targets and settings of a probe; None after an error.

    Args:
        train: Rows to fit on, if they are other rows.
        kinds: Permitted kinds. If there is only one, `kind` isn't an option.

    Codes: E0207 and those of values of a row.
    """
    plain_ones = [each.value for each in call.arguments if each.name is None]
    if len(plain_ones) != 1:
        example = f"`{call.name}(count)`"
        _bad_probe_argument(
            diagnostics, call.span, call.name, "takes one value of the rows", example
        )
        return None
    before = len(diagnostics)
    options = _options(call, parameters, diagnostics, kinds)
    values = evaluate_rows(cast(ast.Expr, plain_ones[0]), table, diagnostics)
    others = evaluate_rows(cast(ast.Expr, plain_ones[0]), train, diagnostics) if train else []
    if values is None or others is None or has_errors(diagnostics[before:]):
        return None
    own, values = len(values), [*values, *others]
    only = kinds[0] if len(kinds) == 1 else None
    kind = only or options.get("kind") or choose_kind(values)
    span = plain_ones[0].span
    problem = explain_misfit(
        kind, values, "a number of each row" if only else "`kind: logistic` for classes"
    )
    if problem is not None:
        _bad_probe_argument(diagnostics, span, span.written, *problem)
        return None
    targets, classes = number_classes(values) if kind == "logistic" else (list_numbers(values), ())
    few = len(set(targets if train is None else targets[own:])) < 2
    if few and not table.stands_in:
        reason = "is the same in all rows, so there is nothing to predict"
        _bad_probe_argument(
            diagnostics, span, span.written, reason, "a value that differs between rows"
        )
        return None
    if train is not None:
        told = next(each.value.span.written for each in call.arguments if each.name == "train")
        if "folds" in options:
            reason = "has nothing to hold out: the probe is fitted on other rows"
            _bad_probe_argument(
                diagnostics, call.span, "folds", reason, "remove `folds` or `train`", bare=True
            )
            return None
        penalty = options.get("penalty")
        return Probe(kind, targets[:own], classes, DEFAULT_FOLDS, penalty, targets[own:], told)
    folds = _read_folds(call, options, table, diagnostics)
    return None if folds is None else Probe(kind, targets, classes, folds, options.get("penalty"))


def resolve_measure_probe(
    call: ast.Call,
    table: PromptTable,
    parameters: Mapping[str, Any],
    diagnostics: list[Diagnostic],
) -> Probe | None:
    """Resolve the settings of a probe of a measure that is 0 or 1; None after E0207."""
    before = len(diagnostics)
    options = _options(call, parameters, diagnostics, ("logistic",))
    folds = _read_folds(call, options, table, diagnostics)
    if folds is None or has_errors(diagnostics[before:]):
        return None
    return Probe("logistic", (), ("0", "1"), folds, options.get("penalty"))


def _read_folds(
    call: ast.Call, options: Mapping[str, Any], table: PromptTable, diagnostics: list[Diagnostic]
) -> int | None:
    """Return the number of folds; None after E0207 for more folds than distinct rows."""
    folds, rows = options.get("folds", DEFAULT_FOLDS), len(set(table.cut_from or table.row_keys))
    if rows < folds and not table.stands_in and not table.cut:
        unit = "image" if table.cut_from else "distinct row"
        reason = f"can't be split: there are {count_noun(rows, unit)} for {folds} folds"
        _bad_probe_argument(
            diagnostics,
            call.span,
            call.name,
            reason,
            f"more {unit.split()[-1]}s, or `folds: {max(2, rows)}`",
        )
        return None
    return folds


def _options(
    call: ast.Call,
    parameters: Mapping[str, Any],
    diagnostics: list[Diagnostic],
    kinds: Sequence[ProbeKind],
) -> dict[str, Any]:
    """Read `folds: 5, kind: logistic, penalty: 0.1`; report E0207 for invalid options."""
    options: dict[str, Any] = {}
    known = [name for name in PROBE_OPTIONS if name != "kind" or len(kinds) > 1]
    for argument in call.arguments:
        if argument.name is None or argument.name == "train":
            continue
        word, value = argument.name, argument.value
        if word not in known:
            hint = did_you_mean(word, known, f"there is {', '.join([*known, 'train'])}")
            _bad_probe_argument(
                diagnostics, argument.span, word, "isn't an option of a probe", hint, bare=True
            )
            continue
        number = value.id if isinstance(value, ast.Name) else None
        if word != "kind" or number is None:
            number = constant_value(cast(ast.Expr, value), parameters)
        good, hint = PROBE_OPTIONS[word]
        if not good(number):
            _bad_probe_argument(
                diagnostics, argument.span, word, f"can't be `{value.span.written}`", hint
            )
        else:
            options[word] = number
    return options


PROBE_OPTIONS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "folds": (lambda n: isinstance(n, int) and 2 <= n <= 1000, "`folds: 5`, from 2 to 1000"),
    "kind": (lambda n: n in PROBE_KINDS, "`kind: ridge` or `kind: logistic`"),
    "penalty": (lambda n: is_finite_number(n) and n > 0, "a number above 0"),
}


def _bad_probe_argument(
    diagnostics: list[Diagnostic],
    span: Span,
    name: str,
    reason: str,
    hint: str,
    *,
    bare: bool = False,
) -> None:
    hint = hint if bare else f"write {hint}"
    diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))


PROBE_UNITS: Mapping[str, str] = {"ridge": "R²", "logistic": "share"}


@observation("probe")
class ProbeObservation(SiteRowSetObservation):
    """How well a linear probe tells the value, in rows that it was not fitted to.

    returns: whether the class is right, or a contribution to R², whose mean is R²
    source: Alain and Bengio 2016, arXiv 1610.01644; its control: Hewitt and Liang 2019,
    arXiv 1909.03368
    """

    takes: ClassVar = ("arguments",)
    controls: ClassVar[tuple[str, ...]] = ("shuffled",)
    keeps_images_together: ClassVar[bool] = True
    of_probes = True

    def __init__(
        self,
        probe: Probe | None = None,
        trained_on: TrainingRows | None = None,
        reading: ProbeReading | None = None,
    ) -> None:
        """Create the observation, of a fit to its own rows or of a probe that the file trains; both
        are None only in the registered instance."""
        self.probe, self.trained_on, self.reading = probe, trained_on, reading
        kind = None if probe is None else probe.kind
        if reading is not None:
            kind = "logistic" if reading.probe.classes else "ridge"
        if kind is not None:
            self.form = replace(type(self).form, unit=PROBE_UNITS[kind])

    @property
    def identity(self) -> tuple[object, ...]:
        if self.reading is None:
            return super().identity
        return type(self), self.name, self.reading.identity

    @property
    def dependencies(self) -> object:
        return super().dependencies if self.reading is None else self.reading.identity

    @property
    def trained(self) -> TrainedProbe | None:
        return None if self.reading is None else self.reading.probe

    @property
    def made_of(self) -> Mapping[str, str]:
        return made_of_probe(self.trained)

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule, work)
        said = rule.observed
        assert said is not None
        if said.call is None:
            report_bad_observation(
                rule, work, "doesn't name the value to predict", "name a value: `probe(count)`"
            )
            return None
        if said.bases:
            reading = read_trained_probe(rule, resolved, work)
            if resolved is None or reading is None:
                return None
            return replace(resolved, does=ProbeObservation(reading=reading))
        parameters, before = work.program.parameters, len(work.diagnostics)
        train = None if resolved is None else resolve_training_rows(rule, resolved, work)
        if has_errors(work.diagnostics[before:]):
            return None
        other = None if train is None else train.table
        probe = resolve_probe(said.call, work.table, parameters, work.diagnostics, other)
        if resolved is None or probe is None:
            return None
        return replace(resolved, does=ProbeObservation(probe, train))

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        from mechdsl.fits.regression import assign_folds, shuffle_targets

        if self.reading is not None:
            return self.reading.score(seen)
        probe = self.probe
        assert probe is not None
        y = select_targets(probe.targets, seen.prompts)
        if seen.training is not None and probe.train is not None:
            targets = select_targets(probe.train, seen.training.prompts)
            dealt = shuffle_targets(seen.training.keys, targets, seed)
            return [
                _score_fitted(probe, seen, seen.training, each, y, seed)
                for each in (targets, dealt)
            ]
        strata = y[:, 0].tolist() if probe.kind == "logistic" else None
        fold = assign_folds(seen.keys, probe.folds, seed, strata)
        return [
            score_held_out(probe, seen.vectors, values, fold)
            for values in (y, shuffle_targets(seen.keys, y, seed))
        ]

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        if self.reading is not None:
            assert rule.sites is not None
            return self.reading.describe(rule.sites)
        assert self.probe is not None
        return describe_probe(self.probe)


def select_targets(targets: Sequence[tuple[float, ...]], prompts: Ints) -> Floats:
    """Select the targets of some rows: [row, target]."""
    import numpy as np

    return np.array([targets[row] for row in prompts.tolist()], dtype=np.float64)


def _score_fitted(
    probe: Probe, seen: RowVectors, training: TrainingVectors, values: Floats, y: Floats, seed: int
) -> Floats:
    """Score predictions from a fit to other rows: [row].

    Args:
        seen: The vectors to evaluate.
        training: The vectors to fit on.
        values: The targets to fit on, [training row, target].
        y: The targets to evaluate.
    """
    import numpy as np

    from mechdsl.fits.regression import LogisticProbe, RidgeProbe, assign_folds, r_squared

    distinct = len(set(training.keys))
    if distinct < 2:
        raise ValueError("the rows used for fitting are equal there")
    if probe.kind == "ridge":
        inner = assign_folds(training.keys, min(probe.folds, distinct), seed)
        predict = RidgeProbe(probe.penalty)(training.vectors, values, inner)
        return r_squared(y, predict(seen.vectors))
    fit = LogisticProbe(LOGISTIC_PENALTY if probe.penalty is None else probe.penalty)
    classes, index = np.unique(values[:, 0], return_inverse=True)
    told = fit(training.vectors, index.astype(np.float64), index)(seen.vectors)
    return (classes[told.astype(np.int64)] == y[:, 0]).astype(np.float64)


def score_held_out(probe: Probe, vectors: Floats, y: Floats, fold: Ints) -> Floats:
    """Score predictions from fits to the other folds: [row]."""
    import numpy as np

    from mechdsl.fits.regression import LogisticProbe, RidgeProbe, cross_validate, r_squared

    if probe.kind == "ridge":
        return r_squared(y, cross_validate(vectors, y, fold, RidgeProbe(probe.penalty)))
    fit = LogisticProbe(LOGISTIC_PENALTY if probe.penalty is None else probe.penalty)
    right = cross_validate(vectors, y[:, 0], fold, fit) == y[:, 0]
    return right.astype(np.float64)


def describe_probe(probe: Probe) -> Iterator[str]:
    """Describe the fit in notes for tables."""
    if probe.kind == "ridge":
        several = len(probe.targets[0])
        of = f"{several} numbers jointly" if several > 1 else "a number"
        held = "rows of other folds" if probe.train is None else "rows not used for fitting"
        yield f"ridge regression of {of}, R² on {held}"
        penalty = "on folds within the rows of each fit, of 0.01 to 10,000 by tens"
        yield f"penalty {probe.penalty:g}" if probe.penalty else f"penalty chosen {penalty}"
    else:
        yield from _describe_classes(probe)
        penalty = LOGISTIC_PENALTY if probe.penalty is None else probe.penalty
        yield f"penalty {penalty:g} / 2 · Σ weights²"
    if probe.train is None:
        yield (
            f"vectors standardised by the rows of each fit; {probe.folds} folds; rows with "
            "equal tokens there are in the same fold"
        )
    else:
        yield (
            f"fitted on `{probe.trained_on}` ({len(probe.train):,} rows), which define the "
            "standardisation"
        )
    if probe.targets:
        yield "values are the clean row's"
    yield "shuffled: the same with the values permuted between rows (Hewitt and Liang 2019)"


def _describe_classes(probe: Probe) -> Iterator[str]:
    """Describe the classes of the rows."""
    names = ", ".join(probe.classes[:8]) + (", …" if len(probe.classes) > 8 else "")
    yield f"logistic regression, {len(probe.classes):,} classes ({names})"
    counts = [0] * len(probe.classes)
    for (number,) in probe.targets:
        counts[int(number)] += 1
    if probe.targets:
        commonest = max(counts) / len(probe.targets)
        yield f"the most common class has {commonest:.3g} of the rows"


class _RoutedObservation(SiteTokenSetObservation):
    """Base of the observations with a routed fit."""

    takes: ClassVar = ("arguments",)
    swept: ClassVar[bool]
    """Whether it has a number for each token and needs a sweep, or combines several tokens."""
    as_written: ClassVar[str]
    """Example of a valid position."""

    def __init__(self, probe: Probe | None = None, trained_on: TrainingRows | None = None) -> None:
        """Create the observation; `probe` is None only in the registered instance."""
        self.probe, self.trained_on = probe, trained_on

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule, work)
        said = rule.observed
        assert said is not None
        if said.call is None:
            example = f"name a value: `{self.word}(count)`"
            report_bad_observation(rule, work, "doesn't name the value to predict", example)
            return None
        before = len(work.diagnostics)
        train = None if resolved is None else resolve_training_rows(rule, resolved, work)
        if has_errors(work.diagnostics[before:]):
            return None
        other = None if train is None else train.table
        parameters, diagnostics = work.program.parameters, work.diagnostics
        probe = resolve_probe(said.call, work.table, parameters, diagnostics, other, ("ridge",))
        if resolved is None or probe is None:
            return None
        return replace(resolved, does=type(self)(probe, train))

    def positions_fit(self, rule: spec.Rule, found: ResolvedRule, work: ExperimentContext) -> bool:
        if ("position" in found.positions.axes) != self.swept:
            of = "a number per token" if self.swept else "computed from several tokens jointly"
            report_bad_observation(
                rule, work, f"is {of}", f"write the position: `{self.as_written}`"
            )
            return False
        return super().positions_fit(rule, found, work)

    def fitted(
        self, seen: ObservedTokens, seed: int, *, dealt: bool = False
    ) -> Iterator[tuple[Bools, Routing]]:
        """Fit without each held-out set of rows.

        Args:
            dealt: Whether to use the shuffled targets.

        Yields:
            The held-out rows, [row], and the fit to the others.
        """
        import numpy as np

        from mechdsl.fits.regression import assign_folds, shuffle_targets

        probe = self.probe
        assert probe is not None

        def wanted(tokens: TokenVectors, targets: Sequence[tuple[float, ...]]) -> Floats:
            y = select_targets(targets, tokens.prompts)
            return shuffle_targets(tokens.keys, y, seed) if dealt else y

        every = np.ones(len(seen.own.prompts), dtype=np.bool_)
        if seen.training is not None and probe.train is not None:
            there = np.ones(len(seen.training.prompts), dtype=np.bool_)
            yield every, self._fit(seen.training, there, wanted(seen.training, probe.train))
            return
        y, fold = wanted(seen.own, probe.targets), assign_folds(seen.own.keys, probe.folds, seed)
        for each in np.unique(fold):
            held = fold == each
            yield held, self._fit(seen.own, ~held, y)

    def _fit(self, tokens: TokenVectors, there: Bools, y: Floats) -> Routing:
        """Fit to the rows selected by `there`, [row], with targets y, [row, target]."""
        from mechdsl.fits.regression import fit_routing

        return fit_routing(*tokens.of_rows(there), y[there], self._penalty)

    @property
    def _penalty(self) -> float:
        assert self.probe is not None
        return LOGISTIC_PENALTY if self.probe.penalty is None else self.probe.penalty

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        probe = self.probe
        assert probe is not None
        several = len(probe.targets[0])
        of = f"{several} numbers jointly" if several > 1 else "a number"
        yield (
            f"ridge regression of {of} on Σ softmax(x · query) x over the tokens of the "
            "line, the query fitted jointly, starting from equal weights"
        )
        yield f"penalty {self._penalty:g} · (Σ weights² + Σ query²)"
        if probe.train is None:
            yield (
                "vectors and numbers standardised by the tokens and rows of each fit; "
                f"{probe.folds} folds of rows; equal rows are in the same fold"
            )
        else:
            yield (
                f"fitted on `{probe.trained_on}` ({len(probe.train):,} rows), which define the "
                "standardisation"
            )
        yield "values are the clean row's"


@observation("routed_probe", unit="R²")
class RoutedProbe(_RoutedObservation):
    """How well a linear probe tells numbers of what it takes from several tokens, in rows that it
    was not fitted to.

    Which tokens it takes depends on their vectors, by weights that are fitted with it.
    returns: a contribution to R², whose mean is R²
    source: Adeli, Sun and Kriegeskorte 2025, arXiv 2505.17329
    """

    controls: ClassVar[tuple[str, ...]] = ("shuffled",)
    swept = False
    as_written = "at image tokens"
    of_several: ClassVar[str] = "of all tokens of a row jointly"

    def per_token(self, seen: ObservedTokens, seed: int) -> Sequence[Floats]:
        import numpy as np

        from mechdsl.fits.regression import r_squared

        assert self.probe is not None
        y = select_targets(self.probe.targets, seen.own.prompts)

        def told(wanted: Floats, *, dealt: bool) -> Floats:
            predicted = np.empty_like(wanted)
            for held, fit in self.fitted(seen, seed, dealt=dealt):
                predicted[held] = fit(*seen.own.of_rows(held))
            return r_squared(wanted, predicted)[seen.own.row][None]

        return [told(y, dealt=False), told(self._dealt(seen, y, seed), dealt=True)]

    def _dealt(self, seen: ObservedTokens, y: Floats, seed: int) -> Floats:
        """Return the targets of the control.

        These are the shuffled targets, or the row's own targets if the fit is on other rows.
        """
        from mechdsl.fits.regression import shuffle_targets

        return y if seen.training is not None else shuffle_targets(seen.own.keys, y, seed)

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield from super().said(rule)
        yield "shuffled: the same with the values permuted between rows (Hewitt and Liang 2019)"


@observation("routing", unit="weight")
class RoutingMap(_RoutedObservation):
    """How much of a token `routed_probe` takes, by a fit to other rows.

    returns: 0 to 1; those of all tokens of the line add up to 1
    source: Adeli, Sun and Kriegeskorte 2025, arXiv 2505.17329
    """

    swept = True
    as_written = "at each token of image"

    def per_token(self, seen: ObservedTokens, seed: int) -> Sequence[Floats]:
        import numpy as np

        values = np.empty(len(seen.own.row))
        for held, fit in self.fitted(seen, seed):
            values[held[seen.own.row]] = fit.weights(*seen.own.of_rows(held))
        return [values[None]]
