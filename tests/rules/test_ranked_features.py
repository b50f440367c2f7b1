"""Features that another experiment ranks, in rules: equal to the same features by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .support import experiment, run_file, try_file
from .test_dictionaries import LAYER, make
from .test_exchanged_features import Big
from .test_inactive_features import width_of

FAMILY = "llama"
BASIS = f'basis f = sae("sae") at resid_post layer {LAYER}\n'
SEEN = experiment("seen", "observe features of f at tokens * top 6", measure="", stats="")
AT = "of f at last token with zero"


@pytest.fixture
def folder(data: Path) -> Path:
    make(data, "standard", width_of(FAMILY))
    return data


def ranked(folder: Path) -> list[int]:
    """The observed features, the best first."""
    seen = run_file(BASIS + SEEN, folder, FAMILY, "planned")["seen"]
    return [int(cell.coords["feature"]) for cell in seen.cells]


def ran(rule: str, folder: Path, mode: str = "planned", before: str = SEEN) -> np.ndarray:
    text = BASIS + before + experiment("e", rule)
    return run_file(text, folder, FAMILY, mode)["e"].measures[0].patched


@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_joined_top_features_equal_listed_features(mode: str, folder: Path) -> None:
    numbers = ", ".join(map(str, ranked(folder)[:3]))
    found = ran(f"ablate features top 3 of seen {AT}", folder, mode)
    assert np.abs(found - ran(f"ablate features {numbers} {AT}", folder, mode)).max() < 1e-6
    assert np.abs(found).max() > 1e-3


def test_swept_top_features_are_cells_in_rank_order(folder: Path) -> None:
    order = ranked(folder)[:3]
    text = BASIS + SEEN + experiment("e", f"ablate feature top 3 of seen {AT}")
    found = run_file(text, folder, FAMILY, "planned")["e"]
    assert [cell.coords["feature"] for cell in found.cells] == order
    for own, feature in zip(found.measures[0].patched, order, strict=True):
        alone = ran(f"ablate feature {feature} {AT}", folder, before="")
        assert np.abs(own - alone[0]).max() < 1e-6
    assert f"features {order[0]} (" in found.conventions["top 3 of seen"]


def test_loop_over_top_k_features_equals_listed_features(folder: Path) -> None:
    order = ranked(folder)
    rule = f"for k in [1, 2, 4] {{ ablate features top k of seen {AT} }}"
    for own, count in zip(ran(rule, folder), (1, 2, 4), strict=True):
        numbers = ", ".join(map(str, order[:count]))
        alone = ran(f"ablate features {numbers} {AT}", folder, before="")
        assert np.abs(own - alone[0]).max() < 1e-6


def test_top_zero_features_changes_nothing(folder: Path) -> None:
    """`top 0` changes nothing, also in a loop with larger numbers and in replies."""
    rule = f"for k in 0..2 {{ ablate features top k of seen {AT} }}"
    found = run_file(BASIS + SEEN + experiment("e", rule), folder, FAMILY, "planned")["e"]
    data = found.measures[0]
    assert np.abs(data.patched[0] - data.base).max() < 1e-6
    order = ranked(folder)
    for own, count in zip(data.patched[1:], (1, 2), strict=True):
        numbers = ", ".join(map(str, order[:count]))
        alone = ran(f"ablate features {numbers} {AT}", folder, before="")
        assert np.abs(own - alone[0]).max() < 1e-6
    assert np.abs(ran(f"ablate features top 0 of seen {AT}", folder) - data.base).max() < 1e-6
    replies = [rule, "generate 3"]
    text = BASIS + SEEN + experiment("e", *replies, measure="measure length as raw", stats="")
    written = run_file(text, folder, FAMILY, "planned")["e"].replies
    none = {row: own[0].ids for row, own in written.cells[0].items()}
    assert none == {row: own[0].ids for row, own in written.runs["clean"].items()}


def test_save_of_top_zero_sites_is_an_error(folder: Path) -> None:
    ranked = experiment("r", "ablate layer 1 head * at last token with zero")
    line = 'save top 0 of r at last token to "n.safetensors"'
    _, found = try_file(ranked + experiment("e", line, measure="", stats=""), folder, FAMILY)
    assert [each.code for each in found if each.severity == "error"] == ["E0332"]
    assert not (folder / "n.safetensors").exists()


@pytest.mark.parametrize(
    "line",
    [
        "patch features top 0 of seen of f at last token with feature 1 of g",
        "ablate features top 0 of seen of f at last token with zero without error",
        'save top 2 rows of features top 0 of seen of f at last token to "r.jsonl"',
    ],
)
def test_top_zero_features_in_unsupported_statements_is_an_error(line: str, folder: Path) -> None:
    bases = BASIS + f'basis g = sae("sae") at resid_post layer {LAYER}\n'
    measure = {"measure": "", "stats": ""} if line.startswith("save") else {}
    result, found = try_file(bases + SEEN + experiment("e", line, **measure), folder, FAMILY)
    errors = [each.code for each in found if each.severity == "error"]
    assert errors == ["E0342"]
    assert result is None or "e" not in [each.name for each in result.experiments]


def test_best_percentage_and_numbers_are_listed_together(folder: Path) -> None:
    """`best`, a percentage and numbers may be listed together; each feature is there once."""
    order = ranked(folder)
    rule = f"ablate features best of seen, top 50% of seen, {order[1]} {AT}"
    half = ", ".join(map(str, order[: (len(order) + 1) // 2]))
    found = ran(rule, folder)
    assert np.abs(found - ran(f"ablate features {half} {AT}", folder, before="")).max() < 1e-6


def test_top_features_of_a_sweep_equal_listed_features(folder: Path) -> None:
    """An experiment that patches each feature ranks them too."""
    sweep = experiment("swept", f"ablate feature * {AT}", measure="measure entropy as delta")
    text = BASIS + sweep + experiment("e", f"ablate features top 2 of swept {AT}")
    every = run_file(text, folder, FAMILY, "planned")
    means = every["swept"].measures[0].patched - every["swept"].measures[0].base
    order = np.argsort(-means.mean(1), kind="stable")[:2].tolist()
    alone = ran(f"ablate features {order[0]}, {order[1]} {AT}", folder, before="")
    assert np.abs(every["e"].measures[0].patched - alone).max() < 1e-6


def test_top_features_over_positions_rank_by_the_best_position(folder: Path) -> None:
    """A feature counts by its best position."""
    line = "observe features of f at each token of subject top 8"
    seen = experiment("seen", line, measure="", stats="")
    found = run_file(BASIS + seen, folder, FAMILY, "planned")["seen"]
    best: dict[int, float] = {}
    for cell, values in zip(found.cells, found.measures[0].patched, strict=True):
        feature = int(cell.coords["feature"])
        best[feature] = max(best.get(feature, -np.inf), float(np.nanmean(values)))
    order = sorted(best, key=lambda feature: -best[feature])
    text = BASIS + seen + experiment("e", f"ablate feature top 5 of seen {AT}")
    cells = run_file(text, folder, FAMILY, "planned")["e"].cells
    assert [cell.coords["feature"] for cell in cells] == order[:5]


def test_top_features_in_derived_runs_and_exchanges_equal_listed_features(folder: Path) -> None:
    order = ranked(folder)
    Big(folder, width_of(FAMILY))
    big = f'basis big = sae("big") at resid_post layer {LAYER}\n'
    lines = (
        "run less {{ ablate features {} of f at last token with zero }}",
        "from less into clean",
    )
    rule = "patch resid_post layer 2 at last token"
    texts = [
        BASIS + SEEN + experiment("e", lines[0].format(named), lines[1], rule)
        for named in ("top 2 of seen", f"{order[0]}, {order[1]}")
    ]
    picked, written = (
        run_file(text, folder, FAMILY, "planned")["e"].measures[0].patched for text in texts
    )
    assert np.abs(picked - written).max() < 1e-6
    texts = [
        BASIS + big + SEEN + experiment("e", f"patch feature 1 of big at last token with {each}")
        for each in ("features top 2 of seen of f", f"features {order[0]}, {order[1]} of f")
    ]
    picked, written = (
        run_file(text, folder, FAMILY, "planned")["e"].measures[0].patched for text in texts
    )
    assert np.abs(picked - written).max() < 1e-6


@pytest.mark.parametrize(
    ("before", "rule", "code"),
    [
        (SEEN, f"ablate features top 3 of other {AT}", "E0201"),
        (SEEN, f"ablate features top 30 of seen {AT}", "E0620"),
        (SEEN, "ablate features top 2 of seen of g at last token with zero", "E0620"),
        (
            experiment("seen", "ablate layer 0 head * at last token with zero"),
            f"ablate features top 2 of seen {AT}",
            "E0620",
        ),
        (SEEN, "ablate top 2 of seen at last token with zero", "E0620"),
    ],
)
def test_invalid_ranked_features_are_errors(
    before: str, rule: str, code: str, folder: Path
) -> None:
    other = f"basis g = neurons at resid_post layer {LAYER}\n"
    text = BASIS + other + before + experiment("e", rule)
    result, diagnostics = try_file(text, folder, FAMILY)
    found = [each.code for each in diagnostics]
    assert code in found
    assert result is None or result.experiments[-1].name != "e"
