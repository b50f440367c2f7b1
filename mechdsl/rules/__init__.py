"""Rule kinds, one registered class each: the meaning of a statement and its effect on a run.

In: a rule of the typed program and the context of its experiment. Out: the resolved rule, and the
intervention that later stages query. Imports resolve and below; no torch.
"""

# The order decides which of two conflicting rules is reported first.
from mechdsl.rules import patching, steering, weights, replacement, path, attention, observations  # noqa: I001
from mechdsl.rules.kinds import RULES, SiteRule, rule_kind

__all__ = [
    "RULES",
    "SiteRule",
    "attention",
    "observations",
    "patching",
    "path",
    "replacement",
    "rule_kind",
    "steering",
    "weights",
]
