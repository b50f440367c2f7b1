"""The planned work of encoder-decoders equals the products that the bare model computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import BaseModelOutput

from mechdsl.checks.file_check import CheckedFile
from mechdsl.execute import image_vectors
from mechdsl.forward.hooks import model as hooked
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.pass_cost import PassCost
from mechdsl.planner.passes import make_plan, plan_cost

from ..image_prompts import test_encoded_images as images
from ..image_prompts import test_sounds as sounds
from .encoder_decoders import ENCODER_LAYERS, cases, model, starts, text, tokenizer
from .support import DIFFERENCE, ROWS, check_file, experiment, write_rows

LAYERS, STEPS = 3, 4
PATCH = ("prompts p", "from other into clean")
ONE_EACH = (
    "patch resid_post encoder layer * at subject token",
    "patch z cross layer * head 0 at last token",
    "patch resid_post layer * at last token",
)
"""A rule in each stack."""
CELLS = ENCODER_LAYERS + 2 * LAYERS


def count(run: Callable[[], Any]) -> int:
    """The multiply-adds of matrix products and convolutions."""
    explicit = sdpa_kernel(SDPBackend.MATH)  # the counter doesn't know the fused operation
    with explicit, torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def count_pass(bare: Any, decoder: Sequence[int], **inputs: Any) -> int:
    """A pass over one unpadded prompt, with the logits of its last token only."""
    whole = count(
        lambda: bare(decoder_input_ids=torch.tensor([decoder]), use_cache=False, **inputs)
    )
    return whole - (len(decoder) - 1) * bare.get_output_embeddings().weight.numel()


def planned(checked: CheckedFile) -> tuple[float, float]:
    """Multiply-adds of the plain loop, and with all passes of the planner."""
    cost = plan_cost(make_plan(checked.experiments))
    return cost.plain.multiply_adds, cost.planned.multiply_adds


def write(bare: Any, decoder: Sequence[int], encoded: Any) -> int:
    """The passes of a reply after the first one: the encoder's outputs are cached."""
    return sum(
        count_pass(bare, [*decoder, *range(3, 3 + step)], encoder_outputs=encoded)
        for step in range(1, STEPS)
    )


def adopted(family: str) -> Any:
    found, _ = adopt_model("m", model(family), tokenizer())
    assert found is not None
    return found


@pytest.mark.parametrize("family", cases(("t5", "mt5", "bart", "t5gemma")))
def test_planned_passes_equal_those_of_the_bare_model(family: str, tmp_path: Path) -> None:
    """With rules in each stack, on ragged prompts, and with replies."""
    write_rows(tmp_path)
    rules = [experiment(f"e{n}", *PATCH, rule, DIFFERENCE) for n, rule in enumerate(ONE_EACH)]
    first = {"clean": 0, "other": 0}
    later = 0
    for run in first:
        for record in ROWS:
            ids, own = torch.tensor([text(record, run).ids]), starts(family)
            first[run] += count_pass(model(family), own, input_ids=ids)
            if run == "clean":
                state = torch.zeros(1, ids.shape[1], 16)
                later += write(model(family), own, BaseModelOutput(last_hidden_state=state))
    plain, _ = planned(check_file("".join(rules), tmp_path, adopted(family)))
    base = (1 + CELLS) * first["clean"]
    assert plain == pytest.approx(base + first["other"], rel=0.01)
    _, fewer = planned(check_file("".join(rules), tmp_path, adopted(family)))
    assert base <= fewer <= plain * 1.01

    rule = "ablate z cross layer 1 head 0 at last token with zero"
    lines = ("prompts p", f"generate {STEPS}", rule, 'measure matches("w1") as raw')
    plain, _ = planned(check_file(experiment("e", *lines), tmp_path, adopted(family)))
    assert plain == pytest.approx(2 * (first["clean"] + later), rel=0.01)


def test_planned_passes_over_sounds_equal_those_of_the_bare_model() -> None:
    own = sounds.loaded("multilingual")
    each = sum(
        count_pass(sounds.bare("multilingual"), (3, 8, 9, 10), input_features=sounds.features(n))
        for n in range(len(sounds.RECORDS))
    )
    rule = "patch resid_post encoder layer * at a frame 3 token"
    lines = sounds.experiment("e", "from clean into changed", rule)
    plain, _ = planned(check_file(lines, sounds.folder(), own, sounds.BLOCK))
    assert plain == pytest.approx(4 * each, rel=0.01)


@pytest.mark.parametrize(("of", "name"), [(sounds, "multilingual"), (images, "vit")])
def test_encoder_of_a_sound_or_image_runs_once_for_each(
    of: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a rule acts in it; in two experiments, one with replies."""
    monkeypatch.setattr(hooked, "ENCODED_VECTORS", WeakKeyDictionary())
    own, rows, inputs = of.loaded(name), list[int](), list[bytes]()
    rule = "patch z cross layer * head * at last token"
    texts = of.experiment("e", "from clean into changed", rule)
    texts += of.experiment(
        "g", "generate 3", "ablate z cross layer * heads * at last token with zero"
    )

    def look(_: Any, args: tuple[Any, ...], __: Any) -> None:
        rows.append(len(args[0]))
        inputs.append(args[0].numpy().tobytes())

    handle = own.module.get_encoder().layers[0].register_forward_hook(look)
    try:
        of.run_text(texts, name)
        assert rows == [1] * len(of.RECORDS)
        assert len(set(inputs)) == len(rows)
        rows.clear()
        at = "a frame 3" if of is sounds else "photo row 1 col 1"
        inside = of.experiment("i", f"ablate resid_post encoder layer 0 at {at} token with zero")
        of.run_text(inside, name)
        assert rows == [len(of.RECORDS)]
    finally:
        handle.remove()


@pytest.mark.parametrize(("of", "name"), [(sounds, "multilingual"), (images, "vit")])
def test_planned_rows_without_rules_in_an_encoder_cost_the_decoder(of: Any, name: str) -> None:
    own, count = of.loaded(name), len(of.RECORDS)
    lines = of.experiment(
        "e", "patch z cross layer * heads * at last token", "from clean into changed"
    )
    plain, fewer = planned(check_file(lines, of.folder(), own, of.BLOCK))
    bare = of.bare(name)
    if of is sounds:
        start, given = (3, 8, 9, 10), {"input_features": of.features(0)}
    else:
        start, given = (of.START,), {"pixel_values": of.pixels(name, 0)}
    encoded = bare.get_encoder()(*given.values())
    whole = count_pass(bare, start, **given)
    decoder = count_pass(bare, start, encoder_outputs=encoded)
    assert plain == pytest.approx(count * (2 * whole + 3 * decoder), rel=0.01)
    assert fewer <= plain


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_planned_passes_over_images_equal_those_of_the_bare_model(name: str) -> None:
    own = images.loaded(name)
    each = sum(
        count_pass(images.bare(name), (images.START,), pixel_values=images.pixels(name, n))
        for n in range(len(images.RECORDS))
    )
    rule = "patch resid_post encoder layer * at photo row 1 col 1 token"
    lines = images.experiment("e", "from clean into changed", rule)
    plain, _ = planned(check_file(lines, images.folder(), own, images.BLOCK))
    assert plain == pytest.approx(4 * each, rel=0.01)


def test_stopped_passes_cost_the_encoder_and_the_blocks_before_the_stop() -> None:
    """Against the bare decoder with fewer blocks."""
    bare, (record, *_) = model("bart"), ROWS
    ids, own = torch.tensor([text(record).ids]), starts("bart")
    shape = adopted("bart").shape
    lengths = torch.tensor([ids.shape[1] + len(own)]).numpy()
    sources = torch.tensor([ids.shape[1]]).numpy()
    whole = PassCost.of(shape).whole(lengths, sources)[1].item()
    encoder = PassCost.of(shape).whole(lengths, sources, 0)[1].item()
    assert encoder == count(lambda: bare.model.encoder(input_ids=ids))
    assert PassCost.of(shape).whole(lengths, sources, 1)[1].item() == pytest.approx(
        encoder + (whole - encoder) / 3
    )


@pytest.mark.parametrize(("of", "name"), [(sounds, "multilingual"), (images, "vit")])
def test_run_without_memory_for_inputs_prepares_them_again(
    of: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules in the encoder read pixels or spectrograms, and rules in the decoder its output."""
    own = of.loaded(name)
    at = "a frame 3" if of is sounds else "photo row 1 col 1"
    text = of.experiment("e", "from clean into changed", "patch z cross layer * at last token")
    text += of.experiment("i", f"ablate resid_post encoder layer 0 at {at} token with zero")

    def measured() -> list[Any]:
        monkeypatch.setattr(hooked, "ENCODED_VECTORS", WeakKeyDictionary())
        monkeypatch.setattr(image_vectors.IMAGE_INPUTS, "data", {})
        found = of.run_text(text, name)
        return [each.measures[0].patched.tolist() for each in found]

    expected = measured()
    monkeypatch.setattr(hooked, "_MAX_CACHED_BYTES", 1)
    assert measured() == expected
    inputs: Any = hooked.IMAGE_INPUTS[own.module]
    assert (len(inputs._prepare), len(inputs._cache._entries)) == (len(of.RECORDS), 1)


def test_tensor_cache_drops_the_oldest_entries_beyond_its_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hooked, "_MAX_CACHED_BYTES", 16)
    cache, computed = hooked.TensorCache(), list[int]()

    def find(token: int, size: int) -> None:
        def compute() -> dict[str, torch.Tensor]:
            computed.append(token)
            return {"a": torch.zeros(size // 8), "b": torch.zeros(size // 8)}

        assert cache.find(token, compute)["b"].nbytes == size // 2

    for token, size in ((1, 8), (2, 8), (1, 8), (3, 8), (1, 8), (4, 32), (4, 32), (1, 8)):
        find(token, size)
    assert computed == [1, 2, 3, 1, 4, 1]
