"""Trainings with several seeds, `fit(…, seeds: 3)`.

They equal trainings with a single seed and share one set of activations. Intervals over seeds and
over prompts are compared with a reference computation. Further tests: the agreement of masks,
printed and stored results, errors.
"""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import stdtrit

import mechdsl
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.console import visible_console
from mechdsl.show.trainings import group_by_seeds, print_trained_fits
from mechdsl.statistics.intervals import seed_half_width

from ..quick import in_turn
from . import test_trained_circuits as circuits
from . import test_trained_coordinate_masks as coordinates
from . import test_trained_lenses as lenses
from . import test_trained_masks as masks
from . import test_trained_position_masks as positions
from . import test_trained_probes as probes
from .test_trained_dictionaries import experiment, models, run, train, write
from .test_trained_rotations import HERE, PATCH, QUICK, SITE, fit, rotation
from .test_trained_vectors import fit as fit_vector

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
SEEDS = f"{QUICK}, seeds: 3"
DICTIONARY = "basis b = fit(sae(features: 8, k: 2), prompts: p, {}) at resid_post layer 1"
RECONSTRUCT = f"set {SITE} at last token to reconstruction of b"
KINDS = {
    "rotation": (fit("{}"), PATCH),
    "vector": (fit_vector("{}"), (f"add 2 * v to {SITE} at last token",)),
    "scales": (fit_vector("{}", inner="scales"), (f"scale {SITE} at last token by v",)),
    "dictionary": (f"{DICTIONARY}\n", (RECONSTRUCT,)),
    "mixture": (
        "basis b = fit(mixture(components: 3), prompts: p, validation: 25%{}) at " + SITE + "\n",
        (RECONSTRUCT,),
    ),
    "sites": (masks.fit("{}"), masks.PATCH),
    "dimensions": (coordinates.fit("{}", at=f"{SITE} dims * at last token"), masks.PATCH),
    "positions": (positions.fit("{}"), positions.PATCH),
    "circuit": (circuits.fit("{}"), circuits.PATCH),
    "lens": (
        lenses.fit("{}"),
        ("observe tuned_lens(l) resid_post layer * at last token",),
    ),
}


QUICK_KINDS = ("rotation", "scales", "dictionary", "mixture", "sites", "lens")
"""One kind for each module that trains."""


def fill(line: str, options: object) -> str:
    """Insert options into a declaration."""
    return line.replace("{}", str(options))


def effects(result: Any) -> np.ndarray[Any, Any]:
    """[cell, prompt] the measure of every prompt."""
    measure = result["e"].measures[0]
    return measure.patched - np.nan_to_num(measure.base)


def one(results: Any) -> ExperimentResult:
    return results["e"]


def t_interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The 95 % interval of a mean by Student's t."""
    far = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - far), float(values.mean() + far)


# --- trainings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "family"), in_turn(tuple(KINDS), HERE, QUICK_KINDS))
def test_cells_of_several_seeds_equal_single_seed_trainings(
    kind: str, family: str, tmp_path: Path
) -> None:
    line, rules = KINDS[kind]
    quick = QUICK.replace("0.05", "0.001") if kind in GENTLE else QUICK
    quick = "" if kind == "mixture" else quick
    lens = "measure logprob(answer) as raw"
    used = experiment(*rules, **({"measure": lens} if kind == "lens" else {}))
    path = write(tmp_path, fill(line, f"{quick}, seed: 4, seeds: 3"), used)
    several = run(path, family, fit=True)
    found = [cell.coords["seed"] for cell in several["e"].cells]
    values = effects(several).reshape(3, len(found) // 3, -1)
    assert found == [seed for seed in (4, 5, 6) for _ in values[0]]
    if kind not in MAY_AGREE:
        assert len({tuple(each.ravel()) for each in values}) == 3
    for number, seed in enumerate((4, 5, 6)):
        path = write(tmp_path, fill(line, f"{quick}, seed: {seed}"), used)
        single = run(path, family)  # uses the stored training
        assert np.allclose(effects(single), values[number], rtol=0, atol=1e-5)


GENTLE = ("dictionary", "lens", "positions", "circuit")
"""Kinds that get worse in a few steps at a higher rate."""

MAY_AGREE = ("sites", "dimensions", "positions", "circuit", "mixture")
"""Kinds that may give the same result for several seeds."""


@pytest.mark.parametrize("inner", ["ridge(penalty: 2)", "logistic(penalty: 1)"])
def test_probes_of_several_seeds_equal_single_seed_probes(inner: str, tmp_path: Path) -> None:
    """Seeds differ in their held-out rows; all share the vectors, which are read once."""
    target = "size" if inner.startswith("ridge") else "kind"
    line = probes.fit(inner, "validation: 25%{}", target=target)
    path = probes.write_file(tmp_path, fill(line, ", seed: 4, seeds: 3"), probes.READS)
    several = run(path, fit=True)["e"]
    values = several.measures[0].patched.reshape(3, -1)
    assert len({tuple(each) for each in values}) == 3
    assert len(several.seed_means) == 6  # one for each layer, also of the shuffled probe
    for number, seed in enumerate((4, 5, 6)):
        path = probes.write_file(tmp_path, fill(line, f", seed: {seed}"), probes.READS)
        single = run(path)["e"]
        assert np.array_equal(single.measures[0].patched.ravel(), values[number])


def test_masks_lenses_and_probes_of_several_seeds_share_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = f"{QUICK}, seeds: {{}}"
    lens_rules = lenses.experiment(KINDS["lens"][1][0], measure="measure logprob(answer) as raw")
    probe = probes.fit(options="validation: 25%, seeds: {}")
    cases = {
        "sites": (masks.fit(quick.replace("6,", "0,", 1)), masks.PATCHES, write),
        "lens": (lenses.fit(quick), lens_rules, write),
        "probe": (probe, probes.READS, probes.write_file),
    }
    train(
        write(tmp_path, fill(cases["sites"][0], 2), masks.PATCHES), fresh=True
    )  # checks the model
    for kind, (line, used, make) in cases.items():
        counts = [
            count_passes(make(tmp_path, fill(line, each), used), monkeypatch) for each in (2, 3, 4)
        ]
        further = counts[1] - counts[0]
        assert counts[2] - counts[1] == further, kind
        assert counts[0] > 2 * further, kind  # the first one reads the activations
        assert (further == 0) == (kind == "probe"), (
            kind
        )  # the other kinds run the model in steps and reports


@pytest.mark.slow
def test_agreement_of_masks_over_seeds_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, masks.fit(f"{QUICK}, seeds: 3"), masks.PATCHES)
    fits = train(path)
    assert [each.basis for each in fits] == ["g[seed 0]", "g[seed 1]", "g[seed 2]"]
    sets = [set(each.report.chosen) for each in fits]  # pyright: ignore
    pairs = [(0, 1), (0, 2), (1, 2)]
    jaccard = np.mean([len(sets[i] & sets[k]) / len(sets[i] | sets[k]) for i, k in pairs])
    every = list(itertools.combinations(range(12), 3))
    chance = np.mean([len(set(own) & {0, 1, 2}) / len(set(own) | {0, 1, 2}) for own in every])
    (group,) = group_by_seeds(fits)
    found = json.loads(json.dumps(group.to_dict()))["agreement"]
    assert np.isclose(found["jaccard"], jaccard)
    assert np.isclose(found["chance"], chance)
    shared, used = set.intersection(*sets), set.union(*sets)
    assert (found["shared"], found["used"]) == (len(shared), len(used))
    said = f"{len(shared)} of 3 sites are chosen with all 3 seeds, and {len(used)} with at least"
    assert said in one(run(path)).conventions["agreement of g"]
    out = io.StringIO()
    print_trained_fits(fits, visible_console(file=out, width=200))
    assert said in out.getvalue()


@pytest.mark.slow
def test_trainings_of_different_kinds_share_one_seed_axis(tmp_path: Path) -> None:
    """A mask and a rotation have equal seeds; each cell uses both with the same seed."""
    rules = (*masks.PATCH, f"patch {SITE} in basis d at right token")
    of_seeds = f"{QUICK}, seeds: 2"
    path = write(tmp_path, fit(of_seeds), masks.fit(of_seeds), experiment(*rules))
    several = run(path, fit=True)
    assert [cell.coords["seed"] for cell in several["e"].cells] == [0, 1]
    for seed in range(2):
        parts = fit(f"{QUICK}, seed: {seed}"), masks.fit(f"{QUICK}, seed: {seed}")
        single = run(write(tmp_path, *parts, experiment(*rules)))
        assert np.allclose(effects(single)[0], effects(several)[seed], rtol=0, atol=1e-5)


def test_masks_of_several_seeds_work_in_generation_and_sweeps(tmp_path: Path) -> None:
    line = masks.fit(f"{QUICK}, {{}}")
    rules = (
        "from turned into clean",
        "for c in [0, 2] { scale g at last token by c }",
        "generate 3",
    )
    used = experiment(*rules, measure="measure length as raw")
    run_of = experiment("run r { ablate g at last token with zero }", "from r into clean",
                        f"patch {SITE} at last token", name="f")  # fmt: skip
    several = run(write(tmp_path, fill(line, "seeds: 2"), used, run_of), fit=True)
    assert [tuple(c.coords.values()) for c in several["e"].cells] == [
        (0, 0), (0, 2), (1, 0), (1, 2)
    ]  # fmt: skip
    for seed in range(2):
        single = run(write(tmp_path, fill(line, f"seed: {seed}"), used, run_of))
        cells = slice(2 * seed, 2 * seed + 2)
        own = several["e"].measures[0].patched[cells]
        assert np.array_equal(single["e"].measures[0].patched, own)
        derived = several["f"].measures[0].patched[seed]
        assert np.allclose(single["f"].measures[0].patched[0], derived, atol=1e-5)


def count_passes(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Number of passes that begin with embeddings, during new trainings."""
    passes: list[int] = []
    real = torch.nn.functional.embedding

    def embedding(*values: Any, **options: Any) -> torch.Tensor:
        passes.append(1)
        return real(*values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", embedding)
        train(path, fresh=True)
    return len(passes)


def test_dictionaries_of_several_seeds_and_sizes_share_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (
        DICTIONARY.format(QUICK).replace("basis b", "basis c").replace("features: 8", "features: 6")
    )
    other = experiment(RECONSTRUCT.replace("of b", "of c"), name="f")
    single = write(tmp_path, DICTIONARY.format(QUICK), experiment(RECONSTRUCT))
    alone = count_passes(single, monkeypatch)
    assert alone > 0
    path = write(tmp_path, DICTIONARY.format(SEEDS), more, experiment(RECONSTRUCT), other)
    assert count_passes(path, monkeypatch) == alone


def test_rotations_of_several_seeds_share_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each further seed runs passes only for its steps and report, not for activations."""
    none = "steps: 0, batch: 4, validation: 25%"
    counts = [
        count_passes(write(tmp_path, fit(each), experiment(*PATCH)), monkeypatch)
        for each in (none, f"{none}, seeds: 2", f"{none}, seeds: 3")
    ]
    first, further = counts[0], counts[1] - counts[0]
    assert counts[2] - counts[1] == further
    assert first == further + 2  # activations of the clean run and of the source run


# --- intervals ------------------------------------------------------------------------------------


FRUIT = """mech 1
model toy = zoo("counting")
prompts fruit {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  split 60%
  corrupt fewer { count = count - 1 }
}
basis d = fit(das(dims: 4), prompts: fruit.train, limit: 32, from: fewer,
  maximise: logprob(answer of fewer), steps: 0, seeds: 3) at resid_post layer 3 at last token
experiment e {
  model toy
  prompts fruit.test limit 16
  from fewer into clean
  patch resid_post layer 3 in basis d at last token
  measure logprob(answer of fewer) as delta
  measure logit(answer of fewer) - logit(answer) as recovery
}
"""


def test_seed_intervals_equal_a_reference_computation(tmp_path: Path) -> None:
    text = FRUIT.replace("seeds: 3", "seeds: 5")
    averaged = text.replace("as delta", "as delta mean over seed")
    averaged = averaged.replace("as recovery", "as recovery mean over seed")
    result = one(mechdsl.run(text, store=tmp_path, fit=True))
    over = one(mechdsl.run(averaged, store=tmp_path))
    assert [mean.measure for mean in result.seed_means] == [0, 1]
    assert len(over.cells) == 1
    for mean, same in zip(result.seed_means, over.seed_means, strict=True):
        single = result.statistics[mean.measure].mean
        low, high = t_interval(single)
        assert np.allclose([mean.mean, mean.low, mean.high], [single.mean(), low, high])
        assert mean.values == tuple(single)
        assert same == mean
        rows = over.statistics[mean.measure]
        assert np.isclose(rows.mean[0], mean.mean)
        assert (rows.low[0], rows.high[0], rows.n[0]) == (mean.row_low, mean.row_high, mean.n)
    first = result.measures[0]
    per_row = (first.patched - first.base).mean(axis=0)
    by_hand = t_interval(per_row)
    found = result.seed_means[0].row_low, result.seed_means[0].row_high
    assert np.allclose(found, by_hand, atol=0.3 * (by_hand[1] - by_hand[0]))  # skewness


@pytest.mark.parametrize("values", [[0.5] * 5, [0.5, 0.6, 0.7, 0.6]])
def test_equal_or_few_values_over_seeds_have_no_interval(values: list[float]) -> None:
    assert np.isnan(seed_half_width(np.array(values), 95))


@pytest.mark.slow
def test_loop_over_seeded_bases_has_a_mean_per_basis(tmp_path: Path) -> None:
    chance = fit(f"{SEEDS}, steps: 0".replace("steps: 6, ", "")).replace("basis d", "basis c")
    rule = f"for b in [d, c] {{ patch {SITE} in basis b at last token }}"
    path = write(tmp_path, fit(SEEDS), chance, experiment(PATCH[0], rule))
    result = one(run(path, fit=True))
    assert result.axes == ("b", "seed")
    assert [mean.cell.coords["b"] for mean in result.seed_means] == ["d", "c"]
    values = result.statistics[0].mean
    assert np.allclose([m.mean for m in result.seed_means], values.reshape(2, 3).mean(axis=1))


# --- printed and stored results -------------------------------------------------------------------


@pytest.mark.slow
def test_seed_means_are_printed_and_stored(tmp_path: Path) -> None:
    results = mechdsl.run(FRUIT, store=tmp_path, fit=True)
    mean, _ = one(results).seed_means
    again = mechdsl.run(FRUIT, store=tmp_path)
    assert repr(one(again).seed_means) == repr(one(results).seed_means)  # ends may be nan
    for text in (one(results).to_text(160), one(results)._repr_html_()):  # pyright: ignore
        assert "means over seeds" in text
        assert "by seed" in text
        assert "95 % over seeds" not in text
        assert "95 % over prompts" in text
    (document,) = results.to_dict()["files"][0]["experiments"]
    assert document["seed_means"][:1] == [
        {
            "coords": {}, "site": one(results).cells[0].site, "label": mean_label(results),
            "effect": "delta", "seeds": 3, "values": list(mean.values), "mean": mean.mean,
            "low": None, "high": None, "row_low": mean.row_low, "row_high": mean.row_high,
            "n": mean.n,
        }
    ]  # fmt: skip
    assert one(results).conventions["seeds of trainings"].startswith("0, 1, 2; ")


def mean_label(results: Any) -> str:
    return one(results).measures[0].label


def test_fit_results_of_several_seeds_have_a_mean_report(tmp_path: Path) -> None:
    five = fit(f"{QUICK}, seeds: 5")
    fits = train(write(tmp_path, five, experiment(*PATCH)))
    assert [each.basis for each in fits] == [f"d[seed {n}]" for n in range(5)]
    assert len({tuple(rotation(each).flatten().tolist()) for each in fits}) == 5
    (group,) = group_by_seeds(fits)
    values = np.array([each.report.trained for each in fits])  # pyright: ignore
    low, high = t_interval(values)
    said = json.loads(json.dumps(group.to_dict()))
    assert (said["basis"], said["seeds"]) == ("d", [0, 1, 2, 3, 4])
    ends = [said[name]["trained"] for name in ("mean", "low", "high")]
    assert np.allclose(ends, [values.mean(), low, high])


# --- errors ---------------------------------------------------------------------------------------

ABLATE = "ablate g at last token with zero"
MASK_3 = masks.fit(f"{QUICK}, seeds: 3")
EXPECTS = "measure logit(answer) as delta\n  expect auroc(delta, g) > 0"
MASK = "group g = fit(mask(size: 1), prompts: p, from: other, maximise: logit(wrong), seeds: 2) at layers * heads * at last token\n"  # noqa: E501
OTHER_SEEDS = fit(f"{QUICK}, seeds: 2").replace("basis d", "basis c")
OTHER_SITE = "mlp_out layer 0 at last token"
FAILS = {
    "one": (fit(f"{QUICK}, seeds: 1"), PATCH, "E0342", "a whole number from 2 to 100"),
    "different seeds": (
        MASK + fit(SEEDS),
        (*PATCH, ABLATE),
        "E0342",
        "`d` and `g` are used together, with different seeds",
    ),
    "loop named seed": (
        MASK,
        (f"for seed in [5, 6] {{ scale {OTHER_SITE} by seed }}", ABLATE),
        "E0342",
        "another axis `seed`",
    ),
    "save": (
        MASK,
        (ABLATE, f'save {SITE} at last token to "x.safetensors"'),
        "E0108",
        "which has several seeds",
    ),
    "expected group": (
        MASK_3,
        ("from turned into clean", "patch layer * head * at last token", EXPECTS),
        "E0207",
        "has other sites for each seed",
    ),
    "loop": (
        fit(SEEDS) + OTHER_SEEDS,
        (PATCH[0], f"for b in [d, c] {{ patch {SITE} in basis b at last token }}"),
        "E0342",
        "different seeds",
    ),
    "axis": (
        fit(SEEDS),
        (PATCH[0], "for seed in [5, 6] {", f"scale {OTHER_SITE} by seed", PATCH[1], "}"),
        "E0342",
        "another axis `seed`",
    ),
    "span": (
        fit_vector(SEEDS) + f"basis s = directions(v) at {SITE}\n",
        (PATCH[0], f"patch {SITE} in basis s at last token"),
        "E0342",
        "for each of 3 seeds",
    ),
    "observed": (
        DICTIONARY.format(SEEDS) + "\n",
        ("observe features of b at last token",),
        "E0342",
        "for each of 3 seeds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILS)
def test_unsupported_seeds_option_is_rejected(name: str, tmp_path: Path) -> None:
    line, rules, code, reason = FAILS[name]
    path = write(tmp_path, line, experiment(*rules))
    found = mechdsl.validate(path, models=models())
    assert code in [each.code for each in found]
    assert any(reason in f"{each.message} {each.label_text}" for each in found), found
