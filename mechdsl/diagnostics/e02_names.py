"""E02xx: names, words of the registries, imports, parameters."""

from collections.abc import Callable, Iterable

from mechdsl.base.record import keyword_record
from mechdsl.base.registry import nearest
from mechdsl.diagnostics.core import Diagnostic


def did_you_mean(
    word: str, known: Iterable[str], otherwise: str, *, written: Callable[[str], str] = str
) -> str:
    """A help line: the known word that is near where there is one, else what to do.

    written: how the known word is written there.
    """
    near = nearest(word, known)
    return f"did you mean `{written(near)}`?" if near else otherwise


@keyword_record
class UnknownName(Diagnostic):
    """A name that the file doesn't define."""

    code = "E0201"
    title = "there is no {kind} called `{name}`"
    label = "not defined"
    help = "{hint}"
    kind: str
    name: str
    hint: str


@keyword_record
class DuplicateName(Diagnostic):
    """A name with two definitions."""

    code = "E0202"
    title = "`{name}` is defined twice"
    label = "the first definition is {first}"
    help = "give one of them another name"
    name: str
    first: str


@keyword_record
class UnknownWord(Diagnostic):
    """A component, metric, effect or report that isn't one."""

    code = "E0203"
    title = "there is no {kind} called `{word}`"
    label = "unknown {kind}"
    help = "{hint}"
    kind: str
    word: str
    hint: str


@keyword_record
class ImportFailed(Diagnostic):
    """A file behind `use` that can't be read."""

    code = "E0204"
    title = "`{path}` cannot be imported: {reason}"
    label = "imported here"
    help = "{hint}"
    path: str
    reason: str
    hint: str


@keyword_record
class BadSetting(Diagnostic):
    """A `--set` that doesn't fit the file's parameters."""

    code = "E0205"
    title = "`--set {setting}`: {reason}"
    help = "{hint}"
    setting: str
    reason: str
    hint: str


@keyword_record
class MissingLine(Diagnostic):
    """An experiment lacks its `model` or `prompts` line."""

    code = "E0206"
    title = "experiment `{experiment}` doesn't say which {what} it runs on"
    label = "no `{what}` line in this experiment"
    help = "{hint}"
    experiment: str
    what: str
    hint: str


@keyword_record
class BadArgument(Diagnostic):
    """An argument that can't be taken."""

    code = "E0207"
    title = "`{name}` {reason}"
    label = "{reason}"
    help = "{hint}"
    name: str
    reason: str
    hint: str


@keyword_record
class BadCommandLine(Diagnostic):
    """A mistake on the command line."""

    code = "E0208"
    title = "{reason}"
    help = "{hint}"
    reason: str
    hint: str


def cannot_write(error: OSError) -> BadCommandLine:
    """E0208 for a file that can't be written."""
    said = (error.strerror or str(error)).lower()
    return BadCommandLine(
        reason=f"cannot write `{error.filename}`: {said}",
        hint="name a file in a folder that exists and may be written to",
    )


@keyword_record
class CircularExperiments(Diagnostic):
    """Experiments that wait for each other's results."""

    code = "E0210"
    title = "`{experiment}` needs its own results: {chain}"
    label = "picked by `{of}`"
    help = "let one of them name its sites or tokens itself"
    experiment: str
    of: str
    chain: str


@keyword_record
class BeyondEveryModel(Diagnostic):
    """A layer, head, neuron or expert beyond the largest model that is read."""

    code = "E0231"
    title = "no model has a {unit} {index}"
    label = "a model has at most {most:,} {unit}s, counted from 0"
    help = "write a smaller number, or `{unit} *` for all of them"
    unit: str
    index: int
    most: int


@keyword_record
class RepeatedStatement(Diagnostic):
    """A statement that may stand once."""

    code = "E0209"
    title = "`{what}` stands twice in `{block}`"
    label = "the first one is on line {first}"
    help = "{hint}"
    what: str
    block: str
    first: int
    hint: str = "keep one of them"
