"""`generate n`, and when rules act while a model writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mechdsl.base import limits
from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument, UnknownWord, did_you_mean
from mechdsl.program.constants import constant, whole_number
from mechdsl.program.sort_statements import Statements
from mechdsl.program.spec_replies import During, Generation, RepliesOf
from mechdsl.syntax import ast


class Setting(NamedTuple):
    """What may stand behind `with`."""

    whole: bool
    least: float
    most: float
    says: str
    example: str


SHOW_REPLIES = frozenset({"texts", "json"})
"""Reports that need no measure: they have the replies."""
SETTINGS: Mapping[str, Setting] = {
    "temperature": Setting(False, 1e-6, 1e6, "must be a number above 0", "temperature 0.7"),
    "top_k": Setting(True, 1, 1e9, "must be a whole number above 0", "top_k 50"),
    "top_p": Setting(False, 1e-9, 1.0, "must be a number above 0 and at most 1", "top_p 0.9"),
    "samples": Setting(
        True, 1, limits.REPLIES, f"must be a whole number, 1 to {limits.REPLIES:,}", "samples 3"
    ),
}


def lower_replies(work: Statements) -> RepliesOf | None:
    """Whose replies stand behind the prompts, if any do; E0108 beside `generate`."""
    said = work.prompts[0].replies if work.prompts else None
    if said is None:
        return None
    if work.generate:
        work.diagnostics.append(
            NotSupported(
                span=work.generate[0].span,
                what="`generate` behind replies",
                later="write the whole text in one experiment, with more tokens, or name the "
                "replies in another one",
            )
        )
    if isinstance(said, ast.Name):
        return RepliesOf(span=said.span, of=said.id)
    return RepliesOf(span=said.span, of=said.name, cell=said.arguments)


def length_of_replies(line: ast.Generate) -> ast.Measure:
    """What an experiment measures that only writes."""
    source = Source("measure length as raw", line.span.source.path)
    length, raw = (
        ast.Name(word, span=Span(source, begin, begin + len(word)))
        for word in ("length", "raw")
        for begin in [source.text.index(word)]
    )
    return ast.Measure(length, raw, span=line.span)


def lower_generation(work: Statements) -> Generation | None:
    """The `generate` line of an experiment; None where it has none. After an error another one
    stands for it.

    E0201, E0203, E0207 for numbers that can't be taken, and for sampling without a seed.
    """
    if not work.generate:
        return None
    line = work.generate[0]
    found = _generation(line, work)
    return Generation(span=line.span, tokens=2) if found is None else found


def _generation(line: ast.Generate, work: Statements) -> Generation | None:
    """The line, None after an error."""
    tokens = whole_number(line.tokens, work.parts.parameters)
    if isinstance(line.tokens, str) and not work.scope.use("param", line.tokens, line.span):
        return None
    if tokens is None or not 1 <= tokens <= limits.WRITTEN:
        return _refuse(
            line,
            "generate",
            f"must be a whole number of tokens, 1 to {limits.WRITTEN:,}",
            "write how many tokens a reply has at most: `generate 40`",
            work,
        )
    stops: list[str] = []
    for stop in line.stops:
        if not stop.value:
            _refuse(stop, '""', "is an empty text, which ends every reply", "leave it out", work)
        elif stop.value not in stops:
            stops.append(stop.value)
    given = _settings(line, work)
    if given is None:
        return None
    if given and work.parts.seeded is None:
        return _refuse(
            line.settings[0],
            line.settings[0].name.id,
            "draws tokens at random, and the file has no seed",
            "add a line such as `seed 7` at the top of the file: the same seed gives the same "
            "replies; without `with …` the most likely token is taken",
            work,
        )
    if given:
        given.setdefault("temperature", 1.0)
    return Generation(span=line.span, tokens=tokens, stops=tuple(stops), **given)


def _settings(line: ast.Generate, work: Statements) -> dict[str, Any] | None:
    """The numbers behind `with`, by name; None after an error."""
    found: dict[str, Any] = {}
    before = len(work.diagnostics)
    for each in line.settings:
        name, known = each.name.id, SETTINGS.get(each.name.id)
        if known is None:
            hint = did_you_mean(name, SETTINGS, f"settings are {', '.join(SETTINGS)}")
            work.diagnostics.append(
                UnknownWord(span=each.name.span, kind="setting", word=name, hint=hint)
            )
            continue
        if name in found:
            _refuse(each, name, "is given twice", "keep one of them", work)
            continue
        named = each.value if isinstance(each.value, ast.Name) else None
        if named is not None and not work.scope.use("param", named.id, named.span):
            continue
        value = constant(each.value, work.parts.parameters)
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
        if (
            number is None
            or not known.least <= number <= known.most
            or (known.whole and number != int(number))
        ):
            hint = f"for example `{known.example}`"
            if name == "temperature" and number == 0:
                hint = "leave it out: without `with …` the most likely token is taken"
            _refuse(each, name, known.says, hint, work)
            continue
        found[name] = int(number) if known.whole else float(number)
    return None if len(work.diagnostics) > before else found


def lower_during(rule: ast.Rule, work: Statements) -> During | None:
    """When a rule acts; None at each step, and after an error.

    E0203 for a phase that there isn't, E0207 for steps that there are not; those that a `for` runs
    over are looked at where its values are known.
    """
    node = rule.during
    if node is None or not _has_reply(node, work):
        return None
    if node.phase == "each step":
        return None
    if node.phase == "after prefill":
        return During(span=node.span, first=0, last=0, after_prefill=True)
    if node.phase == "named":
        word = node.name or ""
        if word == "prefill":
            return During(span=node.span, first=0, last=0)
        otherwise = "write `during prefill`, `during each step` or `during step 2..5`"
        hint = did_you_mean(word, ["prefill"], otherwise)
        work.diagnostics.append(
            UnknownWord(span=node.span, kind="part of a reply", word=word, hint=hint)
        )
        return None
    return _steps(node, work)


def _steps(node: ast.During, work: Statements) -> During | None:
    """`during step 2..5`."""
    steps = node.steps
    assert steps is not None
    if isinstance(steps, ast.Star):
        return None  # each
    ends = [_end(end, work) for end in (steps.low, steps.high or steps.low)]
    low, high = ends
    if low is None or high is None:
        return None
    if isinstance(low, int) and isinstance(high, int):
        tokens = whole_number(work.generate[0].tokens, work.parts.parameters)
        problem = wrong_steps(low, high, tokens)
        if problem is not None:
            _refuse(node, steps.span.written, *problem, work)
            return None
    return During(span=node.span, first=low, last=high)


def wrong_steps(low: int, high: int, tokens: int | None) -> tuple[str, str] | None:
    """(what is wrong with these steps of a reply of so many tokens, help), where something is."""
    if low < 0:
        return "must be a number of a step, from 0", "step 0 is the prefill"
    if high < low:
        return "has no step in it", f"write the smaller one first: `step {high}..{low}`"
    if tokens is not None and 0 < tokens <= high:
        there = f"`generate {tokens}` has steps 0 to {tokens - 1}"
        hint = "step 0 is the prefill, and the last token needs no step"
        return f"has steps that no reply has: {there}", hint
    return None


def _end(bound: ast.Bound, work: Statements) -> int | ast.Bound | None:
    """One end of a range of steps: a number, or, where it hangs on a `for`, as it is written; None
    after E0201."""
    if bound.percent is not None:
        return -1  # no step
    if bound.name is None:
        return bound.value
    if any(loop.name == bound.name for loop in work.loops):
        return bound
    if not work.scope.use("param", bound.name, bound.span):
        return None
    value = whole_number(bound.name, work.parts.parameters)
    return -1 if value is None else value + bound.offset


def _has_reply(node: ast.During, work: Statements) -> bool:
    """E0207 where nothing is written, so that there are no steps."""
    if work.generate:
        return True
    said = " ".join(node.span.written.split())
    _refuse(
        node,
        said,
        "is of a reply, and this experiment writes none",
        "add a line such as `generate 40`, or leave it out",
        work,
    )
    return False


def within_run(rule: ast.Rule, work: Statements) -> None:
    """E0108 for a rule of a `run` that says when it acts: a run is of the prompts alone."""
    if rule.during is not None:
        later = "write the rule in the experiment; a `run` is of the prompts, and writes no reply"
        said = " ".join(rule.during.span.written.split())
        work.diagnostics.append(
            NotSupported(span=rule.during.span, what=f"`{said}` in a `run`", later=later)
        )


def _refuse(node: ast.Node, name: str, reason: str, hint: str, work: Statements) -> None:
    work.diagnostics.append(BadArgument(span=node.span, name=name, reason=reason, hint=hint))
