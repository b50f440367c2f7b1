"""Metrics in a measure, the atoms of its expression: each with its argument resolved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mechdsl.base.names import name_list, run_called
from mechdsl.base.plural import plural
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import UnknownName, UnknownWord, did_you_mean
from mechdsl.diagnostics.e03_coordinates import AxisDoesNotFit
from mechdsl.program.numbers_in_measures import names_in
from mechdsl.program.python_files import find_function, is_python, metric_use
from mechdsl.prompts.answer_sets import is_list
from mechdsl.prompts.answers import text_tokens
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.resolve.class_outputs import (
    class_argument,
    class_numbers,
    form_of_class,
    not_a_class,
    of_classes,
    refused_class,
    refused_form,
    score_of_nothing,
    without_classes,
)
from mechdsl.resolve.measure_context import MeasureContext, environments, multi_token, refuse
from mechdsl.resolve.reply_metrics import has_reply, of_reply
from mechdsl.resolve.resolved import Atom, Env
from mechdsl.resolve.sets_in_metrics import DIGITS, of_set
from mechdsl.resolve.site_targets import resolve_site
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import METRICS, Form, Takes


def resolve_atom(node: ast.Name | ast.Call, context: MeasureContext) -> Atom | None:
    """The metric that is named, or the function of a Python file; None after an error.

    Codes: E0108, E0203, E0222, E0442 to E0445, E0507, E0612 and those of texts.
    """
    if isinstance(node, ast.Call) and is_python(node):
        return _of_python(node, context)
    name = node.id if isinstance(node, ast.Name) else node.name
    seen = context.observed if context.reads_observed and isinstance(node, ast.Name) else None
    own = seen is not None and (seen.gives == "number" or seen.read_by_measures)
    if seen is not None and own and name in (*context.names, seen.word):
        return Atom(node, seen.word, seen.form)
    if seen is not None and name in seen.controls:
        return Atom(node, name, seen.form_of(name))
    if context.reads_observed and name in context.names and not own:
        return None  # an observation that there isn't, or that lacks a part, which is said there
    metric = METRICS.get(name)
    if metric is None and isinstance(node, ast.Name) and name in context.metrics:
        return None  # it couldn't be written out, which has been said
    if metric is None:
        if isinstance(node, ast.Name) and name in context.parameters:
            hint = "parameters can't stand in a measure"
        else:
            hint = _other_word(node, name, context)
        context.diagnostics.append(UnknownWord(span=node.span, kind="metric", word=name, hint=hint))
        return None
    arguments = node.arguments if isinstance(node, ast.Call) else ()
    if "reply" in metric.forms:
        return of_reply(node, name, metric.forms["reply"], arguments, context)
    shape = context.sites.shape
    images = isinstance(context.tokenizer, ImageReader) or bool(shape.side)
    wanted = class_argument(node, metric, shape, of_images=images)
    if name == "score" and wanted is None and not shape.stands_in:
        context.diagnostics.append(score_of_nothing(node, context.sites.model))
        return None
    if wanted is not None:
        form = form_of_class(metric, shape)
    else:
        form = _form(metric.forms, arguments, context)
    if form is None:
        refuse(
            context,
            node.span,
            _misfit(metric.forms, len(arguments)),
            f"write {_usage(name, metric.forms)}",
        )
        return None
    if wanted is not None:
        return _of_class(node, name, form, wanted, context)
    problem = refused_form(node, name, form, shape, context.sites.model)
    chooses = of_classes(form, shape)
    if problem is None and chooses:
        problem = without_classes(node, context.table, shape, context.sites.model)
    if problem is not None:
        context.diagnostics.append(problem)
        return None
    found = _BUILDERS[form.takes](node, name, form, arguments, context)
    return replace(found, classes=shape.classes) if found is not None and chooses else found


def _other_word(node: ast.Expr, name: str, context: MeasureContext) -> str:
    """What to write where something else than a metric stands."""
    rows = context.table.runs["clean"].rows
    if name in context.metrics:
        return f"`{name}` is defined in this file: write it alone, without brackets"
    if isinstance(node, ast.Name) and rows and name in rows[0].values:
        return f"`{name}` is a value of the prompts, and metrics are read off the model's output"
    if name == "auc":
        return "the area under a curve is an expectation: `expect auc(prob, k) < 0.4`"
    known = ", ".join(METRICS)
    return did_you_mean(name, [*METRICS, *context.metrics], f"metrics are {known}")


def _form(
    forms: Mapping[Takes, Form], arguments: tuple[ast.Argument, ...], context: MeasureContext
) -> Form | None:
    """The form that fits the number and kind of the arguments."""
    values = [a.value for a in arguments if a.name is None]
    if any(a.name not in (None, DIGITS) for a in arguments):
        return None
    if not arguments:
        return (
            (forms.get("own") if context.at is not None else None)
            or forms.get("nothing")
            or forms.get("prompt")
            or forms.get("observation")
            or next((f for f in forms.values() if f.default is not None), None)
        )
    if len(values) == 2 and "activations" in forms:
        return forms["activations"]
    ranges = [isinstance(each, ast.Range) for each in values]
    sets = [wide or is_list(context.table, each) for wide, each in zip(ranges, values, strict=True)]
    if values and "numerals" in forms and all(ranges if "any" in forms else sets):
        return forms["numerals"]
    if not values:
        return None
    if len(arguments) > 1 or any(sets):
        return forms.get("any")
    if isinstance(values[0], ast.Quantity | ast.Site):
        return None
    return forms.get("target") or forms.get("continuation") or forms.get("reference")


def _misfit(forms: Mapping[Takes, Form], given: int) -> str:
    """Why no form of a metric fits, by how many arguments it is given."""
    alone = {"nothing", "prompt", "own", "observation"}
    most = 2 if "activations" in forms else 0 if alone.issuperset(forms) else 1
    if not given:
        return "it has no argument"
    if given <= most or not {"any", "numerals"}.isdisjoint(forms):
        return "its argument doesn't fit"
    return f"it takes {plural(most, 'argument') if most else 'no argument'}, not {given}"


_USAGE: Mapping[Takes, str] = {
    "target": "`{}(answer)`",
    "any": "`{}(answer, wrong)`",
    "continuation": "`{}(answer)`",
    "numerals": "`{}(1..9)`",
    "reference": "`{}(clean)`",
    "class": "`{}(class answer)`",
    "label": "`{}(class answer)`",
    "nothing": "`{}`",
    "prompt": "`{}`",
    "own": "`{}`, with `at`",
    "activations": "`{}(L3.resid, clean)`",
    "observation": "`{}`, beside a line `observe attention …`",
}


def _usage(name: str, forms: Mapping[Takes, Form]) -> str:
    return " or ".join(dict.fromkeys(_USAGE[takes].format(name) for takes in forms))


Builder = Callable[[ast.Expr, str, Form, tuple[ast.Argument, ...], MeasureContext], Atom | None]


def _plain(
    node: ast.Expr,
    name: str,
    form: Form,
    arguments: tuple[ast.Argument, ...],
    context: MeasureContext,
) -> Atom:
    return Atom(node, name, form)


def _of_attention(
    node: ast.Expr,
    name: str,
    form: Form,
    arguments: tuple[ast.Argument, ...],
    context: MeasureContext,
) -> Atom | None:
    if context.observed is None or context.observed.word != name:
        hint = "add a line `observe attention layer * head * from last token to …`"
        refuse(context, node.span, "nothing says which attention", hint)
        return None
    return Atom(node, name, form)


def _of_text(
    node: ast.Expr,
    name: str,
    form: Form,
    arguments: tuple[ast.Argument, ...],
    context: MeasureContext,
) -> Atom | None:
    """`logit(T)`, `logprob(T)`: the token ids of T, for every row and environment."""
    text: Any = (
        arguments[0].value if arguments else ast.Name(form.default or "answer", span=node.span)
    )
    envs = environments([text], context)
    if envs is None:
        return None
    by_item = None not in envs
    texts: dict[Env, tuple[tuple[int, ...], ...]] = {}
    for env in envs:
        extra = context.names_of(env)
        found, problems = text_tokens(context.table, text, tokenizer=context.tokenizer, extra=extra)
        context.diagnostics.extend(problems)
        if any(p.severity == "error" for p in problems):
            return None
        if form.takes == "target":
            long = next(((n, t) for n, t in enumerate(found) if len(t.ids) != 1), None)
            if long is not None:
                context.diagnostics.append(multi_token([text], name, *long, context))
                return None
        texts[env] = tuple(t.ids for t in found)
    several = any(len(ids) != 1 for rows in texts.values() for ids in rows)
    several = several and not context.tokenizer.stands_in
    by_item = by_item or not context.names_of(None).keys().isdisjoint(names_in(text))
    if several and (by_item or context.at is not None):
        context.diagnostics.append(
            NotSupported(
                span=text.span,
                what="a text of several tokens "
                + ("that differs by cell" if by_item else "read before the end of the prompt"),
            )
        )
        return None
    return Atom(node, name, form, texts=texts)


def _of_class(
    node: ast.Expr, name: str, form: Form, wanted: ast.ClassOutput, context: MeasureContext
) -> Atom | None:
    """`logit(class C)`: the number of the output C, for every row."""
    shape, model = context.sites.shape, context.sites.model
    problem = refused_class(node, name, wanted, shape, model)
    if problem is not None:
        context.diagnostics.append(problem)
        return None
    numbers, problems = class_numbers(wanted, context.table, shape, model)
    chooses = of_classes(form, shape)
    if chooses and not problems:
        lacking = without_classes(node, context.table, shape, model)
        lacking = lacking or not_a_class(wanted, numbers, shape, model)
        problems = [] if lacking is None else [lacking]
    context.diagnostics.extend(problems)
    if problems:
        return None
    texts: dict[Env, tuple[tuple[int, ...], ...]] = {None: tuple((n,) for n in numbers)}
    classes = shape.classes if chooses else 0
    return Atom(node, name, form, texts=texts, of_class=True, classes=classes)


def _of_run(
    node: ast.Expr,
    name: str,
    form: Form,
    arguments: tuple[ast.Argument, ...],
    context: MeasureContext,
) -> Atom | None:
    run = _reference(arguments[0].value, context)
    return None if run is None else Atom(node, name, form, run=run)


def _of_activations(
    node: ast.Expr,
    name: str,
    form: Form,
    arguments: tuple[ast.Argument, ...],
    context: MeasureContext,
) -> Atom | None:
    site = arguments[0].value
    if isinstance(site, ast.ShortSite):
        site = ast.Site(short=site, span=site.span)
    elif isinstance(site, ast.Name):
        site = ast.Site(names=(site,), span=site.span)
    if not isinstance(site, ast.Site):
        refuse(
            context,
            site.span,
            "its first argument is not a site",
            "write `cosine(resid_post layer 5, clean)`",
            of=node.span,
        )
        return None
    targets, axes = resolve_site(site, context.sites)
    run = _reference(arguments[1].value, context)
    if targets is None or run is None:
        return None
    if any(len(points) != 1 for points in targets.points.values()):
        context.diagnostics.append(
            AxisDoesNotFit(
                span=site.span,
                site=site.span.written,
                reason="joins several sites",
                hint="name one layer (and one head or neuron), or sweep: `layer *`",
            )
        )
        return None
    # Loops have one value here, that of the cells in work: only its own axes tell points apart.
    own = [n for n, of in enumerate(targets.axes) if of not in context.sites.loops]
    found = {tuple(key[n] for n in own): points[0] for key, points in targets.points.items()}
    if not axes:
        return Atom(node, name, form, run=run, point=found[()])
    return Atom(node, name, form, run=run, points=found, axes=axes)


def _of_python(node: ast.Call, context: MeasureContext) -> Atom | None:
    """A function of a Python file. Nothing of it runs before there are logits."""
    use = metric_use(node)
    function, problems = find_function(node, use)
    context.diagnostics.extend(problems)
    if function is None or (use == "reply" and not has_reply(node, context)):
        return None
    takes = "reply" if use == "reply" else "rows"
    form = Form(takes, "", "number", function.call, "a function of a Python file")
    rows = tuple(
        {
            **row.values,
            **{name: text.text for name, text in row.texts.items()},
            # No name of a value has a dot, so these take none of their places.
            **{f"{name}.ids": text.ids for name, text in row.texts.items()},
        }
        for row in context.table.runs["clean"].rows
    )
    tokenizer = None if function.tokenizer == "nothing" else context.tokenizer
    return Atom(node, function.name, form, python=function, rows=rows, tokenizer=tokenizer)


def known_run(value: Any, context: MeasureContext) -> str | None:
    """The run that `kl(clean)` names; E0201 where the block has none of that name."""
    name = value.id if isinstance(value, ast.Name) else ""
    if isinstance(value, ast.Attribute):  # a corruption of another block
        name = f"{value.name}.{value.attribute}"
    found = run_called(name, context.table.runs)
    if found is not None:
        return found
    runs = list(context.table.runs)
    known = name_list(runs)
    context.diagnostics.append(
        UnknownName(
            span=value.span,
            kind="run",
            name=value.span.written,
            hint=did_you_mean(name, runs, f"runs are {known}"),
        )
    )
    return None


def _reference(value: Any, context: MeasureContext) -> str | None:
    """The run that a metric compares with; one with several draws of noise is no single run."""
    run = known_run(value, context)
    if run is not None and context.table.runs[run].draws > 1:
        context.diagnostics.append(
            NotSupported(span=value.span, what="a comparison with several draws of noise")
        )
        return None
    return run


_BUILDERS: Mapping[Takes, Builder] = {
    "target": _of_text,
    "continuation": _of_text,
    "any": of_set,
    "numerals": of_set,
    "reference": _of_run,
    "nothing": _plain,
    "prompt": _plain,
    "own": _plain,
    "observation": _of_attention,
    "activations": _of_activations,
}
