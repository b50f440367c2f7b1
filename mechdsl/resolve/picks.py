"""What one experiment found, used in another: `top 10 of cie`, `top 25% of caap tokens`.

Before an experiment has run, its cells stand in for its ranking, in the order of its grid, so that
everything that needs it can be checked and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from mechdsl.base.names import name_list
from mechdsl.base.percent import Percent
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.diagnostics.e06_numbers import PickedBySign
from mechdsl.diagnostics.e06_onward import BadPick
from mechdsl.program import spec
from mechdsl.prompts.prompt_table import Hits, PromptTable
from mechdsl.resolve.findings import Finding, RankedSite, Refused
from mechdsl.resolve.over_rows import of_weights
from mechdsl.resolve.pickable import check_sites, check_tokens
from mechdsl.resolve.resolved import PickedFrom
from mechdsl.resolve.some_cells import Coordinates, cells_at, coordinates, in_words
from mechdsl.syntax import ast
from mechdsl.syntax.format.constructs import ranked

if TYPE_CHECKING:
    from mechdsl.prompts.tokenizer import TextTokenizer

SHOWN = 10
"""Sites of a pick that the conventions list."""


@dataclass
class Onward:
    """Findings that an experiment may use, and what it picked of them."""

    found: Mapping[str, Finding] = field(default_factory=dict[str, Finding])
    called: Mapping[str, Mapping[str, ast.MapOf]] = field(
        default_factory=dict[str, Mapping[str, ast.MapOf]]
    )
    """`for` variable that runs over experiments → word → the experiment, or some cells of it."""
    groups: Mapping[str, spec.Group] = field(default_factory=dict[str, spec.Group])
    """Of the file."""
    picks: dict[str, str] = field(default_factory=dict[str, str])
    """As written → what was picked, in words."""
    sites_of: dict[str, PickedFrom] = field(default_factory=dict[str, PickedFrom])
    """By name, experiments whose sites are used, and those that these picked from."""
    _longest: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    _runs: dict[tuple[Span, str], tuple[str, Mapping[int, Sequence[int]]]] = field(
        default_factory=dict[tuple[Span, str], tuple[str, Mapping[int, Sequence[int]]]]
    )
    """Of tokens that are picked: the first run that they were found in, and all there are."""
    _some: dict[tuple[str, Coordinates], Finding] = field(
        default_factory=dict[tuple[str, Coordinates], Finding]
    )
    """Experiment and coordinates → what it found there."""
    _texts: dict[tuple[Span, str], str] = field(default_factory=dict[tuple[Span, str], str])
    """Of `top k of m`, `m` a `for` over experiments: what stands there for each of them."""
    _checked: set[str] = field(default_factory=set[str])
    """Experiments that rank single tokens."""
    _warned: set[tuple[Span, str]] = field(default_factory=set[tuple[Span, str]])
    """Places whose tokens were warned of, with what is picked there."""

    @property
    def stand_ins(self) -> tuple[str, ...]:
        return tuple(name for name, finding in self.found.items() if finding.stands_in)

    def finding(
        self, node: ast.Ranked | ast.MapOf, values: Mapping[str, Any]
    ) -> tuple[Finding | None, Coordinates]:
        """What was found in the cells that are meant, and where they are; None of an experiment
        that was refused. Raises Refused.

        values: of the `for` variables around it and of each `param`.
        """
        at, whole = coordinates(node, values), self.found.get(node.of)
        if whole is None or not at:
            return whole, at
        if (node.of, at) not in self._some:
            self._some[node.of, at] = cells_at(whole, at, self.groups)
        return self._some[node.of, at], at

    def _named(self, node: ast.Ranked, values: Mapping[str, Any]) -> ast.Ranked:
        """The same of the experiment that a `for` variable stands for. Refusals: Refused where that
        variable means nothing."""
        words = self.called.get(node.of)
        if words is None:
            return node
        if node.of not in values:
            reason = f"`{node.of}` runs over experiments, and which is meant isn't known here"
            raise Refused(reason, "name one experiment")
        word = str(values[node.of])
        if word not in words:
            raise Refused(f"`{word}` is no experiment", "let the `for` run over names alone")
        meant = words[word]
        names = (own.value.id for own in meant.cell if isinstance(own.value, ast.Name))
        unknown = next((name for name in names if name not in values), None)
        if unknown is not None:
            raise Refused(
                f"`{unknown}` in `{word}` is neither a number nor a `param`",
                f"a `for` variable stands where cells are picked, `top 2 of {word}`, and a word in "
                "quotes",
            )
        named = replace(node, of=meant.of, cell=(*meant.cell, *node.cell))
        shown = replace(named, of=word.partition("(")[0])
        self._texts[node.span, ranked(named)] = ranked(shown)
        return named

    def _written(self, node: ast.Ranked) -> str:
        """As it is written, with the word in place of a `for` variable over experiments."""
        return self._texts.get((node.span, ranked(node)), node.span.written)

    def said(self, node: ast.Ranked, values: Mapping[str, Any]) -> str:
        """As it is written, with what `for` variables stand for."""
        node = self._named(node, values)
        head, _, of = self._written(node).partition(" of ")
        if isinstance(node.amount, str):
            head = f"top {values.get(node.amount, node.amount)}"
        return f"{head} of {in_words(of.partition('(')[0].rstrip(), coordinates(node, values))}"

    def used_sites(self, node: ast.Ranked, finding: Finding) -> None:
        """Remember the rows and cells that sites were picked by: those of the experiment, and of
        others that it picked from in turn. A ranking by weights alone has no rows."""
        parts = [part.experiment for part in finding.parts]
        rows = (each.table.row_keys for each in parts if not of_weights(each))
        own = PickedFrom(node.span, finding.cells, frozenset(chain.from_iterable(rows)))
        self.sites_of.setdefault(node.of, own)
        for name, earlier in chain.from_iterable(each.sites_of.items() for each in parts):
            self.sites_of.setdefault(name, replace(earlier, span=node.span))

    # --- sites ------------------------------------------------------------------------------------

    def pick_sites(
        self, node: ast.Ranked, values: Mapping[str, Any], diagnostics: list[Diagnostic]
    ) -> list[RankedSite] | None:
        """The best sites of an experiment; None after E0620, and where that one was refused."""
        try:
            node = self._named(node, values)
            finding, _ = self.finding(node, values)
            if finding is None:
                return None
            there = None if finding.shape_stands_in else f"`{node.of}` has {{}} sites"
            for part in finding.parts:
                check_sites(part.experiment, node)
            count = _count(node, values, len(finding.sites), there)
        except Refused as refusal:
            diagnostics.append(_bad(node, refusal))
            return None
        self.used_sites(node, finding)
        chosen = finding.sites[:count]
        self._say_sites(node, finding, chosen)
        if not finding.stands_in:
            by_size = finding.by_size.sites[:count]
            if {site.points for site in by_size} != {site.points for site in chosen}:
                listed = [_listed([site.label for site in each]) for each in (chosen, by_size)]
                _warn(node, listed[0], listed[1], diagnostics)
        return chosen

    def _say_sites(self, node: ast.Ranked, finding: Finding, chosen: Sequence[RankedSite]) -> None:
        key = self._written(node)
        if finding.stands_in:
            self.picks[key] = f"known when `{finding.name}` has run; its first cells stand in"
            return
        least, most = self._longest.get(key, (len(chosen), -1))
        self._longest[key] = (min(least, len(chosen)), max(most, len(chosen)))
        if len(chosen) <= most:  # of several values of a loop, the most is listed
            return
        listed = ", ".join(f"{site.label} ({site.value:.3g})" for site in chosen[:SHOWN])
        more = f" … and {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
        said = f"{listed or 'nothing'}{more}; by mean {finding.measure}"
        said += ", signed"
        lowest = finding.sites[-1]
        if chosen and lowest not in chosen and -lowest.value > abs(chosen[0].value):
            said += f": {lowest.label} ({lowest.value:.3g}) is larger, but below 0"
        if finding.cells > len(finding.sites):
            said += f", each of the {len(finding.sites)} sites by the best of its cells"
        self.picks[key] = said

    # --- tokens -----------------------------------------------------------------------------------

    def pick_tokens(
        self,
        base: ast.RankedTokens,
        run: str,
        values: Mapping[str, Any],
        table: PromptTable,
        tokenizer: TextTokenizer,
        diagnostics: list[Diagnostic],
    ) -> list[tuple[str, list[Hits]]]:
        """(label, hits per row) of every cell; none after E0620, and where that experiment was
        refused."""
        node = base.ranked
        try:
            node = self._named(node, values)
            finding, at = self.finding(node, values)
            if finding is None:
                return []
            if "position" in dict(at):
                raise Refused("each position is ranked", "leave `position` out")
            label = f"{self.said(node, values)} {'tokens' if base.plural else 'token'}"
            named = replace(base, ranked=node)
            found = self._hits(named, label, finding, run, values, table, tokenizer)
        except Refused as refusal:
            diagnostics.append(_bad(node, refusal, base.span))
            return []
        if not finding.stands_in:
            other = finding.by_size.tokens(table, run, tokenizer)
            orders = finding.tokens(table, run, tokenizer)
            counts = _counts(node, values, orders, finding.name)
            rows = [
                row
                for row, order in orders.items()
                if set(order[: counts[row]]) != set(other[row][: counts[row]])
            ]
            place = (base.span, ranked(node))
            if rows and place not in self._warned:  # once for all numbers of a `for`
                self._warned.add(place)
                many = f"others in {len(rows)} of {len(orders)} rows"
                _warn(node, "the highest tokens of each row", many, diagnostics, base.span)
        return found

    def _hits(
        self,
        base: ast.RankedTokens,
        label: str,
        finding: Finding,
        run: str,
        values: Mapping[str, Any],
        table: PromptTable,
        tokenizer: TextTokenizer,
    ) -> list[tuple[str, list[Hits]]]:
        node, name = base.ranked, finding.name
        if name not in self._checked:
            hint = f"pick its sites: `{node.span.written}`"
            hint = f"let it sweep single tokens, for example `at each token of …`, or {hint}"
            for part in finding.parts:
                check_tokens(part.experiment, table, tokenizer, hint)
            self._checked.add(name)
        if finding.tokens_stand_in:
            _ = _amount(node, values)
            ends = [((len(row.ids) - 1,),) for row in table.runs[run].rows]
            return [(label, ends)]
        orders = finding.tokens(table, run, tokenizer)
        if not orders:
            raise Refused(
                f"`{name}` has none of the {len(table)} rows that this experiment runs on",
                "let both run on the same part and limit of their prompts",
            )
        self._same_tokens(base, finding, run, orders)
        counts = _counts(node, values, orders, name)
        self._say_tokens(node, finding, orders, counts, len(table) - len(orders))
        amount = _amount(node, values)
        single = not isinstance(amount, Percent) and amount == 1
        if base.plural or single or not any(counts.values()):
            hits: list[Hits] = [
                (tuple(sorted(orders[row][: counts[row]])),) if row in orders else ()
                for row in table.row_ids
            ]
            return [(label, hits)]
        return [
            (
                f"{rank + 1} of {name}",
                [
                    ((orders[row][rank],),) if row in orders and rank < counts[row] else ()
                    for row in table.row_ids
                ],
            )
            for rank in range(max(counts.values()))
        ]

    def _same_tokens(
        self,
        base: ast.RankedTokens,
        finding: Finding,
        run: str,
        orders: Mapping[int, Sequence[int]],
    ) -> None:
        """What is read in one run and written in another must be there in both, whichever tokens
        turn out to be picked."""
        place = (base.span, ranked(base.ranked))
        first, before = self._runs.setdefault(place, (run, orders))
        for row, order in orders.items():
            other = len(before.get(row, ()))
            if other != len(order):
                raise Refused(
                    f"row {row} has {other} tokens of `{finding.name}` in `{first}` and "
                    f"{len(order)} in `{run}`",
                    f"let `{finding.name}` sweep positions that a row has in both runs",
                )

    def _say_tokens(
        self,
        node: ast.Ranked,
        finding: Finding,
        orders: Mapping[int, Sequence[int]],
        counts: Mapping[int, int],
        lacking: int,
    ) -> None:
        key = f"{self._written(node)} tokens"
        least, most = self._longest.get(key, (min(counts.values()), max(counts.values())))
        least, most = min(least, *counts.values()), max(most, *counts.values())
        self._longest[key] = (least, most)
        sizes = [len(order) for order in orders.values()]
        if finding.stands_in:
            said = f"known when `{finding.name}` has run; its first tokens stand in"
        else:
            said = (
                f"{_ends(least, most)} of {_ends(min(sizes), max(sizes))} tokens in each row, by "
                f"the row's own {finding.measure}, signed"
            )
            axes = finding.parts[0].experiment.axes
            if finding.cells > next(len(a.labels) for a in axes if a.name == "position"):
                said += ", each token by the best of its cells"
        if lacking:
            said += (
                f"; {lacking} of {lacking + len(orders)} rows dropped, `{finding.name}` lacks them"
            )
        self.picks[key] = said


# --- amounts --------------------------------------------------------------------------------------


def _amount(node: ast.Ranked, values: Mapping[str, Any]) -> int | Percent:
    """How many, or what share."""
    amount: Any = 1 if node.which == "best" else node.amount
    if isinstance(amount, ast.Percent):
        amount = Percent(amount.value)
    name = f"{amount}"
    if isinstance(amount, str):
        if amount not in values:
            known = name_list(values)
            raise Refused(
                f"`{amount}` is neither a `for` variable around it nor a `param`",
                did_you_mean(
                    amount,
                    values,
                    f"known here: {known}" if known else "write a number or a percentage",
                ),
            )
        amount = values[amount]
        name = f"`{name}` = {amount}"
    if isinstance(amount, Percent):
        if not 0 <= amount <= 100:
            raise Refused(f"{name} is not between 0% and 100%", "write a share such as `25%`")
        return amount
    if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
        raise Refused(
            f"{name} is neither a whole number nor a percentage",
            "count them (`top 10 of …`) or name a share (`top 25% of …`)",
        )
    return amount


def _count(node: ast.Ranked, values: Mapping[str, Any], total: int, there: str | None) -> int:
    """How many of `total` are meant. `there` says how many there are; None where that isn't known,
    so that there may be as many."""
    amount = _amount(node, values)
    if isinstance(amount, Percent):
        # Half up; a share is never rounded down to nothing.
        return max(1, int(amount * total / 100 + 0.5)) if amount else 0
    if amount > total and there is not None:
        raise Refused(
            f"{there.format(total)}, fewer than {amount}",
            f"write a smaller number, or a share such as `top 25% of {node.of}`",
        )
    return min(amount, total)


def _counts(
    node: ast.Ranked, values: Mapping[str, Any], orders: Mapping[int, Sequence[int]], name: str
) -> dict[int, int]:
    """Row id → how many of its ranked tokens are meant. Rows of equal length share one count."""
    of_size: dict[int, int] = {}
    for row, order in orders.items():
        size = len(order)
        if size not in of_size:
            there = f"row {row} has {{}} tokens of `{name}`"
            of_size[size] = _count(node, values, size, there)
    return {row: of_size[len(order)] for row, order in orders.items()}


def _ends(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _listed(labels: Sequence[str]) -> str:
    more = f" … and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return ", ".join(labels[:SHOWN]) + more


def _warn(
    node: ast.Ranked,
    picked: str,
    by_size: str,
    diagnostics: list[Diagnostic],
    span: Span | None = None,
) -> None:
    """W0751, once for a place."""
    where = span or node.span
    warning = PickedBySign(
        span=where, text=where.written, picked=picked, by_size=by_size, of=node.of
    )
    if warning not in diagnostics:
        diagnostics.append(warning)


def _bad(node: ast.Ranked, refusal: Refused, span: Span | None = None) -> BadPick:
    where = span or node.span
    return BadPick(span=where, text=where.written, reason=refusal.reason, hint=refusal.hint)
