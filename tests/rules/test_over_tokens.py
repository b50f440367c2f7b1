"""Observations over all tokens of all rows, against reference vectors and fits by autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mechdsl.base.hashing import digest
from mechdsl.fits.geometry import CLUSTER_STARTS
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.observations import ObservedTokens, TokenVectors
from mechdsl.rules.observations.rows import Clusters

from ..execute.support import MODES, ids_of, run_file
from ..reference.forward import forward
from ..reference.r_squared import r_squared_contributions
from .models import bare, double
from .test_over_rows import (
    FAMILIES,
    OTHERS,
    PROMPTS,
    RECORDS,
    SEED,
    check_refused,
    dealt_values,
    hits,
    run,
    trained,
    words,
    write,
)

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
ROUTED = "routed_probe(pair, folds: 3, penalty: 4)"
WHERE = "resid_post layer 1 at right tokens"
CHANGED = {"clean": (), "turned": ("right",), "moved": ("left",)}
"""The values with other words in each run."""


def tokens(name: str, site: str, layer: int, position: str, run: str = "clean") -> list[Array]:
    """[token, width] of each row."""
    found: list[Array] = []
    for record in RECORDS:
        record = {**record, **dict.fromkeys(CHANGED[run], record["turn"])}
        own = forward(name, double(name), ids_of(words(record)))[site, layer]
        found.append(own[hits(record, position)].flatten(1).detach().numpy())
    return found


def dealt(position: str, n: int) -> Array:
    """[row] the fold, from a row's tokens up to its last position and from all its positions."""
    own: list[bytes] = []
    for record in RECORDS:
        at = hits(record, position)
        own.append(digest(tuple(ids_of(words(record)))[: max(at) + 1], [(tuple(at),)], None))
    order = sorted(set(own), key=lambda key: ("''", digest("fold", SEED, key), key))
    return np.array([order.index(key) % n for key in own])


def cell_of(at: int, size: int) -> int:
    """The cell of a token in a span of at most three: first, middle or last."""
    return -1 if at == size - 1 else at


class Fit:
    """A query fitted by torch's L-BFGS, with gradients through the ridge solution."""

    def __init__(self, vectors: list[Array], y: Array, penalty: float) -> None:
        every = np.concatenate(vectors)
        self.at, self.by = every.mean(0), every.std(0)
        self.mean = torch.from_numpy(y.mean(0))
        self.spread = torch.from_numpy(np.where(y.std(0) > 0, y.std(0), 1))
        wanted = (torch.from_numpy(y) - self.mean) / self.spread
        self.centre: Any = None
        self.read: Any = None
        self.query = torch.zeros(every.shape[1], dtype=torch.float64, requires_grad=True)
        steps = torch.optim.LBFGS(
            [self.query], max_iter=2000, tolerance_grad=1e-9, tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Any:
            steps.zero_grad()
            mixed = self.mixed(vectors)
            self.centre = mixed.mean(0)
            own = mixed - self.centre
            gram = own.T @ own + penalty * torch.eye(own.shape[1], dtype=torch.float64)
            self.read = torch.linalg.solve(gram, own.T @ wanted)
            off = ((own @ self.read - wanted) ** 2).sum()
            whole = off + penalty * ((self.read**2).sum() + (self.query**2).sum())
            whole.backward()
            return whole

        steps.step(loss)
        loss()

    def weights(self, vectors: Array) -> Any:
        return torch.softmax(torch.from_numpy((vectors - self.at) / self.by) @ self.query, 0)

    def mixed(self, vectors: list[Array]) -> Any:
        rows = [self.weights(v) @ torch.from_numpy((v - self.at) / self.by) for v in vectors]
        return torch.stack(rows)

    def __call__(self, vectors: list[Array]) -> Array:
        found = (self.mixed(vectors) - self.centre) @ self.read * self.spread + self.mean
        return found.detach().numpy()


def held_out(vectors: list[Array], y: Array, fold: Array, penalty: float) -> tuple[Array, Any]:
    """([row] R², the token weights of each row)"""
    got, weights = np.empty_like(y), [np.empty(0)] * len(y)
    for each in np.unique(fold):
        fit = Fit([v for v, f in zip(vectors, fold, strict=True) if f != each], y[fold != each],
                  penalty)  # fmt: skip
        for row in np.flatnonzero(fold == each):
            got[row] = fit([vectors[row]])[0]
            weights[row] = fit.weights(vectors[row]).detach().numpy()
    return r_squared_contributions(y, got), weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "passes"),
    [*((name, "planned") for name in FAMILIES[:3]), ("gpt2", "plain")],
)
def test_routed_probe_equals_the_reference(tmp_path: Path, name: str, passes: str) -> None:
    line = f"observe {ROUTED} at resid_post layer * at right tokens as told"
    found = run(tmp_path, name, line, options=MODES[passes])
    y = np.array([record["pair"] for record in RECORDS])
    fold = dealt("right tokens", 3)
    for layer in (0, 2):
        vectors = tokens(name, "resid_post", layer, "right tokens")
        told, weights = held_out(vectors, y, fold, 4.0)
        np.testing.assert_allclose(found.measures[0].patched[layer], told, atol=5e-3)
        control, _ = held_out(vectors, dealt_values("right tokens", y), fold, 4.0)
        np.testing.assert_allclose(found.measures[1].patched[layer], control, atol=5e-3)
        assert np.abs(told - control).max() > 0.1
        assert max(each.max() for each in weights if len(each) > 1) > 0.6
    assert [measure.label for measure in found.measures] == ["told", "told shuffled"]
    assert found.measures[0].unit == "R²"


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_routing_weights_equal_the_reference(tmp_path: Path, name: str) -> None:
    line = (
        "observe routing(size, folds: 3, penalty: 4) at attn_out layer 0..1 at each token of left"
    )
    found = run(tmp_path, name, line)
    y = np.array([[record["size"]] for record in RECORDS])
    fold = dealt("left tokens", 3)
    values = found.measures[0].patched.reshape(2, 3, -1)
    for layer in (0, 1):
        vectors = tokens(name, "attn_out", layer, "left tokens")
        _, weights = held_out(vectors, y, fold, 4.0)
        for row, own in enumerate(weights):
            there = [cell_of(at, len(own)) for at in range(len(own))]
            np.testing.assert_allclose(values[layer, there, row], own, atol=2e-3)
            assert np.isfinite(values[layer, :, row]).sum() == len(own)
        assert max(np.ptp(each) for each in weights) > 0.05
    assert found.measures[0].unit == "weight"


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_routed_probe_with_train_rows_equals_the_reference(tmp_path: Path, name: str) -> None:
    line = "observe routed_probe(size, train: q, penalty: 4) at resid_post layer 1 at left tokens"
    found = trained(tmp_path, name, line)
    vectors = tokens(name, "resid_post", 1, "left tokens")
    y = np.array([[record["size"]] for record in RECORDS])
    for measure, of in zip(
        found.measures, (y[:16], dealt_values("left tokens", y[:16])), strict=True
    ):
        told = r_squared_contributions(y[16:25], Fit(vectors[:16], of, 4.0)(vectors[16:25]))
        np.testing.assert_allclose(measure.patched[0], told, rtol=2e-3, atol=5e-3)
    assert "fitted on `q` (16 rows)" in found.conventions["observed"]


# --- clusters -------------------------------------------------------------------------------------


def cluster_values(found: Any, count: int) -> Array:
    """[cluster, position, row], or without positions where there is one."""
    order = list(found.axes)
    sizes = [count if name == "cluster" else -1 for name in order]
    own = found.measures[0].patched.reshape(*sizes, found.measures[0].patched.shape[1])
    return np.moveaxis(own, order.index("cluster"), 0)


def members(flat: Array) -> Labels:
    """[token] the cluster with the nearest centre: the most likely one if sizes were equal."""
    label = flat.argmax(1)
    for _ in range(10):
        label = (flat / np.bincount(label)).argmax(1)
    return label


def probabilities(vectors: list[Array], label: Labels, given: list[Array] | None = None) -> Array:
    """[token, cluster] probabilities of these or other vectors, from Gaussians around the means of
    labelled vectors."""
    every = np.concatenate(vectors)
    at, by = every.mean(0), every.std(0)
    own = (every - at) / by
    count = int(label.max()) + 1
    centres = np.array([own[label == n].mean(0) for n in range(count)])
    variance = ((own - centres[label]) ** 2).mean()
    told = own if given is None else (np.concatenate(given) - at) / by
    off = ((told[:, None] - centres) ** 2).sum(2)
    scores = np.log(np.bincount(label) / len(label)) - off / (2 * variance)
    raised = np.exp(scores - scores.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_clusters_of_tokens_equal_the_reference(tmp_path: Path, name: str) -> None:
    """The most likely cluster of each token is the nearest one: k-means has converged."""
    line = "observe clusters(3) resid_post layer 1 at each token of left as concept"
    found = run(tmp_path, name, line)
    values = cluster_values(found, 3)
    vectors = tokens(name, "resid_post", 1, "left tokens")
    sizes = [len(each) for each in vectors]
    flat = np.array(
        [values[:, cell_of(at, n), row] for row, n in enumerate(sizes) for at in range(n)]
    )
    np.testing.assert_allclose(flat.sum(1), 1)
    label = members(flat)
    assert (np.diff(np.bincount(label)) <= 0).all()
    np.testing.assert_allclose(flat, probabilities(vectors, label), atol=1e-3)
    assert len(set(label.tolist())) == 3


@pytest.mark.parametrize(
    ("count", "site", "text"),
    [
        (2, "resid_post layer * with turned", "{} to {} of them, depending on the site, reach {}"),
        (4, "resid_post layer *", "1 of them reaches {}; another seed may find other clusters"),
        (
            4,
            "attn_out layer *",
            "1 to {1} of them, depending on the site, reach {2}; another seed may find other "
            "clusters where only 1 reaches it",
        ),
    ],
)
def test_convention_states_how_many_starts_reach_the_best_clusters(
    tmp_path: Path, count: int, site: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[int] = []
    fit = Clusters.fitted

    def fitted(clusters: Clusters, seen: ObservedTokens, seed: int) -> Any:
        found = fit(clusters, seen, seed)
        reached.append(found.reached)
        return found

    monkeypatch.setattr(Clusters, "fitted", fitted)
    line = f"observe clusters({count}) {site} at right tokens as concept"
    found = run(tmp_path, "gpt2", line)
    assert len(reached) == 3
    numbers = (min(reached), max(reached))
    told = text.format(*(numbers if len(set(numbers)) > 1 else ()), "its sum of squared distances")
    assert found.conventions["k-means"] == f"best of {CLUSTER_STARTS} starts; {told}", reached
    assert [each.label for each in found.measures] == ["concept"]


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_cluster_probabilities_of_joined_tokens_are_their_mean(tmp_path: Path, name: str) -> None:
    line = "observe clusters(3) resid_post layer 1 at {} as concept"
    each = cluster_values(run(tmp_path, name, line.format("each token of left")), 3)
    joined = cluster_values(run(tmp_path, name, line.format("left tokens")), 3)
    np.testing.assert_allclose(joined, np.nanmean(each, 1))


@pytest.mark.parametrize(("name", "other"), [(FAMILIES[0], "moved"), (FAMILIES[1], "turned")])
def test_cluster_agreement_with_another_run_equals_the_reference(
    tmp_path: Path, name: str, other: str
) -> None:
    """Each run has its own positions; those of `moved` differ."""
    write(tmp_path)
    lines = (
        f"observe clusters(4) resid_post layer 0 with {other} at right tokens as kept",
        "observe clusters(4) resid_post layer 0 at each token of right as own",
    )
    text = f"seed {SEED}\nexperiment e {{ model m prompts p {' '.join(lines)} }}\n"
    found = run_file(text, tmp_path, bare(name), prompts=PROMPTS)
    own = cluster_values(found["e.own"], 4)
    vectors = tokens(name, "resid_post", 0, "right tokens")
    sizes = [len(each) for each in vectors]
    flat = np.array([own[:, cell_of(at, n), row] for row, n in enumerate(sizes) for at in range(n)])
    there = tokens(name, "resid_post", 0, "right tokens", other)
    same = flat.argmax(1) == probabilities(vectors, members(flat), there).argmax(1)
    ends = np.cumsum(sizes)[:-1]
    expected = [each.mean() for each in np.split(same, ends)]
    np.testing.assert_allclose(found["e.kept"].measures[0].patched[0], expected)
    assert 0 < np.mean(expected) < 1


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_clusters_with_train_rows_equal_the_reference(tmp_path: Path, name: str) -> None:
    """Clusters are fitted to the train rows; values are probabilities of the evaluated tokens."""
    line = "observe clusters(3, train: q) resid_post layer 1 at each token of left as concept"
    values = cluster_values(trained(tmp_path, name, line), 3)
    own = "observe clusters(3) resid_post layer 1 at each token of left as concept"
    text = f"seed {SEED}\nexperiment e {{ model m prompts q {own} }}\n"
    [found] = run_file(text, tmp_path, bare(name), prompts=PROMPTS + OTHERS).values()
    others = cluster_values(found, 3)
    vectors = tokens(name, "resid_post", 1, "left tokens")
    sizes = [len(each) for each in vectors]

    def flat(of: Array, first: int) -> Array:
        places = ((row, at) for row in range(of.shape[2]) for at in range(sizes[first + row]))
        return np.array([of[:, cell_of(at, sizes[first + row]), row] for row, at in places])

    expected = probabilities(vectors[:16], members(flat(others, 0)), vectors[16:25])
    np.testing.assert_allclose(flat(values, 16), expected, atol=1e-3)
    assert np.ptp(expected, axis=0).max() > 0.1


def test_clusters_depend_on_the_seed_not_on_row_order() -> None:
    """They depend on the seed, as these vectors have no clusters."""
    every = np.random.default_rng(0).normal(size=(20, 3, 4))
    keys = [digest(number) for number in range(20)]

    def centres(order: list[int], seed: int) -> Array:
        rows, tokens = np.repeat(np.arange(20), 3), np.tile(np.arange(3), 20)
        flat, own = every[order].reshape(60, 4), [keys[number] for number in order]
        seen = TokenVectors(flat, rows, tokens, np.arange(20), own)
        return Clusters(6).fitted(ObservedTokens(seen, None, None), seed).centres

    there, back = [*range(20)], [*reversed(range(20))]
    np.testing.assert_array_equal(centres(there, 1), centres(back, 1))
    assert not np.allclose(centres(there, 1), centres(there, 2))


# --- errors and conventions -----------------------------------------------------------------------

REFUSED = {
    f"observe routed_probe {WHERE}": "doesn't name the value to predict",
    f"observe routed_probe(kind) {WHERE}": "isn't a number",
    f"observe routed_probe(size, kind: ridge) {WHERE}": "isn't an option of a probe",
    "observe routed_probe(size) embed at each token of left": "several tokens jointly",
    f"observe routing(size) {WHERE}": "a number per token",
    f"observe routing(size) {WHERE} with left token": "takes no `with`",
    f"observe clusters {WHERE}": "doesn't state the number of clusters",
    f"observe clusters(1) {WHERE}": "write a number from 2 to 64",
    f"observe clusters(2.5) {WHERE}": "write a number from 2 to 64",
    f"observe clusters(3, folds: 2) {WHERE}": "isn't an option",
    f"observe clusters(65) {WHERE}": "write a number from 2 to 64",
    "observe clusters(3) resid_post layer 0 with attn_out layer 0 at last token": "name one",
    "observe clusters(3) embed with moved at token 3, right tokens": "in a different order",
    "observe clusters(3) embed with moved at token 4, right token": "in a different order",
    f"observe clusters(3, train: p) {WHERE}": "rows that it is fitted on",
}


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line.replace(WHERE, "…"))
def test_invalid_observations_over_tokens_are_errors(tmp_path: Path, line: str) -> None:
    check_refused(tmp_path, line, REFUSED[line])


def test_first_token_of_a_row_is_not_confused_with_the_preceding_row() -> None:
    seen = TokenVectors(
        vectors=np.zeros((4, 1)),
        row=np.array([0, 0, 1, 1]),
        tokens=np.array([0, 2, 0, 2]),
        prompts=np.array([0, 1]),
        keys=(b"a", b"b"),
    )
    row, index = seen.at(PositionCell("first token", (((0,),), ((0,),))))
    assert (row.tolist(), index.tolist()) == ([0, 1], [0, 2])
