"""E0415 and E0416: patches from one model into another."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class OtherShape(Diagnostic):
    """Two models whose activations don't fit into each other."""

    code = "E0415"
    hangs_on = frozenset({"shape"})
    title = "`{source}` and `{base}` are not of one shape"
    label = "{differences}"
    help = "{hint}"
    source: str
    base: str
    differences: str
    hint: str


@keyword_record
class OtherTokens(Diagnostic):
    """Two models that see different tokens in the same prompts."""

    code = "E0416"
    hangs_on = frozenset({"tokens"})
    title = (
        "`{source}` and `{base}` tokenise the prompts differently, in {rows:,} of {total:,} rows"
    )
    label = "{example}"
    help = "positions must be the same in both: use models with one tokenizer, and the same `bos`"
    source: str
    base: str
    rows: int
    total: int
    example: str
