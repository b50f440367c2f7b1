"""The mean of a block's images."""

from __future__ import annotations

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.images.picture import mean_of
from mechdsl.program.lower_images import averaged_block
from mechdsl.prompts.prompts_block import PromptsBlock
from mechdsl.prompts.row_selection import collect, rows_before_limit
from mechdsl.prompts.rows import BlockRows
from mechdsl.prompts.tokenizer import TextTokenizer


def take_mean(
    block: PromptsBlock, tokenizer: TextTokenizer, enough: int | None
) -> list[Diagnostic]:
    """Give a block whose image is the mean of another's rows, or of those of a part, that mean:
    before `limit`.

    enough: how many rows a check looks at. Codes: those of the rows.
    """
    of = averaged_block(block.spec.image)
    if of is None or of.name not in block.blocks or block.averaged is not None:
        return []
    other = PromptsBlock(
        block.blocks[of.name],
        seed=block.seed,
        words=block.words,
        parameters=block.parameters,
        blocks=block.blocks,
        python=block.python,
    )
    if has_errors(other.diagnostics) or other.columns_unknown:
        return other.diagnostics
    limit = rows_before_limit(other)
    found = collect(BlockRows(other), tokenizer, limit=limit, part=of.part, most=enough)
    images = [made.clean.image for made in found.rows]
    pictures = tuple(image for image in images if image is not None)
    block.averaged = mean_of(pictures, of.whole) if pictures else None
    return found.diagnostics
