"""Features that are 0 before and after a rule: their rows aren't run, and cells with only such rows
are left out of the correction. The reference computes features from their formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.execute.run_record import ExecutionProfile
from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.store.store import Store

from ..execute.support import by_name, run_on, shared
from ..reference.forward import Changes, Write, side_by_side
from .models import bare, double
from .support import BLOCKS, MANY, difference, experiment, plain, records, rows, run_file, tokens
from .test_dictionaries import FEATURES, LAYER, Reference, features_of, make

EVERY = range(FEATURES)
RUNS = ("clean", "other")
HERE = ("gpt2", "llama", "gpt_neox")
BASIS = f'basis f = sae("sae") at resid_post layer {LAYER}\n'


@dataclass(frozen=True)
class Case:
    rule: str
    is_inactive: Callable[[Tensor, Tensor, int], bool]
    """From [token, feature] before the rule, [token, feature] of the other run, and the feature."""
    at: str = "last token"


CASES: dict[str, Case] = {
    "patch": Case(
        "from other into clean  patch feature * of f at last token",
        lambda now, other, i: not (now[:, i].any() or other[:, i].any()),
    ),
    "zero": Case(
        "ablate feature * of f at tokens * with zero",
        lambda now, other, i: not now[:, i].any(),
        "tokens *",
    ),
    "clamp": Case("clamp feature * of f at last token to 3", lambda now, other, i: False),
    "clamp to zero": Case(
        "clamp feature * of f at last token to 0", lambda now, other, i: not now[:, i].any()
    ),
    "scale": Case(
        "scale feature * of f at tokens * by 3",
        lambda now, other, i: not now[:, i].any(),
        "tokens *",
    ),
    "add": Case(
        "for i in 0..11 { add 2 to feature i of f at last token }", lambda now, other, i: False
    ),
    "beside another rule": Case(
        "patch feature * of f at last token with other  ablate mlp_out layer 0 at last token "
        "with zero",
        lambda now, other, i: False,
    ),
}


def sparse(folder: Path, architecture: str, family: str) -> Reference:
    """Lower the bias of the encoder so that features are active on few vectors."""
    made = make(folder, architecture, width_of(family))
    if architecture == "topk":
        return made
    vectors = [plain(family, text)["resid_post", LAYER][:, 0] for run in RUNS for text in rows(run)]
    before = (torch.cat(vectors) - made.b_dec) @ made.w_enc + made.b_enc
    lowered = (made.b_enc - before.quantile(0.93)).float()
    path = folder / "sae" / "sae_weights.safetensors"
    weights = load_file(path)
    weights["b_enc"] = lowered
    save_file(weights, path)
    return replace(made, b_enc=lowered.double())


def inactive_rows(family: str, of: Reference, case: Case) -> np.ndarray:
    """[feature, row]"""
    found = np.zeros((FEATURES, len(rows())), dtype=bool)
    for n in range(len(rows())):
        now = features_of(family, of, "clean", n, case.at)
        other = features_of(family, of, "other", n, "last token")
        found[:, n] = [case.is_inactive(now, other, i) for i in EVERY]
    return found


def width_of(family: str) -> int:
    return int(bare(family).get_input_embeddings().weight.shape[1])


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("family", HERE)
def test_cells_without_an_active_feature_are_marked(
    family: str, architecture: str, mode: str, data: Path
) -> None:
    of = sparse(data, architecture, family)
    names = {key: f"e{number}" for number, key in enumerate(CASES)}
    text = BASIS + "".join(experiment(names[key], case.rule) for key, case in CASES.items())
    found = run_file(text, data, family, mode)
    marked = 0
    for key, case in CASES.items():
        result, expected = found[names[key]], inactive_rows(family, of, case)
        measure = result.measures[0]
        assert measure.inert.tolist() == expected.all(axis=1).tolist(), key
        near = 0 if mode == "planned" else 1e-5
        effects = np.abs(measure.patched - measure.base)
        assert (effects[expected] <= near).all(), key
        assert np.isnan(result.statistics[0].p_corrected[measure.inert]).all()
        is_watched = key not in ("add", "beside another rule")
        said = result.conventions.get("inactive")
        assert (said is not None) == is_watched, key
        if said is not None:
            cells, lines = int(expected.all(axis=1).sum()), int(expected.sum())
            start = f"{cells} of {FEATURES} cells, and {lines:,} of {expected.size:,} rows in all"
            assert said.startswith(start), key
        marked += int(measure.inert.sum())
    assert marked > 0


def ran(
    text: str, folder: Path, store: Path | None, family: str = "gpt2"
) -> tuple[ExperimentResult, int]:
    """The result of one experiment, and the number of rows that ran."""
    profiles: list[ExecutionProfile] = []
    options = RunOptions(on_profile=lambda _, profile: profiles.append(profile))
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{BASIS}{text}'
    source, models = Source(whole, folder / "file.mech"), {"m": shared(bare(family))}
    if store is None:
        found = by_name(*run_on(source, models, options))
    else:
        with Store(store) as kept, kept.begin(whole, {}) as opened:
            found = by_name(*run_on(source, models, options, opened))
            opened.finish({}, {})
    (result,) = found.values()
    return result, sum(profile.distinct for profile in profiles)


def test_rows_without_an_active_feature_are_not_run(data: Path) -> None:
    of = sparse(data, "standard", "gpt2")
    text = experiment("e", CASES["patch"].rule)
    _, count = ran(text, data, None)
    inactive = inactive_rows("gpt2", of, CASES["patch"])
    assert count == int((~inactive).sum()) < inactive.size


def test_activity_is_stored_with_the_values(data: Path) -> None:
    """A second run computes nothing; activity is recomputed for another dictionary."""
    sparse(data, "standard", "gpt2")
    text = experiment("e", CASES["patch"].rule)
    store = data / "store"
    first, _ = ran(text, data, store)
    second, count = ran(text, data, store)
    assert count == 0
    same(first, second)
    path = data / "sae" / "sae_weights.safetensors"
    weights = load_file(path)
    weights["b_enc"] += 20
    save_file(weights, path)
    fresh, _ = ran(text, data, None)
    third, count = ran(text, data, store)
    assert count > 0
    same(fresh, third)
    assert fresh.measures[0].inert.sum() < first.measures[0].inert.sum()


def same(one: ExperimentResult, other: ExperimentResult) -> None:
    assert one.measures[0].inert.tolist() == other.measures[0].inert.tolist()
    assert one.conventions["inactive"] == other.conventions["inactive"]
    np.testing.assert_allclose(one.measures[0].patched, other.measures[0].patched, atol=1e-5)
    np.testing.assert_array_equal(
        np.isnan(one.statistics[0].p_corrected), np.isnan(other.statistics[0].p_corrected)
    )


@pytest.mark.parametrize("fill", ["mean", "resample"])
def test_means_and_donors_of_zero_features_are_inactive(fill: str, data: Path) -> None:
    """A feature that is 0 in all rows has the mean 0, and no donor with another value."""
    of = sparse(data, "standard", "llama")
    text = BASIS + experiment("e", f"ablate feature * of f at last token with {fill}")
    found = run_file(text, data, "llama", "planned")["e"]
    features = np.stack(
        [features_of("llama", of, "clean", n)[0].numpy() for n in range(len(rows()))]
    )
    never = ~(features != 0).any(axis=0)
    assert 0 < never.sum() < FEATURES
    assert found.measures[0].inert.tolist() == never.tolist()


def test_correction_excludes_cells_without_an_active_feature(data: Path) -> None:
    """Holm over the active cells alone gives the same corrected p-values."""
    sparse(data, "standard", "gpt2")
    stats = "stats bootstrap(100) correct holm"
    rule = "ablate feature * of f at tokens * with zero"
    found = run_file(BASIS + experiment("e", rule, stats=stats), data, "gpt2", "planned")["e"]
    statistics, inert = found.statistics[0], found.measures[0].inert
    p = np.sort(statistics.p[~inert])
    assert 0 < len(p) < FEATURES
    holm = np.minimum(1, np.maximum.accumulate(p * np.arange(len(p), 0, -1)))
    np.testing.assert_allclose(np.sort(statistics.p_corrected[~inert]), holm)


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("architecture", ["standard", "topk"])
@pytest.mark.parametrize("family", HERE)
def test_expectations_count_cells_without_an_active_feature_as_zero(
    family: str, architecture: str, mode: str, data: Path
) -> None:
    """`min`, `max` and `mean` are over all cells, of which the inert ones have the effect 0."""
    of = sparse(data, architecture, family)
    lines = [f"expect {name}(delta) < 1000 on mean" for name in ("min", "max", "mean")]
    text = BASIS + experiment("e", CASES["zero"].rule, *lines)
    found = run_file(text, data, family, mode)["e"]
    effects: list[list[float]] = []
    for n, text_of in enumerate(rows()):
        cells: list[Changes] = []
        for i in EVERY:

            def without(x: Tensor, i: int = i) -> Tensor:
                features = of.encode(x)
                kept = features.clone()
                kept[..., i] = 0
                return x + of.decode(kept, x) - of.decode(features, x)

            every = tokens(text_of, "tokens *")
            cells.append(([Write("resid_post", LAYER, without, at) for at in every], ()))
        base = difference(plain(family, text_of).logits, records()[n])
        runs = side_by_side(family, double(family), text_of.ids, cells)
        effects.append([difference(run.logits, records()[n]) - base for run in runs])
    means = np.array(effects).mean(0)
    assert any(found.measures[0].inert) or architecture == "topk"
    values = [outcome.value for outcome in found.outcomes]
    assert values == pytest.approx([means.min(), means.max(), means.mean()], abs=1e-4)
    assert all(outcome.holds for outcome in found.outcomes)
