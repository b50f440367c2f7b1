"""E05xx, W070x, W079x: prompts, data files, tokenizers, answers and chats."""

from __future__ import annotations

from mechdsl.diagnostics.core import BlockDiagnostic, Diagnostic, HintedDiagnostic, RowsDiagnostic


class UnknownValue(HintedDiagnostic, BlockDiagnostic):
    code = "E0501"
    depends_on = frozenset({"columns"})
    title = "{unit}s `{prompts}` have no value or column `{name}`"
    label = "unknown"
    name: str


class CyclicValue(Diagnostic):
    code = "E0502"
    title = "`{name}` is defined in terms of itself: {path}"
    label = "part of the cycle"
    help = "give one of them independent values, such as `{name} in 1..9`"
    name: str
    path: str


class BadValue(HintedDiagnostic):
    code = "E0503"
    depends_on = frozenset({"rows"})
    title = "`{expression}` can't be evaluated: {reason}"
    label = "in {rows}"
    expression: str
    reason: str
    rows: str


class UnreadableData(HintedDiagnostic):
    code = "E0504"
    title = "`{path}` can't be read: {reason}"
    label = "read from here"
    path: str
    reason: str


class DataFormat(HintedDiagnostic):
    code = "E0505"
    title = "`{path}` has no readable data: {reason}"
    label = "this file"
    path: str
    reason: str


class TooManyValues(HintedDiagnostic):
    code = "E0506"
    depends_on = frozenset({"rows"})
    title = "{what}: {amount} exceed the limit of {most:,}"
    label = "too many"
    what: str
    amount: str
    most: int


class MultiTokenText(HintedDiagnostic):
    code = "E0507"
    depends_on = frozenset({"tokens"})
    title = "`{metric}` needs a one-token text, but `{text}` has several tokens"
    label = "tokenised as {tokens}"
    text: str
    tokens: str
    metric: str


class UnreadableTokenizer(Diagnostic):
    code = "E0508"
    title = "the tokenizer of `{path}` can't be read: {reason}"
    label = "this model"
    help = (
        "positions need the character offsets of a `tokenizer.json`; transformers writes one "
        "with `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
    )
    path: str
    reason: str


class NoRows(HintedDiagnostic, BlockDiagnostic):
    code = "E0509"
    depends_on = frozenset({"rows"})
    title = "{unit}s `{prompts}` have no rows: {reason}"
    label = "leaves nothing"
    reason: str


class CorruptionWithoutEffect(HintedDiagnostic):
    code = "E0510"
    depends_on = frozenset({"rows"})
    title = "the corrupted {unit} of `{run}` is the same as the clean one in every row"
    label = "has no effect on the {shown}"
    run: str
    unit: str = "prompt"
    """Name of a row: a prompt or an image."""
    shown: str = "text"


class PromptTooLong(RowsDiagnostic):
    code = "E0511"
    depends_on = frozenset({"tokens"})
    title = "{rows} of {total} prompts of `{run}` are longer than the model's context"
    label = "the longest has {longest:,} tokens, and the model reads at most {most:,}"
    help = "shorten the template or the lists, or select short rows with `where`"
    run: str
    longest: int
    most: int


class EmptyDraw(Diagnostic):
    code = "E0512"
    depends_on = frozenset({"rows"})
    title = "`{expression}` has no values left to sample: {reason}"
    label = "in {rows}"
    help = "give it more values, or sample fewer"
    expression: str
    reason: str
    rows: str


class NoDomain(HintedDiagnostic):
    code = "E0513"
    title = "`{name}` has no set of values to sample from"
    label = "sampled here"
    name: str


class UnknownFunction(HintedDiagnostic):
    code = "E0514"
    title = "prompts have no function `{name}`"
    label = "unknown"
    name: str


class BadCall(Diagnostic):
    code = "E0515"
    title = "`{name}` {reason}"
    label = "{reason}"
    help = "write `{usage}`"
    name: str
    reason: str
    usage: str


class UnknownText(HintedDiagnostic, BlockDiagnostic):
    code = "E0516"
    depends_on = frozenset({"columns"})
    title = "{unit}s `{prompts}` have no text `{name}`"
    label = "no such text"
    name: str


class SharedFirstToken(RowsDiagnostic):
    code = "E0517"
    depends_on = frozenset({"tokens"})
    title = "{text} and {rival} share their {which} token"
    label = "`{token}` is the same in both, in {rows} of {total} rows"
    help = "measure `logprob(…)`, which reads all tokens, or choose different answers"
    which: str
    text: str
    rival: str
    token: str


class MultiTokenNumeral(HintedDiagnostic):
    code = "E0518"
    depends_on = frozenset({"tokens"})
    title = "{amount} of the numerals {low}..{high} have several tokens"
    label = "{text} is {tokens} tokens: {pieces}"
    amount: int
    low: int
    high: int
    text: str
    tokens: int
    pieces: str


class AnswerNotInVocabulary(HintedDiagnostic, RowsDiagnostic):
    code = "E0519"
    depends_on = frozenset({"tokens"})
    title = "the tokenizer doesn't know {text} and reads it as `{unknown}`"
    label = "in {rows} of {total} rows"
    text: str
    unknown: str


class OtherSpelling(Diagnostic):
    code = "E0520"
    depends_on = frozenset({"tokens"})
    title = "{text} begins differently from the answers, which begin with {moved}"
    label = "{moved} was moved into the prompt"
    help = "give it the same beginning"
    text: str
    moved: str


class TextNotInside(Diagnostic):
    code = "E0521"
    title = "the text of `{name}` doesn't occur in `{within}`"
    label = "in {rows}"
    help = "select only rows where it does, or correct the data"
    name: str
    within: str
    rows: str


class NoBosToken(Diagnostic):
    code = "E0522"
    title = "`bos: true` is asked for, but the tokenizer has no beginning-of-sequence token"
    label = "none to add"
    help = "leave `bos` out: this model was trained without one"


class NotATokenId(Diagnostic):
    code = "E0523"
    depends_on = frozenset({"tokens"})
    title = "`token_id({name})`: {value} is not a token id"
    label = "the vocabulary has ids 0 to {last}"
    help = "use a column with token ids of this tokenizer"
    name: str
    value: str
    last: int


class EmptyText(RowsDiagnostic):
    code = "E0524"
    title = "the text `{name}` is empty in {rows} of {total} rows"
    label = "there is no token to measure"
    help = "exclude these rows with `where`"
    name: str


class NoTemplate(Diagnostic):
    code = "E0525"
    title = "prompts `{prompts}` have no template"
    label = "the model has no text to read"
    help = 'add a line such as `template "{{prompt}}"`'
    prompts: str


class EmptyPrompt(Diagnostic):
    code = "E0526"
    title = "`{run}` has {rows} prompts without text"
    label = "there is no token to read"
    help = "exclude these rows with `where`"
    run: str
    rows: int


class UnreadableImage(HintedDiagnostic):
    """A file that holds no image or sound, or one that isn't read."""

    code = "E0560"
    title = "the {noun} `{path}` can't be read: {reason}"
    label = "in {rows}"
    path: str
    reason: str
    rows: str
    noun: str = "image"


class ImageTooSmall(Diagnostic):
    """An image that has fewer pixels than it is cut into tiles."""

    code = "E0561"
    title = "the image `{image}` has {size} pixels, too few for {tiles} of tiles"
    label = "in {rows}"
    help = "use fewer tiles, or exclude these rows with `where`"
    image: str
    size: str
    tiles: str
    rows: str


class NoChatTemplate(Diagnostic):
    """A chat for a model whose tokenizer says nothing of chats."""

    code = "E0550"
    title = "the model has no chat template, so turns can't be written for it"
    label = "needs a tokenizer with a `chat_template`"
    help = (
        'write the turns as text in the format the model was trained on: `template "User: '
        '{{question}}\\nAssistant:"`'
    )


class BadChatTemplate(HintedDiagnostic):
    """A template that is none, or too large."""

    code = "E0551"
    title = "the model's chat template can't be used: {reason}"
    label = "these turns need the template"
    reason: str


class ChatRefused(HintedDiagnostic):
    """Turns that the template doesn't take, or doesn't write."""

    code = "E0552"
    depends_on = frozenset({"tokens"})
    title = "the model's chat template can't render these turns: {reason}"
    label = "in {rows}"
    reason: str
    rows: str


class MarkerInText(Diagnostic):
    """A text that is put into a chat and marks turns there."""

    code = "E0553"
    depends_on = frozenset({"tokens"})
    title = "the text {text} contains `{marker}`, a special token in chats"
    label = "the model would read it as the end of a turn"
    help = "use a text without it"
    text: str
    marker: str


class RowsNotPaired(HintedDiagnostic):
    """Two blocks whose rows don't belong together."""

    code = "E0527"
    depends_on = frozenset({"rows"})
    title = "the rows of `{other}` ({others:,}) and `{prompts}` ({rows:,}) can't be paired"
    label = "`{other}` has {others:,} rows before `where` and `limit`"
    other: str
    prompts: str
    others: int
    rows: int


class PartnerMissing(HintedDiagnostic):
    """A row whose partner `where` has left out."""

    code = "E0528"
    depends_on = frozenset({"rows"})
    title = "{lacking:,} of {total:,} rows of `{prompts}` have no partner in `{other}`"
    label = "`{other}` excludes its row {row:,}: {reason}"
    other: str
    prompts: str
    lacking: int
    total: int
    row: int
    reason: str


class EndingMismatch(Diagnostic):
    """Leading tokens of answers that were moved into the prompts of one block only."""

    code = "E0529"
    depends_on = frozenset({"tokens"})
    title = "prompts of `{other}` end in {theirs}, those of `{prompts}` in {own}"
    label = "the common beginning of a block's answers is moved to the end of its prompts"
    help = (
        "spell the answers of both blocks alike, or remove those of `{other}`: measures read "
        "the texts of `{prompts}`"
    )
    other: str
    prompts: str
    theirs: str
    own: str


class UnsampledRuns(Diagnostic):
    """`from A into B` where the `prompts` line names a third block."""

    code = "E0530"
    title = "neither `{source}` nor `{base}` is a run of `{prompts}`, which defines the rows"
    label = "both belong to other prompts"
    help = "write `prompts {instead}`, or `clean` on one side"
    source: str
    base: str
    prompts: str
    instead: str


class TokenCoversMore(RowsDiagnostic):
    code = "W0701"
    depends_on = frozenset({"tokens"})
    title = "tokens of `{name}` also cover adjacent text"
    label = "{tokens}, in {rows} of {total} rows"
    help = "put a space between them in the template, or interpret the result as that of both"
    name: str
    tokens: str


class UnknownWords(RowsDiagnostic):
    code = "W0702"
    depends_on = frozenset({"tokens"})
    title = "words missing from the tokenizer's vocabulary: {words}"
    label = "read as `{unknown}` in {rows} of {total} rows of `{run}`"
    help = "use words in the model's vocabulary"
    words: str
    unknown: str
    run: str


class RepeatedBos(RowsDiagnostic):
    """A template contains the beginning-of-sequence token that the tokenizer adds."""

    code = "W0707"
    depends_on = frozenset({"tokens"})
    title = "prompts begin with two `{bos}` tokens"
    label = "in {rows} of {total} rows of `{run}`: the tokenizer adds one to that of the text"
    help = "remove `{bos}` from the text, or write `bos: false` in the `model` line"
    bos: str
    run: str


class ImageNameAsText(HintedDiagnostic, RowsDiagnostic):
    """The name of an image file in a prompt of a model that reads images."""

    code = "W0706"
    depends_on = frozenset({"tokens", "columns"})
    title = "the prompt contains `{name}` as text, not the image"
    label = "names of image files in {rows} of {total} rows of `{run}`"
    name: str
    run: str


class AnswerChangesPrompt(HintedDiagnostic, RowsDiagnostic):
    code = "W0703"
    depends_on = frozenset({"tokens"})
    title = "the end of the prompt and {text} share a token"
    label = "in {rows} of {total} rows, appending the answer changes how the prompt is tokenised"
    text: str


class TextSpacing(RowsDiagnostic):
    """A text that follows its prompt with no space or with two, and is read as other tokens."""

    code = "W0705"
    depends_on = frozenset({"tokens"})
    title = "there {spaces} between the prompt and {text}"
    label = "the model reads `{joined}` in {rows} of {total} rows"
    help = "{hint}, unless you meant it"
    spaces: str
    text: str
    joined: str
    hint: str


class EqualPairedValues(Diagnostic):
    """Rows of two blocks that are paired by number and have the same value each time."""

    code = "W0704"
    title = "rows of `{source}` and `{base}` that are paired have the same `{name}`"
    label = (
        "both runs of a pair have the same `{name}`, so a confusion matrix can't distinguish them"
    )
    help = "write `from {source} shuffled into {base}` to pair the rows at random"
    source: str
    base: str
    name: str


class RowsNotChecked(BlockDiagnostic):
    """A table so long that `validate` looks at its first rows only."""

    code = "W0790"
    title = "only the first {rows:,} rows of {unit}s `{prompts}` were checked"
    label = "has more rows than `validate` checks"
    help = (
        "a run checks every row before it starts; `limit {rows}` restricts it to the rows "
        "checked here"
    )
    rows: int


class EqualRecords(BlockDiagnostic):
    """Rows of a file that say the same count as often as they stand there."""

    code = "W0781"
    title = "{equal:,} of {rows:,} rows of {unit}s `{prompts}` are duplicates"
    label = "these records occur more than once, and each occurrence counts"
    help = "write `rows {file} distinct` to remove duplicates: intervals treat rows as independent"
    file: str
    equal: int
    rows: int


class TemplateUnchanged(Diagnostic):
    """A corruption changes prompts of other templates, but none of one template."""

    code = "W0791"
    depends_on = frozenset({"rows"})
    title = "`{run}` changes nothing in the rows of {templates}"
    label = "leaves {rows} unchanged, which are excluded"
    help = "use a value that `{run}` changes in every template, or remove the other templates"
    run: str
    templates: str
    """`template 2 (line 9)`, or several."""
    rows: str
    """`12 rows`."""
