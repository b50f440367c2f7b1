"""Runs of another model, and the table that has them beside its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_two_models import OtherShape, OtherTokens
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.prompts.other_blocks import Paired
from mechdsl.prompts.prompt_conventions import noise_conventions
from mechdsl.prompts.prompt_table import PromptTable, Run
from mechdsl.prompts.rows import CLEAN
from mechdsl.resolve.resolved import ModelContext

SIZES = {
    "n_layers": "layers",
    "n_heads": "heads",
    "n_kv_heads": "key-value heads",
    "d_model": "wide",
    "d_head": "wide per head",
    "d_value": "wide per value",
    "d_mlp": "neurons per layer",
    "n_experts": "experts",
}
"""What has to be equal for activations of one model to be put into another."""


def joined_table(table: PromptTable, found: Sequence[Paired | None]) -> PromptTable | None:
    """The table with these runs among its own; None where one is missing."""
    runs = [each for each in found if each is not None]
    if len(runs) < len(found):
        return None
    joined = replace(
        table,
        runs={**table.runs, **{each.run.name: each.run for each in runs}},
        other_data={each.run.prompts or "": each.data_hash for each in runs if each.data_hash},
        python=tuple(dict.fromkeys((*table.python, *(f for each in runs for f in each.python)))),
    )
    said = {
        f"rows of {each.run.name}": f"{each.how} of `{table.name}`" for each in runs if each.how
    }
    return replace(joined, conventions={**table.conventions, **said, **noise_conventions(joined)})


def refused_pair(
    run: spec.Elsewhere, source: ModelContext, base: ModelContext
) -> Diagnostic | None:
    """E0415 where activations of one model don't fit into the other."""
    differences = _differences(base.shape, source.shape)
    if not differences or source.shape.stands_in or base.shape.stands_in:
        return None
    return OtherShape(
        span=run.span, source=source.name, base=base.name, differences="; ".join(differences)
    )


def _differences(base: ModelShape, source: ModelShape) -> list[str]:
    found = [
        f"{getattr(source, name):,} and {getattr(base, name):,} {what}"
        for name, what in SIZES.items()
        if getattr(source, name) != getattr(base, name)
    ][:3]
    if (base.task, base.labels) != (source.task, source.labels):
        found.append("they have other outputs: labels of a classifier and tokens, or other labels")
    only = sorted(base.sites ^ source.sites)
    if not found and only:
        found.append(f"only one of them has `{only[0]}`")
    return found


def model_run(
    table: PromptTable,
    theirs: PromptTable,
    source: ModelContext,
    base: ModelContext,
    run: spec.Elsewhere,
) -> tuple[Paired | None, list[Diagnostic]]:
    """The clean run of the same prompts in another model. E0416 where it sees other tokens."""
    own = dict(zip(table.row_ids, table.runs[CLEAN].rows, strict=True))
    others = dict(zip(theirs.row_ids, theirs.runs[CLEAN].rows, strict=True))
    unlike = [n for n, row in own.items() if n not in others or others[n].ids != row.ids]
    if not unlike or source.tokenizer.stands_in or base.tokenizer.stands_in:
        return Paired(Run(run.name, table.runs[CLEAN].rows, model=run.model), ""), []
    tokens = [
        " ".join(context.tokenizer.token_text(i) for i in rows[unlike[0]].ids[:8])
        if unlike[0] in rows
        else "nothing"
        for context, rows in ((source, others), (base, own))
    ]
    return None, [
        OtherTokens(
            span=run.span,
            source=source.name,
            base=base.name,
            rows=len(unlike),
            total=len(own),
            example=f"row {unlike[0]} begins with `{tokens[0]}` and `{tokens[1]}`",
        )
    ]
