"""Path patching, cell by cell, against its definition."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, Prompt, Record
from ..quick import in_turn, some
from ..reference.forward import Run, Write, forward
from ..reference.noise import keyed_by_number, noise
from .models import STRAIGHT, WITHOUT_NORMS, double
from .paths import LAST, RECEIVERS, SENDERS, End, Way, leads, paths, plain
from .support import (
    BLOCKS,
    MANY,
    QUICK,
    Array,
    Key,
    agree,
    codes,
    difference,
    experiment,
    product,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
)

FAMILIES = ("gpt2", "llama", "gpt_neox", "gpt_neox_sequential", "gemma2")
BARE = tuple(name + WITHOUT_NORMS for name in STRAIGHT)
LAYERS = range(3)
PAIR = "{cue token, last token}"
PARALLEL = ("gpt_neox",)
HEADED = ("q", "k", "v", "z", "head_out")


def parallel(name: str) -> bool:
    return name.split(" ")[0] in PARALLEL


@dataclass(frozen=True)
class Side:
    """One side of the arrow: its text, its axes, and its sites in every cell."""

    written: str
    axes: tuple[str, ...] = ()
    cells: tuple[tuple[tuple[Coord, ...], tuple[End, ...]], ...] = (((), ()),)


def joined(written: str, *ends: End) -> Side:
    """One value: a group, a single site, a joined set."""
    return Side(written, (), (((), ends),))


def swept(site: str, written: str, axes: str, layers: Sequence[int], units: Sequence[int]) -> Side:
    """axes: `layer`, `head`, or both."""
    if axes == "layer head":
        cells = tuple(((n, u), (End(site, n, u),)) for n in layers for u in units)
    elif axes == "layer":
        cells = tuple(
            ((n,), tuple(End(site, n, u) for u in units) or (End(site, n),)) for n in layers
        )
    else:
        cells = tuple(((u,), tuple(End(site, n, u) for n in layers)) for u in units)
    return Side(written, tuple(axes.split()), cells)


def grid(site: str, units: Sequence[int] = range(4)) -> Side:
    listed = ", ".join(map(str, units))
    return swept(site, f"{site} layer * head {listed}", "layer head", LAYERS, units)


@dataclass(frozen=True)
class Case:
    sender: Side
    receiver: Side
    at: str = PAIR
    mlps: bool = False
    run: str = "longer"
    base: str = "clean"
    measured: str = "last token"

    @property
    def rule(self) -> str:
        end = " through mlps" if self.mlps else ""
        return f"path {self.sender.written} -> {self.receiver.written} at {self.at}{end}"

    @property
    def axes(self) -> tuple[str, ...]:
        to = tuple(f"to_{axis}" for axis in self.receiver.axes)
        return (*self.sender.axes, *to, *(("position",) if "," in self.at_list else ()))

    @property
    def at_list(self) -> str:
        return "" if self.at.startswith("{") else self.at

    @property
    def positions(self) -> list[str]:
        return [part.strip() for part in self.at_list.split(",")] if self.at_list else [self.at]

    def experiment(self, key: str) -> str:
        measure = f"measure logit(answer) - logit(wrong) at {self.measured} as delta"
        return experiment(key, f"from {self.run} into {self.base}", self.rule, measure=measure)


def shared(name: str, receiver: End, case: Case) -> End:
    """The key-value head that a head of a group reads, if two heads share one."""
    own = name.startswith(("llama", "gemma2")) and case.receiver.written in ("k movers", "v movers")
    if not own:
        return receiver
    assert receiver.unit is not None
    return End(receiver.site, receiver.layer, receiver.unit // 2)


Cell = tuple[Sequence[End], Sequence[End], str]
"""Senders, receivers and the name of a position."""


def ways_of_prompts(
    case: Case, cells: Sequence[Cell]
) -> Iterator[tuple[Record, Prompt, Prompt, list[Way]]]:
    """Yield each record with its base prompt, its source prompt and the way of each cell."""
    for n, record in enumerate(records()):
        base, source = rows(case.base)[n], rows(case.run)[n]
        ways = [
            Way(senders, receivers, tokens(source, place), tokens(base, place))
            for senders, receivers, place in cells
        ]
        yield record, base, source, ways


@cache
def expected(name: str, case: Case) -> dict[Key, list[float]]:
    found: dict[Key, list[float]] = {}
    cells: list[Cell] = []
    combined = itertools.product(case.sender.cells, case.receiver.cells, case.positions)
    for (at, senders), (to, receivers), where in combined:
        reached = [
            r
            for r in (shared(name, receiver, case) for receiver in receivers)
            if any(leads(s, r, parallel=parallel(name)) for s in senders)
        ]
        if reached:
            found[(*at, *to, *((where,) if len(case.positions) > 1 else ()))] = []
            cells.append((senders, reached, where))
    model = double(name)
    for record, base, source, ways in ways_of_prompts(case, cells):
        runs = plain(name, model, base.ids), plain(name, model, source.ids)
        every = paths(name, model, base.ids, *runs, ways, mlps=case.mlps)
        for values, logits in zip(found.values(), every, strict=True):
            values.append(difference(logits, record, tokens(base, case.measured)[0]))
    return found


def precise(name: str) -> bool:
    """Whether to run in 64 bits, which resolves small effects; norms of gemma2 have 32."""
    return name != "gemma2"


def hold(found: ExperimentResult, name: str, case: Case) -> None:
    base, values = unpatched(name, case.base, at=case.measured), expected(name, case)
    fine = precise(name)
    agree(
        found,
        case.axes,
        values,
        base,
        large=2e-3 if fine else 2e-2,
        most=False,
        precise=fine,
    )


# --- sweeps, joined sites and groups -------------------------------------------------------------


def z(layer: int, head: int) -> End:
    return End("z", layer, head)


GROUPS = """
group senders = L0H1, L1H2, L0.mlp
group receivers = L2H1.q, L2H0.k, L1H1.v
group late = L1H1, L2H0
group mixed = L0H1, L1N3, L1N20, L0N7
group movers = L1H3, L2H2.q, L1H0.head_out
"""
MIXED = joined("mixed", z(0, 1), *(End("mlp_hidden", n, u) for n, u in ((1, 3), (1, 20), (0, 7))))
SENDING = joined("senders", z(0, 1), z(1, 2), End("mlp_out", 0))
RECEIVING = joined("receivers", End("q", 2, 1), End("k", 2, 0), End("v", 1, 1))
LOGITS = joined("logits", End("logits"))

CASES: dict[str, Case] = {
    "heads_to_queries": Case(grid("z", (0, 2)), grid("q", (1, 3))),
    "heads_to_keys": Case(
        swept("z", "layer 0 head *", "head", [0], range(4)),
        swept("k", "k layer 1 head 0, 1", "head", [1], (0, 1)),
        "tokens *",
        run="other",
    ),
    "heads_to_logits": Case(swept("z", "layer * head *", "layer head", LAYERS, range(4)), LOGITS),
    "heads_to_logits_at_the_last": Case(
        swept("z", "layer * head 0, 3", "layer head", LAYERS, (0, 3)), LOGITS, "last token"
    ),
    "heads_to_logits_through_mlps": Case(
        swept("z", "layer * head 0, 3", "layer head", LAYERS, (0, 3)),
        LOGITS,
        "last token",
        mlps=True,
    ),
    "heads_to_queries_through_mlps": Case(grid("z", (0, 2)), grid("q", (1, 3)), mlps=True),
    "everywhere_through_mlps": Case(
        swept("z", "layer * heads *", "layer", LAYERS, range(4)),
        swept("v", "v layer * heads 0, 1", "layer", LAYERS, (0, 1)),
        "tokens *",
        mlps=True,
        run="other",
    ),
    "one_head_to_one_query": Case(
        joined("L0H1", z(0, 1)), joined("L2H2.q", End("q", 2, 2)), "last token"
    ),
    "positions_are_swept": Case(
        swept("z", "layer * heads 1, 2", "layer", LAYERS, (1, 2)),
        swept("k", "k layer * heads 0, 1", "layer", LAYERS, (0, 1)),
        "subject token, cue token, last token",
        run="other",
    ),
    "layers_are_joined": Case(
        swept("z", "layers 0..1 head *", "head", (0, 1), range(4)),
        swept("q", "q layers * head 0, 1", "head", LAYERS, (0, 1)),
    ),
    "heads_are_joined": Case(
        swept("z", "layer * heads *", "layer", LAYERS, range(4)),
        swept("q", "q layer * heads *", "layer", LAYERS, range(4)),
    ),
    "windows_of_senders": Case(
        Side(
            "attn_out layer * window 2",
            ("layer",),
            (
                ((0,), (End("attn_out", 0),)),
                ((1,), (End("attn_out", 0), End("attn_out", 1))),
                ((2,), (End("attn_out", 1), End("attn_out", 2))),
            ),
        ),
        swept("attn_norm", "attn_norm layer *", "layer", LAYERS, ()),
    ),
    "a_group_sends": Case(SENDING, swept("q", "q layer * head 0, 1", "layer head", LAYERS, (0, 1))),
    "a_group_receives": Case(
        swept("z", "layer * head 0, 1", "layer head", LAYERS, (0, 1)), RECEIVING
    ),
    "groups_on_both_sides": Case(SENDING, RECEIVING),
    "queries_of_a_group": Case(
        grid("z", (0, 2)), joined("q movers", End("q", 1, 3), End("q", 2, 2), End("q", 1, 0))
    ),
    "keys_of_a_group": Case(
        grid("z", (0, 2)),
        joined("k movers", End("k", 1, 3), End("k", 2, 2), End("k", 1, 0)),
        "tokens *",
        run="other",
    ),
    "values_of_a_group_through_mlps": Case(
        SENDING,
        joined("v movers", End("v", 1, 3), End("v", 2, 2), End("v", 1, 0)),
        mlps=True,
    ),
    "groups_through_mlps": Case(SENDING, RECEIVING, mlps=True),
    "a_group_to_logits": Case(SENDING, LOGITS, "last token"),
    "a_group_that_is_late": Case(joined("late", z(1, 1), z(2, 0)), RECEIVING),
    "mlps_to_mlps": Case(
        swept("mlp_out", "mlp_out layer *", "layer", LAYERS, ()),
        swept("mlp_norm", "mlp_norm layer *", "layer", LAYERS, ()),
    ),
    "heads_to_mlps": Case(
        swept("z", "layer * head 0, 3", "layer head", LAYERS, (0, 3)),
        swept("mlp_norm", "mlp_norm layer *", "layer", LAYERS, ()),
    ),
    "neurons_send": Case(
        Side(
            "mlp_hidden layer * neuron 3, 20",
            ("layer", "neuron"),
            tuple(((n, u), (End("mlp_hidden", n, u),)) for n in LAYERS for u in (3, 20)),
        ),
        LOGITS,
    ),
    "heads_to_blocks": Case(
        swept("z", "layer * head 0, 3", "layer head", LAYERS, (0, 3)),
        swept("resid_pre", "resid_pre layer *", "layer", LAYERS, ()),
    ),
    "a_group_to_a_block_through_mlps": Case(
        SENDING,
        joined("resid_pre layer 2", End("resid_pre", 2)),
        "tokens *",
        mlps=True,
        run="other",
    ),
    "a_block_to_blocks": Case(
        swept("resid_pre", "resid_pre layer *", "layer", LAYERS, ()),
        swept("resid_pre", "resid_pre layer *", "layer", LAYERS, ()),
    ),
    "neurons_and_what_comes_before": Case(MIXED, LOGITS),
    "neurons_and_heads_to_queries": Case(
        MIXED, swept("q", "q layer 2 head *", "head", [2], range(4)), "tokens *", run="other"
    ),
    "neurons_and_heads_through_mlps": Case(MIXED, LOGITS, mlps=True),
    "from_the_clean_run": Case(grid("z", (0, 2)), grid("v", (0, 1)), run="clean", base="longer"),
}


@cache
def results(
    data: Path, name: str, mode: str, keys: tuple[str, ...] = tuple(CASES)
) -> dict[str, ExperimentResult]:
    """These cases in one file."""
    text = GROUPS + "".join(CASES[key].experiment(key) for key in keys)
    return run_file(text, data, name, mode, precise=precise(name))


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("key", list(CASES))
def test_path_patching_equals_the_reference(data: Path, key: str, mode: str) -> None:
    found = results(data, "llama", mode)[key]
    hold(found, "llama", CASES[key])


def turn_of(key: str) -> str:
    names = ("gpt2", "gpt_neox", "gpt_neox_sequential", "gemma2", "llama without norms")
    return names[list(CASES).index(key) % len(names)]


@pytest.mark.parametrize("key", list(CASES))
def test_path_patching_equals_the_reference_in_other_families(data: Path, key: str) -> None:
    name = turn_of(key)
    keys = tuple(k for k in CASES if turn_of(k) == name)
    hold(results(data, name, "planned", keys)[key], name, CASES[key])


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", [*FAMILIES, *BARE])
@pytest.mark.parametrize("key", list(CASES))
def test_path_patching_equals_the_reference_in_every_family(
    data: Path, key: str, name: str, mode: str
) -> None:
    hold(results(data, name, mode)[key], name, CASES[key])


# --- runs with noise ------------------------------------------------------------------------------

DRAWS = 3
NOISED = BLOCKS.replace(
    "corrupt other { subject = alt }",
    f"corrupt noised {{ add gaussian(std: 0.5, samples: {DRAWS}) to embed at subject tokens }}",
)
LOUD = {
    f"{key}_{way}": replace(case, run=run, base=base, mlps=mlps)
    for key, case, mlps in (
        ("to_queries", Case(grid("z", (0, 3)), grid("q", (0, 1))), False),
        ("to_values_through_mlps", Case(grid("z", (0, 3)), grid("v", (0, 1))), True),
        ("to_logits", Case(grid("z", (0, 3)), LOGITS, "last token"), False),
    )
    for way, run, base in (("out", "noised", "clean"), ("in", "clean", "noised"))
}


def draw_of(name: str, run: str, n: int, draw: int) -> Run:
    """The unpatched run of a row, with one noise draw if the run has noise."""
    text = rows()[n]
    clean = plain(name, double(name), text.ids)
    if run == "clean":
        return clean
    embedded = clean["embed", None]
    changed = [
        Write("embed", None, embedded[at, 0] + 0.5 * noise(n, draw, at, embedded.shape[2]), at)
        for at in text.spans["subject"]
    ]
    return forward(name, double(name), text.ids, changed)


@pytest.mark.slow
@pytest.mark.parametrize("way", some(["out", "in"], ["in"]))
def test_path_patching_averages_over_noise_draws(
    data: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric is averaged over noise draws, each with a separate path."""
    keyed_by_number(monkeypatch)
    name = "llama"
    cases = {key: case for key, case in LOUD.items() if key.endswith(way)}
    text = "".join(case.experiment(key) for key, case in cases.items())
    found = {mode: run_file(text, data, name, mode, precise=True, blocks=NOISED) for mode in QUICK}
    for key, case in cases.items():
        values: dict[Key, list[float]] = {}
        base = np.zeros(len(records()))
        for n, record in enumerate(records()):
            at, ids = tokens(rows()[n], case.at), rows()[n].ids
            runs = [
                [draw_of(name, run, n, draw) for run in (case.base, case.run)]
                for draw in range(DRAWS)
            ]
            base[n] = np.mean([difference(own.logits, record) for own, _ in runs])
            ways = {
                (*of, *to): Way(senders, receivers, at, at)
                for of, senders in case.sender.cells
                for to, receivers in case.receiver.cells
                if leads(senders[0], receivers[0], parallel=False)
            }
            every = [
                paths(name, double(name), ids, *pair, [*ways.values()], mlps=case.mlps)
                for pair in runs
            ]
            for cell, draws in zip(ways, zip(*every, strict=True), strict=True):
                mean = np.mean([difference(logits, record) for logits in draws])
                values.setdefault(cell, []).append(float(mean))
        for mode in QUICK:
            own = found[mode][key]
            agree(own, case.axes, values, base, large=2e-3, most=False, precise=True)


# --- every sender with every receiver ------------------------------------------------------------


def sending(site: str) -> Side:
    if site == "embed":
        return joined(site, End(site))
    if site in HEADED:
        return swept(site, f"{site} layer * heads 1, 3", "layer", LAYERS, (1, 3))
    if site == "mlp_hidden":
        return swept(site, f"{site} layer * neurons 3..24", "layer", LAYERS, range(3, 25))
    return swept(site, f"{site} layer *", "layer", LAYERS, ())


def receiving(site: str) -> Side:
    if site in LAST:
        return joined(site, End(site))
    if site in HEADED:
        return swept(site, f"{site} layer * heads 0, 1", "layer", LAYERS, (0, 1))
    return swept(site, f"{site} layer *", "layer", LAYERS, ())


@cache
def pairs(name: str) -> dict[str, Case]:
    return {
        f"{sender}_to_{receiver}": Case(sending(sender), receiving(receiver), measured="cue token")
        for sender in SENDERS
        for receiver in RECEIVERS
        if not (sender == "resid_mid" and parallel(name))
    }


@cache
def results_of_pairs(
    data: Path, name: str, mode: str, keys: tuple[str, ...], mlps: bool
) -> dict[str, ExperimentResult]:
    every = pairs(name)
    text = "".join(_through(every[key], mlps).experiment(key) for key in keys)
    return run_file(text, data, name, mode, precise=precise(name))


def _through(case: Case, mlps: bool) -> Case:
    return replace(case, mlps=mlps)


TURNS = ("gpt2", "gpt_neox", "gpt_neox_sequential", "gemma2", "llama")


@cache
def turn(name: str) -> tuple[str, ...]:
    """Pairs of a model: each pair is in one model, and each model has every sender and receiver."""
    number = TURNS.index(name)
    chosen = []
    for i, sender in enumerate(SENDERS):
        for j, receiver in enumerate(RECEIVERS):
            key = f"{sender}_to_{receiver}"
            own = TURNS[(i + j) % len(TURNS)]
            if key not in pairs(own):
                own = "llama"
            if own == TURNS[number]:
                chosen.append(key)
    return tuple(chosen)


def test_cases_cover_every_pair_of_sender_and_receiver() -> None:
    found = [key for name in TURNS for key in turn(name)]
    assert sorted(found) == sorted(f"{s}_to_{r}" for s in SENDERS for r in RECEIVERS)


@pytest.mark.parametrize("mlps", [False, True])
@pytest.mark.parametrize("name", TURNS)
def test_sender_and_receiver_pairs_equal_the_reference(data: Path, name: str, mlps: bool) -> None:
    """MLPs are held in one half of the pairs."""
    keys = turn(name)[mlps::2]
    for key in keys:
        found = results_of_pairs(data, name, "planned", keys, mlps)[key]
        hold(found, name, _through(pairs(name)[key], mlps))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["planned", "small passes"])
@pytest.mark.parametrize("mlps", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, *BARE])
def test_sender_and_receiver_pairs_equal_the_reference_in_every_family(
    data: Path, name: str, mlps: bool, mode: str
) -> None:
    for key, case in pairs(name).items():
        found = results_of_pairs(data, name, mode, tuple(pairs(name)), mlps)[key]
        hold(found, name, _through(case, mlps))


# --- laws ----------------------------------------------------------------------------------------


def values(
    data: Path, name: str, *lines: str, groups: str = "", mode: str = "planned"
) -> tuple[Array, ExperimentResult]:
    """Effects [cell, prompt]."""
    text = groups + experiment("e", *lines)
    found = run_file(text, data, name, mode, precise=precise(name))["e"]
    return found.measures[0].patched - found.measures[0].base, found


IN_ORDER = [(0, 1), (0, 2), (1, 2)]
AND_EQUAL = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("name", "rule", "expected"),
    [
        ("llama", "z layer * head 0 -> q layer * head 0", IN_ORDER),
        ("llama", "z layer * head 0 -> mlp_norm layer *", AND_EQUAL),
        ("llama", "resid_post layer * -> mlp_norm layer *", IN_ORDER),
        ("gpt_neox", "z layer * head 0 -> mlp_norm layer *", IN_ORDER),
        ("gpt_neox", "resid_pre layer * -> mlp_norm layer *", AND_EQUAL),
        ("gpt2", "resid_pre layer * -> q layer * head 0", AND_EQUAL),
        ("gpt2", "resid_mid layer * -> k layer * head 0", IN_ORDER),
    ],
)
def test_path_sweep_excludes_pairs_in_the_wrong_order(
    data: Path, name: str, rule: str, expected: list[tuple[int, int]]
) -> None:
    _, found = values(data, name, "from longer into clean", f"path {rule} at last token")
    assert found.axes == ("layer", "to_layer")
    assert [tuple(cell.coords.values()) for cell in found.cells] == expected


@pytest.mark.parametrize(("name", "mode"), in_turn(["llama", "gpt_neox"], QUICK))
def test_path_from_an_equal_source_changes_nothing(data: Path, name: str, mode: str) -> None:
    """Activations before the first difference of the two prompts are equal."""
    at = '{first token, "w40" token}'
    text = "".join(
        experiment(key, "from other into clean", rule)
        for key, rule in (
            ("a", f"path z layer * head 0, 3 -> q layer * head 1, 2 at {at}"),
            ("b", f"path z layer * head * -> logits at {at}"),
            ("c", f"path mlp_out layer * -> v layer * head 0 at {at} through mlps"),
        )
    )
    text += experiment(
        "d", "from clean into clean", f"path z layer * head 0, 3 -> k layer * head 0 at {PAIR}"
    )
    for found in run_file(text, data, name, mode).values():
        start = np.broadcast_to(found.measures[0].base, found.measures[0].patched.shape)
        np.testing.assert_allclose(found.measures[0].patched, start, atol=1e-5, rtol=0)


EVERYTHING = "group everything = embed, " + ", ".join(
    [f"L{n}H{h}" for n in LAYERS for h in range(4)] + [f"L{n}.mlp" for n in LAYERS]
)


@pytest.mark.parametrize(
    ("name", "mode"),
    in_turn(["llama", "gpt2", "gpt_neox", "gpt_neox_sequential", "gemma2"], QUICK),
)
def test_path_from_all_senders_gives_the_source_run(data: Path, name: str, mode: str) -> None:
    """At all tokens, the logits equal those of the source run, also with norms."""
    lines = ("from other into clean", "path everything -> logits at tokens *")
    found = values(data, name, *lines, groups=EVERYTHING + "\n", mode=mode)[1]
    np.testing.assert_allclose(
        found.measures[0].patched[0], unpatched(name, "other"), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("name", "mode"), in_turn(BARE, QUICK))
def test_path_effects_on_the_logits_sum_without_norms(data: Path, name: str, mode: str) -> None:
    """Without a final norm, the effects of single senders sum to the joint effect."""
    start, at = "from other into clean", "at last token"  # at one position
    rules = {
        "whole": f"path everything -> logits {at}",
        "embed": f"path embed -> logits {at}",
        "heads": f"path layer * head * -> logits {at}",
        "mlps": f"path mlp_out layer * -> logits {at}",
        "patch": f"patch resid_post layer 2 {at}",
    }
    text = EVERYTHING + "\n" + "".join(experiment(key, start, of) for key, of in rules.items())
    found = run_file(text, data, name, mode, precise=True)
    effects = {key: (of.measures[0].patched - of.measures[0].base) for key, of in found.items()}
    parts = sum(effects[key].sum(0) for key in ("embed", "heads", "mlps"))
    whole = effects["whole"][0]
    np.testing.assert_allclose(parts, whole, atol=1e-5, rtol=1e-5)
    assert np.abs(whole).max() > 0.1
    # nothing after the last block is held, so that a patch of the stream there is equal, too
    np.testing.assert_allclose(effects["patch"][0], whole, atol=1e-5, rtol=1e-5)


def test_path_from_the_last_mlp_to_the_logits_equals_a_patch(data: Path) -> None:
    """No MLP and no head follows the last MLP."""
    for name in ("llama", "gemma2", "gpt_neox"):
        path_, patch_ = (
            values(data, name, "from longer into clean", rule)[0]
            for rule in (
                "path mlp_out layer 2 -> logits at last token",
                "patch mlp_out layer 2 at last token",
            )
        )
        np.testing.assert_allclose(path_, patch_, atol=1e-4)
        assert np.abs(path_).max() > 0.05


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("path z layer 2 head * -> q layer * head * at last token", None),
        ("path z layer 1 head 0 -> k layer 1 head * at last token", None),
        ("path resid_post layer * -> v layer 0 head * at last token", None),
        ("path mlp_out layer 1 -> mlp_norm layer 1 at last token", None),
        ("path late -> receivers0 at last token", None),
        ("path q layer 0 head 0 -> q layer 1 head 0 at last token", None),
        ("path pattern layer 0 head 0 -> q layer 1 head 0 at last token", None),
        ("path final_norm -> logits at last token", None),
        ("path z layer 0 head 0 -> z layer 1 head 0 at last token", None),
        ("path z layer 0 head 0 -> resid_post layer 1 at last token", None),
        ("path z layer 0 head 4 -> q layer 1 head 0 at last token", "E0301"),
        ("path z layer 0 head 0 -> q layer 3 head 0 at last token", "E0302"),
        ("path z layer 0 head 0 -> q layer 1 head 0 at last token through heads", None),
        ("path z layer 0 head 0 -> q layer 1 head 0 at xs tokens", "E0307"),
    ],
)
def test_invalid_paths_are_errors(data: Path, rule: str, code: str | None) -> None:
    """No valid pair; sites that can't send or receive; missing sites."""
    groups = "group late = L1H1, L2H0\ngroup receivers0 = L1H0.q, L0H1.k\n"
    used = "\n".join(line for line in groups.splitlines() if line.split()[1] in rule.split())
    lines = experiment("e", "from longer into clean", rule)
    found = codes(f"{used}\n{lines}", data)
    assert found
    assert "E0108" not in found
    assert code is None or code in found


def test_path_without_a_source_run_is_an_error(data: Path) -> None:
    assert codes(experiment("e", "path z layer 0 head 0 -> logits at last token"), data)


def test_path_from_resid_mid_of_a_parallel_block_is_an_error(data: Path) -> None:
    rule = "path resid_mid layer 0 -> logits at last token"
    text = experiment("e", "from longer into clean", rule)
    result, found = try_file(text, data, "gpt_neox")
    assert result is None
    assert "E0402" in [d.code for d in found]


def test_path_sweep_has_every_ordered_pair_of_heads(data: Path) -> None:
    """There is one cell for each ordered pair of heads."""
    lines = ("from longer into clean", "path layer * head * -> q layer * head * at last token")
    found = values(data, "llama", *lines)[1]
    cells = [key for key in product(LAYERS, range(4), LAYERS, range(4)) if key[0] < key[2]]  # type: ignore[operator]
    assert found.axes == ("layer", "head", "to_layer", "to_head")
    assert [tuple(cell.coords.values()) for cell in found.cells] == cells
