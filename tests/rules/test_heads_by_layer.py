"""Models whose layers differ in heads, key-value heads or their widths: every site of heads, rules
and observations against the bare model, with plain hooks and a copy of its attention function."""

from __future__ import annotations

import importlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechdsl.base.text import Source
from mechdsl.diagnostics.rendering import render_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.models.config import shape_from_config
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import (
    DIFFERENCE,
    MODES,
    PROMPTS,
    ROWS,
    by_name,
    difference,
    experiment,
    prompt,
    run_on,
    word_tokenizer,
    write_rows,
)
from ..families import tables
from ..families.build import model
from ..families.parts import Architecture
from ..quick import some
from ..reference import hooks

RECORDS = ROWS[:2]
"""Of different lengths."""

Head = tuple[int, int]
"""Layer and head."""

FAMILIES = {
    "laguna": ([4, 2, 6], [2, 2, 2]),
    "gemma4_text/experts": ([4, 4, 4], [1, 2, 1]),
    "mimo_v2_flash": ([4, 4, 4], [1, 2, 1]),
    "inkling_text": ([2, 4, 4], [1, 2, 2]),
    "inkling2_text": ([2, 2, 4, 4], [1, 1, 2, 2]),
    "dots3_note_text": ([4, 2, 4], [4, 2, 4]),
}
"""Query heads and key-value heads of each layer; widths of heads differ in all but the first."""

OPEN = [name for name in FAMILIES if name not in ("inkling2_text", "dots3_note_text")]
"""Families whose attention rules can read and change."""

SITES = {
    "z": 0,
    "head_out": 0,
    "q": 0,
    "q_rot": 0,
    "scores": 0,
    "pattern": 0,
    "k": 1,
    "v": 1,
    "k_rot": 1,
}
"""Sites of heads; 1 for those of key-value heads."""
INSIDE = {"q_rot": "q", "k_rot": "k", "scores": "pattern", "pattern": "pattern"}
"""Sites that the attention function has, under its names. Equal prompts but for one word have the
pattern of the other prompt if they have its scores."""


@dataclass
class Attention:
    """What the attention function of the bare model reads and changes in one pass."""

    blocked: Mapping[Head, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """Head → queries and keys that it doesn't attend to."""
    writes: Mapping[tuple[str, int, int], Tensor] = field(default_factory=dict)
    """(part, layer, head) → vector at the last token."""
    seen: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """(part, layer) → [head, T, …]."""

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any
    ) -> Any:
        layer = module.layer_idx
        for part, vectors in (("q", query), ("k", key)):
            self.seen[part, layer] = vectors[0].clone()
            for (name, at, head), vector in self.writes.items():
                if (name, at) == (part, layer):
                    vectors[0, head, -1] = vector
        seen = torch.zeros(query.shape[1], query.shape[2], key.shape[2])
        mask = (seen if mask is None else mask[0] + seen)[None].clone()
        for (at, head), edges in self.blocked.items():
            for of, to in edges if at == layer else ():
                mask[0, head, of, to] = torch.finfo(mask.dtype).min
        eager = importlib.import_module(type(module).__module__).eager_attention_forward
        out, pattern = eager(module, query, key, value, mask, **more)
        self.seen["pattern", layer] = pattern[0].clone()
        for (name, at, head), vector in self.writes.items():
            if (name, at) == ("pattern", layer):
                shared = query.shape[1] // value.shape[1]
                out[0, -1, head] = vector @ value[0, head // shared]
        return out, pattern


@cache
def row(name: str) -> Architecture:
    return next(r for r in tables.every() if isinstance(r, Architecture) and r.name == name)


@cache
def bare(name: str) -> Any:
    return model(row(name))


@cache
def adopted(name: str) -> LoadedModel:
    loaded, diagnostics = adopt_model("m", model(row(name)), word_tokenizer())
    assert loaded is not None, render_full(diagnostics, color=False, width=100)
    return loaded


@contextmanager
def attending(name: str, attention: Attention) -> Generator[Any]:
    """The bare model with another attention function."""
    module = bare(name)
    ALL_ATTENTION_FUNCTIONS.register("by_layer", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("by_layer", eager_mask)
    module.set_attn_implementation("by_layer")
    yield module
    module.set_attn_implementation("eager")


@torch.no_grad()
def logits(name: str, ids: Sequence[int], attention: Attention) -> Tensor:
    """[T, vocab]"""
    with attending(name, attention) as module:
        return module(torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def read(name: str, ids: Sequence[int], site: str, layer: int) -> Tensor:
    """[unit, …] at the last token."""
    if site in INSIDE:
        attention = Attention()
        logits(name, ids, attention)
        return attention.seen[INSIDE[site], layer][:, -1]
    inputs = {"input_ids": torch.tensor([ids])}
    return hooks.run(row(name), bare(name), inputs, layer)[1][site][-1]


@cache
@torch.no_grad()
def patched(
    name: str, number: int, site: str, layer: int, heads: tuple[int, ...], *, zero: bool
) -> float:
    """The metric of a row if heads have the values of `other`, or zeros, at the last token."""
    clean, other = (prompt(ROWS[number], run).ids for run in ("clean", "other"))
    values = read(name, other, site, layer) * (0 if zero else 1)
    if site in INSIDE:
        writes = {(INSIDE[site], layer, head): values[head] for head in heads}
        return difference(logits(name, clean, Attention(writes=writes)), ROWS[number])
    changes = [hooks.Change(len(clean) - 1, head, values[head]) for head in heads]
    inputs = {"input_ids": torch.tensor([clean])}
    return difference(
        hooks.run(row(name), bare(name), inputs, layer, site, changes)[0], ROWS[number]
    )


@cache
def ran(name: str, mode: str, lines: tuple[str, ...]) -> dict[str, ExperimentResult]:
    """Line → result."""
    import tempfile

    folder = Path(tempfile.mkdtemp())
    write_rows(folder, RECORDS)
    text = "".join(
        experiment(f"e{n}", "prompts p", line, DIFFERENCE) for n, line in enumerate(lines)
    )
    source = Source(
        f'mech 1\nmodel m = local("handed over")\n{PROMPTS}\n{text}', folder / "file.mech"
    )
    found = by_name(*run_on(source, {"m": adopted(name)}, MODES[mode]))
    return {line: found[f"e{n}"] for n, line in enumerate(lines)}


def site_lines(name: str) -> dict[str, tuple[str, bool]]:
    """Line → site, and whether it writes zeros."""
    shape = adopted(name).shape
    sites = [site for site in SITES if shape.has(site, None)]
    patches = {
        f"from other into clean patch {site} {{}} at last token": (site, False) for site in sites
    }
    zeros = {
        f"ablate {site} {{}} at last token with zero": (site, True) for site in ("z", "head_out")
    }
    return patches | zeros


def cells_of(name: str, site: str) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """Axes → layer and heads of each cell."""
    counts = FAMILIES[name][SITES[site]]
    layers = [n for n in range(len(counts)) if adopted(name).shape.has(site, n)]
    every = {n: tuple(range(counts[n])) for n in layers}
    return {
        "layer * head *": [(n, (head,)) for n in layers for head in every[n]],
        "layer * heads *": list(every.items()),
        "layer 1 head *": [(1, (head,)) for head in every[1]],
    }


@pytest.mark.parametrize("name", some(FAMILIES, ("laguna", "mimo_v2_flash")))
@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_rules_at_heads_by_layer_equal_plain_hooks(name: str, mode: str) -> None:
    wanted = {
        line.format(axes): (site, zero, cells)
        for line, (site, zero) in site_lines(name).items()
        for axes, cells in cells_of(name, site).items()
    }
    for line, result in ran(name, mode, tuple(wanted)).items():
        site, zero, cells = wanted[line]
        expected = [
            [patched(name, n, site, layer, heads, zero=zero) for n in range(len(RECORDS))]
            for layer, heads in cells
        ]
        assert len(result.cells) == len(cells), line
        measure = result.measures[0]
        np.testing.assert_allclose(measure.patched, expected, atol=1e-4, rtol=1e-3, err_msg=line)


def edge_values(name: str, observed: str, layer: int, heads: Sequence[int]) -> list[float]:
    """Of each row, from the last token to the first."""
    values: list[float] = []
    for record in RECORDS:
        ids = prompt(record, "clean").ids
        attention = Attention(blocked={(layer, head): [(-1, 0)] for head in heads})
        if observed == "block":
            values.append(difference(logits(name, ids, attention), record))
            continue
        pattern = read(name, ids, "pattern", layer)[list(heads)]
        entropy = -(pattern * pattern.clamp(min=1e-30).log()).sum(-1)
        values.append(float((pattern[:, 0] if observed == "attention" else entropy).mean()))
    return values


@pytest.mark.parametrize("name", some(OPEN, ("laguna",)))
def test_edges_of_heads_by_layer_equal_the_attention_function(name: str) -> None:
    counts = FAMILIES[name][0]
    layers = [n for n in range(len(counts)) if adopted(name).shape.has("pattern", n)]
    single = [(n, (head,)) for n in layers for head in range(counts[n])]
    joined = [(n, tuple(range(counts[n]))) for n in layers]
    edge = "from last token to token 0"
    wanted = {
        f"block attention layer * head * {edge}": ("block", single),
        f"block attention layer * {edge}": ("block", joined),
        f"observe attention layer * head * {edge}": ("attention", single),
        f"observe attention layer * heads * {edge}": ("attention", joined),
        "observe entropy pattern layer * head * at last token": ("entropy", single),
    }
    for line, result in ran(name, "planned", tuple(wanted)).items():
        observed, cells = wanted[line]
        expected = [edge_values(name, observed, layer, heads) for layer, heads in cells]
        assert len(result.cells) == len(cells), line
        (measure, *_) = result.measures
        np.testing.assert_allclose(measure.patched, expected, atol=1e-4, rtol=1e-3, err_msg=line)


@pytest.mark.parametrize("name", FAMILIES)
def test_shape_of_the_config_has_the_heads_of_each_block(name: str) -> None:
    heads, keys = FAMILIES[name]
    config = {**bare(name).config.to_dict(), "architectures": [type(bare(name)).__name__]}
    plain = {**row(name).config, "model_type": name.partition("/")[0]}
    shapes = [shape_from_config(each)[0] for each in (config, plain)]
    loaded = adopted(name).shape
    for shape in (*shapes, loaded):
        assert shape is not None
        assert [block.heads for block in shape.blocks] == heads
        assert [block.kv_heads for block in shape.blocks] == keys
        widths = [(block.d_head, block.d_value) for block in shape.blocks]
        assert widths == [(block.d_head, block.d_value) for block in loaded.blocks]


@pytest.mark.parametrize(
    ("site", "label"),
    [
        ("layer * head 3", "heads 0..1 in layer 1, 0..3 in layer 0 and 0..5 in layer 2"),
        ("L1H2", "heads 0..1 in layer 1, 0..3 in layer 0 and 0..5 in layer 2"),
        ("layers 0, 2 head 4", "heads 0..1 in layer 1, 0..3 in layer 0 and 0..5 in layer 2"),
        ("layer * head -3", "heads"),
    ],
)
def test_head_that_a_layer_lacks_reports_the_numbers_of_each_layer(
    site: str, label: str, tmp_path: Path
) -> None:
    write_rows(tmp_path)
    text = experiment("e", "prompts p", f"ablate {site} at last token with zero", DIFFERENCE)
    source = Source(
        f'mech 1\nmodel m = local("handed over")\n{PROMPTS}\n{text}', tmp_path / "file.mech"
    )
    result, diagnostics = run_on(source, {"m": adopted("laguna")})
    (error,) = [found for found in diagnostics if found.severity == "error"]
    assert (result, error.code) == (None, "E0301")
    assert label in error.label_text
