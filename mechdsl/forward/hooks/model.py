# pyright: reportPrivateUsage=false
"""Loaded and verified models: calls, and the exchange of blocks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from mechdsl.base.arrays import Ints
from mechdsl.forward.hooks.batch import (
    Batch,
    BlockPairs,
    BlockPlace,
    CircuitRead,
    CircuitWrite,
    EdgeWrite,
    RuleWrites,
    SiteRead,
    SiteWrite,
    TokenFrame,
    array_to_device,
    get_free_memory,
)
from mechdsl.forward.hooks.module_exchange import (
    CACHE_ARGUMENTS,
    AttentionEntry,
    BlockStub,
    SkippedBlock,
    find_attention_entry,
    load_weights,
    replace_forward,
)
from mechdsl.models.shape import ATTENDED, TILES, Anatomy, HookPoint, ModelShape, PaddingSide

if TYPE_CHECKING:
    from mechdsl.prompts.tokens.tokenizer import TextTokenizer


BASE_PREFIX, PYTHON_PREFIX = "base ", "python "
"""Prefixes of keys in a model's provenance: see `LoadedModel.made_of`."""


@dataclass(frozen=True)
class CheckOutcome:
    """Outcome of one check of a model's anatomy."""

    identity: str
    """The checked equation or statement: `resid_pre + attn_out + mlp_out = resid_post`."""
    error: float
    """Largest difference, relative to the size of the compared tensors."""
    tolerance: float
    detail: str = ""
    """Location of the largest difference: `layer 3`."""
    failure: str = ""
    """Meaning of a failure, if it isn't a difference of `error`."""
    compared: int = 1
    """Number of compared tensors; a check without any proves nothing and is dropped."""
    asks_effect: bool = False
    """Whether the check requires an effect, which idle components don't have."""
    hint: str = ""
    """What to do about a failure, if its cause is known."""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class CallConvention:
    """How the model is called; determined by trial."""

    accepts: frozenset[str]
    """Names of its forward arguments."""
    block_returns: int | None = None
    """Length of the tuple that a block returns; None for a bare tensor."""
    first_position: int | None = 0
    """Position id of a prompt's first token; None if the model counts positions itself."""
    token_type: int = 0
    """`token_type_ids` of texts, if `accepts` has them."""
    places_images: bool = False
    """Whether an image's tokens are counted like others, so that positions are passed with
    images."""
    side: PaddingSide = "left"
    """Side where padding is harmless: only the right for models that count columns."""
    reads: Literal["every token", "first token", "last token", "all tokens"] = "every token"
    """Source of the output: each token for its own output, or one output for a whole image or
    prompt that comes from its first token (the class token), its last token, or all tokens."""
    skips: int | None = None
    """The pad token, if `reads` is the last token that isn't padding instead of the very last
    one."""
    scores: str | None = None
    """Path of the module that computes each token's output, if the model returns only the output of
    a prompt's last token, as classifiers on decoders do; `reads` is then every token."""
    packs: Literal["tokens", "one prompt"] = "tokens"
    """Input of a pass over packed rows: their tokens, or one prompt if the model counts positions
    or reads whole prompts itself, and for images."""
    narrows: bool = True
    """Whether the unembedding may compute selected logits only: nothing is added to them later."""

    @property
    def cache_argument(self) -> str | None:
        """Name of the forward argument with cached keys and values."""
        return next((name for name in CACHE_ARGUMENTS if name in self.accepts), None)


@dataclass(frozen=True, eq=False)
class BlockStack:
    """List of blocks with its sizes."""

    anatomy: Anatomy
    shape: ModelShape


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """Model in eval mode with its anatomy, tokenizer and proved properties."""

    name: str
    """Name in the file."""
    module: torch.nn.Module
    anatomy: Anatomy
    """Anatomy of the main stack: of the language model, the decoder, or the only stack."""
    shape: ModelShape
    tokenizer: TextTokenizer | None
    """None only if a model is inspected without text."""
    pad_id: int
    device: torch.device
    dtype: torch.dtype
    calling: CallConvention
    provenance: Mapping[str, str]
    """Hash of the weights, revision and versions, which are stored with results."""
    checks: tuple[CheckOutcome, ...] = ()
    self_check_error: float = 0.0
    """Largest difference between logits of packed and full passes in the self-check, relative to
    the largest logit."""
    restartable: bool = True
    """Whether rows that compute only changes gave the logits of full passes; for a vision-language
    model, rows of text."""
    idle: tuple[tuple[str, str, int | None], ...] = ()
    """(stack, site, layer) of components without effect: a write to one of them alone leaves the
    output unchanged. All equations hold for them; checks that require an effect passed on a copy
    with random weights."""
    identity: str | None = None
    """Identity of a model from a folder, see `mechdsl/models/folder.py`. The identity of any model
    is defined by `mechdsl.loading.identity.compute_identity`."""
    texts: LoadedModel | None = None
    """The tower for texts, if this is the image tower of a model with two towers."""
    others: Mapping[str, BlockStack] = field(default_factory=dict[str, BlockStack])
    """Further stacks: `encoder`, `cross` (the decoder's blocks, by their attention to the encoder),
    `vision`."""

    @cached_property
    def attention_configs(self) -> tuple[Any, ...]:
        """The distinct configs from which modules read their attention function."""
        return list_attention_configs(self.module)

    @cached_property
    def written_out(self) -> tuple[tuple[nn.Module, AttentionEntry], ...]:
        """Modules with attention that isn't the library's, and entries that replace them."""
        every = self.module.modules()
        return tuple(
            (part, entry) for part in every if (entry := find_attention_entry(part)) is not None
        )

    @property
    def rounding(self) -> float:
        """How far rounding may move a logit, relative to the largest logit.

        This is the self-check's measurement, and at least the float spacing of the dtype.
        """
        return max(self.self_check_error, torch.finfo(self.dtype).eps)

    @property
    def made_of(self) -> dict[str, str]:
        """Hashes of the model's sources, except for its weights.

        These are the base of an adapter (`base m`) and the file of a function (`python toy.py`).
        """
        return {
            key: value
            for key, value in self.provenance.items()
            if key.startswith((BASE_PREFIX, PYTHON_PREFIX))
        }

    @property
    def parallel(self) -> bool:
        return self.anatomy.parallel

    def stack(self, name: str) -> BlockStack:
        """Return a stack by name (empty for the main one). Raises ValueError if it is missing."""
        if not name:
            return BlockStack(self.anatomy, self.shape)
        if name not in self.others:
            there = ", ".join(f"`{other}`" for other in self.others) or "none except the main one"
            raise ValueError(f"`{self.name}` has no stack `{name}`; it has {there}")
        return self.others[name]

    def tap(self, site: str, layer: int | None, stack: str = "") -> HookPoint:
        """Return the hook point of a site. Raises ValueError if it is missing."""
        block_stack = self.stack(stack)
        if layer is not None and not 0 <= layer < block_stack.shape.n_layers:
            of = f" of `{stack}`" if stack else ""
            raise ValueError(f"layer {layer}{of} is not in 0..{block_stack.shape.n_layers - 1}")
        tap = block_stack.anatomy.tap(site, layer)
        if tap is None:
            where = "" if layer is None else f" in layer {layer}"
            where += f" of its stack `{stack}`" if stack else ""
            raise ValueError(f"`{self.name}` has no `{site}`{where}")
        return tap


def list_attention_configs(module: nn.Module) -> tuple[Any, ...]:
    """List the distinct configs from which a module's parts read their attention function."""
    configs: dict[int, Any] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    return tuple(configs.values())


def build_batch(
    model: LoadedModel, ids: Sequence[tuple[int, ...]], sources: Sequence[int], side: PaddingSide
) -> Batch:
    """Pad prompts; in an encoder-decoder, the two stacks are padded separately.

    Args:
        model: The model.
        ids: Token ids of each prompt.
        sources: Number of tokens of each prompt that the encoder reads; 0 in other models.
        side: The side to pad, except in encoder-decoders, which count columns.
    """
    if not model.shape.encodes_apart:
        return Batch.of(ids, model.pad_id, side, model.device)
    split = list(zip(ids, sources, strict=True))
    source = Batch.of(
        [numbers[:count] for numbers, count in split], model.pad_id, "right", model.device
    )
    target = Batch.of(
        [numbers[count:] for numbers, count in split], model.pad_id, "right", model.device
    )
    batch = target.after(source)
    if "vision" not in model.others:
        return batch
    columns = VisionColumns.of(model.shape)
    images = source.ids.shape[1] // model.shape.attended
    vision = Batch.grid(len(batch), images * columns.count, model.device)
    vision = replace(vision, tiles=(columns.tokens, columns.padded))
    return batch.with_inputs(batch.extra, **batch.frames, vision=vision)


_TILE_MULTIPLE = 8
"""Tiles are padded to a multiple of this number of tokens in the encoder of `attended image`."""


@dataclass(frozen=True)
class VisionColumns:
    """The columns of an image's tokens in an encoder that reads padded tiles together."""

    tokens: int
    """Tokens of a tile."""
    padded: int
    """Columns of a tile."""
    count: int
    """Columns of all tiles of an image."""

    @staticmethod
    def of(shape: ModelShape) -> VisionColumns:
        tokens = shape.attended // shape.tiles
        padded = -(-tokens // _TILE_MULTIPLE) * _TILE_MULTIPLE
        return VisionColumns(tokens, padded, padded * shape.tiles)


def without_vectors(batch: Batch) -> Batch:
    """Remove the vectors of images that were encoded before; the model then encodes the pixels."""
    extra = {name: each for name, each in batch.extra.items() if name != ATTENDED}
    return replace(batch, extra=extra)


@contextmanager
def record_encoded(model: LoadedModel) -> Generator[list[Any]]:
    """Collect the outputs of an encoder-decoder's encoder, the library's objects of tensors."""
    outputs: list[Any] = []
    encoder: Any = model.module
    handle = encoder.get_encoder().register_forward_hook(
        lambda _, __, output: outputs.append(output)
    )
    try:
        yield outputs
    finally:
        handle.remove()


def call_with_batch(model: LoadedModel, batch: Batch) -> Tensor:
    """Call the model's forward without hooks, with masks and positions.

    Returns:
        [B, T, vocab]; [B, T, d_model] for a model without an unembedding; or one output for a whole
        image.
    """
    arguments = build_arguments(model, batch)
    blocks = _find_vision_blocks(model) if batch.extra else ()
    once, hidden = map_images_once(model, batch, arguments), hide_missing_images(model, batch)
    with exchange_blocks(model, blocks), once, hidden:
        return call_model(model, arguments)


def has_single_output(model: LoadedModel) -> bool:
    """Return whether logits are [B, labels], one row for a whole image."""
    return model.shape.takes == "image" and model.calling.reads != "every token"


def select_row_logits(model: LoadedModel, logits: Tensor, rows: Ints) -> Tensor:
    """Return [place, …]: logits of positions in these rows, if each row has a single output."""
    return logits[array_to_device(rows, logits.device)] if has_single_output(model) else logits


def find_tokens(known: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of each token in a list, and whether it is in it; both have the shape of
    `ids`. The index of a token that isn't in the list is arbitrary.

    Args:
        known: [N] ascending, N at least 1.
        ids: Tokens.
    """
    at = torch.searchsorted(known, ids.contiguous()).clamp(max=len(known) - 1)
    return at, known[at] == ids


class Derivatives(TypedDict):
    """Arguments of `run_full` about derivatives, for a pass that is part of another one."""

    gradients: bool
    recompute: bool
    backward: Any


class VisionPass(Protocol):
    """A pass of the vision encoder on the images of prompts, without the language model."""

    def __call__(
        self,
        batch: Batch,
        writes: Sequence[SiteWrite],
        reads: Sequence[SiteRead],
        blocks: BlockPairs,
        edges: Sequence[EdgeWrite],
        circuits: Sequence[CircuitWrite | CircuitRead],
        derivatives: Derivatives,
    ) -> tuple[list[SiteWrite], dict[SiteRead, Tensor]]:
        """Run the vision encoder.

        Args:
            batch: The prompts, whose tokens of images stand for patches.
            writes: Writes in the encoder.
            reads: Sites of the encoder.
            blocks: Its replaced blocks, which change all images.
            edges: Changed attention edges in the encoder.
            circuits: Edges between its components that carry other values or are read.
            derivatives: Arguments of `run_full`.

        Returns:
            Writes at `embed` of all tokens of the images that are written to; [B, T, units, width]
            values by site, 0 at tokens of text.
        """
        ...


@dataclass(frozen=True, eq=False)
class ImageTokenTable:
    """How a model reads the tokens of its images, in addition to their vectors.

    A model may number them by row and column (M-RoPE). A text after an image then continues at the
    first number that is neither a row nor a column.

    References:
        Wang et al. 2024, "Qwen2-VL", arXiv:2409.12191, section 2.1.
    """

    tokens: Tensor
    """[N] ascending: the tokens of images."""
    offsets: Tensor | None
    """[N, 3] long: frame, row and column, from 0; None if tokens are counted."""
    advance: Tensor
    """[N] long: the larger side of the image for its last token, 0 for the others."""
    mixes: bool
    """Whether tokens of an image attend to later tokens of the image."""
    index: Callable[[Batch], Tensor]
    """Returns [B, T] long: the index of each token in its image; 0 for text."""
    prefix_end: int | None = None
    """The token up to which all tokens of a prompt with an image attend to each other, the first
    one after the images; None if only tokens of images do."""
    encode: VisionPass | None = None
    """Runs the vision encoder on the images of a batch."""

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return `find_tokens` of tokens of images."""
        return find_tokens(self.tokens, ids)

    def number(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """Return [3, B, T] position ids of tokens [B, T]; None if they are counted."""
        at, known = self.find(ids)
        if self.offsets is None or not bool(known.any()):
            return None
        advance = torch.where(known, self.advance[at], 1) * mask
        before = advance.cumsum(1) - advance
        offsets = torch.where(known[..., None], self.offsets[at], 0)
        return (before[..., None] + offsets).movedim(-1, 0)

    def token_types(self, ids: Tensor) -> Tensor | None:
        """Return [B, T] `token_type_ids`, from which models that mix tokens build their masks.

        They are 1 for tokens of images, or, if all tokens of a prompt attend to each other, 0 for
        these tokens. None: no token attends to later ones.
        """
        if not self.mixes or ids.shape[1] == 1:
            return None
        known = self.find(ids)[1]
        if not bool(known.any()):
            return None
        if self.prefix_end is None:
            return known.long()
        later = known.flip(1).cummax(1).values.flip(1)  # an image is here or follows
        ends = ((ids == self.prefix_end) & ~later & known.any(1, keepdim=True)).long()
        return ((ends.cumsum(1) - ends > 0) | ~known.any(1, keepdim=True)).long()

    def saved(self, ids: Sequence[int]) -> int:
        """Return by how much the tokens of a prompt outnumber its position ids."""
        if self.offsets is None:
            return 0
        at, known = self.find(torch.tensor(ids, device=self.tokens.device))
        return int(torch.where(known, 1 - self.advance[at], 0).sum())


IMAGE_TOKENS: WeakKeyDictionary[nn.Module, ImageTokenTable] = WeakKeyDictionary()
"""By model, of images whose vectors are known."""


def mixes_images(model: LoadedModel, batch: Batch) -> bool:
    """Return whether some tokens of the prompts attend to later tokens of an image."""
    table = IMAGE_TOKENS.get(model.module)
    return table is not None and table.mixes and bool(table.find(batch.ids)[1].any())


def find_given_positions(model: LoadedModel, batch: Batch) -> Tensor | None:
    """Return [B, T] or [3, B, T] position ids; None if the tokens are counted."""
    table = IMAGE_TOKENS.get(model.module)
    if batch.numbers is not None or table is None:
        return batch.numbers
    return table.number(batch.ids, batch.mask)


def number_positions(model: LoadedModel, batch: Batch) -> Tensor:
    """Return [B, T] position ids; [3, B, T] with images that have rows and columns."""
    given = find_given_positions(model, batch)
    return batch.position_ids() if given is None else given


def apply_position_ids(model: LoadedModel, batch: Batch, rules: RuleWrites) -> Batch:
    """Apply the position ids that rules give to tokens; other tokens keep those of the model."""
    if not rules.numbers:
        return batch
    return rules.numbered(replace(batch, numbers=number_positions(model, batch)))


@dataclass(frozen=True, eq=False)
class TextPass:
    """What a pass of the language model gets once the vision encoder of its prompts has run."""

    batch: Batch
    """With pixels if blocks attend to images: the encoder then runs in the pass."""
    writes: list[SiteWrite]
    """Those in the encoder are replaced by their effect on `embed`, which comes first."""
    reads: list[SiteRead]
    """Those outside of the encoder."""
    edges: list[EdgeWrite]
    """Those outside of the encoder."""
    circuits: list[CircuitWrite | CircuitRead]
    """Those outside of the encoder."""
    found: dict[SiteRead, Tensor] = field(default_factory=dict[SiteRead, Tensor])
    """The values of the reads in the encoder."""


def split_vision(
    model: LoadedModel,
    batch: Batch,
    writes: Sequence[SiteWrite],
    reads: Sequence[SiteRead] = (),
    edges: Sequence[EdgeWrite] = (),
    circuits: Sequence[CircuitWrite | CircuitRead] = (),
    stop: int | None = None,
    derivatives: Derivatives | None = None,
) -> TextPass:
    """Run the vision encoder for reads and writes there, in prompts whose images are vectors.

    Args:
        stop: Number of blocks of the language model that run; None runs all. Vectors of images that
            later blocks add (Qwen3-VL) aren't written.
        derivatives: Arguments of `run_full`; without them, the pass has no gradients.
    """
    table = IMAGE_TOKENS.get(model.module)
    inside = [write for write in writes if write.stack == "vision"]
    asked = [read for read in reads if read.stack == "vision"]
    within = [edge for edge in edges if edge.stack == "vision"]
    ablated = [circuit for circuit in circuits if circuit.stack == "vision"]
    blocks = _find_replaced_blocks(model, "vision")
    no_images = "vision" in batch.frames or "vision" not in model.others
    if no_images or not (inside or asked or within or ablated or blocks):
        needed = inside or asked or within or _find_vision_blocks(model)
        opened = _open_vision(model, batch) if needed else batch
        return TextPass(opened, list(writes), list(reads), list(edges), list(circuits))
    if table is None or table.encode is None:
        raise ValueError(f"`{model.name}` has no images whose vision encoder can be read")
    derivatives = derivatives or Derivatives(gradients=False, recompute=False, backward=None)
    given = inside, asked, blocks, within, ablated
    embedded, tensors = table.encode(batch, *given, derivatives)
    if stop is not None:
        embedded = [write for write in embedded if write.layer is None or write.layer <= stop]
    outside = [write for write in writes if write.stack != "vision"]
    rest = [edge for edge in edges if edge.stack != "vision"]
    left = [read for read in reads if read not in tensors]
    others = [circuit for circuit in circuits if circuit not in ablated]
    return TextPass(batch, [*embedded, *outside], left, rest, others, tensors)


_MAX_CACHED_BYTES = 1 << 31
"""Bytes of a `TensorCache` beyond which the oldest entries are dropped."""


class TensorCache:
    """Named tensors by token; beyond `_MAX_CACHED_BYTES`, without the oldest ones."""

    def __init__(self, room: int = _MAX_CACHED_BYTES) -> None:
        """Create an empty cache.

        Args:
            room: A smaller limit in bytes.
        """
        self._room = room
        self._entries: dict[Hashable, Mapping[str, Tensor]] = {}
        self._bytes = 0

    def find(
        self, token: Hashable, compute: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return the tensors of a token, computed if they aren't cached."""
        entry = self._entries.get(token)
        if entry is None:
            entry = compute()
            self._bytes += _count_bytes(entry)
            while self._entries and self._bytes > min(self._room, _MAX_CACHED_BYTES):
                oldest = next(iter(self._entries))
                self._bytes -= _count_bytes(self._entries.pop(oldest))
            self._entries[token] = entry
        return entry

    def drop(self, token: Hashable) -> None:
        """Drop the tensors of a token, if they are cached."""
        self._bytes -= _count_bytes(self._entries.pop(token, {}))


def _count_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


class ImageInputs:
    """The inputs of images or sounds that a model's encoder reads, by first token.

    They are pixels, a spectrogram, or pixels with `ATTENDED` and `TILES`, without the batch
    dimension. An input that the cache dropped is prepared again.
    """

    def __init__(self) -> None:
        self._prepare: dict[int, Callable[[LoadedModel], Mapping[str, Tensor]]] = {}
        self._cache = TensorCache()

    def add(self, token: int, prepare: Callable[[LoadedModel], Mapping[str, Tensor]]) -> None:
        """Add the function that prepares an input. It must not hold the model's module, which could
        then never be freed."""
        self._prepare.setdefault(token, prepare)

    def drop(self, token: int) -> None:
        """Drop the input of a token that no later pass reads."""
        del self._prepare[token]
        self._cache.drop(token)

    def find(self, model: LoadedModel, token: int) -> Mapping[str, Tensor]:
        """Return the input of a token, on the host. Raises KeyError if the token is unknown."""
        return self._cache.find(token, partial(self._prepare[token], model))


IMAGE_INPUTS: WeakKeyDictionary[nn.Module, ImageInputs] = WeakKeyDictionary()
"""By model whose encoder reads images or sounds."""


ENCODED_VECTORS: WeakKeyDictionary[nn.Module, TensorCache] = WeakKeyDictionary()
"""By model whose encoder reads an image or a sound and nothing else, the encoder's output [T,
d_model], called `ENCODED`, for inputs that passes without rules in the encoder needed."""


def with_encoded(model: LoadedModel, batch: Batch) -> Batch:
    """Return a batch with the vectors of its images or sounds, each encoded once and alone.

    The batch stays as it is if the encoder reads texts, whose vectors depend on padding, or if it
    has inputs already.
    """
    if model.shape.takes not in ("image to text", "sound to text") or batch.extra:
        return batch
    tokens: list[int] = batch.of_stack("encoder").ids[:, 0].tolist()
    distinct = list(dict.fromkeys(tokens))
    vectors = torch.stack([_encode_once(model, token) for token in distinct]).to(model.device)
    of_row = torch.tensor([distinct.index(token) for token in tokens], device=model.device)
    return replace(batch, extra={ENCODED: vectors[of_row]})


def _encode_once(model: LoadedModel, token: int) -> Tensor:
    """Return the output of the encoder for the image or sound of a token, on the host."""
    known = ENCODED_VECTORS.setdefault(model.module, TensorCache())
    blocks = tuple(_find_replaced_blocks(model, "encoder"))
    return known.find((token, blocks), partial(_encode, model, token))[ENCODED]


def _encode(model: LoadedModel, token: int) -> dict[str, Tensor]:
    module: Any = model.module
    given = IMAGE_INPUTS[module].find(model, token)
    inputs = {name: tensor[None].to(model.device) for name, tensor in given.items()}
    # `forward`, because `record_encoded` collects only calls of the pass itself.
    with torch.inference_mode(False), torch.no_grad():
        return {ENCODED: module.get_encoder().forward(**inputs).last_hidden_state[0].cpu()}


def list_images(model: LoadedModel, source: Batch) -> list[tuple[int, ...]]:
    """Return the first token of each image that an encoder reads, by prompt."""
    each = model.shape.attended or source.ids.shape[1]
    pairs = zip(source.ids.tolist(), source.lengths.tolist(), strict=True)
    return [tuple(ids[:count:each]) for ids, count in pairs]


def _find_inputs(model: LoadedModel, source: Batch, *, encoded: bool = True) -> dict[str, Any]:
    """Return the inputs [B, …] for the images or sounds that an encoder reads.

    Blocks that attend to images need all of a prompt, one after the other. Prompts with fewer of
    them than others have images of zeros without tiles.

    Args:
        model: The model.
        source: The tokens of the images.
        encoded: Whether to prefer vectors that were computed before to pixels.
    """
    known = IMAGE_INPUTS[model.module]
    entries = [
        [known.find(model, each) for each in numbers] for numbers in list_images(model, source)
    ]
    first = entries[0][0]
    names = [name for name in first if name == TILES or (name == ATTENDED) == encoded]
    if ATTENDED not in first:
        return {
            name: torch.stack([tensors[name] for [tensors] in entries]).to(model.device)
            for name in first
        }
    joined = {name: [torch.cat([each[name] for each in own]) for own in entries] for name in names}
    return {
        name: pad_sequence(tensors, batch_first=True).to(model.device)
        for name, tensors in joined.items()
    }


def _open_vision(model: LoadedModel, batch: Batch) -> Batch:
    """Return a batch whose images are encoded in the pass, if blocks of the model attend to images;
    other batches as they are."""
    if not model.shape.attends_to_image:
        return batch
    if batch.extra:
        return without_vectors(batch)
    return replace(batch, extra=_find_inputs(model, batch.of_stack("encoder"), encoded=False))


def reads_pixels(frame: TokenFrame) -> bool:
    """Return whether a pass of a model whose blocks attend to images encodes them itself."""
    return isinstance(frame, Batch) and bool(frame.extra) and ATTENDED not in frame.extra


def build_image_arguments(model: LoadedModel, batch: Batch) -> dict[str, Any]:
    """Build the arguments that name the images of prompts, if blocks attend to them.

    Returns:
        The vectors or pixels of images, and the tiles that each token [B, T] attends to.
    """
    given = dict(batch.extra) or _find_inputs(model, batch.of_stack("encoder"))
    return _attend_to_image(model, batch.ids, given)


def find_image_readers(model: LoadedModel, ids: Tensor) -> Tensor:
    """Return [B, T]: whether each token is not before the image of its prompt, in a model whose
    blocks attend to images. In a prompt without the image's token, all tokens are."""
    module: Any = model.module
    seen = (ids == module.config.image_token_index).cumsum(1) > 0
    return seen | ~seen.any(1, keepdim=True)


def _attend_to_image(model: LoadedModel, ids: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the vectors or pixels of images, and the tiles that each token [B, T] attends to.

    Tokens attend to an image from its token to the next image, and to all images whose tokens
    follow each other; without a token of an image, all tokens attend to it.
    """
    module: Any = model.module
    tiles: Tensor = given[TILES]  # [B, images, tiles]
    is_image = ids == module.config.image_token_index
    # Images whose tokens follow each other have one number. It doesn't matter that columns wrap.
    group = (is_image & ~is_image.roll(1, 1)).cumsum(1)
    mask = tiles.new_zeros(*ids.shape, *tiles.shape[1:])
    count = is_image.cumsum(1)
    for number in range(tiles.shape[1]):
        own = is_image & (count == number + 1)
        its_group = (group * own).sum(1, keepdim=True)
        seen = (count > number) & (group == its_group)
        mask[:, :, number] = seen[..., None] * tiles[:, None, number]
    mask += ~is_image.any(1)[:, None, None, None] * tiles[:, None]
    if ATTENDED in given:
        return {ATTENDED: given[ATTENDED], "cross_attention_mask": mask}
    pixels = {name: each for name, each in given.items() if name != TILES}
    return {**pixels, "cross_attention_mask": mask}


ATTENDED_MAPS: WeakKeyDictionary[nn.Module, TensorCache] = WeakKeyDictionary()
"""By model whose blocks attend to images: the keys before their norm, and the values, of each image
in all of these blocks, by path of the map, on the model's device."""

_MEMORY_SHARE = 1 / 8
"""Share of the device's free memory that `ATTENDED_MAPS` may use."""


@contextmanager
def map_images_once(
    model: LoadedModel, batch: Batch, arguments: Mapping[str, Any]
) -> Generator[None]:
    """Compute the keys and values of each image once for all passes, if blocks attend to vectors of
    images that were encoded before. Blocks may run on the first rows only."""
    states = arguments.get(ATTENDED)
    if states is None or batch.extra or "cross" not in model.others:
        yield
        return
    blocks = model.others["cross"].anatomy.blocks
    paths = [projection for block in blocks for projection in block.projections[1:]]
    modules = {path: model.module.get_submodule(path) for path in paths}
    if any("forward" in vars(each) for each in modules.values()):  # it computes something else
        yield
        return
    images = list_images(model, batch.of_stack("encoder"))
    each = model.shape.attended
    distinct = {
        token: (row, number)
        for row, numbers in enumerate(images)
        for number, token in enumerate(numbers)
    }
    forwards = {path: each.forward for path, each in modules.items()}

    def compute(row: int, number: int) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            one = states[row : row + 1, number * each : (number + 1) * each].clone()
            return {path: forward(one)[0] for path, forward in forwards.items()}

    known = ATTENDED_MAPS.get(model.module)
    if known is None:
        room = int(get_free_memory(model.device) * _MEMORY_SHARE)
        known = ATTENDED_MAPS[model.module] = TensorCache(room)
    # Blocks may have the weights of other blocks in a pass.
    weights = tuple(id(parameter) for each in modules.values() for parameter in each.parameters())
    entries = {
        token: known.find((token, weights), partial(compute, *place))
        for token, place in distinct.items()
    }

    def share(path: str) -> Callable[[Tensor], Tensor]:
        def forward(given: Tensor) -> Tensor:
            if given.data_ptr() != states.data_ptr() or given.shape[1:] != states.shape[1:]:
                return forwards[path](given)
            every = [torch.cat([entries[token][path] for token in numbers]) for numbers in images]
            return pad_sequence(every, batch_first=True)[: len(given)]

        return forward

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(replace_forward(module, share(path)))
        yield


@contextmanager
def hide_missing_images(model: LoadedModel, batch: Batch) -> Generator[None]:
    """Hide the images that prompts with fewer of them than others of the batch don't have, while
    the context is open.

    The library's mask hides them from all tokens except those before the first image, which attend
    to everything.
    """
    lengths = None
    if model.shape.attends_to_image and "encoder" in batch.frames:
        lengths = batch.of_stack("encoder").lengths
    if lengths is None or bool((lengths == lengths.max()).all()):
        yield
        return
    missing = torch.arange(int(lengths.max())) >= lengths[:, None]

    def hide(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask: Tensor = kwargs["cross_attention_mask"]
        where = missing.to(mask.device)[:, None, None]
        hidden = mask.masked_fill(where, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "cross_attention_mask": hidden}

    module: Any = model.module
    handle = module.model.language_model.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


ENCODED = "encoder_outputs"
"""Input of a batch [B, T of the encoder, d_model]: the vectors that an encoder computed before. The
encoder then doesn't run."""


def build_arguments(model: LoadedModel, batch: Batch) -> dict[str, Any]:
    """Build the arguments of the model's forward."""
    ids, mask = batch.ids, batch.mask
    match model.shape.takes:
        case "image":
            return dict(batch.extra)
        case "attended image":
            given = build_image_arguments(model, batch)
            given |= {"position_ids": batch.position_ids()}
            return given | {"input_ids": ids, "attention_mask": mask}
        case "two texts" | "audio" | "image to text" | "sound to text":
            given: dict[str, Any] = dict(batch.extra)
            encoder = batch.of_stack("encoder")
            if ENCODED in given:
                given = {ENCODED: BaseModelOutput(given[ENCODED])}
            elif model.shape.takes == "two texts":
                given = {"input_ids": encoder.ids}
            elif not given:
                given = _find_inputs(model, encoder)
            if model.shape.takes == "two texts":
                given["attention_mask"] = encoder.mask
            if encoder.numbers is not None and ENCODED not in given:
                given["position_ids"] = encoder.numbers
            if batch.numbers is not None:
                given["decoder_position_ids"] = batch.numbers
            return given | {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        case _:
            plain = not batch.extra or model.calling.places_images
            given = build_text_inputs(model, ids, number_positions(model, batch) if plain else None)
            return {**given, **batch.extra, "attention_mask": mask}


def build_text_inputs(
    model: LoadedModel, ids: Tensor, positions: Tensor | None
) -> dict[str, Tensor]:
    """Build inputs from tokens and positions (0 for a prompt's first), in the model's counting."""
    calling = model.calling
    given = {"input_ids": ids}
    if positions is not None and calling.first_position is not None:
        given["position_ids"] = positions + calling.first_position
    table = IMAGE_TOKENS.get(model.module)
    types = None if table is None else table.token_types(ids)
    if types is not None:
        given["token_type_ids"] = types
    elif "token_type_ids" in calling.accepts:
        given["token_type_ids"] = torch.full_like(ids, calling.token_type)
    return given


def call_model(model: LoadedModel, arguments: Mapping[str, Any]) -> Tensor:
    """Call the model without a cache: [B, T, …].

    A classifier of prompts gives its output to each of their tokens; packed tokens each have their
    own output.
    """
    if model.calling.scores is not None:
        return _call_scores(model, model.calling.scores, arguments)
    output = call_module(model, arguments)
    if "logits" not in output:
        return output.last_hidden_state
    if model.shape.takes == "image" or model.calling.reads == "every token":
        return output.logits
    rows, tokens = arguments["input_ids"].shape
    if len(output.logits) != rows:
        return output.logits[None]
    return output.logits[:, None].expand(-1, tokens, -1)


class _ScoresComputed(Exception):
    """Signal that each token's output is known, so that the forward pass can stop."""


def _call_scores(model: LoadedModel, path: str, arguments: Mapping[str, Any]) -> Tensor:
    """Return [B, T, labels] from the module that computes each token's output."""
    scores: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        scores.append(output)
        raise _ScoresComputed

    handle = model.module.get_submodule(path).register_forward_hook(stop)
    try:
        call_module(model, arguments)
    except _ScoresComputed:
        pass
    finally:
        handle.remove()
    return scores[0]


def call_module(model: LoadedModel, arguments: Mapping[str, Any]) -> Any:
    """Return the model's complete output."""
    cache = {"use_cache": False} if "use_cache" in model.calling.accepts else {}
    return model.module(**arguments, **cache)


MAX_BOUND_LOGITS = 2**24
"""Number of logits held at once while the largest and the smallest are determined."""


@contextmanager
def narrow_unembedding(
    model: LoadedModel, tokens: Tensor | None, *, ends: bool = False
) -> Generator[None]:
    """Restrict the unembedding to these tokens ([K] long), in this order, if possible.

    Otherwise `select_token_logits` selects them from all logits.

    Args:
        tokens: The tokens; None for all.
        ends: Add two columns: the largest and the smallest logit of all tokens.
    """
    if tokens is None or model.anatomy.unembedding is None or not model.calling.narrows:
        yield
        return
    module = model.module.get_submodule(model.anatomy.unembedding)
    with load_weights(module):
        every, biases = module.get_parameter("weight"), getattr(module, "bias", None)
        rows = tokens.to(every.device)
        weight, bias = every[rows], None if biases is None else biases[rows]

    def forward(hidden: Tensor) -> Tensor:
        few = nn.functional.linear(hidden.to(weight.device), weight, bias)
        if not ends:
            return few
        with load_weights(module):
            every, biases = module.get_parameter("weight"), getattr(module, "bias", None)
            vectors = hidden.to(every.device).flatten(0, -2)
            parts = vectors.split(max(1, MAX_BOUND_LOGITS // len(every)))
            both = [_find_bounds(nn.functional.linear(part, every, biases)) for part in parts]
        return torch.cat([few, torch.cat(both).reshape(*few.shape[:-1], 2).to(few)], -1)

    with replace_forward(module, forward):
        yield


def select_token_logits(
    model: LoadedModel, logits: Tensor, tokens: Tensor | None, *, ends: bool = False
) -> Tensor:
    """Select these tokens' logits from a pass under `narrow_unembedding`, followed by `ends`."""
    narrow = model.anatomy.unembedding is not None and model.calling.narrows
    if tokens is None or narrow:
        return logits
    few = logits[..., tokens.to(logits.device)]
    return torch.cat([few, _find_bounds(logits)], -1) if ends else few


def _find_bounds(logits: Tensor) -> Tensor:
    """Return [..., 2] of [..., vocab]: largest and smallest logit, without tokens at -inf."""
    least = logits.masked_fill(logits.isneginf(), torch.inf).amin(-1)
    return torch.stack([logits.amax(-1), least], -1)


_POSITION_ATTRIBUTES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
"""Attributes with a module's index, by which a cache finds its keys."""

_SHARED_BIAS = "relative_attention_bias"
"""Module of position biases that the first block of a stack of T5 computes for all of its blocks,
and attribute `has_…` of the attention that computes them."""


_ENCODER_BLOCKS: WeakKeyDictionary[nn.Module, BlockPairs] = WeakKeyDictionary()
"""By model, the blocks of encoders that are replaced while `replace_blocks` is open."""


def _find_replaced_blocks(model: LoadedModel, stack: str) -> BlockPairs:
    return [pair for pair in _ENCODER_BLOCKS.get(model.module, ()) if pair[0][0] == stack]


def _find_vision_blocks(model: LoadedModel) -> BlockPairs:
    """Return the blocks that are replaced in the passes of a model whose blocks attend to images.

    Images that are encoded once for all passes have the vectors of the model's own blocks.
    """
    attends = model.shape.attends_to_image
    return _find_replaced_blocks(model, "vision") if attends else ()


@contextmanager
def replace_blocks(model: LoadedModel, pairs: BlockPairs) -> Generator[None]:
    """Run blocks with the weights of others while the context is open; hooks stay in place.

    Blocks of a vision encoder are replaced in the passes that encode the images of prompts.
    """
    before = _ENCODER_BLOCKS.get(model.module, ())
    with exchange_blocks(model, [pair for pair in pairs if pair[0][0] != "vision"]):
        _ENCODER_BLOCKS[model.module] = [pair for pair in pairs if pair[0][0]]
        try:
            yield
        finally:
            _ENCODER_BLOCKS[model.module] = before


@contextmanager
def exchange_blocks(model: LoadedModel, pairs: BlockPairs) -> Generator[None]:
    """Replace blocks in all passes while the context is open, those of a vision encoder too."""
    with ExitStack() as stack:
        others = [
            None if of is None else _get_block_weights(_get_block(model, (place[0], of)))
            for place, of in pairs
        ]
        for (to, _), weights in zip(pairs, others, strict=True):
            block = _get_block(model, to)
            if weights is None:
                gives_more = to[0] or shares_position_biases(model, to[0])
                stub = BlockStub(model.calling.block_returns)
                skipped = SkippedBlock(block.forward) if gives_more else stub
                stack.enter_context(replace_forward(block, skipped))
                continue
            for name, part in block.named_modules():
                if name in weights:  # not position biases for all blocks of the stack
                    stack.callback(_put_weights, part, _get_own_weights(part))
                    _put_weights(part, weights[name])
        yield


def shares_position_biases(model: LoadedModel, stack: str) -> bool:
    """Return whether the first block of a stack computes position biases for all of its blocks."""
    has_own = [
        any(
            name.endswith(_SHARED_BIAS)
            for name, _ in _get_block(model, (stack, layer)).named_modules()
        )
        for layer in range(len(model.stack(stack).anatomy.blocks))
    ]
    return has_own[0] and not all(has_own)


def explain_block_mismatch(model: LoadedModel, to: BlockPlace, of: int | None) -> str:
    """Explain why a block can't replace another of its stack; empty if it can."""
    block = _get_block(model, to)
    every = [block] if of is None else [block, _get_block(model, (to[0], of))]
    if any("_hf_hook" in part.__dict__ for module in every for part in module.modules()):
        return "its weights are stored elsewhere while a block isn't running"
    if of is None:
        return ""
    names = (dict(module.named_modules()) for module in every)
    lone = set.symmetric_difference(*map(set, names))
    shared = {name for name in lone if name.endswith(_SHARED_BIAS)}
    own, other = (
        [part for part in _describe_parts(module) if part[0] not in shared] for module in every
    )
    for part, replacement in zip(own, other, strict=False):
        if part != replacement:
            name = f"`{replacement[0]}` of " if replacement[0] else ""
            return f"{name}block {of} has a different structure"
    return "" if len(own) == len(other) else f"block {of} has a different structure"


def _get_block(model: LoadedModel, place: BlockPlace) -> nn.Module:
    stack, layer = place
    return model.module.get_submodule(model.stack(stack).anatomy.blocks[layer].path)


ModuleWeights = tuple[dict[str, Any], dict[str, Any]]


def _get_own_weights(part: nn.Module) -> ModuleWeights:
    return dict(part._parameters), dict(part._buffers)


def _get_block_weights(block: nn.Module) -> dict[str, ModuleWeights]:
    """Return the weights of every module in the block, by name."""
    return {name: _get_own_weights(part) for name, part in block.named_modules()}


def _put_weights(part: nn.Module, weights: ModuleWeights) -> None:
    part._parameters.clear()
    part._parameters.update(weights[0])
    part._buffers.clear()
    part._buffers.update(weights[1])


def _describe_parts(block: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield the modules of a block with their sizes and settings."""
    for name, part in block.named_modules():
        if isinstance(part, nn.Identity | nn.Dropout) or "DropPath" in type(part).__name__:
            yield name, "hands on"  # the identity outside of training, whatever its rate
            continue
        sizes = [
            (key, None if each is None else (each.shape, each.dtype, each.device))
            for key, each in (*part._parameters.items(), *part._buffers.items())
        ]
        settings = [
            (key, value)
            for key, value in sorted(part.__dict__.items())
            if isinstance(value, bool | int | float | str)
            and key not in (*_POSITION_ATTRIBUTES, f"has_{_SHARED_BIAS}")
        ]
        loose = [key for key, value in part.__dict__.items() if isinstance(value, torch.Tensor)]
        alone = id(part) if loose else None  # has tensors that aren't weights
        yield name, type(part), sizes, settings, alone
