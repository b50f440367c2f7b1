"""The runs of an experiment: other prompt sets and models, and generation.

An experiment that compares several models, sources or bases becomes one experiment per
combination. Each is resolved, planned and run like any other; the results are combined at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from mechdsl.base import limits
from mechdsl.base.limits import is_number, is_whole_number
from mechdsl.base.records import Record
from mechdsl.base.text import Source, Span
from mechdsl.diagnostics.core import did_you_mean, has_errors
from mechdsl.diagnostics.prompts import UnsampledRuns
from mechdsl.diagnostics.syntax import (
    BadArgument,
    DuplicateName,
    MissingLine,
    NotSupported,
    UnknownWord,
)
from mechdsl.program import spec
from mechdsl.program.names import line_reference
from mechdsl.program.spec import (
    CLEAN,
    PROMPTS_AXIS,
    Generation,
    RepliesOf,
    constant_value,
    whole_number_value,
)
from mechdsl.program.statements import (
    Statements,
    note_external_run,
    reject_argument,
    resolve_run_name,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

RunLabel = int | str


class RunSide(Record):
    """A run on one side of `from … into …`."""

    run: str
    """Its name in tables."""
    label: RunLabel
    model: str | None = None
    """Its model, if the file names one."""


class Variant(Record):
    """One combination of a model, a source and a base."""

    model: str
    source: str | None
    base: str
    labels: tuple[tuple[str, RunLabel], ...]
    """Labels of the compared dimensions."""
    reads: str | None
    """The source as written in the source text; for the variant's own model, its clean run."""


# --- both sides of `from … into …` -------------------------------------------------------------


def lower_sides(work: Statements, prompts: spec.Prompts) -> tuple[list[RunSide], list[RunSide]]:
    """Return (sources, bases) of `from … into …`; by default, no sources and the clean run."""
    if not work.from_into:
        return [], [RunSide(CLEAN, CLEAN)]
    line = work.from_into[0]
    sources = list(_ends(line.sources, prompts, work))
    bases = [
        # Rules act on a run of the experiment's own model.
        RunSide(CLEAN, end.label, end.model) if end.model is not None else end
        for end in _ends(line.bases, prompts, work)
    ]
    for refs in (line.sources, line.bases):
        reject_repeated_names([(ref.span.written, ref.span) for ref in refs], work)
    runs = [work.elsewhere.get(end.run) for end in (*sources, *bases)]
    known = len(sources) == len(line.sources) and len(bases) == len(line.bases)
    if line.shuffled is not None and known and not any(run and run.shuffled for run in runs):
        work.diagnostics.append(
            BadArgument(
                span=line.shuffled.span,
                name="shuffled",
                reason="is for runs of a different prompts block",
                hint="remove it: runs of one block have the same rows",
            )
        )
    kinds = {end.model is not None for end in bases}
    if len(kinds) > 1:
        work.diagnostics.append(
            BadArgument(
                span=line.bases[1].span,
                name=line.bases[1].span.written,
                reason="can't be combined with a base of another type",
                hint="use only runs of one model, or only models, as bases",
            )
        )
    return sources, bases


def _ends(refs: Sequence[ast.Ref], prompts: spec.Prompts, work: Statements) -> Iterator[RunSide]:
    names = [CLEAN, *(c.name for c in prompts.corruptions)]
    for ref in refs:
        members = work.parts.checkpoints.get(ref.name)
        if ref.part is None and members is not None and ref.name not in names:
            work.scope.has("model", ref.name)
            for name, label in zip(members, model_labels(members, work), strict=True):
                note_external_run(work, spec.ExternalRunSpec(span=ref.span, name=name, model=name))
                yield RunSide(name, label, name)
            continue
        shuffled = work.from_into[0].shuffled is not None
        run = resolve_run_name(ref, prompts, work, shuffled=shuffled)
        if run is None:
            continue
        there = work.elsewhere.get(run)
        yield RunSide(run, ref.span.written, None if there is None else there.model)


def reject_repeated_names(written: Sequence[tuple[str, Span]], work: Statements) -> None:
    seen: set[str] = set()
    for name, span in written:
        if name in seen:
            work.diagnostics.append(
                BadArgument(
                    span=span,
                    name=name,
                    reason="appears twice in one list",
                    hint="name each one once: every combination runs once",
                )
            )
        seen.add(name)


# --- models --------------------------------------------------------------------------------------


def model_labels(names: Sequence[str], work: Statements) -> list[RunLabel]:
    """Return the labels of models in tables: for checkpoints, the text that the star matches, as
    numbers if all are numeric."""
    labels = [work.parts.models[name].matched or name for name in names]
    if all(label.isascii() and label.isdigit() and str(int(label)) == label for label in labels):
        return [int(label) for label in labels]
    return list[RunLabel](labels)


def experiment_models(work: Statements, bases: Sequence[RunSide]) -> list[tuple[str, RunLabel]]:
    """Return the models that the experiment runs on; empty after an error.

    `into tuned` names the model as well; an additional `model` line may name both sides.
    """
    across = [(end.model, end.label) for end in bases if end.model is not None]
    if len(across) not in (0, len(bases)):
        return []  # already rejected
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
                            reason=(
                                "is neither the model that rules read nor the one that they patch"
                            ),
                            hint=f"write `model {across[0][0]}`, or remove the line",
                        )
                    )
        return across
    if not work.models:
        return _only_model(work)
    models: list[str] = []
    refs = work.models[0].models
    for ref in refs:
        if not work.scope.use("model", ref.name, ref.span):
            return []
        models += work.parts.checkpoints.get(ref.name, (ref.name,))
    reject_repeated_names([(ref.name, ref.span) for ref in refs], work)
    if not all(name in work.parts.models for name in models):
        return []
    return list(zip(models, model_labels(models, work), strict=True))


def _only_model(work: Statements) -> list[tuple[str, RunLabel]]:
    """Return the file's only model, for which no line is needed."""
    known = work.scope.names("model")
    if len(known) == 1:
        work.scope.use("model", known[0], work.definition.span)
        names = work.parts.checkpoints.get(known[0], (known[0],))
        if not all(name in work.parts.models for name in names):
            return []
        return list(zip(names, model_labels(names, work), strict=True))
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


def combine_variants(
    models: Sequence[tuple[str, RunLabel]],
    sources: Sequence[RunSide],
    bases: Sequence[RunSide],
    prompts: spec.Prompts,
    work: Statements,
    block: ast.Ref | None,
) -> list[Variant]:
    """Return every combination; the last dimension varies fastest.

    Codes: E0202 for loops with the name of a dimension, E0530 for combinations without sampled
    rows.

    Args:
        block: The experiment's reference to a prompt block.
    """
    across = any(end.model is not None for end in bases)
    variants: list[Variant] = []
    for (model, name), source, base in product(
        [("", "")] if across else models, sources or [None], bases
    ):
        model = base.model or model
        labels = list[tuple[str, RunLabel]](prompts_labels(block, work))
        if not across and len(models) > 1:
            labels.append(("model", name))
        if source is not None and len(sources) > 1:
            labels.append(("source", source.label))
        if len(bases) > 1:
            labels.append(("base", base.label))
        reads = run = None if source is None else source.run
        if source is not None and source.model == model:
            run = CLEAN
        variants.append(Variant(model, run, base.run, tuple(labels), reads))
    _sampled(variants, prompts, work)
    compared = {axis for variant in variants for axis, _ in variant.labels}
    work.diagnostics.extend(
        DuplicateName(
            span=loop.span,
            name=loop.name,
            first=f"the axis of the compared {loop.name.removesuffix('s')}s",
        )
        for loop in work.loops
        if loop.name in compared
    )
    passed = work.parts.rule_functions
    work.diagnostics.extend(
        DuplicateName(
            span=loop.span,
            name=loop.name,
            first=line_reference(passed[loop.name].span, loop.span),
        )
        for loop in work.loops
        if loop.name in passed
    )
    return variants


COMPARING_METRICS = ("kl", "js", "cosine")
"""Metrics that compare with a run."""


def note_compared_models(
    measures: Iterable[spec.Measure],
    saves: Iterable[spec.Save],
    prompts: spec.Prompts | None,
    work: Statements,
) -> None:
    """Note the runs of other models that metrics compare with: `kl(tuned)`."""
    names = {ref.name for use in work.models for ref in use.models}
    if prompts is None or len(names) > 1:
        return  # with several models, one model's run would be its own clean run in one variant
    taken = {
        CLEAN,
        *work.known_runs,
        *(corruption.name for corruption in prompts.corruptions),
    } | names
    gradients = (save.gradient for save in saves if save.gradient is not None)
    others = {name for name in work.scope.names("model") if name not in taken}
    for call in (node for measure in (*measures, *gradients) for node in walk(measure.metric)):
        if not isinstance(call, ast.Call) or call.name not in COMPARING_METRICS:
            continue
        for value in (argument.value for argument in call.arguments):
            if isinstance(value, ast.Name) and value.id in others:
                work.scope.has("model", value.id)
                there = spec.ExternalRunSpec(span=value.span, name=value.id, model=value.id)
                note_external_run(work, there)


def prompts_labels(ref: ast.Ref | None, work: Statements) -> tuple[tuple[str, RunLabel], ...]:
    """Return the label that distinguishes a block from the others of the experiment, if any."""
    if ref is None or len(work.prompts[0].prompts) == 1:
        return ()
    return ((PROMPTS_AXIS, ref.span.written),)


def _sampled(variants: Sequence[Variant], prompts: spec.Prompts, work: Statements) -> None:
    for variant in variants:
        ends = [work.elsewhere.get(run) for run in (variant.source, variant.base) if run]
        blocks = [end.prompts for end in ends if end is not None and end.prompts is not None]
        if variant.source is None or len(blocks) < 2:
            continue
        work.diagnostics.append(
            UnsampledRuns(
                span=work.from_into[0].span,
                source=variant.source,
                base=variant.base,
                prompts=prompts.name,
                instead=blocks[1],
            )
        )
        return


def runs_of_own_model(model: str, work: Statements) -> set[str]:
    """Return the names of clean runs of the experiment's model."""
    return {run.name for run in work.elsewhere.values() if run.model == model}


def variant_fields(
    variant: Variant,
    rules: Sequence[spec.Rule],
    derived: Sequence[spec.DerivedRun],
    saves: Sequence[spec.Save],
    work: Statements,
) -> dict[str, object]:
    """Return the fields of a combination: its rules, derived runs, external runs and saves. A run
    of the model that the combination runs on is its clean run."""
    names = runs_of_own_model(variant.model, work)

    def here(rules: Sequence[spec.Rule]) -> tuple[spec.Rule, ...]:
        changes = {"source": CLEAN}
        return tuple(r.model_copy(update=changes) if r.source in names else r for r in rules)

    runs = tuple(
        run.model_copy(
            update={
                "rules": here(run.rules),
                "source": CLEAN if run.source in names else run.source,
            }
        )
        for run in derived
    )
    elsewhere = tuple(run for run in work.elsewhere.values() if run.name not in names)
    saves = tuple(
        save.model_copy(update={"run": CLEAN}) if save.run in names else save for save in saves
    )
    return {"rules": here(rules), "derived": runs, "elsewhere": elsewhere, "saves": saves}


class SettingRange(NamedTuple):
    """Valid values of a setting after `with`."""

    whole: bool
    least: float
    most: float
    says: str
    example: str


REPLY_REPORTS = frozenset({"texts", "json"})
"""Reports that need no measure, because they print replies."""

GENERATION_SETTINGS: Mapping[str, SettingRange] = {
    "temperature": SettingRange(False, 1e-6, 1e6, "must be a number above 0", "temperature 0.7"),
    "top_k": SettingRange(True, 1, 1e9, "must be a whole number above 0", "top_k 50"),
    "top_p": SettingRange(False, 1e-9, 1.0, "must be a number above 0 and at most 1", "top_p 0.9"),
    "samples": SettingRange(
        True,
        1,
        limits.REPLY_SAMPLES,
        f"must be a whole number, 1 to {limits.REPLY_SAMPLES:,}",
        "samples 3",
    ),
}


def lower_replies(work: Statements) -> RepliesOf | None:
    """Return the experiment whose replies follow the prompts, if any; E0108 with `generate`."""
    said = work.prompts[0].replies if work.prompts else None
    if said is None:
        return None
    if work.generate:
        work.diagnostics.append(
            NotSupported(
                span=work.generate[0].span,
                what="`generate` after replies",
                later=(
                    "generate the whole text in one experiment, with more tokens, or move "
                    "`generate` to another experiment"
                ),
            )
        )
    if isinstance(said, ast.Name):
        return RepliesOf(span=said.span, of=said.id)
    return RepliesOf(span=said.span, of=said.name, cell=said.arguments)


def reply_length_measure(line: ast.Generate) -> ast.Measure:
    """Return the default measure of an experiment that only generates text."""
    source = Source("measure length as raw", line.span.source.path)
    length, raw = (
        ast.Name(word, span=Span(source, begin, begin + len(word)))
        for word in ("length", "raw")
        for begin in [source.text.index(word)]
    )
    return ast.Measure(length, raw, span=line.span)


def lower_generation(work: Statements) -> Generation | None:
    """Lower the `generate` line of an experiment; None without one. After an error, return a
    placeholder.

    Codes: E0201, E0203, E0207 for invalid numbers and for sampling without a seed.
    """
    if not work.generate:
        return None
    line = work.generate[0]
    generation = _generation(line, work)
    return Generation(span=line.span, tokens=2) if generation is None else generation


def _generation(line: ast.Generate, work: Statements) -> Generation | None:
    """Lower the line; None after an error."""
    tokens = whole_number_value(line.tokens, work.parts.parameters)
    if isinstance(line.tokens, str) and not work.scope.use("param", line.tokens, line.span):
        return None
    if tokens is None or not 1 <= tokens <= limits.REPLY_TOKENS:
        return reject_argument(
            line,
            "generate",
            f"must be a whole number of tokens, 1 to {limits.REPLY_TOKENS:,}",
            "give the maximum number of tokens of a reply: `generate 40`",
            work,
        )
    stops: list[str] = []
    for stop in line.stops:
        if not stop.value:
            reject_argument(
                stop, '""', "is an empty text, which ends every reply", "leave it out", work
            )
        elif stop.value not in stops:
            stops.append(stop.value)
    given = _settings(line, work)
    if given is None:
        return None
    if given and work.parts.seeded is None:
        return reject_argument(
            line.settings[0],
            line.settings[0].name.id,
            "samples tokens, but the file has no seed",
            "add a line such as `seed 7` at the top of the file, or remove `with …` to take the "
            "most likely token",
            work,
        )
    if given:
        given.setdefault("temperature", 1.0)
    return Generation(span=line.span, tokens=tokens, stops=tuple(stops), **given)


def _settings(line: ast.Generate, work: Statements) -> dict[str, Any] | None:
    """Return the numbers after `with` by name; None after an error."""
    settings: dict[str, Any] = {}
    before = len(work.diagnostics)
    for setting in line.settings:
        name, known = setting.name.id, GENERATION_SETTINGS.get(setting.name.id)
        if known is None:
            hint = did_you_mean(
                name, GENERATION_SETTINGS, f"settings are {', '.join(GENERATION_SETTINGS)}"
            )
            work.diagnostics.append(
                UnknownWord(span=setting.name.span, kind="setting", word=name, hint=hint)
            )
            continue
        if name in settings:
            reject_argument(setting, name, "is given twice", "keep one of them", work)
            continue
        named = setting.value if isinstance(setting.value, ast.Name) else None
        if named is not None and not work.scope.use("param", named.id, named.span):
            continue
        number = constant_value(setting.value, work.parts.parameters)
        if (
            not is_number(number)
            or not known.least <= number <= known.most
            or (known.whole and not is_whole_number(number))
        ):
            hint = f"for example `{known.example}`"
            if name == "temperature" and number == 0:
                hint = "remove it: without `with …` the most likely token is taken"
            reject_argument(setting, name, known.says, hint, work)
            continue
        settings[name] = int(number) if known.whole else float(number)
    return None if has_errors(work.diagnostics[before:]) else settings
