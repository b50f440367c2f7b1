"""Groups that a file declares with `fit(mask(…))`.

Loss and gradient are compared with plain hooks on the bare model in float64, one unpadded prompt at
a time, and a training with a loop that shares no code. Further tests: planted heads and neurons,
use in rules, keys, and errors.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.execute.mask_training import MaskRows, open_rows
from mechdsl.execute.training import VectorCache
from mechdsl.fits.reports import MaskReport
from mechdsl.pipeline.trained_files import fits_of_file
from mechdsl.resolve.types import SitePoint, TrainedMask

from ..execute.support import shared, unchanged, word_tokenizer
from ..models import families
from ..quick import in_turn, some
from ..rules.models import bare, double
from ..rules.support import rows, tokens
from .test_trained_dictionaries import check_keys, experiment, run, train, write
from .test_trained_rotations import (
    LOSS,
    MEASURE,
    NOISY,
    OTHER,
    checked,
    loss_by_hand,
    training_errors,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("gpt2", "llama", "gpt_neox")
HEADS = "layers * heads *"
QUICK = "steps: 6, batch: 2, rate: 0.3, validation: 25%"


def fit(
    options: str = QUICK,
    *,
    mask: str = "size: 3",
    source: str = "from: other",
    objective: str = f"maximise: {LOSS}",
    at: str = f"{HEADS} at last token",
    name: str = "g",
    word: str = "group",
) -> str:
    call = f"fit(mask({mask}), prompts: p, {source}, {objective}, {options})"
    return f"{word} {name} = {call}" + (f" at {at}\n" if at else "\n")


PATCH = ("from turned into clean", "patch g at last token")
PATCHES = experiment(*PATCH)


def training_rows(path: Path, model: Any, side: Any = None) -> tuple[TrainedMask, MaskRows]:
    (declared,) = fits_of_file(checked(path, model)).values()
    assert declared.objective is not None
    mask = declared.file
    assert isinstance(mask, TrainedMask)
    return mask, open_rows(mask, declared.objective, shared(model), side, VectorCache())


def probabilities(found: mechdsl.TrainedFit) -> list[float]:
    return json.loads((found.folder / "mask.json").read_text("utf-8"))["probabilities"]


def chosen_sites(found: mechdsl.TrainedFit) -> list[str]:
    assert isinstance(found.report, MaskReport)
    return list(found.report.chosen)


# --- the loss -------------------------------------------------------------------------------------

INPUTS: Mapping[str, Mapping[str, str]] = {
    "gpt2": {"z": "transformer.h.{}.attn.c_proj", "mlp_hidden": "transformer.h.{}.mlp.c_proj"},
    "llama": {
        "z": "model.layers.{}.self_attn.o_proj",
        "mlp_hidden": "model.layers.{}.mlp.down_proj",
    },
    "gpt_neox": {
        "z": "gpt_neox.layers.{}.attention.dense",
        "mlp_hidden": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    },
}
"""The module that has a site as its input."""


def units_of(family: str, site: str) -> int:
    return double(family).config.num_attention_heads if site == "z" else 1


def reference_inputs(family: str, ids: Sequence[int], site: str) -> list[Tensor]:
    """[token, width] inputs of the module of every layer."""
    found: list[Tensor] = []
    model = double(family)
    handles = [
        model.get_submodule(INPUTS[family][site].format(layer)).register_forward_pre_hook(
            lambda _, given: found.append(given[0][0].detach().clone())
        )
        for layer in range(model.config.num_hidden_layers)
    ]
    with torch.no_grad():
        model(torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    return found


def reference_logits(
    family: str,
    ids: Sequence[int],
    gates: Mapping[tuple[str, int, int | None], Tensor],
    incoming: Mapping[str, list[Tensor]] | None,
    at: Sequence[tuple[int, int]],
) -> Tensor:
    """[vocab] logits at the end of a run with x + m (y − x) at some tokens.

    Args:
        gates: Site, layer and unit → m.
        incoming: Site → [token, width] of every layer; None for 0.
        at: Written tokens, and the tokens of `incoming`.
    """
    model, handles = double(family), []
    for site, layer in dict.fromkeys((s, n) for s, n, _ in gates):
        mine = {unit: m for (s, n, unit), m in gates.items() if (s, n) == (site, layer)}

        def hook(_: Any, given: Any, *, site: str = site, layer: int = layer, mine: Any = mine):
            vectors = given[0].clone()
            count = vectors.shape[-1] if site == "mlp_hidden" else units_of(family, site)
            parts = vectors.unflatten(-1, (count, -1))
            for to, of in at:
                for unit, m in mine.items():
                    there = slice(None) if unit is None else unit
                    y = 0.0
                    if incoming is not None:
                        y = incoming[site][layer][of].unflatten(-1, (count, -1))[there]
                    x = parts[0, to, there].clone()
                    parts[0, to, there] = x + m * (y - x)
            return (vectors, *given[1:])

        module = model.get_submodule(INPUTS[family][site].format(layer))
        handles.append(module.register_forward_pre_hook(hook))
    logits = model(torch.tensor([list(ids)])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits


def value_by_hand(
    family: str, row: int, points: Sequence[SitePoint], gates: Tensor, source: str, at: str
) -> Tensor:
    """The measure of one unpadded prompt with a weight for each site."""
    here = rows("clean")[row]
    mine = tokens(here, at)
    sites = dict.fromkeys(point.site for point in points)
    incoming, theirs = None, mine
    if source == "from: other":
        there = rows("other")[row]
        theirs = tokens(there, at)
        incoming = {site: reference_inputs(family, there.ids, site) for site in sites}
    if source == "with: mean":
        ids = range(4)
        read = {
            site: [reference_inputs(family, rows("clean")[n].ids, site) for n in ids]
            for site in sites
        }
        places = [tokens(rows("clean")[n], at) for n in ids]
        incoming = {
            site: [
                torch.stack([every[n][layer][places[n]] for n in ids]).mean(0)
                for layer in range(len(every[0]))
            ]
            for site, every in read.items()
        }
        theirs = range(len(mine))
    named = {
        (point.site, point.layer or 0, point.unit): gates[number]
        for number, point in enumerate(points)
    }
    pairs = list(zip(mine, theirs, strict=True))
    logits = reference_logits(family, here.ids, named, incoming, pairs)
    return loss_by_hand(logits, row)


SITES = (
    f"{HEADS} at last token",
    "layers 0, 2 heads 1..2 at subject tokens",
    "mlp_hidden layers 1..2 neurons 3, 7 at last token",
    "mlp_hidden layers * at cue token",
    "z layers 0..1 at last token",
    f"{HEADS} at {{item 1 token, cue token}}",
)
SOURCES = ("from: other", "with: zero", "with: mean")


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES))
@pytest.mark.parametrize(("at", "side"), in_turn(SITES, ("left", "right")))
def test_site_mask_loss_and_gradient_equal_autograd(
    at: str, side: Any, family: str, source: str, tmp_path: Path
) -> None:
    """For every row, in ragged batches of two rows with different gates."""
    if source == "with: mean" and "subject tokens" in at:
        source = "with: zero"
    options = QUICK.replace("25%", "0%")
    path = write(tmp_path, fit(options, source=source, at=at, mask="size: 1"), PATCHES)
    mask, found = training_rows(path, double(family), side)
    random = torch.Generator().manual_seed(5)
    ids, where = found.objective.table.row_ids, at.split(" at ")[1]
    for batch in ([0, 2], [1, 3]):
        mine = torch.rand(2, len(mask.candidates), generator=random, dtype=torch.float64)
        mine.requires_grad_()
        theirs = mine.detach().clone().requires_grad_()
        values = found.values(np.array(batch), mine)
        expected = torch.stack(
            [value_by_hand(family, ids[row], mask.candidates, theirs[n], source, where)
             for n, row in enumerate(batch)]
        )  # fmt: skip
        assert torch.allclose(values, expected, atol=1e-5)  # gates are float32
        assert (expected - found.values(np.array(batch), None)).abs().max() > 1e-4
        (own,) = torch.autograd.grad(values.sum(), mine)
        (other,) = torch.autograd.grad(expected.sum(), theirs)
        assert torch.allclose(own, other, atol=1e-5)
        assert other.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "keep"), in_turn(["hard_concrete", "straight_through"], [False, True])
)
def test_site_mask_training_equals_a_reference_loop(kind: str, keep: bool, tmp_path: Path) -> None:
    """The reference loop shares only its seeds with the package."""
    mask = f'size: 3, kind: "{kind}"' + (", keep: true" if keep else "")
    path = write(tmp_path, fit(f"{QUICK}, seed: 3", mask=mask), PATCHES)
    (found,) = train(path)
    declared, known = training_rows(path, double("llama"))
    table, points = known.objective.table, declared.candidates
    order = sorted(range(4), key=lambda n: stable_hash(3, "training row", table.row_keys[n]))
    ids = [table.row_ids[row] for row in order]
    place = {table.row_ids[row]: row for row in order}

    def value(row: int, gates: Tensor) -> Tensor:
        written = 1 - gates if keep else gates
        return value_by_hand("llama", row, points, written, "from: other", "last token")

    scores = trained_by_hand(kind, len(points), ids[1:], place, value)
    likely = expit(scores + shift_by_hand(scores, 3))
    stored = json.loads((found.folder / "mask.json").read_text("utf-8"))
    assert np.allclose(stored["probabilities"], likely, atol=2e-3)
    assert np.ptp(likely) > 0.1
    chosen = sorted(np.argsort(-likely)[:3].tolist())
    assert stored["chosen"] == chosen
    report = found.report
    assert isinstance(report, MaskReport)
    hard = torch.zeros(len(points), dtype=torch.float64)
    hard[chosen] = 1
    randoms = []
    for number in range(8):
        random = torch.Generator().manual_seed(stable_hash(3, "choice", number) % 2**63)
        own = torch.zeros(len(points), dtype=torch.float64)
        own[torch.randperm(len(points), generator=random)[:3]] = 1
        randoms.append(value(ids[0], own).item())
    none = torch.zeros(len(points), dtype=torch.float64)
    assert report.trained == pytest.approx(value(ids[0], hard).item(), abs=2e-3)
    assert report.random == pytest.approx(np.mean(randoms), abs=2e-3)
    plain, every = (none, 1 - none) if not keep else (1 - none, none)
    assert report.unpatched == pytest.approx(value(ids[0], plain).item(), abs=2e-3)
    assert report.whole == pytest.approx(value(ids[0], every).item(), abs=2e-3)
    assert (report.rows, report.held_out_rows, report.steps) == (3, 1, 6)
    assert report.undecided == ((likely >= 0.1) & (likely <= 0.9)).sum()
    assert report.keeps == keep


def shift_by_hand(scores: np.ndarray, size: float) -> float:
    return brentq(lambda by: expit(scores + by).sum() - size, -80, 80, xtol=1e-13)


def trained_by_hand(
    kind: str,
    count: int,
    ids: list[int],
    place: Mapping[int, int],
    value: Any,
    size_at: Callable[[int], float] = lambda step: 3,
) -> np.ndarray:
    """Six steps of Adam on batches of two of three rows."""
    scores = np.zeros(count)
    first, second = np.zeros(count), np.zeros(count)
    for step in range(6):
        random = torch.Generator().manual_seed(stable_hash(3, "order", step) % 2**63)
        batch = [ids[n] for n in torch.randperm(3, generator=random)[:2].tolist()]
        random = torch.Generator().manual_seed(stable_hash(3, "gates", step) % 2**63)
        uniform = torch.rand(2, count, generator=random, dtype=torch.float64)
        odds = torch.tensor(scores + shift_by_hand(scores, size_at(step)), requires_grad=True)
        if kind == "hard_concrete":
            alpha = odds + 2 / 3 * math.log(0.1 / 1.1)
            noise = uniform.log() - (1 - uniform).log()
            gates = ((noise + alpha) / (2 / 3)).sigmoid() * 1.2 - 0.1
            gates = gates.clamp(0, 1)
        else:
            likely = odds.sigmoid()
            gates = (uniform < likely).double() + likely - likely.detach()
        batch = sorted(batch, key=place.__getitem__)
        loss = -torch.stack([value(row, own) for row, own in zip(batch, gates, strict=True)]).mean()
        (slope,) = torch.autograd.grad(loss, odds)
        spread = expit(odds.detach().numpy())
        spread = spread * (1 - spread)
        slope = slope.numpy() - spread * slope.numpy().sum() / spread.sum()
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        size = np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
        rate = 0.3 * min(1.0, (1 - step / 6) / 0.2)
        scores = scores - rate * first / (1 - 0.9 ** (step + 1)) / size
    return scores


# --- planted sites --------------------------------------------------------------------------------

PLANTED = """
prompts planted {
  rows "planted.jsonl"
  template "{left} w44 {cue} w40"
  answer " w1"
  corrupt swapped { left = left2  cue = cue2 }
  split 60%
}
"""
HEADS_THERE = ((0, 2), (1, 1), (2, 3))
NEURONS_THERE = (2, 5, 11, 17)


@cache
def planted(site: str) -> Any:
    """A model in which only the planted heads, or only these neurons of the last layer, write to
    the residual stream. The heads copy, with large weights."""
    model: Any = copy.deepcopy(families.module("gpt2"))
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            heads = block.attn.c_proj.weight.unflatten(0, (4, -1))
            for head in range(4) if site == "z" else ():
                factor = 2.0 if (layer, head) in HEADS_THERE else 0.0
                heads[head] *= factor
            if site == "mlp_hidden" and layer == 2:
                kept = torch.zeros(len(block.mlp.c_proj.weight))
                kept[list(NEURONS_THERE)] = 3
                block.mlp.c_proj.weight.mul_(kept[:, None])
    return unchanged(model.eval())


def write_planted(folder: Path, declared: str, *parts: str) -> Path:
    random = np.random.default_rng(7)
    lines = [
        json.dumps({key: f"w{random.integers(36)}" for key in ("left", "left2", "cue", "cue2")})
        for _ in range(60)
    ]
    (folder / "planted.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return write(folder, declared, *parts, blocks=PLANTED)


CASES = {
    "heads": ("z", "size: 3", "from: swapped, minimise: kl(swapped)", HEADS),
    "ablated heads": ("z", "size: 3", "with: zero, maximise: kl(clean)", HEADS),
    "kept heads": (
        "z",
        'size: 3, keep: true, kind: "straight_through"',
        "with: zero, minimise: kl(clean)",
        HEADS,
    ),
    "neurons": (
        "mlp_hidden",
        "size: 4",
        "with: zero, maximise: kl(clean)",
        "mlp_hidden layers 2 neurons *",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", some(CASES, ["heads"]))
@pytest.mark.parametrize("seed", some(range(3), [0]))
def test_site_mask_finds_planted_sites(name: str, seed: int, tmp_path: Path) -> None:
    site, mask, objective, at = CASES[name]
    call = (
        f"group g = fit(mask({mask}), prompts: planted.train, {objective}, "
        f"steps: 90, batch: 16, seed: {seed}) at {at} at last token\n"
    )
    measure = "measure logit(answer) as delta"
    rule = experiment("ablate g at last token with zero", block="planted.test", measure=measure)
    path = write_planted(tmp_path, call, rule)
    given = {"m": (planted(site), word_tokenizer())}
    (found,) = mechdsl.fit(path, given, store=tmp_path / "store")
    there = [f"L{layer}H{head}.z" for layer, head in HEADS_THERE]
    if site != "z":
        there = [f"L2N{neuron}.mlp_hidden" for neuron in NEURONS_THERE]
    assert chosen_sites(found) == there
    report = found.report
    assert isinstance(report, MaskReport)
    sign = 1 if "maximise" in objective else -1
    assert sign * report.trained > sign * report.random
    if name == "heads":  # nothing else moves information to the last token
        assert report.trained == pytest.approx(0, abs=1e-4)
        assert report.whole == pytest.approx(0, abs=1e-4)
    assert mechdsl.run(path, given, store=tmp_path / "store").complete


# --- use in rules ---------------------------------------------------------------------------------

RULES = {
    "patch": list(PATCH),
    "other positions": ["from turned into clean", "patch g at right token"],
    "zero": ["ablate g at tokens * with zero"],
    "mean": ["ablate g at last token with mean"],
    "except": ["from turned into clean", "patch layers * heads * except g at last token"],
    "sweep": ["from turned into clean", "patch layer * head * except g at last token"],
    "random": [*PATCH, "against random(3)"],
    "path": ["from turned into clean", "path g -> logits at last token"],
    "derived": [
        "run changed { ablate g at last token with zero }",
        "from changed into clean",
        "patch resid_post layer 1 at last token",
    ],
    "replies": ["generate 3", "ablate g at tokens * with zero"],
    "auroc": [
        "from turned into clean",
        "patch layer * head * at last token",
    ],
}


@pytest.mark.parametrize("name", some(RULES, [*RULES][1::4]))
def test_site_mask_equals_its_listed_sites_in_rules(name: str, tmp_path: Path) -> None:
    """Up to rounding, with a second experiment on the same block."""
    measure = "measure logit(answer) as raw" if name == "replies" else MEASURE
    if name == "auroc":
        measure += "\n  expect auroc(delta, g) > 0"
    text = experiment(*RULES[name], measure=measure) + OTHER
    path = write(tmp_path, fit(), text)
    (trained,) = train(path, out=tmp_path)
    card = (tmp_path / "g" / "README.md").read_text("utf-8")
    assert card.startswith("# g: mask of 3 of 12 sites")
    assert f"set to those of the run `other`, to maximise {LOSS}" in card
    own = run(path, fresh=True).files[0].experiments
    heads = ", ".join(each.removesuffix(".z") for each in chosen_sites(trained))
    path = write(tmp_path, f"group g = {heads}\n", text)
    listed = run(path, store=False).files[0].experiments
    assert len(own) == len(listed) == 2
    for one, two in zip(own, listed, strict=True):
        assert [cell.coords for cell in one.cells] == [cell.coords for cell in two.cells]
        assert [each.value for each in one.outcomes] == [each.value for each in two.outcomes]
        for mine, theirs in zip(one.measures, two.measures, strict=True):
            assert np.allclose(mine.patched, theirs.patched, 0, 2e-6, equal_nan=True)
    said = own[0].conventions["group g"]
    assert "trained on 4 rows of p at last token, 1 of them held out, to maximise" in said
    assert isinstance(trained.report, MaskReport)
    assert f"trained {trained.report.trained:.4g}, 8 random choices" in said
    assert "group g" not in own[1].conventions


@pytest.mark.slow
def test_mask_of_two_models_patches_the_sites_of_each(tmp_path: Path) -> None:
    """An experiment on two models patches each at the sites chosen by its training."""
    head = 'mech 1\nmodel m = local("one")\nmodel n = local("two")\n'
    text = experiment(*PATCH).replace("model m\n", "model m, n\n")
    path = write(tmp_path, fit(), text)
    body = path.read_text("utf-8").split("\n", 2)[2]
    path.write_text(f"{head}{body}", "utf-8")
    given = {"m": (bare("gpt2"), word_tokenizer()), "n": (bare("llama"), word_tokenizer())}
    found = mechdsl.fit(path, given, store=tmp_path / "store")
    assert len({each.folder for each in found}) == 2
    (both,) = mechdsl.run(path, given, store=tmp_path / "store").files[0].experiments
    for number, (family, fitted) in enumerate(zip(("gpt2", "llama"), found, strict=True)):
        heads = ", ".join(each.removesuffix(".z") for each in chosen_sites(fitted))
        alone = write(tmp_path, f"group g = {heads}\n", experiment(*PATCH))
        (one,) = run(alone, family, store=False).files[0].experiments
        own = both.measures[0].patched.reshape(2, -1)[number]
        assert np.allclose(own, one.measures[0].patched.ravel(), atol=1e-6)
    expects = text.replace("  stats", "  expect auroc(delta, g) > 0\n  stats").replace(
        "patch g", "patch layer * head *"
    )
    write(tmp_path, fit(), expects)
    body = path.read_text("utf-8").split("\n", 2)[2]
    path.write_text(f"{head}{body}", "utf-8")
    with pytest.raises(mechdsl.MechdslError, match="has other sites for each model"):
        mechdsl.fit(path, given, store=tmp_path / "store")


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "size": {"mask": "size: 2"},
    "kind": {"mask": 'size: 3, kind: "straight_through"'},
    "keep": {"mask": "size: 3, keep: true"},
    "steps": {"options": QUICK.replace("6", "7")},
    "rate": {"options": QUICK.replace("0.3", "0.2")},
    "validation": {"options": QUICK.replace("25%", "0%")},
    "seed": {"options": f"{QUICK}, seed: 1"},
    "limit": {"options": f"{QUICK}, limit: 3"},
    "candidates": {"at": "layers 0..1 heads * at last token"},
    "candidates of the same first site": {"at": "layers * heads 0..2 at last token"},
    "position": {"at": f"{HEADS} at cue token"},
    "source": {"source": "from: turned"},
    "zero": {"source": "with: zero"},
    "mean": {"source": "with: mean"},
    "sign": {"objective": f"minimise: {LOSS}"},
    "measure": {"objective": "maximise: logprob(wrong) - 0.4 * logit(answer)"},
}


def test_site_mask_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    """A different argument needs another training and gives other probabilities."""
    base, _ = check_keys(tmp_path, trains_all, fit, CHANGES, PATCHES, probabilities)
    for parts in (
        (fit(name="h"), PATCHES.replace("patch g", "patch h")),
        ("# A comment.\n", fit(), OTHER, PATCHES),
        (fit(f"{QUICK}, measure_on_training_rows: true"), PATCHES),
    ):
        (found,) = train(write(tmp_path, *parts))
        assert (found.folder, found.seconds) == (base.folder, 0.0)


def test_cached_run_depends_on_the_sites_of_a_mask(tmp_path: Path) -> None:
    """A stored run isn't reused for a training with other sites."""
    path = write(tmp_path, fit(), PATCHES)
    train(path)
    before = run(path).files[0].experiments[0].measures[0].patched
    path = write(tmp_path, fit(objective=f"minimise: {LOSS}"), PATCHES)
    train(path)
    after = run(path).files[0].experiments[0].measures[0].patched
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("change", ["chosen", "sites", "text"])
def test_damaged_mask_file_is_trained_again(change: str, tmp_path: Path) -> None:
    path = write(tmp_path, fit(), PATCHES)
    (found,) = train(path)
    file = found.folder / "mask.json"
    before = file.read_text("utf-8")
    content = json.loads(before)
    if change == "chosen":
        content["chosen"] = [0, 1, 99]
    if change == "sites":
        content["sites"] = content["sites"][1:]
    file.write_text(json.dumps(content) if change != "text" else before[:-9], "utf-8")
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path)
    train(path)
    assert file.read_text("utf-8") == before


def test_undecided_mask_warns(tmp_path: Path) -> None:
    path = write(tmp_path, fit("steps: 0"), PATCHES)
    with pytest.warns(mechdsl.MechdslWarning, match="undecided at 12 of 12 sites"):
        (found,) = train(path)
    assert isinstance(found.report, MaskReport)
    assert found.report.single is None
    assert chosen_sites(found) == ["L0H0.z", "L0H1.z", "L0H2.z"]


# --- mistakes -------------------------------------------------------------------------------------

CALL = f"fit(mask(size: 3), prompts: p, from: other, maximise: {LOSS})"
MISTAKES: dict[str, tuple[str, str, str]] = {
    "no source": ("from: other, ", "", "E0207"),
    "both sources": ("from: other", "from: other, with: zero", "E0207"),
    "unknown fill": ("from: other", "with: resample", "E0207"),
    "no measure": (f", maximise: {LOSS}", "", "E0207"),
    "unknown run": ("from: other", "from: othr", "E0201"),
    "run of the rows": ("prompts: p", "prompts: other of p", "E0207"),
    "no size": ("mask(size: 3)", "mask", "E0207"),
    "other name": ("size: 3", "k: 3", "E0207"),
    "zero": ("size: 3", "size: 0", "E0342"),
    "all": ("size: 3", "size: 12", "E0342"),
    "kind": ("size: 3", 'size: 3, kind: "soft"', "E0342"),
    "keep": ("size: 3", "size: 3, keep: 1", "E0342"),
    "step function": (f"maximise: {LOSS}", "maximise: rank(answer)", "E0608"),
    "noise": ("from: other", "from: noised", "E0342"),
    "singular": (HEADS, "layer * head *", "E0342"),
    "short": (HEADS, "L0H1", "E0342"),
    "ranking": (HEADS, "top 3 of control", "E0342"),
    "dimensions": (HEADS, "resid_post layers 1..2 dims 0..3", "E0342"),
    "pattern": (HEADS, "pattern layers * heads *", "E0608"),
    "no sites": (f" at {HEADS} at last token", "", "E0342"),
    "positions": ("last token", "last token, cue token", "E0342"),
    "mean of uneven tokens": ("from: other", "with: mean", "E0324"),
    "rotation": ("mask(size: 3)", "das(dims: 2)", "E0342"),
    "no training": (CALL, "pca(p, dims: 2)", "E0342"),
    "basis": ("group g", "basis g", "E0342"),
    "another training": (HEADS, f"{HEADS} except h", "E0207"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_site_mask_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code = MISTAKES[name]
    line = f"group g = {CALL} at {HEADS} at last token\n"
    assert old in line
    line = line.replace(old, new)
    if name == "mean of uneven tokens":
        line = line.replace("last token", "subject tokens")
    other = fit(name="h") if name == "another training" else ""
    path = write(tmp_path, other, line, PATCHES, OTHER, blocks=NOISY)
    errors = training_errors(path)
    assert errors[0].code == code, errors


def test_model_edit_with_a_mask_is_rejected(tmp_path: Path) -> None:
    edited = "model edited = m with { scale weights of g by 0 }\n"
    path = write(tmp_path, fit(), edited, PATCHES)
    with pytest.raises(mechdsl.MechdslError) as found:
        train(path)
    (problem,) = (each for each in found.value.diagnostics if each.severity == "error")
    assert problem.code == "E0207"
    assert "`g` is chosen by a training" in problem.message
