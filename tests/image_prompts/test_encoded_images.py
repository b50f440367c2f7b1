"""Encoder-decoders whose encoder reads an image, such as TrOCR, against plain hooks on the bare
model with the pixels that its image processor prepares."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..execute import encoder_decoder_circuits as circuits
from ..execute.encoder_decoders import (
    Change,
    Place,
    Write,
    changed,
    copied_columns,
    last_query_without,
    zeroed,
)
from ..execute.support import MODES, run_on
from ..quick import some
from ..run_source import run_source
from ..shared_models import unchanged
from . import models
from .support import RECORDS, check_rules, experiment, succeeded, write_data

SIZE = {"height": 16, "width": 24}
ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": [16, 24],
    "patch_size": 8,
}
DECODER: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "d_model": 20,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 28,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (ViTImageProcessorPil(size=SIZE), {}),  # a map from the encoder to the decoder's width
    "deit": (
        DeiTImageProcessorPil(size={"height": 18, "width": 26}, crop_size=SIZE),
        {"cross_attention_hidden_size": 16},
    ),
    "beit": (
        BeitImageProcessorPil(size=SIZE, do_center_crop=False),
        {"cross_attention_hidden_size": 16, "use_learned_position_embeddings": False},
    ),
}
"""By type of the encoder, the image processor and further settings of the decoder."""
FRONT = {"vit": 1, "deit": 2, "beit": 1}
ROWS, COLS, HEADS, LAYERS = 2, 3, 4, 3
START = 2
BLOCK = """
prompts ask {
  rows "data.jsonl"
  image photo = "{file}"
  template "{photo}"
  answer " {n}"
  wrong " {m}"
  corrupt changed { file = other }
}
"""

SEEDS = {"beit": 4}
"""Seeds of weights with which every edit changes the measure by more than 0.1; otherwise 0."""


@cache
def folder() -> Path:
    """The images and records, and the models of `FAMILIES` with their processors."""
    from tempfile import mkdtemp

    made = Path(mkdtemp(prefix="mechdsl-encoded-"))
    write_data(made)
    return made


@cache
def processor(name: str) -> TrOCRProcessor:
    return TrOCRProcessor(FAMILIES[name][0], models.tokenizer())


@cache
def bare(name: str) -> Any:
    encoder = AutoConfig.for_model(name, **ENCODER)
    decoder = AutoConfig.for_model("trocr", **DECODER, **FAMILIES[name][1])
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    torch.manual_seed(SEEDS.get(name, 0))
    made: Any = VisionEncoderDecoderModel(config)
    with torch.no_grad():
        for path, weight in made.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 2 if "output_projection" in path else 0.3)
    return unchanged(made.eval())


@cache
def loaded(name: str) -> LoadedModel:
    model, found = adopt_model("m", bare(name), processor(name))
    assert model is not None, found
    return model


@cache
def pixels(name: str, image: int) -> Tensor:
    picture = Image.open(folder() / f"{image}.png").convert("RGB")
    return FAMILIES[name][0](picture, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def outputs(
    name: str, image: int, writes: Iterable[Write] = (), text: Sequence[int] = (), **more: Any
) -> Any:
    with changed(bare(name), writes):
        ids = torch.tensor([[START, *text]])
        given = {"decoder_input_ids": ids, "pixel_values": pixels(name, image)}
        return bare(name)(**given, use_cache=False, **more)


def token(word: str) -> int:
    return models.tokenizer().get_vocab()[word]


def difference(name: str, n: int, image: int, writes: Iterable[Write] = ()) -> float:
    logits = outputs(name, image, writes).logits[0, -1]
    answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
    return float(logits[answer] - logits[wrong])


def other(n: int) -> int:
    return (n + 1) % len(RECORDS)


def place(site: str, layer: int, head: int | None = None) -> Place:
    """The module of a site; heads of the encoder and the decoder have different widths."""
    component, _, stack = site.partition(" ")
    block = f"{'encoder' if stack == 'encoder' else 'decoder.model.decoder'}.layers.{layer}"
    attention = {"encoder": "attention", "cross": "encoder_attn", "": "self_attn"}[stack]
    if component in ("resid_post", "resid_pre"):
        return Place(block, of_input=component == "resid_pre")
    if component == "mlp_out":
        return Place(f"{block}.mlp" if stack == "encoder" else f"{block}.fc2")
    if component == "z":
        output = "o_proj" if stack == "encoder" else "out_proj"
        return Place(f"{block}.{attention}.{output}", of_input=True, head=head)
    names = {"attn_out": "", "q": ".q_proj", "v": ".v_proj", "k": ".k_proj"}
    return Place(f"{block}.{attention}{names[component]}", head=head)


def read(name: str, image: int, own: Place) -> Tensor:
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    tokens = range(1 if "decoder" in own.path and "encoder_attn" not in own.path else COUNT[name])
    outputs(name, image, [(own, list(tokens), keep)])
    return found[0]


COUNT = {name: front + ROWS * COLS for name, front in FRONT.items()}
"""Number of tokens of the encoder."""


def patch(name: str, row: int, col: int) -> int:
    return FRONT[name] + COLS * (row - 1) + col - 1


def patches(name: str) -> list[int]:
    return [patch(name, row, col) for row in (1, 2) for col in (1, 2, 3)]


def copied(name: str, n: int, own: Place, tokens: Sequence[int]) -> Write:
    vectors = read(name, n, own)[list(tokens)]
    return own, tokens, lambda _: vectors


def by_head(name: str, n: int, site: str, layer: int, head: int, tokens: Sequence[int]) -> Write:
    """Copy one head; a place of the encoder has all its heads side by side."""
    own, width = place(site, layer), {"cross": 5, "encoder": 8}[site.partition(" ")[2]]
    columns = slice(head * width, (head + 1) * width)
    return copied_columns(own, tokens, columns, read(name, n, own))


def in_order(name: str, n: int) -> list[list[Write]]:
    """The writes of each cell of the rules of `RULES`, one rule after another."""
    one, every = [patch(name, 1, 2)], patches(name)
    second = [patch(name, 2, 1), patch(name, 2, 2), patch(name, 2, 3)]
    doubled = place("mlp_out encoder", 0), one, lambda value: 2 * value
    return [
        *([copied(name, n, place("resid_post encoder", layer), one)] for layer in range(2)),
        *([zeroed(place("attn_out encoder", layer), second)] for layer in range(2)),
        *([by_head(name, n, "z encoder", 0, head, every)] for head in range(2)),
        *(
            [by_head(name, n, "v cross", layer, head, every)]
            for layer in range(LAYERS)
            for head in range(HEADS)
        ),
        [zeroed(place("attn_out cross", 1), [0])],
        [copied(name, n, place("resid_post", 0), [0])],
        [doubled, copied(name, n, place("k cross", 2), one)],
    ]


RULES = (
    "patch resid_post encoder layer * at photo row 1 col 2 token",
    "ablate attn_out encoder layer * at photo row 2 col * tokens with zero",
    "patch z encoder layer 0 head * at photo tokens",
    "patch v cross layer * head * at photo tokens",
    "ablate attn_out cross layer 1 at last token with zero",
    "patch resid_post layer 0 at last token",
    "scale mlp_out encoder layer 0 at photo row 1 col 2 token by 2\n"
    "  patch k cross layer 2 heads * at photo row 1 col 2 token",
)


def try_text(
    text: str, model: LoadedModel, mode: str = "planned", block: str = BLOCK
) -> tuple[FileResult | None, list[Diagnostic]]:
    whole = f'mech 1\nmodel m = local("handed over")\n{block}\n{text}'
    return run_on(Source(whole, folder() / "file.mech"), {"m": model}, MODES[mode])


def run_text(
    text: str, name: str, mode: str = "planned", block: str = BLOCK
) -> list[ExperimentResult]:
    return [*succeeded(*try_text(text, loaded(name), mode, block)).values()]


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "planned") for name in FAMILIES), ("vit", "small passes")]
)
def test_image_encoder_decoder_rules_equal_hooks_on_the_bare_model(name: str, mode: str) -> None:
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(RULES)
    )
    found = run_text(text, name, mode)
    everything = [in_order(name, n) for n in range(len(RECORDS))]
    base = [difference(name, n, other(n)) for n in range(len(RECORDS))]
    expected = [
        [difference(name, n, other(n), writes) for n, writes in enumerate(cell)]
        for cell in zip(*everything, strict=True)
    ]
    check_rules(found, RULES, base, expected)


def test_replies_and_long_answers_equal_hooks_on_the_bare_model() -> None:
    """In two experiments, with answers of two tokens and of one."""
    rule = "ablate resid_post encoder layer 0 at photo row 1 col * tokens with zero"
    block = BLOCK.replace(
        'answer " {n}"', 'shown = if n < 3 then "circle" else "red dots"\n  answer " {shown}"'
    ).replace('  wrong " {m}"\n', "")
    written = experiment("r", "generate 4", rule, measure='measure matches("1|2|3") as raw')
    summed = experiment("s", rule, measure="measure logprob(answer) as delta")
    lengths = set[int]()
    for name in FAMILIES:
        writes = [
            zeroed(place("resid_post encoder", 0), [patch(name, 1, col) for col in (1, 2, 3)])
        ]
        replies, sums = run_text(written + summed, name, block=block)
        assert replies.replies is not None
        for n in range(len(RECORDS)):
            [reply], [cell] = replies.replies.runs["clean"][n], replies.replies.cells[0][n]
            assert list(reply.ids) == replied(name, n, ())
            assert list(cell.ids) == replied(name, n, writes)
            lengths |= {len(reply.ids), len(cell.ids)}
            words = ["circle"] if n < 2 else ["red", "dots"]
            ids = [token(word) for word in words]
            logits = outputs(name, n, writes, ids[:-1]).logits[0].log_softmax(-1)
            total = sum(float(logits[at, each]) for at, each in enumerate(ids))
            np.testing.assert_allclose(sums.measures[0].patched[0, n], total, atol=2e-4)
        assert np.abs(sums.measures[0].patched - sums.measures[0].base).max() > 0.1
    assert max(lengths) > 1


def replied(name: str, n: int, writes: Iterable[Write]) -> list[int]:
    """The most likely tokens before the end of the text, whose token is the first one's."""
    found: list[int] = []
    for _ in range(4):
        best = int(outputs(name, n, writes, found).logits[0, -1].argmax())
        if best == START:
            break
        found.append(best)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_observed_and_blocked_attention_equal_the_bare_model(name: str) -> None:
    to = "from last token to photo row 2 col * tokens"
    inside = "from photo row 1 col 1 token to photo row 2 col * tokens"
    lines = (
        f"observe attention cross layer * head * {to}",
        f"observe attention encoder layer * head * {inside}",
        f"block attention cross layer 1 heads * {to}",
    )
    text = experiment("c", lines[0], measure="") + experiment("i", lines[1], measure="")
    cross, encoder, blocked = run_text(text + experiment("b", lines[2]), name)
    keys = [patch(name, 2, col) for col in (1, 2, 3)]
    bare(name).encoder.set_attn_implementation("eager")
    try:
        for n in range(len(RECORDS)):
            seen = outputs(name, n, output_attentions=True)
            weights = torch.cat([each[0, :, -1, keys].sum(-1) for each in seen.cross_attentions])
            np.testing.assert_allclose(cross.measures[0].patched[:, n], weights, atol=1e-5)
            inner = [each[0, :, patch(name, 1, 1), keys] for each in seen.encoder_attentions]
            np.testing.assert_allclose(
                encoder.measures[0].patched[:, n], torch.cat(inner).sum(-1), atol=1e-5
            )
            value = difference_without(name, n, keys)
            np.testing.assert_allclose(blocked.measures[0].patched[0, n], value, atol=2e-4)
    finally:
        bare(name).encoder.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", FAMILIES)
def test_patterns_and_coordinates_of_patches_equal_hooks(name: str) -> None:
    """Heads whose pattern is 0 write 0."""
    at = "at photo row 1 col 2 token"
    text = f"basis b = pca(ask, dims: 1) at resid_post encoder layer 0 {at}\n"
    text += experiment("p", f"ablate pattern encoder layer 1 head * {at} with zero")
    rule = f"patch resid_post encoder layer 0 in basis b {at}"
    text += experiment("q", "from clean into changed", rule)
    ablated, moved = (each.measures[0].patched for each in run_text(text, name))
    own, one = place("resid_post encoder", 0), patch(name, 1, 2)
    for n in range(len(RECORDS)):
        for head in range(2):
            at_head, size = place("z encoder", 1), 8
            columns = slice(head * size, (head + 1) * size)
            zeros = torch.zeros_like(read(name, n, at_head))
            write = copied_columns(at_head, [one], columns, zeros)
            np.testing.assert_allclose(ablated[head, n], difference(name, n, n, [write]), atol=2e-4)
        every = torch.stack([read(name, each, own)[one] for each in range(len(RECORDS))]).double()
        direction = torch.linalg.svd(every - every.mean(0))[2][0]
        old, new = every[other(n)], every[n]
        inserted = (old + direction * (direction @ (new - old))).float()
        write = own, [one], lambda _, inserted=inserted: inserted[None]
        np.testing.assert_allclose(moved[0, n], difference(name, n, other(n), [write]), atol=3e-4)


def difference_without(name: str, n: int, keys: Sequence[int]) -> float:
    """The measure while cross attention of the middle layer doesn't see some patches."""
    attention = bare(name).get_submodule("decoder.model.decoder.layers.1.encoder_attn")
    with last_query_without(attention, 1, COUNT[name], keys):
        return difference(name, n, n)


PATHS = {
    "path z cross layer * head * -> logits at last token": ("z cross", "logits"),
    "path z encoder layer * heads * -> v cross layers * heads * at photo row 1 col 2 token": (
        "z encoder",
        "v cross",
    ),
}


@pytest.mark.parametrize("name", some(FAMILIES, ("beit",)))
def test_paths_of_images_equal_hooks(name: str) -> None:
    """All other heads and MLPs are held, in the encoder and in the decoder."""
    texts = "".join(
        experiment(f"e{n}", "from clean into changed", line) for n, line in enumerate(PATHS)
    )
    to_logits, to_values = (each.measures[0] for each in run_text(texts, name))
    patched_at = patch(name, 1, 2)
    for n in range(len(RECORDS)):
        base, held = other(n), list[Write]()
        for site, layers in (("z", 3), ("z cross", 3), ("mlp_out", 3), ("z encoder", 2),
                             ("mlp_out encoder", 2)):  # fmt: skip
            for layer in range(layers):
                value = seen(name, base, site, layer)
                held.append((place(site, layer), range(len(value)), constant(value)))
        expected = []
        for layer in range(LAYERS):
            for head in range(HEADS):
                source, columns = seen(name, n, "z cross", layer), slice(5 * head, 5 * head + 5)
                write = copied_columns(place("z cross", layer), [0], columns, source)
                expected.append(difference(name, n, base, [*held, write]))
        np.testing.assert_allclose(to_logits.patched[:, n], expected, atol=1e-4)
        assert np.abs(np.array(expected) - to_logits.base[0, n]).max() > 0.01
        expected = []
        for layer in range(2):
            value = seen(name, n, "z encoder", layer)[[patched_at]]
            first = [*held, (place("z encoder", layer), [patched_at], constant(value))]
            writes = [
                (
                    place("v cross", to),
                    [patched_at],
                    constant(seen(name, base, "v cross", to, first)[[patched_at]]),
                )
                for to in range(LAYERS)
            ]
            expected.append(difference(name, n, base, writes))
        np.testing.assert_allclose(to_values.patched[:, n], expected, atol=1e-4)
        assert np.abs(np.array(expected) - to_values.base[0, n]).max() > 0.01


def seen(name: str, image: int, site: str, layer: int, writes: Sequence[Write] = ()) -> Tensor:
    """[token, width] of a site in a run with writes."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    encoded = site.endswith("encoder") or site == "v cross"
    tokens = range(COUNT[name] if encoded else 1)
    outputs(name, image, [*writes, (place(site, layer), tokens, keep)])
    return found[0]


def constant(values: Tensor) -> Change:
    return lambda _: values


@pytest.mark.slow
def test_model_in_a_folder_equals_the_one_passed_from_python(tmp_path: Path) -> None:
    bare("vit").save_pretrained(tmp_path / "model")
    processor("vit").save_pretrained(tmp_path / "model")
    write_data(tmp_path)
    text = experiment("e", "from clean into changed", RULES[0])
    [expected] = run_text(text, "vit")
    whole = f'mech 1\nmodel m = local("model")\n{BLOCK}\n{text}'
    found = succeeded(*run_source(Source(whole, tmp_path / "file.mech")))["e"]
    np.testing.assert_allclose(found.measures[0].patched, expected.measures[0].patched, atol=1e-6)


ZERO = "ablate resid_post encoder layer 0 at photo tokens with zero"
ERRORS = {
    (ZERO, 'template "{photo}"', 'template "a {photo}"'): "E0459",
    (ZERO, 'template "{photo}"', 'image more = "{other}"\n  template "{photo} {more}"'): "E0459",
    ("ablate resid_post layer 0 at photo row 1 col 1 token with zero", "", ""): "E0316",
    ("patch z cross layer 0 head 0 at photo tokens", "", ""): "E0316",
    ("patch resid_post vision layer 0 at last token", "", ""): "E0108",
    ("allow attention layer 0 from first token to last token", "", ""): "E0332",
    ("allow attention cross layer 0 from last token to photo tokens", "", ""): "E0332",
    ("path z encoder layer 0 head 0 -> logits at photo tokens", "", ""): "E0335",
    ("patch resid_post encoder layer 0 at photo row 3 col 1 token", "", ""): "E0310",
    ("patch q encoder layer 0 head 0 at photo tokens\n  using cdt", "", ""): "E0608",
}


@pytest.mark.parametrize(("case", "code"), ERRORS.items())
def test_invalid_file_reports_the_code_before_anything_runs(
    case: tuple[str, str, str], code: str
) -> None:
    line, old, new = case
    text = experiment("e", "from clean into changed", line)
    _, found = try_text(text, loaded("vit"), block=BLOCK.replace(old, new))
    assert [each.code for each in found if each.severity == "error"] == [code]


def test_block_without_an_image_reports_e0455() -> None:
    block = 'prompts ask {\n  x in ["1", "2"]\n  template "{x}"\n  answer " 3"\n  wrong " 4"\n}\n'
    text = experiment("e", "ablate mlp_out layer 0 at last token with zero")
    _, found = try_text(text, loaded("vit"), block=block)
    assert [each.code for each in found if each.severity == "error"] == ["E0455"]


def test_processor_of_another_size_reports_e0459() -> None:
    own = TrOCRProcessor(ViTImageProcessorPil(size={"height": 8, "width": 8}), models.tokenizer())
    model, found = adopt_model("m", bare("vit"), own)
    assert model is not None, found
    _, found = try_text(experiment("e", ZERO), model)
    assert [each.code for each in found if each.severity == "error"] == ["E0459"]


def test_processor_and_tokenizer_in_a_pair_report_e0412() -> None:
    pair = FAMILIES["vit"][0], models.tokenizer()
    assert [each.code for each in adopt_model("m", bare("vit"), pair)[1]] == ["E0412"]


def test_decoder_with_joint_maps_of_cross_attention_reports_e0410() -> None:
    """GPT-2's cross attention has one map for keys and values."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    decoder = AutoConfig.for_model(
        "gpt2", vocab_size=models.VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        AutoConfig.for_model("vit", **ENCODER), decoder
    )
    made: Any = VisionEncoderDecoderModel(config)
    made.config.decoder_start_token_id = START
    model, found = adopt_model("m", made.eval(), processor("vit"))
    assert model is None
    assert [each.code for each in found] == ["E0410"]


def test_conventions_describe_the_input_of_the_encoder() -> None:
    [found] = run_text(experiment("e", ZERO), "vit")
    said = found.conventions
    assert said["bos"].startswith("none: the encoder reads only the image")
    assert said["decoder"] == "begins with `</s>`; the encoder reads the image"


def test_tokenizer_hash_depends_on_image_processor_settings() -> None:
    reader = loaded("vit").tokenizer
    assert isinstance(reader, ImagePromptTokenizer)
    images = ViTImageProcessorPil(size=SIZE, image_mean=[0.1, 0.2, 0.3])
    other = TrOCRProcessor(images, models.tokenizer())
    assert reader.with_processor(other, bare("vit").config).hash != reader.hash


# --- circuits -------------------------------------------------------------------------------------


class ReaderFamily(circuits.Family):
    """Modules of a reader of images, whose norms follow the sums in the decoder only."""

    def after(self, stack: str) -> bool:
        return stack != "encoder"

    def place(self, site: str, layer: int) -> Place:
        return place(site, layer)

    def norm(self, site: str, layer: int) -> str:
        if site.endswith(" encoder"):
            which = "before" if site.startswith("z") else "after"
            return f"encoder.layers.{layer}.layernorm_{which}"
        kind = {"z": "self_attn", "z cross": "encoder_attn"}.get(site, "final")
        return f"decoder.model.decoder.layers.{layer}.{kind}_layer_norm"

    def scale(self, site: str, layer: int) -> Any:
        if self.name != "beit" or not site.endswith(" encoder"):
            return 1
        block = self.module(f"encoder.layers.{layer}")
        return block.lambda_1 if site.startswith("z") else block.lambda_2

    def end(self, stack: str) -> str:
        return "encoder.layernorm" if stack else ""

    def mlp(self, site: str, layer: int) -> str:
        return self.place(site, layer).path.replace("fc2", "fc1")


CIRCUIT: list[circuits.Edge] = [
    (circuits.ENCODED, ("v encoder", 0, 1)),
    (("z encoder", 0, 0), ("mlp_norm encoder", 0, 0)),
    (("mlp_out encoder", 0, 0), ("q encoder", 1, 0)),
    (("z encoder", 1, 1), ("v cross", 1, 3)),
    (("mlp_out encoder", 1, 0), ("k cross", 2, 0)),
    (circuits.EMBED, ("q cross", 0, 1)),
    (("z cross", 0, 2), ("mlp_norm", 0, 0)),
    (("z cross", 0, 0), ("v", 1, 2)),
    (("mlp_out", 1, 0), ("q cross", 2, 1)),
    (("z cross", 2, 3), circuits.LOGITS),
]


def spelled(node: circuits.Node) -> str:
    site, layer, head = node
    if node in (circuits.EMBED, circuits.ENCODED, circuits.LOGITS):
        return site
    return f"{site} layer {layer}" + (f" head {head}" if not site.startswith("mlp") else "")


@cache
def opened(name: str) -> circuits.Family:
    model = copy.deepcopy(bare(name)).double()
    return ReaderFamily(name, model, LAYERS, ENCODER["num_hidden_layers"], HEADS, 2)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["planned", "small passes"])
@pytest.mark.parametrize("name", some(("deit", "beit"), ("deit",)))
def test_circuits_of_readers_of_images_equal_hooks(name: str, mode: str) -> None:
    """Both streams; at all tokens, and at patches of the encoder."""
    family = opened(name)
    every = set(circuits.list_edges(family))
    assert {*CIRCUIT} < every
    corner = [patch(name, 1, 1), patch(name, 2, 3)]
    whole = range(COUNT[name]), range(1)
    cases = [
        ("c", "tokens *", "zero", {*CIRCUIT}, whole),
        ("all but c", "tokens *", "changed", every - {*CIRCUIT}, whole),
        ("c", "tokens *", "changed", {*CIRCUIT}, whole),
        ("all but c", "{photo row 1 col 1 token, photo row 2 col 3 token}", "changed",
         every - {*CIRCUIT}, (corner, ())),
    ]  # fmt: skip
    edges = ", ".join(f"{spelled(of)} -> {spelled(to)}" for of, to in CIRCUIT)
    text = f"circuit c = {edges}\n" + "".join(
        experiment(f"e{n}", f"ablate {rule} at {at} with {fill}")
        for n, (rule, at, fill, _, _) in enumerate(cases)
    )
    found = run_text(text, name, mode)

    def given(image: int) -> dict[str, Tensor]:
        return {"pixel_values": pixels(name, image), "decoder_input_ids": torch.tensor([[START]])}

    for (rule, at, fill, ablated, tokens), each in zip(cases, found, strict=True):
        for n, record in enumerate(RECORDS):
            plain = circuits.Pass(family)
            circuits.run(plain, given(other(n)))
            filled = plain.given
            if fill == "zero":
                filled = {node: torch.zeros_like(value) for node, value in filled.items()}
            shares = circuits.at_tokens(ablated, *tokens, (COUNT[name], 1))
            logits = circuits.run(circuits.Pass(family, filled, shares), given(n))[-1]
            expected = float(logits[token(str(record["n"]))] - logits[token(str(record["m"]))])
            measure = each.measures[0]
            assert measure.patched[0, n] == pytest.approx(expected, abs=1e-4), (rule, at, fill)
        assert np.abs(measure.patched - measure.base).max() > 0.01, (rule, at, fill)


def test_circuit_of_a_reader_with_a_map_between_its_stacks_is_an_error() -> None:
    rule = experiment("e", "ablate c at tokens * with zero")
    result, problems = try_text(f"circuit c = embed -> logits\n{rule}", loaded("vit"))
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    assert problem.code == "E0108"
    assert "`k cross` isn't a linear map of the norm of the encoder's stream" in problem.message
