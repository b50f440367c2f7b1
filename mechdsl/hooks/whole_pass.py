# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Reading and writing activations of a running model.

Hooks are gone when the call returns, however it ends. Here is the plain way, whole passes over
padded rows; `packed` runs only what changes, with the same hooks.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mechdsl.hooks.attention_functions import attend_whole
from mechdsl.hooks.batch import Batch
from mechdsl.hooks.block_attention import AttentionCall, block_attention
from mechdsl.hooks.calls import bare_logits, chosen, narrowed
from mechdsl.hooks.inside_attention import EdgeWrite
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.site_hooks import PassStopped, SiteWork


@dataclass
class RunResult:
    """What came out of a pass."""

    logits: Tensor | None
    """[B, T, vocab], or [B, n, vocab] with `logits_at`; None if the run stopped early."""
    largest: Tensor | None = None
    """[B, n], with `tokens`: the size of the largest logit of the whole vocabulary."""
    reads: dict[SiteRead, Tensor] = field(default_factory=dict[SiteRead, Tensor])
    """[B, T, units, width] each, copies (inference tensors, but with `gradients`); values after the
    writes at the same site."""


def run_whole(
    model: LoadedModel,
    batch: Batch,
    *,
    stop: int | None = None,
    writes: Sequence[SiteWrite] = (),
    reads: Sequence[SiteRead] = (),
    logits_at: Tensor | None = None,
    tokens: Tensor | None = None,
    edges: Sequence[EdgeWrite] = (),
    gradients: bool = False,
) -> RunResult:
    """Run the whole model on padded rows, with writes and reads.

    stop: number of blocks that run, `n_layers + 1` with the final norm; what lies above is not
        computed and `logits` is None. None runs everything.
    logits_at: [B, n] long, positions (in the unpadded prompt) whose logits are wanted; all by
        default. Logits can't be read or written with it.
    tokens: [K] long, the only tokens whose logits are wanted; `vocab` is K then.
    edges: of attention, that are changed.
    gradients: what comes out hangs on what is written that wants a gradient, for autograd.

    Raises ValueError for places that don't exist, WriteMismatch for writes that couldn't happen
    exactly once, ReadMismatch for reads that didn't. The model is left as it was found.
    """
    work = SiteWork(model, batch, writes, reads, stop, edges)
    if logits_at is not None:
        work.keep_logits(logits_at)
    narrow = narrowed(model, tokens, ends=True)
    mode = _differentiable(model) if gradients else torch.inference_mode()
    with mode, work.installed(), opened(model, work), narrow:
        try:
            logits = bare_logits(model, batch)
        except PassStopped:
            logits = None
    largest: Tensor | None = None
    if logits is not None:
        logits = chosen(model, work.output(logits), tokens, ends=True)
        if tokens is not None:
            logits, ends = logits[..., :-2], logits[..., -2:]
            largest = ends.abs().amax(-1)
    work.check()
    return RunResult(logits, largest, work.found)


@contextmanager
def _differentiable(model: LoadedModel) -> Generator[None]:
    """Autograd follows what is written, and not the weights: nothing is kept for these, and what
    is made of them alone, such as position biases that a library has kept, isn't followed."""
    wanted = [each for each in model.module.parameters() if each.requires_grad]
    for each in wanted:
        each.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for each in wanted:
            each.requires_grad_()


@contextmanager
def opened(model: LoadedModel, work: SiteWork) -> Generator[None]:
    """In layers where something is read or written within attention, that is computed here."""
    if not work.within:
        yield
        return

    def attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        layer = None if call.across else work.layer(call.layer, call.query)
        if layer is None:
            return call.unchanged()
        query, key, value = call.query, call.key, call.value
        return attend_whole(query, key, value, call.mask, layer, **call.arguments), None

    with block_attention(model, attention, masked=True):
        yield
