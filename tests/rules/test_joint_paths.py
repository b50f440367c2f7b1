"""Paths with other rules, on derived runs, to and from neurons, and with frozen norms: against the
bare model with plain hooks on its modules, pass by pass, one unpadded prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult

from ..quick import in_turn, some
from .models import on_the_model
from .support import (
    QUICK,
    Array,
    Text,
    codes,
    difference,
    experiment,
    records,
    rows,
    run_file,
    tokens,
    unpatched,
)
from .test_allow_attention import ATTENTION, masked, visible
from .test_paths import EVERYTHING
from .test_steered_runs import handed_on

FAMILIES = ("gpt2", "llama", "gpt_neox")
LAYERS, HEADS = range(3), 4
BLOCK = {"gpt2": "transformer.h", "llama": "model.layers", "gpt_neox": "gpt_neox.layers"}
FINAL = {
    "gpt2": "transformer.ln_f", "llama": "model.norm", "gpt_neox": "gpt_neox.final_layer_norm",
}  # fmt: skip
PARTS: dict[str, dict[str, tuple[str, str]]] = {
    "gpt2": {
        "z": ("attn.c_proj", "in"), "q": ("attn.c_attn", "out"), "mlp_out": ("mlp", "out"),
        "mlp_hidden": ("mlp.c_proj", "in"), "mlp_norm": ("ln_2", "out"),
        "attn_norm": ("ln_1", "out"), "attn_out": ("attn", "out"),
    },
    "llama": {
        "z": ("self_attn.o_proj", "in"), "q": ("self_attn.q_proj", "out"),
        "mlp_out": ("mlp", "out"), "mlp_hidden": ("mlp.down_proj", "in"),
        "mlp_norm": ("post_attention_layernorm", "out"), "attn_norm": ("input_layernorm", "out"),
        "attn_out": ("self_attn", "out"),
    },
    "gpt_neox": {
        "z": ("attention.dense", "in"), "q": ("attention.query_key_value", "out"),
        "mlp_out": ("mlp", "out"), "mlp_hidden": ("mlp.dense_4h_to_h", "in"),
        "mlp_norm": ("post_attention_layernorm", "out"), "attn_norm": ("input_layernorm", "out"),
        "attn_out": ("attention", "out"),
    },
}  # fmt: skip
EPSILON = {"gpt2": "eps", "llama": "variance_epsilon", "gpt_neox": "eps"}

Tap = tuple[str, int]
"""A site and its layer; `resid_pre` and `resid_post` are the input and output of a block."""
Change = Callable[[Tensor], Tensor]
"""The new value of a site from its value [T, units, width]."""
Edits = Sequence[tuple[Tap, Change]]


@dataclass(frozen=True)
class Call:
    """The result of one call of the model, with activations before their changes."""

    logits: Tensor
    before: Mapping[Tap, Tensor]
    normed: Mapping[str, Tensor]
    """The input of each norm, by its path."""


@torch.no_grad()
@on_the_model
def called(
    model: Any, name: str, text: Text, edits: Edits = (), *,
    frozen: Mapping[str, Tensor] | None = None,
    blocked: Sequence[tuple[int, str, str]] = (), numbers: Mapping[int, int] | None = None,
    blocks: Mapping[int, int | None] | None = None,
) -> Call:  # fmt: skip
    """frozen: vectors whose divisors the norms use."""
    stack = model.get_submodule(BLOCK[name])
    originals = list(stack)
    for to, of in (blocks or {}).items():
        if of is None:
            stack[to].register_forward_hook(handed_on, with_kwargs=True)
        else:
            stack[to] = copy.deepcopy(originals[of])
    before: dict[Tap, Tensor] = {}
    normed: dict[str, Tensor] = {}
    for path, norm in _norms(name, model):
        norm.register_forward_hook(partial(_norm, name, path, normed, (frozen or {}).get(path)))
    count = len(text.ids)
    for layer in LAYERS:
        seen = visible(name, layer, count)
        for at, query, key in blocked:
            for place in tokens(text, query) if at == layer else ():
                seen[:, place, tokens(text, key)] = False
        added = torch.where(seen, 0.0, -torch.inf).to(torch.float64)[None]
        attention = model.get_submodule(ATTENTION[name].format(layer))
        attention.register_forward_pre_hook(masked(added), with_kwargs=True)
        for site, (path, side) in (
            *PARTS[name].items(), ("resid_pre", ("", "in")), ("resid_post", ("", "out")),
        ):  # fmt: skip
            module = stack[layer].get_submodule(path) if path else stack[layer]
            own = [change for tap, change in edits if tap == (site, layer)]
            step = partial(_step, name, (site, layer), own, before)
            if side == "in":
                module.register_forward_pre_hook(partial(_in, step), with_kwargs=True)
            else:
                module.register_forward_hook(partial(_out, step))
    places = torch.arange(count)
    for place, number in (numbers or {}).items():
        places[place] = number
    ids = torch.tensor([text.ids])
    logits = model(input_ids=ids, position_ids=places[None], use_cache=False).logits[0]
    return Call(logits, before, normed)


def _norms(name: str, model: Any) -> list[tuple[str, Any]]:
    every = [f"{BLOCK[name]}.{n}.{PARTS[name][site][0]}" for n in LAYERS
             for site in ("attn_norm", "mlp_norm")]  # fmt: skip
    return [(path, model.get_submodule(path)) for path in (*every, FINAL[name])]


def _norm(
    name: str, path: str, seen: dict[str, Tensor], at: Tensor | None,
    module: Any, args: Any, out: Tensor,
) -> Tensor | None:  # fmt: skip
    (x,) = args
    seen[path] = x.clone()
    if at is None:
        return None
    epsilon = getattr(module, EPSILON[name])
    if name == "llama":
        return module.weight * x / (at.square().mean(-1, keepdim=True) + epsilon).sqrt()
    centred, there = (v - v.mean(-1, keepdim=True) for v in (x, at))
    scale = (there.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return module.weight * centred / scale + module.bias


def _step(name: str, tap: Tap, changes: Sequence[Change], before: dict[Tap, Tensor], x: Tensor):
    x = x.clone()
    view = viewed(name, tap[0], x)
    before[tap] = view.clone()
    for change in changes:
        view.copy_(change(view.clone()))
    return x


def viewed(name: str, site: str, x: Tensor) -> Tensor:
    """[T, units, width], a view of [1, T, width]."""
    flat = x[0]
    match site:
        case "z":
            return flat.unflatten(-1, (HEADS, -1))
        case "q" if name == "gpt2":
            return flat[:, : flat.shape[-1] // 3].unflatten(-1, (HEADS, -1))
        case "q" if name == "gpt_neox":
            return flat.unflatten(-1, (HEADS, 3, -1))[:, :, 0]
        case "q":
            return flat.unflatten(-1, (HEADS, -1))
        case "mlp_hidden":
            return flat[..., None]
        case _:
            return flat[:, None]


def _in(step: Change, module: Any, args: Any, kwargs: Any) -> Any:
    if args:
        return (step(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": step(kwargs["hidden_states"])}


def _out(step: Change, module: Any, args: Any, out: Any) -> Any:
    return (step(out[0]), *out[1:]) if isinstance(out, tuple) else step(out)


# --- paths, pass by pass --------------------------------------------------------------------------

End = tuple[str, int | None, int | None]
"""Site, layer, unit; a unit of None is the whole vector."""


@dataclass(frozen=True)
class OtherRules:
    """Other rules, with reference edits."""

    written: str
    edits: Callable[[str, Text, int], Edits] = field(default=lambda name, text, n: ())
    blocked: Sequence[tuple[int, str, str]] = ()
    numbers: Callable[[Text], Mapping[int, int]] = field(default=lambda text: {})
    blocks: Mapping[int, int | None] = field(default_factory=dict[int, "int | None"])

    def __call__(self, name: str, text: Text, edits: Edits, **more: Any) -> Call:
        return called(
            name, text, edits, blocked=self.blocked, numbers=self.numbers(text),
            blocks=self.blocks, **more,
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    written: str
    senders: Sequence[End]
    receivers: Sequence[End]
    other_rules: OtherRules
    at: str = "last token"
    mlps: bool = False
    frozen: bool = False
    first: bool = False
    """Whether the other rules precede the path."""

    @property
    def rule(self) -> str:
        more = (" through mlps" if self.mlps else "") + (
            " with frozen norms" if self.frozen else ""
        )
        return f"path {self.written} at {self.at}{more}"

    @property
    def lines(self) -> tuple[str, ...]:
        both = (self.other_rules.written, self.rule)
        return tuple(line for line in (both if self.first else both[::-1]) if line)


def at_spots(units: Sequence[int | None], places: Sequence[int], change: Change) -> Change:
    def edit(value: Tensor) -> Tensor:
        for unit in units:
            for place in places:
                chosen = slice(None) if unit is None else unit
                value[place, chosen] = change(value[place, chosen])
        return value

    return edit


def copied(ends: Sequence[End], of: Call, read: Sequence[int], written: Sequence[int]) -> Edits:
    found: list[tuple[Tap, Change]] = []
    for site, layer, unit in ends:
        assert layer is not None
        vectors = of.before[site, layer]
        for there, here in zip(read, written, strict=True):
            chosen = slice(None) if unit is None else unit
            own = vectors[there, chosen]
            found.append(((site, layer), at_spots([unit], [here], lambda now, own=own: own)))
    return found


def patched(name: str, case: Case, source: Text, base: Text, n: int) -> Tensor:
    """[T, vocab]"""
    own, other = tokens(base, case.at), tokens(source, case.at)
    rules = case.other_rules.edits(name, base, n)
    model = case.other_rules(name, base, rules)
    neurons = {layer for site, layer, _ in case.senders if site == "mlp_hidden"}
    held: list[tuple[Tap, Change]] = []
    for layer in LAYERS:
        places = ["z"]
        if not case.mlps:
            places.append("mlp_hidden" if layer in neurons else "mlp_out")
        for site in places:
            vectors = model.before[site, layer]
            held.append(((site, layer), lambda now, vectors=vectors: vectors))
    sent = copied(case.senders, called(name, source), other, own)
    order = [*rules, *sent] if case.first else [*sent, *rules]
    frozen = model.normed if case.frozen else None
    sending = case.other_rules(name, base, [*held, *order], frozen=frozen)
    if case.receivers[0][0] == "logits":
        return sending.logits
    got = copied(case.receivers, sending, own, own)
    return case.other_rules(name, base, [*got, *rules]).logits


# --- cases ----------------------------------------------------------------------------------------


def setting(site: str, layer: int, units: Sequence[int | None], at: str, change: Change) -> Any:
    return lambda name, text, n: [((site, layer), at_spots(units, tokens(text, at), change))]


def from_source(site: str, layer: int, unit: int | None, at: str) -> Any:
    def edits(name: str, text: Text, n: int) -> Edits:
        source = rows("longer")[n]
        there = called(name, source)
        return copied([(site, layer, unit)], there, tokens(source, at), tokens(text, at))

    return edits


def zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


NOTHING = OtherRules("")
OTHERS: dict[str, OtherRules] = {
    "a_held_head": OtherRules(
        "ablate L1H2 at last token with zero", setting("z", 1, [2], "last token", zero)
    ),
    "held_mlps": OtherRules(
        "scale mlp_out layer 1 at tokens * by -1",
        setting("mlp_out", 1, [None], "tokens *", lambda x: -x),
    ),
    "the_stream": OtherRules(
        "scale resid_post layer 0 at cue token by 2",
        setting("resid_post", 0, [None], "cue token", lambda x: 2 * x),
    ),
    "the_sender": OtherRules(
        "scale z layer 0 head 1 at last token by 0.3",
        setting("z", 0, [1], "last token", lambda x: 0.3 * x),
    ),
    "the_receiver": OtherRules(
        "scale q layer 2 head 1 at last token by -2",
        setting("q", 2, [1], "last token", lambda x: -2 * x),
    ),
    "neurons": OtherRules(
        "set mlp_hidden layer 1 neuron 3 at last token to 2",
        setting("mlp_hidden", 1, [3], "last token", lambda x: torch.full_like(x, 2)),
    ),
    "a_norm": OtherRules(
        "scale mlp_norm layer 1 at last token by 0.5",
        setting("mlp_norm", 1, [None], "last token", lambda x: 0.5 * x),
    ),
    "a_patch": OtherRules("patch L2H0 at last token", from_source("z", 2, 0, "last token")),
    "edges": OtherRules(
        "block attention layers 1..2 from last token to cue token",
        blocked=[(1, "last token", "cue token"), (2, "last token", "cue token")],
    ),
    "numbers": OtherRules(
        "renumber subject tokens from 9",
        numbers=lambda text: {at: 9 + k for k, at in enumerate(tokens(text, "subject tokens"))},
    ),
    "blocks": OtherRules("replace block layer 1 with block layer 2", blocks={1: 2}),
    "a_block_less": OtherRules("replace block layer 1 with identity", blocks={1: None}),
}
H01: list[End] = [("z", 0, 1)]
TO_Q = "L0H1 -> q layer 2 heads *"
Q2: list[End] = [("q", 2, head) for head in range(HEADS)]
LOGITS: list[End] = [("logits", None, None)]
CASES: dict[str, Case] = {
    **{f"to_logits_next_to_{key}": Case("L0H1 -> logits", H01, LOGITS, own)
       for key, own in OTHERS.items()},
    **{f"to_a_query_next_to_{key}": Case(TO_Q, H01, Q2, own, mlps=key == "a_norm")
       for key, own in OTHERS.items()},
    "behind_the_senders_scale": Case(
        "L0H1 -> logits", H01, LOGITS, OTHERS["the_sender"], first=True
    ),
    "behind_the_receivers_scale": Case(
        TO_Q, H01, Q2, OTHERS["the_receiver"], first=True
    ),
    "a_head_to_a_neuron": Case(
        "L0H1 -> mlp_hidden layer 1 neuron 3", H01, [("mlp_hidden", 1, 3)], NOTHING
    ),
    "a_head_to_a_neuron_of_its_layer": Case(
        "L1H0 -> mlp_hidden layer 1 neuron 3", [("z", 1, 0)], [("mlp_hidden", 1, 3)], NOTHING
    ),
    "a_neuron_to_neurons": Case(
        "L1N3 -> mlp_hidden layer 2 neurons 0..23",
        [("mlp_hidden", 1, 3)],
        [("mlp_hidden", 2, u) for u in range(24)],
        NOTHING,
    ),
    "neurons_to_neurons_through_mlps": Case(
        "mlp_hidden layer 1 neurons 3..20 -> mlp_hidden layer 2 neurons 1..9",
        [("mlp_hidden", 1, u) for u in range(3, 21)],
        [("mlp_hidden", 2, u) for u in range(1, 10)],
        NOTHING, mlps=True,
    ),
    "neurons_that_send_and_receive": Case(
        "sending -> receiving",
        [("z", 0, 1), *(("mlp_hidden", 1, u) for u in range(9))],
        [*(("mlp_hidden", 1, u) for u in range(5, 12)), ("mlp_hidden", 2, 20)],
        NOTHING,
    ),
    "a_neuron_next_to_its_own_rule": Case(
        "L0H1 -> mlp_hidden layer 1 neuron 3", H01, [("mlp_hidden", 1, 3)],
        OtherRules("scale mlp_hidden layer 1 neuron 3 at last token by 3",
               setting("mlp_hidden", 1, [3], "last token", lambda x: 3 * x)),
    ),
    "to_logits_with_frozen_norms": Case("L0H1 -> logits", H01, LOGITS, NOTHING, frozen=True),
    "to_logits_through_mlps_with_frozen_norms": Case(
        "L0H1 -> logits", H01, LOGITS, NOTHING, mlps=True, frozen=True
    ),
    "to_a_query_with_frozen_norms": Case(TO_Q, H01, Q2, NOTHING, frozen=True),
    "to_a_neuron_with_frozen_norms": Case(
        "mlp_out layer 1 -> mlp_hidden layer 2 neurons 4..9",
        [("mlp_out", 1, None)],
        [("mlp_hidden", 2, u) for u in range(4, 10)], NOTHING, frozen=True,
    ),
    "with_frozen_norms_next_to_a_stream_of_zeros": Case(
        "L1H0 -> logits", [("z", 1, 0)], LOGITS,
        OtherRules("set resid_post layer 0 at last token to 0",
               setting("resid_post", 0, [None], "last token", zero)),
        frozen=True,
    ),
}  # fmt: skip
GROUPS = (
    "group sending = L0H1, " + ", ".join(f"L1N{u}" for u in range(9)) + "\n"
    "group receiving = " + ", ".join(f"L1N{u}" for u in range(5, 12)) + ", L2N20\n"
)


def there(name: str, key: str) -> bool:
    """In a parallel block no head sends to the MLP of its layer."""
    return not (name == "gpt_neox" and key.endswith("of_its_layer"))


def turn(number: int, key: str) -> str:
    families = [name for name in FAMILIES if there(name, key)]
    return families[number % len(families)]


TURN = {key: turn(number, key) for number, key in enumerate(CASES)}
"""One family for each case, in turn; the others are slow."""


@cache
def results(data: Path, name: str, mode: str, own: bool) -> dict[str, ExperimentResult]:
    """Results of the cases of this family, or of the cases of other families."""
    text = ""
    for key in CASES:
        if (TURN[key] == name) == own and there(name, key):
            text += experiment(key, "from longer into clean", *CASES[key].lines)
    named = GROUPS if "sending" in text or "receiving" in text else ""
    return run_file(named + text, data, name, mode, precise=True)


@cache
def expected(name: str, key: str) -> tuple[list[float], list[float]]:
    """Reference values of a case, and of its other rules alone."""
    case, found, alone = CASES[key], list[float](), list[float]()
    for n, record in enumerate(records()):
        base = rows()[n]
        found.append(difference(patched(name, case, rows("longer")[n], base, n), record))
        own = case.other_rules(name, base, case.other_rules.edits(name, base, n))
        alone.append(difference(own.logits, record))
    return found, alone


def cells(found: ExperimentResult) -> Array:
    return found.measures[0].patched


@pytest.mark.parametrize(
    ("key", "name", "mode"),
    [
        pytest.param(k, n, m, marks=pytest.mark.slow if there(n, k) and n != TURN[k] else ())
        for k in CASES
        for n in FAMILIES
        for m in QUICK
    ],
)
def test_path_with_other_rules_equals_plain_hooks(
    data: Path, key: str, name: str, mode: str
) -> None:
    if not there(name, key):
        text = experiment("e", "from longer into clean", CASES[key].rule)
        assert "E0335" in codes(text, data, name)
        return
    found = results(data, name, mode, TURN[key] == name)[key]
    values, alone = expected(name, key)
    np.testing.assert_allclose(found.measures[0].base[0], unpatched(name), atol=1e-5)
    np.testing.assert_allclose(cells(found)[0], values, atol=1e-5, rtol=1e-5)
    moved = np.abs(np.array(values) - alone).max()
    assert moved > 1e-3, "the path does nothing"


@pytest.mark.parametrize("every", some([False, True], [False]))
def test_other_rules_change_the_reference_values(every: bool) -> None:
    for name in FAMILIES:
        for key in CASES:
            if CASES[key].other_rules.written and (every or TURN[key] == name):
                _, alone = expected(name, key)
                assert np.abs(np.array(alone) - unpatched(name)).max() > 1e-3, key


# --- derived runs ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, QUICK))
def test_path_on_a_derived_run_equals_the_path_with_its_rules(
    data: Path, name: str, mode: str
) -> None:
    """The values are equal; the base is the run with the rules."""
    text = GROUPS
    chosen = [key for key in CASES if CASES[key].other_rules.written and "the_" not in key]
    chosen = [key for key in chosen if "its_own" not in key and "patch" not in key]
    for key in chosen:
        own = f"run there {{ {CASES[key].other_rules.written} }}"
        text += experiment(key, own, "from longer into there", CASES[key].rule)
    text = text.removeprefix(GROUPS)
    found = run_file(text, data, name, mode, precise=True)
    for key in chosen:
        values, alone = expected(name, key)
        np.testing.assert_allclose(found[key].measures[0].base[0], alone, atol=1e-5)
        np.testing.assert_allclose(cells(found[key])[0], values, atol=1e-5, rtol=1e-5)


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    in_turn(["gpt2", "llama", "gpt_neox", "qwen3"], QUICK),
)
def test_direct_effects_sum_with_frozen_norms(data: Path, name: str, mode: str) -> None:
    """This holds for all components of the stream; without frozen norms, it doesn't."""
    start, at = "from other into clean", "at last token"
    rules = {
        "whole": f"path everything -> logits {at}",
        "embed": f"path embed -> logits {at}",
        "heads": f"path layer * head * -> logits {at}",
        "mlps": f"path mlp_out layer * -> logits {at}",
    }
    text = EVERYTHING + "\n"
    for key, of in rules.items():
        text += experiment(key, start, f"{of} with frozen norms")
        text += experiment(f"free_{key}", start, of)
    found = run_file(text, data, name, mode, precise=True)
    effects = {key: of.measures[0].patched - of.measures[0].base for key, of in found.items()}
    for kind in ("", "free_"):
        parts = sum(effects[f"{kind}{key}"].sum(0) for key in ("embed", "heads", "mlps"))
        off = np.abs(parts - effects[f"{kind}whole"][0])
        if kind:
            assert off.max() > 1e-2
        else:
            assert off.max() < 1e-5  # norms of some families compute in 32 bits
    assert np.abs(effects["whole"]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mode", QUICK)
def test_rule_without_effect_leaves_path_values_unchanged(data: Path, mode: str) -> None:
    """Packed and full forward passes agree, also if a receiver is a sender."""
    groups = "group both = L0H1, resid_pre layer 1\n"
    paths = (
        "layer * head 1, 3 -> q layer * head 0..1 at {cue token, last token}",
        "layer * head 0 -> k layer 2 head * at tokens *",
        "layer 0..1 head 2 -> logits at last token through mlps",
        "both -> resid_pre layer 1..2 at last token",
    )
    text = groups
    for n, path in enumerate(paths):
        text += experiment(f"alone_{n}", "from other into clean", f"path {path}")
        nothing = "reweight attention layer 0 from last token to cue token by 1"
        text += experiment(f"joint_{n}", "from other into clean", nothing, f"path {path}")
    found = run_file(text, data, "llama", mode, precise=True)
    for n in range(len(paths)):
        alone, joint = (found[f"{key}_{n}"] for key in ("alone", "joint"))
        assert [c.coords for c in alone.cells] == [c.coords for c in joint.cells]
        np.testing.assert_allclose(cells(alone), cells(joint), atol=1e-9)
        assert np.abs(cells(alone) - alone.measures[0].base).max() > 1e-3


def test_sweep_of_a_path_and_another_rule_equals_plain_hooks(data: Path) -> None:
    """Each cell has one other rule and one path."""
    lines = (
        "for h in 0..3 { scale z layer 1 head h at last token by -1 }",
        "path layer 0 head * -> q layer 2 head 0, 1 at last token",
    )
    found = run_file(
        experiment("e", "from longer into clean", *lines), data, "llama", "planned", precise=True
    )["e"]
    assert found.axes == ("h", "head", "to_head")
    for number, cell in enumerate(found.cells):
        if (number * 7) % 5:  # some of them
            continue
        h, of, to = (int(cell.coords[axis]) for axis in found.axes)  # type: ignore[arg-type]
        other_rules = OtherRules("", setting("z", 1, [h], "last token", lambda x: -x))
        case = Case("", [("z", 0, of)], [("q", 2, to)], other_rules)
        for n, record in enumerate(records()):
            own = patched("llama", case, rows("longer")[n], rows()[n], n)
            assert cells(found)[number, n] == pytest.approx(difference(own, record), abs=1e-5)


def test_measure_inside_held_mlps_leaves_other_values_unchanged(data: Path) -> None:
    """A measure that reads neurons changes no other value."""
    rule = "path L0H1 -> logits at last token"
    own = experiment("a", "from longer into clean", rule)
    two = "measure logit(answer) - logit(wrong) as delta\n"
    two += "  measure cosine(mlp_hidden layer 1, clean) as raw"
    text = own + experiment("b", "from longer into clean", rule, measure=two)
    found = run_file(text, data, "llama", "planned", precise=True)
    np.testing.assert_allclose(cells(found["a"]), cells(found["b"]), atol=1e-9)


# --- conventions and errors -----------------------------------------------------------------------


def test_conventions_state_other_rules_and_frozen_norms(data: Path) -> None:
    def conventions(key: str) -> dict[str, str]:
        return results(data, TURN[key], "planned", True)[key].conventions

    said = conventions("to_logits_next_to_a_held_head")["outside the path"]
    assert "the other rules act in each of its passes" in said
    assert "outside the path" not in conventions("a_head_to_a_neuron")
    frozen = conventions("to_logits_with_frozen_norms")["path"]
    assert "norms divide by their values" in frozen


REFUSED: dict[tuple[str, ...], str] = {
    ("path L0H1 -> ends at last token through mlps",): "E0334",
    ("path L0H1 -> logits at last token", "path L1H1 -> logits at last token"): "E0108",
    ("path L0H1 -> logits at last token", "observe norm resid_post layer 2 at last token"): "E0334",
    ("path L0H1 -> logits at last token with frozen mlps",): "E0101",
    ("path L0H1 -> logits at last token with loose norms",): "E0101",
    ("path L1H1 -> mlp_hidden layer 0 neuron 1 at last token",): "E0335",
    ("path L1N1 -> L1N2 at last token",): "E0335",
}


@pytest.mark.parametrize("lines", list(REFUSED))
def test_invalid_paths_with_other_rules_are_errors(data: Path, lines: tuple[str, ...]) -> None:
    group = "group ends = L1H0.q, logits\n" if "ends" in lines[0] else ""
    text = group + experiment("e", "from longer into clean", *lines)
    assert codes(text, data) == [REFUSED[lines]]
