"""Rules in the vision encoder of prompts with images, against plain hooks on the bare model's
encoder: one unpadded prompt at a time, with pixels from the model's processor."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.loading.loader import adopt_model

from ..execute.support import context, run_on
from . import support, test_rules
from .reference import Bare, Edit, at, edited_module, followed, one_head, record_value
from .support import RECORDS, check_cells, experiment, run_file, try_file
from .test_blocks import TWO
from .test_families import ALL, bare, difference, draw, inputs, run_text, under_edits

CLASS_TOKENS = {"llava": 1, "llava_class": 1, "vipllava": 1, "paligemma": 0}
NAMES = tuple(CLASS_TOKENS)
LAYERS, HEADS, WIDTH = 2, 2, 16
GRID = 2
Key = tuple[str | int, ...]


def column(name: str, row: int, col: int) -> int:
    """The token of a patch in the encoder."""
    return CLASS_TOKENS[name] + GRID * (row - 1) + col - 1


def patches(name: str) -> list[int]:
    return [column(name, row, col) for row in (1, 2) for col in (1, 2)]


SITES: dict[str, tuple[str, bool]] = {
    "resid_pre": ("", True),
    "resid_post": ("", False),
    "z": (".self_attn.out_proj", True),
    "attn_out": (".self_attn.out_proj", False),
    "mlp_out": (".mlp", False),
}
"""Site → module of a block, and whether it is the module's input."""


@contextmanager
def edited(model: Bare, site: str, layer: int, edit: Edit) -> Generator[None]:
    """Change a site of the encoder, [tokens, width] or [image, tokens, width]; `z` has all heads
    side by side."""
    part, is_input = SITES[site]
    own = model.model.get_submodule(f"model.vision_tower.encoder.layers.{layer}{part}")
    with edited_module(own, lambda value: edit(value.squeeze(0)), is_input=is_input):
        yield


@cache
def state(name: str, site: str, layer: int, number: int, image: int) -> Tensor:
    """The values of a site in the encoder, in the clean run of a prompt."""
    opened = partial(edited, bare(name), site, layer)
    return record_value(opened, partial(bare(name).run, inputs(name, number, image)))


def under(name: str, site: str, layer: int, edit: Callable[[int], Edit]) -> list[float]:
    """The difference of each prompt with its other image, under an edit of its number."""
    return under_edits(name, partial(edited, bare(name), site, layer), edit)


def copied(name: str, site: str, layer: int, tokens: Sequence[int]) -> Callable[[int], Edit]:
    return lambda n: at(tokens, state(name, site, layer, n, n)[list(tokens)])


def one_patch(name: str) -> dict[Key, list[float]]:
    token = [column(name, 1, 2)]
    return {
        (layer,): under(name, "resid_post", layer, copied(name, "resid_post", layer, token))
        for layer in range(LAYERS)
    }


def each_patch(name: str) -> dict[Key, list[float]]:
    return {
        (f"photo row {row} col {col}",): under(
            name, "mlp_out", 0, copied(name, "mlp_out", 0, [column(name, row, col)])
        )
        for row in (1, 2)
        for col in (1, 2)
    }


def heads(name: str) -> dict[Key, list[float]]:
    tokens, width = patches(name), WIDTH // HEADS

    def edit(n: int, head: int) -> Edit:
        clean = state(name, "z", 0, n, n)[tokens, head * width : (head + 1) * width]
        return one_head(at(tokens, clean), head, width)

    return {
        (head,): under(name, "z", 0, lambda n, head=head: edit(n, head)) for head in range(HEADS)
    }


def zeros(name: str) -> dict[Key, list[float]]:
    tokens = [column(name, 2, 1), column(name, 2, 2)]
    edit = at(tokens, torch.zeros(()))
    return {(layer,): under(name, "attn_out", layer, lambda n: edit) for layer in range(LAYERS)}


def means(name: str) -> dict[Key, list[float]]:
    tokens = patches(name)
    mean = torch.stack([state(name, "resid_post", 0, n, n)[tokens] for n in ALL]).mean(0)
    return {(): under(name, "resid_post", 0, lambda n: at(tokens, mean))}


def scaled(name: str) -> dict[Key, list[float]]:
    def edit(value: Tensor) -> Tensor:
        value[column(name, 1, 1)] *= 2
        return value

    return {(): under(name, "resid_pre", 1, lambda n: edit)}


def swapped(name: str) -> dict[Key, list[float]]:
    first, second = column(name, 1, 1), column(name, 2, 2)

    def edit(value: Tensor) -> Tensor:
        value[[first, second]] = value[[second, first]]
        return value

    return {(layer,): under(name, "resid_pre", layer, lambda n: edit) for layer in range(LAYERS)}


def constant(name: str) -> dict[Key, list[float]]:
    edit = at([column(name, 2, 1)], torch.tensor(1.5))
    every = [one_head(edit, head, WIDTH // HEADS) for head in range(HEADS)]
    return {(n,): under(name, "z", 1, lambda _, own=own: own) for n, own in enumerate(every)}


def frozen(name: str) -> dict[Key, list[float]]:
    """A patch of one token, while an MLP after it keeps its values of the base run."""
    token, kept, values = [column(name, 1, 2)], patches(name), list[float]()
    for n in ALL:
        other = (n + 1) % 4
        copy = at(token, state(name, "resid_pre", 0, n, n)[token])
        keep = at(kept, state(name, "mlp_out", 1, n, other)[kept])
        with edited(bare(name), "resid_pre", 0, copy), edited(bare(name), "mlp_out", 1, keep):
            values.append(difference(bare(name).run(inputs(name, n, other))))
    return {(): values}


PATCH = "patch resid_pre vision layer 0 at photo row 1 col 2 token"
CASES: dict[str, tuple[list[str], Callable[[str], dict[Key, list[float]]]]] = {
    "patch resid_post vision layer * at photo row 1 col 2 token": (["layer"], one_patch),
    "patch mlp_out vision layer 0 at each token of photo": (["position"], each_patch),
    "patch z vision layer 0 head * at photo tokens": (["head"], heads),
    "ablate attn_out vision layer * at photo row 2 col * tokens with zero": (["layer"], zeros),
    "ablate resid_post vision layer 0 at photo tokens with mean of clean": ([], means),
    "scale resid_pre vision layer 1 at photo row 1 col 1 token by 2": ([], scaled),
    "swap resid_pre vision layer * at photo row 1 col 1 token with photo row 2 col 2 token": (
        ["layer"],
        swapped,
    ),
    "set z vision layer 1 head * at photo row 2 col 1 token to 1.5": (["head"], constant),
    f"{PATCH}\n  freeze mlp_out vision layer 1 at photo tokens": ([], frozen),
}


@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize("name", NAMES)
def test_vision_encoder_rules_equal_hooks(name: str, mode: str) -> None:
    """All rules in one file, each with an effect of more than 0.1."""
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(CASES)
    )
    base = [difference(bare(name).run(inputs(name, n, (n + 1) % 4))) for n in ALL]
    for found, (rule, (axes, expected)) in zip(
        run_text(name, text, mode), CASES.items(), strict=True
    ):
        assert check_cells(found, axes, expected(name), base, rule) > 0.1, rule


def test_resample_in_the_encoder_uses_one_donor_row_for_all_layers() -> None:
    """Each row has a different donor, which is the same in each layer."""
    name, site, tokens = "llava_class", "resid_post", patches("llava_class")
    line = f"ablate {site} vision layer * at photo tokens with resample"
    [found] = run_text(name, experiment("e", line))
    donors = list[list[int]]()
    for layer, patched in enumerate(found.measures[0].patched):
        values = np.full((len(ALL), len(ALL)), np.nan)
        for n in ALL:
            for donor in set(ALL) - {n}:
                vectors = state(name, site, layer, donor, donor)[tokens]
                with edited(bare(name), site, layer, at(tokens, vectors)):
                    values[n, donor] = difference(bare(name).run(inputs(name, n, n)))
        own = np.nanargmin(np.abs(values - patched[:, None]), axis=1)
        np.testing.assert_allclose(patched, values[ALL, own], atol=1e-4)
        donors.append(own.tolist())
    assert donors[0] == donors[1]
    assert sorted(donors[0]) == [*ALL]


LLAVA = "llava"
SIDE = test_rules.GRID
"""Rows of patches in the model of `support`."""


@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize("second", ["{other}", "{file}"], ids=["other image", "equal images"])
def test_rule_in_one_of_two_images_does_not_affect_the_other(second: str, mode: str) -> None:
    block = TWO.replace("{other}", second).replace("corrupt changed { swap one, two }\n", "")
    rules = [
        f"{verb} resid_post vision layer 0 at {photo} row 2 col * tokens"
        for verb in ("scale",)
        for photo in ("one", "two")
    ]
    text = "".join(experiment(f"e{n}", f"{rule} by -3") for n, rule in enumerate(rules))
    model, tokens = support.bare(LLAVA), [1 + SIDE + col for col in range(SIDE)]
    for image, found in enumerate(run_file(text, LLAVA, mode, block).values()):

        def edit(value: Tensor, image: int = image) -> Tensor:
            value[image, tokens] *= -3
            return value

        values, bases = list[float](), list[float]()
        for n, record in enumerate(RECORDS):
            prompt = "what is {what} in <image> and in the second <image> answer :".format(**record)
            files = [record["file"], record["other" if "other" in second else "file"]]
            given = model.inputs(prompt, [support.folder_of(LLAVA) / str(each) for each in files])
            bases.append(test_rules.difference(LLAVA, model.run(given), n))
            with edited(model, "resid_post", 0, edit):
                values.append(test_rules.difference(LLAVA, model.run(given), n))
        np.testing.assert_allclose(found.measures[0].base[0], bases, atol=1e-4)
        np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)
        assert np.abs(np.array(values) - bases).max() > 0.1


def turned(value: Tensor) -> Tensor:
    value[1:] *= -2
    return value


TURN = "scale resid_post vision layer 0 at photo tokens by -2"


@pytest.mark.parametrize("mode", ["planned", "plain"])
def test_completions_with_encoder_rules_equal_hooks(mode: str) -> None:
    text = experiment("e", "generate 5", TURN, measure='measure matches("1|2|3") as raw')
    found = run_file(text, LLAVA, mode)["e"]
    assert found.replies is not None
    model, differ = support.bare(LLAVA), 0
    for n in range(len(RECORDS)):
        given = test_rules.inputs(LLAVA, n, n)
        plain = model.reply(given, 5)
        with edited(model, "resid_post", 0, turned):
            expected = model.reply(given, 5)
        assert list(found.replies.runs["clean"][n][0].ids) == plain
        assert list(found.replies.cells[0][n][0].ids) == expected
        differ += plain != expected
    assert differ


def tokens_of(number: int) -> list[int]:
    """The two tokens of a long answer."""
    words = support.bare(LLAVA).processor.tokenizer.convert_tokens_to_ids
    return [words(str(RECORDS[number][key])) for key in ("n", "m")]


def log_probability(n: int, image: int, language: Edit | None) -> float:
    """That of the two tokens of a long answer, with an edit of a block of the language model."""
    model, (first, second) = support.bare(LLAVA), tokens_of(n)
    given = followed(test_rules.inputs(LLAVA, n, image), [first])
    logits = model.run(given, blocks={} if language is None else {1: language})
    return float(logits.double().log_softmax(-1)[[-2, -1], [first, second]].sum())


def held(site: str, layer: int, n: int, image: int) -> Tensor:
    """Values of the patches at a site of the encoder."""
    model, found = support.bare(LLAVA), list[Tensor]()

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    with edited(model, site, layer, keep):
        model.run(test_rules.inputs(LLAVA, n, image))
    return found[0]


LONG = {
    TURN: lambda n: ("resid_post", 0, turned),
    "ablate mlp_out vision layer 1 at photo row 1 col 2 token with mean": lambda n: (
        "mlp_out",
        1,
        at([2], torch.stack([held("mlp_out", 1, m, (m + 1) % 4)[2] for m in ALL]).mean(0)),
    ),
    "patch resid_post vision layer 0 at photo row 2 col * tokens": lambda n: (
        "resid_post",
        0,
        at(
            [own := [1 + SIDE + col for col in range(SIDE)]][0],
            held("resid_post", 0, n, n)[own],
        ),
    ),
    "patch z vision layer 1 at photo tokens": lambda n: (
        "z",
        1,
        at(range(1, 1 + SIDE**2), held("z", 1, n, n)[1:]),
    ),
}  # fmt: skip
AT_THE_END = "scale resid_post layer 1 at last token by -1.5"


def scaled_end(value: Tensor) -> Tensor:
    value[-2] *= -1.5  # the final token of the prompt; the first token of the answer follows
    return value


@pytest.mark.parametrize("mode", ["planned", "padded on the right", "small passes"])
def test_answers_of_two_tokens_under_encoder_rules_equal_hooks(mode: str) -> None:
    """Alone, and next to a rule of the language model at the last token."""
    measure = "measure logprob(answer) as delta"
    ends = "from clean into changed"
    text = "".join(
        experiment(f"e{n}{kind}", ends, rule, *more, measure=measure)
        for n, rule in enumerate(LONG)
        for kind, more in (("", ()), ("both", (AT_THE_END,)))
    )
    found = run_file(text, LLAVA, mode, support.BLOCK.replace('" {n}"', '" {n} {m}"'))
    base = [log_probability(n, (n + 1) % 4, None) for n in ALL]
    for number, rule in enumerate(LONG.values()):
        for kind, language in (("", None), ("both", scaled_end)):
            values = list[float]()
            for n in ALL:
                with edited(support.bare(LLAVA), *rule(n)):
                    values.append(log_probability(n, (n + 1) % 4, language))
            own = found[f"e{number}{kind}"].measures[0]
            np.testing.assert_allclose(own.base[0], base, atol=1e-4)
            np.testing.assert_allclose(own.patched[0], values, atol=1e-4)
            assert np.abs(np.array(values) - base).max() > 0.1


def test_patch_from_a_run_with_encoder_rules_equals_hooks() -> None:
    """The language model is patched from a run with a rule in the encoder."""
    text = experiment(
        "e",
        f"run turned {{ {TURN} }}",
        "from turned into clean",
        "patch resid_post layer 1 at photo tokens",
    )
    found = run_file(text, LLAVA)["e"].measures[0]
    model, values = support.bare(LLAVA), list[float]()
    for n in range(len(RECORDS)):
        given, tokens = test_rules.inputs(LLAVA, n, n), test_rules.image_tokens(LLAVA, n)
        with edited(model, "resid_post", 0, turned):
            vectors = model.states(given)["blocks"][1][tokens]
        logits = model.run(given, blocks={1: at(tokens, vectors)})
        values.append(test_rules.difference(LLAVA, logits, n))
    np.testing.assert_allclose(found.patched[0], values, atol=1e-4)
    assert np.abs(np.array(values) - found.base[0]).max() > 0.1


def test_encoder_rule_precedes_a_rule_at_the_embedding() -> None:
    rules = ("ablate embed at photo row 1 col 1 token with zero", TURN)
    found = run_file(experiment("e", *rules), LLAVA)["e"].measures[0]
    model, values = support.bare(LLAVA), list[float]()
    for n in range(len(RECORDS)):
        given = test_rules.inputs(LLAVA, n, n)
        zero = at(test_rules.image_tokens(LLAVA, n)[:1], torch.zeros(()))
        with edited(model, "resid_post", 0, turned):
            values.append(test_rules.difference(LLAVA, model.run(given, embed=zero), n))
    np.testing.assert_allclose(found.patched[0], values, atol=1e-4)


def test_observed_norm_in_the_encoder_equals_hooks() -> None:
    line = "observe norm resid_post vision layer * at photo row 1 col 2 token"
    found = run_file(experiment("e", line, measure=""), LLAVA)["e"].measures[0]
    model = support.bare(LLAVA)
    for layer in range(2):
        seen: list[float] = []

        def keep(value: Tensor, seen: list[float] = seen) -> Tensor:
            seen.append(float(value[2].norm()))
            return value

        for n in range(len(RECORDS)):
            with edited(model, "resid_post", layer, keep):
                model.run(test_rules.inputs(LLAVA, n, n))
        np.testing.assert_allclose(found.patched[layer], seen, rtol=1e-4)


VISION = "ablate resid_post vision layer 0 at photo tokens with zero"
ERRORS = {
    "patch resid_post vision layer 0 at last token": "E0310",
    "ablate resid_post vision layer 2 at photo tokens with zero": "E0302",
    "ablate resid_post vission layer 1 at photo tokens with zero": "E0203",
    "ablate pattern vision layer 0 head 0 at photo tokens with mean": "E0108",
    "patch resid_post vision layer 0 at photo tokens\n  using cdt": "E0608",
    f"{VISION}\n  against random(5, neurons)": "E0630",
    "path z layer 0 head 0 -> logits at last token\n  " + VISION: "E0108",
    "ablate resid_post encoder layer 0 at photo tokens with zero": "E0413",
}


def errors(found: Sequence[Diagnostic]) -> list[str]:
    return [each.code for each in found if each.severity == "error"]


@pytest.mark.parametrize(("line", "code"), ERRORS.items())
def test_invalid_line_reports_the_code_before_anything_runs(line: str, code: str) -> None:
    text = experiment("e", "from clean into changed", line)
    assert errors(try_file(text, LLAVA)[1]) == [code]


DEFINITIONS = {
    "basis b = pca(ask, dims: 2) at resid_post vision layer 0 at last token": "E0310",
    "basis b = pca(ask, dims: 2) at resid_post vision layer 0 at tokens *": "E0310",
    "basis b = fit(sae(features: 8, k: 2), prompts: ask, steps: 5)"
    " at resid_post vision layer 0 at last token": "E0310",
}


@pytest.mark.parametrize(("definition", "code"), DEFINITIONS.items())
def test_basis_reports_tokens_that_the_encoder_lacks(definition: str, code: str) -> None:
    """Their vectors would be zeros."""
    rule = "ablate resid_post layer 0 in basis b at last token with zero"
    text = f"{definition}\n{experiment('e', rule)}"
    assert errors(try_file(text, LLAVA)[1]) == [code]


def test_projector_that_mixes_patches_reports_e0413() -> None:
    own = deepcopy(support.bare(LLAVA))
    mixes = own.model.model.multi_modal_projector
    mixes.register_forward_hook(lambda module, args, output: output.flip(1))
    model, found = adopt_model("m", own.model, own.processor)
    assert model is not None, found
    source = Source(
        f'mech 1\nmodel m = local("handed over")\n{support.BLOCK}\n{experiment("e", VISION)}',
        support.folder_of(LLAVA) / "file.mech",
    )
    assert errors(run_on(source, {"m": model})[1]) == ["E0413"]


RUN = "run w { scale mlp_out vision layer 1 at {} by 2 }"
READS_RUN = "from w into clean\n  patch resid_post layer 0 at {}"
UNREAD = {
    "ablate resid_post vision layer 1 at {} with zero": True,
    "ablate z vision layer 1 heads * at {} with zero": True,
    "path z vision layer 0 head 0 -> mlp_norm vision layer 1 at {}": True,
    f"{RUN}\n  {READS_RUN}": True,
    "ablate resid_post vision layer * at {} with zero": False,
    "ablate resid_post vision layer 0 at {} with zero": False,
    f"{RUN}\n  observe norm resid_post vision layer 1 at {{}}\n  {READS_RUN}": False,
}
"""Lines of an experiment → whether all that they change is after the block that is read."""

UNREAD_FILE = """mech 1

model vlm = local("downloaded")

prompts ask {
  x in ["w1", "w2", "w3"]
  image photo = gray(100)
  template "{photo} w1 {x}"
  answer " w1"
  corrupt changed { x = other(x) }
}

experiment e {
  model vlm
  prompts ask
  LINE
  measure logit(answer) as delta
}
"""


def unread_blocks(line: str) -> list[Diagnostic]:
    """Return the warnings for a model whose last block of the encoder isn't read."""
    name = "llava_class"
    made, _ = adopt_model("vlm", draw(name, vision_feature_layer=-2), bare(name).processor)
    assert made is not None
    text = UNREAD_FILE.replace("LINE", line.replace("{}", "photo tokens"))
    source = Source(text, Path("experiment.mech"))
    found = check_source(source, models={"vlm": context(source, "vlm", made)}).diagnostics
    assert not any(each.severity == "error" for each in found), found
    return [each for each in found if each.code == "W0742"]


@pytest.mark.parametrize(("line", "warned"), UNREAD.items())
def test_rule_after_the_block_that_is_read_gives_a_warning(line: str, warned: bool) -> None:
    if line.startswith("path"):
        line = f"from clean into changed\n  {line}"
    found = unread_blocks(line)
    assert len(found) == warned
    for each in found:
        assert "after block 0, and this rule starts at 1" in each.label_text


def test_unread_blocks_of_a_model_that_is_not_on_the_machine_are_not_reported() -> None:
    text = UNREAD_FILE.replace("LINE", "ablate z vision layer 1 at photo tokens with zero")
    text = text.replace('local("downloaded")', 'hf("mechdsl-tests/none")')
    found = check_source(Source(text, Path("experiment.mech"))).diagnostics
    codes = {each.code for each in found}
    assert "W0710" in codes
    assert "W0742" not in codes


def test_rule_after_the_block_that_is_read_has_no_effect() -> None:
    name = "llava_class"
    made, _ = adopt_model("m", draw(name, vision_feature_layer=-2), bare(name).processor)
    rule = "patch resid_post vision layer * at photo tokens"
    [result] = run_text(name, experiment("e", "from clean into changed", rule), model=made)
    first, last = result.measures[0].patched - result.measures[0].base
    assert (abs(first) > 1e-3).all()
    assert (last == 0).all()
