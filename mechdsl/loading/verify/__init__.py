"""Proves a model's anatomy on a few tokens: the parts add up, and writing them does something.

Each check is a function from a `Bench` to outcomes, in the tuple `CHECKS`; a new one is one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from mechdsl.hooks.batch import Batch
from mechdsl.hooks.loaded import LoadedModel, Outcome
from mechdsl.loading.probe import texts
from mechdsl.loading.verify.bench import Bench, with_images
from mechdsl.loading.verify.heads import heads_are_theirs, rotary_comes_behind
from mechdsl.loading.verify.idle import idle_sites
from mechdsl.loading.verify.opened import OPENED, attention_opens, with_sites_within
from mechdsl.loading.verify.restarting import (
    RESTART,
    RESTART_IMAGES,
    restarted_otherwise,
    rows_can_be_restarted,
)
from mechdsl.loading.verify.sums import (
    blocks_join,
    cross_attention_reads_the_encoder,
    experts_add_up,
    gains_are_passed_on,
    heads_add_up,
    images_are_merged,
    last_norm_is_behind,
    later_tokens_are_unseen,
    logits_are_the_models,
    neurons_add_up,
    norms_are_in_front,
    norms_of_sums,
    padding_changes_nothing,
    positions_are_added,
    sublayers_add_up,
    unembedding_is_last,
)
from mechdsl.loading.verify.writing import writes_work

__all__ = [
    "CHECKS",
    "OPENED",
    "RESTART",
    "RESTART_IMAGES",
    "idle_sites",
    "restarted_otherwise",
    "verify",
    "with_sites_within",
]


def verify(model: LoadedModel, given: Batch, stack: str = "") -> Iterator[Outcome]:
    """The outcomes of all checks on a stack, in order; later checks build on earlier ones, so a
    caller stops at the first that isn't passed. given: what the model is run on, two rows.

    A language model that sees images is proved on text, and what images may change on images: a
    row with an image is hundreds of tokens long.
    """
    if stack:
        checks = tuple(check for check in CHECKS if check not in MAIN_ONLY)
        yield from _checked(Bench.of(model, stack, given), checks, f" ({stack})")
        return
    seeing = with_images(given)
    yield from _checked(Bench.of(model, "", texts(model) if seeing else given), CHECKS, "")
    if seeing:
        yield from _checked(Bench.of(model, "", given), WITH_IMAGES, " (with an image)")


def _checked(bench: Bench, checks: Sequence[Check], named: str) -> Iterator[Outcome]:
    for check in checks:
        with torch.inference_mode():
            outcomes = tuple(check(bench))
        said = (one for one in outcomes if one.compared)
        yield from (replace(one, identity=one.identity + named) for one in said)


Check = Callable[[Bench], Iterator[Outcome]]

CHECKS: tuple[Check, ...] = (
    logits_are_the_models,
    padding_changes_nothing,
    later_tokens_are_unseen,
    positions_are_added,
    blocks_join,
    sublayers_add_up,
    gains_are_passed_on,
    norms_of_sums,
    norms_are_in_front,
    cross_attention_reads_the_encoder,
    last_norm_is_behind,
    unembedding_is_last,
    heads_add_up,
    neurons_add_up,
    experts_add_up,
    heads_are_theirs,
    rotary_comes_behind,
    writes_work,
    rows_can_be_restarted,
    attention_opens,
)
MAIN_ONLY = (
    logits_are_the_models,
    attention_opens,
    padding_changes_nothing,
    later_tokens_are_unseen,
    positions_are_added,
    rows_can_be_restarted,
)
"""Checks of the model as a whole."""
WITH_IMAGES: tuple[Check, ...] = (
    logits_are_the_models,
    images_are_merged,
    blocks_join,
    sublayers_add_up,
    gains_are_passed_on,
    norms_of_sums,
    norms_are_in_front,
    unembedding_is_last,
    heads_add_up,
    neurons_add_up,
    rows_can_be_restarted,
)
"""Checks of a language model on prompts with images."""
