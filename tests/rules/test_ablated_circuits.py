"""Ablated edges of a circuit, against passes that recompute the input of every receiver."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.execute.patching import rows as patched_rows
from mechdsl.forward.hooks.batch import CircuitWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.settled import CircuitSettler
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.models.shape import ModelShape
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.cost import PanelCount
from mechdsl.planner.passes import plan_cost
from mechdsl.planner.plan import PASS_TOKENS, PROMPT_TOKENS, Plan
from mechdsl.resolve.circuits import (
    EMBEDDING,
    END,
    RECEIVER_WORDS,
    SENDER_WORDS,
    AskedCircuits,
    CircuitDraws,
    EdgeGraph,
    draw_circuits,
    list_edges,
)
from mechdsl.resolve.sites import label_node
from mechdsl.resolve.types import CircuitEdge, SitePoint
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.store.store import Store
from mechdsl.vocab.metrics import EFFECTS

from ..execute import support as of_files
from ..execute.support import MODES, shared
from ..models import families
from ..operations import OperationCounter
from ..quick import in_turn
from ..reference.forward import stack
from ..shared_models import unchanged
from .circuits import EMBED, LOGITS, Features, circuit_pass, head, mlp, neuron, outputs, reads
from .models import WITHOUT_NORMS, bare, double
from .support import (
    DIFFERENCE,
    Array,
    agree,
    codes,
    difference,
    experiment,
    plain,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
)

FAMILIES = (
    "llama",
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
    "qwen3",
    "mistral",
    "gpt_oss",
    "gemma2",
    "llama" + WITHOUT_NORMS,
    "gpt_neox" + WITHOUT_NORMS,
)
INEXACT = ("gemma2",)
"""Families in 32 bits here: padding that sees no token is NaN in 64 bits."""
SOME = {
    "embed -> L0H1.q": [(EMBED, "L0H1.q")],
    "L0H1 -> L1H0.k": [("L0H1", "L1H0.k")],
    "layers 1..2 heads 0..1 -> logits": [
        (head(layer, n), LOGITS) for layer in (1, 2) for n in (0, 1)
    ],
    "L0.mlp -> v layer 2 heads *": [],  # as many key-value heads as the model has
    "embed -> mlp_norm layers *": [(EMBED, mlp(layer)) for layer in range(3)],
    "L0H2 -> L0.mlp": [("L0H2", mlp(0))],  # not in parallel blocks
    "L1H3 -> L2H3.q": [("L1H3", "L2H3.q")],
    "L2.mlp -> logits": [(mlp(2), LOGITS)],
}


def key_heads(name: str) -> int:
    config = double(name).config
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


@cache
def edges(name: str) -> tuple[str, frozenset[tuple[str, str]], frozenset[tuple[str, str]]]:
    """The circuit's line in the file, the circuit's edges and all edges of the model."""
    parts = stack(name, double(name))
    senders = reads(parts, key_heads(name), parallel=parts.parallel)
    every = frozenset((of, to) for to, before in senders.items() for of in before)
    found = {edge for named in SOME.values() for edge in named} & every
    found |= {(mlp(0), f"{head(2, n)}.v") for n in range(key_heads(name))}
    written = [each for each in SOME if each != "L0H2 -> L0.mlp" or not parts.parallel]
    return f"circuit c = {', '.join(written)}\n", frozenset(found), every


@dataclass(frozen=True)
class Case:
    rule: str
    fill: str
    at: str = "tokens *"
    base: str = "clean"

    def experiment(self, key: str) -> str:
        line = f"ablate {self.rule} at {self.at} with {self.fill}"
        ends = "" if self.base == "clean" else f"from clean into {self.base}"
        return experiment(key, ends, line)


PAIR = "{cue token, last token}"
CASES = {
    "zero": Case("c", "zero"),
    "other": Case("c", "other"),
    "all_but_other": Case("all but c", "other"),
    "all_but_zero": Case("all but c", "zero", PAIR),
    "mean": Case("all but c", "mean", PAIR),
    "mean_of_other": Case("c", "mean of other", "cue token"),
    "resample": Case("all but c", "resample", PAIR),
    "into_other": Case("c", "clean", base="other"),
    "longer": Case("all but c", "longer", PAIR),
}


def fills(
    name: str,
    case: Case,
    donors: Mapping[int, int],
    split: Collection[int] = (),
    features: Mapping[int, Features] | None = None,
    attention: Mapping[int, Features] | None = None,
) -> list[dict[str, Tensor]]:
    """By prompt and sender, [T of the base run, d_model] with the fill where the rule acts.

    split, features, attention: layers whose neurons or features are senders.
    """
    parts = stack(name, double(name))
    word, _, of = case.fill.partition(" of ")
    run = of or ("clean" if word in ("zero", "mean", "resample") else word)
    nodes = split, features, attention
    given = [outputs(plain(name, text), parts, *nodes) for text in rows(run)]
    at = [tokens(text, case.at) for text in rows(run)]
    found: list[dict[str, Tensor]] = []
    for n, text in enumerate(rows(case.base)):
        own: dict[str, Tensor] = {}
        for sender, value in given[n].items():
            filled = torch.zeros(len(text.ids), value.shape[1], dtype=value.dtype)
            if word == "mean":
                several = [each[sender][places] for each, places in zip(given, at, strict=True)]
                filled[tokens(text, case.at)] = torch.stack(several).mean(0)
            elif word != "zero":
                donor = donors.get(n, n)
                filled[tokens(text, case.at)] = given[donor][sender][at[donor]]
            own[sender] = filled
        found.append(own)
    return found


def ablated_values(
    name: str, case: Case, donors: Mapping[int, int], ablated: Set[tuple[str, str]], **nodes: Any
) -> list[float]:
    """The values of each prompt if these edges carry the fill of a case.

    nodes: `split`, `features` and `attention`, the layers whose neurons or features are nodes.
    """
    values: list[float] = []
    every_fill = fills(name, case, donors, **nodes)
    for n, (text, record) in enumerate(zip(rows(case.base), records(), strict=True)):
        at = tokens(text, case.at)
        logits = circuit_pass(name, double(name), text.ids, every_fill[n], ablated, at, **nodes)
        values.append(difference(logits, record))
    return values


def expected(
    name: str,
    case: Case,
    donors: Mapping[int, int],
    ablated: frozenset[tuple[str, str]] | None = None,
) -> list[float]:
    """The values of each prompt if the edges of the case carry the fill, or other edges."""
    _, circuit, every = edges(name)
    if ablated is None:
        ablated = every - circuit if case.rule.startswith("all but") else circuit
    return ablated_values(name, case, donors, ablated)


def find_donors(
    name: str, case: Case, values: Array, compute: Callable[..., list[float]] = expected
) -> dict[int, int]:
    """The row that each row takes its values from: the one whose values give the nearest result.

    compute: of the model, the case and the donors; the value of each prompt.
    """
    if case.fill != "resample":
        return {}
    of = [
        compute(name, case, {n: m for n in range(4) for m in [(n + shift) % 4]})
        for shift in range(4)
    ]
    found: dict[int, int] = {}
    for n in range(4):
        distances = [abs(of[shift][n] - values[n]) for shift in range(4)]
        found[n] = (n + int(np.argmin(distances))) % 4
    assert sorted(found.values()) == [*range(4)]
    assert all(n != donor for n, donor in found.items())
    return found


EACH = in_turn(FAMILIES, list(MODES))


@cache
def results(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    """All cases in one file, whose rows share passes."""
    text = edges(name)[0] + "".join(case.experiment(key) for key, case in CASES.items())
    return run_file(text, data, name, mode, precise=name not in INEXACT)


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize(("name", "mode"), EACH)
def test_ablated_edges_carry_the_fill(data: Path, name: str, mode: str, key: str) -> None:
    case = CASES[key]
    found = results(data, name, mode)[key]
    donors = find_donors(name, case, found.measures[0].patched[0])
    values = expected(name, case, donors)
    options: dict[str, Any] = {"most": False, "precise": name not in INEXACT, "large": 1e-2}
    agree(found, (), {(): values}, unpatched(name, case.base), **options)


SHARES = (0.05, 0.5, 0.9)
"""Of the edges that a circuit keeps: most nodes are settled, some, none."""


@pytest.mark.parametrize(
    ("name", "mode"), in_turn(("llama", "gpt2", "gpt_neox", "gpt_oss", "gemma2"), list(MODES))
)
def test_random_edges_of_any_number_carry_another_run(data: Path, name: str, mode: str) -> None:
    """Each head reads a different sum, or its output is that of the run."""
    every = sorted(edges(name)[2])
    random = np.random.default_rng(0)
    kept = [frozenset(edge for edge in every if random.random() < share) for share in SHARES]
    text = "".join(
        f"circuit c{n} = {', '.join(f'{of} -> {to}' for of, to in sorted(own))}\n"
        + experiment(f"e{n}", f"ablate all but c{n} at tokens * with other")
        for n, own in enumerate(kept)
    )
    found = run_file(text, data, name, mode, precise=name not in INEXACT)
    for n, own in enumerate(kept):
        values = expected(name, Case("", "other"), {}, frozenset(every) - own)
        np.testing.assert_allclose(found[f"e{n}"].measures[0].patched[0], values, atol=1e-5)


FILLS = ("other", "zero")
PRICED = ("gpt2", "llama", "gemma2", "gpt_neox", "gpt_oss", "mixtral")


@pytest.mark.parametrize(("name", "fill"), in_turn(PRICED, FILLS))
def test_plan_counts_the_operations_of_circuits_within_a_tenth(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, fill: str
) -> None:
    """Of edges that are kept at random, of those of every second sender, so that heads share
    inputs, and of nearly all edges."""
    like = "llama" if name == "mixtral" else name
    every, random = sorted(edges(like)[2]), np.random.default_rng(0)
    kept = sorted({of for of, _ in every})[::2]
    some = [edge for edge in every if random.random() < 0.5]
    for own in (some, [edge for edge in every if edge[0] in kept], every[1:]):
        text = f"circuit c = {', '.join(f'{of} -> {to}' for of, to in own)}\n"
        line = f"ablate all but c at tokens * with {fill}"
        done, planned = count_operations(data, monkeypatch, name, text, line)
        assert done / 1.1 < planned < done * 1.1
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("share", "name"), in_turn((0.0, *SHARES), ("gpt2", "llama", "gemma2", "gpt_oss"))
)
def test_plan_counts_only_nodes_of_circuits_that_are_computed(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, share: float
) -> None:
    every = sorted(edges(name)[2])
    random = np.random.default_rng(0)
    own = [edge for edge in every if random.random() < share] or [every[-1]]
    text = f"circuit c = {', '.join(f'{of} -> {to}' for of, to in own)}\n"
    done, planned = count_operations(data, monkeypatch, name, text)
    assert done / 1.1 < planned < done * 1.1


def test_plan_counts_only_tokens_that_an_ablated_circuit_changes(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, rule = edges("gpt2")[0], "ablate c at last token with zero"
    done, planned = count_operations(data, monkeypatch, "gpt2", text, rule, later=False)
    assert done / 1.15 < planned < done * 1.15


def count_operations(
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    circuit: str,
    rule: str = "ablate all but c at tokens * with other",
    *,
    later: bool = True,
) -> tuple[float, float]:
    """The floating-point operations of patched rows that a run does, and those that it plans.

    later: whether all queries are computed, so that the products with keys that follow them, which
    the plan leaves out, are subtracted.
    """
    done, plans = [0], list[Plan]()

    def count(run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **options: Any) -> Any:
            with OperationCounter() as counter:
                found = run(*given, **options)
            done[0] += counter.get_total_flops()
            return found

        return counted

    for run in (run_full, run_packed):
        monkeypatch.setattr(patched_rows, run.__name__, count(run))
    text = circuit + of_files.experiment("e", "prompts p", rule, of_files.DIFFERENCE)
    options = RunOptions(on_profile=lambda plan, _: plans.append(plan))
    of_files.run_file(text, data, bare(name), options)
    [panel] = plans[0].panels
    unpatched = PanelCount(panel, PASS_TOKENS, PROMPT_TOKENS).unpatched(stopped=True)
    planned = plan_cost(plans[0]).planned.flops - unpatched.flops
    shape, lengths = panel.experiments[0].experiment.model.shape, panel.table.runs["clean"].lengths
    pairs = int((lengths * (lengths - 1) // 2).sum()) if later else 0
    return done[0] - 4 * pairs * shape.n_layers * shape.blocks[0].heads * shape.blocks[
        0
    ].d_head, planned


# --- effects --------------------------------------------------------------------------------------

CASES_OF_EFFECTS = {
    "faithfulness": Case("all but c", "mean", PAIR),
    "faithfulness of fills": Case("all but c", "zero, mean", PAIR),
    "completeness": Case("c", "other"),
    "minimality": Case("all but c without each edge", "other"),
    "faithfulness of each edge": Case("all but c without each edge", "zero", "last token"),
    "completeness into other": Case("c", "clean", base="other"),
}


def by_formula(effect: str, name: str, case: Case) -> list[float]:
    """The effect in each cell, from passes without the executor."""
    _, circuit, every = edges(name)
    found: list[float] = []
    ordered = [named(each) for each in list_edges(shape_of(name))]
    for fill in case.fill.split(", "):
        own = Case(case.rule, fill, case.at, case.base)
        removed = [each for each in ordered if each in circuit]
        choices = [circuit]
        if "without" in case.rule:
            choices = [circuit - {each} for each in removed]
        empty = np.mean(expected(name, own, {}, every))
        whole = np.mean(expected(name, own, {}, every - circuit))
        base = np.mean(unpatched(name, case.base))
        for choice in choices:
            ablated = every - choice if case.rule.startswith("all but") else choice
            patched = np.mean(expected(name, own, {}, ablated))
            top = whole - patched if effect == "minimality" else patched - empty
            found.append(float(top / (base - empty)))
    return found


@pytest.mark.parametrize("key", CASES_OF_EFFECTS)
@pytest.mark.parametrize(
    ("name", "mode"), in_turn(("llama", "gpt2", "gpt_neox", "qwen3"), list(MODES))
)
def test_circuit_effects_are_relative_to_the_run_with_every_edge_ablated(
    data: Path, name: str, mode: str, key: str
) -> None:
    effect, case = key.split()[0], CASES_OF_EFFECTS[key]
    line = f"{DIFFERENCE.rpartition(' as ')[0]} as {effect}"
    ends = "" if case.base == "clean" else f"from clean into {case.base}"
    rule = f"ablate {case.rule} at {case.at} with {case.fill}"
    text = edges(name)[0] + experiment("e", ends, rule, measure=line)
    found = run_file(text, data, name, mode, precise=True)["e"]
    values = by_formula(effect, name, case)
    own, printed = found.measures[0], found.statistics[0].mean
    assert own.source is not None
    means = EFFECTS[effect].of_means(*(run.mean(1) for run in (own.patched, own.base, own.source)))
    np.testing.assert_allclose(means, values, rtol=1e-4, atol=1e-6)
    there = ~np.isnan(printed)  # four rows may not distinguish a denominator from 0
    np.testing.assert_allclose(printed[there], means[there])
    assert len(found.cells) == len(values)
    assert np.ptp(values) > 1e-3 or len(values) == 1


def test_random_circuits_are_compared_with_the_same_runs(data: Path) -> None:
    rule = "ablate all but c at tokens * with other"
    given = {"stats": "stats bootstrap(100) confidence 50% correct none"}  # of four rows
    text = edges("gpt2")[0] + "".join(
        experiment(own, rule, "against random(3)", measure=f"measure kl(clean) as {own}", **given)
        for own in ("raw", "faithfulness")
    )
    found = run_file(text, data, "gpt2", "planned", precise=True)
    raw, own = found["raw"].control(0), found["faithfulness"].control(0)
    assert raw is not None
    assert own is not None
    statistics = found["faithfulness"].statistics[0]
    base, empty = statistics.base_mean, statistics.source_mean
    shares = [(each - empty) / (base - empty) for each in (raw.low, raw.high)]
    np.testing.assert_allclose([own.low, own.high], np.sort(shares, axis=0), atol=1e-12)
    assert own.high > own.low
    assert found["faithfulness"].conventions["∅"] == (
        "every edge of the model has the fill, at the same tokens of the same rows"
    )


def test_convention_names_other_rules_that_act_with_every_edge_ablated(data: Path) -> None:
    rules = "ablate c at tokens * with zero\n  scale z layer 0 head 0 at last token by 2"
    text = edges("gpt2")[0]
    text += experiment("e", rules, measure="measure kl(clean) as completeness")
    found = run_file(text, data, "gpt2", "planned")["e"]
    assert found.conventions["∅"].endswith("of the same rows, with the other rules")


def test_ablating_every_edge_with_a_run_gives_the_output_of_that_run(data: Path) -> None:
    line = DIFFERENCE.rpartition(" as ")[0]
    rule = "ablate all but c at tokens * with other"
    text = CIRCUIT + experiment("e", rule, measure=f"{line} as faithfulness")
    found = run_file(text, data, "llama", "planned", precise=True)["e"].measures[0]
    assert found.source is not None
    np.testing.assert_allclose(found.source[0], unpatched("llama", "other"), atol=1e-5)


# --- other rules, runs and controls ---------------------------------------------------------------

CIRCUIT = "circuit c = embed -> L0H1.q, L0H1 -> logits, L1.mlp -> logits\n"


def shape_of(name: str) -> ModelShape:
    return shared(double(name)).shape


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_ablating_all_edges_to_the_logits_with_a_run_gives_its_output(
    data: Path, name: str
) -> None:
    """The senders' own values cancel, and biases are those of both runs."""
    senders = ("embed", "layers * heads *", "mlp_out layers *")
    text = f"circuit c = {', '.join(f'{of} -> logits' for of in senders)}\n"
    text += experiment("e", "from other into clean", "ablate c at tokens * with other")
    found = run_file(text, data, name, "planned", precise=True)["e"].measures[0]
    np.testing.assert_allclose(found.patched[0], unpatched(name, "other"), atol=1e-5)
    assert np.abs(found.patched[0] - unpatched(name)).max() > 0.1


def test_ablating_a_component_changes_all_of_its_circuit_edges(data: Path) -> None:
    """A rule on an earlier component changes what all of its edges carry."""
    rules = "ablate c at tokens * with zero", "ablate layer 0 head 1 at tokens * with zero"
    text = CIRCUIT + experiment("both", *rules) + experiment("head", rules[1])
    found = run_file(text, data, "llama", "planned", precise=True)
    text = "circuit c = L1.mlp -> logits, embed -> L0H1.q\n"
    alone = run_file(text + experiment("both", *rules), data, "llama", "planned", precise=True)
    # the head's own edge is already zero
    np.testing.assert_allclose(
        found["both"].measures[0].patched, alone["both"].measures[0].patched, atol=1e-9
    )
    assert not np.allclose(found["both"].measures[0].patched, found["head"].measures[0].patched)


SETTLED = {
    "whole run": (("ablate all but c at tokens * with other",), True),
    "some tokens": ((f"ablate all but c at {PAIR} with other",), False),
    "zero": (("ablate all but c at tokens * with zero",), False),
    "another rule": (
        (
            "ablate all but c at tokens * with other",
            "ablate layer 0 head 1 at tokens * with zero",
        ),
        False,
    ),
    "run with a rule": (
        (
            "run r { ablate layer 0 head 1 at tokens * with zero }",
            "ablate all but c at tokens * with r",
        ),
        False,
    ),
    "read site": (("ablate all but c at tokens * with other",), False),
}


@pytest.mark.parametrize("key", SETTLED)
def test_circuit_skips_nodes_only_where_their_output_is_the_fill(
    data: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """`c` has nodes without a path from the embedding, and others without one to the logits."""
    rules, skips = SETTLED[key]
    seen, heads = list[int](), set[tuple[int | None, int]]()
    settle = CircuitSettler.settle

    def spy(*given: Any) -> CircuitWrite:
        found = settle(*given)
        seen.extend(found.outputs)
        heads.update((fill.where.layer, unit) for fill in found.heads for unit in fill.units)
        return found

    monkeypatch.setattr(CircuitSettler, "settle", spy)
    measure = "measure cosine(L1.mlp, clean) as raw" if key == "read site" else DIFFERENCE
    text = CIRCUIT + experiment("e", *rules, measure=measure)
    found = run_file(text, data, "gpt2", "planned", precise=True)["e"].measures[0].patched
    assert set(seen) == ({0, 1, 2} if skips else set())
    every = {(layer, unit) for layer in range(3) for unit in range(4)}
    assert heads == (every - {(0, 1)} if skips else set())
    del seen[:]
    whole = run_file(text, data, "gpt2", "plain", precise=True)["e"].measures[0].patched
    assert not seen
    np.testing.assert_allclose(found, whole, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_projection_is_computed_only_where_a_head_needs_it(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The circuit has no path from the embedding, so that every head gives its fill."""
    tokens: list[int] = []
    block = double(name).get_submodule({"gpt2": "transformer.h.1", "llama": "model.layers.1"}[name])
    module = block.attn.c_attn if name == "gpt2" else block.self_attn.k_proj
    compute = module.forward

    def counted(hidden: Tensor) -> Tensor:
        tokens.append(hidden[..., 0].numel())
        return compute(hidden)

    monkeypatch.setattr(module, "forward", counted)
    text = "circuit c = L2.mlp -> logits\n"
    counts: list[int] = []
    for rule in ("ablate c at tokens * with other", "ablate all but c at tokens * with other"):
        run_file(text + experiment("e", rule), data, name, "planned", precise=True)
        counts.append(sum(tokens))
        tokens.clear()
    assert counts[0] - counts[1] == sum(len(each.ids) for each in rows("clean"))


def test_fills_are_an_axis_and_rows_may_start_from_a_run(data: Path) -> None:
    run = "run r { ablate layer 1 head 0 at last token with zero }"
    fills = ("zero", "mean", "resample")
    each = [
        experiment(f"f{n}", run, "from clean into r", f"ablate c at last token with {fill}")
        for n, fill in enumerate(fills)
    ]
    every = experiment(
        "all", run, "from clean into r", f"ablate c at last token with {', '.join(fills)}"
    )
    of_run = experiment("of_run", run, "ablate c at last token with r")
    found = run_file(
        CIRCUIT + every + "".join(each) + of_run, data, "gpt2", "planned", precise=True
    )
    for n in range(len(fills)):
        own = found[f"f{n}"].measures[0].patched[0]
        np.testing.assert_allclose(found["all"].measures[0].patched[n], own, atol=1e-9)
    assert len({tuple(row) for row in found["all"].measures[0].patched.tolist()}) == len(fills)
    assert np.abs(found["of_run"].measures[0].patched - unpatched("gpt2")).max() > 1e-4


def named(edge: CircuitEdge) -> tuple[str, str]:
    of, to = edge
    sender = EMBED if of.site == "resid_pre" else mlp(of.layer or 0)
    sender = head(of.layer or 0, of.unit) if of.unit is not None else sender
    return sender, label_node(to)


D_MLP = shape_of("llama").blocks[0].neurons
"""Neurons of a layer, in all families."""


def list_members(end: SitePoint, every: Sequence[CircuitEdge]) -> list[str]:
    """One end of an edge in the reference: its name, or those of all neurons of its node."""
    if end.site == "mlp_hidden" and end.unit is None:
        own = {each.unit for edge in every for each in edge if replace(each, unit=None) == end}
        return [neuron(end.layer or 0, n) for n in range(D_MLP) if n not in own]
    return [EMBED if end == EMBEDDING else label_node(end)]


def list_edges_of(edge: CircuitEdge, every: Sequence[CircuitEdge]) -> list[tuple[str, str]]:
    """An edge in the reference: one, or those of all neurons of its nodes."""
    of, to = (list_members(end, every) for end in edge)
    return [*product(of, to)]


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_edges_are_all_pairs_of_a_sender_and_a_later_receiver(name: str) -> None:
    assert {named(edge) for edge in list_edges(shape_of(name))} == edges(name)[2]


def test_cached_random_circuits_match_their_shape_circuit_seed_and_count() -> None:
    circuit = list_edges(shape_of("llama"))[:3]
    changed = ((circuit[:2], 0, 5), (circuit, 1, 5), (circuit, 0, 6), (circuit, 0, 5))
    for name, (own, seed, count) in product(("llama", "gpt2"), changed):
        shape = shape_of(name)
        expected = CircuitDraws(EdgeGraph(shape), own, seed).draws(count)
        found = draw_circuits(AskedCircuits(shape, frozenset(own), seed, count))
        assert found.circuits == tuple(expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_random_circuits_have_paths_from_the_embedding_to_the_logits(name: str) -> None:
    shape = shape_of(name)
    every = list_edges(shape)
    wanted = {(EMBED, "L0H1.q"), ("L0H1", LOGITS), (EMBED, mlp(1)), (mlp(1), "L2H0.v")}
    wanted |= {("L2H1" if name == "llama" else "L2H0", LOGITS)}  # two heads read one value
    circuit = [edge for edge in every if named(edge) in wanted]
    drawing = CircuitDraws(EdgeGraph(shape), circuit, 0)
    drawn = drawing.draws(50)
    assert drawing.is_connected
    assert len({frozenset(own) for own in drawn}) == 50
    assert CircuitDraws(EdgeGraph(shape), circuit[::-1], 0).draws(50) == drawn
    assert CircuitDraws(EdgeGraph(shape), circuit, 1).draws(50) != drawn
    shared = 1 if name == "gpt2" else 2
    for own in drawn:
        assert len(own) == len(circuit)
        assert set(own) != set(circuit)
        here = [named(edge) for edge in own]
        for of, to in here:
            assert of == EMBED or any(leads(t, of, shared) for _, t in here)
            assert to == LOGITS or any(leads(to, s, shared) for s, _ in here)


@pytest.mark.parametrize("share", [5, 12])
def test_random_circuits_may_need_many_paths(share: int) -> None:
    """Most edges of the model."""
    graph = EdgeGraph(shape_of("gpt2"))
    left_out = range(1, len(graph.every) - 1, share)
    circuit = [edge for n, edge in enumerate(graph.every) if n not in left_out]
    drawing = CircuitDraws(graph, circuit, 0)
    drawn = drawing.draws(3)
    assert drawing.is_connected
    assert [len({*own}) for own in drawn] == [len(circuit)] * 3
    assert len(circuit) > len(graph.every) // 2 - 2
    assert all(graph.covers(own) for own in drawn)


def leads(receiver: str, sender: str, shared: int) -> bool:
    """Whether a sender depends on what this receiver reads."""
    node, _, letter = receiver.partition(".")
    if letter not in ("k", "v") or "H" not in sender:
        return sender == (receiver if letter == "mlp" else node)
    (layer, number), (at, n) = node.split("H"), sender.split("H")
    return at == layer and int(n) // shared == int(number)


@pytest.mark.parametrize("share", [0.6, 0.95])
def test_random_circuits_may_have_most_edges_of_the_model(share: float) -> None:
    graph = EdgeGraph(shape_of("llama"))
    ends = [edge for edge in graph.every if EMBEDDING in edge or END in edge]
    others = [edge for edge in graph.every if edge not in ends]
    circuit = [*ends, *others[: round(share * len(graph.every)) - len(ends)]]
    assert graph.covers(circuit)
    found = CircuitDraws(graph, circuit, 0).draws(8)
    assert [len(own) for own in found] == [len(circuit)] * 8
    assert all(graph.covers(own) for own in found)


def test_the_control_ablates_random_circuits_of_the_same_size(data: Path) -> None:
    circuit = "circuit c = embed -> L0H1.v, L0H1 -> L1.mlp, L1.mlp -> logits\n"
    rule = "ablate all but c at tokens * with other"
    text = circuit + experiment("e", "from other into clean", rule, "against random(3)")
    found = run_file(text, data, "gpt2", "planned", precise=True)["e"]
    every, shape = edges("gpt2")[2], shape_of("gpt2")
    ends = {(EMBED, "L0H1.v"), ("L0H1", mlp(1)), (mlp(1), LOGITS)}
    circuit_edges = [edge for edge in list_edges(shape) if named(edge) in ends]
    given, effects = fills("gpt2", Case("all but c", "other"), {}), list[float]()
    for own in CircuitDraws(EdgeGraph(shape), circuit_edges, 0).draws(3):
        ablated = every - {named(edge) for edge in own}
        values = [
            circuit_pass("gpt2", double("gpt2"), row.ids, fill, ablated, range(len(row.ids)))
            for row, fill in zip(rows("clean"), given, strict=True)
        ]
        patched = [difference(each, r) for each, r in zip(values, records(), strict=True)]
        effects.append(float(np.mean(patched - unpatched("gpt2"))))
    band = found.control(0)
    assert band is not None
    assert (float(band.low[0]), float(band.high[0])) == pytest.approx((min(effects), max(effects)))
    assert found.conventions["controls"] == (
        "random circuits, 3 draws, seed 0; of 3 edges, each on a path from `embed` to `logits`, at "
        "the same tokens"
    )


@pytest.mark.parametrize(
    ("listed", "are_equal"),
    [("embed -> logits, L0H1 -> logits", True), ("embed -> L0H1.v, L0H1 -> logits", False)],
)
def test_random_circuits_that_equal_the_ablated_run_are_reported(
    listed: str, are_equal: bool, data: Path
) -> None:
    """Of two edges that needn't be on paths, few draws have one to `logits`."""
    rule = "ablate all but c at tokens * with zero"
    measures = "\n".join(f"measure kl(clean) as {name}" for name in ("faithfulness", "delta"))
    text = experiment("e", rule, "against random(4)", measure=measures)
    found = run_file(f"circuit c = {listed}\n{text}", data, "gpt2", "planned", precise=True)["e"]
    for number in range(2):
        band = found.control(number)
        assert band is not None
        assert (band.high[0] - band.low[0] < 1e-6) == are_equal
    said = found.conventions.get("equal draws", "")
    assert said.count("all draws have the same effect") == 2 * are_equal
    assert said.count("that of the run with everything ablated") == are_equal
    table = " ".join(found.to_text(200).split())
    assert table.count("all draws have the same effect") == 4 * are_equal


def test_complete_circuits_are_compared_with_draws_of_small_completeness(data: Path) -> None:
    """The completeness of a distance from the base run is 1 minus its share of the largest one, so
    the draws that are more complete are those with a larger effect."""
    text = "circuit d = embed -> L0.mlp, L0.mlp -> logits\n"
    of_d = ("from other into clean", "ablate d at tokens * with other", "against random(9)")
    effects = ("completeness", "delta")
    for key, names in (("both", effects), ("one", effects[:1])):
        measures = "\n".join(f"measure kl(clean) as {name}" for name in names)
        stats = "stats bootstrap(100) confidence 50% correct none"  # of four rows
        text += experiment(key, *of_d, measure=measures, stats=stats)
    found = run_file(text, data, "gpt2", "planned", precise=True)
    of_ratio, of_distance = (found["both"].control(number) for number in range(2))
    assert of_ratio is not None
    assert of_distance is not None
    assert 0 < of_ratio.low[0] < of_ratio.high[0] < 1
    assert 0.1 < of_distance.p[0] < 1
    assert of_ratio.p[0] == of_distance.p[0]
    said = [found[key].conventions["null band"] for key in ("both", "one")]
    assert "at least as large (`completeness`: small) in size as the cell" in said[0]
    assert "at least as small in size as the cell" in said[1]


@pytest.mark.parametrize("edges", ["L0H1 -> logits, embed -> L1H0.q", "embed -> logits"])
def test_draws_of_sizes_with_one_circuit_repeat_this_circuit(edges: str) -> None:
    every = list_edges(shape_of("gpt2"))
    wanted = [f"{of} -> {to}" for of, to in map(named, every)]
    circuit = [edge for edge, text in zip(every, wanted, strict=True) if text in edges.split(", ")]
    draws = CircuitDraws(EdgeGraph(shape_of("gpt2")), circuit, 0).draws(3)
    is_path = len(circuit) == 1
    assert (draws == [tuple(circuit)] * 3) == is_path
    for own in ([], every):
        assert CircuitDraws(EdgeGraph(shape_of("gpt2")), own, 0).draws(3) == [tuple(own)] * 3


def test_control_of_the_only_circuit_of_a_size_is_an_error_with_a_valid_fix(data: Path) -> None:
    lines = ("ablate all but c at tokens * with zero", "against random(39)")
    text = "circuit c = embed -> logits\n" + experiment("e", *lines)
    (problem,) = try_file(text, data, "gpt2")[1]
    assert problem.code == "E0630"
    assert "there is no other circuit with 1 edge on a path from `embed`" in problem.message
    assert problem.help_text == "remove this line, or ablate a circuit of a different size"


# --- errors and keys ------------------------------------------------------------------------------

WRONG = {
    "ablate c at tokens * with nothing": "E0203",
    "ablate c at tokens * with zero generate 3": "E0108",
    "ablate c at tokens * with zero ablate all but c at tokens * with zero": "E0108",
    "ablate c at tokens * with zero set attn_norm layer 1 at last token to 0": "E0108",
    "ablate c at tokens * with zero replace block layer 1 with block layer 0": "E0108",
    "run r { ablate c at last token with zero } from r into clean patch L0H1 at token 1": "E0108",
    "ablate c at tokens * with zero from other into clean using gradient_input": "E0608",
    "ablate c at tokens * with zero against random(3, heads)": "E0630",
    "patch c at tokens * with other": "E0207",
    "ablate L0H1 without each edge at tokens * with zero": "E0201",
    "ablate all but c without each edge at tokens * with zero against random(3)": "E0630",
    "ablate all but L0H1 at tokens * with zero": "E0201",
}
WRONG_EDGES = {
    "L1H0 -> L0H1.q": "E0335",
    "L1.mlp -> L1H0.k": "E0335",
    "L0H0 -> L1H1": "E0334",
    "attn_out layer 0 -> logits": "E0334",
    "embed -> resid_pre layer 1": "E0334",
    "embed -> q layer 0 head *": "E0304",
    "embed -> L1H9.q": "E0301",
    "embed -> L9.mlp": "E0302",
    "top 1 of e -> logits": "E0108",
}


@pytest.mark.parametrize("lines", WRONG)
def test_rules_that_circuits_do_not_support_are_errors(data: Path, lines: str) -> None:
    assert WRONG[lines] in codes(CIRCUIT + experiment("e", lines), data)


WRONG_EFFECTS = {
    ("faithfulness", "ablate c at tokens * with zero"): "`ablate all but CIRCUIT …`",
    ("completeness", "ablate all but c at tokens * with zero"): "`ablate CIRCUIT …`",
    ("minimality", "ablate all but c at tokens * with zero"): "without each edge …`",
    ("faithfulness", "ablate L0H1 at tokens * with zero"): "`ablate all but CIRCUIT …`",
    ("faithfulness", ""): "`ablate all but CIRCUIT …`",
}


@pytest.mark.parametrize(("effect", "rule"), WRONG_EFFECTS)
def test_circuit_effects_without_the_matching_rule_are_errors(
    data: Path, effect: str, rule: str
) -> None:
    line = f"{DIFFERENCE.rpartition(' as ')[0]} as {effect}"
    result, problems = try_file(CIRCUIT + experiment("e", rule, measure=line), data, "llama")
    assert result is None
    assert problems[0].code == "E0612"
    assert WRONG_EFFECTS[effect, rule] in problems[0].message


def test_edges_off_any_path_to_logits_are_named_next_to_their_minimality(data: Path) -> None:
    """Nothing reads L0H2 and L0H0."""
    rule = "ablate all but c without each edge at tokens * with zero"
    measure = f"{DIFFERENCE.rpartition(' as ')[0]} as minimality"
    whole = "circuit c = embed -> L1H1.q, L0H3 -> L1H1.k, L1H1 -> logits\n"
    part = "circuit d = embed -> L0H2.q, embed -> L1H1.v, L1H1 -> logits, embed -> L0H0.k\n"
    text = whole + part + experiment("e", rule, measure=measure)
    text += experiment("f", rule.replace("c w", "d w"), measure=measure)
    found = run_file(text, data, "gpt2", "planned", precise=True)
    assert "without" not in found["e"].conventions
    said = "2 of 4 edges aren't on a path to `logits`: removing one has no effect ("
    assert found["f"].conventions["without"].startswith(said)
    names = found["f"].conventions["without"].removeprefix(said).rstrip(")").split(", ")
    dead = [n for n, cell in enumerate(found["f"].cells) if cell.coords["edge"] in names]
    assert len(dead) == len(names) == 2
    own = found["f"].measures[0]
    np.testing.assert_allclose(own.patched[dead], own.base[dead], atol=1e-9)
    rest = [n for n in range(4) if n not in dead]
    assert np.abs(own.patched[rest] - own.base[rest]).max(axis=1).min() > 1e-6


def test_kept_edges_off_any_path_to_logits_are_named(data: Path) -> None:
    """If all other edges are ablated at every token; elsewhere, other edges lead on."""
    kept = "embed -> L1H1.v, L1H1 -> logits"
    text = f"circuit c = {kept}\ncircuit d = {kept}, embed -> L0H2.q, embed -> L0H0.k\n"
    text += "circuit n = embed -> L0H2.q, L0H1 -> L1H1.k\ncircuit o = embed -> L0H1.v\n"
    rules = {
        "c": "all but c at tokens *",
        "d": "all but d at tokens *",
        "n": "all but n at tokens *",
        "o": "all but o at tokens *",
        "last": "all but n at last token",
        "off": "n at tokens *",
        "each": "n without each edge at tokens *",
    }
    for key, rule in rules.items():
        text += experiment(f"x{key}", f"ablate {rule} with other")
    found = run_file(text, data, "gpt2", "planned", precise=True)
    said = {key: found[f"x{key}"].conventions.get("circuit keeps", "") for key in rules}
    assert said["d"] == (
        "2 of 4 edges aren't on a path to `logits` at the ablated tokens: keeping one doesn't "
        "change the logits (embed -> L0H2.q, embed -> L0H0.k)"
    )
    assert said["n"].startswith("nothing: none of its 2 edges is on a path to `logits` at")
    assert said["o"].startswith("nothing: its only edge isn't on a path")
    assert not any(said[key] for key in ("c", "last", "off", "each"))
    assert "without" not in found["xeach"].conventions
    values = {key: found[f"x{key}"].measures[0].patched for key in rules}
    np.testing.assert_allclose(values["d"], values["c"], atol=1e-9)
    np.testing.assert_allclose(values["n"], values["o"], atol=1e-9)
    assert np.abs(values["n"] - values["c"]).max() > 1e-4


def test_ablating_a_one_edge_circuit_without_each_edge_is_an_error(data: Path) -> None:
    rule = "ablate c without each edge at tokens * with zero"
    assert codes("circuit c = embed -> L0H1.q\n" + experiment("e", rule), data) == ["E0207"]


@pytest.mark.parametrize("edge", WRONG_EDGES)
def test_edges_that_the_model_lacks_are_errors(data: Path, edge: str) -> None:
    text = f"circuit c = {edge}\n" + experiment("e", "ablate c at tokens * with zero")
    assert WRONG_EDGES[edge] in codes(text, data)


@pytest.mark.parametrize(
    ("edge", "site", "hint"),
    [
        ("L0H0 -> L1H1", "L1H1", "`L1H1.q`, `L1H1.k` or `L1H1.v`"),
        ("L0H0 -> head_out layer 1 head 1", "head_out layer 1 head 1", "`L1H0.q`"),
        ("attn_out layer 0 -> logits", "attn_out layer 0", SENDER_WORDS),
        ("embed -> resid_pre layer 1", "resid_pre layer 1", RECEIVER_WORDS),
    ],
)
def test_invalid_edge_end_error_lists_the_valid_ends(
    data: Path, edge: str, site: str, hint: str
) -> None:
    text = f"circuit c = {edge}\n" + experiment("e", "ablate c at tokens * with zero")
    (problem,) = (each for each in try_file(text, data, "llama")[1] if each.code == "E0334")
    assert problem.span is not None
    assert problem.span.written == site
    assert hint in (problem.help_text or "")


def test_ablating_all_but_a_circuit_of_all_edges_is_an_error(data: Path) -> None:
    every = "embed -> q layers * heads *, embed -> logits"
    senders = ("embed", "layers * heads *", "mlp_out layers *")
    receivers = (
        "q layers * heads *",
        "k layers * heads *",
        "v layers * heads *",
        "mlp_norm layers *",
    )
    listed = [f"{of} -> {to}" for of in senders for to in (*receivers, "logits")]
    text = f"circuit c = {every}, {', '.join(listed)}\n"
    assert codes(text + experiment("e", "ablate all but c at tokens * with zero"), data) == [
        "E0207"
    ]


CHANGES = {
    "edge": ("embed -> L0H1.q", "embed -> L0H2.q"),
    "rest": ("ablate c", "ablate all but c"),
    "fill": ("with zero", "with other"),
    "position": ("at tokens *", "at last token"),
}


def ran(text: str, folder: Path, store: Path) -> tuple[int, Array]:
    """The number of rows that ran, and the values of the first experiment."""
    done: list[int] = []
    how = RunOptions(on_profile=lambda _, profile: done.append(profile.distinct))
    with Store(store) as kept, kept.begin(text, {}) as opened:
        found, problems = of_files.try_file(text, folder, bare("llama"), how, run=opened)
        assert found is not None, problems
        opened.finish({}, {})
    return sum(done), found.experiments[0].measures[0].patched


def check_stored_values(circuit: str, change: tuple[str, str], folder: Path, least: float) -> None:
    """Check that a change of a file computes other values, and that another name of its circuit
    computes none.

    Args:
        circuit: The definition of a circuit `c`.
        change: A text of the file, and its replacement.
        least: By how much some value changes.
    """
    rule = "ablate c at tokens * with zero"
    text = circuit + of_files.experiment("e", "prompts p", rule, of_files.DIFFERENCE)
    other = text.replace(*change)
    assert other != text
    first, values = ran(text, folder, folder / "store")
    again, changed = ran(other, folder, folder / "store")
    renamed, same = ran(text.replace(" c ", " own "), folder, folder / "store")
    assert (first, again, renamed) == (len(records()), len(records()), 0)
    np.testing.assert_array_equal(values, same)
    assert np.abs(values - changed).max() > least
    np.testing.assert_allclose(ran(other, folder, folder / "fresh")[1], changed, atol=1e-6)


@pytest.mark.parametrize("change", CHANGES)
def test_stored_values_depend_on_edges_fills_and_positions(tmp_path: Path, change: str) -> None:
    check_stored_values(CIRCUIT, CHANGES[change], tmp_path, 1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param("gemma3_text", marks=pytest.mark.slow), "olmo2", "exaone4"]
)
def test_all_edges_of_models_with_norms_after_attention_carry_another_run(
    data: Path, name: str
) -> None:
    """The value is that of the other run, but not if only MLPs send its values."""
    to_all = ("q layers * heads *", "k layers * heads *", "v layers * heads *", "mlp_norm layers *")
    senders = ("layers * heads *", "mlp_out layers *", "embed")
    every = [f"{of} -> {to}" for of in senders for to in (*to_all, "logits")]
    text = f"circuit c = {', '.join(every)}\ncircuit d = {', '.join(every[5:10])}\n"
    block, measure = "prompts p", of_files.DIFFERENCE
    text += "".join(
        of_files.experiment(f"of_{each}", block, f"ablate {each} at tokens * with other", measure)
        for each in "cd"
    )
    ends = "from clean into other"
    text += of_files.experiment("o", block, ends, "ablate c at tokens * with clean", measure)
    model = families.module(name, **({} if name == "exaone4" else {"attention_bias": True}))
    result, problems = of_files.try_file(text, data, model, MODES["planned"])
    found = {key: own.measures[0] for key, own in of_files.by_name(result, problems).items()}
    np.testing.assert_allclose(found["of_c"].patched, found["o"].base, atol=1e-4)
    np.testing.assert_allclose(found["o"].patched, found["of_c"].base, atol=1e-4)
    assert np.abs(found["of_d"].patched - found["of_c"].patched).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "skips"),
    [
        ("exaone4", True),
        pytest.param("gemma3_text", True, marks=pytest.mark.slow),
        ("olmoe", False),
        ("bitnet", False),
    ],
)
def test_skipped_nodes_of_models_with_further_norms_do_not_change_values(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, skips: bool
) -> None:
    """Norms follow sublayers. In OLMoE, one norm follows the queries of all heads, and in BitNet
    their outputs, so that a head depends on edges into others."""
    heads = list[int]()
    settle = CircuitSettler.settle

    def spy(*given: Any) -> CircuitWrite:
        found = settle(*given)
        heads.append(sum(len(fill.units) for fill in found.heads))
        return found

    monkeypatch.setattr(CircuitSettler, "settle", spy)
    config = {**families.CONFIGS["olmo2"], "num_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(families.CONFIGS, "olmoe", config)
    monkeypatch.setitem(families.CONFIGS, "bitnet", families.CONFIGS["olmo2"])
    model = unchanged(families.module(name))
    every = sorted((named(each) for each in list_edges(shared(model).shape)), key=str)
    random, text = np.random.default_rng(0), ""
    for n, share in enumerate(SHARES):
        own = [edge for edge in every if random.random() < share]
        text += f"circuit c{n} = {', '.join(f'{of} -> {to}' for of, to in own)}\n"
        rule = f"ablate all but c{n} at tokens * with other"
        text += of_files.experiment(f"e{n}", "prompts p", rule, of_files.DIFFERENCE)
    found = of_files.by_name(*of_files.try_file(text, data, model, MODES["planned"]))
    assert len(heads) == len(SHARES)
    assert (max(heads) > 4) == skips
    whole = of_files.by_name(*of_files.try_file(text, data, model, MODES["plain"]))
    for n in range(len(SHARES)):
        patched = found[f"e{n}"].measures[0].patched
        assert np.abs(patched - found[f"e{n}"].measures[0].base).max() > 1e-2
        np.testing.assert_allclose(patched, whole[f"e{n}"].measures[0].patched, atol=1e-4)
        assert ("heads" in found[f"e{n}"].conventions) == (not skips)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text"])
def test_kept_senders_that_read_nothing_leave_streams_of_exact_zeros(data: Path, name: str) -> None:
    """Norms would make rounding errors as large as any other stream."""
    text = "circuit c = embed -> L2H0.v, L2H2 -> L2.mlp, L2H2 -> logits\n" + of_files.experiment(
        "e", "prompts p", "ablate all but c at tokens * with zero", "measure logit(answer) as raw"
    )
    found = of_files.by_name(*of_files.try_file(text, data, unchanged(families.module(name))))
    measure = found["e"].measures[0]
    assert not measure.patched.any()
    assert np.abs(measure.base).min() > 1e-3


@torch.no_grad()
def test_bias_before_a_norm_after_attention_stays_if_heads_are_ablated(data: Path) -> None:
    """The unembedding reads the embedding, MLPs, and norms of biases."""
    model: Any = families.module("olmo2", attention_bias=True)
    text = "circuit c = layers * heads * -> logits\n" + of_files.experiment(
        "e", "prompts p", "ablate c at tokens * with zero", of_files.DIFFERENCE
    )
    result, problems = of_files.try_file(text, data, model, MODES["planned"])
    found = of_files.by_name(result, problems)["e"].measures[0].patched[0]
    outputs_of_mlps, expected_ = list[Tensor](), list[float]()
    for block in model.model.layers:
        block.post_feedforward_layernorm.register_forward_hook(
            lambda _, args, output: outputs_of_mlps.append(output)
        )
    for row, record in zip(rows("clean"), records(), strict=True):
        outputs_of_mlps.clear()
        ids = torch.tensor([row.ids])
        model(ids)
        x = model.model.embed_tokens(ids) + sum(outputs_of_mlps)
        for block in model.model.layers:
            x = x + block.post_attention_layernorm(block.self_attn.o_proj.bias)
        expected_.append(difference(model.lm_head(model.model.norm(x))[0], record))
    np.testing.assert_allclose(found, expected_, atol=1e-4)
