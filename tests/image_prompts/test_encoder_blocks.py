"""`replace block vision layer 0 with …` in prompts with images, against plain hooks that replace
outputs of blocks in the encoder of the bare model: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import mechdsl
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import as_in_the_data
from ..quick import some
from . import test_video_processors as videos
from . import test_vision_encoder as plain
from .reference import at, followed, record_value
from .support import MEASURE, experiment, write_data
from .test_families import ALL, BLOCK, TWO, bare, both, difference, inputs, run_text
from .test_token_patches import TOWERS, edited, other, state

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

LAYERS = 2
NAMES = (
    "llava_class",
    "vipllava",
    "paligemma",
    "llava_next",
    "gemma3",
    "internvl",
    "smolvlm",
    "idefics2",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)
QUICK = ("paligemma", "qwen3_vl")
MODES = some(["planned", "padded on the right", "small passes"], ["planned"])
Replaced = Mapping[int, int | None]
"""Layer of a block → layer of its replacement; None for identity."""


def blocks_of(name: str, *, of_videos: bool = False) -> Any:
    if of_videos and name == "video_llava":
        path = "model.video_tower.encoder.layers"
    elif name == "idefics2":
        path = "model.vision_model.encoder.layers"
    elif name in plain.CLASS_TOKENS:
        path = "model.vision_tower.encoder.layers"
    else:
        path = TOWERS[name].blocks
    return bare(name).model.get_submodule(path)


@contextmanager
def replaced(blocks: Any, pairs: Replaced) -> Generator[None]:
    """Replace the outputs of blocks by their inputs, or by those of other blocks."""
    plain_forwards = [block.forward for block in blocks]

    def hook(layer: int | None) -> Callable[..., Any]:
        def give(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if layer is not None:
                return plain_forwards[layer](*args, **kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return give

    with ExitStack() as stack:
        for to, of in pairs.items():
            # Before the library's hooks, which collect the outputs of blocks.
            handle = blocks[to].register_forward_hook(hook(of), with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield


def values(name: str, pairs: Replaced, given: Callable[[int], Any] | None = None) -> list[float]:
    """The differences of logits of all prompts with replaced blocks."""
    with replaced(blocks_of(name), pairs):
        own = given or (lambda n: inputs(name, n, n))
        return [difference(bare(name).run(own(n))) for n in ALL]


def check(found: ExperimentResult, expected: Sequence[Sequence[float]]) -> None:
    """Compare the cells of an experiment, each with an effect above 0.1."""
    measure = found.measures[0]
    np.testing.assert_allclose(measure.patched, expected, atol=2e-4)
    assert (np.abs(measure.patched - measure.base).max(axis=1) > 0.1).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_replaced_blocks_of_the_encoder_equal_hooks(name: str, mode: str) -> None:
    """All experiments in one file; one of them replaces a block of the language model."""
    rules = {
        "replace block vision layer * with identity": [{0: None}, {1: None}],
        "replace block vision layers 0, 1 with identity": [{0: None, 1: None}],
        "replace block vision layer 0 with block vision layer 1": [{0: 1}],
        "for l in 0..0 { replace block vision layer 1 with block vision layer l }": [{1: 0}],
    }
    if name == "qwen2_5_vl":  # its blocks differ in their windows
        rules = dict([*rules.items()][:2])
    text = "".join(experiment(f"e{n}", rule) for n, rule in enumerate(rules))
    *found, language = run_text(
        name, text + experiment("l", "replace block layer 0 with identity"), mode
    )
    for each, cells in zip(found, rules.values(), strict=True):
        base = [difference(bare(name).run(inputs(name, n, n))) for n in ALL]
        np.testing.assert_allclose(each.measures[0].base[0], base, atol=1e-4)
        check(each, [values(name, pairs) for pairs in cells])
    with replaced(bare(name).language.layers, {0: None}):
        own = [difference(bare(name).run(inputs(name, n, n))) for n in ALL]
    check(language, [own])


OTHERS = ("llava_next", "gemma3", "qwen3_vl")
SKIP = "replace block vision layer 0 with identity"
SITE = "resid_post vision layer 1"
AT = "at photo tokens"


def turned_at_the_end(value: Tensor) -> Tensor:
    value[-1] *= -2
    return value


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", some(OTHERS, ["qwen3_vl"]))
def test_replaced_blocks_with_other_rules_and_runs_equal_hooks(name: str, mode: str) -> None:
    model, tower = bare(name), TOWERS[name]
    ends = "from clean into changed"
    runs = f"run skipped {{ {SKIP} }}", "from skipped into clean"
    observed = f"observe norm {SITE} of skipped {AT}"
    replies = 'measure matches("w1|w2") as raw'
    text = "".join(
        (
            experiment(
                "a", ends, SKIP, "patch resid_pre vision layer 1 at photo row 1 col 2 token"
            ),
            experiment("b", SKIP, "scale resid_post layer 0 at last token by -2"),
            experiment("c", *runs, "patch resid_post layer 1 at last token"),
            experiment("d", *runs, f"patch {SITE} {AT}"),
            experiment("e", "generate 4", SKIP, measure=replies),
            experiment("e_of_step", "generate 4", f"{SKIP} during prefill", measure=replies),
            experiment("f", runs[0], observed, measure=""),
        )
    )
    found = {each.name: each for each in run_text(name, text, mode)}
    expected = dict[str, list[float]]((key, []) for key in "abcdf")
    differ = 0
    for n in ALL:
        given, blocks = inputs(name, n, n), blocks_of(name)
        copied = state(name, "resid_pre", 1, n, n)[tower.cell(n, 1, 2)]
        edit = at(tower.cell(other(n), 1, 2), copied)
        with replaced(blocks, {0: None}), edited(name, "resid_pre", 1, edit):
            expected["a"].append(difference(model.run(inputs(name, n, other(n)))))
        with replaced(blocks, {0: None}):
            expected["b"].append(difference(model.run(given, blocks={0: turned_at_the_end})))
            vector = model.states(given)["blocks"][1][-1]
            own = record_value(partial(edited, name, "resid_post", 1), partial(model.run, given))
            reply = model.reply(given, 4)
        expected["c"].append(difference(model.run(given, blocks={1: at([-1], vector)})))
        with edited(name, "resid_post", 1, at(tower.every(n), own[tower.every(n)])):
            expected["d"].append(difference(model.run(given)))
        expected["f"].append(float(own[tower.every(n)].norm(dim=-1).mean()))
        for key in ("e", "e_of_step"):
            made = found[key].replies
            assert made is not None
            assert list(made.cells[0][n][0].ids) == reply
        differ += reply != model.reply(given, 4)
    assert differ
    for key in "abcd":
        check(found[key], [expected[key]])
    np.testing.assert_allclose(found["f"].measures[0].patched[0], expected["f"], rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", some(("idefics2", *OTHERS), ["qwen3_vl"]))
def test_measures_at_steps_of_a_reply_with_a_block_replaced_in_the_prefill_equal_hooks(
    name: str, mode: str
) -> None:
    """Encoders read images in the prefill only, so that a pass over prompt and reply has the same
    vectors of images; the reply is that of the rule."""
    steps = "measure logit(answer) - logit(wrong) at each step as"
    text = "".join(
        experiment(f"e{n}", "generate 3", *lines)
        for n, lines in enumerate(
            [
                (f"{SKIP} during prefill", f"{steps} raw"),
                (f"{SKIP} during prefill", f"{steps} delta"),
                (SKIP, f"{steps} raw"),
            ]
        )
    )
    raw, change, plain = run_text(name, text.replace(f"  {MEASURE}\n", ""), mode)
    model, blocks, bases = bare(name), blocks_of(name), list[list[float]]()
    expected = list[list[float]]()
    for n in ALL:
        given = inputs(name, n, n)
        with replaced(blocks, {0: None}):
            reply = model.reply(given, 3)
            edited_run = model.run(followed(given, reply[:2]))
        expected.append([difference(row[None]) for row in edited_run[-3:]])
        base = model.run(followed(given, reply[:2]))
        bases.append([difference(row[None]) for row in base[-3:]])
    for found in (raw, plain):
        np.testing.assert_allclose(found.measures[0].patched, np.transpose(expected), atol=2e-4)
    measure = change.measures[0]
    np.testing.assert_allclose(measure.patched, np.transpose(expected), atol=2e-4)
    np.testing.assert_allclose(measure.base, np.transpose(bases), atol=2e-4)
    assert np.abs(measure.patched - measure.base).max(axis=1).min() > 0.1


@pytest.mark.parametrize("name", some(OTHERS, ["gemma3"]))
def test_replaced_blocks_with_two_images_change_both(name: str) -> None:
    block = TWO.replace('" w1 w2"', '" w1"').replace('" w2 w2"', '" w2"')
    text = experiment("e", SKIP).replace("prompts ask", "prompts both")
    [found] = run_text(name, text, block=block)
    check(found, [values(name, {0: None}, lambda n: both(name, n))])


@pytest.mark.parametrize("name", some(("video_llava", "qwen2_5_vl", "qwen3_vl"), ["video_llava"]))
def test_replaced_blocks_with_videos_equal_hooks(name: str) -> None:
    """Video-LLaVA encodes videos in another encoder than images."""
    found = videos.run(experiment("e", SKIP), name)["e"]
    count = found.measures[0].patched.shape[1]
    with replaced(blocks_of(name, of_videos=True), {0: None}):
        expected = [
            difference(videos.bare(name).run(videos.inputs(name, n, videos.record(n)["a"])))
            for n in range(count)
        ]
    check(found, [expected])


def test_stored_values_distinguish_replaced_blocks(tmp_path: Path) -> None:
    """Of the encoder, of the language model, and by what they are replaced."""
    name = "paligemma"
    write_data(tmp_path)
    rules = [
        "replace block vision layer 0 with identity",
        "replace block vision layer 1 with identity",
        "replace block layer 0 with identity",
        "replace block vision layer 0 with block vision layer 1",
    ]
    models = {"m": (bare(name).model, bare(name).processor)}
    found = list[Any]()
    for rule in [*rules, *rules]:
        path, block = tmp_path / "file.mech", BLOCK.replace(' w3"\n', ' w3 \\n"\n')
        text = f'mech 1\nmodel m = local("handed over")\n{block}\n{experiment("e", rule)}'
        path.write_text(text, "utf-8")
        [own] = mechdsl.run(path, models, store=tmp_path / "store")
        found.append(as_in_the_data(own).measures[0].patched[0])
    for number in range(4):
        np.testing.assert_array_equal(found[number], found[number + 4])
    apart = [np.abs(one - two).max() for n, one in enumerate(found[:4]) for two in found[:n]]
    assert min(apart) > 0.01


REJECTED = {
    "replace block vision layer 0 with block layer 1": (
        "E0207",
        "`block layer 1` is in another stack than the block that it replaces",
    ),
    "replace block layer 0 with block vision layer 1": ("E0207", "`block vision layer 1` is in"),
    "replace block vision layer 5 with identity": ("E0302", "layer 5 does not exist"),
    "replace block vision layer 0 with block vision layer 1": (
        "E0108",
        "block 1 (`full`) in place of block 0 (`windowed`)",
    ),
    f"{SKIP}\n  scale mlp_out vision layer 0 at photo tokens by 2": ("E0414", "mlp_out vision"),
    f"generate 3\n  {SKIP} during step 1..2": ("E0207", "encodes images in the prefill"),
}


@pytest.mark.parametrize(("line", "expected"), REJECTED.items())
def test_invalid_block_of_the_encoder_reports_the_code(
    line: str, expected: tuple[str, str]
) -> None:
    with pytest.raises(AssertionError) as problem:
        run_text("qwen2_5_vl", experiment("e", line))
    assert f"error[{expected[0]}]" in str(problem.value)
    assert expected[1] in str(problem.value)


def test_block_of_the_encoder_without_images_reports_e0207() -> None:
    block = BLOCK.replace('  image photo = "{file}"\n', "").replace("{photo} ", "")
    block = block.replace("  corrupt changed { file = other }\n", "")
    with pytest.raises(AssertionError) as problem:
        run_text("qwen2_5_vl", experiment("e", SKIP), block=block)
    assert "no row of `ask` has one" in str(problem.value)


def test_replaced_block_of_the_encoder_leaves_that_of_the_language_model() -> None:
    """Rules act in a block of the language model with the same number."""
    name = "qwen2_5_vl"
    rule = "scale mlp_out layer 0 at last token by 1"
    one, both_rules = run_text(name, experiment("a", SKIP) + experiment("b", SKIP, rule))
    np.testing.assert_allclose(both_rules.measures[0].patched, one.measures[0].patched, atol=1e-5)
