"""Resolve the measure of an experiment as a function of written vectors; report all errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mechdsl.base.records import closest_name
from mechdsl.base.text import Source, Span, name_list
from mechdsl.checks.file_check import CheckedFile
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.experiments import NoEstimate
from mechdsl.diagnostics.syntax import BadArgument, UnknownName
from mechdsl.program import spec
from mechdsl.prompts.positions.cells import is_after_prompts
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.conflicts import SITES_WITHOUT_GRADIENT, find_flat_part
from mechdsl.resolve.expansion import get_whole_spec
from mechdsl.resolve.experiment import resolve_experiment
from mechdsl.resolve.types import ResolvedExperiment, SitePoint
from mechdsl.rules.kinds import RULES, registered_words
from mechdsl.syntax import ast
from mechdsl.syntax.frontend import parse
from mechdsl.syntax.traversal import number_names
from mechdsl.vocab.metrics import DELTA, RAW
from mechdsl.vocab.sites import SITES

STATEMENT = "objective"

_LINE = 2
"""Line of the site and the positions in the text that is parsed."""

_EXAMPLE = 'write `site="resid_post layer 3", at="last token"`'

_EFFECTS = (RAW.name, DELTA.name)
"""Effects that are a value of each row."""


@dataclass(frozen=True, eq=False)
class ResolvedObjective:
    """A measure of an experiment, and the vectors that it is a function of."""

    experiment: ResolvedExperiment
    """With the one measure, and without `save` lines, reports and controls."""
    point: SitePoint
    cell: PositionCell
    place: str
    """`resid_post layer 3 at last token`"""


def resolve_objective(
    checked: CheckedFile, experiment: str | None, measure: str | None, site: str, at: str
) -> tuple[ResolvedObjective | None, list[Diagnostic]]:
    """Resolve what `mechdsl.objective` differentiates.

    Args:
        checked: A file without errors.
        experiment: Name of the experiment; None: the only one.
        measure: The measure as in tables; None: the only one.
        site: As in rules: `resid_post layer 3`.
        at: As in rules: `last token`.

    Returns:
        The objective; E0208 for unknown names and several experiments, E0207 for several vectors,
        E0608 without a gradient, and codes of sites and positions.
    """
    own = _choose_experiment(checked, experiment)
    if isinstance(own, Diagnostic):
        return None, [own]
    said = _choose_measure(own, measure)
    if isinstance(said, Diagnostic):
        return None, [said]
    line, problems = _parse_place(site, at, checked.program)
    if line is None:
        return None, problems
    whole = get_whole_spec(own)
    save = spec.Save(span=line.span, site=line.site, at=line.at, run=whole.base, file="")
    asked = whole.model_copy(
        update={
            "saves": (save,),
            "saved_directions": (),
            "measures": (said,),
            "expects": (),
            "reports": (),
            "against": None,
        }
    )
    problems = [*_check_spec(asked), *_check_encoders(own)]
    if problems:
        return None, problems
    found, problems = resolve_experiment(asked, checked.program, own.model, own.table, RULES)
    if found is None:
        return None, [problem for problem in problems if problem.severity == "error"]
    problems = [*_check_place(found), *_check_gradient(found), *_check_rules(found)]
    if problems:
        return None, problems[:1]
    (resolved,) = found.saves
    alone = replace(found, saves=(), control=None, bare=None, circuit_baselines={}, accuracies={})
    place = f"{line.site.span.written} at {line.at.span.written}"
    return ResolvedObjective(alone, resolved.points[0], resolved.cells[0], place), []


def _refuse(span: Span, what: str, reason: str, hint: str) -> NoEstimate:
    return NoEstimate(
        span=span, statement=STATEMENT, verb="differentiate", what=what, reason=reason, hint=hint
    )


def _choose_experiment(checked: CheckedFile, name: str | None) -> ResolvedExperiment | Diagnostic:
    known = list(dict.fromkeys(experiment.name for experiment in checked.experiments))
    if name is None and len(known) == 1:
        (name,) = known
    if name not in known:
        listed = f"experiments are {name_list(known)}" if known else "add one with `measure`"
        reason = f"the file has no experiment `{name}` with a measure"
        hint = did_you_mean(name or "", known, listed)
        if name is None:
            reason = f"the file has {len(known) or 'no'} experiments with a measure"
            hint = f'name one: `experiment="{known[0]}"`' if known else listed
        return BadCommandLine(reason=reason, hint=hint)
    experiments = [experiment for experiment in checked.experiments if experiment.name == name]
    if len(experiments) > 1:
        what = f"`{name}`, which has {len(experiments)} results"
        hint = "write an experiment with one model, source and basis, and measures at one position"
        return _refuse(experiments[0].spec.span, what, "an objective is one of them", hint)
    return experiments[0]


def _choose_measure(experiment: ResolvedExperiment, label: str | None) -> spec.Measure | Diagnostic:
    measures = {measure.label: measure for measure in experiment.spec.measures}
    if label is None and len(measures) == 1:
        (label,) = measures
    if label in measures:
        return measures[label]
    listed = f"measures of `{experiment.name}` are {name_list(measures)}"
    reason = f"the experiment has no measure `{label}`"
    if label is None:
        reason = f"`{experiment.name}` has {len(measures)} measures"
        listed = f'name one: `measure="{next(iter(measures))}"`'
    near = None if label is None else closest_name(label, measures)
    return BadCommandLine(reason=reason, hint=listed if near is None else f"write `{near}`")


def _parse_place(
    site: str, at: str, program: spec.Program
) -> tuple[ast.Patch | None, list[Diagnostic]]:
    """Parse a site and positions as those of a rule; E0207 for anything else."""
    place = f"{site} at {at}"
    before = "mech 1 experiment e { patch\n"
    source = Source(f"{before}{place}\n}}\n", origin="site and at")
    tree, problems = parse(source, registered_words())
    here = Span(source, len(before), len(before) + len(place))
    errors = [
        problem for problem in problems if problem.span is not None and problem.span.line == _LINE
    ]
    if "\n" in place or (has_errors(problems) and not errors):
        return None, [_bad_place(here, "is more than a site and a position", _EXAMPLE)]
    if errors:
        return None, errors[:1]
    match tree.statements:
        case [_, ast.ExperimentDef(statements=[ast.Rule(body=ast.Patch() as rule)])]:
            pass
        case _:
            return None, [_bad_place(here, "is more than a site and a position", _EXAMPLE)]
    if rule.onto or rule.into_layer or rule.source or rule.features:
        return None, [_bad_place(here, "is more than a site and a position", _EXAMPLE)]
    flat = next((each for each in rule.site.names if each.id in SITES_WITHOUT_GRADIENT), None)
    if flat is not None:
        what = f"with respect to `{flat.id}`"
        reason = "mechdsl doesn't compute gradients at this site"
        hint = "name a site such as `embed`, `resid_post`, `z` or `mlp_out`"
        return None, [_refuse(flat.span, what, reason, hint)]
    if rule.site.coordinates is not None or rule.site.basis is not None:
        reason = "names coordinates, and an objective is a function of whole vectors"
        return None, [_bad_place(rule.site.span, reason, "name a site without a basis")]
    for name in (*number_names(rule.site), *number_names(rule.at)):
        if name not in program.parameters:
            hint = did_you_mean(name, program.parameters, "write a number")
            return None, [UnknownName(span=here, kind="param", name=name, hint=hint)]
    return rule, []


def _check_spec(experiment: spec.Experiment) -> Iterator[Diagnostic]:
    """Yield E0608 for statements of an experiment that an objective can't include."""
    (measure,) = experiment.measures
    if experiment.generation is not None:
        reason, hint = "a selected token has no gradient", "remove `generate`"
        yield _refuse(experiment.generation.span, "generated text", reason, hint)
    elif experiment.estimator is not None:
        reason = "the experiment estimates its effects"
        yield _refuse(experiment.estimator.span, f"`{measure.label}`", reason, "remove `using`")
    elif experiment.after:
        reason = f"its rules depend on the results of `{experiment.after[0]}`"
        hint = "write the selected sites"
        yield _refuse(experiment.span, f"`{experiment.name}`", reason, hint)
    elif experiment.derived:
        reason, hint = "the experiment has a run with rules", "write the rules in the experiment"
        yield _refuse(experiment.derived[0].span, f"`{experiment.derived[0].name}`", reason, hint)
    elif measure.observed:
        reason, hint = "it measures an observation", "measure the output of the model"
        yield _refuse(measure.span, f"`{measure.label}`", reason, hint)
    elif measure.effect not in _EFFECTS or measure.per_prompt or measure.over is not None:
        what = f"`{measure.label} as {measure.effect}`"
        reason = "it isn't a value of each row that depends on the written vectors"
        hint = "measure `as raw` or `as delta`"
        yield _refuse(measure.effect_span, what, reason, hint)


def _check_place(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0207 for a site or positions that aren't one vector of one or several tokens, and
    E0608 for a site in the vision encoder."""
    (save,) = experiment.saves
    run, said = experiment.table.runs[save.run], save.spec
    if any(SITES[point.site].stack == "vision" for point in save.points):
        what = f"`{said.site.span.written}`"
        reason = "the vision encoder runs before the language model, without gradients"
        hint = "write `embed` at tokens of the image, the output of the encoder and its projector"
        yield _refuse(said.site.span, what, reason, hint)
    elif len(save.points) > 1:
        reason = f"names {len(save.points)} vectors of a token"
        yield _bad_place(said.site.span, reason, "name one layer, and one head or all")
    elif len(save.cells) > 1:
        reason = f"names {len(save.cells)} positions"
        yield _bad_place(said.at.span, reason, "name one position, such as `tokens 1..-1`")
    elif save.in_reply or any(is_after_prompts(cell, run.rows) for cell in save.cells):
        reason, hint = "names tokens after the prompt", "name tokens of the prompt"
        yield _bad_place(said.at.span, reason, hint)
    for cell in save.cells:
        many = next((n for n, hits in enumerate(cell.hits) if len(hits) > 1), None)
        if many is not None:
            reason = f"is in row {experiment.table.row_ids[many]} {len(cell.hits[many])} times"
            yield _bad_place(said.at.span, reason, "name one of them: `item 1 token`")


def _bad_place(span: Span, reason: str, hint: str) -> BadArgument:
    return BadArgument(span=span, name=span.written, reason=reason, hint=hint)


def _check_encoders(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0608 for rules in a vision encoder."""
    for rule in experiment.rules:
        if rule.in_vision:
            reason = "it acts in the vision encoder, before the language model"
            yield _refuse(rule.spec.span, f"`{rule.spec.verb}`", reason, "remove the rule")


def _check_gradient(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0608 for a measure or runs without a gradient."""
    (measure,), (said,) = experiment.measures, experiment.spec.measures
    flat = find_flat_part(measure, experiment.spec.base, at_base=False)
    if flat is not None:
        yield _refuse(said.metric.span, f"`{flat[0]}`", *flat[1:])
    elif measure.in_reply is not None:
        hint = "measure a logit, a probability or a difference of logits"
        yield _refuse(said.span, "tokens of a reply", "a selected token has no gradient", hint)
    for run in (
        experiment.spec.base,
        *(rule.run for rule in experiment.rules),
        *measure.compared_runs,
    ):
        if experiment.table.runs[run].noise is not None:
            hint = "name a corruption that changes the text"
            yield _refuse(experiment.spec.span, f"the run `{run}`", "it has noise", hint)


def _check_rules(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0608 for rules that an objective can't apply."""
    if experiment.n_cells > 1:
        hint = "name one site, position and number in each rule, or set a `param`"
        what = f"`{experiment.name}`, which has {experiment.n_cells} cells"
        yield _refuse(experiment.spec.span, what, "an objective is one of them", hint)
    for rule in experiment.rules:
        reason = ""
        if rule.spec.observed is not None:
            reason = "it observes and changes nothing"
        elif rule.path is not None or rule.does.changes != "sites":
            reason = "an objective applies rules that write vectors at sites"
        elif any(_is_in_answer(cell, experiment) for cell in rule.positions.written.values()):
            reason = "it acts on tokens after the prompt"
        if reason:
            what = f"`{rule.spec.verb}`" if rule.spec.observed is None else "`observe`"
            yield _refuse(rule.spec.span, what, reason, "remove the rule")


def _is_in_answer(cell: PositionCell, experiment: ResolvedExperiment) -> bool:
    return is_after_prompts(cell, experiment.table.runs[experiment.spec.base].rows)


def describe_autograd_failure(objective: ResolvedObjective, said: str) -> Sequence[Diagnostic]:
    """Return E0608 for a model that autograd can't differentiate."""
    experiment = objective.experiment
    reason = f"autograd can't follow `{experiment.model.name}` ({said[:200]})"
    hint = "use a model without in-place operations"
    return [_refuse(experiment.spec.span, f"`{experiment.measures[0].label}`", reason, hint)]


def describe_overwrite(objective: ResolvedObjective, number: int) -> Sequence[Diagnostic]:
    """Return E0608 for a rule that replaces the vectors of the objective."""
    rule = objective.experiment.rules[number]
    what = f"vectors that `{rule.spec.span.written}` replaces"
    hint = "name another site or position, or remove the rule"
    return [_refuse(rule.spec.span, what, "they have no effect", hint)]
