"""Effects: how the metric of a patched run is compared with the base and source runs."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan
from typing import Any, Literal, TypeAlias

from mechdsl.base.records import Record, Registry

CircuitForm: TypeAlias = Literal[
    "ablate all but CIRCUIT", "ablate CIRCUIT", "ablate all but CIRCUIT without each edge"
]
"""A rule on a circuit, by the edges that it ablates."""

CircuitBaseline: TypeAlias = Literal["everything", "circuit"]
"""A run that effects of a circuit are compared with: every edge or every candidate is ablated, or
all edges but the circuit's."""

CIRCUIT_BASELINES: tuple[CircuitBaseline, ...] = ("everything", "circuit")

EffectTerm = Callable[[Any, Any, Any], Any]
"""Function of (patched, base, source) values, linear in all three and shape-preserving."""


class EffectKind(Record, kw_only=True):
    """An effect: a mean over prompts (`numerator`), or a ratio of two means (`denominator`)."""

    name: str
    meaning: str
    formula: str
    numerator: EffectTerm
    """Also the quantity that the sign-flip test is applied to."""
    denominator: EffectTerm | None = None
    divisor: str = ""
    """Text of the denominator in the formula."""
    absolute: bool = False
    """Whether to divide by the denominator's absolute value."""
    tested: bool = True
    """Whether zero means "no effect", so that a p-value is defined."""
    of_intervention: bool = True
    """Whether it depends on the patched run, so that it is undefined for an inert cell."""
    needs_source: bool = False
    circuit: CircuitForm | None = None
    """The rule on a circuit that it needs. Its `source` is then the run with every edge ablated."""
    node_form: str | None = None
    """The rule that it needs of a circuit of nodes, if it is defined for one."""
    from_circuit: bool = False
    """Whether its `base` is the run with the whole circuit, and its `source` the difference
    between the base run and that with every edge ablated."""
    is_shown_by_zero: bool = False
    """Whether values near 0 show what it measures, so that random targets are compared with these.
    """
    per_prompt_formula: str | None = None
    """Formula of `per prompt` (the mean of the ratios), if that is permitted."""
    zero: str | None = None
    one: str | None = None
    """Runs at 0 and 1 of the scale."""
    scale_free: bool = False
    """Whether the effect has no unit."""

    @property
    def is_tested_intervention(self) -> bool:
        """Whether it is an effect of the rules that is 0 if they change nothing."""
        is_relative = self.circuit is None or self.from_circuit
        return self.of_intervention and self.tested and is_relative

    def name_inert_runs(self, base: str) -> str:
        """Name the runs of which an inert cell equals one.

        Args:
            base: Name of the base run.
        """
        if self.from_circuit:
            return "the circuit"
        return base if self.circuit is None else f"{base} or ∅"

    @property
    def circuit_baselines(self) -> tuple[CircuitBaseline, ...]:
        """The further runs that it depends on."""
        if self.circuit is None:
            return ()
        return CIRCUIT_BASELINES if self.from_circuit else CIRCUIT_BASELINES[:1]

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the runs that it depends on, among `patched`, `base` and `source`."""
        given = {"patched": 2.0, "base": 3.0, "source": 5.0}
        return tuple(
            name for name in given if isnan(self.of_means(*{**given, name: float("nan")}.values()))
        )

    def of_means(self, patched: Any, base: Any, source: Any) -> Any:
        """Compute the effect from mean metrics or from single prompts: arrays of one shape."""
        return self.divide(
            self.numerator(patched, base, source),
            None if self.denominator is None else self.denominator(patched, base, source),
        )

    def divide(self, numerator: Any, denominator: Any) -> Any:
        """Compute the ratio; NaN (never infinite) where the denominator is 0."""
        if denominator is None:
            return numerator
        import numpy as np  # imported here: `validate` only reads the registry of effects

        divisor = np.abs(denominator) if self.absolute else denominator
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(divisor == 0, np.nan, numerator / divisor)


ControlTitle: TypeAlias = Literal["null", "random", "untrained"]
"""Heading of the effects of a control: "null" for one that the file asks for with `against`;
"random" or "untrained" for those that every experiment with something trained has otherwise."""

EFFECTS: Registry[EffectKind] = Registry("effect")


def _effect(entry: EffectKind) -> EffectKind:
    return EFFECTS.add(entry.name, entry)


RAW = _effect(
    EffectKind(
        name="raw",
        meaning="the metric of the patched run",
        formula="m(patched)",
        numerator=lambda patched, base, source: patched,
        tested=False,
    )
)

TOTAL = _effect(
    EffectKind(
        name="total",
        meaning="the difference between the two runs, without an intervention",
        formula="m(source) − m(base)",
        numerator=lambda patched, base, source: source - base,
        of_intervention=False,
        needs_source=True,
        zero="base run",
    )
)

DELTA = _effect(
    EffectKind(
        name="delta",
        meaning="the change caused by the intervention",
        formula="m(patched) − m(base)",
        numerator=lambda patched, base, source: patched - base,
        zero="base run",
    )
)

RECOVERY = _effect(
    EffectKind(
        name="recovery",
        meaning="the share of the difference between base and source run that the rules restore",
        formula="(m(patched) − m(base)) / (m(source) − m(base)), of the means",
        numerator=lambda patched, base, source: patched - base,
        denominator=lambda patched, base, source: source - base,
        divisor="m(source) − m(base)",
        needs_source=True,
        zero="base run",
        one="source run",
        scale_free=True,
    )
)


def _circuit_effect(
    name: str, meaning: str, form: CircuitForm, node_form: str, *, is_shown_by_zero: bool = False
) -> EffectKind:
    """Register a share of the measure between the run with every edge ablated and the base run; for
    a circuit of nodes, between the run with all its candidates ablated and the base run.

    References: Marks et al. 2024 (arXiv 2403.19647), section 4; Mueller et al. 2025 (arXiv
    2504.13151), section 3.2.
    """
    return _effect(
        EffectKind(
            name=name,
            meaning=meaning,
            formula="(m(patched) − m(∅)) / (m(base) − m(∅)), of the means; ∅: every edge ablated",
            numerator=lambda patched, base, source: patched - source,
            denominator=lambda patched, base, source: base - source,
            divisor="m(base) − m(∅)",
            circuit=form,
            node_form=node_form,
            is_shown_by_zero=is_shown_by_zero,
            zero="every edge ablated",
            one="base run",
            scale_free=True,
        )
    )


FAITHFULNESS = _circuit_effect(
    "faithfulness",
    "the share of the full model's metric that a circuit keeps",
    "ablate all but CIRCUIT",
    "ablate SITES except GROUP",
)

COMPLETENESS = _circuit_effect(
    "completeness",
    "the share of the metric that is left without a circuit: 0 if the circuit is complete",
    "ablate CIRCUIT",
    "ablate GROUP",
    is_shown_by_zero=True,
)

MINIMALITY = _effect(
    EffectKind(
        name="minimality",
        meaning="the faithfulness that a circuit loses without one of its edges",
        formula="(m(circuit) − m(patched)) / (m(base) − m(∅)), of the means; ∅: every edge ablated",
        numerator=lambda patched, base, source: base - patched,
        denominator=lambda patched, base, source: source,
        divisor="m(base) − m(∅)",
        circuit="ablate all but CIRCUIT without each edge",
        from_circuit=True,
        zero="circuit",
        scale_free=True,
    )
)

RELATIVE = _effect(
    EffectKind(
        name="relative",
        meaning="the change caused by the intervention, relative to the base run's value",
        formula="(m(patched) − m(base)) / |m(base)|, of the means",
        numerator=lambda patched, base, source: patched - base,
        denominator=lambda patched, base, source: base,
        divisor="m(base)",
        absolute=True,
        per_prompt_formula="mean of (m(patched) − m(base)) / |m(base)| over prompts",
        zero="base run",
        scale_free=True,
    )
)
