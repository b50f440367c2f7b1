"""Groups of features or dimensions that a file declares with `fit(mask(…))`.

Loss and gradient are compared with plain hooks on the bare model in float64, one unpadded prompt at
a time. Further tests: planted dimensions, use in rules, keys, and errors.
"""

from __future__ import annotations

import copy
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mechdsl
from mechdsl.execute.mask_training import CoordinateMaskRows
from mechdsl.fits.reports import MaskReport
from mechdsl.resolve.types import TrainedMask

from ..execute.support import unchanged, word_tokenizer
from ..models import families
from ..quick import in_turn
from ..reference.forward import Write, side_by_side
from ..rules.basis_reference import save_rows, saved
from ..rules.models import bare, double
from ..rules.support import plain, rows, tokens
from . import test_trained_masks
from .test_trained_dictionaries import check_keys, experiment, run, train, untrained, write
from .test_trained_masks import HERE, PATCH, PATCHES, QUICK, chosen_sites, write_planted
from .test_trained_rotations import LOSS, MEASURE, OTHER, training_errors
from .test_trained_rotations import loss_by_hand as loss_of_logits

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
SITE = "resid_post layer 1"
FEATURES = 9
differentiable = inspect.unwrap(side_by_side)
"""The reference pass, differentiable in the written vectors."""


def fit(
    options: str = QUICK,
    *,
    mask: str = "size: 2",
    at: str = "features * of f at last token",
    **given: str,
) -> str:
    return test_trained_masks.fit(options, mask=mask, at=at, **given)


@cache
def weights(width: int, scale: float = 1.0) -> dict[str, Tensor]:
    """A ReLU dictionary whose features are active in about half of the rows."""
    random = torch.Generator().manual_seed(11)
    encoder = torch.randn(width, FEATURES, generator=random) / width**0.5
    return {
        "W_enc": encoder,
        "b_enc": 0.1 * torch.randn(FEATURES, generator=random),
        "W_dec": scale * torch.randn(FEATURES, width, generator=random) / width**0.5,
        "b_dec": 0.1 * torch.randn(width, generator=random),
    }


def sae(folder: Path, family: str = "llama", scale: float = 1.0) -> str:
    width = bare(family).config.hidden_size
    save_file(weights(width, scale), folder / "sae.safetensors")
    return f'basis f = sae("sae.safetensors") at {SITE}\n'


def training_rows(
    path: Path, model: Any, side: Any = None
) -> tuple[TrainedMask, CoordinateMaskRows]:
    mask, found = test_trained_masks.training_rows(path, model, side)
    assert isinstance(found, CoordinateMaskRows)
    return mask, found


# --- the loss -------------------------------------------------------------------------------------

BASES = {
    "features": "features * of f",
    "some features": "features 1, 4..6 of f",
    "dimensions": f"{SITE} dims 0..6, 11",
    "all dimensions of a head": "z layer 1 head 2 dims *",
    "neurons": "mlp_hidden layer 1 dims 3..8",
    "linear": "features * of f",
}


def coordinates(basis: str, family: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of a vector, and the [coordinate, width] vectors that a value of 1 adds."""
    if "dim" in basis or basis == "neurons":
        unit = torch.eye(len(x), dtype=x.dtype)
        return x, unit
    if basis == "linear":
        directions = saved(len(x)).directions
        return torch.linalg.lstsq(directions.T, x[:, None]).solution[:, 0], directions
    own = {name: each.double() for name, each in weights(len(x)).items()}
    return ((x - own["b_dec"]) @ own["W_enc"] + own["b_enc"]).clamp(min=0), own["W_dec"]


def value_by_hand(
    family: str, row: int, mask: TrainedMask, shares: Tensor, basis: str, source: str, at: str
) -> Tensor:
    """The measure of one unpadded prompt with a weight for each coordinate."""
    point = mask.training.made
    key, unit = (point.site, point.layer), 0 if point.unit is None else point.unit
    flat = (lambda run, where: run[key][where, unit].flatten()) if point.site != "mlp_hidden" else (
        lambda run, where: run[key][where].flatten()
    )  # fmt: skip
    here, there = rows("clean")[row], rows("other")[row]
    numbers = [each.number for each in mask.candidates]
    mean = [flat(plain(family, each), tokens(each, at)[0]) for each in rows("clean")[:4]]
    mean = torch.stack([coordinates(basis, family, each)[0] for each in mean]).mean(0)
    writes: list[Write] = []
    for to, of in zip(tokens(here, at), tokens(there, at), strict=True):
        own = flat(plain(family, here), to)
        old, added = coordinates(basis, family, own)
        new = {
            "from: other": coordinates(basis, family, flat(plain(family, there), of))[0],
            "with: zero": torch.zeros_like(old),
            "with: mean": mean,
        }[source]
        x = own + sum(
            shares[n] * (new[number] - old[number]) * added[number]
            for n, number in enumerate(numbers)
        )
        for n in range(len(own)) if point.site == "mlp_hidden" else ():
            writes.append(Write(*key, x[n : n + 1], to, n))
        if point.site != "mlp_hidden":
            writes.append(Write(*key, x, to, unit))
    (done,) = differentiable(family, double(family), here.ids, [(writes, ())])
    return loss_of_logits(done.logits[-1], row)


@pytest.mark.parametrize(
    ("family", "source"), in_turn(HERE, ("from: other", "with: zero", "with: mean"))
)
@pytest.mark.parametrize(("basis", "side"), in_turn(tuple(BASES), ("left", "right")))
def test_coordinate_mask_loss_and_gradient_equal_autograd(
    basis: str, side: Any, family: str, source: str, tmp_path: Path
) -> None:
    """For every row, in ragged batches of two rows with different gates."""
    where = "last token" if source == "with: mean" else "subject tokens"
    declared = sae(tmp_path, family)
    if basis == "linear":
        name = save_rows(tmp_path, bare(family).config.hidden_size)
        declared = f'basis f = saved("{name}", "rows") at {SITE}\n'
    declared = declared if "f" in BASES[basis].split() else ""
    options = QUICK.replace("25%", "0%")
    line = fit(options, source=source, at=f"{BASES[basis]} at {where}", mask="size: 1")
    path = write(tmp_path, declared, line, PATCHES)
    mask, found = training_rows(path, double(family), side)
    random = torch.Generator().manual_seed(5)
    ids = found.objective.table.row_ids
    for batch in ([0, 2], [1, 3]):
        mine = torch.rand(2, len(mask.candidates), generator=random, dtype=torch.float64)
        mine.requires_grad_()
        theirs = mine.detach().clone().requires_grad_()
        values = found.values(np.array(batch), mine)
        expected = torch.stack(
            [value_by_hand(family, ids[row], mask, theirs[n], basis, source, where)
             for n, row in enumerate(batch)]
        )  # fmt: skip
        assert torch.allclose(values, expected, atol=1e-5)  # gates are float32
        assert (expected - found.values(np.array(batch), None)).abs().max() > 1e-4
        (own,) = torch.autograd.grad(values.sum(), mine)
        (other,) = torch.autograd.grad(expected.sum(), theirs)
        assert torch.allclose(own, other, atol=1e-5)
        assert other.abs().max() > 1e-5


@pytest.mark.slow
def test_features_inactive_in_all_training_rows_have_no_gate(tmp_path: Path) -> None:
    """These features are neither chosen nor random controls; with `keep`, they are written like
    other unchosen features."""
    declared = sae(tmp_path)
    width = bare("llama").config.hidden_size
    changed = {name: each.clone() for name, each in weights(width).items()}
    changed["b_enc"] += 30
    changed["b_enc"][[0, 1, 2, 5]] = -100  # never active
    save_file(changed, tmp_path / "sae.safetensors")
    for mask in ("size: 2", "size: 2, keep: true"):
        (found,) = train(write(tmp_path, declared, fit(mask=mask), PATCHES))
        report = found.report
        assert isinstance(report, MaskReport)
        assert (report.candidates, report.inactive, report.noun) == (5, 4, "feature")
        stored = json.loads((found.folder / "mask.json").read_text("utf-8"))
        assert [n for n, own in enumerate(stored["probabilities"]) if not own] == [0, 1, 2, 5]
        assert sum(stored["probabilities"]) == pytest.approx(2)
        assert set(stored["chosen"]) <= {3, 4, 6, 7, 8}
    path = write(tmp_path, declared, fit(mask="size: 5"), PATCHES)
    with pytest.raises(mechdsl.MechdslError, match="at 5 of 9 features, and the mask chooses 5"):
        train(path)


# --- planted coordinates --------------------------------------------------------------------------

DIMS_THERE = (3, 10, 21)


@cache
def planted() -> Any:
    """A model in which only these dimensions of the final residual stream reach the logits."""
    model: Any = copy.deepcopy(families.module("gpt2"))
    with torch.no_grad():
        head = model.lm_head.weight.clone()
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(head))
        model.lm_head.weight[:, list(DIMS_THERE)] = 5 * head[:, list(DIMS_THERE)]
    return unchanged(model.eval())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dimensions", "features"])
@pytest.mark.parametrize("seed", range(3))
def test_coordinate_mask_finds_planted_coordinates(name: str, seed: int, tmp_path: Path) -> None:
    """As dimensions, and as features of a dictionary."""
    width = families.module("gpt2").config.hidden_size
    encoder = torch.eye(width).flip(1)  # feature n is dimension width - 1 - n, shifted by 20
    tensors = {"W_enc": encoder, "W_dec": encoder.T.contiguous()}
    shift = {"b_enc": torch.full((width,), 20.0), "b_dec": torch.zeros(width)}
    save_file({**tensors, **shift}, tmp_path / "sae.safetensors")
    site = "resid_post layer 2"
    declared, at = "", f"{site} dims *"
    if name == "features":
        declared, at = f'basis f = sae("sae.safetensors") at {site}\n', "features * of f"
    call = (
        f"group g = fit(mask(size: 3), prompts: planted.train, from: swapped, "
        f"minimise: kl(swapped), steps: 150, batch: 16, seed: {seed}) at {at} at last token\n"
    )
    rule = ("from swapped into clean", "patch g at last token")
    text = experiment(*rule, block="planted.test", measure="measure logit(answer) as delta")
    path = write_planted(tmp_path, declared, call, text)
    given = {"m": (planted(), word_tokenizer())}
    (found,) = mechdsl.fit(path, given, store=tmp_path / "store")
    there = [f"L2.resid_post dim {n}" for n in DIMS_THERE]
    if name == "features":
        there = [f"feature {width - 1 - n} of f" for n in reversed(DIMS_THERE)]
    assert chosen_sites(found) == there
    report = found.report
    assert isinstance(report, MaskReport)
    assert report.trained < 0.7 * report.random
    assert mechdsl.run(path, given, store=tmp_path / "store").complete


# --- use in rules ---------------------------------------------------------------------------------

RULES = {
    "patch": list(PATCH),
    "other positions": ["from turned into clean", "patch g at right token"],
    "zero": ["ablate g at tokens * with zero"],
    "mean": ["ablate g at last token with mean"],
    "scale": ["scale g at last token by 0.5"],
    "set": ["set g at last token to 2"],
    "add": ["add 2 to g at last token"],
    "clamp": ["clamp g at last token to 1"],
    "project out": ["project out g at last token"],
    "without error": ["from turned into clean", "patch g at last token without error"],
    "except": ["from turned into clean", "patch features * of f except g at last token"],
    "sweep": ["from turned into clean", "patch feature * of f except g at last token"],
    "derived": [
        "run changed { ablate g at last token with zero }",
        "from changed into clean",
        "patch resid_post layer 2 at last token",
    ],
    "replies": ["generate 3", "ablate g at tokens * with zero"],
}


@pytest.mark.parametrize(
    ("name", "kind"), in_turn(list(RULES), ["features", "dims"], [*RULES][::4])
)
def test_coordinate_mask_equals_its_listed_coordinates_in_rules(
    name: str, kind: str, tmp_path: Path
) -> None:
    """Up to rounding, with a second experiment on the same block."""
    lines = list(RULES[name])
    if kind == "dims":
        lines = [each.replace("features * of f", f"{SITE} dims *") for each in lines]
        lines = [each.replace("feature * of f", f"{SITE} dim *") for each in lines]
        if name == "without error":
            pytest.skip("dimensions have no error")
    at = "features * of f" if kind == "features" else f"{SITE} dims *"
    measure = "measure logit(answer) as raw" if name == "replies" else MEASURE
    text = experiment(*lines, measure=measure) + OTHER
    declared = sae(tmp_path) if kind == "features" else ""
    path = write(tmp_path, declared, fit(at=f"{at} at last token"), text)
    (trained,) = train(path, out=tmp_path)
    card = (tmp_path / "g" / "README.md").read_text("utf-8")
    noun = "features" if kind == "features" else "dimensions"
    assert card.startswith("# g: mask of 2 of ")
    assert f" {noun}\n" in card
    assert f"The chosen {noun} are set to those of the run `other`, to maximise {LOSS}" in card
    own = run(path, fresh=True).files[0].experiments
    numbers = ", ".join(
        each.split()[1 if kind == "features" else 2] for each in chosen_sites(trained)
    )
    listed = f"features {numbers} of f" if kind == "features" else f"{SITE} dims {numbers}"
    text = text.replace("except g ", f"except {numbers} ").replace(" g at ", f" {listed} at ")
    path = write(tmp_path, declared, text)
    theirs = run(path, store=False).files[0].experiments
    assert len(own) == len(theirs) == 2
    for one, two in zip(own, theirs, strict=True):
        assert len(one.cells) == len(two.cells)
        for mine, other in zip(one.measures, two.measures, strict=True):
            assert np.allclose(mine.patched, other.patched, 0, 2e-6, equal_nan=True)
    said = own[0].conventions["group g"]
    assert said.startswith(listed if kind == "features" else f"L1.resid_post dims {numbers}")
    assert "trained on 4 rows of p at last token, 1 of them held out, to maximise" in said
    assert "group g" not in own[1].conventions


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "size": {"mask": "size: 3"},
    "keep": {"mask": "size: 2, keep: true"},
    "candidates": {"at": "features 0..7 of f at last token"},
    "dimensions": {"at": f"{SITE} dims * at last token"},
    "position": {"at": "features * of f at cue token"},
    "source": {"source": "from: turned"},
    "zero": {"source": "with: zero"},
    "mean": {"source": "with: mean"},
    "measure": {"objective": "maximise: logprob(wrong) - 0.4 * logit(answer)"},
}


def test_coordinate_mask_key_depends_on_arguments_and_basis(
    tmp_path: Path, trains_all: bool
) -> None:
    """A different argument needs another training and gives other probabilities. So do another
    dictionary at the same path and other rows of a computed basis."""
    declared = sae(tmp_path)
    base, folders = check_keys(
        tmp_path, trains_all, lambda **own: declared + fit(**own), CHANGES, PATCHES
    )
    bases = [
        sae(tmp_path, scale=2.0),
        f"basis f = pca(p, dims: 3) at {SITE} at last token\n",
        f"basis f = pca(second, dims: 3) at {SITE} at last token\n",
        f"basis f = pca(p, dims: 3) at {SITE} at cue token\n",
        f"basis f = random(dims: 3) at {SITE}\n",
    ]
    for basis in bases:
        folder = untrained(path := write(tmp_path, basis, fit(), PATCHES))
        assert folder not in folders, basis
        folders.add(folder)
        if trains_all or basis == bases[1]:
            (found,) = train(path)
            assert found.folder == folder
            assert run(path).complete
    sae(tmp_path)
    again = write(tmp_path, declared, fit(), "# A comment.\n", PATCHES)
    (found,) = train(again)
    assert (found.folder, found.seconds) == (base.folder, 0.0)


# --- a trained basis ------------------------------------------------------------------------------

TRAINED = "fit(sae(features: 8, k: 2), prompts: p, steps: 20, batch: 4"


def test_mask_over_a_trained_dictionary_depends_on_its_training(tmp_path: Path) -> None:
    """`fit` trains the dictionary first; another dictionary needs another mask."""
    at = f") at {SITE} at tokens *\n"
    path = write(tmp_path, f"basis f = {TRAINED}{at}", fit(), PATCHES)
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path)
    found = train(path)
    assert [each.basis for each in found] == ["f", "g"]
    assert run(path).complete
    again = train(path)
    assert [(each.folder, each.seconds) for each in again] == [(f.folder, 0.0) for f in found]
    write(tmp_path, f"basis f = {TRAINED}, seed: 3{at}", fit(), PATCHES)
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path)
    dictionary, mask = train(path)
    assert dictionary.folder != found[0].folder
    assert mask.folder != found[1].folder
    fresh = train(path, fresh=True)
    assert [each.folder for each in fresh] == [dictionary.folder, mask.folder]
    assert all(each.seconds for each in fresh)
    listed = ", ".join(each.split()[1] for each in chosen_sites(mask))
    own = run(path, fresh=True).files[0].experiments[0].measures[0].patched
    copied = f'basis f = sae("{dictionary.folder}") at {SITE}\n'
    text = PATCHES.replace("patch g", f"patch features {listed} of f")
    path = write(tmp_path, copied, text)
    theirs = run(path, store=False).files[0].experiments[0].measures[0].patched
    assert np.allclose(own, theirs, 0, 2e-6)  # the first has a control in the same pass


# --- mistakes -------------------------------------------------------------------------------------

CALL = f"fit(mask(size: 2), prompts: p, from: other, maximise: {LOSS})"
MISTAKES: dict[str, tuple[str, str, str]] = {
    "singular": ("features * of f", "feature * of f", "E0342"),
    "singular numbers": ("features * of f", "feature 1, 4 of f", "E0342"),
    "whole basis": ("features * of f", f"{SITE} in basis f", "E0342"),
    "unknown basis": ("features * of f", "features * of h", "E0201"),
    "too many": ("features * of f", "features 1, 4 of f", "E0342"),
    "out of range": ("features * of f", "features 1..9 of f", "E0301"),
    "several layers": ("features * of f", "resid_post layers 1..2 dims *", "E0342"),
    "several heads": ("features * of f", "z layer 1 heads * dims *", "E0342"),
    "ranking": ("features * of f", "features top 3 of seen of f", "E0342"),
    "attention": ("features * of f", "pattern layer 1 head 0 dims *", "E0342"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_coordinate_mask_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code = MISTAKES[name]
    line = f"group g = {CALL} at features * of f at last token\n"
    assert old in line
    line = line.replace(old, new)
    use = experiment("from turned into clean", f"patch {SITE} in basis f at last token", name="u")
    path = write(tmp_path, sae(tmp_path), line, PATCHES, use)
    errors = training_errors(path)
    assert errors[0].code == code, errors


USES: dict[str, tuple[tuple[str, ...], str]] = {
    "path": (("from turned into clean", "path g -> logits at last token"), "E0342"),
    "heads": (("from turned into clean", "patch layers * heads * except g at last token"), "E0"),
    "freeze": (("freeze g at last token", "ablate z layer 0 at last token with zero"), "E0108"),
    "swap": (("swap g at last token with cue token",), "E0108"),
    "dimensions of it": (("from turned into clean", "patch g dims 0..2 at last token"), "E0"),
    "in a basis": (("from turned into clean", "patch g in basis f at last token"), "E0"),
    "onto": (("project g at last token onto d",), "E0"),
    "loop": (
        ("from turned into clean", "for s in [g, h] { patch s at last token }"),
        "E0207",
    ),
    "edge": (("block attention g from last token to cue token",), "E0"),
    "other dims": (
        ("from turned into clean", "patch z layer 1 dims * except g at last token"),
        "E0",
    ),
}


@pytest.mark.parametrize("name", USES)
def test_rules_that_take_no_coordinates_reject_a_mask(name: str, tmp_path: Path) -> None:
    lines, code = USES[name]
    direction = f"direction d = mean_difference(clean of p, other of p) at {SITE} at last token\n"
    save = experiment(f"add 1 * d to {SITE} at last token", name="u")
    heads = "group h = L1H0, L1H1\n"
    path = write(tmp_path, sae(tmp_path), direction, heads, fit(), experiment(*lines), save)
    errors = training_errors(path)
    assert errors[0].code.startswith(code), errors
