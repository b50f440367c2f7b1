"""Observations over all rows, against vectors of single prompts and reference fits in loops."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mechdsl.base.hashing import digest
from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.observation.weights import score_composition, score_copying
from mechdsl.forward.hooks.weight_maps import WeightMaps
from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.rules.observations import rows as over_rows

from ..execute.support import MODES, ids_of, run_file, shared, try_file
from ..reference.forward import Write, forward
from ..reference.r_squared import r_squared_contributions
from .models import bare, double

Array = NDArray[np.float64]
FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2")
PROMPTS = """
prompts p {
  rows "many.jsonl"
  template "{left} w40 {right} w41"
  answer " {a}"
  corrupt turned { right = turn }
  corrupt moved { left = turn }
}
"""


def _records() -> list[dict[str, Any]]:
    """26 prompts of different lengths; three share a prefix with another, and two are equal."""
    draw = random.Random(4)
    found: list[dict[str, Any]] = []
    for n in range(26):
        left = [f"w{draw.randrange(20)}" for _ in range(draw.randint(1, 3))]
        right = [f"w{draw.randrange(20, 38)}" for _ in range(draw.randint(1, 2))]
        turn = [f"w{20 + (int(word[1:]) - 19) % 18}" for word in right]
        size = sum(int(word[1:]) for word in left) + 0.25 * n
        kind = ("low", "mid", "high")[min(2, int(left[-1][1:]) // 7)]
        pair = [int(left[0][1:]) / 3, int(right[-1][1:]) / 2, 1.0]
        found.append(
            {"left": left, "right": right, "turn": turn, "size": size, "kind": kind, "pair": pair}
        )
    for n, of in ((5, 1), (9, 2), (20, 11)):
        found[n]["left"] = found[of]["left"]
    found[25] = dict(found[3])
    return found


RECORDS = _records()
SEED = 3


def words(record: dict[str, Any], run: str = "clean") -> list[str]:
    return [*record["left"], "w40", *record["right" if run == "clean" else "turn"], "w41"]


def hits(record: dict[str, Any], position: str) -> list[int]:
    """The indices of a position's tokens; the first token of each prompt is `<s>`."""
    n, m = len(record["left"]), len(record["right"])
    of = {
        "left token": [n],
        "left tokens": [*range(1, n + 1)],
        "right tokens": [*range(n + 2, n + 2 + m)],
        "last token": [n + m + 2],
    }
    return of[position]


@cache
def _seen(name: str, text: tuple[str, ...]) -> Any:
    return forward(name, double(name), ids_of(text))


def vectors(name: str, site: str, layer: int, position: str, run: str = "clean") -> Array:
    """[row, width] the mean over the tokens of a position, all units concatenated."""
    found: list[Array] = []
    for record in RECORDS:
        own = _seen(name, tuple(words(record, run)))[site, layer]
        found.append(own[hits(record, position)].flatten(1).mean(0).detach().numpy())
    return np.array(found)


def keys(position: str, *others: str, run: str = "clean") -> list[bytes]:
    """The visible tokens of each row: those up to the last token of these positions."""
    found: list[bytes] = []
    for record in RECORDS:
        at = [hits(record, each) for each in (position, *others)]
        ids = tuple(ids_of(words(record, run)))[: max(map(max, at)) + 1]
        found.append(digest(ids, [(tuple(own),) for own in at], None))
    return found


def write(folder: Path) -> None:
    lines = [
        json.dumps(
            {
                **{name: " ".join(record[name]) for name in ("left", "right", "turn")},
                **{name: record[name] for name in ("size", "kind", "pair")},
                "a": "w7",
            }
        )
        for record in RECORDS
    ]
    (folder / "many.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(
    folder: Path, name: str, *lines: str, options: RunOptions | None = None
) -> ExperimentResult:
    write(folder)
    body = "\n".join(f"  {line}" for line in ("model m", "prompts p", *lines))
    text = f"seed {SEED}\nexperiment e {{\n{body}\n}}\n"
    results = run_file(text, folder, bare(name), options, prompts=PROMPTS)
    return next(iter(results.values()))


# --- probes ---------------------------------------------------------------------------------------


def dealt(position: str, n: int, strata: list[str] | None = None) -> Array:
    """[row] the fold; distinct rows are assigned to folds in turn."""
    own = keys(position)
    first: dict[bytes, str] = {}
    for key, stratum in zip(own, strata or [""] * len(own), strict=True):
        first[key] = min(first.get(key, stratum), stratum)
    order = sorted(first, key=lambda key: (first[key], digest("fold", SEED, key), key))
    return np.array([order.index(key) % n for key in own])


def dealt_values(position: str, values: Array) -> Array:
    """Permute the values between the distinct ones of the first `len(values)` rows."""
    own = keys(position)[: len(values)]
    distinct = sorted(dict.fromkeys(own))
    order = sorted(distinct, key=lambda key: (digest("shuffle", SEED, key), key))
    gets = dict(zip(distinct, order, strict=True))
    least = {
        key: min(v.tolist() for k, v in zip(own, values, strict=True) if k == key) for key in own
    }
    return np.array([least[gets[key]] for key in own])


def scaled(x: Array, held: Array) -> Array:
    at, by = x[~held].mean(axis=0), x[~held].std(axis=0)
    return (x - at) / by


def ridge_told(x: Array, y: Array, fold: Array, penalty: float) -> Array:
    """[row] R² and the influence of the row on it, by the normal equations."""
    got = np.empty_like(y)
    for each in np.unique(fold):
        held = fold == each
        own = scaled(x, held)
        at, to = own[~held].mean(axis=0), y[~held].mean(axis=0)
        gram = (own[~held] - at).T @ (own[~held] - at) + penalty * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, (own[~held] - at).T @ (y[~held] - to))
        got[held] = (own[held] - at) @ weights + to
    return r_squared_contributions(y, got)


def classes_told(x: Array, y: Array, fold: Array, penalty: float) -> Array:
    """[row] whether the class is right, by steps of torch's own L-BFGS in 64 bits."""
    right = np.zeros(len(y))
    count = int(y.max()) + 1
    for each in np.unique(fold):
        held = fold == each
        own = torch.from_numpy(scaled(x, held))
        weights, free = descended(own[~held], torch.from_numpy(y[~held]), count, penalty)
        right[held] = ((own[held] @ weights + free).argmax(1).numpy() == y[held]).astype(float)
    return right


def descended(x: Any, y: Any, count: int, penalty: float) -> tuple[Any, Any]:
    """Weights and intercepts of a logistic regression."""
    weights = torch.zeros(x.shape[1], count, dtype=torch.float64, requires_grad=True)
    free = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    steps = torch.optim.LBFGS([weights, free], max_iter=500, tolerance_grad=1e-9)

    def loss() -> Any:
        steps.zero_grad()
        whole = torch.nn.functional.cross_entropy(x @ weights + free, y, reduction="sum")
        whole = whole + penalty / 2 * (weights**2).sum()
        whole.backward()
        return whole

    steps.step(loss)
    return weights, free


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        *((name, "planned") for name in FAMILIES),
        *(("llama", each) for each in list(MODES)[2:]),
        ("gpt2", "plain"),
    ],
)
def test_ridge_probe_of_a_number_equals_the_reference(
    tmp_path: Path, name: str, passes: str
) -> None:
    found = run(
        tmp_path,
        name,
        "observe probe(size, folds: 4, penalty: 2) at resid_post layer * at left token",
        options=MODES[passes],
    )
    y = np.array([[record["size"]] for record in RECORDS])
    fold = dealt("left token", 4)
    for layer in range(3):
        x = vectors(name, "resid_post", layer, "left token")
        told = ridge_told(x, y, fold, 2.0)
        np.testing.assert_allclose(found.measures[0].patched[layer], told, atol=2e-3)
        control = ridge_told(x, dealt_values("left token", y), fold, 2.0)
        np.testing.assert_allclose(found.measures[1].patched[layer], control, atol=2e-3)
        assert np.abs(told - control).max() > 0.1
    assert [measure.label for measure in found.measures] == ["probe", "probe shuffled"]
    assert found.measures[0].unit == "R²"


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_logistic_probe_of_classes_equals_the_reference(tmp_path: Path, name: str) -> None:
    found = run(
        tmp_path,
        name,
        "observe probe(kind, penalty: 0.5) at layer 1 head 0..2 at last token as told",
    )
    names = [record["kind"] for record in RECORDS]
    y = np.array([sorted(set(names)).index(each) for each in names])
    fold = dealt("last token", 5, [str(float(each)) for each in y])
    for head in range(3):
        x = np.array(
            [
                _seen(name, tuple(words(record)))["z", 1][hits(record, "last token")[0], head]
                .detach()
                .numpy()
                for record in RECORDS
            ]
        )
        told = classes_told(x, y, fold, 0.5)
        assert found.measures[0].patched[head].tolist() == told.tolist()
        control = classes_told(x, dealt_values("last token", y), fold, 0.5)
        assert found.measures[1].patched[head].tolist() == control.tolist()
    assert [measure.label for measure in found.measures] == ["told", "told shuffled"]
    assert found.measures[0].unit == "share"


def test_probe_of_several_numbers_on_joined_tokens_equals_the_reference(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        "llama",
        "observe probe(pair, folds: 3, penalty: 1) at attn_out layers 0..1 of turned "
        "at right tokens",
    )
    parts = [vectors("llama", "attn_out", layer, "right tokens", "turned") for layer in (0, 1)]
    y = np.array([record["pair"] for record in RECORDS])
    own = keys("right tokens", run="turned")
    order = sorted(set(own), key=lambda key: ("''", digest("fold", SEED, key), key))
    fold = np.array([order.index(key) % 3 for key in own])
    told = ridge_told(np.hstack(parts), y, fold, 1.0)
    np.testing.assert_allclose(found.measures[0].patched[0], told, atol=2e-3)


OTHERS = """
prompts q {
  rows "others.jsonl"
  template "{left} w40 {right} w41"
  answer " {a}"
  corrupt turned { right = turn }
}
"""


def trained(
    folder: Path, name: str, line: str, *, fitted: int = 16, answers: str = "w7"
) -> ExperimentResult:
    """A probe of the last records, fitted on the first ones."""
    write(folder)
    lines = (folder / "many.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "others.jsonl").write_text("\n".join(lines[:fitted]) + "\n", encoding="utf-8")
    (folder / "many.jsonl").write_text("\n".join(lines[16:25]) + "\n", encoding="utf-8")
    text = f"seed {SEED}\nexperiment e {{\n  model m\n  prompts p\n  {line}\n}}\n"
    results = run_file(text, folder, bare(name), None, prompts=PROMPTS + OTHERS)
    return next(iter(results.values()))


def fitted_once(x: Array, y: Array, penalty: float, weights: Array) -> Array:
    """[row of the last nine] R² by a fit to the first sixteen, whose values are `weights`."""
    at, by = x[:16].mean(axis=0), x[:16].std(axis=0)
    own, to = (x - at) / by, weights.mean(axis=0)
    gram = own[:16].T @ own[:16] + penalty * np.eye(x.shape[1])
    got = own[16:25] @ np.linalg.solve(gram, own[:16].T @ (weights - to)) + to
    return r_squared_contributions(y[16:25], got)


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_probe_with_train_rows_equals_the_reference(tmp_path: Path, name: str) -> None:
    line = "observe probe(size, train: q, penalty: 2) at resid_post layer * at left token as told"
    found = trained(tmp_path, name, line)
    y = np.array([[record["size"]] for record in RECORDS])
    dealt_out = dealt_values("left token", y[:16])
    for layer in range(3):
        x = vectors(name, "resid_post", layer, "left token")
        told = fitted_once(x, y, 2.0, y[:16])
        np.testing.assert_allclose(found.measures[0].patched[layer], told, rtol=2e-3, atol=5e-3)
        control = fitted_once(x, y, 2.0, dealt_out)
        np.testing.assert_allclose(found.measures[1].patched[layer], control, rtol=2e-3, atol=5e-3)
    said = found.conventions["observed"]
    assert "R² on rows not used for fitting" in said
    assert "fitted on `q` (16 rows)" in said
    assert "folds" not in said.replace("penalty chosen on folds", "")


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_class_probe_with_a_train_run_equals_the_reference(tmp_path: Path, name: str) -> None:
    line = "observe probe(kind, train: q.turned, penalty: 0.5) at resid_post layer 1 at last token"
    found = trained(tmp_path, name, line)
    x = vectors(name, "resid_post", 1, "last token")
    other = vectors(name, "resid_post", 1, "last token", "turned")[:16]
    names = [record["kind"] for record in RECORDS]
    y = np.array([sorted(set(names)).index(each) for each in names])
    at, by = other.mean(axis=0), other.std(axis=0)
    weights, free = descended(torch.from_numpy((other - at) / by), torch.from_numpy(y[:16]), 3, 0.5)
    scores = torch.from_numpy((x[16:25] - at) / by) @ weights + free
    right = (scores.argmax(1).numpy() == y[16:25]).astype(float)
    assert found.measures[0].patched[0].tolist() == right.tolist()


def test_probe_evaluated_on_its_train_rows_is_an_error(tmp_path: Path) -> None:
    line = "observe probe(size, train: q) at resid_post layer 1 at last token"
    with pytest.raises(AssertionError, match="is evaluated on 2 rows that it is fitted on"):
        trained(tmp_path, "gpt2", line, fitted=18)
    said = PROMPTS.replace("prompts p", "prompts q").replace('answer " {a}"', 'answer " w9"')
    write(tmp_path)
    text = f"experiment e {{ model m prompts p {line} }}"  # whose texts are the same
    result, diagnostics = try_file(text, tmp_path, bare("gpt2"), prompts=PROMPTS + said)
    assert result is None
    assert "is evaluated on 26 rows" in render_full(diagnostics, color=False, width=200)


# --- ranks, CKA and similarities ------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_ranks_over_rows_equal_the_reference(tmp_path: Path, name: str) -> None:
    found = run(tmp_path, name, "observe effective_rank resid_post layer * at left tokens")
    count = run(tmp_path, name, "observe rank resid_post layer * at left token")
    for layer in range(3):
        x = vectors(name, "resid_post", layer, "left tokens")
        values = np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(x.T)), 0))
        shares = values[values > values.max() * 1e-5] / values[values > values.max() * 1e-5].sum()
        wanted = np.exp(-(shares * np.log(shares)).sum())
        np.testing.assert_allclose(found.measures[0].patched[layer], wanted, rtol=1e-3)
        # `left token` has at most 22 distinct contexts, and vectors have 20 to 24 dimensions.
        x = vectors(name, "resid_post", layer, "left token")
        own = np.linalg.matrix_rank(x - x.mean(0), tol=1e-4 * np.linalg.norm(x, 2))
        assert (count.measures[0].patched[layer] == own).all()
    statistics = found.statistics[0]
    assert np.isnan(statistics.low).all()
    assert np.isfinite(statistics.mean).all()
    assert statistics.reasons[0] is not None
    assert "one number of all rows: no interval" in statistics.reasons[0]


def u_centred(x: Array) -> Array:
    """Inner products of such matrices are the unbiased HSIC (Székely and Rizzo 2014)."""
    x = x - x.mean(axis=0)
    k = x @ x.T
    np.fill_diagonal(k, 0)
    n = len(k)
    rows = k.sum(axis=1) / (n - 2)
    k = k - rows[:, None] - rows[None] + k.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(k, 0)
    return k


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_cka_of_two_sites_equals_the_reference(tmp_path: Path, name: str) -> None:
    found = run(
        tmp_path, name, "observe cka resid_post layer 0..1 with attn_out layer 1..2 at left tokens"
    )
    assert found.axes == ("layer", "to_layer")
    own = keys("left tokens")
    first = [own.index(key) for key in dict.fromkeys(own)]
    assert len(first) < len(own)

    def centred(site: str, layer: int) -> Array:
        return u_centred(vectors(name, site, layer, "left tokens")[first])

    for cell in found.cells:
        a = centred("resid_post", int(cell.coords["layer"]))
        b = centred("attn_out", int(cell.coords["to_layer"]))
        wanted = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        values = found.measures[0].patched[found.cells.index(cell)]
        np.testing.assert_allclose(values.mean(), wanted, atol=1e-4)
        assert values.std() > 0.01
        for one, other in ((1, 5), (3, 25)):
            assert values[one] == values[other]


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_similarity_within_and_between_positions_equals_the_reference(
    tmp_path: Path, name: str
) -> None:
    within = run(tmp_path, name, "observe similarity resid_post layer * at left tokens")
    between = run(
        tmp_path, name, "observe similarity z layer * at right tokens with {left token, last token}"
    )

    def cosine(a: Any, b: Any) -> float:
        a, b = a.flatten(), b.flatten()
        return float(a @ b / a.norm() / b.norm())

    for layer in range(3):
        for row, record in enumerate(RECORDS):
            seen = _seen(name, tuple(words(record)))
            at = hits(record, "left tokens")
            pairs = [(a, b) for a in at for b in at if a != b]
            got = within.measures[0].patched[layer, row]
            if not pairs:
                assert np.isnan(got)
            else:
                own = seen["resid_post", layer]
                wanted = np.mean([cosine(own[a], own[b]) for a, b in pairs])
                assert abs(got - wanted) < 1e-4
            own = seen["z", layer]
            ends = [*hits(record, "left token"), *hits(record, "last token")]
            wanted = np.mean(
                [cosine(own[a], own[b]) for a in hits(record, "right tokens") for b in ends]
            )
            assert abs(between.measures[0].patched[layer, row] - wanted) < 1e-4
    assert within.statistics[0].n[0] == sum(len(record["left"]) > 1 for record in RECORDS)


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_rank_correlation_of_two_positions_equals_the_reference(tmp_path: Path, name: str) -> None:
    line = "observe rank_correlation(4) logits at left token with last token"
    (got,) = run(tmp_path, name, line).measures[0].patched
    for row, record in enumerate(RECORDS):
        logits = _seen(name, tuple(words(record)))["logits", None].detach()
        ends = [logits[hits(record, each)[0]].flatten() for each in ("left token", "last token")]
        tops = [set(each.topk(4).indices.tolist()) for each in ends]
        union = sorted(tops[0] | tops[1])
        ranks = [sorted(union, key=lambda t, of=of: float(of[t])) for of in ends]
        n = len(union)
        gaps = sum((ranks[0].index(t) - ranks[1].index(t)) ** 2 for t in union)
        assert got[row] == pytest.approx(1 - 6 * gaps / (n * (n * n - 1)), abs=1e-6)
    assert len(set(np.round(got, 6).tolist())) > 5


# --- weights --------------------------------------------------------------------------------------


def test_copying_scores_in_a_table_equal_the_weight_maps(tmp_path: Path) -> None:
    """The scores are compared with full matrices in test_observed_weights."""
    maps = WeightMaps(shared(bare("llama")))
    found = run(tmp_path, "llama", "observe copying layer * head 1..2")
    for cell, values in zip(found.cells, found.measures[0].patched, strict=True):
        with torch.no_grad():
            wanted = score_copying(maps, int(cell.coords["layer"]), int(cell.coords["head"]))
        np.testing.assert_allclose(values, wanted, atol=1e-6)
    assert np.isnan(found.statistics[0].low).all()
    assert np.isnan(found.statistics[0].p).all()
    assert found.conventions["interval"] == "a number of weights or circuits alone: no interval"


def test_composition_pairs_heads_with_later_heads_only(tmp_path: Path) -> None:
    maps = WeightMaps(shared(bare("gpt2")))
    found = run(tmp_path, "gpt2", "observe composition(v) at layer * head 0 with layer * head 3")
    assert found.axes == ("layer", "to_layer")
    pairs = [(cell.coords["layer"], cell.coords["to_layer"]) for cell in found.cells]
    assert pairs == [(0, 1), (0, 2), (1, 2)]
    assert found.cells[0].site == "L0H0.z ~ L1H3.z"
    for (one, other), values in zip(pairs, found.measures[0].patched, strict=True):
        with torch.no_grad():
            wanted = score_composition(maps, "v", (int(one), 0), (int(other), 3))
        np.testing.assert_allclose(values, wanted, atol=1e-6)


def test_sites_ranked_by_weights_alone_give_no_selection_warning(tmp_path: Path) -> None:
    """There is no warning about sites that are tested on the rows that selected them."""
    write(tmp_path)
    text = """
experiment found { model m prompts p observe copying layer * head * as copies }
experiment ranks { model m prompts p observe similarity layer 0 head 0..1 at left tokens as alike }
experiment then {
  model m prompts p ablate top 2 of copies at last token with zero measure entropy as delta
}
experiment says { model m prompts p observe value_vectors layer 1 neuron * toward answer as raised }
experiment last {
  model m prompts p ablate top 1 of raised at last token with zero measure entropy as delta
}
experiment also {
  model m prompts p ablate top 1 of alike at last token with zero measure entropy as delta
}
"""
    result, diagnostics = try_file(text, tmp_path, bare("gpt2"), prompts=PROMPTS)
    assert result is not None
    said = [found for found in diagnostics if found.code == "W0721"]
    picked = {found.span.written for found in said if found.span is not None}
    assert picked == {"top 1 of alike", "top 1 of raised"}  # they depend on the rows


def test_weight_score_without_a_linear_map_has_no_value(tmp_path: Path) -> None:
    """Queries have a norm after their projection."""
    found = run(tmp_path, "qwen3", "observe matching L1H0")
    assert np.isnan(found.measures[0].patched).all()
    assert "of layer 1 isn't the output of a linear map of the stream" in (
        found.statistics[0].reasons[0] or ""
    )


# --- two sites, two runs, derived runs ------------------------------------------------------------


def cosines(one: Array, other: Array) -> Array:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / lengths


@pytest.mark.parametrize("name", FAMILIES)
def test_similarity_of_two_sites_at_one_token_equals_the_reference(
    tmp_path: Path, name: str
) -> None:
    line = "observe similarity resid_post layer 0..1 with attn_out layer * at left token as alike"
    found = run(tmp_path, name, line)
    assert found.axes == ("layer", "to_layer")
    for cell, values in zip(found.cells, found.measures[0].patched, strict=True):
        one = vectors(name, "resid_post", int(cell.coords["layer"]), "left token")
        other = vectors(name, "attn_out", int(cell.coords["to_layer"]), "left token")
        np.testing.assert_allclose(values, cosines(one, other), atol=1e-4)
    assert found.measures[0].patched.std() > 0.05


@pytest.mark.parametrize(
    ("name", "passes"), [*((name, "planned") for name in FAMILIES[:3]), ("llama", "plain")]
)
def test_cka_of_two_runs_equals_the_reference(tmp_path: Path, name: str, passes: str) -> None:
    """Rows with equal tokens in one run may differ in the other."""
    found = run(
        tmp_path, name, "observe cka mlp_out layer * with moved at left token",
        options=MODES[passes],
    )  # fmt: skip
    moved = [{**record, "left": record["turn"]} for record in RECORDS]
    own = [(*record["left"], "w40", *record["turn"]) for record in RECORDS]
    first = [own.index(key) for key in dict.fromkeys(own)]
    assert len(set(keys("left token"))) < len(first) < len(own)
    for layer, values in enumerate(found.measures[0].patched):
        there = [
            _seen(name, tuple(words(each)))["mlp_out", layer][hits(each, "left token")].flatten(1)
            for each in moved
        ]
        other = np.array([each.mean(0).detach().numpy() for each in there])
        a, b = (
            u_centred(each[first])
            for each in (vectors(name, "mlp_out", layer, "left token"), other)
        )
        wanted = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        np.testing.assert_allclose(values.mean(), wanted, atol=1e-4)
        assert abs(wanted - 1) > 0.01
    assert "position of `moved`" in found.conventions["observed"]


@pytest.mark.parametrize(
    ("name", "passes"), [*((name, "planned") for name in FAMILIES), ("llama", "plain")]
)
def test_similarity_of_two_runs_equals_the_reference(
    tmp_path: Path, name: str, passes: str
) -> None:
    line = "observe similarity resid_post layer * with turned at {left token, last token}"
    both = run(
        tmp_path, name, "observe similarity resid_post layer * with turned at last token",
        options=MODES[passes],
    )  # fmt: skip
    for layer, values in enumerate(both.measures[0].patched):
        one = vectors(name, "resid_post", layer, "last token")
        other = vectors(name, "resid_post", layer, "last token", "turned")
        np.testing.assert_allclose(values, cosines(one, other), atol=1e-4)
    assert both.measures[0].patched.std() > 0.01
    assert "with the vector at the same position of `turned`" in both.conventions["observed"]
    with pytest.raises(AssertionError, match="compares one token at a time"):
        run(tmp_path, name, line)


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_similarity_with_a_run_of_other_lengths_equals_the_reference(
    tmp_path: Path, name: str
) -> None:
    line = "observe similarity resid_post layer * with moved at last token"
    found = run(tmp_path, name, line)
    texts = [[*record["turn"], "w40", *record["right"], "w41"] for record in RECORDS]
    assert any(len(text) != len(words(own)) for text, own in zip(texts, RECORDS, strict=True))
    for layer, values in enumerate(found.measures[0].patched):
        one = vectors(name, "resid_post", layer, "last token")
        seen = [_seen(name, tuple(text))["resid_post", layer][-1] for text in texts]
        other = np.array([each.flatten().detach().numpy() for each in seen])
        np.testing.assert_allclose(values, cosines(one, other), atol=1e-4)


HEALED = (
    "run healed { from turned into clean patch attn_out layer 0 at last token "
    "scale mlp_out layer 1 at right tokens by 3 }"
)


def healed(name: str, site: str, layer: int, position: str) -> Array:
    """[row, width] of the derived run `healed`, one prompt at a time."""
    found: list[Array] = []
    for record in RECORDS:
        source = _seen(name, tuple(words(record, "turned")))["attn_out", 0][-1]
        last = len(words(record))
        writes = [Write("attn_out", 0, source, last)]
        writes += [
            Write("mlp_out", 1, lambda own: 3 * own, at) for at in hits(record, "right tokens")
        ]
        own = forward(name, double(name), ids_of(words(record)), writes)[site, layer]
        found.append(own[hits(record, position)].flatten(1).mean(0).detach().numpy())
    return np.array(found)


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_similarity_with_a_derived_run_equals_the_reference(tmp_path: Path, name: str) -> None:
    line = "observe similarity resid_post layer * of clean with healed at last token as alike"
    found = run(tmp_path, name, HEALED, line)
    for layer, values in enumerate(found.measures[0].patched):
        one = vectors(name, "resid_post", layer, "last token")
        other = healed(name, "resid_post", layer, "last token")
        np.testing.assert_allclose(values, cosines(one, other), atol=1e-4)
    assert found.measures[0].patched.std() > 0.01


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_probe_of_a_derived_run_equals_the_reference(tmp_path: Path, name: str) -> None:
    line = "observe probe(size, folds: 4, penalty: 2) at resid_post layer 2 of healed at last token"
    found = run(tmp_path, name, HEALED, f"{line} as told")
    assert found.row_keys is not None
    contents = [(r["size"], " ".join(r["left"]), " ".join(r["right"])) for r in RECORDS]
    values = (found.row_values[value] for value in ("size", "left", "right"))
    # values and keys are in table order, measured values in file order
    order = [contents.index(each) for each in zip(*values, strict=True)]
    own = [RECORDS[row] for row in order]
    y = np.array([[record["size"]] for record in own])
    x = healed(name, "resid_post", 2, "last token")[order]
    plain = vectors(name, "resid_post", 2, "last token")[order]
    assert np.abs(x - plain).max() > 0.1
    seen = [
        digest(tuple(ids_of(words(record))), [(tuple(hits(record, "last token")),)], key)
        for record, key in zip(own, found.row_keys, strict=True)
    ]
    dealt_out = sorted(set(seen), key=lambda key: (digest("fold", SEED, key), key))
    fold = np.array([dealt_out.index(key) % 4 for key in seen])
    told = ridge_told(x, y, fold, 2.0)
    np.testing.assert_allclose(found.measures[0].patched[0][order], told, atol=2e-3)


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_cka_of_a_derived_run_equals_the_reference(tmp_path: Path, name: str) -> None:
    line = "observe cka resid_post layer 2 of healed with attn_out layer 1 at last token as alike"
    found = run(tmp_path, name, HEALED, line)
    own = keys("last token")
    first = [own.index(key) for key in dict.fromkeys(own)]
    a, b = (
        u_centred(healed(name, site, layer, "last token")[first])
        for site, layer in (("resid_post", 2), ("attn_out", 1))
    )
    wanted = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    np.testing.assert_allclose(found.measures[0].patched[0].mean(), wanted, atol=1e-4)


# --- errors and conventions -----------------------------------------------------------------------

AT = "resid_post layer 0 at last token"
REFUSED = {
    f"observe probe {AT}": "doesn't name the value to predict",
    f"observe probe(nothing) {AT}": "nothing",
    f"observe probe(size, fold: 3) {AT}": "isn't an option of a probe",
    f"observe probe(size, folds: 1) {AT}": "can't be `1`",
    f"observe probe(size, penalty: 0) {AT}": "can't be `0`",
    f"observe probe(size, kind: linear) {AT}": "can't be `linear`",
    f"observe probe(kind, kind: ridge) {AT}": "isn't a number",
    f"observe probe(pair, kind: logistic) {AT}": "is a list, which isn't a class",
    f"observe probe(a) {AT}": "is the same in all rows",
    f"observe probe(size, folds: 30) {AT}": "can't be split",
    "observe probe(size) at resid_post layer 0": "needs a position",
    f"observe probe(size, train: many) {AT}": "can't be fitted on `many`",
    f"observe probe(size, train: p) {AT}": "rows that it is fitted on",
    f"observe similarity {AT} with left token with attn_out layer 0": "attn_out",
    "observe similarity resid_post layer 0 with z layer 0 head 0 at last token": "not of 6 and 24",
    "observe probe(size) at pattern layer 0 head 0 at last token": "whose width",
    f"observe rank_correlation(4) {AT} with left token": "write `logits`",
    "observe rank_correlation(4) logits at last token": "compares two positions",
    "observe rank_correlation(1) logits at last token with left token": "above 1",
    "observe rank_correlation logits at last token with left token": "above 1",
    "observe rank_correlation(4) logits at left tokens with last token": "one token",
    f"observe cka {AT}": "compares two sites",
    "observe cka resid_post layer 0 with turnd at last token": "no site or run called `turnd`",
    f"observe rank {AT} with left token": "takes no `with`",
    "observe copying layer 0 head 0 at last token": "reads weights, not a token",
    "observe copying resid_post layer 0": "reads one head at a time",
    "observe copying layer 0 heads 0..1": "reads one head at a time",
    "observe composition(x) at layer 0 head * with layer 1 head *": "isn't a type of composition",
    "observe composition at layer 0 head * with layer 1 head *": "names no type of composition",
    "observe singular_values(ok) at layer 0 head * top 2": "isn't a map of a head",
    "observe singular_values(qk) at layer 0 head *": "doesn't state how many",
    "observe singular_values(qk) at layer 0 head * top 7": "doesn't have 7 values: a head has 6",
    "observe singular_values(qk) at layer 0 heads * top 2": "reads one head at a time",
    "observe value_vectors layer 0 head 0 top 2": "reads one neuron at a time",
    "observe value_vectors layer 0 neurons 0..1 top 2": "reads one neuron at a time",
    "observe value_vectors layer 0 neuron 0 at last token": "reads weights, not a token",
    "observe value_vectors layer 0 neuron 0 toward nothing": "nothing",
    'observe successor(" w1", " w2", " w1") at layer 0 head *': "at least 3 different texts",
    'observe successor(" w1", " w2", 3) at layer 0 head *': "at least 3 different texts",
    'observe successor(" w1", " w2", " w3 w4") at layer 0 head *': "has several tokens: `w3` `w4`",
    'observe successor(" w1", " w2", " w3") at layer 0 neuron 0': "reads one head at a time",
    "observe composition(q) at layer 0 head *": "compares two heads",
    f"ablate attn_out layer 0 at last token with zero  observe rank {AT}": "doesn't read a run in "
    "which",
}


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line.replace(AT, "…"))
def test_invalid_observations_over_rows_are_errors(tmp_path: Path, line: str) -> None:
    check_refused(tmp_path, line, REFUSED[line])


def test_observation_above_the_memory_limit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All heads of 26 rows: 26 · 4 · 6 numbers."""
    line = "observe rank z layer 0 at last token"
    monkeypatch.setattr(over_rows, "MAX_ROW_NUMBERS", 26 * 4 * 6)
    run(tmp_path, "gpt2", line)
    monkeypatch.setattr(over_rows, "MAX_ROW_NUMBERS", 26 * 4 * 6 - 1)
    with pytest.raises(AssertionError, match="would hold 624 numbers at a time, more than 623"):
        run(tmp_path, "gpt2", line)


def test_conventions_of_a_probe_state_its_fit(tmp_path: Path) -> None:
    found = run(tmp_path, "gpt2", f"observe probe(kind) {AT}")
    said = found.conventions["observed"]
    for words in (
        "logistic regression, 3 classes (high, low, mid)",
        "penalty 1 / 2 · Σ weights²",
        "5 folds; rows with equal tokens there are in the same fold",
        "values are the clean row's",
        "shuffled: the same with the values permuted between rows",
    ):
        assert words in said


def test_probe_with_fewer_distinct_rows_than_folds_has_no_value(tmp_path: Path) -> None:
    """The first token is equal in all rows, so that there is only one distinct row."""
    found = run(tmp_path, "gpt2", "observe probe(size) at resid_post layer 0 at token 0")
    assert "5 folds of 1 distinct rows" in (found.statistics[0].reasons[0] or "")


def check_refused(folder: Path, line: str, said: str) -> None:
    write(folder)
    text = f"experiment e {{\n  model m\n  prompts p\n  {line}\n}}\n"
    result, diagnostics = try_file(text, folder, bare("gpt2"), prompts=PROMPTS)
    assert result is None
    shown = render_full(diagnostics, color=False, width=200)
    assert said in shown, shown
