"""Tiny image models, image files, and reference values of one image from plain hooks."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..execute.support import MODES, as_in_the_data, run_on
from ..families import build, tables
from ..families.parts import Architecture, Stack
from ..reference.forward import Write
from ..reference.hooks import Change
from ..shared_models import unchanged
from . import duals
from .duals import LABELS, LAYERS, PATCH, SIDE
from .reference import Act, Seen, call

ROWS = {row.name: row for row in tables.every() if isinstance(row, Architecture)}
GRID = SIDE // PATCH
CLASSIFIERS = ("vit", "deit", "dinov2_with_registers", "beit", "siglip", "clip")
MORE = ("ijepa", "data2vec-vision")
"""Further classifiers."""
ENCODERS = ("dinov3_vit", "dinov2/bare")
DUALS = duals.NAMES
"""Models with an additional text tower; they score texts where classifiers have labels."""
FRONT = {
    "vit": 1,
    "deit": 2,
    "dinov2_with_registers": 5,
    "beit": 1,
    "siglip": 0,
    "clip": 1,
    "ijepa": 0,
    "data2vec-vision": 1,
    "dinov3_vit": 3,
    "dinov2/bare": 1,
    "clip/dual": 1,
    "siglip/dual": 0,
    "metaclip_2/dual": 1,
    duals.OLD: 1,
}
"""Number of tokens before the patches, according to the models' papers."""
_MEAN = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
_EXACT = {"size": {"height": SIDE, "width": SIDE}, **_MEAN}
_CROPPED = {
    "size": {"shortest_edge": 18},
    "crop_size": {"height": SIDE, "width": SIDE},
    **_MEAN,
}
PROCESSORS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessor", _EXACT),
    "deit": (
        "DeiTImageProcessor",
        {
            "size": {"height": 20, "width": 22},
            "crop_size": {"height": SIDE, "width": SIDE},
            **_MEAN,
        },
    ),
    "dinov2_with_registers": ("BitImageProcessor", _CROPPED),
    "beit": ("BeitImageProcessor", _EXACT),
    "siglip": ("SiglipImageProcessor", _EXACT),
    "clip": ("CLIPImageProcessor", _CROPPED),
    **dict.fromkeys((*DUALS, duals.OLD), ("CLIPImageProcessor", _CROPPED)),
    "siglip/dual": ("SiglipImageProcessor", _EXACT),
    "ijepa": ("ViTImageProcessor", _EXACT),
    "data2vec-vision": ("BeitImageProcessor", _EXACT),
    "dinov3_vit": ("ViTImageProcessor", _EXACT),
    "dinov2/bare": ("BitImageProcessor", _CROPPED),
}
Array = NDArray[np.float64]

# --- models ---------------------------------------------------------------------------------------


WIDER: Mapping[str, float] = {"classifier": 4}
"""Factors on weights, so that every head matters and logits of labels differ."""


def stack(name: str) -> Stack:
    """Module paths of the image tower."""
    if name in ROWS:
        return replace(ROWS[name].main, count=LAYERS)
    return duals.stack("vision_model")


@cache
def bare(name: str) -> Any:
    """The model in fp32, with weights so large that every head matters."""
    if name not in ROWS:
        return duals.bare(name)
    sizes: dict[str, Any] = {
        "image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": LAYERS
    }  # fmt: skip
    row = ROWS[name]
    if name in (*CLASSIFIERS, *MORE):
        sizes |= {
            "id2label": dict(enumerate(LABELS)),
            "label2id": {label: n for n, label in enumerate(LABELS)},
        }
        row = Architecture(
            row.name,
            {k: v for k, v in row.config.items() if k != "num_labels"},
            row.main,
            takes="image",
            build=row.build,
        )
    if "vision_config" in row.config:
        own = {key: sizes.pop(key) for key in ("image_size", "patch_size", "num_hidden_layers")}
        sizes["vision_config"] = {**row.config["vision_config"], **own}
    model: Any = build.model(row, seed=3, **sizes)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            for part, factor in WIDER.items():
                if part in key and parameter.dim() >= 2:
                    parameter.mul_(factor)
    return unchanged(model)


@contextmanager
def embedded(name: str) -> Generator[tuple[nn.Module, list[Tensor]]]:
    """The bare model, and the output of its embedding for the first image of each call, [token,
    d_model]."""
    embed = ROWS[name].main.embed
    assert embed is not None
    seen: list[Tensor] = []
    module = bare(name)
    handle = module.get_submodule(embed[0]).register_forward_hook(
        lambda part, args, out: seen.append((out if isinstance(out, Tensor) else out[0])[0])
    )
    try:
        with torch.no_grad():
            yield module, seen
    finally:
        handle.remove()


@cache
def double(name: str) -> Any:
    import copy

    return unchanged(copy.deepcopy(bare(name)).double())


@cache
def processor(name: str) -> Any:
    """The image processor of transformers that uses Pillow."""
    import importlib

    kind, settings = PROCESSORS[name]
    family = kind.removesuffix("ImageProcessor").lower()
    module = f"transformers.models.{family}.image_processing_pil_{family}"
    return getattr(importlib.import_module(module), f"{kind}Pil")(**settings)


def handed(name: str) -> tuple[Any, Any]:
    """A model and its processor, as passed from Python."""
    own = processor(name)
    return bare(name), own if name in ROWS else (own, duals.tokenizer(name))


def save(name: str, folder: Path) -> None:
    """Save a model with two towers in the subfolder `clip`."""
    if not (folder / "clip").exists():
        for each in (bare(name), processor(name), duals.tokenizer(name)):
            each.save_pretrained(folder / "clip")


@cache
def shared(name: str) -> LoadedModel:
    """The model as the executor loads it."""
    model, found = adopt_model("m", *handed(name))
    assert model is not None, [(d.message, d.label_text) for d in found]
    assert not [d for d in found if d.severity == "error"], [d.message for d in found]
    return model


# --- images ---------------------------------------------------------------------------------------

SIZES = ((23, 19), (16, 16), (30, 41))
"""(height, width) of the files."""


def image(number: int) -> NDArray[np.uint8]:
    """Random blots of colour, [height, width, 3]."""
    random = np.random.default_rng(number)
    small = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    height, width = SIZES[number]
    grown = Image.fromarray(small).resize((width, height), resample=Image.Resampling.BICUBIC)
    return np.asarray(grown)


ANSWERS = ("square", "ring", "circle")
WRONG = ("cross", "triangle", "cross")
KINDS = ("a", "a", "b")


def write_images(folder: Path) -> None:
    records: list[dict[str, str]] = []
    for number, (answer, wrong) in enumerate(zip(ANSWERS, WRONG, strict=True)):
        Image.fromarray(image(number)).save(folder / f"{number}.png")
        files = {"file": f"{number}.png", "second": f"{(number + 1) % len(ANSWERS)}.png"}
        records.append({**files, "label": answer, "other": wrong, "kind": KINDS[number]})
    text = "\n".join(map(json.dumps, records)) + "\n"
    (folder / "data.jsonl").write_text(text, encoding="utf-8")


GRAY = np.full((SIDE, SIDE, 3), 128, np.uint8)


@cache
def _pixels(name: str, number: int | None) -> Tensor:
    given = GRAY if number is None else image(number)
    values = processor(name)(Image.fromarray(given), return_tensors="pt")["pixel_values"]
    return values.double()


def pixels(name: str, number: int | None) -> Tensor:
    """[1, 3, side, side] of a file, or of gray (None), from the library's processor."""
    return _pixels(name, number)


# --- files ----------------------------------------------------------------------------------------

BLOCKS = """
images scenes {
  rows "data.jsonl"
  image "{file}"
  answer "{label}"
  wrong "{other}"
}
images neutral {
  image gray
}
"""
OF_TEXTS = """
images scenes {
  rows "data.jsonl"
  image "{file}"
  answer "a photo of a {label}"
  wrong "a photo of a {other}"
  classes "a photo of a {label}"
}
images neutral {
  image gray
}
"""
TEXTS = tuple(f"a photo of a {label}" for label in LABELS)
DIFFERENCE = "measure logit(answer) - logit(wrong) as delta"
OF_SCORES = "measure score(answer) - score(wrong) as delta"
STATS = "stats bootstrap(100) confidence 95% correct none"


def experiment(name: str, *lines: str, measure: str = DIFFERENCE) -> str:
    every = ("model m", "images scenes", *lines, measure, STATS)
    return f"experiment {name} {{\n" + "\n".join(f"  {line}" for line in every if line) + "\n}\n"


def blocks_of(name: str) -> str:
    """The images, with labels or with texts."""
    return BLOCKS if name in ROWS else OF_TEXTS


def try_file(
    text: str, folder: Path, name: str, mode: str = "planned", blocks: str = ""
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Run a file, including the Python functions that it names."""
    write_images(folder)
    options = replace(MODES[mode], settings=CheckSettings(python="run"))
    whole = f'mech 1\nmodel m = local("handed over")\n{blocks or blocks_of(name)}\n{text}'
    return run_on(Source(whole, folder / "file.mech"), {"m": shared(name)}, options)


def run_file(
    text: str, folder: Path, name: str, mode: str = "planned", blocks: str = ""
) -> dict[str, ExperimentResult]:
    return succeeded(*try_file(text, folder, name, mode, blocks))


def succeeded(
    result: FileResult | None, diagnostics: list[Diagnostic]
) -> dict[str, ExperimentResult]:
    """Experiment → result, rows in the order of the data; an error fails the test."""
    errors = [found for found in diagnostics if found.severity == "error"]
    assert result is not None, render_full(errors, color=False, width=100)
    return {found.name: as_in_the_data(found) for found in result.experiments}


# --- one image by plain hooks ---------------------------------------------------------------------


def inputs(name: str, image: Tensor) -> Mapping[str, Tensor]:
    """Inputs of a model; a model with two towers also gets the texts of all labels."""
    texts = {} if name in ROWS else duals.inputs(name, *TEXTS)
    return {"pixel_values": image, **texts}


def forward(
    name: str,
    given: Tensor,
    writes: Mapping[tuple[str, int], Sequence[Change]] | None = None,
    acts: Iterable[Act] = (),
) -> Seen:
    """Run one image through the bare model in fp64, with vectors written at sites and further
    acts."""
    written = [
        Write(site, layer, change.vector, change.position, change.unit)
        for (site, layer), changes in (writes or {}).items()
        for change in changes
    ]
    return call(double(name), stack(name), inputs(name, given), [*written, *acts])


@cache
def plain(name: str, number: int | None) -> Seen:
    return forward(name, pixels(name, number))


def difference(seen: Seen, number: int) -> float:
    """`logit(answer) - logit(wrong)` of a row."""
    answer, wrong = LABELS.index(ANSWERS[number]), LABELS.index(WRONG[number])
    return float(seen.output[answer] - seen.output[wrong])


def token(name: str, row: int, col: int) -> int:
    """Token index of a patch; rows and columns count from 1."""
    return FRONT[name] + (row - 1) * GRID + col - 1


def patches(name: str) -> list[int]:
    return [FRONT[name] + n for n in range(GRID * GRID)]


class HasSites(Protocol):
    @property
    def sites(self) -> Mapping[tuple[str, int], Tensor]: ...


def copied(
    source: HasSites, site: str, layer: int, tokens: Sequence[int], units: Sequence[int] = (0,)
) -> list[Change]:
    """Vectors of another pass at these tokens."""
    return [
        Change(at, unit, source.sites[site, layer][at, unit]) for at in tokens for unit in units
    ]
