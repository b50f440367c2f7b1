"""Faults in the anatomy that the checks on load must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from mechdsl.forward.hooks.attention import CannotPack, get_own_attention
from mechdsl.forward.hooks.model import BlockStack, LoadedModel
from mechdsl.loading.anatomy_proof import build_loaded_model, verify_model
from mechdsl.loading.bench import PROMPT_LENGTHS
from mechdsl.loading.loader import adopt_model
from mechdsl.loading.verify.checks import ATTENTION_IDENTITY, PACKED_IDENTITY
from mechdsl.models.finder import find_anatomies
from mechdsl.models.shape import Anatomy, BlockAnatomy, HookPoint, TensorLayout

from . import broken, families
from .test_against_reference import in_all, with_blocks


def layout(anatomy: Anatomy, site: str, layout: TensorLayout) -> Anatomy:
    return with_blocks(anatomy, **{site: replace(in_all(anatomy, site), layout=layout)})


def swap(first: str, second: str) -> Callable[[Anatomy], Anatomy]:
    return lambda a: with_blocks(a, **{first: in_all(a, second), second: in_all(a, first)})


def as_path(site: str, path: str) -> Callable[[Anatomy], Anatomy]:
    def change(anatomy: Anatomy) -> Anatomy:
        tap = in_all(anatomy, site)
        flat = TensorLayout.heads(tap.layout.units, tap.layout.width)
        return with_blocks(anatomy, **{site: replace(tap, path=path, layout=flat)})

    return change


def both(site: str, other: str) -> Callable[[Anatomy], Anatomy]:
    return lambda a: with_blocks(a, **{site: in_all(a, other)})


def parts(anatomy: Anatomy, change: Callable[[BlockAnatomy], BlockAnatomy]) -> Anatomy:
    return replace(anatomy, blocks=tuple(change(block) for block in anatomy.blocks))


FAULTS: list[tuple[str, str, Callable[[Anatomy], Anatomy], str]] = [
    ("gpt2", "k and v swapped", swap("k", "v"), "z = v"),
    ("llama", "k and v swapped", swap("k", "v"), "z = v"),
    ("gpt2", "q and k swapped", swap("q", "k"), "whose q is zero"),
    ("gpt2", "k taken for q", both("k", "q"), "k of an earlier token"),
    ("gpt2", "q taken for k", both("q", "k"), "whose q is zero"),
    (
        "gpt2",
        "thirds read as interleaved heads",
        lambda a: layout(a, "q", TensorLayout(4, 6, offset=0, stride=18)),
        "whose q is zero",
    ),
    (
        "gpt_neox",
        "interleaved heads read as thirds",
        lambda a: layout(a, "v", TensorLayout.heads(4, 6, offset=48)),
        "z = v",
    ),
    (
        "gpt_neox",
        "keys read as thirds",
        lambda a: layout(a, "k", TensorLayout.heads(4, 6, offset=24)),
        "whose k are zero",
    ),
    (
        "gpt2",
        "heads of another width",
        lambda a: layout(a, "z", TensorLayout.heads(6, 4)),
        "z = v",
    ),
    (
        "llama",
        "too many key-value heads",
        lambda a: layout(a, "v", TensorLayout.heads(4, 3)),
        "z = v",
    ),
    (
        "qwen3",
        "queries before their norm",
        lambda a: with_blocks(
            a, q=HookPoint("model.layers.{layer}.self_attn.q_proj", "out", TensorLayout.heads(4, 6))
        ),
        "a value 100 times as large",
    ),
    (
        "llama",
        "norms off by one",
        lambda a: parts(a, lambda b: replace(b, attn_norm=b.mlp_norm, mlp_norm=b.attn_norm)),
        "attn_norm = the preceding norm",
    ),
    (
        "llama",
        "inputs of the sublayers swapped",
        swap("attn_norm", "mlp_norm"),
        "attn_norm = the preceding norm",
    ),
    ("llama", "outputs of the sublayers swapped", swap("attn_out", "mlp_out"), "mlp_norm ="),
    (
        "llama",
        "the gate taken for the neurons",
        lambda a: with_blocks(
            a,
            mlp_hidden=HookPoint(
                "model.layers.{layer}.mlp.gate_proj", "out", TensorLayout.neurons(28)
            ),
        ),
        "mlp_hidden through the down projection",
    ),
    (
        "gemma2",
        "what is added taken before its norm",
        as_path("attn_out", "model.layers.{layer}.self_attn"),
        "resid_pre + attn_out + mlp_out",
    ),
    (
        "gpt_neox",
        "a parallel block taken for a sequential one",
        lambda a: with_blocks(replace(a, parallel=False), resid_mid=in_all(a, "attn_out")),
        "mlp_norm = the preceding norm, of resid_mid",
    ),
    (
        "gpt_neox_sequential",
        "a sequential block taken for a parallel one",
        lambda a: replace(a, parallel=True),
        "mlp_norm = the preceding norm, of resid_pre",
    ),
    (
        "qwen3",
        "query norms with tokens and heads exchanged",
        lambda a: layout(a, "q", TensorLayout(4, 6, axes="heads_first")),
        "every site can be read",
    ),
]


@pytest.mark.parametrize(
    ("family", "fault", "broken", "identity"), FAULTS, ids=[f"{f[0]}: {f[1]}" for f in FAULTS]
)
def test_wrong_anatomy_is_rejected(
    loaded: dict[str, LoadedModel],
    family: str,
    fault: str,
    broken: Callable[[Anatomy], Anatomy],
    identity: str,
) -> None:
    good = loaded[family]
    bad = build_loaded_model("m", good.module, {"": BlockStack(broken(good.anatomy), good.shape)})
    tried = verify_model(bad)
    assert tried.model is None, fault
    assert [d.code for d in tried.problems] == ["E0410"]
    assert identity in tried.problems[0].message


def exchanged(site: str, one: int, other: int) -> Callable[[LoadedModel], Anatomy]:
    """Swap a site of two layers."""

    def change(model: LoadedModel) -> Anatomy:
        blocks = [*model.anatomy.blocks]
        first, second = blocks[one].taps[site], blocks[other].taps[site]
        blocks[one] = blocks[one].with_taps(**{site: second})
        blocks[other] = blocks[other].with_taps(**{site: first})
        return replace(model.anatomy, blocks=tuple(blocks))

    return change


class Reordered(nn.Module):
    """A projection whose heads are reordered."""

    def __init__(self, inner: nn.Module, order: list[int]) -> None:
        super().__init__()
        self.inner, self.order = inner, order

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        heads = self.inner(vectors).unflatten(-1, (len(self.order), -1))
        return heads[..., self.order, :].flatten(-2)


def reordered(site: str, layer: int, order: list[int]) -> Callable[[LoadedModel], Anatomy]:
    """Read a site of one layer before its heads are reordered."""

    def change(model: LoadedModel) -> Anatomy:
        blocks = [*model.anatomy.blocks]
        tap = blocks[layer].taps[site]
        inner = model.module.get_submodule(tap.path)
        model.module.set_submodule(tap.path, Reordered(inner, order))
        other = replace(tap, path=f"{tap.path}.inner")
        blocks[layer] = blocks[layer].with_taps(**{site: other})
        return replace(model.anatomy, blocks=tuple(blocks))

    return change


@pytest.mark.parametrize(
    ("fault", "identity"),
    [
        (exchanged("q", 3, 4), "whose q is zero"),
        (exchanged("q", 0, 7), "whose q is zero"),
        (exchanged("k", 2, 6), "whose k are zero"),
        (exchanged("v", 1, 5), "z = v"),
        (exchanged("attn_norm", 3, 4), "attn_norm = the preceding norm"),
        (exchanged("mlp_hidden", 3, 4), "mlp_hidden through the down projection"),
        (reordered("q", 5, [0, 2, 1, 3]), "whose q is zero"),
        (reordered("q", 7, [3, 1, 2, 0]), "whose q is zero"),
        (reordered("k", 6, [1, 0]), "whose k are zero"),
        (reordered("v", 2, [1, 0]), "z = v"),
    ],
)
def test_fault_in_single_layers_of_a_deep_model_is_rejected(
    fault: Callable[[LoadedModel], Anatomy], identity: str
) -> None:
    good, problems = adopt_model(
        "m", families.module("llama", num_hidden_layers=8), families.tokenizer()
    )
    assert good is not None, problems
    bad = build_loaded_model("m", good.module, {"": BlockStack(fault(good), good.shape)})
    tried = verify_model(bad)
    assert tried.model is None
    assert [d.code for d in tried.problems] == ["E0410"]
    assert identity in tried.problems[0].message


@pytest.mark.slow
def test_check_cost_grows_with_layers_but_not_with_heads() -> None:
    """Each layer is restarted in a separate row; other checks cover many layers at once."""

    def rows(**sizes: int) -> int:
        module = families.module("llama", num_key_value_heads=sizes["num_attention_heads"], **sizes)
        seen: list[int] = []

        def count(part: nn.Module, given: tuple[torch.Tensor]) -> None:
            seen.append(given[0][..., 0].numel())

        with module.get_submodule("model.layers.0.mlp").register_forward_pre_hook(count):
            assert adopt_model("m", module, families.tokenizer())[0] is not None
        return sum(seen)

    few = rows(num_hidden_layers=8, num_attention_heads=4)
    assert rows(num_hidden_layers=8, num_attention_heads=20) <= few + 20
    assert (
        rows(num_hidden_layers=24, num_attention_heads=4) <= few + 16 * 2 * max(PROMPT_LENGTHS) + 20
    )


@pytest.mark.parametrize("family", families.EACH)
def test_every_family_passes_every_check(loaded: dict[str, LoadedModel], family: str) -> None:
    checks = loaded[family].checks
    assert len(checks) >= 16
    assert [outcome.identity for outcome in checks if not outcome.passed] == []


def test_finder_rejects_a_wrong_number_of_key_value_heads(
    loaded: dict[str, LoadedModel],
) -> None:
    model = loaded["llama"]
    wrong = replace(model.shape, blocks=tuple(replace(b, kv_heads=4) for b in model.shape.blocks))
    anatomies, found = find_anatomies(model.module.named_modules(), wrong)
    assert not anatomies
    assert [d.code for d in found] == ["E0409"]
    assert "not 4 heads of 6" in found[0].label_text


def test_finder_names_a_missing_component(loaded: dict[str, LoadedModel]) -> None:
    model = loaded["llama"]
    modules = [(p, m) for p, m in model.module.named_modules() if "o_proj" not in p]
    _, found = find_anatomies(modules, model.shape)
    assert "output projection of attention not found" in found[0].message


def test_block_that_scales_attention_is_rejected() -> None:
    model, found = broken.gaining()
    assert model is None
    assert found[0].code == "E0410"
    assert "the sum of head_out" in found[0].message


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (broken.sharing, "size of tensor"),
        (broken.by_itself, "off by"),
        (broken.asking, "its attention takes `gizmo`"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_model_that_cannot_be_restarted_warns_and_uses_full_passes(
    cause: Callable[[], broken.Adopted], reason: str
) -> None:
    model, found = cause()
    assert model is not None
    assert not model.restartable
    assert [d.code for d in found] == ["W0711"]
    assert reason in found[0].label_text
    # Their attention isn't the library's, so its internals aren't available either.
    may_fail = (PACKED_IDENTITY, ATTENTION_IDENTITY)
    assert all(outcome.passed for outcome in model.checks if outcome.identity not in may_fail)


def test_model_that_does_not_run_is_rejected() -> None:
    model, found = broken.failing()
    assert model is None
    assert [d.code for d in found] == ["E0411"]
    assert "it doesn't run: division by zero" in found[0].label_text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_checks_pass_in_other_precisions(dtype: torch.dtype) -> None:
    module = families.module("llama").to(dtype)
    model, found = adopt_model("m", module, families.tokenizer())
    assert model is not None, found
    assert model.dtype == dtype
    assert model.restartable, found[0].label_text


@pytest.mark.parametrize("family", families.VERIFIED)
def test_eager_attention_is_restartable(family: str) -> None:
    module = families.module(family, attn_implementation="eager")
    assert module.config._attn_implementation == "eager"  # type: ignore[union-attr]
    model, found = adopt_model("m", module, families.tokenizer())
    assert not found
    assert model is not None
    assert model.restartable


def test_flash_attention_is_not_packed(loaded: dict[str, LoadedModel]) -> None:
    part = loaded["llama"].module.get_submodule("model.layers.0.self_attn")
    config = id(part.config)
    assert get_own_attention(part, {config: "eager"}) is not get_own_attention(
        part, {config: "sdpa"}
    )
    with pytest.raises(CannotPack, match="its attention is `flash_attention_2`"):
        get_own_attention(part, {config: "flash_attention_2"})
