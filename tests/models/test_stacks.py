"""Secondary stacks (encoders, cross attention, image encoders) compared with plain hooks."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel, call_with_batch
from mechdsl.forward.packed.activation_cache import record_activations
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.loading import bench
from mechdsl.loading.bench import build_sample, get_image_token
from mechdsl.loading.loader import adopt_model
from mechdsl.loading.verify import checks
from mechdsl.loading.verify.checks import run_checks
from mechdsl.models.shape import Family
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES
from tests.families import build, tables
from tests.families.parts import Architecture, Stack
from tests.families.walk import restarts_images, tokenizer
from tests.quick import some
from tests.reference import hooks

from .broken import proved
from .clean import clean_model_check

ROWS = {row.name: row for row in tables.every() if isinstance(row, Architecture)}
STACKS = [
    *((name, stack) for name in ("t5", "bart", "whisper") for stack in ("encoder", "cross")),
    *((name, "vision") for name in ("llava", "gemma3", "qwen2_vl")),
]
CLOSE = 1e-4


@dataclass(frozen=True)
class Case:
    """A model and two prompts, both as tensors and as a batch of mechdsl."""

    row: Architecture
    model: LoadedModel
    found: list[Diagnostic]
    prompts: list[dict[str, Tensor]]
    batch: Batch

    @property
    def module(self) -> nn.Module:
        return self.model.module

    def rows(self, logits: Tensor) -> list[Tensor]:
        """[T, vocab] of each prompt."""
        return [one[self.batch.mask[i].bool()] for i, one in enumerate(logits)]

    def by_hand(self, prompt: int, stack: str, layer: int) -> tuple[Tensor, dict[str, Tensor]]:
        return hooks.run(self.row, self.module, self.prompts[prompt], layer, stack=stack)


@cache
def case(name: str) -> Case:
    row = ROWS[name]
    model, found = adopt_model("m", build.model(row), tokenizer())
    assert model is not None, [(d.message, d.label_text) for d in found]
    prompts = hooks.prompts(row, 2, seed=3)
    return Case(row, model, found, prompts, batch_of(row, model, prompts))


def batch_of(row: Architecture, model: LoadedModel, prompts: list[dict[str, Tensor]]) -> Batch:
    """The padded prompts, with the tokens of the other stacks."""
    text = "decoder_input_ids" if "decoder_input_ids" in prompts[0] else "input_ids"

    def padded(name: str) -> Batch:
        side = model.calling.side
        return Batch.of([prompt[name][0].tolist() for prompt in prompts], model.pad_id, side)

    tokens = padded(text)
    extra: dict[str, list[Tensor]] = {}
    for number, prompt in enumerate(prompts):
        for name, value in prompt.items():
            if name in ("input_ids", text):
                continue
            if value.shape == prompt[text].shape:  # one for each token
                wide = torch.zeros_like(tokens.ids[:1])
                wide[0, tokens.mask[number].bool()] = value[0]
                value = wide
            extra.setdefault(name, []).append(value)
    frames: dict[str, Batch] = {}
    for stack, parts in row.others.items():
        if stack == "encoder" and text != "input_ids" and "input_ids" in prompts[0]:
            frames[stack] = padded("input_ids")
        elif stack != "cross":
            frames[stack] = Batch.grid(len(prompts), counted(row, model.module, prompts[0], parts))
    return tokens.with_inputs({n: torch.cat(values) for n, values in extra.items()}, **frames)


def counted(row: Architecture, module: nn.Module, prompt: dict[str, Tensor], stack: Stack) -> int:
    """Tokens that enter the first block of an encoder."""
    name = next(name for name, parts in row.others.items() if parts is stack)
    return len(hooks.run(row, module, prompt, 0, stack=name)[1]["resid_pre"])


def off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float(((found - expected).abs().max() / expected.abs().max().clamp(min=1.0)).detach())


def named(site: str, layer: int, stack: str) -> SiteRead:
    return SiteRead(site, None if site in hooks.WITHOUT_LAYER else layer, stack)


def written(
    case: Case, site: str, layer: int, stack: str, spot: tuple[int, int], vectors: list[Tensor]
) -> list[Tensor]:
    """Logits of each prompt with one vector replaced."""
    position, unit = spot
    count = len(vectors)
    where = named(site, layer, stack)
    write = SiteWrite(
        site,
        where.layer,
        torch.arange(count),
        torch.full((count,), position),
        torch.full((count,), unit),
        torch.stack(vectors),
        stack=stack,
    )
    logits = run_full(case.model, case.batch, writes=[write]).logits
    assert logits is not None
    return case.rows(logits)


# --- reading and writing ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stack"), STACKS)
def test_reads_of_secondary_stacks_equal_hooks(name: str, stack: str) -> None:
    at = case(name)
    assert at.found == []
    sites = at.model.stack(stack).shape.sites
    for layer in range(at.row.others[stack].count):
        expected = hooks.sites(at.row.others[stack], layer, main=False)
        assert set(expected) == sites - {*ATTENTION_INTERNAL_SITES}
        result = run_full(at.model, at.batch, reads=[named(s, layer, stack) for s in expected])
        for number in range(len(at.prompts)):
            _, seen = at.by_hand(number, stack, layer)
            for site in expected:
                tokens = at.batch.of_site(site, stack).mask[number].bool()
                found = result.reads[named(site, layer, stack)][number][tokens]
                assert off(found, seen[site]) <= CLOSE, (site, layer)
    assert clean_model_check(at.module) == []


@pytest.mark.parametrize(("name", "stack"), STACKS)
def test_writes_to_secondary_stacks_equal_hooks(name: str, stack: str) -> None:
    """At each site in turn, one vector of every prompt is replaced by the other prompt's."""
    at = case(name)
    layer = at.row.others[stack].count - 1
    seen = [at.by_hand(number, stack, layer)[1] for number in range(2)]
    plain = at.rows(call_with_batch(at.model, at.batch))
    moved = 0
    for site in hooks.sites(at.row.others[stack], layer, main=False):
        count = seen[0][site].shape[1]
        spot = (2, count - 1)
        vectors = [3 * seen[1 - number][site][spot] for number in range(2)]
        found = written(at, site, layer, stack, spot, vectors)
        for number, vector in enumerate(vectors):
            change = [hooks.Change(*spot, vector)]
            expected, _ = hooks.run(
                at.row, at.module, at.prompts[number], layer, site, change, stack
            )
            assert off(found[number], expected) <= CLOSE, (site, number)
            moved += off(found[number], plain[number]) > 10 * CLOSE
    assert moved > len(seen[0])
    assert clean_model_check(at.module) == []


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl"])
def test_embed_includes_the_image_embeddings(name: str) -> None:
    at = case(name)
    read = SiteRead("embed")
    found = run_full(at.model, at.batch, reads=[read]).reads[read]
    pictured = at.batch.ids == get_image_token(at.model)
    assert pictured.any()
    embedding: Any = at.module.get_submodule(at.model.anatomy.embedding or "")
    with torch.no_grad():
        blind = embedding(at.batch.ids)
    real = at.batch.mask.bool()
    assert torch.equal(found[real & ~pictured].squeeze(1), blind[real & ~pictured])
    assert off(found[pictured].squeeze(1), blind[pictured]) > 0.1
    identities = {check.identity for check in at.model.checks}
    assert "noise at an image's tokens of embed changes the logits (with an image)" in identities


# --- self-checks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_checks_cover_self_and_cross_attention(name: str) -> None:
    """Components of a decoder block sum up, with norms and cross attention."""
    at = case(name)
    identities = {check.identity: check for check in at.model.checks}
    assert all(check.passed for check in identities.values())
    for identity in (
        "mlp_norm = the preceding norm, of resid_mid",
        "attn_norm = the preceding norm, of resid_mid (cross)",
        "v of cross attention is computed from the encoder's final_norm (cross)",
        "the sum of head_out and the bias = attn_out (encoder)",
    ):
        assert identity in identities


@pytest.mark.slow
def test_checks_detect_a_wrong_norm_of_cross_attention() -> None:
    """BART has a norm after cross attention, inside the sum; mBART has it before."""
    for name, wrong in (("bart", "middle"), ("mbart", "attn_norm")):
        model = case(name).model
        cross = model.stack("cross")
        path = model.anatomy.blocks[0].end or model.anatomy.blocks[0].mlp_norm
        blocks = [replace(block, **{wrong: path}) for block in cross.anatomy.blocks]
        anatomy = replace(cross.anatomy, blocks=tuple(blocks))
        changed = replace(model, others={**model.others, "cross": replace(cross, anatomy=anatomy)})
        failing = failed(changed)
        assert any("norm" in identity for identity in failing), failing


def failed(model: LoadedModel) -> list[str]:
    """Failed identities, except the one for restarting."""
    given = build_sample(model)
    return [
        one.identity
        for stack in ("", *model.others)
        for one in run_checks(model, given, stack)
        if not one.passed and "restarted" not in one.identity
    ]


@pytest.mark.parametrize("name", some(["llava", "gemma3", "whisper"], ["whisper"]))
def test_checks_in_small_chunks_cover_the_same_identities(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With limits that force single rows, single heads and few written rows per pass."""
    for module, constant, value in (
        (bench, "_MAX_TOKENS", 8),
        (bench, "_MAX_LAYERS", 2),
        (checks, "MAX_CHECK_TOKENS", 20),
    ):
        monkeypatch.setattr(module, constant, value)
    model, found = adopt_model("m", build.model(ROWS[name]), tokenizer())
    assert not found
    assert model is not None
    told = [check.identity for check in case(name).model.checks]
    assert [check.identity for check in model.checks] == told


@pytest.mark.parametrize("swapped", some(["qk", "qv", "kv"], ["qk"]))
def test_checks_detect_swapped_heads_of_an_encoder_with_custom_attention(swapped: str) -> None:
    """GOT-OCR's encoder calls no attention function; only writes distinguish its heads."""
    one, other = swapped
    model = case("got_ocr2").model
    assert "a query affects only its own token and head (vision)" in {
        check.identity for check in model.checks
    }
    vision = model.stack("vision")
    blocks = tuple(
        block.with_taps(**{one: block.taps[other], other: block.taps[one]})
        for block in vision.anatomy.blocks
    )
    changed = replace(vision, anatomy=replace(vision.anatomy, blocks=blocks))
    assert failed(replace(model, others={"vision": changed}))


def test_checks_detect_an_embed_site_without_the_image() -> None:
    """The token embedding lacks the image embeddings that the language model gets."""
    model = case("llava").model
    tap = replace(model.anatomy.taps["embed"], path=model.anatomy.embedding or "", side="out")
    anatomy = replace(model.anatomy, taps={**model.anatomy.taps, "embed": tap})
    changed = replace(model, anatomy=anatomy)
    found = failed(changed)
    assert "embed at an image's tokens is not that of the token (with an image)" in found


def test_unsupported_encoder_stack_warns_and_is_omitted() -> None:
    """The decoder and its cross attention remain, and the warning states the reason."""
    model, found = proved("m", build.model(ROWS["pegasus_x"]))
    assert model is not None
    assert list(model.others) == ["cross"]
    (left,) = found
    assert (left.code, left.message, left.label_text) == (
        "W0712",
        "the sites in stack `encoder` of `m` are not available",
        "its encoder pads prompts to whole blocks and adds global tokens",
    )


def test_failing_image_encoder_keeps_the_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def picture(config: Any) -> dict[str, tuple[int, ...]]:
        return {"pixel_values": (1, 3, 5, 5)}

    monkeypatch.setattr(Family, "picture", staticmethod(picture))
    model, found = adopt_model("m", build.model(ROWS["llava"]), tokenizer())
    assert model is not None
    assert (model.others, model.restartable, restarts_images(model)) == ({}, True, False)
    assert [d.code for d in found] == ["W0712"]
    assert "Input image size (5*5) doesn't match model (8*8)" in found[0].label_text
    read = SiteRead("resid_mid", 1)
    batch = Batch.of([[1, 5, 6, 7], [1, 9]], model.pad_id, model.calling.side)
    assert run_full(model, batch, reads=[read]).reads[read].shape == (2, 4, 1, 20)


def test_unused_last_block_of_an_image_encoder_is_accepted() -> None:
    """LLaVA's default: writes in the last block have no effect, which is no error."""
    row = ROWS["llava"]
    module = build.model(row, vision_feature_layer=-2)
    model, found = adopt_model("m", module, tokenizer())
    assert model is not None
    assert not found
    assert "vision" in model.others


# --- packed rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "llava", "gemma3", "qwen2_vl"])
def test_packed_rows_of_models_with_stacks_equal_full_passes(name: str) -> None:
    """Rows of a decoder, each with its encoder's tokens, and rows written at text and image
    tokens."""
    at = case(name)
    assert at.model.restartable
    assert restarts_images(at.model) == (at.row.takes == "image and text")
    lengths = at.batch.lengths.tolist()
    lanes = np.array([0, 1, 0, 1])
    for site, layer in (("embed", None), ("resid_pre", 1), ("v", 0), ("mlp_out", 2)):
        width = at.model.tap(site, layer).layout.width
        places = torch.tensor([3, 3, lengths[0] - 2, lengths[1] - 2])
        values = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
        write = SiteWrite(
            site, layer, torch.arange(4), places, torch.zeros(4, dtype=torch.long), values
        )
        batch = at.batch.take(torch.from_numpy(lanes))
        logits = run_full(at.model, batch, writes=[write]).logits
        assert logits is not None
        with record_activations(at.model, at.batch, 0) as kept:
            run_full(at.model, at.batch)
        last = np.array([lengths[lane] - 1 for lane in lanes])
        result = run_packed(at.model, kept, lanes, writes=[write], final=(np.arange(4), last))
        columns = batch.columns(torch.arange(4), torch.from_numpy(last))
        assert off(result.logits, logits[torch.arange(4), columns]) <= CLOSE, (site, layer)
        other = replace(write, stack=next(iter(at.model.others)))
        with pytest.raises(ValueError, match="are full forward passes"):
            run_packed(at.model, kept, lanes, writes=[other], final=(np.arange(4), last))
    assert clean_model_check(at.module) == []


# --- errors -------------------------------------------------------------------------------------


def raised(at: Case, where: SiteRead, batch: Batch | None = None) -> str:
    with pytest.raises(ValueError, match=r"`|batch") as error:
        run_full(at.model, batch or at.batch, reads=[where])
    assert clean_model_check(at.module) == []
    return str(error.value)


def test_reads_of_missing_stacks_and_sites_are_rejected() -> None:
    t5, llava = case("t5"), case("llava")
    assert raised(t5, SiteRead("q", 0, "vision")) == (
        "`m` has no stack `vision`; it has `encoder`, `cross`"
    )
    assert raised(t5, SiteRead("q", 2, "encoder")) == "layer 2 of `encoder` is not in 0..1"
    assert raised(t5, SiteRead("mlp_out", 0, "cross")) == (
        "`m` has no `mlp_out` in layer 0 of its stack `cross`"
    )
    assert raised(t5, SiteRead("logits", None, "encoder")) == (
        "`m` has no `logits` of its stack `encoder`"
    )
    assert raised(llava, SiteRead("final_norm", None, "vision")) == (
        "`m` has no `final_norm` of its stack `vision`"
    )
    text = Batch.of([[1, 5, 6]], t5.model.pad_id, "right")
    assert raised(t5, SiteRead("q", 0), text) == "the batch has no tokens of the stack `encoder`"


@pytest.mark.parametrize(
    ("name", "stack", "site", "position", "message"),
    [
        ("t5", "cross", "q", 8, "a position for `q cross layer 1` is not in its prompt"),
        ("t5", "encoder", "q", 8, "a position for `q encoder layer 1` is not in its prompt"),
        ("llava", "vision", "q", 5, "a position for `q vision layer 1` is not in its prompt"),
    ],
)
def test_write_to_a_stack_at_a_missing_position_is_rejected(
    name: str, stack: str, site: str, position: int, message: str
) -> None:
    at = case(name)
    width = at.model.tap(site, 1, stack).layout.width
    write = SiteWrite(
        site,
        1,
        torch.tensor([0]),
        torch.tensor([position]),
        torch.tensor([0]),
        torch.zeros(1, width),
        stack=stack,
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run_full(at.model, at.batch, writes=[write])
    assert clean_model_check(at.module) == []


def test_failed_run_removes_the_hooks_of_all_stacks() -> None:
    """The run fails after the encoder and before the decoder; both lose their hooks."""
    at = case("t5")

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    block = at.module.get_submodule(at.model.anatomy.blocks[1].path)
    handle = block.register_forward_pre_hook(broken)
    reads = [SiteRead("z", 0, "encoder"), SiteRead("z", 0, "cross"), SiteRead("z", 2)]
    try:
        with pytest.raises(RuntimeError, match="broken"):
            run_full(at.model, at.batch, reads=reads)
    finally:
        handle.remove()
    assert clean_model_check(at.module) == []
    plain = call_with_batch(at.model, at.batch)
    with torch.no_grad():
        again = at.module(**at.prompts[0]).logits[0]
    assert off(at.rows(plain)[0], again) <= CLOSE
