"""Effects: how the metric of a patched run is set against the base and the source run.

Every effect is a mean over prompts, or a ratio of two such means. The parts are linear in the
runs, so the same functions serve prompts and means, and the bootstrap recomputes the ratio
instead of averaging ratios.
"""

from __future__ import annotations

from mechdsl.base.registry import Registry
from mechdsl.vocab.effect_kind import EffectKind

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
        meaning="what separates the two runs, without any intervention",
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
        meaning="what the intervention changes",
        formula="m(patched) − m(base)",
        numerator=lambda patched, base, source: patched - base,
        zero="base run",
    )
)

RECOVERY = _effect(
    EffectKind(
        name="recovery",
        meaning="what part of the way from the base to the source run the intervention goes",
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

RELATIVE = _effect(
    EffectKind(
        name="relative",
        meaning="what the intervention changes, as a part of the base run's value",
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
