"""Dictionaries that a file declares with `fit(…)`.

Training vectors against plain hooks, one unpadded prompt at a time; use in rules, equal to a
dictionary in a folder; keys; and a missing training, which affects only dependent experiments.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute.training import RowVectors
from mechdsl.pipeline.trained_files import DeclaredFit, FitKeys, fits_of_file
from mechdsl.store.store import FITS_FOLDER

from ..execute.support import context, word_tokenizer
from ..quick import in_turn
from ..rules.models import bare
from ..rules.support import BLOCKS, Text, plain, rows, tokens, write_data

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("gpt2", "llama", "gpt_neox")
LAYER, FEATURES, K = 1, 24, 4
SAE = f"sae(features: {FEATURES}, k: {K})"
QUICK = "steps: 12, batch: 16, rate: 0.01"
MEASURE = "measure logit(answer) - logit(wrong) as delta"


def fit(
    inner: str = SAE,
    options: str = QUICK,
    at: str = f"resid_post layer {LAYER} at tokens *",
    prompts: str = "p",
) -> str:
    return f"basis f = fit({inner}, prompts: {prompts}, {options}) at {at}\n"


def experiment(*lines: str, name: str = "e", block: str = "second", measure: str = MEASURE) -> str:
    body = "".join(f"  {line}\n" for line in ("model m", f"prompts {block}", *lines, measure))
    return f"experiment {name} {{\n{body}  stats bootstrap(100) correct none\n}}\n"


ABLATES = experiment("ablate feature 0..3 of f at last token with zero")


OTHER = experiment("ablate mlp_out layer 0 at last token with zero", name="other")


def write(folder: Path, *parts: str, blocks: str = BLOCKS) -> Path:
    write_data(folder)
    path = folder / "file.mech"
    path.write_text("\n".join(['mech 1\nmodel m = local("handed over")', blocks, *parts]), "utf-8")
    return path


def models(family: str = "llama") -> dict[str, Any]:
    return {"m": (bare(family), word_tokenizer())}


def run(path: Path, family: str = "llama", **options: Any) -> Any:
    return mechdsl.run(path, models(family), **{"store": path.parent / "store", **options})


def train(path: Path, family: str = "llama", **options: Any) -> list[mechdsl.TrainedFit]:
    return mechdsl.fit(path, models(family), **{"store": path.parent / "store", **options})


def untrained(path: Path) -> Path:
    """Return the folder in which `run` looks for the missing training of a file.

    The store has a different training.
    """
    asked = set[str]()
    find_key = FitKeys.of

    def record_key(keys: FitKeys, fit: DeclaredFit) -> str:
        asked.add(key := find_key(keys, fit))
        return key

    with (
        patch.object(FitKeys, "of", record_key),
        pytest.raises(mechdsl.MechdslError, match="isn't trained"),
    ):
        run(path)
    (key,) = asked
    return path.parent / "store" / FITS_FOLDER / key


def check_keys(
    folder: Path,
    trains_all: bool,
    declare: Callable[..., str],
    changes: Mapping[str, dict[str, Any]],
    used: str,
    content: Callable[[mechdsl.TrainedFit], object] | None = None,
    same: Collection[str] = (),
) -> tuple[mechdsl.TrainedFit, set[Path]]:
    """Check that each modified declaration needs another training with other weights.

    Args:
        trains_all: Train after each change, not only after every eighth.
        used: An experiment that uses the declared basis.
        content: Function from a training to a value that depends on the weights; None to skip.
        same: Changes after which the weights may be equal.

    Returns:
        The training without a change, and the folders of all.
    """
    (base,) = train(write(folder, declare(), used))
    first, folders = content and content(base), {base.folder}
    for number, (name, change) in enumerate(changes.items()):
        path = write(folder, declare(**change), used)
        expected = untrained(path)
        assert expected not in folders, name
        folders.add(expected)
        if trains_all or number % 8 == 0:
            (found,) = train(path)
            assert found.folder == expected, name
            assert found.seconds > 0
            assert content is None or name in same or content(found) != first, name
    return base, folders


def checked(path: Path, family: str) -> CheckedFile:
    source = Source(path.read_text("utf-8"), path)
    found = check_source(
        source, CheckSettings(python="run"), models={"m": context(source, "m", adopted_for(family))}
    )
    assert not has_errors(found.diagnostics), found.diagnostics
    return found


def adopted_for(family: str) -> Any:
    from ..execute.support import shared

    return shared(bare(family))


# --- training vectors -----------------------------------------------------------------------------

SITES = {
    f"resid_post layer {LAYER}": ("resid_post", "resid_post"),
    "z layer 1": ("z", "z"),
    "z layer 1 head 2": ("z", "z"),
    "mlp_hidden layer 1": ("mlp_hidden", "mlp_hidden"),
    "mlp_out layer 1": ("mlp_norm", "mlp_out"),
}
"""Sites of the encoded and the reconstructed vectors, by the site of the basis."""
POSITIONS = ("tokens *", "subject tokens", "token 3", "last token")


def vectors_by_hand(family: str, text: Text, site: str, written: str, at: str) -> Tensor:
    """[token, width] of one unpadded prompt."""
    own = plain(family, text)[site, LAYER][tokens(text, at)]
    return own[:, 2] if "head 2" in written else own.flatten(1)


@pytest.mark.parametrize(("family", "at"), in_turn(HERE, POSITIONS))
@pytest.mark.parametrize("written", SITES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_vectors_equal_hooks(
    written: str, family: str, at: str, side: Any, tmp_path: Path
) -> None:
    """All vectors of the training rows, in chunks of full rows, without held-out rows."""
    inner = f"transcoder(features: {FEATURES}, k: {K})" if "mlp_out" in written else SAE
    options = f"{QUICK}, validation: 25%"
    path = write(tmp_path, fit(inner, options, f"{written} at {at}", "other of p"), ABLATES)
    (declared,) = fits_of_file(checked(path, family)).values()
    whole = RowVectors(declared.training, adopted_for(family), 0, side)
    small = RowVectors(declared.training, adopted_for(family), 0, side, chunk_bytes=1)
    table = declared.training.sample.table
    order = sorted(range(4), key=lambda n: stable_hash(0, "training row", table.row_keys[n]))
    assert whole.rows.tolist() == order
    assert (whole.held_out_count, whole.chunks) == (1, 1)
    assert small.chunks == 3
    for place, site in enumerate(SITES[written]):
        texts = [rows("other")[number] for number in table.row_ids]
        every = [vectors_by_hand(family, text, site, written, at) for text in texts]
        assert torch.allclose(whole.held_out()[place], every[order[0]].float(), atol=1e-4)
        joined = torch.cat([every[n] for n in sorted(order[1:])]).float()
        assert_same_vectors(whole.chunk(0)[place], joined)
        for number, row in enumerate(order[1:]):
            assert torch.allclose(small.chunk(number)[place], every[row].float(), atol=1e-4)
        assert joined.abs().max() > 0.05


def assert_same_vectors(found: Tensor, expected: Tensor) -> None:
    """Check equality up to the order of rows, which depends on the batches."""
    assert found.shape == expected.shape
    distance = torch.cdist(found.double(), expected.double())
    assert distance.min(0).values.max() < 1e-3
    assert distance.min(1).values.max() < 1e-3


def test_dictionary_training_equals_a_reference_loop(tmp_path: Path) -> None:
    """The reference loop shares only its seeds with the package."""
    path = write(tmp_path, fit(options=f"{QUICK}, seed: 3, validation: 25%"), ABLATES)
    (found,) = train(path)
    table = next(iter(fits_of_file(checked(path, "llama")).values())).training.sample.table
    order = sorted(range(4), key=lambda n: stable_hash(3, "training row", table.row_keys[n]))
    texts = [rows()[number] for number in table.row_ids]
    chunk = sorted(order[1:])
    # The batches are of rows of similar length; the reader's order is part of the training.
    vectors = RowVectors(
        next(iter(fits_of_file(checked(path, "llama")).values())).training,
        adopted_for("llama"), 0, None,
    ).chunk(0)[0]  # fmt: skip
    by_hand = torch.cat([plain("llama", texts[n])["resid_post", LAYER][:, 0] for n in chunk])
    assert_same_vectors(vectors, by_hand.float())
    weights = trained_by_hand(vectors, seed=3)
    own = load_file(found.folder / "sae_weights.safetensors")
    assert own.keys() == weights.keys()
    for name, expected in weights.items():
        assert torch.allclose(own[name], expected, atol=1e-4, rtol=1e-3), name
    held_out = plain("llama", texts[order[0]])["resid_post", LAYER][:, 0].float()
    assert found.report.rows == 3
    assert found.report.held_out_vectors == len(held_out)
    f = encoded(held_out, own)
    error = (held_out - f @ own["W_dec"] - own["b_dec"]).square().sum()
    spread = (held_out - held_out.mean(0)).square().sum()
    assert found.report.explained == pytest.approx(float(1 - error / spread), abs=1e-4)
    assert found.report.active == pytest.approx(float((f > 0).sum(1).float().mean()))
    assert found.report.inactive == int((~(f > 0).any(0)).sum())


def encoded(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    top = z.topk(K, dim=1)
    return torch.zeros_like(z).scatter(1, top.indices, top.values.clamp_min(0))


def trained_by_hand(x: Tensor, seed: int, rows_: Tensor | None = None) -> dict[str, Tensor]:
    """Run twelve steps of Adam on batches of 16, as a reference.

    Args:
        rows_: [feature, width] directions at the start; otherwise those of the trainer `sae`.
    """
    width, mean = x.shape[1], x.mean(0)
    scale = (width / (x - mean).square().sum(1).mean()).sqrt()
    u = (x - mean) * scale
    random = torch.Generator().manual_seed(stable_hash(seed, "weights") % 2**63)
    rows_ = torch.randn(FEATURES, width, generator=random) if rows_ is None else rows_
    rows_ = rows_ / rows_.norm(dim=1, keepdim=True)
    w = [rows_.T.clone(), torch.zeros(FEATURES), rows_.clone(), torch.zeros(width)]
    first = [torch.zeros_like(each) for each in w]
    second = [torch.zeros_like(each) for each in w]
    done, passes = 0, 0
    while done < 12:
        own = torch.Generator().manual_seed(stable_hash(seed, "order", passes) % 2**63)
        order = torch.randperm(len(u), generator=own)
        for start in range(0, len(u) - 15, 16):
            if done == 12:
                break
            batch = u[order[start : start + 16]]
            leaves = [each.clone().requires_grad_() for each in w]
            encoder, bias, decoder, center = leaves
            z = (batch - center) @ encoder + bias
            top = z.topk(K, dim=1)
            f = torch.zeros_like(z).scatter(1, top.indices, top.values.clamp_min(0))
            ((batch - f @ decoder - center) ** 2).sum(1).mean().backward()
            rate = 0.01 * min(1.0, (1 - done / 12) / 0.2)
            for n, leaf in enumerate(leaves):
                assert leaf.grad is not None
                first[n] = 0.9 * first[n] + 0.1 * leaf.grad
                second[n] = 0.999 * second[n] + 0.001 * leaf.grad**2
                step = first[n] / (1 - 0.9 ** (done + 1))
                size = (second[n] / (1 - 0.999 ** (done + 1))).sqrt() + 1e-8
                w[n] = w[n] - rate * step / size
            w[2] = w[2] / w[2].norm(dim=1, keepdim=True)
            done += 1
        passes += 1
    return {
        "W_enc": w[0],
        "b_enc": w[1] / scale,
        "W_dec": w[2],
        "b_dec": w[3] / scale + mean,
    }


# --- use in rules ---------------------------------------------------------------------------------

RULES = {
    "ablate": ["ablate feature * of f at last token with zero"],
    "mean": ["ablate features 0..7 of f at last token with mean"],
    "patch": ["from turned into clean", "patch feature * of f at last token"],
    "add": ["add 3 to features 2, 5 of f at tokens *"],
    "reconstruction": [f"set resid_post layer {LAYER} at tokens * to reconstruction of f"],
    "without error": ["scale feature 0..5 of f at last token by 2 without error"],
    "random": [
        "ablate feature 1 of f at last token with zero",
        "against random(3, features, frequency: seen)",
    ],
    "derived": [
        "run changed { add 3 to features 2, 5 of f at tokens * }",
        "from changed into clean",
        "patch layer 2 head * at last token",
    ],
    "replies": ["generate 3", "add 3 to feature 0..3 of f at tokens *"],
    "loop": ["for i in 0..3 { ablate feature i of f at last token with zero }"],
}


def assert_same_results(own: Any, loaded: Any) -> None:
    """Check equal cells and, up to rounding, equal values: rows of controls share the passes."""
    assert len(own) == len(loaded)
    for one, two in zip(own, loaded, strict=True):
        assert [cell.coords for cell in one.cells] == [cell.coords for cell in two.cells]
        for mine, theirs in zip(one.measures, two.measures, strict=True):
            assert np.allclose(mine.patched, theirs.patched, 0, 2e-6, equal_nan=True)


OTHER_RULES = [name for name in RULES if name != "random"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *in_turn(OTHER_RULES, ["sae", "z", "transcoder"], OTHER_RULES[::2]),
        ("random", "sae"),  # elsewhere, no other feature is as frequent as feature 1
        *in_turn(OTHER_RULES, ["factors"], OTHER_RULES[1::4]),
    ],
)
def test_trained_dictionary_in_rules_equals_its_folder(
    name: str, kind: str, tmp_path: Path
) -> None:
    """With a second experiment on the same block."""
    at = {"z": "z layer 1", "transcoder": "mlp_out layer 1", "factors": "mlp_hidden layer 1"}
    at["sae"] = f"resid_post layer {LAYER}"
    inner = SAE.replace("sae", "transcoder" if kind == "transcoder" else "sae")
    inner, options = ("semi_nmf(factors: 8)", "steps: 12") if kind == "factors" else (inner, QUICK)
    written = [line.replace(f"resid_post layer {LAYER}", at[kind]) for line in RULES[name]]
    measure = "measure logit(answer) as raw" if name == "replies" else MEASURE
    other = experiment("observe features of f at last token", name="seen", measure="")
    text = experiment(*written, measure=measure) + other
    path = write(tmp_path, fit(inner, options, f"{at[kind]} at tokens *"), text)
    (trained,) = train(path, out=tmp_path)
    card = (tmp_path / "f" / "README.md").read_text("utf-8")
    assert card.startswith("# f: ")
    assert "\n- Loss: squared error of the reconstruction\n" in card
    own = run(path, fresh=True).files[0].experiments
    method = "transcoder" if kind == "transcoder" else "sae"
    path = write(tmp_path, f'basis f = {method}("f") at {at[kind]}\n', text)
    loaded = run(path, store=False).files[0].experiments
    assert len(own) == 2
    assert_same_results(own, loaded)
    assert own[0].measures[0].patched.size
    assert trained.what in own[1].conventions["basis f"]


def test_top_rows_of_trained_features_are_saved(tmp_path: Path) -> None:
    save = 'save top 2 rows of features 0..5 of f at tokens * to "rows.jsonl"'
    path = write(tmp_path, fit(), experiment(save, measure=""))
    train(path)
    run(path)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert [line["index"] for line in lines] == [*range(6)]


@pytest.mark.parametrize(
    ("kind", "hint"),
    [("matrioshka", 'did you mean `"matryoshka"`?'), ("lasso", 'write one of `"topk"`,')],
)
def test_unknown_dictionary_kind_gets_a_suggestion(kind: str, hint: str) -> None:
    text = f"""mech 1
model m = zoo("counting")
prompts p {{ x in ["pear", "fig"] template "Part 1: {{x}}" answer " 1" }}
basis f = fit(sae(features: 8, k: 2, kind: "{kind}"), prompts: p) at mlp_out layer 1 at last token
experiment e {{ prompts p observe features of f at last token }}
"""
    errors = [each for each in mechdsl.validate(text) if each.severity == "error"]
    assert [each.code for each in errors] == ["E0342"]
    assert hint in errors[0].help_text


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "matryoshka", "relu", "jump_relu", "gated"])
@pytest.mark.parametrize("method", ["sae", "transcoder", "skip transcoder"])
def test_every_dictionary_kind_is_trained_and_read_back(
    method: str, kind: str, tmp_path: Path
) -> None:
    """The folder has the format that `sae("…")` and `transcoder("…")` read."""
    if method != "sae" and kind == "gated":
        pytest.skip("there are no gated transcoders")
    sparse = f"k: {K}" if kind in ("topk", "batch_topk", "matryoshka") else "penalty: 0.3"
    sparse += ", skip: true" if method.startswith("skip") else ""
    inner = f'{method.split()[-1]}(features: {FEATURES}, {sparse}, kind: "{kind}")'
    at = f"resid_post layer {LAYER}" if method == "sae" else "mlp_out layer 1"
    path = write(tmp_path, fit(inner, at=f"{at} at tokens *"), ABLATES)
    (trained,) = train(path)
    assert trained.report.steps == 12
    assert np.isfinite(trained.report.explained)
    assert run(path).complete


# --- keys -----------------------------------------------------------------------------------------

RELU = 'transcoder(features: 24, penalty: 0.3, kind: "relu")'
BASE = {"inner": SAE, "options": QUICK, "at": f"resid_post layer {LAYER} at tokens *"}
CHANGES: dict[str, dict[str, str]] = {
    "features": {"inner": SAE.replace("24", "25")},
    "k": {"inner": SAE.replace("k: 4", "k: 5")},
    "kind": {"inner": SAE.replace(")", ', kind: "batch_topk")')},
    "steps": {"options": QUICK.replace("12", "13")},
    "batch": {"options": QUICK.replace("16", "15")},
    "rate": {"options": QUICK.replace("0.01", "0.02")},
    "seed": {"options": f"{QUICK}, seed: 1"},
    "patience": {"options": f"{QUICK}, patience: 3"},
    "validation": {"options": f"{QUICK}, validation: 50%"},
    "limit": {"options": f"{QUICK}, limit: 3"},
    "layer": {"at": "resid_post layer 0 at tokens *"},
    "site": {"at": f"mlp_out layer {LAYER} at tokens *"},
    "position": {"at": f"resid_post layer {LAYER} at last token"},
    "transcoder": {"inner": RELU, "at": "mlp_out layer 1 at tokens *"},
    "skip": {"inner": RELU.replace(")", ", skip: true)"), "at": "mlp_out layer 1 at tokens *"},
    "run": {"prompts": "other of p"},
}


def keys(path: Path, family: str = "llama") -> list[str]:
    return [each.folder.name for each in train(path, family)]


def test_dictionary_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    """A different argument needs another training and gives other weights."""

    def declare(**change: str) -> str:
        return fit(**{**BASE, **change})

    def weights(found: mechdsl.TrainedFit) -> dict[str, list[float]]:
        tensors = load_file(found.folder / "sae_weights.safetensors")
        return {name: tensor.tolist() for name, tensor in tensors.items()}

    _, folders = check_keys(
        tmp_path, trains_all, declare, CHANGES, ABLATES, weights, same=["patience"]
    )
    assert keys(write(tmp_path, fit(**BASE), ABLATES), "gpt2")[0] not in {f.name for f in folders}


MADE = (
    "model c = m with { scale weights of L1N3 by 0 }",
    "model c = m with { scale weights of L1N3 by 2 }",
    "model c = m with { scale weights of L1N4 by 2 }",
    "model c = m with { scale weights of L1N4 by 2  scale weights of L0H1 by 2 }",
    "model c = m with { set weights of L1N4 to d }",
    "model c = m with { set weights of L1N4 to 2 * d }",
    "model c = m with { add d to weights of L1N4 }",
    "model c = m with { project out d from weights }",
    "model c = m with { project out other from weights }",
    "model c = rounded(m, bits: 3)",
    "model c = rounded(m, bits: 4)",
    "model q = rounded(m, bits: 3)\nmodel c = m + 0.5 * (q - m)",
    "model q = rounded(m, bits: 3)\nmodel c = m + 0.25 * (q - m)",
    "model q = rounded(m, bits: 4)\nmodel c = m + 0.25 * (q - m)",
)


def test_dictionary_key_depends_on_edits_and_sums_of_models(tmp_path: Path) -> None:
    """Covers edits, their factors and directions, bits, and the factors of sums."""
    directions = (
        "direction d = mean_difference(p, p.other) at resid_post layer 1 at last token",
        "direction other = mean_difference(p, p.other) at resid_post layer 0 at last token",
    )
    own = ABLATES.replace("model m", "model c")
    line = fit(options="steps: 2, batch: 16")
    (found,) = train(write(tmp_path, *directions, MADE[0], line, own))
    folders: dict[Path, str] = {found.folder: MADE[0]}
    for made in MADE[1:]:
        folder = untrained(write(tmp_path, *directions, made, line, own))
        assert folder not in folders, (made, folders[folder])
        folders[folder] = made
    moved = directions[0].replace("last token", "cue token"), directions[1]
    assert untrained(write(tmp_path, *moved, MADE[7], line, own)) not in folders
    (found,) = train(write(tmp_path, *directions, MADE[-1], line, own))
    assert folders[found.folder] == MADE[-1]


def test_dictionary_key_depends_on_the_rows(tmp_path: Path) -> None:
    (before,) = keys(write(tmp_path, fit(**BASE), ABLATES))
    path = write(tmp_path, fit(**BASE), ABLATES)
    data = path.parent / "data.jsonl"
    lines = data.read_text("utf-8").splitlines()
    changed = json.loads(lines[0])
    changed["cue"] = "w31"
    data.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n", "utf-8")
    (found,) = train(path)
    assert found.folder.name != before


@pytest.mark.slow
def test_dictionary_key_ignores_names_comments_and_other_experiments(tmp_path: Path) -> None:
    """The key also ignores whether training rows may be measured."""
    (before,) = keys(write(tmp_path, fit(**BASE), ABLATES))
    renamed = fit(**BASE).replace("basis f", "basis g")
    allowed = fit(options=f"{QUICK}, measure_on_training_rows: true")
    for parts in (
        (renamed, ABLATES.replace("of f", "of g")),
        ("# A comment.\n", fit(**BASE), OTHER, ABLATES),
        (allowed, ABLATES),
        (fit(options="rate: 0.01, batch: 16, steps: 12, seed: 0"), ABLATES),
    ):
        (found,) = train(write(tmp_path, *parts))
        assert (found.folder.name, found.seconds) == (before, 0.0)
        assert run(write(tmp_path, *parts)).complete


def test_damaged_dictionary_weights_are_trained_again(tmp_path: Path) -> None:
    path = write(tmp_path, fit(**BASE), ABLATES)
    (found,) = train(path)
    weights = found.folder / "sae_weights.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:100])
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path)
    train(path)
    assert weights.read_bytes() == before


def test_row_limit_of_a_run_does_not_apply_to_training_rows(tmp_path: Path) -> None:
    path = write(tmp_path, fit(**BASE), ABLATES)
    train(path)
    assert run(path, limit=2).files[0].experiments[0].prompts == 2


# --- files without a training ---------------------------------------------------------------------


def test_missing_training_affects_only_dependent_experiments(tmp_path: Path) -> None:
    path = write(tmp_path, fit(**BASE), ABLATES, OTHER)
    with pytest.warns(mechdsl.MechdslWarning, match="isn't trained"):
        found = run(path).files[0]
    assert [each.name for each in found.experiments] == ["other"]
    assert [each.name for each in found.lost] == ["e"]
    assert "isn't trained for these rows" in found.lost[0].reasons[0].reason
    found = run(path, fit=True).files[0]
    assert {each.name for each in found.experiments} == {"e", "other"}


def test_training_without_a_store_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MECHDSL_STORE", "none")
    path = write(tmp_path, fit(**BASE), ABLATES)
    train(path)
    with pytest.raises(mechdsl.MechdslError, match="the run has no store"):
        run(path, store=False)
    with pytest.raises(mechdsl.MechdslError, match="trainings are kept in a store"):
        mechdsl.fit(path, models("llama"))


def test_copied_trainings_without_an_index_are_a_store(tmp_path: Path) -> None:
    path = write(tmp_path, fit(**BASE), ABLATES)
    (done,) = train(path)
    copy = tmp_path / "copy"
    shutil.copytree(done.folder, copy / FITS_FOLDER / done.folder.name)
    (found,) = run(path, store=copy).files[0].experiments
    assert found.name == "e"
    other = tmp_path / "other"
    (other / FITS_FOLDER).mkdir(parents=True)
    (other / FITS_FOLDER / "data.csv").write_text("1", encoding="utf-8")
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path, store=other)
    assert not (other / ".gitignore").exists()


def test_model_that_cannot_be_loaded_is_reported_once(tmp_path: Path) -> None:
    """`run(fit=True)` loads it for the training, and again for the run."""
    bare("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    path = write(tmp_path, fit(**BASE), ABLATES)
    text = path.read_text("utf-8").replace('local("handed over")', 'local("model")')
    path.write_text(text, encoding="utf-8")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(mechdsl.MechdslError) as found:
            mechdsl.run(path, store=tmp_path / "store", fit=True)
    codes = [each.code for each in found.value.diagnostics if each.severity == "error"]
    assert len(codes) == len({*codes}) > 0
    assert codes[0] not in "".join(str(each.message) for each in warned)


def test_measuring_training_rows_of_a_dictionary_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, fit(**BASE), ABLATES.replace("prompts second", "prompts p"))
    with pytest.raises(mechdsl.MechdslError, match="measures rows that `f` is trained on") as found:
        train(path)
    assert found.value.diagnostics[0].code == "E0345"
    assert "4 of its 4 rows" in str(found.value)
    allowed = fit(options=f"{QUICK}, measure_on_training_rows: true")
    path = write(tmp_path, allowed, ABLATES.replace("prompts second", "prompts p"))
    train(path)
    (done,) = run(path).files[0].experiments
    assert "4 of the 4 rows measured here are training rows" in done.conventions["basis f"]


def test_failed_training_keeps_the_others(tmp_path: Path) -> None:
    inner = f'sae(features: {FEATURES}, kind: "jump_relu", penalty: 1e38)'
    wild = fit(inner, "steps: 200, batch: 16, rate: 0.99")
    two = experiment("ablate feature 0..3 of g at last token with zero", name="o")
    path = write(tmp_path, wild, fit(**BASE).replace("basis f", "basis g"), ABLATES, two)
    with pytest.warns(mechdsl.MechdslWarning, match="finite after"):
        found = train(path)
    assert [each.basis for each in found] == ["g"]
    with pytest.warns(mechdsl.MechdslWarning, match="isn't trained"):
        assert [each.name for each in run(path).files[0].experiments] == ["o"]


def test_validate_accepts_an_untrained_dictionary(tmp_path: Path) -> None:
    path = write(tmp_path, fit(**BASE), ABLATES)
    assert not has_errors(mechdsl.validate(path, models("llama")))


def test_interrupted_dictionary_training_resumes_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C, the next training resumes from the checkpoint and ends with the weights of an
    uninterrupted one."""
    from mechdsl.execute import training

    path = write(tmp_path, fit(**BASE), ABLATES)
    (whole,) = train(path)
    expected = (whole.folder / "sae_weights.safetensors").read_bytes()
    done: list[int] = []
    real = training.Training._step

    def step(self: Any) -> None:
        if len(done) == 7:
            done.append(0)
            raise KeyboardInterrupt
        done.append(self.state.step)
        real(self)

    monkeypatch.setattr(training.Training, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(path, fresh=True)
    done.extend([0] * 10)
    monkeypatch.setattr(training.Training, "_step", real)
    part = whole.folder.with_name(f"{whole.folder.name}.part")
    assert json.loads((part / "state.json").read_text("utf-8"))["step"] == 7
    steps: list[int] = []

    def counted(self: Any) -> None:
        steps.append(self.state.step)
        real(self)

    monkeypatch.setattr(training.Training, "_step", counted)
    (found,) = train(path, fresh=True)
    assert steps == [*range(7, 12)]
    assert (found.folder / "sae_weights.safetensors").read_bytes() == expected
    assert not part.exists()
