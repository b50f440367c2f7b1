"""Runs of other blocks and models, and experiments that compare several.

What is compared is written out: one experiment for every combination, each resolved, planned and
run like any other, and put together again when all are measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from mechdsl.base.names import SHUFFLED, name_list
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import (
    BadArgument,
    DuplicateName,
    MissingLine,
    UnknownName,
    did_you_mean,
)
from mechdsl.diagnostics.e05_elsewhere import NeitherSampled
from mechdsl.program import spec
from mechdsl.program.lower_prompts import CLEAN
from mechdsl.program.namespace import place
from mechdsl.program.sort_statements import Statements
from mechdsl.syntax import ast

RunLabel = int | str
BLOCKS = "prompts"
"""The axis of several blocks of prompts."""


@dataclass(frozen=True)
class RunSide:
    """A run on one side of `from … into …`."""

    run: str
    """As tables call it."""
    label: RunLabel
    model: str | None = None
    """Where the file names a model."""


@dataclass(frozen=True)
class Variant:
    """One combination of a model, a source and a base."""

    model: str
    source: str | None
    base: str
    labels: tuple[tuple[str, RunLabel], ...]
    """Of what there are several."""
    reads: str | None
    """The source as written: where it is the variant's own model, that is its clean run."""


def run_of(
    ref: ast.Ref, prompts: spec.Prompts, work: Statements, *, shuffled: bool = False
) -> str | None:
    """The name of a run: `clean`, a corruption, another block or its corruption, another model.

    shuffled: rows of another block are dealt to those of the sampled one.

    E0201 where there is none, E0202 where there are two.
    """
    if ref.part is None and ref.name in work.known_runs:
        return ref.name
    own = [CLEAN, *(c.name for c in prompts.corruptions)]
    blocks, models = work.scope.names("prompts"), work.scope.names("model")
    if ref.part is None and ref.name in own:
        if ref.name in (*blocks, *models):
            first = work.scope.definitions[ref.name]
            what = "model" if first.kind == "model" else "block of prompts"
            where = f"the {what} {place(first.span, ref.span)}; it is a run of `{prompts.name}` too"
            work.diagnostics.append(DuplicateName(span=ref.span, name=ref.name, first=where))
        return ref.name
    if ref.name == prompts.name and ref.part in (None, *own):
        return ref.part or CLEAN
    block = work.parts.prompts.get(ref.name)
    if block is not None and block is not prompts and work.scope.has("prompts", ref.name):
        run = ref.part or CLEAN
        if run == CLEAN or run in [c.name for c in block.corruptions]:
            name = ref.name if run == CLEAN else f"{ref.name}.{run}"
            name += SHUFFLED if shuffled else ""
            there = spec.Elsewhere(
                span=ref.span, name=name, prompts=ref.name, run=run, shuffled=shuffled
            )
            _note(work, there)
            return name
        own, prompts = [CLEAN, *(c.name for c in block.corruptions)], block
        blocks, models = [], []
    if ref.part is None and ref.name in work.parts.models and work.scope.has("model", ref.name):
        _note(work, spec.Elsewhere(span=ref.span, name=ref.name, model=ref.name))
        return ref.name
    known = [*own, *work.known_runs]
    work.diagnostics.append(_unknown(ref, prompts, known, blocks, models))
    return None


def _note(work: Statements, run: spec.Elsewhere) -> None:
    work.elsewhere.setdefault(run.name, run)


def _unknown(
    ref: ast.Ref,
    prompts: spec.Prompts,
    own: Sequence[str],
    blocks: Sequence[str],
    models: Sequence[str],
) -> Diagnostic:
    runs = name_list(own)
    hint = f"runs of `{prompts.name}` are {runs}"
    others = [*blocks, *(models if len(models) > 1 else ())]
    others = [name for name in others if name != prompts.name]
    if others:
        hint += "; other runs are " + name_list(others)
    written = ref.name if ref.part is None else f"{ref.name}.{ref.part}"
    if written in ("zero", "mean", "resample"):
        hint = f"`ablate … with {written}` writes that; a `patch` reads a run: " + runs
        return UnknownName(span=ref.span, kind="run", name=written, hint=hint)
    own_part = ref.part is not None and ref.name == prompts.name
    hint = did_you_mean(
        ref.name if ref.part is None else ref.part,
        [*own, *others],
        hint,
        written=lambda near: f"{ref.name}.{near}" if own_part and near != CLEAN else near,
    )
    return UnknownName(span=ref.span, kind="run", name=written, hint=hint)


# --- both sides of `from … into …` -------------------------------------------------------------


def sides(work: Statements, prompts: spec.Prompts) -> tuple[list[RunSide], list[RunSide]]:
    """(sources, bases) of `from … into …`; without one, no sources and the clean run."""
    if not work.from_into:
        return [], [RunSide(CLEAN, CLEAN)]
    line = work.from_into[0]
    sources = list(_ends(line.sources, prompts, work))
    bases = [
        # What rules act on is a run of its own model, whichever that is.
        RunSide(CLEAN, end.label, end.model) if end.model is not None else end
        for end in _ends(line.bases, prompts, work)
    ]
    for refs in (line.sources, line.bases):
        named_once([(ref.span.written, ref.span) for ref in refs], work)
    runs = [work.elsewhere.get(end.run) for end in (*sources, *bases)]
    known = len(sources) == len(line.sources) and len(bases) == len(line.bases)
    if line.shuffled is not None and known and not any(run and run.shuffled for run in runs):
        work.diagnostics.append(
            BadArgument(
                span=line.shuffled.span,
                name="shuffled",
                reason="is for runs of another block of prompts",
                hint="leave it out: runs of one block are of the same rows",
            )
        )
    kinds = {end.model is not None for end in bases}
    if len(kinds) > 1:
        work.diagnostics.append(
            BadArgument(
                span=line.bases[1].span,
                name=line.bases[1].span.written,
                reason="stands beside a base of another kind",
                hint="let all bases be runs of one model, or all be models",
            )
        )
    return sources, bases


def _ends(refs: Sequence[ast.Ref], prompts: spec.Prompts, work: Statements) -> Iterator[RunSide]:
    own = [CLEAN, *(c.name for c in prompts.corruptions)]
    for ref in refs:
        members = work.parts.checkpoints.get(ref.name)
        if ref.part is None and members is not None and ref.name not in own:
            work.scope.has("model", ref.name)
            for name, label in zip(members, labels_of(members, work), strict=True):
                _note(work, spec.Elsewhere(span=ref.span, name=name, model=name))
                yield RunSide(name, label, name)
            continue
        shuffled = work.from_into[0].shuffled is not None
        run = run_of(ref, prompts, work, shuffled=shuffled)
        if run is None:
            continue
        there = work.elsewhere.get(run)
        yield RunSide(run, ref.span.written, None if there is None else there.model)


def named_once(written: Sequence[tuple[str, Span]], work: Statements) -> None:
    seen: set[str] = set()
    for name, span in written:
        if name in seen:
            work.diagnostics.append(
                BadArgument(
                    span=span,
                    name=name,
                    reason="stands twice in one list",
                    hint="every combination is run once: name each of them once",
                )
            )
        seen.add(name)


# --- models --------------------------------------------------------------------------------------


def labels_of(names: Sequence[str], work: Statements) -> list[RunLabel]:
    """What tables call models: checkpoints by what the star stands for, numbers if all are."""
    found = [work.parts.models[name].matched or name for name in names]
    if all(label.isascii() and label.isdigit() and str(int(label)) == label for label in found):
        return [int(label) for label in found]
    return list[RunLabel](found)


def models_of(work: Statements, bases: Sequence[RunSide]) -> list[tuple[str, RunLabel]]:
    """The models that the experiment runs on; none after an error.

    `into tuned` names the model as well; a `model` line beside it may name both sides.
    """
    across = [(end.model, end.label) for end in bases if end.model is not None]
    if len(across) not in (0, len(bases)):
        return []  # which has been refused
    if across:
        line = work.from_into[0]
        named = {
            name
            for ref in (*line.sources, *line.bases)
            for name in work.parts.checkpoints.get(ref.name, (ref.name,))
        }
        for use in work.models:
            for ref in use.models:
                if not work.scope.use("model", ref.name, ref.span):
                    return []
                if not named.issuperset(work.parts.checkpoints.get(ref.name, (ref.name,))):
                    work.diagnostics.append(
                        BadArgument(
                            span=ref.span,
                            name=ref.name,
                            reason="is neither the model that is read nor the one that is patched",
                            hint=f"write `model {across[0][0]}`, or leave the line out",
                        )
                    )
        return across
    if not work.models:
        return _only_model(work)
    found: list[str] = []
    refs = work.models[0].models
    for ref in refs:
        if not work.scope.use("model", ref.name, ref.span):
            return []
        found += work.parts.checkpoints.get(ref.name, (ref.name,))
    named_once([(ref.name, ref.span) for ref in refs], work)
    if not all(name in work.parts.models for name in found):
        return []
    return list(zip(found, labels_of(found, work), strict=True))


def _only_model(work: Statements) -> list[tuple[str, RunLabel]]:
    """The file's only model, which needs no line."""
    known = work.scope.names("model")
    if len(known) == 1:
        work.scope.use("model", known[0], work.definition.span)
        names = work.parts.checkpoints.get(known[0], (known[0],))
        if not all(name in work.parts.models for name in names):
            return []
        return list(zip(names, labels_of(names, work), strict=True))
    hint = 'define one first: `model toy = zoo("counting")`'
    work.diagnostics.append(
        MissingLine(
            span=work.definition.name.span,
            experiment=work.definition.name.id,
            what="model",
            hint=f"add a line such as `model {known[0]}`" if known else hint,
        )
    )
    return []


# --- combinations ---------------------------------------------------------------------------------


def variants(
    models: Sequence[tuple[str, RunLabel]],
    sources: Sequence[RunSide],
    bases: Sequence[RunSide],
    prompts: spec.Prompts,
    work: Statements,
    block: ast.Ref | None,
) -> list[Variant]:
    """Every combination, the last one fastest. E0202 for loops called like them, E0530 for
    combinations that no sampled row takes part in.

    block: of prompts, as the experiment names it
    """
    across = any(end.model is not None for end in bases)
    found: list[Variant] = []
    for (model, name), source, base in product(
        [("", "")] if across else models, sources or [None], bases
    ):
        model = base.model or model
        labels = list[tuple[str, RunLabel]](labels_of_block(block, work))
        if not across and len(models) > 1:
            labels.append(("model", name))
        if source is not None and len(sources) > 1:
            labels.append(("source", source.label))
        if len(bases) > 1:
            labels.append(("base", base.label))
        reads = run = None if source is None else source.run
        if source is not None and source.model == model:
            run = CLEAN
        found.append(Variant(model, run, base.run, tuple(labels), reads))
    _sampled(found, prompts, work)
    compared = {axis for variant in found for axis, _ in variant.labels}
    work.diagnostics.extend(
        DuplicateName(
            span=loop.span,
            name=loop.name,
            first=f"the axis of the {loop.name.removesuffix('s')}s that are compared",
        )
        for loop in work.loops
        if loop.name in compared
    )
    return found


def labels_of_block(ref: ast.Ref | None, work: Statements) -> tuple[tuple[str, RunLabel], ...]:
    """What tells a block from the others that the experiment runs on; nothing where it is one."""
    if ref is None or len(work.prompts[0].prompts) == 1:
        return ()
    return ((BLOCKS, ref.span.written),)


def _sampled(found: Sequence[Variant], prompts: spec.Prompts, work: Statements) -> None:
    for variant in found:
        ends = [work.elsewhere.get(run) for run in (variant.source, variant.base) if run]
        blocks = [end.prompts for end in ends if end is not None and end.prompts is not None]
        if variant.source is None or len(blocks) < 2:
            continue
        work.diagnostics.append(
            NeitherSampled(
                span=work.from_into[0].span,
                source=variant.source,
                base=variant.base,
                prompts=prompts.name,
                instead=blocks[1],
            )
        )
        return


def in_model(
    variant: Variant,
    rules: Sequence[spec.Rule],
    derived: Sequence[spec.DerivedRun],
    work: Statements,
) -> dict[str, object]:
    """The rules of a combination, the runs that it defines, and those of elsewhere that it has: its
    own model's run is its clean one."""
    own = {run.name for run in work.elsewhere.values() if run.model == variant.model}

    def here(rules: Sequence[spec.Rule]) -> tuple[spec.Rule, ...]:
        changes = {"source": CLEAN}
        return tuple(r.model_copy(update=changes) if r.source in own else r for r in rules)

    runs = tuple(
        run.model_copy(
            update={"rules": here(run.rules), "source": CLEAN if run.source in own else run.source}
        )
        for run in derived
    )
    elsewhere = tuple(run for run in work.elsewhere.values() if run.name not in own)
    return {"rules": here(rules), "derived": runs, "elsewhere": elsewhere}
