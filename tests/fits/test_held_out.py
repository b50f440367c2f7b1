"""Folds by content, shuffled labels, predictions of held-out rows."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import r2_score

from mechdsl.base.arrays import Floats
from mechdsl.fits.regression import (
    PENALTIES,
    LogisticProbe,
    RidgeProbe,
    assign_folds,
    cross_validate,
    fit_ridge,
    r_squared,
    shuffle_targets,
)

DRAW = np.random.default_rng(2)
KEYS = [bytes([k]) for k in [1, 2, 3, 1, 4, 5, 6, 7, 2, 8, 9, 10]]


def test_folds_keep_equal_rows_together_and_ignore_order() -> None:
    found = assign_folds(KEYS, 5, 0)
    assert found[0] == found[3]
    assert found[1] == found[8]
    of_keys = dict(zip(KEYS, found.tolist(), strict=True))
    assert sorted(np.bincount(list(of_keys.values())).tolist()) == [2] * 5
    order = DRAW.permutation(len(KEYS))
    assert assign_folds([KEYS[k] for k in order], 5, 0).tolist() == found[order].tolist()
    assert any(assign_folds(KEYS, 5, seed).tolist() != found.tolist() for seed in (1, 2))


def test_folds_balance_each_class() -> None:
    keys = [bytes([k]) for k in range(30)]
    classes = [0] * 20 + [1] * 10
    found = assign_folds(keys, 5, 3, classes)
    assert np.bincount(found[:20]).tolist() == [4] * 5
    assert np.bincount(found[20:]).tolist() == [2] * 5
    # A key with two classes stays in one fold.
    twice = assign_folds([*keys, keys[0]], 5, 3, [*classes, 1])
    assert twice[0] == twice[30]


def test_fewer_distinct_rows_than_folds_are_rejected() -> None:
    with pytest.raises(ValueError, match="3 folds of 2 distinct rows"):
        assign_folds([b"a", b"b", b"a"], 3, 0)
    with pytest.raises(ValueError, match="1 folds"):
        assign_folds([b"a", b"b"], 1, 0)


def test_shuffled_targets_depend_on_content_not_order() -> None:
    labels = np.array([[1, 2, 3, 30, 4, 5, 6, 7, 2, 8, 9, 10]], dtype=float).T
    got = shuffle_targets(KEYS, labels, 0)[:, 0]
    assert got[0] == got[3]
    assert got[1] == got[8]
    assert sorted(set(got.tolist())) == list(range(1, 11))
    assert got.tolist() != labels[:, 0].tolist()
    for _ in range(5):
        order = DRAW.permutation(len(KEYS))
        again = shuffle_targets([KEYS[k] for k in order], labels[order], 0)
        assert again[:, 0].tolist() == got[order].tolist()
    assert shuffle_targets(KEYS, labels, 1)[:, 0].tolist() != got.tolist()


def test_cross_validation_predicts_rows_from_other_folds() -> None:
    """The reference loops over rows, with a ridge fit on standardised vectors of other folds."""
    x, y = DRAW.normal(size=(24, 3)) * [1, 10, 0.1], DRAW.normal(size=(24, 2))
    fold = assign_folds([bytes([k]) for k in range(24)], 4, 0)
    found = cross_validate(x, y, fold, RidgeProbe(2.0))
    for row in range(24):
        others = fold != fold[row]
        at, by = x[others].mean(axis=0), x[others].std(axis=0)
        own = fit_ridge((x[others] - at) / by, y[others], 2.0)
        assert np.allclose(found[row], own(((x[row] - at) / by)[None])[0])


def test_ridge_probe_chooses_its_penalty_by_cross_validation() -> None:
    x = DRAW.normal(size=(40, 60))
    y = x[:, 0] + DRAW.normal(size=40)
    fold = assign_folds([bytes([k]) for k in range(40)], 5, 0)
    best = None
    for penalty in PENALTIES:
        error = 0.0
        for each in range(5):
            held = fold == each
            at, by = x[~held].mean(axis=0), x[~held].std(axis=0)
            got = fit_ridge((x[~held] - at) / by, y[~held], penalty)((x[held] - at) / by)
            error += float(((got[:, 0] - y[held]) ** 2).sum())
        if best is None or error < best[0]:
            best = (error, penalty)
    assert best is not None
    at, by = x.mean(axis=0), x.std(axis=0)
    own = fit_ridge((x - at) / by, y, best[1])
    assert np.allclose(RidgeProbe()(x, y, fold)(x), own((x - at) / by))
    assert best[1] not in (PENALTIES[0], 1.0)
    one = fit_ridge((x - at) / by, y, 1.0)((x - at) / by)
    assert np.allclose(RidgeProbe()(x, y, np.zeros(40, dtype=np.int64))(x), one)


def test_probes_predict_a_linear_target_but_not_noise() -> None:
    x = DRAW.normal(size=(200, 20))
    fold = assign_folds([k.to_bytes(2, "big") for k in range(200)], 5, 0)
    line, noise = x @ np.arange(20.0), DRAW.normal(size=200)
    assert r_squared(line, cross_validate(x, line, fold, RidgeProbe())).mean() > 0.99
    assert abs(r_squared(noise, cross_validate(x, noise, fold, RidgeProbe())).mean()) < 0.1
    classes = (line > 0).astype(np.int64)
    right = cross_validate(x, classes, fold, LogisticProbe()) == classes
    assert right.mean() > 0.9
    at_random = DRAW.integers(0, 4, 200)
    right = cross_validate(x, at_random, fold, LogisticProbe()) == at_random
    assert abs(right.mean() - 0.25) < 0.1


def weighted_r_squared(y: Floats, got: Floats, weights: Floats) -> float:
    return float(r2_score(y, got, sample_weight=weights, multioutput="variance_weighted"))


def test_r_squared_of_rows_is_the_score_plus_the_derivative_by_the_weight_of_the_row() -> None:
    y = DRAW.normal(size=(12, 2)) ** 2
    got = 0.5 * y + DRAW.normal(size=(12, 2)) + 1
    for wanted, told in ((y, got), (y[:, 0], got[:, 0])):
        rows, step = r_squared(wanted, told), 1e-6
        score = weighted_r_squared(wanted, told, np.ones(12))
        steps = [
            weighted_r_squared(wanted, told, 1 + step * (np.arange(12) == row)) - score
            for row in range(12)
        ]
        assert np.allclose(rows.mean(), score, atol=1e-12)
        assert np.allclose(rows - score, 12 * np.array(steps) / step, atol=1e-3)
    assert np.isnan(r_squared(np.ones(3), np.arange(3.0))).all()
