"""E01xx: errors in the text itself, found before names are looked up."""

from __future__ import annotations

from mechdsl.diagnostics.core import Diagnostic, HintedDiagnostic


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
