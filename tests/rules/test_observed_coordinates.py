"""`observe value` of coordinates, against coordinates computed from the bare model's activations.

One unpadded prompt at a time, with and without rules that act on the observed run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult

from ..reference.forward import Run, Write
from .basis_reference import SAVED_DIMS, pca, save_rows, saved
from .support import QUICK, codes, edited, experiment, plain, rows, run_file, tokens
from .test_dictionaries import FEATURES, LAYER, Reference, make
from .test_in_replies import GENERATE, set_everywhere, write
from .test_inactive_features import ran, sparse, width_of
from .test_transcoders import BASIS as TRANSCODER
from .test_transcoders import make as make_transcoder

HERE = ("gpt2", "llama", "gpt_neox")
MODES = (*QUICK, "padded on the right")
SAE = f'basis f = sae("sae") at resid_post layer {LAYER}\n'


def observed(name: str, line: str, *more: str, effect: str = "raw") -> str:
    seen = f"seen_{name}"
    measure = f"measure {seen} as {effect}"
    return experiment(name, *more, f"observe value {line} as {seen}", measure=measure, stats="")


def check(
    found: ExperimentResult,
    axes: tuple[str, ...],
    cells: Sequence[tuple[Coord, ...]],
    value: Callable[..., float | None],
) -> np.ndarray:
    """Compare every cell. value: from a row and the cell's coordinates. Returns [cell, row]."""
    assert found.axes == axes
    assert [tuple(cell.coords[axis] for axis in axes) for cell in found.cells] == [*cells]
    expected = np.array(
        [
            [np.nan if (own := value(n, *cell)) is None else own for n in range(len(rows()))]
            for cell in cells
        ]
    )
    np.testing.assert_allclose(found.measures[0].patched, expected, atol=2e-4, rtol=1e-3)
    assert np.nanmax(np.abs(expected)) > 0.1
    return expected


def site_of(run: Run, at: Sequence[int], site: str = "resid_post", unit: int = 0) -> Tensor:
    """[token, width]"""
    return run[site, LAYER][list(at), unit]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", HERE)
def test_observed_coordinates_of_unpatched_runs_equal_the_reference(
    family: str, mode: str, data: Path
) -> None:
    """Directions that aren't orthogonal, a centred basis, a dictionary, and numbers of vectors."""
    width = width_of(family)
    name, of = save_rows(data, width), make(data, "topk", width)
    head = plain(family, rows()[0])["z", LAYER].shape[2]
    lines = [
        observed("linear", "feature * of b at each token of subject"),
        observed("joined", "features 0, 2 of b at tokens *"),
        observed("centred", "feature 0..1 of c of other at last token"),
        observed("sparse", "feature * of f at subject tokens"),
        observed("whole", f"resid_post layer {LAYER} in basis f at last token"),
        observed("numbers", f"z layer {LAYER} head 1 dim {head - 2}..{head - 1} at tokens *"),
        observed("concatenated", f"z layer {LAYER} dim 1, {head + 1} at last token"),
    ]
    text = (
        f'basis b = saved("{name}", "rows") at resid_post layer {LAYER}\n'
        f"basis c = pca(p, dims: 2) at resid_post layer {LAYER} at last token\n" + SAE
    )
    found = run_file(text + "".join(lines), data, family, mode)
    linear = saved(width)

    def coordinate(n: int, i: int, at: str = "last token") -> float:
        x = site_of(plain(family, rows()[n]), tokens(rows()[n], at))
        return float(linear.coordinates(x)[:, i].mean())

    own = found["linear"]
    assert own.axes == ("position", "feature")
    for cell, values in zip(own.cells, own.measures[0].patched, strict=True):
        word = str(cell.coords["position"]).split()[1]
        for n, text_of in enumerate(rows()):
            span = text_of.spans["subject"]
            at = {"first": span[:1] if len(span) > 1 else (), "last": span[-1:]}
            here = at.get(word, span[1:-1])
            assert np.isnan(values[n]) == (not here)
            if here:
                x = linear.coordinates(site_of(plain(family, text_of), here))
                expected = float(x[:, int(str(cell.coords["feature"]))].mean())
                assert values[n] == pytest.approx(expected, abs=2e-4, rel=1e-3)

    def joined(n: int) -> float:
        return (coordinate(n, 0, "tokens *") + coordinate(n, 2, "tokens *")) / 2

    def centred(n: int, i: int) -> float:
        basis = pca(family, "clean", "resid_post", LAYER, "last token", 2)
        text_of = rows("other")[n]
        return float(basis.coordinates(site_of(plain(family, text_of), [text_of.last]))[0, i])

    def features(n: int, at: str) -> Tensor:
        return of.encode(site_of(plain(family, rows()[n]), tokens(rows()[n], at)))

    def heads(n: int, at: Sequence[int]) -> Tensor:
        """[token, head, width]"""
        return plain(family, rows()[n])["z", LAYER][list(at)]

    check(found["joined"], (), [()], joined)
    check(found["centred"], ("feature",), [(0,), (1,)], centred)
    every = [(i,) for i in range(FEATURES)]
    check(
        found["sparse"],
        ("feature",),
        every,
        lambda n, i: float(features(n, "subject tokens")[:, i].mean()),
    )
    check(found["whole"], (), [()], lambda n: float(features(n, "last token").mean()))
    check(
        found["numbers"],
        ("dim",),
        [(head - 2,), (head - 1,)],
        lambda n, i: float(heads(n, tokens(rows()[n], "tokens *"))[:, 1, i].mean()),
    )
    check(
        found["concatenated"],
        ("dim",),
        [(1,), (head + 1,)],
        lambda n, i: float(heads(n, [rows()[n].last]).flatten()[i]),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", HERE)
def test_changes_of_later_coordinates_equal_the_reference(
    family: str, mode: str, data: Path
) -> None:
    """The change of a later coordinate when an earlier one changes: an interaction graph."""
    width = width_of(family)
    name = save_rows(data, width)
    of = make(data, "standard", width)
    text = f'basis b = saved("{name}", "rows") at resid_post layer 0\n' + SAE
    text += observed(
        "e",
        "feature * of f at last token",
        "for i in 0..2 { add 2 to feature i of b at subject tokens }",
        effect="delta",
    )
    own = run_file(text, data, family, mode)["e"]
    direction = saved(width).directions

    def value(n: int, i: int, feature: int) -> float:
        text_of = rows()[n]
        spots = tokens(text_of, "subject tokens")
        moved = [Write("resid_post", 0, lambda x: x + 2 * direction[i], spot) for spot in spots]
        run = edited(family, text_of, moved)
        return float(of.encode(site_of(run, [text_of.last]))[0, feature])

    def base(n: int, feature: int) -> float:
        text_of = rows()[n]
        return float(of.encode(site_of(plain(family, text_of), [text_of.last]))[0, feature])

    cells = [(i, feature) for i in range(SAVED_DIMS) for feature in range(FEATURES)]
    expected = check(own, ("i", "feature"), cells, value)
    start = np.array([[base(n, j) for n in range(len(rows()))] for _, j in cells])
    np.testing.assert_allclose(
        np.broadcast_to(own.measures[0].base, start.shape), start, atol=2e-4, rtol=1e-3
    )
    assert np.abs(expected - start).max() > 0.1


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("family", [*HERE, "gemma2"])
def test_features_of_transcoders_are_those_of_the_input(family: str, mode: str, data: Path) -> None:
    of = make_transcoder(data, "transcoder", width_of(family))
    text = TRANSCODER + observed(
        "e", "feature * of t at last token", "scale attn_out layer 0 at tokens * by 0.5"
    )
    found = run_file(text, data, family, mode)["e"]

    def value(n: int, i: int) -> float:
        text_of = rows()[n]
        every = range(len(text_of.ids))
        halved = [Write("attn_out", 0, lambda x: x / 2, spot) for spot in every]
        run = edited(family, text_of, halved)
        return float(of.encode(site_of(run, [text_of.last], "mlp_norm"))[0, i])

    check(found, ("feature",), [(i,) for i in range(FEATURES)], value)


@pytest.mark.parametrize("family", HERE)
def test_rows_without_active_features_are_observed(family: str, data: Path) -> None:
    """Rows whose ablated features are 0 have a value, although a metric wouldn't need them."""
    of = sparse(data, "standard", family)
    text = SAE + observed(
        "e",
        "resid_post layer 2 dim 3 at last token",
        "for i in 0..11 { ablate feature i of f at last token with zero }",
        effect="delta",
    )
    found = run_file(text, data, family, "planned")["e"]

    def value(n: int, i: int) -> float:
        text_of = rows()[n]

        def without(x: Tensor) -> Tensor:
            features = of.encode(x)
            kept = features.clone()
            kept[..., i] = 0
            return x + of.decode(kept, x) - of.decode(features, x)

        run = edited(family, text_of, [Write("resid_post", LAYER, without, text_of.last)])
        return float(run["resid_post", 2][text_of.last, 0, 3])

    expected = check(found, ("i",), [(i,) for i in range(FEATURES)], value)
    base = [float(plain(family, t)["resid_post", 2][t.last, 0, 3]) for t in rows()]
    assert 0 < (np.abs(expected - base).max(1) < 1e-6).sum() < FEATURES


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("family", HERE)
def test_observed_coordinates_at_reply_tokens_equal_the_reference(
    family: str, mode: str, data: Path
) -> None:
    name = save_rows(data, width_of(family))
    text = f'basis b = saved("{name}", "rows") at resid_post layer {LAYER}\n'
    text += observed(
        "e",
        "feature * of b at reply token 1",
        "set attn_out layer 0 at last token to 0.6",
        GENERATE,
    )
    found = run_file(text, data, family, mode)["e"]

    def value(n: int, i: int) -> float | None:
        ids = rows()[n].ids
        reply = write(family, ids, set_everywhere(0)(len(ids)))
        at = reply.at(1)
        if at is None:
            return None
        x = reply.run["resid_post", LAYER][[at], 0]
        return float(saved(x.shape[-1]).coordinates(x)[0, i])

    check(found, ("feature",), [(i,) for i in range(SAVED_DIMS)], value)


def test_stored_coordinates_depend_on_dictionary_and_line(data: Path) -> None:
    """Values in the store depend on the basis and on the named coordinates."""
    width = width_of("gpt2")
    make(data, "standard", width)
    store = data / "store"

    def values(line: str, kept: Path | None = store) -> tuple[np.ndarray, int]:
        rule = "scale attn_out layer 0 at tokens * by 0.5"
        own, count = ran(observed("e", line, rule), data, kept)
        return own.measures[0].patched, count

    one, count = values("feature 0..3 of f at last token")
    assert count > 0
    again, count = values("feature 0..3 of f at last token")
    assert np.array_equal(one, again)
    assert count == 0
    for line in ("feature 1..4 of f at last token", "feature 0..3 of f at subject tokens"):
        assert np.allclose(values(line)[0], values(line, None)[0], atol=1e-5, equal_nan=True)
        assert not np.allclose(values(line)[0], one, equal_nan=True)
    make_other(data, width)
    line = "feature 0..3 of f at last token"
    assert np.allclose(values(line)[0], values(line, None)[0], atol=1e-5)
    assert not np.allclose(values(line)[0], one)


def make_other(folder: Path, width: int) -> Reference:
    """Write a dictionary with other weights."""
    return make(folder, "topk", width)


def test_observations_other_than_value_take_no_coordinates(data: Path) -> None:
    make(data, "standard", width_of("llama"))
    other = observed("e", "feature 0 of f at last token").replace("value", "norm")
    assert codes(SAE + other, data) == ["E0108"]
    assert codes(SAE + observed("e", "feature 12 of f at last token"), data) == ["E0301"]
    twice = observed(
        "e", "feature 0..1 of f at last token", "ablate feature * of f at last token with zero"
    )
    assert codes(SAE + twice, data)


def test_features_that_depend_on_other_tokens_are_an_error(data: Path) -> None:
    from .test_temporal_dictionaries import BASIS as TEMPORAL
    from .test_temporal_dictionaries import make as make_temporal

    make_temporal(data, width_of("llama"))
    text = TEMPORAL + observed("e", "feature 0 of f at last token")
    assert codes(text, data) == ["E0342"]


def test_value_of_a_swept_feature_has_its_label(data: Path) -> None:
    make(data, "standard", width_of("llama"))
    lines = [json.dumps({"index": 2, "description": "a name"})]
    (data / "labels.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    basis = f'basis f = sae("sae", labels: "labels.jsonl") at resid_post layer {LAYER}\n'
    text = basis + observed("e", "feature 1..2 of f at last token")
    found = run_file(text, data, "llama", "planned")["e"]
    assert [cell.label for cell in found.cells] == ["", "a name"]
