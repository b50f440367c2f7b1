"""E0620, W0721: results of one experiment in another."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class BadPick(Diagnostic):
    """A `top n of EXPERIMENT` that nothing can be picked by."""

    code = "E0620"
    title = "`{text}` can't be picked: {reason}"
    label = "{reason}"
    help = "{hint}"
    text: str
    reason: str
    hint: str


@keyword_record
class TestedWherePicked(Diagnostic):
    """Sites that are tested on the rows that they were picked on."""

    code = "W0721"
    hangs_on = frozenset({"rows"})
    title = "`{experiment}` tests what `{of}` picked on the same rows"
    label = "{shared} of its {rows} rows are rows of `{of}`"
    help = (
        "use split: with `split 50%` in `prompts {block}`, let `{of}` run on `{block}.train` and "
        "`{experiment}` on `{block}.test`"
    )
    experiment: str
    of: str
    block: str
    shared: int
    rows: int
