"""Random combinations of rules, compared with the reference.

Each experiment has one to three rules of any type; the first may sweep its layer. A file has
several experiments, which the planner runs together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ..execute.support import ABSOLUTE, MODES, RELATIVE, SMALL
from ..reference.forward import Edge, Write
from .models import FAMILIES, double
from .paths import LAST, RECEIVERS, SENDERS, End, Way, copied, leads, paths
from .support import (
    QUICK,
    Text,
    difference,
    edited,
    experiment,
    plain,
    records,
    rounding,
    rows,
    run_file,
    tokens,
)

LAYERS = (0, 1, 2)
SINGLE = ("last token", "cue token", "subject token", "first token", '"w40" token')
JOINED = ("{cue token, last token}", "{subject token, cue token}", "{first token, last token}")
SPANS = ("subject tokens", "tokens between first token and subject token", "tokens *")
HEADED = {"q": 4, "k": 2, "v": 2, "z": 4, "head_out": 4, "q_rot": 4, "k_rot": 2}
WHOLE = ("resid_pre", "resid_post", "attn_norm", "mlp_norm", "attn_out", "mlp_out")

Act = Callable[[str, Text, int, Sequence[int]], tuple[list[Write], list[Edge]]]
"""From a model's name, a base text, a row's number and the layers: the changes."""


@dataclass(frozen=True)
class Rule:
    """A rule without its layers: its text has `{}` instead."""

    written: str
    act: Act


def _edge(draw: random.Random) -> Rule:
    kind = draw.choice(["block", "reweight", "uniform", "set"])
    few = (*SINGLE, *JOINED)
    query = draw.choice((*few, *SPANS))
    key = draw.choice(few if kind in ("block", "set") else (*few, *SPANS))
    while any(max(tokens(t, query)) < min(tokens(t, key)) for t in rows()):  # is refused
        query, key = draw.choice((*few, *SPANS)), draw.choice(few)
    heads = draw.choice([None, (1,), (0, 3), (2,)])
    said = "" if heads is None else f" head{'s' * (len(heads) > 1)} {', '.join(map(str, heads))}"
    amount = {"reweight": draw.choice([0.3, 2.5, 6]), "set": draw.choice([0.05, 0.4])}.get(kind, 0)
    verb = kind if kind in ("block", "reweight") else "set"
    end = {"reweight": f" by {amount}", "uniform": " to uniform", "set": f" to {amount}"}
    written = f"{verb} attention {{}}{said} from {query} to {key}{end.get(kind, '')}"

    def act(name: str, text: Text, n: int, layers: Sequence[int]) -> tuple[list[Write], list[Edge]]:
        queries, keys = tokens(text, query), tokens(text, key)
        return [], [Edge(kind, layer, queries, keys, amount, heads) for layer in layers]  # type: ignore[arg-type]

    return Rule(written, act)


def _site(draw: random.Random) -> tuple[str, tuple[int | None, ...]]:
    """The text after the layers, and the units."""
    site = draw.choice((*HEADED, *WHOLE))
    if site in WHOLE:
        return site, (None,)
    units = tuple(sorted(draw.sample(range(HEADED[site]), draw.choice((1, 2)))))
    return site, units


def _words(site: str, units: Sequence[int | None]) -> str:
    heads = ", ".join(str(unit) for unit in units if unit is not None)
    return f"{site} {{}}" + (f" head{'s' * (len(units) > 1)} {heads}" if heads else "")


def _ends(site: str, units: Sequence[int | None], layers: Sequence[int]) -> list[End]:
    return [End(site, layer, unit) for layer in layers for unit in units]


def _patch(draw: random.Random) -> Rule:
    site, units = _site(draw)
    run = draw.choice(["longer", "other"])
    read = draw.choice((*SINGLE, *JOINED))
    same = [p for p in (*SINGLE, *JOINED) if p.startswith("{") == read.startswith("{")]
    onto = draw.choice([read, draw.choice(same)])
    written = f"patch {_words(site, units)} at {read}"
    written += f" onto {onto}" * (onto != read) + f" with {run}"

    def act(name: str, text: Text, n: int, layers: Sequence[int]) -> tuple[list[Write], list[Edge]]:
        source = rows(run)[n]
        ends = _ends(site, units, layers)
        return copied(ends, plain(name, source), tokens(source, read), tokens(text, onto)), []

    return Rule(written, act)


def _own(draw: random.Random) -> Rule:
    """A rule that writes a value of the base run, or a number."""
    site, units = _site(draw)
    at = draw.choice((*SINGLE, *JOINED, *SPANS))
    kind = draw.choice(["freeze", "ablate", "set", "swap"])
    other = draw.choice([p for p in SINGLE if p != at]) if at in SINGLE else ""
    kind = "freeze" if kind == "swap" and not other else kind
    number = {"ablate": 0.0, "set": draw.choice([0.7, -1.2])}.get(kind)
    end = {"ablate": " with zero", "set": f" to {number}", "swap": f" with {other}"}.get(kind, "")

    def act(name: str, text: Text, n: int, layers: Sequence[int]) -> tuple[list[Write], list[Edge]]:
        run, ends, here = plain(name, text), _ends(site, units, layers), tokens(text, at)
        if kind == "swap":
            there = tokens(text, other)
            return [*copied(ends, run, there, here), *copied(ends, run, here, there)], []
        found = copied(ends, run, here, here)
        if number is not None:
            found = [
                Write(w.site, w.layer, torch.full_like(w.vector, number), w.position, w.unit)
                for w in found
            ]
        return found, []

    return Rule(f"{kind} {_words(site, units)} at {at}{end}", act)


def _attention(draw: random.Random) -> Rule:
    """A rule that writes the attention of one prompt into another of equal length."""
    site, head = draw.choice(["pattern", "scores"]), draw.randrange(4)
    at = draw.choice((*SINGLE, *JOINED, "tokens *"))
    run = draw.choice(["other", "turned", "clean"])

    def act(name: str, text: Text, n: int, layers: Sequence[int]) -> tuple[list[Write], list[Edge]]:
        source = rows(run)[n]
        ends = _ends(site, (head,), layers)
        return copied(ends, plain(name, source), tokens(source, at), tokens(text, at)), []

    return Rule(f"patch {site} {{}} head {head} at {at} with {run}", act)


@dataclass(frozen=True)
class Mixture:
    """An experiment. layers: those of each rule; None if the rule sweeps all layers."""

    rules: tuple[Rule, ...]
    layers: tuple[tuple[int, ...] | None, ...]

    @property
    def lines(self) -> list[str]:
        found = ["from other into clean"]
        for rule, layers in zip(self.rules, self.layers, strict=True):
            words = "layer *" if layers is None else f"layer {layers[0]}"
            if layers is not None and len(layers) > 1:
                words = f"layers {', '.join(map(str, layers))}"
            found.append(rule.written.replace("{}", words))
        return found

    def value(self, name: str, n: int, layer: int | None) -> float:
        text, writes, edges = rows()[n], [], []
        for rule, layers in zip(self.rules, self.layers, strict=True):
            own = [layer] if layers is None else list(layers)
            done = rule.act(name, text, n, own)  # type: ignore[arg-type]
            writes.extend(done[0])
            edges.extend(done[1])
        return difference(edited(name, text, writes, edges).logits, records()[n])


def mixture(draw: random.Random) -> Mixture:
    kinds = [_edge, _edge, _patch, _own, _attention]
    rules = [draw.choice(kinds)(draw) for _ in range(draw.choice((1, 2, 2, 3)))]
    layers: list[tuple[int, ...] | None] = [
        draw.choice([(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), LAYERS]) for _ in rules
    ]
    if draw.random() < 0.5:
        layers[0] = None
    return Mixture(tuple(rules), tuple(layers))


def agree(name: str, key: str, lines: Sequence[str], found: np.ndarray, own: np.ndarray,
          base: np.ndarray) -> None:  # fmt: skip
    """found, own: [cell, prompt]"""
    error, effect = np.abs(found - own), np.abs(own - base)
    where = f"{name}, {key}: {lines}\n{found}\nnot\n{own}"
    assert found.shape == own.shape, where
    assert error.max() <= ABSOLUTE, where
    assert (error <= RELATIVE * np.maximum(effect, SMALL * rounding(own))).all(), where


def hold(data: Path, name: str, seed: int, modes: Sequence[str], count: int = 10) -> None:
    draw = random.Random(seed)
    mixtures = {f"e{i}": mixture(draw) for i in range(count)}
    text = "".join(experiment(key, *of.lines) for key, of in mixtures.items())
    found = {mode: run_file(text, data, name, mode) for mode in modes}
    for key, of in mixtures.items():
        layers = LAYERS if of.layers[0] is None else (None,)
        own = np.array([[of.value(name, n, layer) for n in range(4)] for layer in layers])
        base = np.array([difference(plain(name, t).logits, r) for t, r in zip(rows(), records())])  # noqa: B905
        for mode, results in found.items():
            values = results[key].measures[0].patched
            agree(name, f"{mode}, {key}", of.lines, values, own, base)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_random_rule_combinations_equal_the_reference(data: Path, name: str) -> None:
    hold(data, name, 1, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", FAMILIES)
def test_random_rule_combinations_equal_the_reference_in_every_family(
    data: Path, name: str, seed: int
) -> None:
    hold(data, name, 100 * FAMILIES.index(name) + seed, list(MODES))


# --- paths ---------------------------------------------------------------------------------------


def _layered(draw: random.Random, site: str) -> tuple[str, End]:
    """A short name, and the site that it denotes."""
    layer = draw.choice(LAYERS)
    if site in HEADED:
        head = draw.randrange(HEADED[site])
        return f"L{layer}H{head}.{site}", End(site, layer, head)
    if site == "mlp_hidden":
        neuron = draw.randrange(28)
        return f"L{layer}N{neuron}", End(site, layer, neuron)
    return f"{site} layer {layer}", End(site, layer)


def _group(draw: random.Random, sites: Sequence[str], parallel: bool) -> dict[str, End]:
    """Draw distinct members."""
    usable = [
        s for s in sites if s not in (*LAST, "embed") and (s, parallel) != ("resid_mid", True)
    ]
    return dict(_layered(draw, draw.choice(usable)) for _ in range(draw.choice((1, 2, 4))))


def hold_paths(data: Path, name: str, seed: int, mode: str, count: int = 8) -> None:
    draw = random.Random(seed)
    parallel = name == "gpt_neox"
    text, cases = "", {}
    while len(cases) < count:
        senders = _group(draw, SENDERS, parallel)
        receivers = _group(draw, RECEIVERS, parallel)
        if draw.random() < 0.3:
            receivers = {"logits": End("logits")}
        if not _overlap(list(senders.values()), parallel) and any(
            leads(s, r, parallel=parallel) for s in senders.values() for r in receivers.values()
        ):
            key, at, mlps = (
                f"e{len(cases)}",
                draw.choice((*SINGLE[:3], *JOINED)),
                draw.random() < 0.5,
            )
            to = f"r{key}"
            text += f"group s{key} = {', '.join(senders)}\n"
            if "logits" in receivers:
                to = "logits"
            else:
                text += f"group r{key} = {', '.join(receivers)}\n"
            rule = f"path s{key} -> {to} at {at}{' through mlps' * mlps}"
            text += experiment(key, "from longer into clean", rule)
            cases[key] = (tuple(senders.values()), tuple(receivers.values()), at, mlps, rule)
    found = run_file(text, data, name, mode, precise=name != "gemma2")
    for key, (senders_, receivers_, at, mlps, rule) in cases.items():
        reached = [r for r in receivers_ if any(leads(s, r, parallel=parallel) for s in senders_)]
        own = []
        for n, record in enumerate(records()):
            base, source = rows()[n], rows("longer")[n]
            way = Way(senders_, reached, tokens(source, at), tokens(base, at))
            runs = plain(name, base), plain(name, source)
            (logits,) = paths(name, double(name), base.ids, *runs, [way], mlps=mlps)
            own.append(difference(logits, record))
        start = np.array([difference(plain(name, t).logits, r) for t, r in zip(rows(), records())])  # noqa: B905
        lines = [rule, str(senders_), str(receivers_)]
        agree(name, key, lines, found[key].measures[0].patched, np.array([own]), start)


INNER = {
    ("mlp_hidden", "mlp_out"),
    ("z", "attn_out"),
    ("head_out", "attn_out"),
    ("z", "head_out"),
}


def _overlap(senders: Sequence[End], parallel: bool) -> bool:
    """Whether one sender contains another, or one precedes neurons, which is an error if MLPs are
    held."""
    inputs = [End("mlp_norm", end.layer) for end in senders if end.site == "mlp_hidden"]
    if any(leads(end, to, parallel=parallel) for end in senders for to in inputs):
        return True
    return any((a.site, b.site) in INNER and a.layer == b.layer for a in senders for b in senders)


PATHS = ("gpt2", "llama", "gpt_neox", "gpt_neox_sequential", "qwen3", "mistral", "gemma2")


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_random_path_groups_equal_the_reference(data: Path, name: str) -> None:
    hold_paths(data, name, 1, "planned")


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", PATHS)
def test_random_path_groups_equal_the_reference_in_every_family(
    data: Path, name: str, seed: int, mode: str
) -> None:
    hold_paths(data, name, 100 * PATHS.index(name) + seed, mode)
