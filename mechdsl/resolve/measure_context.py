"""What measures of one experiment are resolved against, and how they are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e05_data import MultiTokenText
from mechdsl.diagnostics.e06_experiment import UnreadableMeasure
from mechdsl.prompts.answer_sets import is_list
from mechdsl.prompts.answers import clean_text
from mechdsl.prompts.prompt_table import PromptTable, TextTokens
from mechdsl.prompts.reply_positions import NO_REPLIES, ReplyTokens
from mechdsl.prompts.rows import CLEAN
from mechdsl.prompts.text_spacing import single_token_spelling
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.resolve.coordinates import SiteContext
from mechdsl.resolve.observation import Observation
from mechdsl.resolve.resolved import Env
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

LITERAL_ENV = "item.index"


@dataclass
class MeasureContext:
    """What measures of one experiment are resolved against."""

    table: PromptTable
    tokenizer: TextTokenizer
    sites: SiteContext
    items: tuple[int, ...]
    """Occurrences that the position axis runs over; empty where it runs over none."""
    diagnostics: list[Diagnostic] = field(default_factory=list)
    at: ast.Position | None = None
    """Where the measure in work is read; None is the last token."""
    observed: Observation | None = None
    """What the experiment looks at."""
    names: Collection[str] = ()
    """What a measure may call it."""
    reads_observed: bool = False
    """Whether the measure in work is of that."""
    metrics: Collection[str] = ()
    """Names of the metrics that the file defines."""
    reply: tuple[object, ...] | None = None
    """How the experiment writes replies; None where it writes none."""
    loop_values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of the `for` variables that measures name, in the cells in work."""

    replies: ReplyTokens = NO_REPLIES
    """Those that are written behind the prompts."""

    def names_of(self, env: Env) -> dict[str, Any]:
        """What names in texts and sets stand for beside a row's own: an occurrence, and variables
        of a `for` that aren't called like something of the rows."""
        rows = self.table.sources[:1]
        loops = {
            name: value
            for name, value in self.loop_values.items()
            if not any(row.known(name) for row in rows)
        }
        return loops if env is None else {**loops, LITERAL_ENV: env}

    @property
    def parameters(self) -> Mapping[str, Any]:
        return self.sites.parameters


def refuse(
    context: MeasureContext, span: Span, reason: str, hint: str, of: Span | None = None
) -> None:
    """E0612 at a span; `of` is the whole metric, where the span is a part of it."""
    context.diagnostics.append(
        UnreadableMeasure(span=span, text=(of or span).written, reason=reason, hint=hint)
    )


def environments(parts: Sequence[object], context: MeasureContext) -> Sequence[Env] | None:
    """The occurrences that what is named hangs on; E0612 where the experiment has none."""
    by_item = [
        node
        for part in parts
        for node in walk(part)
        if (isinstance(node, ast.String) and LITERAL_ENV in node.value)
        or (isinstance(node, ast.Attribute) and f"{node.name}.{node.attribute}" == LITERAL_ENV)
    ]
    if not by_item:
        return (None,)
    if context.items:
        return context.items
    refuse(
        context,
        by_item[0].span,
        "`{item.index}` needs a sweep over occurrences",
        "sweep over them: `at each item token`",
    )
    return None


def multi_token(
    parts: Sequence[ast.Node], name: str, row: int, long: TextTokens, context: MeasureContext
) -> Diagnostic:
    """E0507 for a text of several tokens in a row, one of those that `parts` of a metric name."""
    tokenizer = context.tokenizer.reading(written=context.table.runs[CLEAN].chat)
    meant = None
    if not isinstance(parts[0], ast.EdgeTokenOf):
        meant = single_token_spelling(clean_text(context.table, row), long.text, tokenizer)
    if meant is not None:
        hint = f"{meant.advice}: then it is one token"
    else:
        hint = f"`{name}({', '.join(map(_first_token, parts))})`"
        if len(parts) == 1 and not is_list(context.table, parts[0]):
            hint = f"`logprob({parts[0].span.written})`, which is summed over its tokens, or {hint}"
        hint = f"write {hint}"
    return MultiTokenText(
        span=parts[0].span.to(parts[-1].span),
        text=long.text,
        tokens=" ".join(f"`{context.tokenizer.token_text(i)}`" for i in long.ids),
        metric=name,
        hint=hint,
    )


def _first_token(part: ast.Node) -> str:
    written = part.span.written
    whole = isinstance(part, ast.Range | ast.EdgeTokenOf)
    return written if whole else f"first token of {written}"
