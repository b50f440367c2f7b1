"""Convert experiments to a plan: the planner passes in order, and the savings of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.models.shape import ModelShape
from mechdsl.planner.cost import (
    Cost,
    PanelCount,
    PanelWork,
    ReplyPasses,
    decoder_reply_cost,
    list_fitted_runs,
    read_pass_cost,
    read_pass_work,
    reply_cost,
    reply_work,
    run_cost,
)
from mechdsl.planner.graph import (
    Graph,
    MeasureNode,
    build_graph,
    check_graph,
    graph_from_leaves,
    graph_leaves,
    highest_read,
    stop_early,
)
from mechdsl.planner.pass_cost import context_adds
from mechdsl.planner.plan import (
    DTYPE_BYTES,
    PASS_TOKENS,
    PROMPT_TOKENS,
    GraphRewrite,
    Panel,
    Plan,
    build_plain_plan,
    build_save_nodes,
    build_save_panel,
    build_save_reads,
    count_save_sweeps,
    plan_save_layout,
    read_batches,
    split_gradient_batches,
)
from mechdsl.program.spec import Generation
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun
from mechdsl.resolve.expansion import expand_controls
from mechdsl.resolve.observations import join_positions
from mechdsl.resolve.types import ResolvedExperiment, ResolvedSave, iter_fitted_vectors


@dataclass(frozen=True, kw_only=True)
class PlannerPass:
    """One optimisation of the planner."""

    name: str
    """Name for `--no-pass`."""
    leaves_out: str
    """The skipped work, for the table in docs/planner.md."""
    why: str
    """Why results don't change."""
    does: str
    """One line for the text below the table of `mechdsl plan`."""
    shown: Callable[[PanelWork], None] | None
    """Subtracts its savings from the work that `mechdsl plan` counts; None if the counts don't
    include that work."""
    of_replies: bool = False
    """Whether it applies only to `generate`."""
    restarts: bool = False
    """Whether rows reuse activations of the unpatched run, which not every model supports."""


@dataclass(frozen=True, kw_only=True)
class GraphPass(PlannerPass):
    apply: Callable[[Graph], Graph]
    """Returns an equivalent graph with less work, or the same graph."""


@dataclass(frozen=True, kw_only=True)
class PlanPass(PlannerPass):
    apply: Callable[[Plan], Plan]
    """Enables the optimisation in the plan."""


GRAPH_PASSES: tuple[GraphPass, ...] = (
    GraphPass(
        name="stop_early",
        leaves_out="blocks of a source run above the highest site that is read",
        why="a block depends only on the blocks below it",
        does="an unpatched run that is only read stops above the highest read",
        shown=PanelWork.stop_early,
        apply=stop_early,
    ),
)

PLAN_PASSES: tuple[PlanPass, ...] = (
    PlanPass(
        name="inert",
        leaves_out="rows that can't differ from the base run; when a circuit is ablated, the "
        "edges, heads and MLPs that are on no path of kept edges from the embedding to the logits",
        why="every vector that a row writes equals the base run's, or no measure can depend on it; "
        "the test uses tokens and positions, never floats. The exception is features of a "
        "dictionary: during the run, mechdsl skips rows whose changed features are 0 before and"
        " after. In a circuit, a node without a kept path from the embedding has the values of "
        "the run that fills the edges; no measure can depend on a node without a kept path to "
        "the logits",
        does="rows that can't differ from the base run are not run",
        shown=PanelWork.leave_inert_out,
        apply=lambda plan: replace(plan, skips_inert=True),
    ),
    PlanPass(
        name="share",
        leaves_out="duplicate rows, within and across experiments; in unpatched runs and before "
        "generated text, the linear maps of equal beginnings of prompts, such as an image before "
        "several questions; if blocks attend to an image, those of tokens that rows of a prompt "
        "haven't changed",
        why="duplicate rows start from the same run of the same prompt and write the same vectors "
        "to the same positions; in a causal model, equal beginnings have equal activations",
        does="rows shared by several cells or experiments are run once, and so are equal "
        "beginnings of unpatched prompts",
        shown=PanelWork.share,
        apply=lambda plan: replace(plan, shares_rows=True),
    ),
    PlanPass(
        name="resume",
        leaves_out="blocks below a row's lowest write",
        why="their inputs equal those of the unpatched run, so their outputs do too",
        does="a row starts at its lowest write, from the values of the unpatched run",
        shown=lambda tally: tally.restart(resume=True),
        apply=lambda plan: replace(plan, shortcuts=replace(plan.shortcuts, resume=True)),
        restarts=True,
    ),
    PlanPass(
        name="prefix",
        leaves_out="tokens before a row's leftmost write",
        why="in a causal model no token sees a later one; in other models no token is skipped",
        does="a row computes its leftmost write and later tokens, using cached keys and values",
        shown=lambda tally: tally.restart(prefix=True),
        apply=lambda plan: replace(plan, shortcuts=replace(plan.shortcuts, prefix=True)),
        restarts=True,
    ),
    PlanPass(
        name="inside",
        leaves_out="in a row's first block: queries, keys and values of unchanged tokens, and "
        "components before the write, such as attention before `z`, or attention and MLP before "
        "`mlp_out`",
        why="only attention mixes tokens, so the rest of a block changes only at changed tokens; "
        "values that a write replaces aren't needed",
        does="a row starts inside that block and projects queries, keys and values only for "
        "changed tokens",
        shown=lambda tally: tally.restart(inside=True),
        apply=lambda plan: replace(plan, shortcuts=replace(plan.shortcuts, inside=True)),
        restarts=True,
    ),
    PlanPass(
        name="last",
        leaves_out="tokens after the last token that a measure reads, and unread tokens in the "
        "last block",
        why="in a causal model no token that is read sees later tokens; after the last "
        "attention layer, no token sees another token in any model",
        does="only values that a measure reads are computed: few tokens in the last block, none "
        "after the last token that is read",
        shown=lambda tally: tally.restart(last=True),
        apply=lambda plan: replace(plan, shortcuts=replace(plan.shortcuts, last=True)),
        restarts=True,
    ),
    PlanPass(
        name="unembed",
        leaves_out="logits of tokens that no metric names; metrics with a softmax, such as `prob`, "
        "`kl` and `entropy`, need all logits",
        why="each logit depends only on one row of the unembedding",
        does="only the logits that metrics read are computed, unless they need a softmax",
        shown=PanelWork.narrow,
        apply=lambda plan: replace(plan, narrows_logits=True),
    ),
    PlanPass(
        name="join",
        leaves_out="separate passes: rows of all layers, sites, rules and experiments share a pass",
        why="only attention mixes tokens, and its masks separate rows",
        does="rows of all layers, sites, rules and experiments share one pass and join it at "
        "their first block",
        shown=PanelWork.join,
        apply=lambda plan: replace(plan, joins_rows=True),
    ),
    PlanPass(
        name="cache",
        leaves_out="in each step of `generate`: all tokens except the newest, work on a prompt "
        "that cells share, and duplicate rows; for rows with equal completions so far, the blocks "
        "below the rules",
        why="keys and values of earlier tokens don't change during generation, and a block depends "
        "only on the blocks below it",
        does="during generation, keys and values are cached, and only newest tokens are computed",
        shown=PanelWork.keep_tokens,
        of_replies=True,
        apply=lambda plan: replace(plan, keeps_tokens=True),
    ),
    PlanPass(
        name="fuse",
        leaves_out="memory traffic of activation functions that are written step by step",
        why="the kernel computes the same formula",
        does="activation functions written step by step run in one kernel",
        shown=None,
        apply=lambda plan: replace(plan, fuses_kernels=True),
    ),
)

PASSES: tuple[PlannerPass, ...] = (*GRAPH_PASSES, *PLAN_PASSES)

PASS_NAMES = tuple(one.name for one in PASSES)

RESTART_PASSES = tuple(one.name for one in PASSES if one.restarts)
"""Without these passes, rows are full forward passes."""


def check_pass_names(names: Iterable[str]) -> list[Diagnostic]:
    """Report E0208 for every unknown name of `--no-pass`."""
    return [
        BadCommandLine(
            reason=f"there is no pass called `{name}`",
            hint=did_you_mean(name, PASS_NAMES, f"passes are {', '.join(PASS_NAMES)}"),
        )
        for name in names
        if name not in PASS_NAMES
    ]


@dataclass(frozen=True)
class Saving:
    """Cost after one pass."""

    name: str
    after: Cost
    on: bool = True


@dataclass(frozen=True)
class PlanCost:
    """Cost of a plain loop over a file, and the remaining cost after each pass."""

    plain: Cost
    savings: tuple[Saving, ...]
    blocks: int = 0
    """Number of blocks of the deepest model."""

    @property
    def planned(self) -> Cost:
        """Cost with all enabled passes."""
        return self.savings[-1].after if self.savings else self.plain


def plan_cost(
    plan: Plan, pass_tokens: int = PASS_TOKENS, prompt_tokens: int = PROMPT_TOKENS
) -> PlanCost:
    """Count the cost of a plan; rows are laid out per chunk of prompts and then discarded.

    Args:
        pass_tokens: Maximum number of tokens of a pass over rows.
        prompt_tokens: Maximum number of tokens of a batch of prompts.
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


def build_file_graph(experiments: Sequence[ResolvedExperiment]) -> Graph:
    """Build the graph of experiments and their comparisons, before any pass."""
    return build_graph(expand_controls(experiments))


def add_save_nodes(graph: Graph, saving: Sequence[ResolvedExperiment]) -> Graph:
    """Add the nodes of files to a graph.

    Args:
        saving: Experiments with `save` lines. They run separately after all others, because a plan
            has
            no saves.
    """
    nodes = [node for experiment in saving for node in build_save_nodes(experiment)]
    return graph_from_leaves([*graph_leaves(graph), *nodes]) if nodes else graph


def make_plan(
    experiments: Sequence[ResolvedExperiment], *, without: frozenset[str] = frozenset()
) -> Plan:
    """Make the plan of a file; `without` names disabled passes."""
    return plan_graph(build_file_graph(experiments), without=without)


def plan_graph(graph: Graph, *, without: frozenset[str] = frozenset()) -> Plan:
    """Make the plan of a graph."""
    graph, rewrites = rewrite_graph(graph, without=without)
    plan = build_plain_plan(graph)
    for one in PLAN_PASSES:
        if one.name not in without:
            plan = one.apply(plan)
    passes = tuple(name for name in PASS_NAMES if name not in without)
    return replace(plan, passes=passes, rewrites=rewrites)


def rewrite_graph(
    graph: Graph, *, without: frozenset[str] = frozenset()
) -> tuple[Graph, tuple[GraphRewrite, ...]]:
    """Apply all enabled graph passes; return the graph and the changes of each pass."""
    rewrites: list[GraphRewrite] = []
    for one in GRAPH_PASSES:
        if one.name in without:
            continue
        before, graph = graph, one.apply(graph)
        check_graph(graph)
        counts = before.number_of_nodes(), graph.number_of_nodes()
        rewrites.append(GraphRewrite(one.name, graph is not before, *counts))
    return graph, tuple(rewrites)


@dataclass(frozen=True, eq=False)
class SaveCost:
    """Size and cost of one `save` line."""

    file: str
    """As in the line."""
    sites: int
    """Number of sites, of vectors of a direction, or of features."""
    vectors: int
    """Number of vectors of each site, or of tokens at which features are read."""
    at_most: bool
    """Whether the number of vectors is a maximum, because replies may be shorter."""
    bytes: int | None
    """Size of the file's tensors; None for rows of features, whose texts aren't known."""
    cost: Cost
    """Cost without cells or rows: a run only applies its own rules."""
    streamed: int = 0
    """Number of streamed rows, whose prompts are built during the run."""


def save_costs(
    saving: Sequence[ResolvedExperiment], prompt_tokens: int = PROMPT_TOKENS
) -> list[SaveCost]:
    """Return the size and cost of each line of the experiments with `save` lines."""
    return [save_cost for experiment in saving for save_cost in _of(experiment, prompt_tokens)]


def _of_replies(
    said: Generation, run: PromptRun, shape: ModelShape, stop: int | None, batches: int
) -> Cost:
    """Return the cost of a run's generation and of a pass over prompts and replies that stops after
    the last read block."""
    lengths, sources = (np.repeat(numbers, run.draws) for numbers in (run.lengths, run.sources))
    first = replace(run_cost(shape, run, None), forwards=batches)
    given = (said.tokens, said.samples)
    if shape.encodes_apart:
        passes = ReplyPasses(lengths + said.tokens, sources, 0)
        read = read_pass_cost(shape, passes, said.samples, PROMPT_TOKENS, stop)
        return first + decoder_reply_cost(shape, lengths, sources, *given) + read
    writing = reply_work(lengths, *given, kept=True, pass_tokens=PASS_TOKENS)
    reading = read_pass_work(lengths + said.tokens, 0, said.samples, PROMPT_TOKENS)
    blocks = shape.n_layers if stop is None else min(stop, shape.n_layers)
    return first + reply_cost(shape, writing) + reply_cost(shape, reading, blocks)


def _of(experiment: ResolvedExperiment, prompt_tokens: int) -> Iterator[SaveCost]:
    panel, shape = build_save_panel(experiment), experiment.model.shape
    dtype = experiment.model.spec.dtype
    for save, read in zip(experiment.saves, build_save_reads(experiment), strict=True):
        run = panel.table.runs[save.run]
        if isinstance(read, MeasureNode):
            yield _of_gradients(experiment, save, panel, prompt_tokens)
            continue
        batches = len(
            read_batches(shape, DTYPE_BYTES[dtype], run, save.points, tokens=prompt_tokens)
        )
        times = count_save_sweeps(panel, save.run, several=batches > 1)
        cost = run_cost(shape, run, highest_read(read))
        for name, count in (times - Counter([save.run])).items():
            cost += count * run_cost(shape, panel.table.runs[name], None)
        joined = Cost(0, 0, times.total() * batches, cost.tokens, cost.multiply_adds)
        if experiment.generation is not None and save.in_reply:
            joined = _of_replies(experiment.generation, run, shape, highest_read(read), batches)
        if save.basis is not None:
            yield _of_features(experiment, save, joined)
            continue
        yield _of_vectors(experiment, save, joined)
    yield from _of_direction_files(experiment, prompt_tokens)


def _of_vectors(experiment: ResolvedExperiment, save: ResolvedSave, cost: Cost) -> SaveCost:
    """Return the size of a file of vectors, with the cost of its passes."""
    layout = plan_save_layout(experiment, save)
    size = layout.bytes(save.spec.stored_dtype(experiment.model.spec.dtype))
    return SaveCost(save.spec.file, len(layout.widths), layout.vectors, layout.at_most, size, cost)


def _of_gradients(
    experiment: ResolvedExperiment, save: ResolvedSave, panel: Panel, prompt_tokens: int
) -> SaveCost:
    """Return the size of a file of gradients, and the cost of their passes.

    A backward pass costs as much as a forward pass: activations have gradients, weights have none.
    Each text of several tokens needs a separate pass, whose tokens after the prompt aren't counted.
    """
    assert save.gradient is not None
    shape, run = experiment.model.shape, panel.table.runs[save.run]
    batches = len(split_gradient_batches(shape, save, run, prompt_tokens))
    texts = sum(any(atom.appended) for atom in save.gradient.atoms)
    passes = texts + (texts < len(save.gradient.atoms))
    cost = replace(2 * passes * run_cost(shape, run, None), forwards=passes * batches)
    for name in save.gradient.compared_runs:
        cost += replace(run_cost(shape, panel.table.runs[name], None), forwards=batches)
    return _of_vectors(experiment, save, replace(cost, backwards=batches))


def _of_features(experiment: ResolvedExperiment, save: ResolvedSave, passes: Cost) -> SaveCost:
    """Return the cost of rows of features: passes, encoded vectors and their reconstructions.

    Args:
        passes: Cost of the passes over the table, which has the first rows of streamed ones.
    """
    assert save.basis is not None
    (member,) = save.basis.members
    spot = join_positions(save.cells)
    tokens = sum(len(numbers) for hits in spot.hits for numbers in hits)
    features = len(save.basis.coordinates[()].which) or member.size
    streamed = _count_streamed(experiment.table)
    parts = max(1, round(streamed / (1 + max(experiment.table.row_ids))))
    tokens, passes = tokens * parts, parts * passes
    products = features + (0 if member.reads else 2 * member.size)
    adds = tokens * member.width * products + parts * context_adds(member, spot.hits)
    cost = passes + Cost(0, 0, 0, 0, adds)
    file = save.spec.file
    return SaveCost(file, features, tokens, at_most=False, bytes=None, cost=cost, streamed=streamed)


def _count_streamed(table: PromptTable) -> int:
    """Return the number of streamed rows of a block, of which the table has the first ones."""
    rows = table.block_rows
    return 0 if rows is None or not rows.block.spec.streamed else rows.block.data_size


def _of_direction_files(experiment: ResolvedExperiment, prompt_tokens: int) -> Iterator[SaveCost]:
    shape, read = experiment.model.shape, set[int]()
    for file in experiment.direction_files:
        vectors = [member.vector for member in file.members.values()]
        fits = {id(fit): fit for vector in vectors for fit in iter_fitted_vectors(vector)}
        new = [(fit.points, fit.samples) for key, fit in fits.items() if key not in read]
        read |= fits.keys()
        cost = Cost()
        for run, blocks in list_fitted_runs(new, shape):
            batches = -(-int(run.lengths.sum()) // prompt_tokens)
            cost += replace(run_cost(shape, run, blocks), forwards=batches)
        size = len(vectors) * file.width * DTYPE_BYTES[file.spec.stored_dtype]
        yield SaveCost(file.spec.file, len(vectors), 1, at_most=False, bytes=size, cost=cost)
