"""`observe attention … from Q to K`: how much of a query's attention keys get."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mechdsl.diagnostics.e03_rules import BadEdit
from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.observation import Seen
from mechdsl.resolve.resolved_rule import Convention, ResolvedRule
from mechdsl.rules.attention import EdgeIntervention, resolve_edge
from mechdsl.rules.observations.registry import Kind, observation
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from torch import Tensor


@observation("attention", unit="share of attention")
class AttentionWeight(Kind, EdgeIntervention):
    """The weight that the keys of an `observe attention` line get together.

    returns: 0..1, averaged over the queries, heads and layers that are joined
    source: Vaswani et al. 2017, arXiv 1706.03762
    """

    changes = "nothing"
    change = None
    leads = True
    by_unit = True

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = resolve_edge(rule, self, None, work)
        if found is None or found.sites is None or "nothing" not in found.sites.labels.values():
            return found
        work.diagnostics.append(
            BadEdit(
                span=rule.span,
                reason="there would be nothing to look at",
                what="no head is picked in one of its cells",
                hint="pick at least one: `top 1 of …`",
            )
        )
        return None

    def each(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        return weight_of_keys(seen)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.spec.edge is not None
        axes = {axis.word: axis for axis in rule.spec.edge.axes}
        over = [f"these {word}s" for word, axis in axes.items() if _joins(axis)]
        if rule.spec.edge.heads is not None:
            assert rule.sites is not None
            over += ["these heads"] if any(len(p) > 1 for p in rule.sites.points.values()) else []
        else:
            over += [] if "head" in axes else ["all heads"]
        cells = rule.positions.written.values()
        if any(len(tokens) > 1 for cell in cells for row in cell.hits for tokens in row):
            over.append("the queries")
        averaged = f", averaged over {' and '.join(over)}" if over else ""
        yield Convention("observed", f"the weight that the keys get together{averaged}")


def weight_of_keys(seen: Seen) -> Tensor:
    """[K] what each query gives its keys together."""
    assert seen.keys is not None
    index, key = seen.keys
    weights = seen.vectors[index, key]
    return weights.new_zeros(len(seen.vectors)).index_add_(0, index, weights)


def _joins(axis: ast.Axis) -> bool:
    return axis.plural or axis.window is not None
