"""Sweeps, joins, loops, windows, groups: the cells of an experiment."""

from __future__ import annotations

import pytest

from mechdsl.resolve.types import ResolvedExperiment

from .support import DELTA, FROM, HEAD, codes, one


def axes(found: ResolvedExperiment) -> dict[str, int]:
    return {axis.name: len(axis) for axis in found.axes}


def points(found: ResolvedExperiment, rule: int = 0) -> list[list[tuple[int | None, int | None]]]:
    """Return (layer, unit) of the sites that each cell of a rule writes."""
    sites = found.rules[rule].sites
    assert sites is not None
    return [[(p.layer, p.unit) for p in each] for each in sites.points.values()]


@pytest.mark.parametrize(
    ("site", "wanted"),
    [
        ("layer 0..1 head *", {"layer": 2, "head": 4}),
        ("layers 0..1 head *", {"head": 4}),
        ("layer 0..1 heads *", {"layer": 2}),
        ("layers 0..1 heads *", {}),
        ("layer 1 head 2", {}),
        ("layer 0, 2, 3 head 1", {"layer": 3}),
        ("layer 0, 0..2 head 1", {"layer": 3}),
        ("layer -2..-1 head 1", {"layer": 2}),
        ("layer 50%..100% head 1", {"layer": 2}),
        ("L1H2", {}),
        ("embed", {}),
        ("mlp_hidden layer 0 neuron 3..7", {"neuron": 5}),
        ("mlp_hidden layer *", {"layer": 4}),
    ],
)
def test_singular_words_sweep_and_plural_words_join(site: str, wanted: dict[str, int]) -> None:
    assert axes(one(FROM, f"patch {site} at last token", DELTA)) == wanted


def test_plural_words_join_their_sites() -> None:
    found = one(FROM, "patch layers 0, 2 heads 1..2 at last token", DELTA)
    assert points(found) == [[(0, 1), (0, 2), (2, 1), (2, 2)]]


@pytest.mark.parametrize(
    ("lines", "centres"),
    [
        ("for l in 0..3 { patch z layer l window 2 head 1 at last token }", ["l"]),
        ("for l in 0..2 { patch z layer l + 1 window 2 head 1 at last token }", []),
        (
            "for l in 0..3 { patch z layer l head 1 at last token  "
            "freeze mlp_out layer * window 2 at last token }",
            ["layer"],
        ),
    ],
)
def test_loop_over_window_centres_is_marked(lines: str, centres: list[str]) -> None:
    found = one(FROM, lines, DELTA)
    assert [axis.name for axis in found.axes if axis.of_windows] == centres


def test_relative_depth_rounds_half_up() -> None:
    # Of four layers 50% is 1.5.
    assert points(one(FROM, "patch layer 50% head 0 at last token", DELTA)) == [[(2, 0)]]


@pytest.mark.parametrize(
    ("width", "wanted"),
    [
        (1, [[0], [1], [2], [3]]),
        (2, [[0], [0, 1], [1, 2], [2, 3]]),
        (3, [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]),
        (9, [[0, 1, 2, 3]] * 4),
    ],
)
def test_windows_are_centred_and_cut(width: int, wanted: list[list[int]]) -> None:
    found = one(FROM, f"patch mlp_out layer * window {width} at last token", DELTA)
    assert [[layer for layer, _ in each] for each in points(found)] == wanted


def test_loops_share_an_axis() -> None:
    found = one(
        FROM,
        "for l in 0..2 {",
        "patch attn_out layer l at last token",
        "patch mlp_out layer l + 1 at last token",
        "}",
        DELTA,
    )
    assert axes(found) == {"l": 3}
    assert [layer for ((layer, _),) in points(found, 0)] == [0, 1, 2]
    assert [layer for ((layer, _),) in points(found, 1)] == [1, 2, 3]


def test_loops_over_components_and_tokens_are_axes() -> None:
    found = one(
        FROM,
        "for c in [attn_out, mlp_out] {",
        "for t in 2..4 {",
        "patch c layer * at token t",
        "}",
        "}",
        DELTA,
    )
    assert axes(found) == {"c": 2, "t": 3, "layer": 4}
    assert found.n_cells == 24


def test_groups_are_joined() -> None:
    head = HEAD.replace("\nprompts", "group movers = L0H1, layers 2..3 head 0\n\nprompts", 1)
    found = one(FROM, "patch movers at last token", DELTA, head=head)
    assert points(found) == [[(0, 1), (2, 0), (3, 0)]]


def test_positions_are_an_axis() -> None:
    found = one(FROM, "patch resid_post layer 0 at first-item token, last token", DELTA)
    assert found.axes[0].labels == ("first-item token", "last token")
    found = one(FROM, "patch resid_post layer 0 at {first-item token, last token}", DELTA)
    assert found.axes == ()


def test_ranges_of_an_axis_have_a_step() -> None:
    found = one("ablate layer 0..2 step 2 heads 0..3 step 3 at last token with zero", DELTA)
    assert found.axes[0].labels == (0, 2)
    listed = one("ablate layer 0, 2 heads 0, 3 at last token with zero", DELTA)
    assert [rule.sites.points for rule in found.rules] == [r.sites.points for r in listed.rules]
    assert codes("ablate layer 0..2 step 0 head 1 at last token with zero", DELTA) == ["E0322"]


def test_occurrences_are_an_axis_with_two_names() -> None:
    (axis,) = one(FROM, "patch resid_post layer 0 at each item token", DELTA).axes
    assert (axis.name, axis.alias) == ("position", "item")
    assert axis.labels[:2] == ("item 1", "item 2")
    assert axis.items == tuple(range(1, len(axis) + 1))


def test_patch_reads_its_source_run() -> None:
    line = "patch resid_post layer 0 at last token with other_fruit"
    assert [rule.run for rule in one(line, DELTA).rules] == ["other_fruit"]
    lines = ("patch resid_post layer 0 at last token", "ablate L1H1 at last token with mean")
    assert [rule.run for rule in one(FROM, *lines, DELTA).rules] == ["clean", "clean"]


def test_rows_without_a_position_in_one_run_are_dropped() -> None:
    found = one(FROM, "patch resid_post layer 0 at each item token", DELTA)
    clean, fewer = (found.table.runs[run].rows for run in ("clean", "fewer"))
    for key, cell in found.rules[0].positions.written.items():
        for row, hit in enumerate(cell.hits):
            counts = (clean[row].values["count"], fewer[row].values["count"])
            assert bool(hit) == (key[0] < min(counts))


def test_errors_of_all_lines_are_reported_at_once() -> None:
    lines = ("patch layer 7 head 9 at itme token", "measure logi(answer) as raw")
    assert set(codes(FROM, *lines)) == {"E0301", "E0302", "E0308", "E0203"}
