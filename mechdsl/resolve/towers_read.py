"""What models of images read with: images, and, of those with two towers, texts."""

from __future__ import annotations

from pathlib import Path

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import NoTokenizer
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.prompts.image_reader import ImageReader, read_processing
from mechdsl.prompts.tokenizer import TextTokenizer


def read_towers(
    folder: Path, shape: ModelShape, model: spec.Model
) -> tuple[ImageReader | None, list[Diagnostic]]:
    """What makes images ready for the model in a folder, with the tokenizer for its texts. Codes:
    E0412, E0456, E0508, E0522."""
    assert shape.patches is not None
    reader, found = read_processing(folder, shape.patches, model=model.name, span=model.span)
    if reader is None or shape.texts is None:
        return reader, found
    tokenizer, problems = TextTokenizer.from_folder(folder, model.bos, span=model.span)
    if tokenizer is None:
        return None, [*found, *problems]
    return with_texts(reader, tokenizer, shape.texts, model=model.name, span=model.span)


def with_texts(
    reader: ImageReader,
    tokenizer: TextTokenizer,
    shape: ModelShape,
    *,
    model: str,
    span: Span | None,
) -> tuple[ImageReader | None, list[Diagnostic]]:
    """The same with a tokenizer for texts, which pads them where the tower was trained on that.
    shape: of the tower for texts. Codes: E0412."""
    if shape.padded:
        padded = tokenizer.padded_to(shape.max_positions or 0)
        if padded is None:
            reason = "it has no token for padding, and the model was trained on padded texts"
            hint = "name one in its `tokenizer_config.json` (`pad_token`)"
            return None, [NoTokenizer(span=span, model=model, reason=reason, hint=hint)]
        tokenizer = padded
    reader.texts = tokenizer
    return reader, []
