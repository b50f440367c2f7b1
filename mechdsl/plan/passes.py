"""The planner passes, in the order in which they are applied: the only list of them.

Those on the graph come first. Each of the others switches on, in the plan, what the run then leaves
out. Whatever is switched off, results are those of the plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine, did_you_mean
from mechdsl.graph.nodes import Graph
from mechdsl.graph.passes import stop_early
from mechdsl.plan.cost import PanelWork
from mechdsl.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class PlannerPass:
    """One way of leaving work out."""

    name: str
    """As `--no-pass` names it."""
    leaves_out: str
    """Which work, as the table of docs/planner.md says it."""
    why: str
    """Why results stay what they are."""
    does: str
    """In one line, below the table of `mechdsl plan`."""
    shown: Callable[[PanelWork], None] | None
    """Takes what it leaves out off the work that `mechdsl plan` counts; None where none of the
    figures there knows of it."""
    of_replies: bool = False
    """Whether it is about `generate` alone."""
    restarts: bool = False
    """Whether rows take something over from the unpatched run, which not every model can."""


@dataclass(frozen=True, kw_only=True)
class GraphPass(PlannerPass):
    apply: Callable[[Graph], Graph]
    """Gives an equal graph with less work, or the same one."""


@dataclass(frozen=True, kw_only=True)
class PlanPass(PlannerPass):
    apply: Callable[[Plan], Plan]
    """Switches on what the run then leaves out."""


GRAPH_PASSES: tuple[GraphPass, ...] = (
    GraphPass(
        name="stop_early",
        leaves_out="blocks of a source run above the highest site that is read",
        why="a block computes from those below it alone",
        does="an unpatched run that is only read stops above the highest read",
        shown=PanelWork.stop_early,
        apply=stop_early,
    ),
)

PLAN_PASSES: tuple[PlanPass, ...] = (
    PlanPass(
        name="inert",
        leaves_out="rows that can't differ from the base run, by structure",
        why="all that they write is equal to what stands there, or out of sight of all that is "
        "measured; tokens and positions say so, never floats",
        does="rows that can't differ from the base run are not run",
        shown=PanelWork.leave_inert_out,
        apply=lambda plan: replace(plan, skips_inert=True),
    ),
    PlanPass(
        name="share",
        leaves_out="rows that are equal, in one experiment or in several",
        why="they start from the same run of the same prompt and write the same to the same places",
        does="rows that several cells or experiments have in common are run once",
        shown=PanelWork.share,
        apply=lambda plan: replace(plan, shares_rows=True),
    ),
    PlanPass(
        name="resume",
        leaves_out="blocks below a row's lowest write",
        why="what enters them is what enters them on the unpatched run, so what leaves them is too",
        does="a row starts at its lowest write, with what the unpatched run had there",
        shown=lambda tally: tally.restart(resume=True),
        apply=lambda plan: replace(plan, shortcuts=replace(plan.shortcuts, resume=True)),
        restarts=True,
    ),
    PlanPass(
        name="prefix",
        leaves_out="tokens before its leftmost write",
        why="in a causal model no token sees a later one; in others nothing is left out",
        does="it computes its leftmost write and what follows, on keys and values that are kept",
        shown=lambda tally: tally.restart(prefix=True),
        apply=lambda plan: replace(plan, shortcuts=replace(plan.shortcuts, prefix=True)),
        restarts=True,
    ),
    PlanPass(
        name="inside",
        leaves_out="of the block where it joins: queries, keys and values of tokens that still "
        "enter unchanged; attention before a write of `z`, attention and MLP before a write of "
        "`mlp_out`, and so on",
        why="only attention mixes tokens, so the rest of a block changes at changed tokens alone, "
        "and what a write replaces is not needed",
        does="it starts inside that block, and projects queries, keys, values only of changes",
        shown=lambda tally: tally.restart(inside=True),
        apply=lambda plan: replace(plan, shortcuts=replace(plan.shortcuts, inside=True)),
        restarts=True,
    ),
    PlanPass(
        name="last",
        leaves_out="tokens behind the last one that a measure reads, and in the last block all "
        "that none reads",
        why="in a causal model no token that is read sees them, nor, behind the last attention, in "
        "any model",
        does="nothing is computed that no measure reads: in the last block few tokens, behind the "
        "last one read none",
        shown=lambda tally: tally.restart(last=True),
        apply=lambda plan: replace(plan, shortcuts=replace(plan.shortcuts, last=True)),
        restarts=True,
    ),
    PlanPass(
        name="unembed",
        leaves_out="logits of tokens that no metric names; `prob`, `kl`, `entropy` and other "
        "metrics with a softmax get all",
        why="a logit is a product with its own row of the unembedding",
        does="only the logits that metrics read are computed, where they need no softmax",
        shown=PanelWork.narrow,
        apply=lambda plan: replace(plan, narrows_logits=True),
    ),
    PlanPass(
        name="join",
        leaves_out="passes: rows of all layers, sites, rules and experiments ride in one",
        why="only attention mixes tokens, and its masks keep rows apart",
        does="rows of all layers, sites, rules and experiments ride in one pass, and join it where "
        "they start",
        shown=PanelWork.join,
        apply=lambda plan: replace(plan, joins_rows=True),
    ),
    PlanPass(
        name="cache",
        leaves_out="all tokens but the newest, in each step of `generate`; what cells have in "
        "common of a prompt; rows that are equal so far; of rows that wrote the same, the blocks "
        "below what acts on them",
        why="keys and values of earlier tokens don't change while later ones are written, and what "
        "enters a block hangs on the blocks below it alone",
        does="while a model writes, keys and values are kept, and only newest tokens are computed",
        shown=PanelWork.keep_tokens,
        of_replies=True,
        apply=lambda plan: replace(plan, keeps_tokens=True),
    ),
    PlanPass(
        name="fuse",
        leaves_out="memory traffic of activation functions that are written out step by step",
        why="the kernel computes the same formula",
        does="activation functions written out step by step run in one kernel",
        shown=None,
        apply=lambda plan: replace(plan, fuses_kernels=True),
    ),
)

PASSES: tuple[PlannerPass, ...] = (*GRAPH_PASSES, *PLAN_PASSES)
NAMES = tuple(one.name for one in PASSES)
RESTARTS = tuple(one.name for one in PASSES if one.restarts)
"""Without any of these, rows are whole passes."""


def unknown_passes(names: Iterable[str]) -> list[Diagnostic]:
    """E0208 for every `--no-pass` that names none."""
    return [
        BadCommandLine(
            reason=f"there is no pass called `{name}`",
            hint=did_you_mean(name, NAMES, f"passes are {', '.join(NAMES)}"),
        )
        for name in names
        if name not in NAMES
    ]
