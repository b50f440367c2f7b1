"""Runs of another model, and the table that has them beside its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_two_models import OtherShape, OtherTokens
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.program.python_files import is_python
from mechdsl.prompts.other_blocks import Paired
from mechdsl.prompts.prompt_conventions import image_conventions, noise_conventions
from mechdsl.prompts.prompt_table import PromptTable, Run
from mechdsl.prompts.rows import CLEAN
from mechdsl.resolve.resolved import ModelContext
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk
from mechdsl.vocab.metrics import METRICS

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
    said |= noise_conventions(joined) | image_conventions(joined)
    return replace(joined, conventions={**table.conventions, **said})


def outputs_read(experiment: spec.Experiment, run: str) -> bool:
    """Whether a run's outputs are read or written: it is the source of what is measured, a metric
    or an expectation names it, or a rule is about `logits`."""
    asked = [measure.metric for measure in experiment.measures]
    if run == experiment.source and any(_of_outputs(n) for metric in asked for n in walk(metric)):
        return True
    asked += [each.condition for each in experiment.expects if each.condition is not None]
    calls = [n for each in asked for n in walk(each) if isinstance(n, ast.Call)]
    if any(_of_outputs(n) or n.name == "accuracy" for n in calls if run in _named(n)):
        return True
    sites = [site for rule in experiment.every_rule for site in (rule.site, rule.receiver) if site]
    return any(name.id == "logits" for site in sites for name in site.names)


def _of_outputs(node: ast.Node) -> bool:
    """Whether it is a metric, or a function of a Python file, that reads outputs."""
    if isinstance(node, ast.Call) and is_python(node):
        return True
    name = (
        node.id if isinstance(node, ast.Name) else node.name if isinstance(node, ast.Call) else ""
    )
    metric = METRICS.get(name)
    return metric is not None and any(form.of_outputs for form in metric.forms.values())


def _named(call: ast.Call) -> list[str]:
    values = [argument.value for argument in call.arguments]
    return [value.id for value in values if isinstance(value, ast.Name)]


def refused_pair(
    run: spec.Elsewhere, source: ModelContext, base: ModelContext, *, outputs: bool
) -> Diagnostic | None:
    """E0415 where activations of one model don't fit into the other.

    outputs: whether what the other model gives is read too, so that it has to be the same kind
    """
    differences = _differences(base.shape, source.shape)
    hint = "patch between two checkpoints or fine-tunings of one model"
    if not differences and outputs:
        differences = _other_outputs(base.shape, source.shape)
        hint = (
            f"write `with {run.name}` behind `patch`, without `from {run.name}`: then its vectors "
        )
        hint += f"are read, and the measure of `{base.name}` alone"
    if not differences or source.shape.stands_in or base.shape.stands_in:
        return None
    return OtherShape(
        span=run.span,
        source=source.name,
        base=base.name,
        differences="; ".join(differences),
        hint=hint,
    )


def _differences(base: ModelShape, source: ModelShape) -> list[str]:
    found = [
        f"{getattr(source, name):,} and {getattr(base, name):,} {what}"
        for name, what in SIZES.items()
        if getattr(source, name) != getattr(base, name)
    ][:3]
    only = sorted((base.sites ^ source.sites) - {"logits"})
    if not found and only:
        found.append(f"only one of them has `{only[0]}`")
    return found


def _other_outputs(base: ModelShape, source: ModelShape) -> list[str]:
    """Where numbers of outputs don't mean the same in both."""
    if "logits" in base.sites ^ source.sites:
        return ["what is measured is read on both, and only one of them has `logits`"]
    if (base.task, base.labels) != (source.task, source.labels):
        kinds = "labels of a classifier and tokens" if base.task != source.task else "other labels"
        return [f"what is measured is read on both, and their outputs differ: {kinds}"]
    return []


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
        return Paired(
            Run(run.name, table.runs[CLEAN].rows, model=run.model, chat=table.runs[CLEAN].chat), ""
        ), []
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
