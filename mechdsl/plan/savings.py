"""What each pass of a plan saves."""

from __future__ import annotations

from dataclasses import dataclass

from mechdsl.plan.cost import Cost, PanelCount, PanelWork
from mechdsl.plan.passes import PASSES
from mechdsl.plan.plan import PASS_TOKENS, PROMPT_TOKENS, Plan


@dataclass(frozen=True)
class Saving:
    """What stands after one pass."""

    name: str
    after: Cost
    on: bool = True


@dataclass(frozen=True)
class PlanCost:
    """A plain loop over a file, and what is left of it pass by pass."""

    plain: Cost
    savings: tuple[Saving, ...]
    blocks: int = 0
    """Of the deepest model."""

    @property
    def planned(self) -> Cost:
        """With all passes that are on."""
        return self.savings[-1].after if self.savings else self.plain


def plan_cost(
    plan: Plan, pass_tokens: int = PASS_TOKENS, prompt_tokens: int = PROMPT_TOKENS
) -> PlanCost:
    """Count a plan; rows are laid out in chunks of prompts and forgotten.

    pass_tokens, prompt_tokens: most tokens of a pass over rows, and of a batch of prompts.
    """
    plain = Cost()
    writes = any(panel.experiments[0].experiment.generation for panel in plan.panels)
    passes = [one for one in PASSES if writes or not one.of_replies]
    after = {one.name: Cost() for one in passes if one.shown is not None}
    for panel in plan.panels:
        count = PanelCount(panel, pass_tokens, prompt_tokens)
        for prompts in count.chunks():
            tally = PanelWork(count, prompts)
            plain += tally.cost
            for one in passes:
                if one.shown is None:
                    continue
                if plan.does(one.name):
                    one.shown(tally)
                after[one.name] += tally.cost
    return PlanCost(
        plain,
        tuple(Saving(name, cost, plan.does(name)) for name, cost in after.items()),
        max((p.experiments[0].experiment.model.shape.n_layers for p in plan.panels), default=0),
    )
