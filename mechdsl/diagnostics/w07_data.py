"""W0701 to W0705, W0781, W0790, W0791: what looks like a mistake but runs."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class TokenCoversMore(Diagnostic):
    code = "W0701"
    hangs_on = frozenset({"tokens"})
    title = "tokens of `{name}` also cover text beside it"
    label = "{tokens}, in {rows} of {total} rows"
    help = "put a space between them in the template, or read the result as that of both"
    name: str
    tokens: str
    rows: int
    total: int


@keyword_record
class UnknownWords(Diagnostic):
    code = "W0702"
    hangs_on = frozenset({"tokens"})
    title = "the tokenizer doesn't know {words}"
    label = "read as `{unknown}` in {rows} of {total} rows of `{run}`"
    help = "use words that the model's vocabulary holds"
    words: str
    unknown: str
    rows: int
    total: int
    run: str


@keyword_record
class AnswerChangesPrompt(Diagnostic):
    code = "W0703"
    hangs_on = frozenset({"tokens"})
    title = "the end of the prompt and {text} share a token"
    label = "in {rows} of {total} rows the prompt is tokenised otherwise with the answer behind it"
    help = "{hint}"
    text: str
    rows: int
    total: int
    hint: str


@keyword_record
class TextSpacing(Diagnostic):
    """A text that follows its prompt with no space or with two, and is read as other tokens."""

    code = "W0705"
    hangs_on = frozenset({"tokens"})
    title = "there {spaces} between the prompt and {text}"
    label = "the model reads `{joined}` in {rows} of {total} rows"
    help = "{hint}, unless it is meant so"
    spaces: str
    text: str
    joined: str
    rows: int
    total: int
    hint: str


@keyword_record
class PairedAlike(Diagnostic):
    """Rows of two blocks that are paired by number and have the same value each time."""

    code = "W0704"
    title = "rows of `{source}` and `{base}` that are paired have the same `{name}`"
    label = "says `{name}` on its diagonal, whichever of the two runs is heard"
    help = "write `from {source} shuffled into {base}`: then rows are dealt to each other"
    source: str
    base: str
    name: str


@keyword_record
class NotAllRows(Diagnostic):
    """A table so long that `validate` looks at its first rows only."""

    code = "W0790"
    title = "only the first {rows:,} rows of {unit}s `{prompts}` were checked"
    label = "has more rows than `validate` looks at"
    help = "a run checks every row before it starts; `limit {rows}` takes as many as were checked"
    prompts: str
    rows: int
    unit: str = "prompt"
    """What a row is: a prompt or an image."""


@keyword_record
class EqualRecords(Diagnostic):
    """Rows of a file that say the same count as often as they stand there."""

    code = "W0781"
    title = "{equal:,} of {rows:,} rows of {unit}s `{prompts}` are equal to another"
    label = "these records are there more than once, and each of them counts"
    help = "write `rows {file} distinct` for one of each: intervals take rows as independent"
    prompts: str
    file: str
    equal: int
    rows: int
    unit: str = "prompt"
    """What a row is: a prompt or an image."""


@keyword_record
class TemplateUnchanged(Diagnostic):
    """A corruption changes prompts of other templates, but none of one template."""

    code = "W0791"
    hangs_on = frozenset({"rows"})
    title = "`{run}` changes nothing in the rows of {templates}"
    label = "leaves {rows} unchanged, which are left out"
    help = "let every template show a value that `{run}` changes, or remove those that don't"
    run: str
    templates: str
    """`template 2 (line 9)`, or several."""
    rows: str
    """`12 rows`."""
