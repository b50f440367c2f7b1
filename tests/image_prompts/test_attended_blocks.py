"""`replace block` in Llama 3.2 Vision, against plain hooks that replace outputs of blocks of the
bare model: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mechdsl.execute.run.panel import execute
from mechdsl.forward.hooks import model as model_inputs
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.results.assembly.collection import check_denominators
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import check_file
from ..quick import some
from .support import BLOCK, RECORDS, experiment
from .test_attended_encoder import LOCAL, column, state, written
from .test_attended_images import (
    LAYERS,
    Hook,
    bare,
    block_at,
    difference,
    folder,
    inputs,
    loaded,
    other,
    outputs,
    patch,
    read,
    replied,
    run_text,
    token,
    try_text,
)
from .test_attended_images import at as at_text

ALL = range(len(RECORDS))
Replaced = Mapping[str, str | None]
"""Path of a block → path of its replacement; None for identity."""


def tower(layer: int) -> str:
    """The path of a block of the encoder."""
    encoder = "transformer" if layer < LOCAL else "global_transformer"
    return f"model.vision_model.{encoder}.layers.{layer - LOCAL * (layer >= LOCAL)}"


@contextmanager
def replaced(pairs: Replaced) -> Generator[None]:
    """Replace the outputs of blocks by their inputs, or by those of other blocks."""
    forwards = {of: bare().get_submodule(of).forward for of in pairs.values() if of is not None}

    def hook(of: str | None) -> Callable[..., Any]:
        def give(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if of is not None:
                return forwards[of](*args, **kwargs)
            return args[0] if args else kwargs["hidden_states"]

        return give

    with ExitStack() as stack:
        for to, of in pairs.items():
            block = bare().get_submodule(to)
            handle = block.register_forward_hook(hook(of), with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield


def values(pairs: Replaced, hooks: Sequence[Sequence[Hook]] = ((),) * len(ALL)) -> list[float]:
    with replaced(pairs):
        return [difference(n, other(n), hooks[n]) for n in ALL]


def check(found: ExperimentResult, expected: Sequence[Sequence[float]]) -> None:
    """Compare the cells of an experiment, each with an effect above 0.1."""
    measure = found.measures[0]
    base = [difference(n, other(n)) for n in ALL]
    np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
    np.testing.assert_allclose(measure.patched, expected, atol=2e-4)
    assert (np.abs(measure.patched - measure.base).max(axis=1) > 0.1).all()


ONE = "photo row 1 col 2 token"
RULES: dict[str, list[Replaced]] = {
    "replace block layer * with identity": [{block_at(n): None} for n in range(LAYERS)],
    "replace block layers 0, 1 with identity": [{block_at(0): None, block_at(1): None}],
    "replace block layer 0 with block layer 2": [{block_at(0): block_at(2)}],
    "replace block layer 1 with block layer 3": [{block_at(1): block_at(3)}],
    "replace block vision layer * with identity": [{tower(n): None} for n in range(LOCAL + 1)],
    "replace block vision layer 0 with block vision layer 1": [{tower(0): tower(1)}],
    "for l in 0..0 { replace block vision layer 1 with block vision layer l }": [
        {tower(1): tower(0)}
    ],
    "replace block vision layer 0 with identity\n  replace block layer 2 with block layer 0": [
        {tower(0): None, block_at(2): block_at(0)}
    ],
}


@pytest.mark.parametrize("mode", some(["planned", "plain", "small passes"], ["planned"]))
def test_replaced_blocks_equal_hooks_on_the_bare_model(mode: str) -> None:
    """All rules in one file, so that passes with and without them use the same images."""
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(RULES)
    )
    for found, cells in zip(run_text(text, mode), RULES.values(), strict=True):
        check(found, [values(pairs) for pairs in cells])


SKIP = "replace block vision layer 0 with identity"
OMIT = "replace block layer 1 with identity"


@pytest.mark.parametrize("mode", some(["planned", "small passes"], ["planned"]))
def test_replaced_blocks_with_other_rules_and_runs_equal_hooks(mode: str) -> None:
    ends = "from clean into changed"
    rules = (
        f"{SKIP}\n  patch resid_pre vision layer 1 at {ONE}",
        f"{SKIP}\n  patch resid_post layer 2 at last token",
        f"{SKIP}\n  scale v cross layer 1 heads * at {ONE} by -3",
        f"{OMIT}\n  scale z layer 2 heads * at last token by -3",
    )
    text = "".join(experiment(f"e{n}", ends, rule) for n, rule in enumerate(rules))
    runs = f"run skipped {{ {SKIP} }}", "from skipped into changed"
    text += experiment("r", *runs, f"patch resid_post vision layer 1 at {ONE}")
    text += experiment("s", *runs, "patch z cross layer 3 heads * at last token")
    text += experiment(
        "o", runs[0], f"observe norm resid_post vision layer 1 of skipped at {ONE}", measure=""
    )
    *found, norms = run_text(text, mode)
    first: list[list[Hook]] = []
    for n in ALL:
        vectors = state("resid_pre", 1, n, n)[column(n, 1, 2)]
        first.append([written("resid_pre", 1, [column(other(n), 1, 2)], vectors)])
    tripled = [[scaled_values(n)] for n in ALL]
    heads = [[at_text("z", 2, [-1], None, lambda value: -3 * value)] for _ in ALL]
    streams = [[at_text("resid_post", 2, [-1], None, read(n, n, "resid_post", 2))] for n in ALL]
    expected = [
        values({tower(0): None}, first),
        values({tower(0): None}, streams),
        values({tower(0): None}, tripled),
        values({block_at(1): None}, heads),
    ]
    seen: list[torch.Tensor] = []
    mixed: list[torch.Tensor] = []
    with replaced({tower(0): None}):
        for n in ALL:
            seen.append(state.__wrapped__("resid_post", 1, n, n)[column(n, 1, 2)])
            mixed.append(read(n, n, "z cross", 3))
    patched = [[written("resid_post", 1, [column(other(n), 1, 2)], seen[n])] for n in ALL]
    expected.append(values({}, patched))
    expected.append(values({}, [[at_text("z cross", 3, [-1], None, mixed[n])] for n in ALL]))
    for each, own in zip(found, expected, strict=True):
        check(each, [own])
    lengths = []
    with replaced({tower(0): None}):
        for n in ALL:
            lengths.append(float(state.__wrapped__("resid_post", 1, n, n)[column(n, 1, 2)].norm()))
    np.testing.assert_allclose(norms.measures[0].patched[0], lengths, rtol=1e-4)


def scaled_values(n: int) -> Hook:
    """The values of a patch in layer 1, times -3."""
    return at_text("v cross", 1, [patch(other(n), 1, 2)], None, lambda value: -3 * value)


@contextmanager
def exchanged(pairs: Replaced) -> Generator[None]:
    """Replace blocks by copies of others that store their keys as those of the replaced blocks."""
    copied = {to: of for to, of in pairs.items() if of is not None}
    with replaced({to: of for to, of in pairs.items() if of is None}), ExitStack() as stack:
        for to, of in copied.items():
            name, _, number = to.rpartition(".")
            layers, copy = bare().get_submodule(name), deepcopy(bare().get_submodule(of))
            for part in copy.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = int(number)
            stack.callback(layers.__setitem__, int(number), layers[int(number)])
            layers[int(number)] = copy
        yield


def prefilled(n: int, pairs: Replaced) -> list[int]:
    """The reply with blocks replaced in the pass over the prompt alone, with the model's cache."""
    given, found = inputs(n, n), list[int]()
    with torch.no_grad():
        with exchanged(pairs):
            output = bare()(**given, use_cache=True)
        mask = given["cross_attention_mask"][:, -1:]
        for _ in range(4):
            best = int(output.logits[0, -1].argmax())
            if best == token("</s>"):
                break
            found.append(best)
            output = bare()(
                input_ids=torch.tensor([[best]]),
                past_key_values=output.past_key_values,
                cross_attention_mask=mask,
                use_cache=True,
            )
    return found


WRITTEN = 'measure matches("1|2|3") as raw'
STEPS: dict[str, Callable[[int], list[int]]] = {
    f"{SKIP}": lambda n: continued(n, {tower(0): None}),
    f"{SKIP} during prefill": lambda n: continued(n, {tower(0): None}),
    f"{OMIT}": lambda n: continued(n, {block_at(1): None}),
    f"{OMIT} during prefill": lambda n: prefilled(n, {block_at(1): None}),
    "replace block layer 2 with block layer 0 during prefill": lambda n: prefilled(
        n, {block_at(2): block_at(0)}
    ),
    f"{OMIT} during prefill\n  {SKIP}": lambda n: prefilled(n, {block_at(1): None, tower(0): None}),
}


def continued(n: int, pairs: Replaced) -> list[int]:
    with replaced(pairs):
        return replied(n, ())


def test_replies_with_replaced_blocks_equal_hooks() -> None:
    """Images are encoded in the prefill, so their replaced blocks count in all steps."""
    text = "".join(
        experiment(f"r{n}", "generate 4", rule, measure=WRITTEN) for n, rule in enumerate(STEPS)
    )
    plain = [replied(n, ()) for n in ALL]
    for found, reply in zip(run_text(text), STEPS.values(), strict=True):
        assert found.replies is not None
        expected = [reply(n) for n in ALL]
        assert [[*found.replies.runs["clean"][n][0].ids] for n in ALL] == plain
        assert [[*found.replies.cells[0][n][0].ids] for n in ALL] == expected
        assert expected != plain


def test_measures_at_steps_with_an_encoder_block_replaced_in_the_prefill_equal_hooks() -> None:
    measure = "measure logit(answer) - logit(wrong) at each step as raw"
    [found] = run_text(experiment("e", "generate 2", f"{SKIP} during prefill", measure=measure))
    for n in ALL:
        with replaced({tower(0): None}):
            reply = replied(n, ())
            steps = [outputs(n, n, (), reply[:k]).logits[0, -1] for k in range(2)]
        expected = [float(each[token(f"{n + 1}")] - each[token(f"{9 - n}")]) for each in steps]
        np.testing.assert_allclose(found.measures[0].patched[:, n], expected, atol=2e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.1


def test_images_first_used_by_a_replaced_block_keep_their_own_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The vectors of an image are computed again for each pass, some in passes with this block."""
    monkeypatch.setattr(model_inputs, "_MAX_CACHED_BYTES", 1)
    monkeypatch.setattr(model_inputs.IMAGE_INPUTS, "data", {})
    text = experiment("e", "from clean into changed", SKIP)
    text += experiment("f", "from clean into changed", "patch resid_post layer 2 at last token")
    first, second = run_text(text, "small passes")
    check(first, [values({tower(0): None})])
    streams = [[at_text("resid_post", 2, [-1], None, read(n, n, "resid_post", 2))] for n in ALL]
    check(second, [values({}, streams)])


ERRORS = {
    "replace block layer 2 with block layer 1": "`attends to the image`",
    "replace block layer 3 with block layer 0": "`attends to the text`",
    "replace block vision layer 2 with block vision layer 1": "`global`",
}


@pytest.mark.parametrize(("rule", "kind"), ERRORS.items())
def test_block_of_another_kind_reports_e0108(rule: str, kind: str) -> None:
    _, found = try_text(experiment("e", rule))
    [problem] = [each for each in found if each.severity == "error"]
    assert problem.code == "E0108"
    assert kind in problem.message


@pytest.mark.parametrize("line", ["", "generate 3"])
def test_planned_cost_of_replaced_encoder_blocks_is_near_the_counted_products(line: str) -> None:
    rule = "replace block vision layer * with identity"
    lines = [line, rule] if line else ["from clean into changed", rule]
    measure = {"measure": WRITTEN} if line else {}
    checked = check_file(experiment("e", *lines, **measure), folder(), loaded(), BLOCK)
    plan = make_plan(checked.experiments)
    execute(plan, {"m": loaded()}, None, check=check_denominators)  # encodes images before
    with FlopCounterMode(display=False) as counter:
        execute(plan, {"m": loaded()}, None, check=check_denominators)
    planned = plan_cost(plan).planned.multiply_adds
    assert 0.5 < planned / (counter.get_total_flops() / 2) < 2


def test_conventions_say_that_images_pass_through_the_blocks() -> None:
    [found] = run_text(experiment("e", SKIP))
    assert "all tokens of all images" in found.conventions["blocks"]
