"""`allow attention` and `renumber`, against the bare model: it is called with one unpadded prompt,
its position ids, and in each layer with a mask that says which keys each head sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.loading.loader import check_modules
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, context, shared
from ..quick import in_turn
from .models import bare, double
from .support import (
    BLOCKS,
    MANY,
    Key,
    Text,
    agree,
    codes,
    difference,
    experiment,
    plain,
    records,
    rows,
    run_file,
    table,
    tokens,
    unpatched,
)

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "mistral")
WINDOW = {"mistral": lambda layer: 3, "gemma2": lambda layer: 3 if layer % 2 == 0 else None}
"""Window sizes by layer: keys further back are not seen; in gemma2 by every other layer."""
ATTENTION = {
    "gpt2": "transformer.h.{}.attn",
    "llama": "model.layers.{}.self_attn",
    "mistral": "model.layers.{}.self_attn",
    "gemma2": "model.layers.{}.self_attn",
    "gpt_neox": "gpt_neox.layers.{}.attention",
}
LAYERS, HEADS = range(3), range(4)
ONE: list[tuple[Coord, ...]] = [()]

Edge = tuple[int, int | None, Sequence[int], Sequence[int]]
"""Layer, head (None is all), queries, keys."""


@dataclass(frozen=True)
class Done:
    """The changes to one prompt."""

    edges: Sequence[Edge] = ()
    numbers: Mapping[int, int] = field(default_factory=dict[int, int])
    """Position → position id."""
    blocked: Sequence[Edge] = ()
    stream: Mapping[tuple[int, int], Tensor] = field(default_factory=dict[tuple[int, int], Tensor])
    """(layer, position) → input of the block at this position."""


@torch.no_grad()
def called(name: str, text: Text, done: Done) -> Tensor:
    """[T, vocab] of the bare model."""
    model = double(name)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    count = len(text.ids)
    ids = torch.tensor([text.ids])
    places = torch.arange(count)
    for place, number in dict(done.numbers).items():
        places[place] = number
    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, before)
        for layer in LAYERS:
            seen = visible(name, layer, count)
            for own, edges in ((True, done.edges), (False, done.blocked)):
                for at, head, queries, keys in edges:
                    chosen = HEADS if head is None else [head]
                    for h in chosen if at == layer else ():
                        for query in queries:
                            seen[h, query, list(keys)] = own
            added = torch.where(seen, 0.0, -torch.inf).to(torch.float64)[None]
            module = model.get_submodule(ATTENTION[name].format(layer))
            stack.callback(module.register_forward_pre_hook(masked(added), with_kwargs=True).remove)
            block = model.get_submodule(ATTENTION[name].format(layer).rpartition(".")[0])
            vectors = {at: v for (n, at), v in dict(done.stream).items() if n == layer}
            stack.callback(
                block.register_forward_pre_hook(_entered(vectors), with_kwargs=True).remove
            )
        return model(input_ids=ids, position_ids=places[None], use_cache=False).logits[0]


def masked(mask: Tensor) -> Callable[..., Any]:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        assert "attention_mask" in kwargs
        return args, {**kwargs, "attention_mask": mask}

    return hook


def _entered(vectors: Mapping[int, Tensor]) -> Callable[..., Any]:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not vectors:
            return None
        stream = args[0].clone()
        for at, vector in vectors.items():
            stream[0, at] = vector
        return (stream, *args[1:]), kwargs

    return hook


def visible(name: str, layer: int, count: int) -> Tensor:
    """[head, query, key]"""
    distance = torch.arange(count)[:, None] - torch.arange(count)
    window = WINDOW.get(name, lambda layer: None)(layer)
    return ((distance >= 0) & (distance < (window or count))).expand(len(HEADS), -1, -1).clone()


# --- cases ----------------------------------------------------------------------------------------

Act = Callable[..., Done | None]
"""From the model's name, a clean text, its row number and the cell's coordinates."""


@dataclass(frozen=True)
class Case:
    rules: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    act: Act
    measured: str = "last token"
    large: float = 0.02


def every(text: Text, queries: str, keys: str, layers: Iterable[int] = LAYERS) -> list[Edge]:
    return [(layer, None, tokens(text, queries), tokens(text, keys)) for layer in layers]


def counted(text: Text, at: str, first: int) -> dict[int, int]:
    return {place: first + n for n, place in enumerate(sorted(tokens(text, at)))}


def other_cue(name: str, text: Text, n: int) -> Done:
    """The cue of another run in a model in which earlier tokens see it."""
    source = rows("longer")[n]
    vector = plain(name, source)["resid_pre", 1][tokens(source, "cue token")[0], 0]
    return Done(
        every(text, "subject tokens", "cue token"),
        stream={(1, tokens(text, "cue token")[0]): vector},
    )


CASES: dict[str, Case] = {
    "everywhere": Case(
        "allow attention layers * from subject tokens to cue token",
        (),
        ONE,
        lambda name, text, n: Done(every(text, "subject tokens", "cue token")),
    ),
    "each_layer": Case(
        "allow attention layer * from tokens * to last token",
        ("layer",),
        [(0,), (1,), (2,)],
        lambda name, text, n, layer: Done(every(text, "tokens *", "last token", [layer])),
        measured="cue token",
    ),
    "each_head": Case(
        "allow attention layers 0..1 head * from subject tokens to {cue token, last token}",
        ("head",),
        [(head,) for head in HEADS],
        lambda name, text, n, head: Done(
            [
                (
                    layer,
                    head,
                    tokens(text, "subject tokens"),
                    tokens(text, "{cue token, last token}"),
                )
                for layer in (0, 1)
            ]
        ),
        large=0.01,
    ),
    "a_group": Case(
        "allow attention movers from subject tokens to cue token",
        (),
        ONE,
        lambda name, text, n: Done(
            [
                (layer, head, tokens(text, "subject tokens"), tokens(text, "cue token"))
                for layer, head in ((0, 1), (1, 2))
            ]
        ),
        large=0.005,
    ),
    "each_key": Case(
        "allow attention layers * from first token to each item token",
        ("position",),
        [(f"item {n}",) for n in range(1, 6)],
        lambda name, text, n, item: (
            Done(every(text, "first token", f"{item} token")) if item in text.spans else None
        ),
        large=0.01,
    ),
    "both_ways": Case(
        "allow attention layers * from tokens * to tokens *",
        (),
        ONE,
        lambda name, text, n: Done(every(text, "tokens *", "tokens *")),
    ),
    "blocked_besides": Case(
        "allow attention layers * from subject tokens to tokens between cue token and last token "
        "block attention layers 1..2 from {subject tokens, last token} to cue token",
        (),
        ONE,
        lambda name, text, n: Done(
            every(text, "subject tokens", "tokens between cue token and last token"),
            blocked=[
                *every(text, "subject tokens", "cue token", (1, 2)),
                *every(text, "last token", "cue token", (1, 2)),
            ],
        ),
    ),
    "patched_besides": Case(
        "patch resid_pre layer 1 at cue token with longer "
        "allow attention layers * from subject tokens to cue token",
        (),
        ONE,
        other_cue,
        measured="subject token",
    ),
    "renumbered": Case(
        "renumber subject tokens from 30",
        (),
        ONE,
        lambda name, text, n: Done(numbers=counted(text, "subject tokens", 30)),
    ),
    "renumbered_by_a_loop": Case(
        "for p in [0, 9, 40] { renumber {subject tokens, cue token} from p }",
        ("p",),
        [(0,), (9,), (40,)],
        lambda name, text, n, p: Done(numbers=counted(text, "{subject tokens, cue token}", p)),
    ),
    "renumbered_in_turn": Case(
        "renumber each item token from 20",
        ("position",),
        [(f"item {n}",) for n in range(1, 6)],
        lambda name, text, n, item: (
            Done(numbers=counted(text, f"{item} token", 20)) if item in text.spans else None
        ),
    ),
    "shifted": Case(
        "renumber tokens * from 5",
        (),
        ONE,
        lambda name, text, n: Done(numbers=counted(text, "tokens *", 5)),
    ),
    "exchanged_and_seen": Case(
        "renumber subject tokens from 12 renumber cue token from 6 "
        "allow attention layers * from subject tokens to cue token",
        (),
        ONE,
        lambda name, text, n: Done(
            every(text, "subject tokens", "cue token"),
            numbers={**counted(text, "subject tokens", 12), **counted(text, "cue token", 6)},
        ),
    ),
}
NOT_HERE = {
    "gpt_neox": ("shifted",),
    "llama": ("shifted",),
    "mistral": ("shifted", "each_key"),
    "gemma2": ("shifted",),
}
"""Cases without an effect: rotary positions ignore a shift of all tokens, and windows of three
hide the first token from the last one."""


@cache
def expected(name: str, key: str) -> dict[Key, list[float]]:
    case = CASES[key]

    def value(n: int, *at: Coord) -> float | None:
        text = rows()[n]
        done = case.act(name, text, n, *at)
        if done is None:
            return None
        logits = called(name, text, done)
        return difference(logits, records()[n], tokens(text, case.measured)[0])

    return table([tuple(cell) for cell in case.cells], value, len(records()))


@cache
def results(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    text = "group movers = L0H1, L1H2\n" + "".join(
        experiment(
            key,
            case.rules,
            measure=f"measure logit(answer) - logit(wrong) at {case.measured} as delta",
        )
        for key, case in CASES.items()
        if key not in NOT_HERE.get(name, ())
    )
    beside = experiment("beside", "ablate resid_pre layer * at cue token with zero")
    return run_file(text + beside, data, name, mode)


def hold(data: Path, key: str, name: str, mode: str) -> None:
    if key in NOT_HERE.get(name, ()):
        pytest.skip("it changes nothing")
    case = CASES[key]
    base = unpatched(name, at=case.measured)
    found = results(data, name, mode)[key]
    agree(found, case.axes, expected(name, key), base, large=case.large, most=False)


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("key", list(CASES))
def test_allow_and_renumber_equal_the_bare_model(data: Path, key: str, mode: str) -> None:
    hold(data, key, "llama", mode)


@pytest.mark.parametrize(
    ("key", "name"), in_turn(list(CASES), ["gpt2", "gpt_neox", "gemma2", "mistral"])
)
def test_allow_and_renumber_equal_the_bare_model_in_other_families(
    data: Path, key: str, name: str
) -> None:
    hold(data, key, name, "planned")


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", list(CASES))
def test_allow_and_renumber_equal_the_bare_model_in_every_family(
    data: Path, key: str, name: str, mode: str
) -> None:
    hold(data, key, name, mode)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_renumbering_all_tokens_changes_nothing_with_rotary_positions(
    data: Path, name: str
) -> None:
    found = run_file(experiment("e", "renumber tokens * from 7"), data, name, "planned")["e"]
    values = found.measures[0]
    np.testing.assert_allclose(values.patched[0], values.base[0], atol=1e-4)
    assert not values.inert.any()


@pytest.mark.parametrize(
    ("name", "line", "code"),
    [
        ("llama", "allow attention layers * from last token to subject tokens", "E0332"),
        ("llama", "allow attention layers * from last token to last token", "E0332"),
        ("bloom", "allow attention layers * from subject tokens to last token", "E0108"),
        ("bloom", "renumber subject tokens from 3", "E0108"),
        ("llama", "renumber subject tokens from -1", "E0207"),
        ("llama", "renumber subject tokens from 1.5", "E0207"),
        ("llama", "renumber subject tokens from 61", "E0207"),
        ("llama", "for p in [0, 62] { renumber subject tokens from p }", "E0207"),
        ("llama", "renumber subject tokens from many", "E0337"),
        ("llama", "allow attention from subject tokens to last token", "E0304"),
        ("llama", "allow resid_post layer 1 at last token", "E0101"),
        ("llama", "renumber subject tokens by 5", "E0101"),
    ],
)
def test_invalid_allow_and_renumber_rules_are_errors(
    data: Path, name: str, line: str, code: str
) -> None:
    assert codes(experiment("e", line), data, name) == [code]


def test_allowed_keys_outside_the_attention_window_equal_the_bare_model(data: Path) -> None:
    rule = "allow attention layers * from last token to first token"
    found = run_file(experiment("e", rule), data, "mistral", "planned")["e"]
    cells: list[float] = []
    for n, text in enumerate(rows()):
        logits = called("mistral", text, Done(every(text, "last token", "first token")))
        cells.append(difference(logits, records()[n]))
    agree(found, (), {(): cells}, unpatched("mistral"), large=0.02, most=False)


@pytest.mark.parametrize(
    "line", ["block attention layers * from {0}", "set attention layers * from {0} to 0"]
)
def test_other_rules_act_on_allowed_keys(data: Path, line: str) -> None:
    """Keys that are allowed, and then have no weight, change nothing."""
    edges = "first token to last token"
    allow = f"allow attention layers * from {edges}"
    text = experiment("a", allow) + experiment("b", f"{allow}\n  {line.format(edges)}")
    found = run_file(text, data, "llama", "planned")
    alone, both = (found[name].measures[0] for name in ("a", "b"))
    np.testing.assert_allclose(both.patched, both.base, atol=1e-4)
    assert np.abs(alone.patched - alone.base).max() > 0.02


def checked(data: Path, line: str, **facts: Any) -> CheckedFile:
    """Check a file against a shape with changed facts."""
    source = Source(
        f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{experiment("e", line)}',
        data / "file.mech",
    )
    own = context(source, "m", shared(bare("llama")))
    own = replace(own, shape=replace(own.shape, **facts))
    return check_source(source, CheckSettings(), {"m": own})


def errors(found: CheckedFile) -> list[Diagnostic]:
    return [each for each in found.diagnostics if each.severity == "error"]


def test_allow_attention_in_a_bidirectional_model_is_an_error(data: Path) -> None:
    line = "allow attention layers * from subject tokens to last token"
    found, *_ = errors(checked(data, line, causal=False))
    assert found.code == "E0332"
    assert found.label_text == "every token of `m` sees all other tokens"


def test_renumber_without_suitable_position_ids_is_an_error(data: Path) -> None:
    """E0108 after loading: the model takes no position ids."""
    experiments = checked(data, "renumber subject tokens from 3").experiments
    model = shared(bare("llama"))
    counting = replace(model, calling=replace(model.calling, first_position=None))
    assert [d.code for d in check_modules(experiments, {"m": counting})] == ["E0108"]
    late = replace(model, calling=replace(model.calling, first_position=58))
    assert [d.code for d in check_modules(experiments, {"m": late})] == ["E0207"]
    fits = replace(model, calling=replace(model.calling, first_position=57))
    assert check_modules(experiments, {"m": fits}) == []
    assert check_modules(experiments, {"m": model}) == []


def test_renumber_beyond_original_max_position_embeddings_is_an_error(data: Path) -> None:
    line = "renumber subject tokens from 20"
    far = {"rope_parameters": {"original_max_position_embeddings": 16}}
    assert [d.code for d in errors(checked(data, line, config=far))] == ["E0207"]
    assert errors(checked(data, line, config={})) == []


def test_allow_and_renumber_are_valid_variable_names(data: Path) -> None:
    lines = (
        "for allow in [1, 2] { block attention layer allow from last token to cue token }",
        "report lines allow",
        "report bars allow",
    )
    text = experiment("a", *lines) + experiment(
        "b",
        "for renumber in [1, 2] { block attention layer renumber from last token to cue token }",
        "report bars renumber",
        "from other into clean",
    )
    found = run_file(text, data, "llama", "planned")
    assert found["a"].axes == ("allow",)
    assert found["b"].axes == ("renumber",)


ALIKE = """
prompts early {
  cue in ["w26", "w28", "w29", "w30"]
  template "w3 w4 {cue} w42"
  span here = "w4"
  answer " w10"
  wrong " w11"
}
prompts same {
  other in ["w27", "w21", "w22", "w23"]
  cue = "w26"
  template "w3 w4 {cue} w42"
  span here = "w4"
  answer " w10"
  wrong " w11"
  corrupt turned { cue = other }
}
"""


@pytest.mark.parametrize(
    ("block", "lines"),
    [
        ("early", ()),
        ("same", ("from turned into clean", "patch resid_pre layer 1 at cue token")),
    ],
)
def test_rows_that_differ_after_the_measured_token_stay_distinct_with_allow(
    data: Path, block: str, lines: Sequence[str]
) -> None:
    """`allow attention` makes their values differ, so that no row is a duplicate of another."""
    measure = "measure logit(answer) - logit(wrong) at here token as delta"
    block_it = "block attention layer 1 from here token to first token"
    allow = "allow attention layers * from here token to cue token"
    text = experiment("a", *lines, allow, block=block, measure=measure)
    text += experiment("b", *lines, block_it, block=block, measure=measure)
    found = run_file(text, data, "llama", "planned", blocks=ALIKE)
    allowed, not_allowed = (found[name].measures[0] for name in ("a", "b"))
    assert allowed.seen is None
    assert len(set(np.round(allowed.patched[0], 4))) == 4
    assert not_allowed.seen is not None
    assert len(set(not_allowed.seen[0])) == 1
