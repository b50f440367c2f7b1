"""Kinds of rules, one registered class each: what a statement means and what it does to a run.

In: a rule of the typed program, with what is known of its experiment. Out: the rule resolved, and
the intervention that all later stages ask. Imports resolve and below; no torch.
"""

# In the order in which what they don't go together with is reported.
from mechdsl.rules import copies, ablate, assign, steer, replace, path  # noqa: I001
from mechdsl.rules import attention, renumber, blocks, observations
from mechdsl.rules.kind import RULES, SiteRule, rule_kind

__all__ = [
    "RULES",
    "SiteRule",
    "ablate",
    "assign",
    "attention",
    "blocks",
    "copies",
    "observations",
    "path",
    "renumber",
    "replace",
    "rule_kind",
    "steer",
]
