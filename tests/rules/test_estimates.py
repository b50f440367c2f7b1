"""`using`: estimates by gradients, in a file, against plain autograd on the bare model in 64 bits, one
unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import ROWS, Prompt, Record, experiment, ids_of, prompt, run_file, token
from ..execute.support import MODES as WAYS
from ..reference.gradients import Where, estimated, taken
from .models import bare, double

FAMILIES = ("gpt2", "llama", "gpt_neox")
STEPS = 3


# --- where sites are, by hand ---------------------------------------------------------------------

_BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "gpt_neox": "gpt_neox.layers"}
_EMBED = {"gpt2": "transformer.wte", "llama": "model.embed_tokens", "gpt_neox": "gpt_neox.embed_in"}
_OUTPUT = {"gpt2": "attn.c_proj", "llama": "self_attn.o_proj", "gpt_neox": "attention.dense"}


def where(family: str, site: str, layer: int | None) -> Where:
    block = f"{_BLOCKS[family]}.{layer}"
    config = double(family).config
    heads = config.num_attention_heads
    match site:
        case "embed":
            return Where(_EMBED[family], "out")
        case "resid_pre" | "resid_post":
            return Where(block, "in" if site == "resid_pre" else "out")
        case "z":
            return Where(f"{block}.{_OUTPUT[family]}", "in", heads)
        case "mlp_out":
            return Where(f"{block}.mlp", "out")
        case "k" | "v":  # of llama, whose heads share them
            return Where(f"{block}.self_attn.{site}_proj", "out", config.num_key_value_heads)
        case _:
            raise AssertionError(site)


# --- metrics by hand ------------------------------------------------------------------------------

LONG = "w7 w9 w2"
Metric = tuple[Sequence[int], Callable[[Tensor, Prompt, Record, Tensor], Tensor]]
"""What stands behind the prompt, and the number of [T, vocab], the prompt, its record, and the
logits of the prompt of `other` at its end."""


def _long(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    logs = logits[own.last : own.last + 3].log_softmax(-1)
    return sum((logs[n, one] for n, one in enumerate(ids_of(LONG.split())[1:])), torch.zeros(()))


def _kl(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    log_p, log_q = other.log_softmax(-1), logits[own.last].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def _loss(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    logs = logits[:-1].log_softmax(-1)
    return -logs[torch.arange(own.last), torch.tensor(own.ids[1:])].mean()


def _mixed(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    shares = logits[own.last].softmax(-1)
    at_cue = logits[own.cue].softmax(-1)
    del at_cue
    return (
        logits[own.last, token(record["a"])] * shares[token(record["b"])] / 2
        - shares.square().sum() * 0
    )


def _difference(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    return logits[own.last, token(record["a"])] - logits[own.last, token(record["b"])]


def _prob(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    return logits[own.last].softmax(-1)[token(record["a"])]


def _at_cue(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    return logits[own.cue, token(record["a"])]


METRICS: Mapping[str, Metric] = {
    "logit(answer) - logit(wrong)": ((), _difference),
    "prob(answer)": ((), _prob),
    f'logprob(" {LONG}")': (ids_of(LONG.split())[1:3], _long),
    "kl(other)": ((), _kl),
    "loss": ((), _loss),
    "logit(answer) * prob(wrong) / 2": ((), _mixed),
    "logit(answer) at cue token": ((), _at_cue),
}
ONE = {"logit(answer) - logit(wrong)": METRICS["logit(answer) - logit(wrong)"]}


def _called(text: str, own: Prompt, record: Record, other: Tensor) -> Callable[[Any], Tensor]:
    behind, number = METRICS[text]

    def forward(module: Any) -> Tensor:
        ids = torch.tensor([[*own.ids, *behind]])
        return number(module(input_ids=ids).logits[0], own, record, other)

    return forward


@cache
def logits_at_the_end(family: str, ids: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return double(family)(input_ids=torch.tensor([ids])).logits[0, -1]


@cache
def read(family: str, ids: tuple[int, ...], at: Where) -> Tensor:
    """[T, units, width] of an unpatched prompt."""
    found = taken(
        double(family), at, lambda module: module(input_ids=torch.tensor([ids])).logits.sum()
    )
    return found.value


# --- estimates by hand ----------------------------------------------------------------------------

Key = tuple[Any, ...]
Cells = Callable[[Prompt, int], Mapping[Key, Sequence[tuple[int, int]]]]
"""Of a prompt and the units of a site: by label (without the layer), the vectors of each cell."""


def by_hand(
    family: str,
    site: str,
    layer: int | None,
    cells: Cells,
    text: str,
    kind: str,
    ways: tuple[str, str] = ("other", "clean"),
    fill: Callable[[Prompt, Prompt, int], int | None] = lambda base, source, at: at,
) -> dict[Key, list[float]]:
    """fill: of both prompts and a position, which position of the source is written there; None:
    zeros are."""
    at = where(family, site, layer)
    found: dict[Key, list[float]] = {}
    for record in ROWS:
        base, source = prompt(record, ways[1]), prompt(record, ways[0])
        theirs = read(family, tuple(source.ids), at)
        compared = logits_at_the_end(family, tuple(prompt(record, "other").ids))

        def written(position: int, unit: int, base: Prompt = base, source: Prompt = source,
                    theirs: Tensor = theirs) -> Tensor:  # fmt: skip
            there = fill(base, source, position)
            return torch.zeros_like(theirs[0, unit]) if there is None else theirs[there, unit]

        forward = _called(text, base, record, compared)
        own = cells(base, at.units)
        for key, value in estimated(double(family), at, forward, own, written, kind, STEPS).items():
            found.setdefault(key, []).append(value)
    return found


def heads_at_last(own: Prompt, units: int) -> dict[Key, list[tuple[int, int]]]:
    return {(unit,): [(own.last, unit)] for unit in range(units)}


def all_at_last(own: Prompt, units: int) -> dict[Key, list[tuple[int, int]]]:
    return {(): [(own.last, unit) for unit in range(units)]}


def whole_subject(own: Prompt, units: int) -> dict[Key, list[tuple[int, int]]]:
    return {(): [(at, unit) for at in own.subject for unit in range(units)]}


def heads_at_subject(own: Prompt, units: int) -> dict[Key, list[tuple[int, int]]]:
    return {(unit,): [(at, unit) for at in own.subject] for unit in range(units)}


def two_places(own: Prompt, units: int) -> dict[Key, list[tuple[int, int]]]:
    return {("cue token",): [(own.cue, 0)], ("last token",): [(own.last, 0)]}


def agrees(
    result: ExperimentResult,
    number: int,
    expected: Mapping[Key, Sequence[float]],
    layer: int | None,
) -> float:
    """Each cell of a layer has what was worked out; gives the largest."""
    data = result.measures[number]
    found = data.patched if data.effect == "raw" else data.patched - data.base
    largest, seen = 0.0, 0
    for values, cell in zip(found, result.cells, strict=True):
        if layer is not None and cell.coords["layer"] != layer:
            continue
        key = tuple(cell.coords[axis] for axis in result.axes if axis != "layer")
        wanted = np.array(expected[key])
        allowed = np.minimum(1e-4, np.maximum(1e-3 * np.abs(wanted), 1e-5))
        assert (np.abs(values - wanted) <= allowed).all(), (key, values, wanted)
        largest, seen = max(largest, float(np.abs(wanted).max())), seen + 1
    assert seen == len(expected)
    return largest


def measured(text: str, effect: str) -> str:
    metric, _, at = text.partition(" at ")
    return f"measure {metric} as {effect}" + (f" at {at}" if at else "")


# --- tests ----------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, str, Cells, tuple[int | None, ...]]] = {
    "heads": ("z", "patch layer * head * at last token", heads_at_last, (0, 1, 2)),
    "joined heads": ("z", "patch layer * heads * at last token", all_at_last, (0, 1, 2)),
    "streams": ("resid_pre", "patch resid_pre layer * at subject tokens", whole_subject, (0, 1, 2)),
    "places": (
        "resid_post",
        "patch resid_post layer * at cue token, last token",
        two_places,
        (0, 1, 2),
    ),
    "embedding": ("embed", "patch embed at subject tokens", whole_subject, (None,)),
}
KINDS = ("gradient", "gradient_input", "integrated_gradients")


def using(kind: str) -> str:
    return f"using {kind}" + (f"(steps: {STEPS})" if kind == KINDS[-1] else "")


@pytest.mark.parametrize("mode", ["planned", "small passes"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sites_and_positions(family: str, kind: str, mode: str, tmp_path: Path) -> None:
    effect = "raw" if kind == "gradient" else "delta"
    text = "".join(
        experiment(
            name.replace(" ", "_"),
            "prompts p",
            "from other into clean",
            rule,
            using(kind),
            measured(next(iter(ONE)), effect),
        )
        for name, (_, rule, _, _) in CASES.items()
    )
    found = run_file(text, tmp_path, bare(family), WAYS[mode])
    for name, (site, _, cells, layers) in CASES.items():
        for layer in layers:
            expected = by_hand(family, site, layer, cells, next(iter(ONE)), kind)
            agrees(found[name.replace(" ", "_")], 0, expected, layer)
