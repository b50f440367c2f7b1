"""Proof of a model's anatomy on a few tokens: components add up, and writes have effects.

Each check is a function from a `CheckBench` to outcomes; it is registered in the tuple `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from mechdsl.forward.hooks.batch import Batch
from mechdsl.forward.hooks.model import CheckOutcome, LoadedModel
from mechdsl.loading.bench import CheckBench, build_text_sample, has_images
from mechdsl.loading.verify.checks import (
    check_attention,
    check_block_order,
    check_causality,
    check_cross_attention,
    check_expert_sums,
    check_final_norm,
    check_gains,
    check_head_sums,
    check_image_merge,
    check_logits,
    check_neuron_sums,
    check_norm_positions,
    check_norms_of_sums,
    check_packed_rows,
    check_padding,
    check_position_embedding,
    check_sublayer_sums,
    check_unembedding_order,
    check_writes,
)
from mechdsl.loading.verify.head_checks import check_heads, check_rotary_order


def run_checks(model: LoadedModel, given: Batch, stack: str = "") -> Iterator[CheckOutcome]:
    """Yield the outcomes of all checks on a stack, in order.

    Later checks rely on earlier ones, so callers stop at the first failure. A language model with
    images is checked on text; only what images may change is checked on images, because a row with
    an image has hundreds of tokens.

    Args:
        given: A batch of two rows.
        stack: The stack; empty for the main one.
    """
    if stack:
        checks = tuple(check for check in CHECKS if check not in MAIN_STACK_CHECKS)
        yield from _run_each(CheckBench.of(model, stack, given), checks, f" ({stack})")
        return
    seeing = has_images(given)
    yield from _run_each(
        CheckBench.of(model, "", build_text_sample(model) if seeing else given), CHECKS, ""
    )
    if seeing:
        yield from _run_each(CheckBench.of(model, "", given), IMAGE_CHECKS, " (with an image)")


def _run_each(
    bench: CheckBench, checks: Sequence[AnatomyCheck], named: str
) -> Iterator[CheckOutcome]:
    for check in checks:
        with torch.inference_mode():
            outcomes = tuple(check(bench))
        said = (one for one in outcomes if one.compared)
        yield from (replace(one, identity=one.identity + named) for one in said)


AnatomyCheck = Callable[[CheckBench], Iterator[CheckOutcome]]

CHECKS: tuple[AnatomyCheck, ...] = (
    check_logits,
    check_padding,
    check_causality,
    check_position_embedding,
    check_block_order,
    check_sublayer_sums,
    check_gains,
    check_norms_of_sums,
    check_norm_positions,
    check_cross_attention,
    check_final_norm,
    check_unembedding_order,
    check_head_sums,
    check_neuron_sums,
    check_expert_sums,
    check_heads,
    check_rotary_order,
    check_writes,
    check_packed_rows,
    check_attention,
)
MAIN_STACK_CHECKS = (
    check_logits,
    check_attention,
    check_padding,
    check_causality,
    check_position_embedding,
    check_packed_rows,
)
"""Checks of the model as a whole."""
IMAGE_CHECKS: tuple[AnatomyCheck, ...] = (
    check_logits,
    check_image_merge,
    check_block_order,
    check_sublayer_sums,
    check_gains,
    check_norms_of_sums,
    check_norm_positions,
    check_unembedding_order,
    check_head_sums,
    check_neuron_sums,
    check_packed_rows,
)
"""Checks of a language model on prompts with images."""
