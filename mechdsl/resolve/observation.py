"""What `observe` lines look at: the class behind each word. Entries are in `rules.observations`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from mechdsl.models.shape import ModelShape
from mechdsl.resolve.resolved_rule import Intervention, Place, ResolvedRule
from mechdsl.vocab.metrics import Form

if TYPE_CHECKING:
    from torch import Tensor


class Unembedding(Protocol):
    """What a model does behind its last block."""

    def logits(self, vectors: Tensor, tokens: Tensor | None = None) -> Tensor:
        """[K, vocab], or those of `tokens`, of vectors [K, d_model] of the residual stream: through
        the final norm and the unembedding, with all that the model does to its logits."""
        ...

    def share(self, vectors: Tensor, stream: Tensor, tokens: Tensor | None = None) -> Tensor:
        """[K, vocab], or those of `tokens`: what vectors [K, d_model] that were added to the stream
        add to the logits, with the final norm's scale held at that of the stream [K, d_model]."""
        ...

    def neurons_out(self, layer: int, units: Tensor, values: Tensor) -> Tensor:
        """[K, d_model]: what neurons `units` [K] with activations `values` [K, 1] add to the
        stream."""
        ...


class Seen(Protocol):
    """K vectors of one site of one layer, of some rows, and what is known of their places."""

    @property
    def vectors(self) -> Tensor:
        """[K, width], in float32 at least: one head or neuron, or all of them side by side. Of
        patterns and scores the width is that of the longest prompt, 0 where there is no key."""
        ...

    @property
    def units(self) -> Tensor | None:
        """[K] the head or neuron of each; None where all are one vector."""
        ...

    @property
    def positions(self) -> Tensor:
        """[K] the token of the prompt that each is at."""
        ...

    @property
    def keys(self) -> tuple[Tensor, Tensor] | None:
        """(index into the K vectors, token of the prompt) of the keys that are asked for; None
        where none are named."""
        ...

    @property
    def place(self) -> Place:
        """The site and its layer."""
        ...

    @property
    def beside(self) -> Mapping[Place, Tensor]:
        """[K, width] what `Observation.beside` names, at the same tokens."""
        ...

    @property
    def unembedding(self) -> Unembedding:
        """Of the model that is run."""
        ...

    @property
    def tokens(self) -> Tensor | None:
        """Of observations that give logits, the tokens that are asked for; None for all."""
        ...


class Observation(Intervention):
    """An intervention that changes nothing: what is seen of a row is what is measured of it.

    A rule sees vectors at sites and positions. `each` makes one number of each, and a row's value
    is their mean over joined sites and positions; or `logits` makes logits, which metrics read.
    """

    changes = "nothing"
    drawn_positions = False
    word: ClassVar[str]
    """Behind `observe`."""
    form: Form
    """Its measure, of the docstring's first line."""
    unit: ClassVar[str] = ""
    gives: ClassVar[Literal["number", "logits"]] = "number"
    unplaced: ClassVar[Literal["refused", "last token"]] = "refused"
    """What a line without positions is: refused, or at the last token, which is said."""
    by_unit: ClassVar[bool] = False
    """Where no head is named, each is looked at by itself; else all are one vector."""
    adds_up: ClassVar[bool] = False
    """Joined sites are added up, and not averaged."""
    read_by_measures: ClassVar[bool] = False
    """The measures of the experiment read it in place of the model's own output."""
    controls: ClassVar[tuple[str, ...]] = ()
    """What is measured beside it, as what it is set against, each a measure behind its own
    label."""
    of_weights: ClassVar[bool] = False
    """It looks at weights alone, for which no prompt matters."""
    of_maps: ClassVar[bool] = False
    """It is of maps that other experiments made, and of no site."""
    leads: ClassVar[bool] = False
    """It is of what leads from one position to another: `observe WORD from Q to K`."""
    counts: ClassVar[str] = ""
    """The axis of its values, from 1, where there are several to a cell."""
    takes: ClassVar[tuple[Literal["toward", "with", "with site", "top", "arguments"], ...]] = ()
    """The clauses that it has a meaning for."""

    @property
    def made_of(self) -> Mapping[str, str]:
        """Files whose numbers it takes, by name: SHA-256."""
        return {}

    def lists(self, rule: ResolvedRule) -> int:
        """How many tokens are listed of each cell, by their mean probability over its rows."""
        return 0

    def form_of(self, name: str) -> Form:
        """Of itself, or of what is measured beside it under this name."""
        return self.form

    def beside(self, rule: ResolvedRule, shape: ModelShape) -> tuple[Place, ...]:
        """Whole vectors that it needs at the same tokens."""
        return ()

    def each(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        """[K] the number of each vector."""
        raise NotImplementedError

    def logits(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        """[K, tokens] of each vector."""
        raise NotImplementedError
