"""E01xx, E02xx, W073x, W074x: the text of a file, and the names and words in it."""

from __future__ import annotations

from mechdsl.diagnostics.core import Diagnostic, HintedDiagnostic, ReasonedDiagnostic


class UnexpectedToken(HintedDiagnostic):
    """A word, number or sign stands where the grammar has no place for it."""

    code = "E0101"
    title = "unexpected {found}"
    label = "expected {expected}"

    found: str
    expected: str
    hint: str = ""


class MisspeltWord(Diagnostic):
    """A word of the language with a slip in it."""

    code = "E0102"
    title = "`{word}` is not a keyword"
    label = "unknown keyword"
    help = "did you mean `{meant}`?"

    word: str
    meant: str


class Unclosed(Diagnostic):
    """A brace or bracket is opened and never closed."""

    code = "E0103"
    title = "this `{opener}` is never closed"
    label = "opened here"
    help = "add the matching `{closer}`{place}"

    opener: str
    closer: str
    place: str = ""


class UnexpectedCharacter(HintedDiagnostic):
    """A character that no part of the language uses."""

    code = "E0104"
    title = "`{char}` has no meaning in a `.mech` file"
    label = "not part of the language"

    char: str
    hint: str = ""


class UnterminatedString(Diagnostic):
    """A text in quotes doesn't end on its line."""

    code = "E0105"
    title = "this text has no closing quote"
    label = "the text starts here"
    help = 'close it with `"` on the same line; `\\n` stands for a line break and `\\"` for a quote'


class ReservedName(Diagnostic):
    """A value is called like a word of the language."""

    code = "E0106"
    title = "`{name}` is a keyword and cannot name a value"
    label = "reserved word"
    help = "choose another name, such as `{name}_1`{rename}"

    name: str
    rename: str = ""


class WrongVersion(Diagnostic):
    """The first line isn't `mech 1`."""

    code = "E0107"
    title = "{problem}"
    label = "{place}"
    help = "write `mech 1` on the first line, once"

    problem: str
    place: str


class NotSupported(Diagnostic):
    """The language has it, this version of mechdsl doesn't run it yet."""

    code = "E0108"
    title = "{what} is part of the language but not supported yet"
    label = "not supported yet"
    help = "{later}"

    what: str
    later: str = "docs/language.md lists everything that this version supports"


class TooLarge(HintedDiagnostic):
    """A limit on size or nesting is passed, so the file isn't read further."""

    code = "E0109"
    title = "{what}"
    label = "{place}"

    what: str
    place: str


class NotText(Diagnostic):
    """The file is not UTF-8 text."""

    code = "E0110"
    title = "`{path}` is not a text file: {reason}"
    help = "a `.mech` file is UTF-8 text"

    path: str
    reason: str


class EmptyFile(Diagnostic):
    """Nothing but comments and blank lines."""

    code = "E0111"
    title = "the file is empty"
    label = "nothing but comments and blank lines"
    help = "start it with the line `mech 1`, as in the examples"


class Unreadable(Diagnostic):
    """The file can't be opened."""

    code = "E0112"
    title = "cannot read `{path}`: {reason}"
    help = "check the path; it is relative to the working directory"

    path: str
    reason: str


class BadPlaceholder(HintedDiagnostic):
    """What stands between the braces of a text isn't an expression."""

    code = "E0113"
    title = "{problem}"
    label = "{place}"

    problem: str
    place: str
    hint: str = "write `{name}`, `{new = name}` or `{count - 1}`; double a literal brace: `{{`"


class NumberTooLarge(Diagnostic):
    """A number that no float can hold."""

    code = "E0114"
    title = "this number is too large"
    label = "outside the range of floating-point numbers"
    help = "numbers go up to about 1e308"


class UnknownName(HintedDiagnostic):
    """A name that the file doesn't define."""

    code = "E0201"
    title = "there is no {kind} called `{name}`"
    label = "not defined"
    kind: str
    name: str


class DuplicateName(Diagnostic):
    """A name with two definitions."""

    code = "E0202"
    title = "`{name}` is defined twice"
    label = "the first definition is {first}"
    help = "rename one of them"
    name: str
    first: str


class UnknownWord(HintedDiagnostic):
    """A component, metric, effect or report that isn't one."""

    code = "E0203"
    title = "there is no {kind} called `{word}`"
    label = "unknown {kind}"
    kind: str
    word: str


class ImportFailed(HintedDiagnostic):
    """A file of `use` that can't be read."""

    code = "E0204"
    title = "`{path}` cannot be imported: {reason}"
    label = "imported here"
    path: str
    reason: str


class BadSetting(HintedDiagnostic):
    """A `--set` that doesn't fit the file's parameters."""

    code = "E0205"
    title = "`--set {setting}`: {reason}"
    setting: str
    reason: str


class MissingLine(HintedDiagnostic):
    """An experiment lacks its `model` or `prompts` line."""

    code = "E0206"
    title = "experiment `{experiment}` doesn't say which {what} it runs on"
    label = "no `{what}` line in this experiment"
    experiment: str
    what: str


class BadArgument(ReasonedDiagnostic):
    """An argument that can't be taken."""

    code = "E0207"
    title = "`{name}` {reason}"
    name: str


class CircularExperiments(Diagnostic):
    """Experiments that wait for each other's results."""

    code = "E0210"
    title = "`{experiment}` needs its own results: {chain}"
    label = "picked by `{of}`"
    help = "name the sites or tokens of one of them explicitly"
    experiment: str
    of: str
    chain: str


class IndexBeyondModels(Diagnostic):
    """A layer, head, neuron or expert beyond the largest model that is read."""

    code = "E0231"
    title = "no model has a {unit} {index}"
    label = "a model has at most {most:,} {unit}s, counted from 0"
    help = "write a smaller number, or `{unit} *` for all of them"
    unit: str
    index: int
    most: int


class RepeatedStatement(HintedDiagnostic):
    """A statement that may stand once."""

    code = "E0209"
    title = "`{what}` appears twice in `{block}`"
    label = "the first one is on line {first}"
    what: str
    block: str
    first: int
    hint: str = "keep one of them"


class PythonNotAllowed(HintedDiagnostic):
    """Code that nobody has said may run."""

    code = "E0221"
    title = "`{function}` is Python code, which runs only if you allow it"
    label = "would run `{file}`"
    function: str
    file: str


class PythonNotFound(ReasonedDiagnostic):
    """A function that isn't there, or isn't one that could be called."""

    code = "E0222"
    title = "`{written}` can't be called: {reason}"
    written: str


class PythonFailed(HintedDiagnostic):
    """An exception inside of a function, or a result that nothing can be made of."""

    code = "E0223"
    title = "`{function}` failed: {reason}"
    label = "{where}{place}"
    function: str
    reason: str
    where: str
    place: str = ""
    """After a comma, the run or cell and the row in which it failed, if known."""


class UnusedName(Diagnostic):
    """A name that nothing refers to."""

    code = "W0730"
    title = "`{name}` is never used"
    label = "{kind} defined here"
    help = "remove it, or use it"
    kind: str
    name: str


class ShadowedMetric(Diagnostic):
    """A metric of the file has the name of one of the language, and takes its place."""

    code = "W0734"
    title = "metric `{name}` has the same name as a built-in metric"
    label = "in this file, `{name}` now means this metric"
    help = "choose another name, unless you want to replace the built-in metric"
    name: str


class FirstTokenWrite(Diagnostic):
    """A write at what may be the attention sink."""

    code = "W0731"
    depends_on = frozenset({"tokens"})
    title = "this rule writes at token 0, which may be the attention sink"
    label = "hits `{token}`"
    help = "an effect there may come from the sink alone: patch a later token, or compare with one"
    token: str


class SelfWrite(HintedDiagnostic):
    """A rule that writes the values of a row into the same row: a patch of a run into itself, or
    the mean of one row."""

    code = "W0732"
    depends_on = frozenset({"rows", "tokens"})
    title = "{does}"
    label = "writes values that are already there"
    does: str


class UnequalIndexTokens(Diagnostic):
    """Tokens counted alike in prompts of different lengths, which are other words there."""

    code = "W0760"
    title = "`{position}` refers to different tokens in `{source}` and `{base}`"
    label = "token {number} is `{theirs}` in `{source}` and `{own}` in `{base}`, in {rows} rows"
    help = (
        "the prompts differ in length: refer to tokens by span, as in `last-item token`, or "
        "count from the end, where they agree"
    )
    position: str
    source: str
    base: str
    number: str
    theirs: str
    own: str
    rows: str


class PythonNotRun(Diagnostic):
    """Rows that only Python can make."""

    code = "W0740"
    title = (
        "prompts `{prompts}` need Python, which doesn't run here, so their rows were not checked"
    )
    label = "not run"
    help = "`mechdsl plan --allow-python` also checks them"
    prompts: str
