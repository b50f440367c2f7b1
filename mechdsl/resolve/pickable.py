"""Which experiments rank what another one picks: their sites, or their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechdsl.program.possible_axes import may_sweep
from mechdsl.prompts.position_hits import lies_behind
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.resolve.findings import Refused, of_windows, ranked_rules, ranked_tokens, site_targets
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from mechdsl.prompts.tokenizer import TextTokenizer


def _check_first_measure(experiment: ResolvedExperiment) -> None:
    name = experiment.name
    if not experiment.rules:
        raise Refused(
            f"`{name}` intervenes nowhere, so it has nothing to rank",
            "name an experiment with a rule that sweeps",
        )
    first = experiment.measures[0]
    if experiment.spec.over is not None:
        raise Refused(
            f"`{name}` averages over `{experiment.spec.over}`, and ranks no single cells",
            f"rank an experiment without `mean over {experiment.spec.over}`",
        )
    if first.kind == "category":
        raise Refused(
            f"the first measure of `{name}`, `{first.text}`, is a category, which has no order",
            f"let `{name}` measure a number first, such as `logit(answer)`",
        )


def check_sites(experiment: ResolvedExperiment, node: ast.Ranked) -> None:
    _check_first_measure(experiment)
    name = experiment.name
    rules = ranked_rules(experiment)
    without = [rule for rule in rules if rule.sites is None]
    tokens = f"{node.span.written} tokens"
    if without:
        some = "" if len(without) == len(rules) else "some rules of "
        raise Refused(
            f"{some}`{name}` change{'' if some else 's'} the input, which is no site",
            f"name its tokens, `{tokens}`, or an experiment that sweeps sites",
        )
    words = {"positions": "position ids", "blocks": "blocks"}
    other = next((words[r.does.changes] for r in rules if r.does.changes in words), None)
    if other is not None:
        raise Refused(
            f"`{name}` changes {other}, which are no sites",
            "name an experiment that writes at sites",
        )
    swept = {axis for rule in rules for axis in site_targets(rule).axes}
    if not swept and experiment.n_cells > 1:
        site = next(iter(site_targets(rules[0]).labels.values()))
        raise Refused(
            f"`{name}` sweeps positions only, all at {site}",
            f"name its tokens, `{tokens}`, or an experiment that sweeps sites",
        )


def check_tokens(
    experiment: ResolvedExperiment,
    table: PromptTable,
    tokenizer: TextTokenizer,
    otherwise: str,
    *,
    windows: bool = False,
) -> None:
    """Whether it has a number for each of some single tokens of these prompts, by its first
    measure, or for each of some rectangles of patches (windows). Raises Refused. otherwise: what
    to write where it sweeps no positions."""
    _check_first_measure(experiment)
    name = experiment.name
    if experiment.table.name != table.name:
        raise Refused(
            f"`{name}` ranks tokens of `{experiment.table.name}`, this experiment runs on "
            f"`{table.name}`",
            "let both name one block of prompts: tokens are ranked row by row",
        )
    theirs = experiment.model.tokenizer
    known = not theirs.stands_in and not tokenizer.stands_in
    if known and theirs.hash != tokenizer.hash:
        raise Refused(
            f"`{name}` ranks tokens of `{experiment.model.name}`, which has another tokenizer",
            "let both run on one model",
        )
    rules = ranked_rules(experiment)
    sweeping = [rule for rule in rules if "position" in ranked_tokens(rule)[0].axes]
    moving = windows and next((rule for rule in rules if of_windows(rule)), None)
    if moving:
        sweeping = [moving]
    elif experiment.model.tokenizer.stands_in:
        sweeping = [rule for rule in rules if may_sweep(ranked_tokens(rule)[1])]
    if not sweeping:
        raise Refused(
            f"`{name}` doesn't sweep positions",
            otherwise,
        )
    rule = sweeping[0]
    if rule.spec.onto is not None and rule.edge is None:
        raise Refused(
            f"a cell of `{name}` has tokens in two places",
            "let it sweep single tokens, for example `at each token of …`",
        )
    if experiment.model.tokenizer.stands_in or moving:
        return
    rows = experiment.table.runs[experiment.spec.base].rows
    for cell in ranked_tokens(rule)[0].written.values():
        if lies_behind(cell, rows):
            raise Refused(
                f"the cell `{cell.label}` of `{name}` is of the answer, behind the prompt",
                "let it sweep tokens of the prompt alone: `token *`",
            )
        if any(row and (len(row) != 1 or len(row[0]) != 1) for row in cell.hits):
            raise Refused(
                f"the cell `{cell.label}` of `{name}` covers several tokens",
                "let it sweep single tokens: `each token …` or `token *`, on spans that are "
                "equally long",
            )
