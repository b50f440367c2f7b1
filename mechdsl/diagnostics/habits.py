"""Habits from Python, other tools and papers: a table of wrong spellings and their replacements."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from mechdsl.base.text import STRING_PATTERN, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.other_tools import (
    METRIC_NAMES,
    SITE_NAMES,
    SITE_WORDS,
    translate_path,
    translate_word,
)

Group = str | None
Replacement = str | Callable[[list[Group], str], str | None]
"""A format string over the groups, or a function of the groups and the text before the statement;
None if the habit doesn't apply."""

WRITE = "write `{rewrite}`"

SWEEPS = "write `{rewrite}`; a plural joins them, and a singular word makes one run for each"

SHARES = "write `{rewrite}` for a range, and a percent sign in a share, as in `25%`"

MAX_LENGTH = 2000
"""Maximum length, in characters, of a statement in which habits are searched."""

BOTH_ENDS = "a range includes both ends: write `{rewrite}`"


class Habit(NamedTuple):
    """A wrong spelling and the text that replaces it.

    pattern: Searched in a statement whose quoted texts are masked. The part `(?P<x>…)` is replaced,
    or else the whole match.
    """

    pattern: str
    text: Replacement
    advice: str = WRITE


class Rewrite(NamedTuple):
    """A replacement of a part of a statement; `start` and `end` are offsets in the statement."""

    start: int
    end: int
    text: str
    advice: str = WRITE

    def put_into(self, statement: str) -> str:
        """Return the rewritten statement."""
        return statement[: self.start] + self.text + statement[self.end :]

    def joined(self, later: Rewrite, statement: str) -> Rewrite:
        """Return one replacement for this one and a later one in the rewritten `statement`."""
        longer = len(self.text) - (self.end - self.start)
        start, end = min(self.start, later.start), max(self.end + longer, later.end)
        text = statement[start : later.start] + later.text + statement[later.end : end]
        advice = self.advice if self.advice == later.advice else WRITE
        return Rewrite(start, end - longer, text, advice)


@dataclass(frozen=True)
class Place:
    """A part of statements, with the codes of errors that its habits cause and explain."""

    codes: frozenset[str]
    habits: tuple[Habit, ...]


def _slice(groups: list[Group], before: str) -> str:
    """Return `tokens A..B` for `[A:B]`; B is excluded, as in Python."""
    first, stop = groups[-2] or "0", groups[-1]
    if not groups[-2] and not stop:
        return "tokens *"
    return f"tokens {first}..{int(stop) - 1 if stop else -1}"


def _exclusive(groups: list[Group], before: str) -> str:
    """Return `AXIS A..B` for the axis, the start and the excluded end of a range."""
    axis, first, stop = groups
    return f"{axis or ''} {first or 0}..{max(0, int(stop or 0) - 1)}".lstrip()


def _listed(groups: list[Group], before: str) -> str:
    return f"{groups[0]} {', '.join((groups[1] or '').split())}"


def _site(groups: list[Group], before: str) -> str | None:
    word, axes, number, *_ = groups
    rest = f" {axes}" if axes else f" {number}" if number else ""
    return translate_word(word or "", rest)


def _metric(groups: list[Group], before: str) -> str:
    """Return the metric of a name, with the arguments in place of those in the table."""
    name, listed = groups
    metric = METRIC_NAMES[name or ""]
    arguments = [part.strip() for part in (listed or "").split(",")]
    arguments = [part for part in arguments if part not in ("", "logits", "patched")]
    if metric == "loss" and arguments:
        return f"-logprob({arguments[0]})"
    wanted = re.findall(r"answer|wrong|clean|1\.\.9", metric)
    for old, new in zip(wanted, arguments, strict=False):
        metric = metric.replace(old, new, 1)
    return metric


def _effect_of(before: str) -> str:
    """Return the effect of the last measure before a statement."""
    effects = re.findall(r"^\s*measure\b.*\bas\s+(\w+)", before, re.MULTILINE)
    return effects[-1] if effects else "delta"


def _argmax(groups: list[Group], before: str) -> str:
    return f"argmax({_effect_of(before)}) = {groups[0]}"


def _added(groups: list[Group], before: str) -> str:
    site, sign, term = (group or "" for group in groups)
    if sign == "+":
        return f"add {term} to {site}"
    return f"add -{term if term[0].isdigit() else f'1 * {term}'} to {site}"


_AT = r"(?:\b(?:at|onto|from|to|with|between|and)\s+|[{,]\s*)"
"""The word before a position."""

_END = r"(?=\s*(?:$|[,}\n)]|(?:with|onto|into|to|as|by|top|and|during|after|in|from)\b))"
"""The end of a position: the next word or sign doesn't belong to it."""

_TOKEN = r"(?:tokens?|tok|positions?|pos|index|idx)"
_LAST = r"(?:last|final|end|ending)"
_FIRST = r"(?:first|start|beginning|begin|initial)"
_AXIS = r"\b((?:layer|head|neuron|expert|feature|dim)s?)"
_ALL = r"\b(?:all|every|each)\s+(?:the\s+)?"
_SITE = r"([a-z]\w*\s+[^\n]*?\bat\b[^\n]*?)"


def _position(pattern: str, text: Replacement, advice: str = WRITE) -> Habit:
    return Habit(rf"{_AT}(?P<x>{pattern})(?!\w)", text, advice)


POSITIONS = (
    _position(rf"(?:the\s+)?(?:very\s+)?{_LAST}(?:[\s_-]*{_TOKEN})?{_END}", "last token"),
    _position(rf"(?:the\s+)?(?:very\s+)?{_FIRST}(?:[\s_-]*{_TOKEN})?{_END}", "first token"),
    _position(rf"{_TOKEN}[\s_]*\[?\s*{_LAST}\s*\]?{_END}", "last token"),
    _position(rf"{_TOKEN}[\s_]*\[?\s*{_FIRST}\s*\]?{_END}", "first token"),
    _position(rf"(?:{_TOKEN}\s*)?\[\s*(-?[0-9]+)\s*\]", "token {0}"),
    _position(rf"(?:{_TOKEN}\s*)?\[\s*(-?[0-9]+)?\s*:\s*(-?[0-9]+)?\s*\]", _slice, BOTH_ENDS),
    _position(rf"{_TOKEN}\s*=?\s*(-?[0-9]+){_END}", "token {0}"),
    _position(r"(-?[0-9]+)" + _END, "token {0}"),
    _position(r"tokens?\s+(-?[0-9]+)\s*:\s*(-?[0-9]+)", _slice, BOTH_ENDS),
    _position(rf"(?:all|every)(?:\s+(?:the\s+)?(?:tokens|positions)|{_END})", "tokens *"),
    _position(r"everywhere", "tokens *"),
    _position(rf"(?:all|every|each|any)\s+{_TOKEN}{_END}", "token *"),
    _position(rf"second[\s-]+(?:to[\s-]+)?last(?:\s+{_TOKEN})?{_END}", "token -2"),
    _position(rf"third[\s-]+(?:to[\s-]+)?last(?:\s+{_TOKEN})?{_END}", "token -3"),
    _position(rf"penultimate(?:\s+{_TOKEN})?{_END}", "token -2"),
    _position(rf"(?:the\s+)?last\s+([0-9]+)(?:\s+{_TOKEN})?{_END}", "tokens -{0}..-1"),
    _position(rf'(?:{_TOKEN}\s+)?("[^"]*"){_END}', "{0} token"),
    _position(r"([a-z]\w*)\s*\[\s*-1\s*\]", "last token of {0}"),
    _position(r"([a-z]\w*)\s*\[\s*0\s*\]", "first token of {0}"),
    _position(rf"([a-z]\w*?)[\s._]+{_LAST}(?:[\s_]*token)?{_END}", "last token of {0}"),
    _position(rf"([a-z]\w*?)[\s._]+{_FIRST}(?:[\s_]*token)?{_END}", "first token of {0}"),
    _position(r"(last|first)\s+([a-z]\w*)\s+(tokens?)", "{0}-{1} {2}"),
    _position(r"the\s+(\S[^\n]*?\btokens?)", "{0}"),
    _position(rf"(tokens?)\s+(?:of|in)\s+(\w+){_END}", "{1} {0}"),
    Habit(rf"(?P<x>\b(?:positions?|pos|index|idx)\s*=?\s*(-?[0-9]+)){_END}", "at token {0}"),
)

_NO_EDGE = "".join(f"(?<!{word} )" for word in ("observe", "block", "reweight", "set", "allow"))
"""No word before `attention` that makes it a word of the language."""

SITES = (
    Habit(
        r"([A-Za-z_]\w*(?:\.\w+|\[\s*-?[0-9]+\s*\])+)",
        lambda groups, before: translate_path(groups[0] or ""),
    ),
    Habit(r"\b(?:mlp|MLP)\s+(layers?\s+\S+\s+neurons?)\b", "mlp_hidden {0}"),
    Habit(
        rf"{_NO_EDGE}(?<![\w.])({SITE_WORDS})(?:\s+stream)?"
        r"(?:\s+(layers?\s+[\w.*%]+(?:\s+heads?\s+[\w.*%]+)?)|\s+([0-9]+)\b)?(?![\w.(])",
        _site,
    ),
    Habit(
        r"(?:^\w+|\b(?:of|to|from))\s+(?P<x>neurons?\s+(layers?\s+\S+\s+neurons?\s+\S+))",
        "mlp_hidden {0}",
    ),
    Habit(r"^(?:(?!\blayers?\b).)*?(?P<x>\bhead\s*\(\s*([0-9]+)\s*,\s*([0-9]+)\s*\))", "L{0}H{1}"),
    Habit(rf"\b(layers?\s+[\w.*]+)\s+({SITE_NAMES})\b", "{1} {0}"),
    Habit(rf"\b({SITE_NAMES})\(\s*(?:layer\s*[=:]?\s*)?([0-9]+)\s*\)", "{0} layer {1}"),
    Habit(r"\b(layers?\s+[\w.*]+)\s*,\s*(heads?)\b", "{0} {1}"),
    Habit(r"\b[aAlL]([0-9]+)[.\s]\s*[hH]([0-9]+)\b", "L{0}H{1}"),
    Habit(r"\bL([0-9]+)\.([0-9]+)\b", "L{0}H{1}"),
)

UNITS = (Habit(r"\b(?:m|mlp|MLP|L(?=[0-9]+MLP))([0-9]+)(?:MLP)?\b", "L{0}.mlp"),)

SELECTORS = (
    Habit(r"^(?:(?!\blayers?\b).)*?(?P<x>\bhead\s+([0-9]+)\.([0-9]+))(?![\w.])", "L{0}H{1}"),
    Habit(_AXIS + r"\s+([0-9]+(?:\s+[0-9]+)+)\b", _listed),
    Habit(
        _AXIS + r"\s*=?\s*range\s*\(\s*(?:([0-9]+)\s*,\s*)?([0-9]+)\s*\)",
        _exclusive,
        BOTH_ENDS,
    ),
    Habit(_AXIS + r"\s*=?\s*([0-9]+)\s*:\s*([0-9]+)", _exclusive, BOTH_ENDS),
    Habit(_AXIS + r"\s*=?\s*\[\s*([0-9]+)?\s*:\s*([0-9]+)\s*\]", _exclusive, BOTH_ENDS),
    Habit(_AXIS + r"\s*[=:]?\s*\[\s*([0-9]+(?:\s*,\s*[0-9]+)*)\s*\]", "{0} {1}"),
    Habit(_AXIS + r"\s+([0-9]+)\s*(?:-|to\s)\s*([0-9]+)\b", "{0} {1}..{2}"),
    Habit(r"(\w+)\s*\.\.\.\s*(\w+)", "{0}..{1}"),
    Habit(rf"{_AXIS}\s+(?P<x>([0-9]+)\.([0-9]+))(?![\w.%(])", "{1}..{2}", SHARES),
    Habit(rf"(?:{_AXIS}|\bin)\s+(?P<x>(\w+)\.(\w+))(?![\w.%(])", "{1}..{2}"),
    Habit(_AXIS + r"\s*[=:]\s*([\w.*%-]+)", "{0} {1}"),
    Habit(rf"{_ALL}(layers?)\s+{_ALL}((?:head|neuron|expert)s?)\b", "{0} * {1} *", SWEEPS),
    Habit(rf"{_ALL}((?:layer|head|neuron|expert)s?)\b", "{0} *", SWEEPS),
    Habit(_AXIS + r"\s+all\b", "{0} *"),
    Habit(
        r"\bin\s+(?P<x>()range\(\s*(?:([0-9]+)\s*,\s*)?([0-9]+)\s*\))",
        _exclusive,
        BOTH_ENDS,
    ),
)

_NAMES = "|".join(METRIC_NAMES)

METRICS = (
    Habit(
        r"\bperplexity\b", "loss", "perplexity is the exponential of the loss: write `{rewrite}`"
    ),
    Habit(
        rf"(?<![\w.])({_NAMES})(?:\s*[(\[]\s*([^()\[\]]*?)\s*[)\]]|(?![\w(\[.]))",
        _metric,
    ),
    Habit(r"\b([a-z_]+)\[\s*([^\[\]]+?)\s*\]", "{0}({1})"),
)

MEASURES = (
    Habit(
        rf"^measure\s+(?P<x>({_NAMES})\s*(?:\(([^()]*)\))?)\s*$",
        lambda groups, before: f"{_metric(groups, before)} as raw",
    ),
    Habit(r"^measure\s+(?P<x>(recovery|delta|raw|relative)\s+of\s+(.+?))\s*$", "{1} as {0}"),
    Habit(r"\bas\s+(?P<x>diff|difference|change|effect)\b", "delta"),
    Habit(r"\bas\s+(?P<x>normali[sz]ed|restored|restoration)\b", "recovery"),
    Habit(r"\bas\s+(?P<x>value|absolute|patched)\b", "raw"),
)

EXPECTATIONS = (
    Habit(r"^(?P<x>assert|check|require)\b", "expect"),
    Habit(r"^expect\b.*?(?P<x>\b([a-z]\w*)\.(mean|max|min)\(\s*\))", "{1}({0})"),
    Habit(r"^expect\b.*?(?P<x>\b([a-z]\w*)\.(mean|max|min)\(\s*([^()]+?)\s*\))", "{1}({0}, {2})"),
    Habit(r"^expect\s+(?P<x>(max|min|mean)\s+([a-z]\w*))", "{0}({1})"),
    Habit(r"^expect\b.*?(?P<x>\b([a-z]\w*)\s+at\s+(L[0-9]+H[0-9]+))", "{0}({1})"),
    Habit(r"^expect\b.*?=\s*(?P<x>\(?\s*([0-9]+)\s*[.,]\s*([0-9]+)\s*\)?)\s*$", "L{0}H{1}"),
    Habit(
        r"^expect\b.*?(?P<x>\b([a-z]\w*)[\[(]\s*([0-9]+)\s*(?:,|\]\s*\[)\s*([0-9]+)\s*[\])])",
        "{0}(L{1}H{2})",
    ),
    Habit(r"^expect\b.*?(?P<x>\b([a-z]\w*)\[\s*([^\[\]]+?)\s*\])", "{0}({1})"),
    Habit(r"^expect\s+(?P<x>top\s+1\s*(?:=|is)\s*([^\n]+?))\s*$", _argmax),
    Habit(r"^expect\s+(?P<x>(?:best|argmax)\s*(?:=|is)\s*([^\n]+?))\s*$", _argmax),
)

STATEMENTS = (
    Habit(
        r"^(?P<x>denoise|restore)\s+(?:layer|head|L[0-9]|[a-z]\w*\s+(?:layer|head|at)\b)", "patch"
    ),
    Habit(
        r"^denoise\s+(\w+)\s*$",
        "from clean into {0}",
        "denoising patches from the clean run: write `{rewrite}`, and `patch` the sites",
    ),
    Habit(r"^generate\s+[0-9]+\s+(?P<x>(temperature|top_k|top_p))(?=\s+[0-9])", "with {0}"),
    Habit(r"^generate\b.*?(?P<x>\bstop\w*\s*[=:]?)\s*\"", "until"),
    Habit(
        r"^generate\s*\(?\s*(?:up\s+to\s+|max\s+)?(?:(?:max|num)_(?:new_)?(?:tokens|length)\s*[=:]?\s*)?([0-9]+)\s*\)?"
        r"(?:\s*(?:new\s+)?tokens?\b)?",
        "generate {0}",
    ),
    Habit(r"\b(temperature|top_k|top_p|samples|limit|seed)\s*[=:]\s*([0-9][\w.]*)", "{0} {1}"),
    Habit(r"\bwith\s+(?P<x>(mean|zero|resample)(?:\s*\(\s*\)|_?ablation))", "{0}"),
    Habit(r"^(ablate\s[^\n]+?)\s+(with\s+\w+)\s+(at\s[^\n]+?)\s*$", "{0} {2} {1}"),
    Habit(rf"^(?:zero|knock)(?:[\s_]?out)?\s+{_SITE}\s*$", "ablate {0} with zero"),
    Habit(
        r"^(?:patch|ablate|freeze|scale|clamp)\s(?:(?!\bat\b).)*?\s"
        r"(?P<x>((?:last|first)\s+token|tokens?\s+[-0-9*.]+))",
        "at {0}",
    ),
    Habit(r"\bwith\s+(?P<x>zeros?\s*\(\s*\)|zeros|zeroes|0(?:\.0+)?)" + _END, "zero"),
    Habit(r"\bwith\s+(?P<x>(?:average|avg)(?:\s*\(\s*\))?)", "mean"),
    Habit(r"^([a-z]\w*\s[^\n]*?)\s*([+-])=\s*(\S[^\n]*?)\s*$", _added),
    Habit(rf"^add\s+([^\n]+?)\s+(?:at|in|on|into)\s+{_SITE}\s*$", "add {0} to {1}"),
    Habit(
        rf"^(?:ablate|remove|erase)\s+([a-z]\w*)\s+from\s+{_SITE}\s*$", "project out {0} from {1}"
    ),
    Habit(rf"^steer\s+{_SITE}\s+with\s+([^\n]+?)\s*$", "add {1} to {0}"),
    Habit(
        r'\b(?:LanguageModel|load_model|transformers|AutoModel\w*)\(\s*("[^"]*")[^()]*\)', "hf({0})"
    ),
    Habit(r'\b(?:\w+\s*\.\s*)*from_pretrained\(\s*("[^"]*")[^()]*\)', "hf({0})"),
    Habit(r"^observe\s+(?P<x>attention\s+(?:pattern|weights?|scores?|probs))\b", "attention"),
    Habit(r"^observe\s+(?P<x>(logit|tuned)\s+lens)\b", "{0}_lens"),
    Habit(r"^observe\s+(?P<x>direct\s+logit(?:\s+attribution)?|dla)\b", "direct_logit"),
    Habit(r"^observe\s+(?P<x>([a-z]\w*\s[^\n]*?)\s+(norm|value|entropy))\s+at\b", "{1} {0}"),
    Habit(r"^(?:group|circuit)\s+\w+\s*=\s*(?P<x>[\[{]\s*([^\[\]{}]*?)\s*[\]}])", "{0}"),
    Habit(
        r"^(zero|mean|resample)_?ablat(?:e|ion)\s+(\S[^\n]*?)\s*$",
        "ablate {1} with {0}",
    ),
    Habit(
        r"^(\w+)\s+(at\s+[\w-]+\s+tokens?)\s+([^\n]*\S)\s*$",
        "{0} {2} {1}",
    ),
    Habit(r'^model\s*=?\s*("[^"]*")', "model m = hf({0})"),
)

PLACES: tuple[Place, ...] = (
    Place(frozenset({"E0101", "E0308", "E0322"}), POSITIONS),
    Place(frozenset({"E0101", "E0322"}), SELECTORS),
    Place(frozenset({"E0101", "E0203 component"}), SITES),
    Place(frozenset({"E0203 component"}), UNITS),
    Place(frozenset({"E0203 metric", "E0612"}), METRICS),
    Place(frozenset({"E0101", "E0203 effect"}), MEASURES),
    Place(frozenset({"E0101", "E0606"}), EXPECTATIONS),
    Place(
        frozenset(
            {"E0101", "E0203 stack", "E0203 observation", "E0203 fill of an ablation", "E0207"}
        ),
        STATEMENTS,
    ),
)

_HIDDEN = re.compile(rf"{STRING_PATTERN}|#[^\n]*")


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _mask(match: re.Match[str]) -> str:
    sign = match[0][0]
    return " " * len(match[0]) if sign == "#" else f'"{"_" * (len(match[0]) - 2)}"'


def find_rewrites(
    statement: str, start: int, end: int, cause: str, before: str = ""
) -> Iterator[Rewrite]:
    """Yield replacements of the text that an error marks, in the order of the table.

    Args:
        start: Offset in the statement where the marked text begins.
        end: Its end; for the point where the parser stopped, `start`. What a parser that read on
            misunderstood may be before it.
        cause: The code of the error, for E0203 with the type of the unknown word.
        before: The text before the statement.
    """
    masked = _HIDDEN.sub(_mask, statement)
    for habit in (each for place in PLACES if cause in place.codes for each in place.habits):
        pattern = _compiled(habit.pattern)
        number = pattern.groupindex.get("x", 0)
        for match in pattern.finditer(masked):
            first, last = match.span(number)
            if first >= max(end, start + 1) or (start < end and last <= start):
                continue
            groups = [
                None if match.start(n) < 0 else statement[slice(*match.span(n))]
                for n in range(1, pattern.groups + 1)
                if n != number
            ]
            if isinstance(habit.text, str):
                text = habit.text.format(*(group or "" for group in groups))
            else:
                text = habit.text(groups, before)
            if text is not None and text != statement[first:last]:
                yield Rewrite(first, last, text, habit.advice)


def suggest_rewrite(problem: Diagnostic) -> Diagnostic:
    """Return an error with the fix of the habit that it marks, if there is one."""
    span = problem.span
    if span is None or problem.severity != "error" or problem.code == "E0101":
        return problem
    if not any(each.startswith(problem.code) for place in PLACES for each in place.codes):
        return problem
    source = span.source.text
    begin = source.rfind("\n", 0, span.start) + 1
    end = source.find("\n", begin) + 1 or len(source)
    line = source[begin:end].strip()
    if len(line) > MAX_LENGTH:
        return problem
    begin = source.index(line, begin)
    kind = getattr(problem, "kind", "")
    cause = f"{problem.code} {kind}" if problem.code == "E0203" else problem.code
    rewrites = find_rewrites(line, span.start - begin, span.end - begin, cause, source[:begin])
    for each in rewrites:
        marked = Span(span.source, begin + each.start, begin + each.end)
        return replace(problem, span=marked, rewrite=each.text, rewrite_help=each.advice)
    return problem
