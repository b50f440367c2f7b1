"""Models with cross-attention to an image, such as Llama 3.2 Vision, against plain hooks on the
bare model with inputs from its processor."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute import unpatched_runs
from mechdsl.execute.image_vectors import provide_images
from mechdsl.execute.run.panel import execute
from mechdsl.forward.hooks import model as model_inputs
from mechdsl.forward.hooks.model import LoadedModel, build_batch, call_with_batch, replace_blocks
from mechdsl.images.layouts import image_layout
from mechdsl.images.processing import UnsupportedProcessor
from mechdsl.loading.loader import adopt_model
from mechdsl.models.config import shape_from_config
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.prompts import runs
from mechdsl.results.assembly.collection import check_denominators
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..execute.support import MODES, check_file, run_on
from ..reference.edits import EDITS, write_rules
from ..run_source import run_source
from ..shared_models import unchanged
from . import models
from .support import BLOCK, MEASURE, RECORDS, check_rules, experiment, succeeded, write_data

SIDE, PATCH, TILES = 16, 8, 4
PATCHES = (SIDE // PATCH) ** 2
EACH = PATCHES + 1
"""Tokens of a tile: its class token and its patches."""
HEADS, LAYERS, CROSS, WIDTH = 4, 4, (1, 3), 6
WORDS = (*(word for word in models.SPECIAL if word != "<image>"), *models.WORDS)
IMAGE = "<|image|>"
SIZES = ((24, 24), (10, 12), (17, 40), (16, 30))
"""(height, width) of the images; the second is smaller than a tile."""
GRIDS = ((2, 2), (1, 1), (1, 3), (1, 2))
"""Rows and columns of the tiles of each image."""


@cache
def folder() -> Path:
    """The images and records."""
    from tempfile import mkdtemp

    made = Path(mkdtemp(prefix="mechdsl-attended-"))
    write_data(made)
    for number, (height, width) in enumerate(SIZES):
        draws = np.random.default_rng(number)
        image = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(image).save(made / f"{number}.png")
    return made


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose image token follows the vocabulary, as in Llama 3.2 Vision."""
    vocabulary = {token: n for n, token in enumerate(WORDS)}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    special = (*models.SPECIAL[:-1], IMAGE)
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    roles = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
    named: dict[str, Any] = {f"{role}_token": token for role, token in roles.items()}
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


@cache
def processor() -> MllamaProcessor:
    images = MllamaImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, max_image_tiles=TILES, **models.MEAN
    )
    return MllamaProcessor(images, tokenizer())


@cache
def bare() -> Any:
    text = {
        **models.TEXT,
        "vocab_size": len(WORDS),
        "num_hidden_layers": LAYERS,
        "hidden_size": HEADS * WIDTH,
        "cross_attention_layers": list(CROSS),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    text.pop("head_dim")
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "max_num_tiles": TILES,
        "supported_aspect_ratios": [
            [w, h] for w in range(1, 5) for h in range(1, 5) if w * h <= TILES
        ],
    }
    config = AutoConfig.for_model(
        "mllama", text_config=text, vision_config=vision, image_token_index=len(WORDS)
    )
    torch.manual_seed(0)
    made: Any = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for path, weight in made.named_parameters():
            if "gate" in path.rpartition(".")[2]:
                weight.fill_(0.8)
            elif weight.dim() > 1:
                weight.normal_(0, 1.5 if "lm_head" in path else 0.4)
    return unchanged(made.eval())


@cache
def loaded() -> LoadedModel:
    model, found = adopt_model("m", bare(), processor())
    assert model is not None, found
    return model


Hook = tuple[str, bool, Callable[[Tensor], Tensor]]
"""The path of a module, whether its input is changed, and the change of the tensor."""


def inputs(n: int, image: int) -> dict[str, Any]:
    """What the processor returns for one prompt, with the image of another number."""
    picture = Image.open(folder() / f"{image}.png").convert("RGB")
    text = f"{IMAGE} how many {RECORDS[n]['what']} are there ? answer :"
    return dict(processor()(text=[text], images=[[picture]], return_tensors="pt"))


@contextmanager
def hooked(hooks: Iterable[Hook], module: Any = None) -> Generator[None]:
    """Plain hooks on the bare model, or on a copy of it."""
    handles: list[Any] = []
    for path, of_input, change in hooks:
        part = (module or bare()).get_submodule(path)

        def before(_: Any, args: Any, kwargs: Any, change: Any = change) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        def after(_: Any, args: Any, output: Any, change: Any = change) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        handles.append(
            part.register_forward_pre_hook(before, with_kwargs=True)
            if of_input
            else part.register_forward_hook(after)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def followed(given: Mapping[str, Any], text: Sequence[int]) -> dict[str, Any]:
    """The inputs of a prompt and of tokens after it, which attend to images as its last token."""
    given = dict(given)
    if not text:
        return given
    given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([[*text]])], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    mask = given["cross_attention_mask"]
    later = mask[:, -1:].expand(-1, len(text), -1, -1)
    given["cross_attention_mask"] = torch.cat([mask, later], 1)
    return given


@torch.no_grad()
def outputs(
    n: int, image: int, hooks: Iterable[Hook] = (), text: Sequence[int] = (), **more: Any
) -> Any:
    """Run one prompt, followed by tokens that attend to the image as its last token does."""
    with hooked(hooks):
        return bare()(**followed(inputs(n, image), text), use_cache=False, **more)


def token(word: str) -> int:
    return tokenizer().get_vocab()[word]


def difference(n: int, image: int, hooks: Iterable[Hook] = ()) -> float:
    logits = outputs(n, image, hooks).logits[0, -1]
    answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
    return float(logits[answer] - logits[wrong])


def other(n: int) -> int:
    return (n + 1) % len(RECORDS)


def patch(image: int, row: int, col: int) -> int:
    """The number of a patch among all tokens of the image, tile by tile."""
    (down, right), (above, before) = divmod(row - 1, 2), divmod(col - 1, 2)
    return (down * GRIDS[image][1] + above) * EACH + 1 + 2 * right + before


def block_at(layer: int) -> str:
    return f"model.language_model.layers.{layer}"


def place(site: str, layer: int) -> tuple[str, bool]:
    """The module of a site, and whether the site is its input."""
    component, _, stack = site.partition(" ")
    attention = f"{block_at(layer)}.{'cross_attn' if stack else 'self_attn'}"
    found = {
        "resid_post": (block_at(layer), False),
        "attn_out": (attention, False),
        "mlp_out": (f"{block_at(layer)}.mlp", False),
        "z": (f"{attention}.o_proj", True),
        "v": (f"{attention}.v_proj", False),
        "k": (f"{attention}.k_norm", False),
    }
    return found[component]


def read(n: int, image: int, site: str, layer: int) -> Tensor:
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    outputs(n, image, [(*place(site, layer), keep)])
    return found[0]


def at(site: str, layer: int, tokens: Sequence[int], head: int | None, of: Any) -> Hook:
    """Replace vectors by those of another tensor, or by what a function returns for them.

    The bare model has the values of patches as [tile, token, feature], and their keys as
    [1, head, token, feature].
    """
    columns = slice(None) if head is None else slice(head * WIDTH, (head + 1) * WIDTH)

    def flat(value: Tensor) -> Tensor:
        if site == "k cross":
            value = value.transpose(1, 2)
            return value.reshape(-1, value.shape[2] * value.shape[3])
        return value.reshape(-1, value.shape[-1])

    def change(value: Tensor) -> Tensor:
        value = value.clone()
        new = flat(value).clone()
        rows = list(tokens)
        own = new[rows][:, columns]
        chosen = of(own) if callable(of) else flat(of)[rows][:, columns]
        whole = new[rows]
        whole[:, columns] = chosen
        new[rows] = whole
        if site == "k cross":
            heads = new.unflatten(1, (value.shape[1], value.shape[3]))
            return heads.transpose(0, 1)[None]
        return new.reshape(value.shape)

    return (*place(site, layer), change)


def words(n: int) -> list[int]:
    """The positions of `{what}`, after the image's token and three others."""
    return [*range(4, 4 + len(str(RECORDS[n]["what"]).split()))]


def in_order(n: int) -> list[list[Hook]]:
    """The changes of each cell of the rules of `RULES`, one rule after another."""
    zero, double = torch.zeros_like, lambda value: 2 * value
    here, there = [patch(n, 1, 2)], [patch(other(n), 1, 2)]
    assert here == there
    rows, cols = (2 * each for each in GRIDS[other(n)])
    every = [patch(other(n), row, col) for row in range(1, rows + 1) for col in range(1, cols + 1)]

    def copied(site: str, layer: int, tokens: Sequence[int], head: int | None = None) -> Hook:
        return at(site, layer, tokens, head, read(n, n, site, layer))

    def in_basis(site: str, layer: int, tokens: Callable[[int], int], head: int | None) -> Hook:
        """The coordinates of the clean run in two principal components of all clean runs."""
        own = slice(None) if head is None else slice(head * WIDTH, (head + 1) * WIDTH)

        def clean(m: int) -> Tensor:
            value = read(m, m, site, layer)
            return value.reshape(-1, value.shape[-1])[tokens(m), own]

        vectors = torch.stack([clean(m) for m in range(len(RECORDS))])
        axes = torch.linalg.svd((vectors - vectors.mean(0)).double()).Vh[:2].float()

        def change(now: Tensor) -> Tensor:
            return now + (vectors[n] - now) @ axes.T @ axes

        return at(site, layer, [tokens(other(n))], head, change)

    return [
        *([copied("resid_post", layer, [-1])] for layer in range(LAYERS)),
        [at("attn_out cross", 1, words(n), None, zero)],
        *([copied("z", 2, [-1], head)] for head in range(HEADS)),
        *([copied("v cross", 1, here, head)] for head in range(2)),
        *([at("z cross", 3, [-1], head, zero)] for head in range(HEADS)),
        [at("mlp_out", 0, [-1], None, double), copied("k cross", 3, here)],
        [at("v cross", 1, every, None, zero)],
        [in_basis("resid_post", 1, lambda m: -1, None)],
        [in_basis("v cross", 3, lambda m: patch(m, 1, 2), 1)],
    ]


RULES = (
    "patch resid_post layer * at last token",
    "ablate attn_out cross layer 1 at what tokens with zero",
    "patch z layer 2 head * at last token",
    "patch v cross layer 1 head * at photo row 1 col 2 token",
    "ablate z cross layer 3 head * at last token with zero",
    "scale mlp_out layer 0 at last token by 2\n"
    "  patch k cross layer 3 heads * at photo row 1 col 2 token",
    "ablate v cross layer 1 heads * at photo tokens with zero",
    "patch resid_post layer 1 in basis b at last token",
    "patch v cross layer 3 head 1 in basis c at photo row 1 col 2 token",
)
BASES = """
basis b = pca(ask, dims: 2) at resid_post layer 1 at last token
basis c = pca(ask, dims: 2) at v cross layer 3 head 1 at photo row 1 col 2 token
"""


def try_text(
    text: str, mode: str = "planned", block: str = BLOCK, model: LoadedModel | None = None
) -> tuple[FileResult | None, list[Diagnostic]]:
    whole = f'mech 1\nmodel m = local("handed over")\n{block}\n{text}'
    return run_on(Source(whole, folder() / "file.mech"), {"m": model or loaded()}, MODES[mode])


def run_text(text: str, mode: str = "planned", block: str = BLOCK) -> list[ExperimentResult]:
    return [*succeeded(*try_text(text, mode, block)).values()]


@pytest.mark.parametrize("mode", ["planned", pytest.param("small passes", marks=pytest.mark.slow)])
def test_cross_attention_rules_equal_hooks_on_the_bare_model(mode: str) -> None:
    text = BASES + "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(RULES)
    )
    found = run_text(text, mode)
    everything = [in_order(n) for n in range(len(RECORDS))]
    base = [difference(n, other(n)) for n in range(len(RECORDS))]
    expected = [
        [difference(n, other(n), hooks) for n, hooks in enumerate(cell)]
        for cell in zip(*everything, strict=True)
    ]
    check_rules(found, RULES, base, expected)


EDITED: dict[str, tuple[tuple[int, int], int | None]] = {
    "resid_post": ((1, 2), None),
    "attn_out cross": (CROSS, None),
    "z cross": (CROSS, 2),
    "v cross": (CROSS, 1),
    "k cross": ((3, 1), 1),
    "mlp_out": (CROSS, None),
}
"""Site → its layer and that of the vectors that `set` reads, and the head."""


@pytest.mark.parametrize("site", EDITED)
def test_every_edit_of_a_model_that_attends_to_images_equals_hooks(site: str) -> None:
    """At the last token, or at the keys and values of a patch of the image."""
    layers, head = EDITED[site]
    of_patch = site in ("v cross", "k cross")
    position = "photo row 1 col 2 token" if of_patch else "last token"
    names = [f"{site} layer {n}" + ("" if head is None else f" head {head}") for n in layers]

    def written(image: int, layer: int, change: Callable[[Tensor], Tensor]) -> Hook:
        tokens, scale = [patch(image, 1, 2)] if of_patch else [-1], 1.0
        if site in ("attn_out cross", "mlp_out"):  # the module's output is multiplied by a gate
            block = bare().get_submodule(block_at(layers[layer]))
            gate = block.cross_attn_attn_gate if "cross" in site else block.cross_attn_mlp_gate
            scale = float(gate.detach().tanh())
        return at(site, layers[layer], tokens, head, lambda value: change(value * scale) / scale)

    def of(n: int, changed: bool, layer: int) -> Tensor:
        found, image = list[Tensor](), other(n) if changed else n

        def keep(value: Tensor) -> Tensor:
            found.append(value.clone())
            return value

        outputs(n, image, [written(image, layer, keep)])
        return found[0]

    text = f"direction d = mean(ask) at {names[0]} at {position}\n"
    written_rules = write_rules(names[0], names[1], position, "changed")
    edits = dict(zip(written_rules, EDITS.values(), strict=True))
    rules = [*edits]
    text += "".join(experiment(f"e{n}", rule) for n, rule in enumerate(rules))
    base = [difference(n, n) for n in range(len(RECORDS))]
    expected: list[list[float]] = []
    for change in edits.values():
        new = [change(of, n, of(n, False, 0)) for n in range(len(RECORDS))]
        hooks = [written(n, 0, lambda _, value=value: value) for n, value in enumerate(new)]
        expected.append([difference(n, n, [hook]) for n, hook in enumerate(hooks)])
    check_rules(run_text(text), rules, base, expected)


@pytest.mark.slow
def test_dropped_inputs_are_prepared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_inputs, "_MAX_CACHED_BYTES", 1)
    monkeypatch.setattr(model_inputs.IMAGE_INPUTS, "data", {})
    test_cross_attention_rules_equal_hooks_on_the_bare_model("planned")


def test_replies_and_long_answers_equal_hooks_on_the_bare_model() -> None:
    """In two experiments, with answers of two tokens and of one."""
    rule = "ablate v cross layer 1 heads * at photo row 1 col * tokens with zero"
    block = BLOCK.replace(
        'answer " {n}"', 'shown = if n < 3 then "circle" else "red dots"\n  answer " {shown}"'
    ).replace('  wrong " {m}"\n', "")
    written = experiment("r", "generate 4", rule, measure='measure matches("1|2|3") as raw')
    summed = experiment("s", rule, measure="measure logprob(answer) as delta")
    replies, sums = run_text(written + summed, block=block)
    assert replies.replies is not None
    for n in range(len(RECORDS)):
        top = [patch(n, 1, col) for col in range(1, 2 * GRIDS[n][1] + 1)]
        hooks = [at("v cross", 1, top, None, torch.zeros_like)]
        [reply], [cell] = replies.replies.runs["clean"][n], replies.replies.cells[0][n]
        assert list(reply.ids) == replied(n, ())
        assert list(cell.ids) == replied(n, hooks)
        ids = [token(word) for word in (["circle"] if n < 2 else ["red", "dots"])]
        logits = outputs(n, n, hooks, ids[:-1]).logits[0].log_softmax(-1)[-len(ids) :]
        total = sum(float(logits[at, each]) for at, each in enumerate(ids))
        np.testing.assert_allclose(sums.measures[0].patched[0, n], total, atol=2e-4)
    assert np.abs(sums.measures[0].patched - sums.measures[0].base).max() > 0.1


def replied(n: int, hooks: Sequence[Hook]) -> list[int]:
    """The most likely tokens before the end of the text."""
    found: list[int] = []
    for _ in range(4):
        best = int(outputs(n, n, hooks, found).logits[0, -1].argmax())
        if best == token("</s>"):
            break
        found.append(best)
    return found


def test_observed_and_blocked_attention_equal_the_bare_model() -> None:
    to = "from last token to photo row 1 col * tokens"
    text = experiment("c", f"observe attention cross layer 1 head * {to}", measure="")
    text += experiment(
        "s", "observe attention layer 2 head * from last token to what tokens", measure=""
    )
    text += experiment("b", f"block attention cross layer 3 heads * {to}")
    cross, own, blocked = run_text(text)
    bare().set_attn_implementation("eager")
    try:
        for n in range(len(RECORDS)):
            keys = [patch(n, 1, col) for col in range(1, 2 * GRIDS[n][1] + 1)]
            seen = outputs(n, n, output_attentions=True).attentions
            weights = seen[1][0, :, -1, keys].sum(-1)
            np.testing.assert_allclose(cross.measures[0].patched[:, n], weights, atol=1e-5)
            weights = seen[2][0, :, -1, words(n)].sum(-1)
            np.testing.assert_allclose(own.measures[0].patched[:, n], weights, atol=1e-5)
            value = difference_without(n, keys)
            np.testing.assert_allclose(blocked.measures[0].patched[0, n], value, atol=2e-4)
    finally:
        bare().set_attn_implementation("sdpa")
    assert np.abs(blocked.measures[0].patched - blocked.measures[0].base).max() > 0.1


def difference_without(n: int, keys: Sequence[int]) -> float:
    """The measure while the last token doesn't attend to some patches in layer 3."""

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].clone()
        mask[..., -1, list(keys)] = torch.finfo(torch.float32).min
        return args, {**kwargs, "attention_mask": mask}

    attention = bare().get_submodule(f"{block_at(3)}.cross_attn")
    handle = attention.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        return difference(n, n)
    finally:
        handle.remove()


QUESTIONS = [
    (image, what) for image in (1, 3) for what in ("dots", "red dots", "red circle", "dots and red")
]
"""(number of the image, question): prompts of several lengths, four for each of two images."""
ASKED = """
prompts ask {
  rows "questions.jsonl"
  image photo = "{file}"
  template "how many {photo} are {what} there ? answer :"
  answer " 1"
  wrong " 2"
  corrupt changed { file = other }
}
"""
SHARED = (
    "patch resid_post layer 2 at last token",
    "patch z cross layer 3 heads * at last token",
    "ablate v cross layer 1 heads * at photo row 1 col 2 token with zero",
)


@pytest.fixture
def _sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MIN_SHARED_TOKENS", 1)
    lines = [
        {"file": f"{image}.png", "other": f"{4 - image}.png", "what": what}
        for image, what in QUESTIONS
    ]
    (folder() / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def asked(image: int, what: str, hooks: Iterable[Hook] = ()) -> float:
    """The difference of two logits for one question about an image."""
    text = f"how many {IMAGE} are {what} there ? answer :"
    picture = Image.open(folder() / f"{image}.png").convert("RGB")
    given = processor()(text=[text], images=[[picture]], return_tensors="pt")
    with torch.no_grad(), hooked(hooks):
        logits = bare()(**given, use_cache=False).logits[0, -1]
    return float(logits[token("1")] - logits[token("2")])


def copied_from(image: int, what: str, site: str, layer: int) -> Hook:
    """Replace the last token's vector by that of the question about another image."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    asked(image, what, [(*place(site, layer), keep)])
    return at(site, layer, [-1], None, found[0])


@pytest.mark.usefixtures("_sharing")
@pytest.mark.parametrize("mode", ["planned", "plain", "padded on the right"])
def test_prompts_with_an_image_and_a_beginning_in_common_equal_hooks(mode: str) -> None:
    """In two runs that share passes, and have the same texts about other images."""
    text = "".join(experiment(f"e{n}", "from clean into changed", r) for n, r in enumerate(SHARED))
    found = run_text(text, mode, ASKED)
    for number, own in enumerate(found):
        for n, (image, what) in enumerate(QUESTIONS):
            hooks = [
                copied_from(image, what, "resid_post", 2),
                copied_from(image, what, "z cross", 3),
                at("v cross", 1, [patch(4 - image, 1, 2)], None, torch.zeros_like),
            ]
            measure = own.measures[0]
            values = measure.base[0, n], measure.patched[0, n]
            due = asked(4 - image, what), asked(4 - image, what, [hooks[number]])
            np.testing.assert_allclose(values, due, atol=2e-4)
        assert np.abs(own.measures[0].patched - own.measures[0].base).max() > 0.1


def count_tokens(text: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the tokens for which queries, an output of attention and an MLP are computed."""
    loaded()  # its checks compute tokens too
    counts = Counter[str]()
    paths = [f"{block_at(0)}.self_attn.q_proj", f"{block_at(0)}.mlp.up_proj"]
    paths += [f"{block_at(1)}.cross_attn.q_proj", f"{block_at(1)}.cross_attn.o_proj"]
    weights = {id(bare().get_submodule(path).weight): path for path in paths}
    linear = torch.nn.functional.linear

    def look(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in weights:
            counts[weights[id(weight)]] += given.shape[:-1].numel()
        return linear(given, weight, bias)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", look)
        run_text(text, mode, ASKED)
    return counts


@pytest.mark.usefixtures("_sharing")
def test_tokens_of_shared_beginnings_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts of an image share "<s> how many <image> are". Other words are "dots", "red dots",
    "circle" after a "red", and "and red" after "dots", each before "there ? answer :". Both runs
    are one pass here and have the same prompts. Rows are padded to 12 tokens and share nothing."""
    text = experiment("e", "from clean into changed", SHARED[0])
    shared = count_tokens(text, "planned", monkeypatch)
    monkeypatch.setattr(runs, "MIN_SHARED_TOKENS", 1 << 30)
    alone = count_tokens(text, "planned", monkeypatch)
    rows = 2 * 4 * 12
    assert set(alone.values()) == {3 * rows}, alone
    assert set(shared.values()) == {rows + 2 * (5 + 5 + 6 + 5 + 6)}, shared


@pytest.mark.usefixtures("_sharing")
def test_plan_counts_shared_beginnings_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts each run separately, also if few prompts let two runs share a pass."""
    monkeypatch.setattr(unpatched_runs, "MAX_SHARED_TOKENS", 0)
    text = experiment("e", "from clean into changed", SHARED[0])
    checked = check_file(text, folder(), loaded(), ASKED)

    def count(without: frozenset[str]) -> tuple[float, float]:
        plan = make_plan(checked.experiments, without=without)
        execute(plan, {"m": loaded()}, None, check=check_denominators)  # encodes the images
        with FlopCounterMode(display=False) as counter:
            execute(plan, {"m": loaded()}, None, check=check_denominators)
        return counter.get_total_flops() / 2, plan_cost(plan).planned.multiply_adds

    (counted, planned), (apart, more) = count(frozenset()), count(frozenset(["share"]))
    assert counted < 0.9 * apart
    assert 0.8 < (more - planned) / (apart - counted) < 1.25


def test_text_before_the_image_equals_the_bare_model() -> None:
    """Tokens before the image read nothing of it."""
    own = BLOCK.replace("{photo} how many", "how many {photo}")
    rule = "ablate resid_post layer 0 at token 1 with zero"
    [found] = run_text(experiment("e", rule), block=own)
    for n, record in enumerate(RECORDS):
        text = f"how many {IMAGE} {record['what']} are there ? answer :"
        picture = Image.open(folder() / f"{n}.png").convert("RGB")
        given = processor()(text=[text], images=[[picture]], return_tensors="pt")
        zero = at("resid_post", 0, [1], None, torch.zeros_like)
        ids = [token(str(record[key])) for key in ("n", "m")]
        for hooks, value in (((), found.measures[0].base), ([zero], found.measures[0].patched)):
            with torch.no_grad(), hooked(hooks):
                logits = bare()(**given, use_cache=False).logits[0, -1, ids]
            np.testing.assert_allclose(value[0, n], float(logits[0] - logits[1]), atol=2e-4)


def test_mlps_of_attending_blocks_add_nothing_to_text_before_the_image() -> None:
    """Only the last experiment has a rule there."""
    own = BLOCK.replace("{photo} how many", "how many {photo}")
    rule = "set mlp_out layer 1 at token 1 to 9"
    others = ("set mlp_out layer 1 at last token to 9", "set mlp_out layer 0 at token 1 to 9")
    *rest, found = run_text(
        "".join(experiment(f"e{n}", each) for n, each in enumerate((*others, rule))), block=own
    )
    np.testing.assert_allclose(found.measures[0].patched, found.measures[0].base, atol=1e-5)
    assert "skips the MLPs of blocks 1, 3" in found.conventions["text before the image"]
    for each in rest:
        assert "text before the image" not in each.conventions
        assert np.abs(each.measures[0].patched - each.measures[0].base).max() > 0.1


def test_tile_tokens_equal_manually_computed_arrays() -> None:
    """The image has 17 x 40 pixels, resized to 16 x 37, in three tiles of 16 x 16."""
    [layout] = image_layout(processor(), bare().config, {}, [SIZES[2]])
    assert layout.end == TILES * EACH
    cells = {(cell.row, cell.col): cell for cell in layout.cells}
    positions = [[cells[row, col].position for col in range(1, 7)] for row in (1, 2)]
    assert positions == [[1, 2, 6, 7, 11, 12], [3, 4, 8, 9, 13, 14]]
    assert [cells[1, col].tile for col in range(1, 7)] == [1, 1, 2, 2, 3, 3]
    assert cells[1, 6].box is None
    scale = 40 / 37
    for (row, col), box in {(1, 1): (0, 0, 8, 8), (2, 5): (32, 8, 37, 16)}.items():
        left, top, right, bottom = box
        expected = (left * scale, top * 17 / 16, right * scale, bottom * 17 / 16)
        np.testing.assert_allclose(cells[row, col].box, expected)
    [small] = image_layout(processor(), bare().config, {}, [SIZES[1]])
    assert [cell.position for cell in small.cells] == [1, 2, 3, 4]
    assert small.end == TILES * EACH


def test_pixels_of_one_cell_change_the_vector_of_its_token_most() -> None:
    """In each tile of an image that needs no resizing."""
    module, picture = bare().model, np.zeros((16, 48, 3), dtype=np.uint8)
    [layout] = image_layout(processor(), bare().config, {}, [(16, 48)])

    @torch.no_grad()
    def embedded(pixels: Any) -> Tensor:
        made = processor().image_processor(Image.fromarray(pixels), return_tensors="pt")
        return module.vision_model.patch_embedding(made["pixel_values"][0, 0]).flatten(2)

    before = embedded(picture)
    for cell in layout.cells:
        assert cell.box is not None
        left, top, right, bottom = map(round, cell.box)
        bright = picture.copy()
        bright[top:bottom, left:right] = 255
        moved = (embedded(bright) - before).abs().sum(1)  # [tile, patch]
        tile, place = divmod(cell.position, EACH)
        assert moved.nonzero().tolist() == [[tile, place - 1]]


@pytest.mark.slow
def test_model_in_a_folder_equals_the_one_passed_from_python(tmp_path: Path) -> None:
    bare().save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    for file in folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lines = {"run": RULES[3], **{each: f"{QUERIES} using {each}" for each in ("gim", "atp_qk")}}
    text = "".join(experiment(n, "from clean into changed", each) for n, each in lines.items())
    whole = f'mech 1\nmodel m = local("model")\n{BLOCK}\n{text}'
    found = succeeded(*run_source(Source(whole, tmp_path / "file.mech")))
    for expected in run_text(text):
        [measure], [other] = expected.measures, found[expected.name].measures
        np.testing.assert_allclose(other.patched, measure.patched, atol=1e-6)


QUERIES = "patch q cross layer * head * at last token"


def test_estimates_at_queries_need_only_the_config_of_a_model(tmp_path: Path) -> None:
    bare().config.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    named = {"architectures": [type(bare()).__name__], **json.loads(config.read_text("utf-8"))}
    config.write_text(json.dumps(named), "utf-8")
    processor().save_pretrained(tmp_path / "model")
    for file in folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = "".join(
        experiment(
            name,
            "from clean into changed",
            f"{QUERIES} using {name}",
            measure=f"measure logit(answer) as {effect}",
        )
        for name, effect in (("gim", "delta"), ("atp_qk", "delta"), ("atp_star", "raw"))
    )
    whole = f'mech 1\nmodel m = local("model")\n{BLOCK}\n{text}'
    found = check_source(Source(whole, tmp_path / "file.mech")).diagnostics
    assert [each.code for each in found if each.severity == "error"] == []


ZERO = "ablate v cross layer 1 heads * at photo tokens with zero"
ERRORS = {
    ("ablate resid_post layer 0 at photo row 1 col 1 token with zero", "", ""): "E0316",
    ("patch z cross layer 1 head 0 at photo tokens", "", ""): "E0316",
    ("renumber photo tokens from 3", "", ""): "E0316",
    ("patch resid_post layer 0 at photo row 9 col 1 token", "", ""): "E0310",
    ("patch v cross layer 0 heads * at photo row 1 col 1 token", "", ""): "E0414",
    ("patch z layer 1 head 0 at last token", "", ""): "E0414",
    ("patch resid_post encoder layer 0 at photo tokens", "", ""): "E0108",
    ("patch resid_post vision layer 0 at last token", "", ""): "E0310",
    ("patch v cross layer 1 heads * at photo row 9 col 1 token", "", ""): "E0310",
    ("patch v cross layer 1 heads * at what tokens", "", ""): "E0310",
    ("patch v cross layer 1 heads * at last token", "", ""): "E0310",
}


@pytest.mark.parametrize(("case", "code"), ERRORS.items())
def test_invalid_file_reports_the_code_before_anything_runs(
    case: tuple[str, str, str], code: str
) -> None:
    line, old, new = case
    text = experiment("e", "from clean into changed", line)
    _, found = try_text(text, block=BLOCK.replace(old, new) if old else BLOCK)
    assert next(each.code for each in found if each.severity == "error") == code


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("patch resid_post layer 0 at photo tokens", "name a token of the text"),
        ("patch v cross layer 1 heads * at photo tokens", "use images of one width and height"),
    ],
)
def test_position_of_an_image_reports_the_cause(line: str, told: str) -> None:
    text = experiment("e", "from clean into changed", line)
    found = [each for each in try_text(text)[1] if each.severity == "error"]
    assert told in render_full(found, color=False, width=200)


def test_block_without_an_image_reports_e0455() -> None:
    own = 'prompts ask {\n  x in ["1", "2"]\n  template "{x}"\n  answer " 3"\n  wrong " 4"\n}\n'
    text = experiment("e", "ablate mlp_out layer 0 at last token with zero")
    _, found = try_text(text, block=own)
    assert [each.code for each in found if each.severity == "error"] == ["E0455"]


@pytest.mark.parametrize(("side", "tiles"), [(8, TILES), (SIDE, 10**9)])
def test_processor_of_other_tiles_reports_e0459(side: int, tiles: int) -> None:
    images = MllamaImageProcessorPil(size={"height": side, "width": side}, max_image_tiles=tiles)
    model, found = adopt_model("m", bare(), MllamaProcessor(images, tokenizer()))
    assert model is not None, found
    _, found = try_text(experiment("e", ZERO), model=model)
    assert [each.code for each in found if each.severity == "error"] == ["E0459"]


@pytest.mark.parametrize("sizes", [{"max_num_tiles": 10**9}, {"patch_size": 1, "image_size": 1000}])
def test_layout_of_huge_tiles_is_rejected_before_they_are_counted(sizes: dict[str, int]) -> None:
    config = deepcopy(bare().config)
    for name, value in sizes.items():
        setattr(config.vision_config, name, value)
    vision = config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    images = MllamaImageProcessorPil(size=size, max_image_tiles=vision.max_num_tiles)
    with pytest.raises(UnsupportedProcessor, match="more than 64 tiles of 10,000 tokens"):
        image_layout(MllamaProcessor(images, tokenizer()), config, {}, [(20, 20)])


def test_conventions_name_the_image_token_and_full_forward_passes() -> None:
    [found] = run_text(experiment("e", ZERO))
    assert found.conventions["image"] == (
        "blocks of `cross` attend to it, from its `<|image|>` up to the next image; tokens before "
        "the first image attend to all tiles of all images, also to tiles that an image doesn't "
        "fill"
    )
    assert found.conventions["bos"] == (
        "`<s>` before the text, or after the tokens of images that it begins with, by the "
        "model's processor"
    )
    assert "a full forward pass over its prompt" in found.conventions["planner"]


def test_text_before_the_image_attends_to_it() -> None:
    """The token before the image depends on it in the first block that attends to it."""
    own = BLOCK.replace("{photo} how many", "how many {photo}")
    rule = "observe norm z cross layer 1 head * at token 1"
    kept = experiment("e", rule, measure="")
    other = own.replace('image photo = "{file}"', 'image photo = "{other}"')
    [first], [second] = (run_text(kept, block=each) for each in (own, other))
    assert np.abs(first.measures[0].patched - second.measures[0].patched).max() > 0.01


def test_masked_and_gray_images_equal_the_bare_model_on_their_pixels() -> None:
    """A gray image has the size of a tile; a masked one keeps its tiles."""
    block = BLOCK.replace("corrupt changed { file = other }", "corrupt hidden { mask photo }")
    [masked] = run_text(experiment("e", "from clean into hidden", RULES[0]), block=block)
    gray = BLOCK.replace('image photo = "{file}"', "image photo = gray(100)")
    gray = gray.replace("  corrupt changed { file = other }\n", "")
    [plain] = run_text(experiment("e", ZERO), block=gray)
    for n, record in enumerate(RECORDS):
        text = f"{IMAGE} how many {record['what']} are there ? answer :"
        ids = [token(str(record[key])) for key in ("n", "m")]
        height, width = SIZES[n]
        for size, level, value in (
            ((width, height), 128, masked.measures[0].base[0, n]),
            ((SIDE, SIDE), 100, plain.measures[0].base[0, n]),
        ):
            picture = Image.new("RGB", size, (level,) * 3)
            given = processor()(text=[text], images=[[picture]], return_tensors="pt")
            with torch.no_grad():
                logits = bare()(**given, use_cache=False).logits[0, -1, ids]
            np.testing.assert_allclose(value, float(logits[0] - logits[1]), atol=2e-4)


@pytest.mark.parametrize("line", ["", "generate 3"])
def test_planned_cost_is_near_the_counted_products(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the encoder of images, which runs once for each image, and here before."""
    monkeypatch.setattr(model_inputs, "ATTENDED_MAPS", WeakKeyDictionary())
    rule = "ablate z cross layer * head * at last token with zero"
    measure = 'measure matches("1|2|3") as raw' if line else MEASURE
    text = experiment("e", *([line] if line else []), rule, measure=measure)
    checked = check_file(text, folder(), loaded(), BLOCK)
    plan = make_plan(checked.experiments)
    provide_images(loaded(), checked.experiments[0].table.runs["clean"].rows)
    execute(plan, {"m": loaded()}, None, check=check_denominators)  # also tries cached keys
    with FlopCounterMode(display=False) as counter:
        execute(plan, {"m": loaded()}, None, check=check_denominators)
    planned = plan_cost(plan).planned.multiply_adds
    most = 1.35 if line else 1.05  # rows of a reply share the blocks before a rule, too
    assert 0.95 < planned / (counter.get_total_flops() / 2) < most


def test_each_image_passes_the_vision_encoder_once() -> None:
    own = deepcopy(bare())
    model, problems = adopt_model("m", own, processor())
    assert model is not None, problems
    counts: Counter[bytes] = Counter()

    def look(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        for pixels in kwargs["pixel_values"]:
            counts[pixels.contiguous().numpy().tobytes()] += 1

    text = experiment("e", "from clean into changed", ZERO)
    text += experiment("r", "generate 3", ZERO, measure='measure matches("1|2|3") as raw')
    source = Source(f'mech 1\nmodel m = local("x")\n{BLOCK}\n{text}', folder() / "file.mech")
    handle = own.model.vision_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        succeeded(*run_on(source, {"m": model}, MODES["planned"]))
    finally:
        handle.remove()
    assert sorted(counts.values()) == [1] * len(SIZES)


def test_layer_star_names_the_blocks_that_have_the_site() -> None:
    """`z cross` in the blocks that attend to the image, and `z` in the others."""
    rules = (
        "ablate z cross layer * heads * at last token with zero",
        "ablate z layer * heads * at last token with zero",
        "ablate v cross layers * heads * at photo row 1 col 2 token with zero",
    )
    zero, others = torch.zeros_like, [n for n in range(LAYERS) if n not in CROSS]
    text = "".join(experiment(f"e{n}", rule) for n, rule in enumerate(rules))
    found = run_text(text)
    cells = [
        [
            *([at("z cross", layer, [-1], None, zero)] for layer in CROSS),
            *([at("z", layer, [-1], None, zero)] for layer in others),
            [at("v cross", layer, [patch(n, 1, 2)], None, zero) for layer in CROSS],
        ]
        for n in range(len(RECORDS))
    ]
    expected = [
        [difference(n, n, hooks) for n, hooks in enumerate(cell)]
        for cell in zip(*cells, strict=True)
    ]
    check_rules(found, rules, [difference(n, n) for n in range(len(RECORDS))], expected)
    assert [cell.coords["layer"] for cell in found[0].cells] == [*CROSS]
    assert found[0].conventions["layers"] == (
        "`layer *` of `z cross` selects layers 1, 3: other blocks lack this site"
    )


def test_window_joins_the_layers_that_have_the_site() -> None:
    """The cross-attention of layers 1 and 3 is adjacent."""
    zero = torch.zeros_like
    rules = ["ablate z cross layer * window 2 heads * at last token with zero"]
    found = run_text(experiment("e0", rules[0]))
    windows = [CROSS[:1], CROSS]
    expected = [
        [
            difference(n, n, [at("z cross", layer, [-1], None, zero) for layer in window])
            for n in range(len(RECORDS))
        ]
        for window in windows
    ]
    check_rules(found, rules, [difference(n, n) for n in range(len(RECORDS))], expected)
    assert [cell.coords["layer"] for cell in found[0].cells] == [*CROSS]
    assert "only layers that have the site" in found[0].conventions["window"]


def test_conventions_name_the_layers_of_a_group() -> None:
    text = "group g = z cross layers * heads 0\n"
    text += experiment("group", "ablate g at last token with zero")
    text += experiment("every", "ablate resid_post layer * at last token with zero")
    found = {each.name: each.conventions.get("layers") for each in run_text(text)}
    named = "`layers *` of `z cross` selects layers 1, 3: other blocks lack this site"
    assert found == {"group": named, "every": None}


def test_config_of_attending_blocks_shows_the_sites_of_each_block() -> None:
    """As the modules show them."""
    config = {**bare().config.to_dict(), "architectures": ["MllamaForConditionalGeneration"]}
    shape, _ = shape_from_config(config)
    assert shape is not None
    assert dict(shape.partly) == dict(loaded().shape.partly)
    assert dict(shape.others["cross"].partly) == dict(loaded().shape.others["cross"].partly)


def test_keys_and_values_of_each_image_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two experiments, one with replies. Rules at keys and values act on their own rows only."""
    monkeypatch.setattr(model_inputs, "ATTENDED_MAPS", WeakKeyDictionary())
    images = Counter[tuple[str, bytes]]()
    paths = [f"{block_at(layer)}.cross_attn.{n}_proj" for layer in CROSS for n in "kv"]
    linear = torch.nn.functional.linear

    def look(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for path in paths:
            if bare().get_submodule(path).weight is weight:
                images.update((path, image.numpy().tobytes()) for image in given)
        return linear(given, weight, bias)

    text = experiment("e", "from clean into changed", RULES[3])
    text += experiment("r", "generate 3", ZERO, measure='measure matches("1|2|3") as raw')
    monkeypatch.setattr(torch.nn.functional, "linear", look)
    run_text(text)
    assert sorted(images.values()) == [1] * len(SIZES) * len(paths)


def test_replaced_block_has_the_keys_of_its_own_weights() -> None:
    """Block 1 runs with the weights of block 3, before and after passes with its own weights."""
    checked = check_file(experiment("e", ZERO), folder(), loaded(), BLOCK)
    rows = checked.experiments[0].table.runs["clean"].rows
    provide_images(loaded(), rows)
    batch = build_batch(loaded(), [row.ids for row in rows], [row.source for row in rows], "right")
    passes: list[Tensor] = []
    for pairs in ((), ((("", 1), 3),), ()):
        with replace_blocks(loaded(), pairs), torch.inference_mode():
            passes.append(call_with_batch(loaded(), batch))
    assert torch.equal(passes[0], passes[2])
    layers, other = bare().model.language_model.layers, deepcopy(bare().get_submodule(block_at(3)))
    for part in (other, other.cross_attn):
        part.layer_idx = 1
    before, layers[1] = layers[1], other
    try:
        for n in range(len(RECORDS)):
            text = inputs(n, n)["input_ids"][0].tolist()
            [row] = [at for at, row in enumerate(rows) if [*row.ids[row.source :]] == text]
            expected = outputs(n, n).logits[0]
            np.testing.assert_allclose(passes[1][row, : len(text)], expected, atol=2e-4)
    finally:
        layers[1] = before
