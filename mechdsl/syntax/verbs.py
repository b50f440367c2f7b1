"""First words of rules that a kind is registered for.

The grammar knows shapes only. Which words mean something is known here, where reading a file can
ask for it; what they mean is in `mechdsl.rules`.
"""

from __future__ import annotations

from mechdsl.base.registry import Registry

VERBS: Registry[str] = Registry("rule")
"""Words → the word before the rule's number, or nothing."""

LENSES: set[str] = set()
"""Words behind `observe` that give a distribution over tokens, which the measures of the experiment
read in place of the model's own."""

CONTROLS: dict[str, tuple[str, ...]] = {}
"""Word behind `observe` → the controls that come with it, each a measure of its own."""

WEIGHTS: set[str] = set()
"""Words behind `observe` that look at weights alone, for which no prompt matters."""

COUNTED: dict[str, str] = {}
"""Word behind `observe` whose values are several to a cell → the axis that they lie along."""
