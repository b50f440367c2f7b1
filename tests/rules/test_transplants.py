"""Transplants: vectors read at one position and written at another, in other prompts or layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES
from ..reference.forward import Changes, Write
from .models import FAMILIES
from .paths import End, copied
from .support import (
    MANY,
    QUICK,
    Array,
    Key,
    Text,
    agree,
    codes,
    difference,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    tokens,
    unpatched,
    worked_out,
)

Where = Callable[..., tuple[str, str]]
"""From a cell's coordinates: the position to read and the position to write."""
What = Callable[..., tuple[Sequence[End], Sequence[int] | None]]
"""From a cell's coordinates: sites to read, and layers to write to (None: the same)."""

LAYERS = range(3)


@dataclass(frozen=True)
class Case:
    """One rule that carries vectors from one text to another."""

    ways: str
    rule: str
    source: str
    base: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    what: What
    where: Where
    block: str = "p"


def case(
    ways: str,
    rule: str,
    axes: tuple[str, ...],
    cells: Sequence[tuple[Coord, ...]],
    what: What,
    where: Where,
    block: str = "p",
    source: str | None = None,
) -> Case:
    left, _, right = ways.partition(" into ")
    return Case(ways, rule, source or left, right, axes, cells, what, where, block)


def at(site: str) -> What:
    """The site at the cell's layer, and head."""
    return lambda layer, *units: ([End(site, layer, units[0] if units else None)], None)


def fixed(*ends: End) -> What:
    return lambda *_: (ends, None)


def here(read: str, written: str) -> Where:
    return lambda *_: (read, written)


ONE: list[tuple[Coord, ...]] = [()]
EACH = [(n,) for n in LAYERS]
MID = End("resid_post", 1)
CUE, LAST = "cue token", "last token"

CASES: dict[str, Case] = {
    # two positions of one block
    "onto": case(
        "longer into clean",
        "patch resid_post layer * at last token onto cue token",
        ("layer",),
        EACH,
        at("resid_post"),
        here(LAST, CUE),
    ),
    "onto_heads": case(
        "other into longer",
        "patch layer * head * at cue token onto last token",
        ("layer", "head"),
        product(LAYERS, range(4)),
        at("z"),
        here(CUE, LAST),
    ),
    "onto_embed": case(
        "longer into clean",
        "patch embed at cue token onto last token",
        (),
        ONE,
        fixed(End("embed")),
        here(CUE, LAST),
    ),
    "onto_neurons": case(
        "longer into clean",
        "patch mlp_hidden layer 0..1 neurons 3..9 at last token onto cue token",
        ("layer",),
        [(0,), (1,)],
        lambda layer: ([End("mlp_hidden", layer, u) for u in range(3, 10)], None),
        here(LAST, CUE),
    ),
    "onto_itself": case(
        "clean into clean",
        "patch resid_post layer * at cue token onto last token",
        ("layer",),
        EACH,
        at("resid_post"),
        here(CUE, LAST),
    ),
    "onto_joined": case(
        "longer into clean",
        "patch resid_post layer 0..1 at {cue token, last token} onto {subject token, cue token}",
        ("layer",),
        [(0,), (1,)],
        at("resid_post"),
        here("{cue token, last token}", "{subject token, cue token}"),
    ),
    "onto_joined_crosswise": case(
        "longer into clean",
        "patch resid_post layer 0..1 at {cue token, last token} onto {last token, cue token}",
        ("layer",),
        [(0,), (1,)],
        at("resid_post"),
        here("{cue token, last token}", "{last token, cue token}"),
    ),
    "onto_span": case(
        "other into clean",
        "patch v layer * head 0..1 at subject tokens onto subject tokens",
        ("layer", "head"),
        product(LAYERS, range(2)),
        at("v"),
        here("subject tokens", "subject tokens"),
    ),
    "swept_onto_one": case(
        "longer into clean",
        "patch resid_post layer 0..1 at subject token, cue token, last token onto cue token",
        ("layer", "position"),
        product(
            (0, 1),
            ("subject token", CUE, LAST),
        ),
        lambda layer, _: ([End("resid_post", layer)], None),
        lambda _, read: (read, CUE),
    ),
    "each_onto_one": case(
        "longer into clean",
        "patch resid_post layer 1 at each item token onto cue token",
        ("position",),
        [(f"item {n}",) for n in range(1, 6)],
        fixed(MID),
        lambda item: (f"{item} token", CUE),
    ),
    "swept_onto_swept": case(
        "longer into clean",
        "patch resid_post layer 1 at cue token, last token onto subject token, cue token",
        ("position",),
        [("cue token → subject token",), ("last token → cue token",)],
        fixed(MID),
        lambda label: tuple(label.split(" → ")),
    ),
    # between blocks
    "from_a_block": case(
        "second into clean",
        "patch resid_post layer * at right token onto cue token",
        ("layer",),
        EACH,
        at("resid_post"),
        here("right token", CUE),
    ),
    "from_its_corruption": case(
        "second.turned into clean",
        "patch resid_post layer * at right token onto cue token",
        ("layer",),
        EACH,
        at("resid_post"),
        here("right token", CUE),
    ),
    "into_a_block": case(
        "clean into second",
        "patch layers * head * at {cue token, last token} onto {right token, last token}",
        ("head",),
        [(h,) for h in range(4)],
        lambda head: ([End("z", n, head) for n in LAYERS], None),
        here("{cue token, last token}", "{right token, last token}"),
    ),
    "into_its_corruption": case(
        "longer into second.turned",
        "patch resid_post layer * at cue token onto last token",
        ("layer",),
        EACH,
        at("resid_post"),
        here(CUE, LAST),
    ),
    "where_the_other_is_sampled": case(
        "second into p",
        "patch resid_post layer * at right token onto cue token",
        ("layer",),
        EACH,
        at("resid_post"),
        here("right token", CUE),
        block="second",
    ),
    "back_where_the_other_is_sampled": case(
        "p.longer into clean",
        "patch resid_post layer * at cue token onto right token",
        ("layer",),
        EACH,
        at("resid_post"),
        here(CUE, "right token"),
        block="second",
    ),
    "the_same_name_in_both": case(
        "second into p",
        "patch resid_post layer * at last token",
        ("layer",),
        EACH,
        at("resid_post"),
        here(LAST, LAST),
    ),
    "one_source_for_all": case(
        "single into clean",
        "patch resid_post layer * at right token onto cue token",
        ("layer",),
        EACH,
        at("resid_post"),
        here("right token", CUE),
    ),
    "one_base_for_all": case(
        "clean into single",
        "patch resid_post layer * at cue token onto right token",
        ("layer",),
        EACH,
        at("resid_post"),
        here(CUE, "right token"),
    ),
    "corrupted_into_one_base": case(
        "longer into single",
        "patch resid_pre layer * at {subject token, last token} onto {right token, last token}",
        ("layer",),
        EACH,
        at("resid_pre"),
        here("{subject token, last token}", "{right token, last token}"),
    ),
    # another layer
    "into_a_layer": case(
        "longer into clean",
        "patch resid_post layer 0 at cue token into layer 1",
        (),
        ONE,
        lambda: ([End("resid_post", 0)], [1]),
        here(CUE, CUE),
    ),
    "into_an_earlier_layer": case(
        "longer into clean",
        "patch resid_post layer * at cue token, last token into layer 0",
        ("layer", "position"),
        product(LAYERS, (CUE, LAST)),
        lambda layer, _: ([End("resid_post", layer)], [0]),
        lambda _, label: (label, label),
    ),
    "into_any_layer": case(
        "longer into clean",
        "patch resid_pre layer 1 at last token into layer *",
        ("to_layer",),
        EACH,
        lambda to: ([End("resid_pre", 1)], [to]),
        here(LAST, LAST),
    ),
    "any_into_any_layer": case(
        "longer into clean",
        "patch resid_post layer * at last token onto cue token into layer 0..1",
        ("layer", "to_layer"),
        product(LAYERS, (0, 1)),
        lambda layer, to: ([End("resid_post", layer)], [to]),
        here(LAST, CUE),
    ),
    "heads_into_a_layer": case(
        "longer into clean",
        "patch layer 0 head * at last token into layer 2",
        ("head",),
        [(h,) for h in range(4)],
        lambda head: ([End("z", 0, head)], [2]),
        here(LAST, LAST),
    ),
    "a_block_into_a_layer": case(
        "second into clean",
        "patch mlp_out layer 2 at last token onto cue token into layer *",
        ("to_layer",),
        EACH,
        lambda to: ([End("mlp_out", 2)], [to]),
        here(LAST, CUE),
    ),
    # with another source
    "with_a_corruption": case(
        "other into clean",
        "patch resid_post layer * at last token onto cue token with longer",
        ("layer",),
        EACH,
        at("resid_post"),
        here(LAST, CUE),
        source="longer",
    ),
    "with_a_block": case(
        "other into clean",
        "patch resid_post layer * at right token onto cue token with second",
        ("layer",),
        EACH,
        at("resid_post"),
        here("right token", CUE),
        source="second",
    ),
    "with_a_blocks_corruption": case(
        "other into clean",
        "patch resid_post layer 0 at right token onto cue token into layer 1 with second.turned",
        (),
        ONE,
        lambda: ([End("resid_post", 0)], [1]),
        here("right token", CUE),
        source="second.turned",
    ),
}


def run_of(written: str, block: str) -> str:
    """The name in `support.rows` of a run of the file."""
    if written == "clean":
        return "clean" if block == "p" else block
    return {"p": "clean"}.get(written, written.removeprefix("p."))


def texts(written: str, block: str) -> list[Text]:
    return rows(run_of(written, block))


def carried(
    name: str,
    source: Text,
    base: Text,
    ends: Sequence[End],
    to: Sequence[int] | None,
    read: Sequence[int],
    written: Sequence[int],
) -> list[Write]:
    """Writes of the source's vectors."""
    found = copied(ends, plain(name, source), read, written)
    if to is None:
        return found
    assert len(to) == 1
    return [Write(w.site, to[0], w.vector, w.position, w.unit) for w in found]


def expected(name: str, of: Case) -> dict[Key, list[float]]:
    sources, bases = texts(of.source, of.block), texts(of.base, of.block)

    def changes(n: int, *key: Coord) -> Sequence[Changes]:
        ends, to = of.what(*key)
        read, written = of.where(*key)
        try:
            places = tokens(sources[n], read), tokens(bases[n], written)
        except KeyError:  # there are fewer items
            return []
        return [(carried(name, sources[n], bases[n], ends, to, *places), ())]

    return worked_out(name, of.cells, changes, bases, records(of.block))


@cache
def expected_of(name: str, key: str) -> dict[Key, list[float]]:
    return expected(name, CASES[key])


def base_of(name: str, of: Case) -> Array:
    return unpatched_of(name, of.base, of.block)


def unpatched_of(name: str, run: str, block: str) -> Array:
    pairs = zip(texts(run, block), records(block), strict=False)
    return np.array([difference(plain(name, text).logits, record) for text, record in pairs])


@cache
def results(
    data: Path, name: str, mode: str, cases: tuple[str, ...]
) -> dict[str, ExperimentResult]:
    """All cases in one file."""
    text = "".join(
        experiment(key, f"from {CASES[key].ways}", CASES[key].rule, block=CASES[key].block)
        for key in cases
    )
    return run_file(text, data, name, mode)


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("key", list(CASES))
def test_transplants_equal_the_reference(data: Path, key: str, mode: str) -> None:
    hold(data, key, "llama", mode)


def turn_of(key: str) -> str:
    return ("gpt2", "gpt_neox", "gemma2")[list(CASES).index(key) % 3]


@pytest.mark.parametrize("key", list(CASES))
def test_transplants_equal_the_reference_in_other_families(data: Path, key: str) -> None:
    name = turn_of(key)
    hold(data, key, name, "planned", tuple(k for k in CASES if turn_of(k) == name))


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", list(CASES))
def test_transplants_equal_the_reference_in_every_family(
    data: Path, key: str, name: str, mode: str
) -> None:
    if "neurons" in CASES[key].rule and name == "gpt_oss":
        pytest.skip("experts have no neurons of one name")
    hold(data, key, name, mode)


def hold(data: Path, key: str, name: str, mode: str, keys: tuple[str, ...] = ()) -> None:
    of = CASES[key]
    found = results(data, name, mode, keys or together(name))[key]
    agree(found, of.axes, expected_of(name, key), base_of(name, of), large=0.02)


def together(name: str) -> tuple[str, ...]:
    """Cases that are run in one file."""
    return tuple(key for key in CASES if not ("neurons" in CASES[key].rule and name == "gpt_oss"))


# --- values of the source run ---------------------------------------------------------------------


@pytest.mark.parametrize("ways", ["second into clean", "clean into second", "longer into single"])
def test_source_and_base_values_are_those_of_the_runs(data: Path, ways: str) -> None:
    source, _, base = ways.partition(" into ")
    rule = "patch resid_post layer 1 at last token"
    text = experiment("e", f"from {ways}", rule, measure="measure logit(answer) as delta")
    text += experiment("f", f"from {ways}", rule)
    found = run_file(text, data, "llama", "planned")["f"].measures[0]
    assert found.source is not None
    np.testing.assert_allclose(found.source[0], unpatched_of("llama", source, "p"), atol=1e-4)
    np.testing.assert_allclose(found.base[0], unpatched_of("llama", base, "p"), atol=1e-4)


@pytest.mark.parametrize("mode", QUICK)
def test_rows_are_paired_by_their_number_in_the_data(data: Path, mode: str) -> None:
    """Also if a limit samples some of the rows."""
    rule = "patch resid_post layer 1 at right token onto cue token"
    text = experiment("e", "from second into clean", rule).replace("prompts p", "prompts p limit 3")
    found = run_file(text, data, "llama", mode)["e"]
    assert found.row_ids is not None
    assert len(found.row_ids) == 3
    of = case("second into clean", rule, (), ONE, fixed(MID), here("right token", CUE))
    chosen = list(found.row_ids)
    values = np.array(expected("llama", of)[()])[chosen]
    agree(found, (), {(): values.tolist()}, base_of("llama", of)[chosen])


# --- several sources and bases --------------------------------------------------------------------


@pytest.mark.parametrize("mode", QUICK)
def test_several_sources_and_bases_are_axes(data: Path, mode: str) -> None:
    rule = "patch resid_post layer 0..1 at cue token onto last token"
    cases = {
        "both": ("clean, other", "longer, turned", ("source", "base", "layer")),
        "sources": ("other, longer", "clean", ("source", "layer")),
        "bases": ("clean", "other, longer", ("base", "layer")),
        "blocks": ("clean, longer", "second, second.turned", ("source", "base", "layer")),
    }
    text = "".join(
        experiment(key, f"from {sources} into {bases}", rule)
        for key, (sources, bases, _) in cases.items()
    )
    results = run_file(text, data, "llama", mode)
    for key, (sources, bases, axes) in cases.items():
        cells: dict[Key, list[float]] = {}
        starts, ends = [], []
        for source in sources.split(", "):
            for base in bases.split(", "):
                for layer in (0, 1):
                    at_layer = fixed(End("resid_post", layer))
                    one = case(f"{source} into {base}", rule, (), ONE, at_layer, here(CUE, LAST))
                    named = {"source": source, "base": base, "layer": layer}
                    cells[tuple(named[axis] for axis in axes)] = expected("llama", one)[()]
                    starts.append(unpatched_of("llama", base, "p"))
                    ends.append(unpatched_of("llama", source, "p"))
        found = results[key]
        agree(found, axes, cells, np.array(starts))
        source_values = found.measures[0].source
        assert source_values is not None
        shape = (len(ends), len(ends[0]))
        np.testing.assert_allclose(np.broadcast_to(source_values, shape), np.array(ends), atol=1e-4)


APART = "stats bootstrap(100) confidence 70% correct none"
"""With these four rows, all denominators differ from 0 at 70 % confidence, not at 95 %."""


def test_recovery_uses_each_pair_of_runs(data: Path) -> None:
    """A patch of all logits has a recovery of 1 for any pair of runs."""
    lines = ("from clean into longer, turned, other", "patch logits at last token")
    text = experiment("e", *lines, measure="measure kl(clean) as recovery", stats=APART)
    found = run_file(text, data, "llama", "planned")["e"]
    assert found.axes == ("base",)
    np.testing.assert_allclose(found.statistics[0].mean, 1, atol=1e-3)


# --- swap, freeze, set ----------------------------------------------------------------------------

Writes = Callable[..., list[Write]]
"""From a model, a row's number and the cell's coordinates."""


def both_ways(name: str, text: Text, ends: Sequence[End], one: str, two: str) -> list[Write]:
    run, left, right = plain(name, text), tokens(text, one), tokens(text, two)
    return [*copied(ends, run, right, left), *copied(ends, run, left, right)]


def number(ends: Sequence[End], name: str, text: Text, where: str, to: float) -> list[Write]:
    run = plain(name, text)
    return [
        Write(w.site, w.layer, w.vector * 0 + to, w.position, w.unit)
        for w in copied(ends, run, tokens(text, where), tokens(text, where))
    ]


def clean(n: int) -> Text:
    return rows()[n]


def patched_early(name: str, n: int) -> list[Write]:
    source = rows("longer")[n]
    ends, where = [End("resid_post", 0)], "{cue token, last token}"
    return copied(ends, plain(name, source), tokens(source, where), tokens(clean(n), where))


def frozen(name: str, n: int, ends: Sequence[End], where: str) -> list[Write]:
    places = tokens(clean(n), where)
    return copied(ends, plain(name, clean(n)), places, places)


PATCH = "patch resid_post layer 0 at {cue token, last token}"
FROM = "from longer into clean"

OTHERS: dict[str, tuple[str, tuple[str, ...], Sequence[Key], Writes]] = {
    "swap": (
        "swap resid_post layer * at subject token with last token",
        ("layer",),
        EACH,
        lambda name, n, layer: both_ways(
            name, clean(n), [End("resid_post", layer)], "subject token", LAST
        ),
    ),
    "swap_heads": (
        "swap k layer 0..1 head 0..1 at cue token with subject token",
        ("layer", "head"),
        product((0, 1), (0, 1)),
        lambda name, n, layer, head: both_ways(
            name, clean(n), [End("k", layer, head)], CUE, "subject token"
        ),
    ),
    "swap_joined": (
        "swap resid_pre layers 1..2 at {cue token, last token} with {first token, subject token}",
        (),
        ONE,
        lambda name, n: both_ways(
            name,
            clean(n),
            [End("resid_pre", 1), End("resid_pre", 2)],
            "{cue token, last token}",
            "{first token, subject token}",
        ),
    ),
    "swap_beside_a_patch": (
        f"{FROM} {PATCH} swap attn_out layer 1 at cue token with last token",
        (),
        ONE,
        lambda name, n: [
            *patched_early(name, n),
            *both_ways(name, clean(n), [End("attn_out", 1)], CUE, LAST),
        ],
    ),
    "freeze": (
        f"{FROM} {PATCH} freeze mlp_out layer * at tokens *",
        ("layer",),
        EACH,
        lambda name, n, layer: [
            *patched_early(name, n),
            *frozen(name, n, [End("mlp_out", layer)], "tokens *"),
        ],
    ),
    "freeze_heads": (
        f"{FROM} {PATCH} freeze z layers 1..2 heads * at last token",
        (),
        ONE,
        lambda name, n: [
            *patched_early(name, n),
            *frozen(name, n, [End("z", 1), End("z", 2)], LAST),
        ],
    ),
    "freeze_wins_if_later": (
        f"{FROM} {PATCH} freeze resid_post layer 0 at last token",
        (),
        ONE,
        lambda name, n: [
            *patched_early(name, n),
            *frozen(name, n, [End("resid_post", 0)], LAST),
        ],
    ),
    "freeze_loses_if_earlier": (
        f"{FROM} freeze resid_post layer 0 at last token {PATCH}",
        (),
        ONE,
        lambda name, n: patched_early(name, n),
    ),
    "set_zero": (
        "set attn_out layer * at last token to 0",
        ("layer",),
        EACH,
        lambda name, n, layer: number([End("attn_out", layer)], name, clean(n), LAST, 0),
    ),
    "set_number": (
        "set layer * head * at cue token, last token to 1.5",
        ("layer", "head", "position"),
        product(LAYERS, (1, 2), (CUE, LAST)),
        lambda name, n, layer, head, where: number(
            [End("z", layer, head)], name, clean(n), where, 1.5
        ),
    ),
    "set_loop": (
        "for c in [-2, 0.5, 3] { set resid_post layer 1 at {cue token, last token} to c }",
        ("c",),
        [(-2,), (0.5,), (3,)],
        lambda name, n, c: number(
            [End("resid_post", 1)], name, clean(n), "{cue token, last token}", c
        ),
    ),
    "set_param": (
        "set resid_post layer 0..1 at cue token to strength",
        ("layer",),
        [(0,), (1,)],
        lambda name, n, layer: number([End("resid_post", layer)], name, clean(n), CUE, 2),
    ),
    "set_negative": (
        "set mlp_hidden layer 1 neurons 3..9 at last token to -1",
        (),
        ONE,
        lambda name, n: number(
            [End("mlp_hidden", 1, u) for u in range(3, 10)], name, clean(n), LAST, -1
        ),
    ),
    "set_in_the_base": (
        "from clean into longer set resid_post layer * at cue token to 0.5",
        ("layer",),
        EACH,
        lambda name, n, layer: number(
            [End("resid_post", layer)], name, rows("longer")[n], CUE, 0.5
        ),
    ),
}
OTHERS["set_number"] = (
    OTHERS["set_number"][0].replace("head *", "head 1, 2"),
    *OTHERS["set_number"][1:],
)


@cache
def others(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    text = "param strength = 2\n" + "".join(
        experiment(key, of[0]) for key, of in OTHERS.items() if not _left_out(key, name)
    )
    return run_file(text, data, name, mode)


def _left_out(key: str, name: str) -> bool:
    return "mlp_hidden" in OTHERS[key][0] and name == "gpt_oss"


def _base_of_other(key: str) -> str:
    return "longer" if "into longer" in OTHERS[key][0] else "clean"


@cache
def expected_of_other(name: str, key: str) -> dict[Key, list[float]]:
    _, _, cells, writes = OTHERS[key]

    def changes(n: int, *cell: Coord) -> Sequence[Changes]:
        return [(writes(name, n, *cell), ())]

    return worked_out(name, cells, changes, rows(_base_of_other(key)), records())


def hold_other(data: Path, key: str, name: str, mode: str) -> None:
    found, expected = others(data, name, mode)[key], expected_of_other(name, key)
    agree(found, OTHERS[key][1], expected, unpatched(name, _base_of_other(key)), large=0.05)


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("key", list(OTHERS))
def test_swap_freeze_and_set_equal_the_reference(data: Path, key: str, mode: str) -> None:
    hold_other(data, key, "llama", mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", list(OTHERS))
def test_swap_freeze_and_set_equal_the_reference_in_every_family(
    data: Path, key: str, name: str, mode: str
) -> None:
    if _left_out(key, name):
        pytest.skip("experts have no neurons of one name")
    hold_other(data, key, name, mode)


def test_freezing_alone_changes_nothing(data: Path) -> None:
    text = experiment("e", "freeze resid_post layer * at {cue token, last token}")
    values = run_file(text, data, "llama", "plain")["e"].measures[0]
    np.testing.assert_allclose(values.patched, np.broadcast_to(values.base, (3, 4)), atol=1e-5)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ("from clean into second patch resid_post layer 0 at cue token", None),
        (
            "from longer into clean patch resid_post layer 0 at subject tokens onto last token",
            "E0307",
        ),
        (
            "from longer into clean "
            "patch resid_post layer 0 at {cue token, last token} onto subject tokens",
            "E0307",
        ),
        ("from longer into clean patch resid_post layer 0 at last token into layer 3", "E0302"),
        ("swap resid_post layer 0 at cue token with {last token, cue token}", None),
        ("from longer into clean swap resid_post layer 0 at cue token with cue token", "E0336"),
        ("from even into clean patch resid_post layer 0 at last token", None),
        ("from longer into nothing patch resid_post layer 0 at last token", "E0201"),
        (
            "from longer into clean "
            "patch resid_post layer 0 at cue token, last token, subject token "
            "onto cue token, last token",
            None,
        ),
    ],
)
def test_invalid_transplants_are_errors(data: Path, lines: str, code: str | None) -> None:
    """A position that one run lacks, unequal lengths, too few rows, unknown layers and runs."""
    found = codes(experiment("e", lines), data)
    assert found
    assert "E0108" not in found
    assert code is None or code in found
