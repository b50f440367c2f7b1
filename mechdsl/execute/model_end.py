"""What a model does behind its last block, on vectors of any layer."""

from __future__ import annotations

from torch import Tensor

from mechdsl.hooks.loaded import LoadedModel


class ModelEnd:
    """As `mechdsl.resolve.observation.Unembedding`."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    def logits(self, vectors: Tensor, tokens: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def share(self, vectors: Tensor, stream: Tensor, tokens: Tensor | None = None) -> Tensor:
        raise NotImplementedError
