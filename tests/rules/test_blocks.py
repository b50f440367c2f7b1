"""`replace block`, against the bare model with its list of blocks changed, one prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.loading.loader import check_modules
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, context, shared
from ..quick import in_turn
from .models import bare, on_the_model
from .support import (
    BLOCKS,
    MANY,
    Key,
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

FAMILIES = ("gpt2", "llama", "gpt_neox", "gpt_neox_sequential", "gemma2", "qwen3")
LISTS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gpt_neox_sequential": "gpt_neox.layers",
}
LAYERS = range(3)
ONE: list[tuple[Coord, ...]] = [()]
Pairs = Mapping[int, int | None]
"""Block → the block that replaces it; None is the identity."""


@torch.no_grad()
@on_the_model
def called(
    model: Any, name: str, ids: Sequence[int], pairs: Pairs, z: Tensor | None = None
) -> Tensor:
    """[T, vocab]; z: of head 1, written at the last token of block 2 (llama)."""
    blocks = model.get_submodule(LISTS.get(name, "model.layers"))
    before = list(blocks)
    for to, of in pairs.items():
        if of is None:
            before[to].register_forward_hook(_handed_on, with_kwargs=True)
        else:
            blocks[to] = copy.deepcopy(before[of])
    if z is not None:

        def write(module: nn.Module, args: Any) -> Any:
            value = args[0].clone()
            value[0, -1, len(z) : 2 * len(z)] = z
            return (value,)

        blocks[2].self_attn.o_proj.register_forward_pre_hook(write)
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def _handed_on(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    stream = args[0] if args else kwargs["hidden_states"]
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


@dataclass(frozen=True)
class Case:
    rules: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    pairs: Callable[..., Pairs]
    """From the cell's coordinates."""


CASES: dict[str, Case] = {
    "each_by_one": Case(
        "replace block layer 1..2 with block layer 0",
        ("layer",),
        [(1,), (2,)],
        lambda layer: {layer: 0},
    ),
    "none_at_all": Case(
        "replace block layer * with identity", ("layer",), [(0,), (1,), (2,)], lambda n: {n: None}
    ),
    "several_by_one": Case(
        "replace block layers 0..1 with block layer 2", (), ONE, lambda: {0: 2, 1: 2}
    ),
    "several_left_out": Case(
        "replace block layers 1, 2 with identity", (), ONE, lambda: {1: None, 2: None}
    ),
    "exchanged": Case(
        "replace block layer 0 with block layer 2 replace block layer 2 with block layer 0",
        (),
        ONE,
        lambda: {0: 2, 2: 0},
    ),
    "in_a_loop": Case(
        "for l in [0, 2] { replace block layer 1 with block layer l }",
        ("l",),
        [(0,), (2,)],
        lambda source: {1: source},
    ),
    "shifted": Case(
        "for l in 0..1 { replace block layer l with block layer l + 1 }",
        ("l",),
        [(0,), (1,)],
        lambda layer: {layer: layer + 1},
    ),
    "one_and_none": Case(
        "replace block layer 1 with identity replace block layer 2 with block layer 0",
        (),
        ONE,
        lambda: {1: None, 2: 0},
    ),
}
OF_ANOTHER_KIND = ("each_by_one", "several_by_one", "in_a_loop", "shifted")
"""Cases that gemma2 rejects: every other block has an attention window."""


@cache
def expected(name: str, key: str) -> dict[Key, list[float]]:
    case = CASES[key]

    def value(n: int, *at: Coord) -> float:
        return difference(called(name, rows()[n].ids, case.pairs(*at)), records()[n])

    return table([tuple(cell) for cell in case.cells], value, len(records()))


BESIDE = experiment("beside", "ablate resid_pre layer * at cue token with zero")
"""Rows in the same file that reuse cached activations."""


@cache
def results(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    text = "".join(
        experiment(key, case.rules)
        for key, case in CASES.items()
        if name != "gemma2" or key not in OF_ANOTHER_KIND
    )
    return run_file(text + BESIDE, data, name, mode)


def hold(data: Path, key: str, name: str, mode: str) -> None:
    if name == "gemma2" and key in OF_ANOTHER_KIND:
        pytest.skip("blocks of other kinds don't stand in for each other")
    case = CASES[key]
    found = results(data, name, mode)[key]
    agree(found, case.axes, expected(name, key), unpatched(name), large=0.1)


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("key", list(CASES))
def test_replaced_blocks_equal_the_bare_model(data: Path, key: str, mode: str) -> None:
    hold(data, key, "llama", mode)


@pytest.mark.parametrize(("key", "name"), in_turn(list(CASES), ["gpt2", "gpt_neox", "gemma2"]))
def test_replaced_blocks_equal_the_bare_model_in_other_families(
    data: Path, key: str, name: str
) -> None:
    hold(data, key, name, "planned")


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", list(CASES))
def test_replaced_blocks_equal_the_bare_model_in_every_family(
    data: Path, key: str, name: str, mode: str
) -> None:
    hold(data, key, name, mode)


def test_replace_block_leaves_the_model_unchanged(data: Path) -> None:
    model = bare("llama")
    before = {key: id(each) for key, each in model.named_parameters()}
    values = {key: each.clone() for key, each in model.named_parameters()}
    results(data, "llama", "planned")
    assert {key: id(each) for key, each in model.named_parameters()} == before
    assert all(torch.equal(values[key], each) for key, each in model.named_parameters())
    assert not any("forward" in part.__dict__ for part in model.modules())


def test_patched_head_of_a_replaced_block_equals_the_bare_model(data: Path) -> None:
    """The patch applies to the head of the replacing block."""
    text = experiment(
        "e", "replace block layer 2 with block layer 1 patch L2H1 at last token with longer"
    )
    found = run_file(text, data, "llama", "planned")["e"]
    values: list[float] = []
    for n, row in enumerate(rows()):
        source = rows("longer")[n]
        z = plain("llama", source)["z", 2][tokens(source, "last token")[0], 1]
        values.append(difference(called("llama", row.ids, {2: 1}, z), records()[n]))
    agree(found, (), {(): values}, unpatched("llama"), large=0.1)


def test_cosine_after_an_identity_block_equals_the_reference(data: Path) -> None:
    measure = "measure cosine(L1.resid, clean) as raw"
    text = experiment("e", "replace block layer 1 with identity", measure=measure)
    found = run_file(text, data, "llama", "planned")["e"].measures[0].patched[0]
    for n, row in enumerate(rows()):
        run = plain("llama", row)
        before, behind = run["resid_pre", 1][-1, 0], run["resid_post", 1][-1, 0]
        by_hand = torch.cosine_similarity(before, behind, dim=0)
        np.testing.assert_allclose(found[n], float(by_hand), atol=1e-5)
        assert by_hand < 0.999


@pytest.mark.parametrize(
    ("name", "line", "code"),
    [
        ("llama", "replace block layer 1 with zero", "E0203"),
        ("llama", "replace block layer 7 with identity", "E0302"),
        ("llama", "replace block layer 1 with block layer 9", "E0302"),
        ("llama", "replace block layer 1 with block layer *", "E0304"),
        ("llama", "replace block layer 1 with block layer 0..1", "E0304"),
        ("llama", "replace block head 1 with identity", "E0304"),
        ("gemma2", "replace block layer 1 with block layer 0", "E0108"),
        (
            "llama",
            "replace block layer 1 with identity ablate L1H0 at last token with zero",
            "E0414",
        ),
        (
            "llama",
            "replace block layers * with identity "
            "block attention layer 1 from last token to cue token",
            "E0414",
        ),
        (
            "llama",
            "run made { ablate L1H0 at last token with zero } from clean into made "
            "replace block layer 1 with identity",
            "E0414",
        ),
        (
            "llama",
            "from longer into clean replace block layer 2 with identity "
            "path layer 0 head * -> q layer 2 head * at last token",
            "E0414",
        ),
        (
            "llama",
            "from longer into clean path layer 0 head * -> mlp_norm layer 2 at last token "
            "replace block layer 2 with identity",
            "E0414",
        ),
        ("llama", "replace block layer 1 with identity against random(3)", "E0630"),
    ],
)
def test_invalid_block_replacements_are_errors(data: Path, name: str, line: str, code: str) -> None:
    assert codes(experiment("e", line), data, name) == [code]


def test_measure_inside_a_removed_block_is_an_error(data: Path) -> None:
    measure = "measure cosine(L1.attn, clean) as raw"
    line = "replace block layer 1 with identity"
    assert codes(experiment("e", line, measure=measure), data) == ["E0414"]
    other = experiment("e", "replace block layer 2 with identity", measure=measure)
    run_file(other, data, "llama", "planned")


def checked(data: Path, line: str, **facts: Any) -> CheckedFile:
    source = Source(
        f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{experiment("e", line)}',
        data / "file.mech",
    )
    own = context(source, "m", shared(bare("llama")))
    own = replace(own, shape=replace(own.shape, **facts))
    return check_source(source, CheckSettings(), {"m": own})


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "scale_attn_by_inverse_layer_idx"])
def test_replacing_blocks_that_depend_on_their_layer_is_an_error(data: Path, key: str) -> None:
    found = checked(data, "replace block layer 1 with block layer 0", config={key: 2})
    assert [d.code for d in found.diagnostics if d.severity == "error"] == ["E0108"]


def test_replacing_blocks_that_differ_in_structure_is_an_error(data: Path) -> None:
    """E0108 after loading."""
    by_block = checked(data, "replace block layer 1 with block layer 0").experiments
    by_none = checked(data, "replace block layer 1 with identity").experiments
    model = shared(bare("llama"))
    assert check_modules(by_block, {"m": model}) == []
    changes: list[Callable[[Any], None]] = [
        lambda block: setattr(block.self_attn, "scaling", 3.0),
        lambda block: setattr(block, "mlp", nn.Identity()),
        lambda block: setattr(block.mlp.up_proj, "bias", nn.Parameter(torch.zeros(28))),
        lambda block: setattr(block.mlp, "extra", torch.zeros(3)),
        lambda block: setattr(block.mlp, "more", nn.Identity()),
    ]
    for change in changes:
        module = copy.deepcopy(model.module)
        change(module.get_submodule(model.anatomy.blocks[1].path))
        other = replace(model, module=module)
        assert [d.code for d in check_modules(by_block, {"m": other})] == ["E0108"]
        assert check_modules(by_none, {"m": other}) == []
    kept = copy.deepcopy(model.module)
    part: Any = kept.get_submodule(f"{model.anatomy.blocks[1].path}.mlp")
    part._hf_hook = object()
    for experiments, name in ((by_block, "block 0"), (by_none, "identity")):
        [found] = check_modules(experiments, {"m": replace(model, module=kept)})
        assert found.code == "E0108"
        assert found.message.startswith(f"{name} in place of block 1 (its weights are stored")
