"""Observation of attribution graphs by linear probes: `observe graph_probe`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, cast

from mechdsl.program import spec
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.types import Convention, ResolvedMeasure, ResolvedRule
from mechdsl.rules.observations.graphs import AttributionGraphs, resolve_next_token_measure
from mechdsl.rules.observations.probes import (
    PROBE_OPTIONS,
    PROBE_UNITS,
    Probe,
    describe_probe,
    resolve_measure_probe,
    resolve_probe,
    score_held_out,
    select_targets,
)
from mechdsl.rules.observations.registry import observation, report_bad_observation
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk
from mechdsl.vocab.metrics import METRICS, MetricForm

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats, Ints


@observation("graph_probe", unit="share")
class GraphProbe(AttributionGraphs):
    """How well a linear probe tells a value from the attribution graph, in rows that it was not
    fitted to.

    The columns of a row are, for each feature, the sum over tokens of its edges to the target of
    the row's graph: activation times weight. Next to it: `baseline`, the probe whose only column is
    the entropy of the next token, and `shuffled`, the probe of values permuted between rows.
    returns: whether the class is right, or a contribution to R², whose mean is R²
    source: Ameisen et al. 2025, Circuit Tracing; its use: CodeCircuit, arXiv 2602.07080
    """

    group_options: ClassVar[tuple[str, ...]] = ("features",)
    other_options: ClassVar[tuple[str, ...]] = ("target", *PROBE_OPTIONS)
    controls: ClassVar[tuple[str, ...]] = ("baseline", "shuffled")
    selects: ClassVar[bool] = False
    probe: Probe | None = None
    """Settings, and the targets of rows; without them, of a measure."""
    outcome: ResolvedMeasure | None = None
    """The measure of a row's next token that is predicted; None: a value of the row."""

    @property
    def dependencies(self) -> object:
        probe = self.probe
        assert probe is not None
        settings = probe.kind, probe.targets, probe.folds, probe.penalty
        return [super().dependencies, *settings]

    def form_of(self, name: str) -> MetricForm:
        meanings = {
            "baseline": "The same from the entropy of the next token",
            "shuffled": "The same with the values permuted between rows",
        }
        return replace(self.form, meaning=meanings[name]) if name in meanings else self.form

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule, work)
        assert rule.observed is not None
        call = rule.observed.call
        every = () if call is None else call.arguments
        targets = [argument.value for argument in every if argument.name == "target"]
        if len(targets) != 1:
            hint = f"write `{self.word}(t, target: correct(answer))`"
            report_bad_observation(rule, work, "needs one value to predict", hint)
            return None
        assert call is not None
        target, outcome = cast("ast.Expr", targets[0]), None
        arguments = [argument for argument in every if argument.name in PROBE_OPTIONS]
        if _names_metric(target, work):
            outcome = resolve_next_token_measure(target, "target", rule, work)
            if outcome is None:
                return None
            if outcome.unit != "share" or outcome.kind != "number":
                reason = f"needs a measure that is 0 or 1, and `{outcome.text}` isn't"
                report_bad_observation(rule, work, reason, "write `target: correct(answer)`")
                return None
            if any(argument.name == "kind" for argument in arguments):
                reason = f"predicts two classes of `{outcome.text}`, which needs no `kind`"
                report_bad_observation(rule, work, reason, "remove `kind`")
                return None
        arguments += [] if outcome else [ast.Argument(None, target, span=target.span)]
        settings = replace(call, arguments=tuple(arguments))
        resolve = resolve_probe if outcome is None else resolve_measure_probe
        probe = resolve(settings, work.table, work.program.parameters, work.diagnostics)
        if resolved is None or probe is None:
            return None
        assert isinstance(resolved.does, GraphProbe)
        resolved.does.probe, resolved.does.outcome = probe, outcome
        resolved.does.form = replace(type(self).form, unit=PROBE_UNITS[probe.kind])
        return resolved

    def tell(
        self,
        columns: Floats,
        entropies: Floats,
        outcomes: Floats | None,
        rows: tuple[Ints, Sequence[bytes]],
        seed: int,
    ) -> list[Floats]:
        """Return how well held-out rows are told, and the same of each control, [row].

        Args:
            columns: [row, column]
            entropies: [row]
            outcomes: [row] values of the measure that is predicted; None without one.
            rows: [row] number in the table, and the key of the row's input.

        Raises:
            ValueError: The rows permit no fit; the message states the reason.
        """
        import numpy as np

        from mechdsl.fits.regression import assign_folds, shuffle_targets

        probe, (prompts, keys) = self.probe, rows
        assert probe is not None
        y = select_targets(probe.targets, prompts) if outcomes is None else outcomes[:, None]
        if outcomes is not None:
            assert self.outcome is not None
            if not np.isin(outcomes, (0, 1)).all():
                raise ValueError(f"`{self.outcome.text}` isn't 0 or 1 in each row")
            if len(np.unique(outcomes)) < 2:
                raise ValueError(f"`{self.outcome.text}` is the same in all rows")
        strata = y[:, 0].tolist() if probe.kind == "logistic" else None
        fold, shuffled = (
            assign_folds(keys, probe.folds, seed, strata),
            shuffle_targets(keys, y, seed),
        )
        single = replace(probe, penalty=None)
        every = (probe, columns, y), (single, entropies[:, None], y), (probe, columns, shuffled)
        return [score_held_out(own, given, targets, fold) for own, given, targets in every]

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        probe = self.probe
        assert probe is not None
        which = (
            f"each feature of {self.describe_group('features')}" if self.groups else "each feature"
        )
        predicted = "" if self.outcome is None else f" of `{self.outcome.text}`"
        yield Convention(
            "observed",
            f"{self.word}: a linear probe{predicted}; its columns are, for {which}, the sum over "
            "tokens of its edges to the target of the row's graph; baseline: the only column is "
            "the entropy of the next token, with the default penalty; "
            + "; ".join(describe_probe(probe)),
        )
        yield from self.graph_conventions(n_layers)


def _names_metric(expression: ast.Expr, work: ExperimentContext) -> bool:
    """Return whether an expression has a metric, which values of rows don't have."""
    names = (each.name for each in walk(expression) if isinstance(each, ast.Call))
    words = (name.id for name in walk(expression) if isinstance(name, ast.Name))
    rows = work.table.runs[work.experiment.base].rows
    known = {*METRICS, *work.program.metrics} - {*(rows[0].values if rows else ())}
    return any(name in known for name in (*names, *words))
