"""Models in bfloat16 and float16, and the tolerance of their results.

A 16-bit model rounds differently with a padded batch or packed rows than with one prompt, so
results can't be equal. On these tiny models with large random weights, a 16-bit model differs from
float32 by 1 to 5 units of its precision (`finfo.eps`, 2⁻⁷ or 2⁻¹⁰) times the largest logit. Results
are compared with plain hooks on the bare model, one unpadded prompt at a time:

- No logit differs by more than `FURTHEST` units of the largest logit.
- Over all writes at a site, the root mean square difference from the float32 model is at most
  `NOISIER` times that of plain hooks. A lost or misplaced write would differ by its effect, which
  is many times larger.

In models with routers, rounding decides between experts of similar scores, and results would differ
by an expert's output. So all experts are active here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import Tensor

from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.packed.activation_cache import record_activations
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.loading.loader import adopt_model, load_model
from mechdsl.loading.verify.checks import PACKED_IDENTITY

from ..families import build, tables
from ..families.parts import Architecture
from ..families.walk import tokenizer
from ..quick import in_turn
from ..reference import hooks
from . import families
from .clean import clean_model_check
from .conftest import statement

HALF = ("bfloat16", "float16")
FURTHEST = 10
NOISIER = 2

ALL_EXPERTS: dict[str, dict[str, Any]] = {
    # Kernels for experts in 16 bits want rows of whole 16 bytes, too.
    "mixtral": {"hidden_size": 32, "intermediate_size": 48, "num_experts_per_tok": 4},
    "gpt_oss": {"hidden_size": 32, "intermediate_size": 48, "num_experts_per_tok": 4},
    "deepseek_v3": {
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 4,
        "n_group": 1,
    },
}
NAMES = (
    "llama", "gpt2", "gemma3_text", "gpt_neox", "bloom", "mixtral", "opt", "bert", "deepseek_v3",
    "gpt_oss", "gemma2", "falcon", "olmo2", "deberta-v2",
)  # fmt: skip
QUICK = {
    "bfloat16": ("gemma3_text", "bloom", "bert"),
    "float16": ("llama", "mixtral"),
}
ROWS = {row.name: row for row in tables.every() if isinstance(row, Architecture)}


@dataclass(frozen=True)
class Spot:
    """A write: vectors of some units at two tokens of one prompt."""

    site: str
    layer: int
    prompt: int
    changes: Sequence[hooks.Change]

    @property
    def where(self) -> SiteRead:
        return SiteRead(self.site, None if self.site in hooks.WITHOUT_LAYER else self.layer)


def pair(name: str, dtype: torch.dtype, folder: Path) -> tuple[Architecture, Any, Any]:
    """The architecture, and a model of it in 16 bits and with equal weights in float32."""
    row = ROWS[name]
    row = row.but(name, config={**row.config, **ALL_EXPERTS.get(name, {})})
    made: Any = build.model(row)
    made.to(dtype).save_pretrained(folder)
    half, single = (
        type(made).from_pretrained(folder, dtype=kind).eval() for kind in (dtype, torch.float32)
    )
    return row, half, single


def spots_of(row: Architecture, module: Any, prompts: Sequence[Mapping[str, Tensor]]) -> list[Spot]:
    """Writes at every site of every layer, in both prompts: the other prompt's values, or zeros."""
    found: list[Spot] = []
    for layer in range(row.main.count):
        seen = [hooks.run(row, module, prompt, layer)[1] for prompt in prompts]
        for site in hooks.sites(row.main, layer):
            if layer and site in hooks.WITHOUT_LAYER:
                continue
            for prompt, own in enumerate(seen):
                other = seen[1 - prompt][site]
                units = [u for u in {0, other.shape[1] - 1} if site != "expert_out" or not u]
                changes = [
                    hooks.Change(at, unit, 3 * other[at - 3, unit] * (at > 1))
                    for at in (1, len(own[site]) - 1)
                    for unit in units
                ]
                found.append(Spot(site, layer, prompt, changes))
    return found


def logits_by_hooks(
    row: Architecture, module: Any, prompts: Sequence[Mapping[str, Tensor]], spots: list[Spot]
) -> list[Tensor]:
    """Logits [T, vocab] of each spot, from plain hooks."""
    dtype = next(module.parameters()).dtype
    together: dict[tuple[int, int], list[int]] = {}
    for number, spot in enumerate(spots):
        together.setdefault((spot.layer, spot.prompt), []).append(number)
    made: dict[int, Tensor] = {}
    for (layer, prompt), numbers in together.items():
        each = [
            (s.site, [hooks.Change(c.position, c.unit, c.vector.to(dtype)) for c in s.changes])
            for s in (spots[number] for number in numbers)
        ]
        runs = hooks.side_by_side(row, module, prompts[prompt], layer, each)
        made |= {n: logits.float() for n, (logits, _) in zip(numbers, runs, strict=True)}
    return [made[number] for number in range(len(spots))]


def packaged(
    model: LoadedModel, prompts: Sequence[Mapping[str, Tensor]], spots: list[Spot]
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of each spot from mechdsl: full passes over padded rows, and packed rows."""
    rows = [prompt["input_ids"][0].tolist() for prompt in prompts]
    base = Batch.of(rows, model.pad_id, model.calling.side)
    lanes = np.array([spot.prompt for spot in spots])
    writes = [
        SiteWrite(
            spot.site,
            spot.where.layer,
            torch.full((len(spot.changes),), number),
            torch.tensor([change.position for change in spot.changes]),
            torch.tensor([change.unit for change in spot.changes]),
            torch.stack([change.vector for change in spot.changes]),
        )
        for number, spot in enumerate(spots)
    ]
    batch = base.take(torch.from_numpy(lanes))
    whole = run_full(model, batch, writes=writes).logits
    assert whole is not None
    with record_activations(model, base, 0) as kept:
        run_full(model, base)
    lengths = base.lengths.numpy()[lanes]
    final = (np.repeat(np.arange(len(spots)), lengths), np.concatenate([*map(np.arange, lengths)]))
    packed = run_packed(model, kept, lanes, writes=writes, final=final).logits
    mask = batch.mask.bool()
    return (
        [one[real].float() for one, real in zip(whole, mask, strict=True)],
        [one.float() for one in packed.split(lengths.tolist())],
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if name in QUICK[dtype] else pytest.mark.slow)
        for name in NAMES
        for dtype in HALF
    ],
)
def test_16_bit_writes_at_every_site_are_as_exact_as_hooks(
    name: str, dtype: str, tmp_path: Path
) -> None:
    kind: torch.dtype = getattr(torch, dtype)
    row, half, single = pair(name, kind, tmp_path)
    model, found = adopt_model("m", half, tokenizer())
    assert model is not None, [d.message for d in found]
    assert not found
    assert model.dtype == kind
    prompts = hooks.prompts(row, 2, seed=0)
    spots = spots_of(row, half, prompts)
    wanted, exact = (logits_by_hooks(row, module, prompts, spots) for module in (half, single))
    bare = [hooks.run(row, half, prompt, 0)[0].float() for prompt in prompts]
    eps = torch.finfo(kind).eps
    for way, rows in zip(("whole", "packed"), packaged(model, prompts, spots), strict=True):
        far = {
            (spot.site, spot.layer, spot.prompt): float(
                (got - want).abs().max() / want.abs().max() / eps
            )
            for spot, got, want in zip(spots, rows, wanted, strict=True)
        }
        assert max(far.values()) <= FURTHEST, (way, max(far, key=lambda spot: far[spot]))
        for site in dict.fromkeys(spot.site for spot in spots):
            own = [i for i, spot in enumerate(spots) if spot.site == site]
            error, noise, lost = (
                float(torch.cat([(one[i] - exact[i]).flatten() for i in own]).square().mean())
                for one in (rows, wanted, [bare[spot.prompt] for spot in spots])
            )
            assert error <= NOISIER**2 * noise < lost, (way, site, error / noise, lost / noise)
    assert clean_model_check(half) == []


@pytest.mark.parametrize("dtype", HALF)
def test_16_bit_packed_rows_with_a_large_shared_score_stay_exact(dtype: str) -> None:
    """Biases of queries and keys, as in Qwen 2, add the same number to all scores; in 16 bits
    their rounding could erase the differences between keys."""
    module: Any = families.module("llama")
    each = 30 * torch.tensor([0.0, 0, 1, 0, 0, 1])  # the slowest of the rotary frequencies
    with torch.no_grad():
        for block in module.model.layers:
            block.self_attn.q_proj.bias += each.repeat(4)
            block.self_attn.k_proj.bias += each.repeat(2)
    kind: torch.dtype = getattr(torch, dtype)
    # The remaining difference depends on the tokens; it is smallest after `<s>`.
    tokenizer = families.tokenizer()
    tokenizer.post_processor = processors.Sequence([])
    model, found = adopt_model("m", module.to(kind), tokenizer)
    assert model is not None
    assert not found
    error = next(check.error for check in model.checks if check.identity == PACKED_IDENTITY)
    assert error <= FURTHEST * torch.finfo(kind).eps


@pytest.mark.parametrize(
    ("family", "dtype"), in_turn(list(families.CONFIGS), list(HALF), families.KINDS)
)
def test_folder_loads_restartable_in_16_bits(
    family: str, dtype: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The self-check passes, and rows can start in the middle."""
    folder = folders[family]
    if family in ALL_EXPERTS:
        folder = families.build(family, tmp_path, **ALL_EXPERTS[family])
    model, found = load_model(statement(str(folder)), dtype=dtype)
    assert model is not None, [d.message for d in found]
    assert not found
    assert model.provenance["dtype"] == dtype
    assert model.restartable
