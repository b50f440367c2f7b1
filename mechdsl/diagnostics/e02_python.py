"""E022x: functions of the user's Python files."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class PythonNotAllowed(Diagnostic):
    """Code that nobody has said may run."""

    code = "E0221"
    title = "`{function}` is Python, which runs only where you allow it"
    label = "would run `{file}`"
    help = "{hint}"
    function: str
    file: str
    hint: str


@keyword_record
class PythonNotFound(Diagnostic):
    """A function that isn't there, or isn't one that could be called."""

    code = "E0222"
    title = "`{written}` can't be called: {reason}"
    label = "{reason}"
    help = "{hint}"
    written: str
    reason: str
    hint: str


@keyword_record
class PythonFailed(Diagnostic):
    """An exception inside of a function, or a result that nothing can be made of."""

    code = "E0223"
    title = "`{function}` failed: {reason}"
    label = "{where}{place}"
    help = "{hint}"
    function: str
    reason: str
    where: str
    hint: str
    place: str = ""
    """Behind a comma, the run or cell and the row in which it failed, where there is one."""
