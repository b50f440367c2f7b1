"""`observe routed_probe(rgb) SITE at POSITIONS`: a probe that takes what it tells from some tokens
more than from others, and `observe routing(rgb) …`: how much from which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import SeenTokens, TokenVectors, TrainedOn
from mechdsl.resolve.probe_targets import Probe, resolve_probe
from mechdsl.resolve.resolved_rule import ResolvedRule
from mechdsl.rules.observations.over_rows import OverTokensKind, refuse
from mechdsl.rules.observations.probes import PENALTY, targets_of, trained_on
from mechdsl.rules.observations.registry import observation

if TYPE_CHECKING:
    from mechdsl.base.arrays import Bools, Floats
    from mechdsl.fits.routing import Routing


class _Routed(OverTokensKind):
    """What both words share: the fit."""

    takes: ClassVar = ("arguments",)
    swept: ClassVar[bool]
    """Whether it is a number of each token, so that one of several together means nothing; else the
    other way round."""
    as_written: ClassVar[str]
    """A position that it takes."""

    def __init__(self, probe: Probe | None = None, trained_on: TrainedOn | None = None) -> None:
        """probe: None only of the entry."""
        self.probe, self.trained_on = probe, trained_on

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        said = rule.observed
        assert said is not None
        if said.call is None:
            example = f"name a value: `{self.word}(count)`"
            refuse(rule, work, "doesn't say what is to be told", example)
            return None
        before = len(work.diagnostics)
        train = None if found is None else trained_on(rule, found, work)
        if len(work.diagnostics) > before:
            return None
        other = None if train is None else train.table
        parameters, diagnostics = work.program.parameters, work.diagnostics
        probe = resolve_probe(said.call, work.table, parameters, diagnostics, other, ("ridge",))
        if found is None or probe is None:
            return None
        return replace(found, does=type(self)(probe, train))

    def positions_fit(self, rule: spec.Rule, found: ResolvedRule, work: Work) -> bool:
        if ("position" in found.positions.axes) != self.swept:
            of = "a number of each token" if self.swept else "made of several tokens together"
            refuse(rule, work, f"is {of}", f"write where: `{self.as_written}`")
            return False
        return super().positions_fit(rule, found, work)

    def fitted(
        self, seen: SeenTokens, seed: int, *, dealt: bool = False
    ) -> Iterator[tuple[Bools, Routing]]:
        """([row], the fit to others that these are told by). dealt: with the values of others."""
        import numpy as np

        from mechdsl.fits.held_out import folds, shuffled

        probe = self.probe
        assert probe is not None

        def wanted(tokens: TokenVectors, targets: Sequence[tuple[float, ...]]) -> Floats:
            y = targets_of(targets, tokens.prompts)
            return shuffled(tokens.keys, y, seed) if dealt else y

        every = np.ones(len(seen.own.prompts), dtype=np.bool_)
        if seen.training is not None and probe.train is not None:
            there = np.ones(len(seen.training.prompts), dtype=np.bool_)
            yield every, self._fit(seen.training, there, wanted(seen.training, probe.train))
            return
        y, fold = wanted(seen.own, probe.targets), folds(seen.own.keys, probe.folds, seed)
        for each in np.unique(fold):
            held = fold == each
            yield held, self._fit(seen.own, ~held, y)

    def _fit(self, tokens: TokenVectors, there: Bools, y: Floats) -> Routing:
        """there, y: [row]"""
        from mechdsl.fits.routing import routing

        return routing(*tokens.of_rows(there), y[there], self._penalty)

    @property
    def _penalty(self) -> float:
        assert self.probe is not None
        return PENALTY if self.probe.penalty is None else self.probe.penalty

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        probe = self.probe
        assert probe is not None
        several = len(probe.targets[0])
        of = f"{several} numbers together" if several > 1 else "a number"
        yield (
            f"ridge regression of {of} on Σ softmax(x · query) x over the tokens of the line, the "
            "query fitted with it, from equal weights on"
        )
        yield f"penalty {self._penalty:g} · (Σ weights² + Σ query²)"
        if probe.train is None:
            yield (
                "vectors and numbers standardised by the tokens and rows of each fit; "
                f"{probe.folds} folds of rows, in which those that look alike are together"
            )
        else:
            yield f"fitted on `{probe.trained_on}` ({len(probe.train):,} rows), which standardise"
        yield "values are the clean row's"


@observation("routed_probe", unit="R²")
class RoutedProbe(_Routed):
    """How well a linear probe tells numbers of what it takes from several tokens, in rows that it
    was not fitted to.

    Which tokens it takes hangs on their vectors, by weights that are fitted with it.
    returns: 1 − (y − ŷ)² / mean((y − ȳ)²), whose mean is R²
    source: Adeli, Sun and Kriegeskorte 2025, arXiv 2505.17329
    """

    controls: ClassVar[tuple[str, ...]] = ("shuffled",)
    swept = False
    as_written = "at image tokens"
    of_several: ClassVar[str] = "of all tokens of a row together"

    def per_token(self, seen: SeenTokens, seed: int) -> Sequence[Floats]:
        import numpy as np

        from mechdsl.fits.held_out import r_squared

        assert self.probe is not None
        y = targets_of(self.probe.targets, seen.own.prompts)

        def told(wanted: Floats, *, dealt: bool) -> Floats:
            predicted = np.empty_like(wanted)
            for held, fit in self.fitted(seen, seed, dealt=dealt):
                predicted[held] = fit(*seen.own.of_rows(held))
            return r_squared(wanted, predicted)[seen.own.row][None]

        return [told(y, dealt=False), told(self._dealt(seen, y, seed), dealt=True)]

    def _dealt(self, seen: SeenTokens, y: Floats, seed: int) -> Floats:
        """What the control is to tell: the values of other rows, but where it is fitted on rows
        that aren't these."""
        from mechdsl.fits.held_out import shuffled

        return y if seen.training is not None else shuffled(seen.own.keys, y, seed)

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield from super().said(rule)
        yield "shuffled: the same with the values dealt to other rows (Hewitt and Liang 2019)"


@observation("routing", unit="weight")
class RoutingMap(_Routed):
    """How much of a token `routed_probe` takes, by a fit to other rows.

    returns: 0 to 1; those of all tokens of the line add up to 1
    source: Adeli, Sun and Kriegeskorte 2025, arXiv 2505.17329
    """

    swept = True
    as_written = "at each token of image"

    def per_token(self, seen: SeenTokens, seed: int) -> Sequence[Floats]:
        import numpy as np

        found = np.empty(len(seen.own.row))
        for held, fit in self.fitted(seen, seed):
            found[held[seen.own.row]] = fit.weights(*seen.own.of_rows(held))
        return [found[None]]
