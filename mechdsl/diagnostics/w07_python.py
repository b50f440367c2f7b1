"""W074x: what is left unchecked because it is Python."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class PythonNotRun(Diagnostic):
    """Rows that only Python can make."""

    code = "W0740"
    title = "prompts `{prompts}` need Python, which isn't run here: their rows are not checked"
    label = "not run"
    help = "`mechdsl plan --allow-python` checks them too"
    prompts: str
