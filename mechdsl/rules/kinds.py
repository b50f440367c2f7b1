"""Registry of rule kinds, the base class of site rules, and checks that several kinds share.

Outside the package, a module with one registered class adds a rule kind when it is imported before
a file is checked (`tests/rules/gizmo_rule.py` is an example). Its verb is a new word, parsed as
`WORD SITE at POSITIONS [to NUMBER | by NUMBER]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mechdsl.base.records import Registry
from mechdsl.diagnostics.experiments import BadPick
from mechdsl.diagnostics.rules import StacksDiffer, UnequalPrompts, UnevenPositions
from mechdsl.diagnostics.syntax import NotSupported
from mechdsl.program import spec
from mechdsl.prompts.positions.cells import is_after_prompts
from mechdsl.prompts.runs import PositionCell, RunRow
from mechdsl.resolve.runs import RuleKind
from mechdsl.resolve.sites import ExperimentContext, find_side, resolve_into_layer, resolve_site
from mechdsl.resolve.targets import (
    fill_empty_picks,
    list_rows,
    report_empty_selection,
    resolve_amounts,
    resolve_rule_positions,
)
from mechdsl.resolve.types import (
    ExternalRun,
    Intervention,
    PositionTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk
from mechdsl.syntax.tree_builder import RegisteredWords
from mechdsl.syntax.words import RESERVED, RULE_WORDS, SOFT_WORDS, ObservationWord
from mechdsl.vocab.corruptions import change_signatures
from mechdsl.vocab.sites import SITES


def check_equal_lengths(
    rule: spec.Rule,
    sites: SiteTargets,
    positions: PositionTargets,
    does: Intervention,
    read: ExternalRun,
    work: ExperimentContext,
) -> None:
    """Report E0333 for vectors over the keys of one prompt that would be written into a longer one,
    or E0108 for those of images with other patches.

    Args:
        read: The rows that vectors are read from.
    """
    named = {p.site for points in sites.points.values() for p in points}
    over_keys = sorted(site for site in named if SITES[site].width == "key")
    if not over_keys or does.reads is None:
        return
    if SITES[over_keys[0]].stack == "vision":
        _check_equal_patches(rule, over_keys[0], positions, does, read, work)
        return
    base = [len(row.ids) for row in work.table.runs[work.experiment.base].rows]
    other = [len(row.ids) for row in read.table.runs[read.run].rows]
    if does.over_rows:
        lengths = [*base, *other]
        row = next((n for n, length in enumerate(lengths) if length != other[0]), None)
        second = f"row 0 has {other[0]}"
        what, hint = "rows", "ablate `z`, or use prompts of equal length"
    else:
        row = next((n for n, (a, b) in enumerate(zip(base, other, strict=True)) if a != b), None)
        second = f"{other[row]} in `{read.run}`" if row is not None else ""
        what, hint = (
            "the two runs",
            ("patch `z`, or use a corruption that keeps the number of tokens"),
        )
    if row is not None:
        work.diagnostics.append(
            UnequalPrompts(
                span=rule.span,
                site=over_keys[0],
                what=what,
                row=row % len(base),
                first=[*base, *other][row],
                second=second,
                hint=hint,
            )
        )


def _check_equal_patches(
    rule: spec.Rule,
    site: str,
    positions: PositionTargets,
    does: Intervention,
    read: ExternalRun,
    work: ExperimentContext,
) -> None:
    """Report E0108 for vectors over the patches of an image that are combined with those of another
    layout, or averaged; the other arguments are those of `check_equal_lengths`."""
    if work.model.tokenizer.stands_in or work.table.stands_in:
        return
    rows = list_rows(work.table, work.experiment.base, work)
    other = list_rows(read.table, read.run, work)
    side = 1 if work.model.shape.resamples else work.model.shape.merged_side

    def find(row: RunRow, cell: PositionCell, number: int) -> set[bytes]:
        """Return the layouts of the images that a position has patches of."""
        tokens = {token for hit in cell.hits[number] for token in hit}
        images = {row.patch_tokens[token][0] for token in tokens}
        every = [row.whole_pictures[image].picture.expansion for image in images]
        return {expansion.list_patches(side)[1].tobytes() for expansion in every}

    layouts: list[set[bytes]] = []
    for key, cell in positions.read.items():
        written = [find(row, positions.written[key], n) for n, row in enumerate(rows)]
        source = [find(row, cell, n) for n, row in enumerate(other)]
        if does.over_rows:
            layouts.append(set[bytes]().union(*written, *source))
        else:
            layouts += [a | b for a, b in zip(written, source, strict=True)]
    what, later = "", "use images of one width and height, or write `z vision`"
    if any(len(each) > 1 for each in layouts):
        what = "between images with different rows and columns of patches"
    if does.reads in ("mean", "cell"):
        what, later = "with values of all rows", "write `z vision`"
    if what:
        what = f"a rule on `{site}` {what}"
        work.diagnostics.append(NotSupported(span=rule.span, what=what, later=later))


def check_even_positions(
    rule: spec.Rule, positions: PositionTargets, work: ExperimentContext
) -> None:
    """Report E0324 or E0612 for positions that differ in meaning between rows.

    Means and resampling combine rows, so a position must have the same meaning in every row.
    """
    ranked = next((n for n in walk(rule.at) if isinstance(n, ast.RankedTokens)), None)
    if ranked is not None:
        work.diagnostics.append(
            BadPick(
                span=ranked.span,
                text=ranked.span.written,
                reason="each row has different tokens here, so there is nothing to average or "
                "resample over rows",
                hint="write `with zero`, or name positions that are the same in every row",
            )
        )
        return
    for written, cell in zip(positions.written.values(), positions.read.values(), strict=True):
        sizes = {len(tokens) for row in (*cell.hits, *written.hits) for tokens in row}
        if len(sizes) > 1:
            work.diagnostics.append(
                UnevenPositions(
                    span=rule.at.span, position=cell.label, least=min(sizes), most=max(sizes)
                )
            )
            return
    rows = work.table.runs[work.experiment.base].rows
    joined = any(
        is_after_prompts(cell, rows) and any(len(tokens) > 1 for row in cell.hits for tokens in row)
        for cell in positions.written.values()
    )
    for text, lengths in work.answers.texts if joined else ():
        if len(set(lengths)) > 1:
            position = f"{rule.at.span.written}` of `{text}"
            least, most = min(lengths), max(lengths)
            work.diagnostics.append(
                UnevenPositions(span=rule.at.span, position=position, least=least, most=most)
            )
            return


CURRENT_STATE_NOTE = "acts on the values of the patched pass, after the rules on lower layers"
"""Note on rules that change the current activation."""

RULES: Registry[RuleKind] = Registry("rule")


def rule_kind(words: str) -> Callable[[type[RuleKind]], type[RuleKind]]:
    """Register a kind of rule under its first words.

    Raises:
        ValueError: If the first word has another use.
    """
    if words in RESERVED and words not in (*RULE_WORDS, "observe"):
        raise ValueError(f"`{words}` is a keyword")

    def register(entry: type[RuleKind]) -> type[RuleKind]:
        if issubclass(entry, Intervention) and not hasattr(entry, "name"):
            entry.name = words
        RULES.add(words, entry())
        return entry

    return register


def registered_words() -> RegisteredWords:
    """Return the words that registered rules, changes and observations add to the language."""
    observations: dict[str, ObservationWord] = {}
    for _, kind in RULES.items():
        observations |= kind.observation_words()
    return RegisteredWords(
        verbs={words: kind.takes for words, kind in RULES.items() if words not in SOFT_WORDS},
        changes=change_signatures(),
        observations=observations,
    )


def resolve_targets(
    rule: spec.Rule,
    run: str,
    work: ExperimentContext,
    external: ExternalRun | None = None,
    *,
    exchanged: bool = False,
) -> tuple[SiteTargets | None, PositionTargets | None]:
    """Resolve the sites and positions of a rule, which reads `run`; None for those with errors."""
    assert rule.site is not None
    sites, axes = resolve_site(rule.site, work.sites)
    if sites is not None and rule.into_layer is not None:
        sites, more = resolve_into_layer(sites, rule.into_layer, work.sites)
        axes = (*axes, *more)
    for axis in axes:
        work.add_axis(axis)
    if rule.observed is not None and sites is not None and sites.has_empty_picks:
        work.diagnostics.append(report_empty_selection(rule.span, "observe"))
        return None, None
    if sites is not None and not check_one_side(rule, sites, work):
        return None, None
    if sites is None and work.model.shape.resamples:
        return None, None  # whether images have rows and columns depends on the stack
    position_targets = resolve_rule_positions(
        rule, run, work.reading(sites), external, exchanged=exchanged
    )
    return fill_empty_picks(sites, position_targets)


def check_one_side(rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
    """Report E0317 for sites of an encoder-decoder at different tokens, and E0108 for those inside
    and outside of a vision encoder."""
    every = [p for here in sites.points.values() for p in here]
    every += [p for here in (sites.sources or {}).values() for p in here]
    return check_same_side(rule, every, work)


def check_same_side(rule: spec.Rule, every: Sequence[SitePoint], work: ExperimentContext) -> bool:
    """Report E0317 or E0108 for points at different tokens."""
    if len({find_side([point], work.model.shape) for point in every}) < 2:
        return True
    by_side = {SITES[point.site].side: point.site for point in every}
    if "image" in by_side:
        what = "a rule on sites in the vision encoder and in the language model"
        hint = "write a rule for each of them"
        if rule.observed is not None and rule.receiver is not None:
            hint = "`cka` compares them, with the site in the vision encoder first, except in "
            hint += "models that resample patches to tokens or attend to an image"
        work.diagnostics.append(NotSupported(span=rule.span, what=what, later=hint))
        return False
    work.diagnostics.append(
        StacksDiffer(span=rule.span, source=by_side["source"], target=by_side["target"])
    )
    return False


class SiteRule(RuleKind, Intervention):
    """A kind of rule that changes vectors at sites of the base run, with or without a number.

    A subclass defines `takes`, `reads = "run"` if its result depends on the current vectors,
    `values`, and `unchanged` for numbers that change nothing.
    """

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        base = work.experiment.base
        sites, positions = resolve_targets(rule, base, work)
        amounts = None if rule.fill is None else resolve_amounts(rule.fill, work)
        if sites is None or positions is None or (amounts is None and rule.fill is not None):
            return None
        if self.over_rows:
            check_even_positions(rule, positions, work)
        check_equal_lengths(rule, sites, positions, self, ExternalRun(work.table, base), work)
        return ResolvedRule(
            spec=rule, does=self, run=base, sites=sites, positions=positions, amounts=amounts
        )
