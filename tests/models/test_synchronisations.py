"""Synchronisations of a packed pass, counted on a simulated device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.data import words
from benchmarks.synchronisations import (
    SIMULATED,
    Places,
    SimulatedTensor,
    counted_synchronisations,
    to_simulated,
)
from mechdsl.forward.generation.cached_pass import choose_method
from mechdsl.forward.generation.decoding import Decoding
from mechdsl.forward.generation.replies import ReplyRequest, generate_replies
from mechdsl.forward.generation.rules import GenerationRules, StepRules
from mechdsl.forward.hooks.batch import Batch, EdgeWrite, RuleWrites, SiteRead, SiteWrite, to_device
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.packed.activation_cache import ActivationCache, record_activations
from mechdsl.forward.packed.packed_pass import PackedResult, run_packed
from mechdsl.loading.loader import adopt_model

PROMPTS = [[1, 9, 22, 31, 17, 40, 5], [1, 14, 8, 51], [1, 30, 11, 6, 45]]
LANES = np.array([0, 1, 2, 0, 2])
LAST = np.array([6, 3, 4, 6, 4])
READS = {SiteRead("resid_post", 1): (np.array([0, 1]), np.array([3, 3]))}
RANDOM = [(row,) for row in range(8 * len(PROMPTS))]
OF_LIBRARY = {"masking_utils.py"}
"""The library checks once per pass whether position ids belong to several texts."""


def built(family: str, layers: int) -> LoadedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(vocab_size=64, n_embd=16, n_layer=layers, n_head=2, n_positions=16)
        module = GPT2LMHeadModel(config)
    else:
        given = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        module = LlamaForCausalLM(
            LlamaConfig(vocab_size=64, num_hidden_layers=layers, **given)  # type: ignore[arg-type]
        )
    model, said = adopt_model(family, module.eval().requires_grad_(False), words(64))
    assert model is not None, said
    return model


def on_simulated_device(model: LoadedModel) -> LoadedModel:
    to_simulated(model.module)
    return replace(model, device=SIMULATED)


def write(site: str, layer: int, row: int, position: int, width: int, unit: int = 0) -> SiteWrite:
    values = torch.linspace(-1, 1, width)[None]
    rows, positions, units = (torch.tensor([each]) for each in (row, position, unit))
    return SiteWrite(site, layer, rows, positions, units, values)


WRITES = [
    write("resid_pre", 0, 0, 2, 16),
    write("z", 1, 1, 1, 8, unit=1),
    write("head_out", 1, 2, 3, 16, unit=1),
    write("mlp_out", 0, 3, 5, 16),
    write("resid_mid", 1, 4, 2, 16),
]


def edges(inside: bool) -> list[EdgeWrite]:
    """In one head of block 1, the last token of row 0 doesn't attend to the first."""
    if not inside:
        return []
    one = torch.tensor([0])
    last = torch.tensor([int(LAST[0])])
    return [EdgeWrite(1, "block", one, last, one, one, one, torch.zeros(1))]


def kept_of(model: LoadedModel) -> ActivationCache:
    batch = Batch.of(PROMPTS, model.pad_id, "left", model.device)
    with record_activations(model, batch, 0) as kept:
        run_full(model, batch)
    return kept


def patched(model: LoadedModel, kept: ActivationCache, inside: bool) -> PackedResult:
    final = np.arange(len(LANES)), LAST
    return run_packed(
        model, kept, LANES, writes=WRITES, final=final, reads=READS, edges=edges(inside)
    )


def own(places: Places) -> Places:
    """Remove the synchronisations of the library."""
    return Places(
        {
            lines: count
            for lines, count in places.items()
            if not OF_LIBRARY & {line.partition(":")[0] for line in lines}
        }
    )


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packed_pass_never_synchronises_with_its_device(
    family: str, layers: int, inside: bool
) -> None:
    model = built(family, layers)
    expected = patched(model, kept_of(model), inside)
    model = on_simulated_device(model)
    with counted_synchronisations(model.device):
        kept = kept_of(model)
        patched(model, kept, inside)  # the first counts the keys that queries see
    with counted_synchronisations(model.device) as places:
        found = patched(model, kept, inside)
    assert not own(places)
    assert isinstance(found.logits, SimulatedTensor)
    assert torch.equal(found.logits.numbers, expected.logits)


def replies(model: LoadedModel, decoding: Decoding) -> list[tuple[int, ...]]:
    """Completions of 8 cells; each scales a head's z at the last and each generated token."""
    prompts = [tuple(ids) for ids in PROMPTS]
    writes: list[SiteWrite] = []
    for cell in range(8):
        rows = torch.arange(len(prompts)) + cell * len(prompts)
        last = torch.tensor([len(ids) - 1 for ids in prompts])
        factors = torch.full((len(prompts), 1), 0.5 * cell)
        writes.append(SiteWrite("z", cell % 2, rows, last, last % 2, factors, "scale"))
    later = GenerationRules(steps=tuple(StepRules(1, writes=[write]) for write in writes))
    request = ReplyRequest(prompts * 8, RuleWrites(writes), later, RANDOM)
    found = generate_replies(model, request, decoding)
    return [reply.ids for reply in found]


@pytest.mark.parametrize(
    ("family", "decoding", "per_step"),
    [
        ("gpt2", {}, 1),
        ("llama", {}, 1),
        ("llama", {"temperature": 1.0, "top_p": 0.9}, 1),
        # It counts the tokens that tie with the k-th.
        ("gpt2", {"temperature": 1.0, "top_k": 4}, 2),
        # It finds tokens that nearly tie with the drawn one.
        ("llama", {"temperature": 1.0}, 2),
    ],
)
def test_generation_step_synchronises_only_for_its_tokens(
    family: str, decoding: dict[str, float], per_step: int
) -> None:
    def decodings(tokens: int) -> Decoding:
        return Decoding(tokens, lambda ids: "", **decoding)  # type: ignore[arg-type]

    model = built(family, 2)
    expected = replies(model, decodings(5))
    model = on_simulated_device(model)
    with counted_synchronisations(model.device):
        choose_method(model)
    counts: list[int] = []
    for tokens in (3, 5):
        with counted_synchronisations(model.device) as places:
            found = replies(model, decodings(tokens))
        counts.append(sum(own(places).values()))
    assert found == expected
    assert counts[1] - counts[0] == 2 * per_step


@pytest.mark.parametrize(("device", "waits"), [("mps", True), ("meta", False)])
def test_copy_to_a_device_blocks_only_on_mps(
    monkeypatch: pytest.MonkeyPatch, device: str, waits: bool
) -> None:
    """On MPS, a non-blocking copy may read memory that was freed."""
    given: list[bool] = []

    def to(tensor: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        given.append(non_blocking)
        return tensor

    monkeypatch.setattr(Tensor, "to", to)
    to_device(torch.ones(2), torch.device(device))
    assert given == [not waits]


def test_synchronisations_of_the_simulated_device_are_counted() -> None:
    def waits(value: Tensor) -> None:
        assert bool(value.sum() > 0)
        assert value[value > 1].tolist() == [2, 3]
        value.cpu()
        torch.arange(3).to(value.device)
        value.nonzero()

    with counted_synchronisations(SIMULATED) as places:
        waits(torch.tensor([1, 2, 3], device=SIMULATED))
    assert sum(places.values()) == 7


def test_combining_host_and_simulated_device_tensors_raises() -> None:
    with (
        counted_synchronisations(SIMULATED),
        pytest.raises(RuntimeError, match="on the host and on the device"),
    ):
        torch.ones(3, device=SIMULATED).add(torch.ones(3))
