"""Every rule that edits vectors of encoder-decoders, which read texts, sounds or images, with hooks
on the bare model: one unpadded prompt at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from ..image_prompts import test_encoded_images as images
from ..image_prompts import test_sounds as sounds
from ..image_prompts.support import experiment as of_inputs
from ..quick import some
from ..reference.edits import EDITS, Vectors, write_rules
from .encoder_decoders import (
    HEADS,
    LIKE_T5,
    Change,
    Place,
    Write,
    difference,
    logits,
    model,
    name_of,
    place,
    read,
    run,
    starts,
    text,
    tokenizer,
    written_query,
)
from .support import DIFFERENCE, MODES, ROWS, by_name, experiment, try_file

FAMILIES = ("t5 writing", "bart writing", "mt5", "t5gemma", "marian writing", "mbart", "pegasus")
STACKS = ("resid_post encoder", "attn_out cross", "resid_post", "mlp_out encoder")

Run = Callable[[int, Sequence[Write]], float]
"""The measure of a row under writes."""


def check(
    found: Sequence[Any],
    of: Vectors,
    own: Sequence[Place],
    at: Callable[[int], int],
    run: Run,
) -> None:
    """Compare all edits, and the two rules after them.

    Args:
        found: The results of `lines`.
        of: The vectors of the site and of that of the next layer.
        own: Their modules.
        at: The token of each row.
        run: Runs the bare model.
    """
    base = [run(n, []) for n in range(4)]

    def written(layer: int, n: int, value: Tensor) -> Write:
        return own[layer], [at(n)], lambda _: value

    changes: list[Callable[[int], list[Write]]] = [
        lambda n, change=change: [written(0, n, change(of, n, of(n, False, 0)))]
        for change in EDITS.values()
    ]
    changes.append(lambda n: [written(0, n, 0 * of(n, False, 0)), written(1, n, of(n, False, 1))])
    changes.append(lambda n: [written(0, n, of(n, True, 0))])
    for each, change in zip(found, changes, strict=True):
        expected, measure = [run(n, change(n)) for n in range(4)], each.measures[0]
        np.testing.assert_allclose(measure.base[0], base, atol=2e-4)
        np.testing.assert_allclose(
            measure.patched[0], expected, atol=3e-4, rtol=1e-4, err_msg=each.name
        )
        if each is not found[-2]:  # a frozen stream of a decoder's only token hides the change
            assert np.abs(np.array(expected) - base).max() > 0.1, each.name


def lines(component: str, position: str, block: str, other: str) -> tuple[str, list[list[str]]]:
    """The direction, and the lines of experiments; patched runs are equal under `OTHER` lines."""
    site, following = f"{component} layer 0", f"{component} layer 1"
    rules = [[rule] for rule in write_rules(site, following, position, other)]
    frozen = f"ablate {site} at {position} with zero", f"freeze {following} at {position}"
    rules += [[*frozen], [f"set {site} at {position} to value({site} at {position}) of {other}"]]
    return f"direction d = mean({block}) at {site} at {position}\n", rules


@pytest.mark.parametrize("component", some(STACKS, STACKS[:2]))
@pytest.mark.parametrize("family", some(FAMILIES, ("t5 writing", "bart writing")))
def test_every_edit_of_a_text_encoder_decoder_equals_hooks(
    family: str, component: str, tmp_path: Path
) -> None:
    encodes = "encoder" in component
    position = "subject token" if encodes else "last token"
    declared, rules = lines(component, position, "p", "other")
    texts = "".join(experiment(f"e{n}", "prompts p", *r, DIFFERENCE) for n, r in enumerate(rules))
    ran = try_file(declared + texts, tmp_path, model(family), tokenizer=tokenizer())
    own = [place(family, component, layer) for layer in (0, 1)]

    def at(n: int, name: str = "clean") -> int:
        return text(ROWS[n], name).subject[-1] if encodes else len(starts(family)) - 1

    def of(n: int, other: bool, layer: int) -> Tensor:
        name = "other" if other else "clean"
        return read(family, text(ROWS[n], name), own[layer])[[at(n, name)]]

    def run(n: int, writes: Sequence[Write]) -> float:
        return difference(logits(family, text(ROWS[n]), writes), ROWS[n])

    check([*by_name(*ran).values()], of, own, at, run)


@pytest.mark.parametrize("component", some(STACKS, STACKS[:2]))
@pytest.mark.parametrize("name", some(("multilingual", "vit", "beit"), ("multilingual", "vit")))
def test_every_edit_of_an_encoder_of_sounds_or_images_equals_hooks(
    name: str, component: str
) -> None:
    if (name, component) == ("beit", "mlp_out encoder"):
        pytest.skip("BEiT scales the output of this module before it is added to the stream")
    is_sound, encodes = name == "multilingual", "encoder" in component
    source: Any = sounds if is_sound else images
    position = "last token"
    if encodes:
        position = "a frame 3 token" if is_sound else "photo row 1 col 2 token"
    declared, rules = lines(component, position, "ask", "changed")
    texts = "".join(of_inputs(f"e{n}", *rule) for n, rule in enumerate(rules))
    own = [source.place(component, layer) for layer in (0, 1)]
    last = len(sounds.STARTS[name]) - 1 if is_sound else 0
    encoded = 2 if is_sound else images.patch(name, 1, 2)
    token = encoded if encodes else last

    def of(n: int, other: bool, layer: int) -> Tensor:
        found: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            found.append(value.clone())
            return value

        source.outputs(name, source.other(n) if other else n, [(own[layer], [token], keep)])
        return found[0]

    def run(n: int, writes: Sequence[Write]) -> float:
        return source.difference(name, n, n, writes)

    check(source.run_text(declared + texts, name), of, own, lambda _: token, run)


def inside(family: str, stack: str) -> Place:
    """The input of the last map of an MLP of layer 0."""
    own = place(family, f"mlp_out {stack}".strip(), 0).path
    if name_of(family) == "t5gemma":
        return Place(own.rpartition(".")[0] + ".mlp.down_proj", of_input=True)
    return Place(f"{own}.wo" if name_of(family) in LIKE_T5 else own, of_input=True)


def of_numbers(numbers: slice, factor: float) -> Change:
    def change(old: Tensor) -> Tensor:
        new = old.clone()
        new[:, numbers] *= factor
        return new

    return change


def stepped(own: Place, tokens: Sequence[int]) -> Write:
    """Twice the difference from the preceding token is added at each token."""
    every = list(range(max(tokens) + 1))

    def change(old: Tensor) -> Tensor:
        new = old.clone()
        for at in tokens:
            if at:
                new[at] = old[at] + 2 * (old[at] - old[at - 1])
        return new

    return own, every, change


NEURONS_AND_STEPS: dict[str, Callable[[str, Any], Sequence[Write]]] = {
    "ablate mlp_hidden layer 0 neurons 3..9 at last token with zero": lambda family, row: [
        (inside(family, ""), [len(starts(family)) - 1], of_numbers(slice(3, 10), 0))
    ],
    "scale mlp_hidden encoder layer 0 neurons 3..9 at item tokens by -2": lambda family, row: [
        (inside(family, "encoder"), text(row).items, of_numbers(slice(3, 10), -2))
    ],
    "add 2 * step(mlp_out) to mlp_out encoder layer 0 at item tokens": lambda family, row: [
        stepped(place(family, "mlp_out encoder", 0), text(row).items)
    ],
    "add 2 * step(resid_post) to resid_post encoder layer 0 at tokens *": lambda family, row: [
        stepped(place(family, "resid_post encoder", 0), range(len(text(row).ids)))
    ],
    "add 2 * step(v) to v cross layer 0 head 1 at item tokens": lambda family, row: [
        stepped(place(family, "v cross", 0, 1), text(row).items)
    ],
    "add 2 * step(k) to k encoder layer 0 heads * at tokens *": lambda family, row: [
        stepped(place(family, "k encoder", 0, head), range(len(text(row).ids)))
        for head in range(HEADS)
    ],
}


@pytest.mark.parametrize("mode", some([*MODES], ["planned"]))
@pytest.mark.parametrize("family", some(FAMILIES, ("t5 writing", "bart writing")))
def test_neurons_and_steps_of_a_text_encoder_decoder_equal_hooks(
    family: str, mode: str, tmp_path: Path
) -> None:
    lines = "".join(
        experiment(f"e{n}", "prompts p", rule, DIFFERENCE)
        for n, rule in enumerate(NEURONS_AND_STEPS)
    )
    patch = "patch mlp_hidden encoder layer 0 neuron 2..5 at last token"
    lines += experiment("patch", "prompts p", "from other into clean", patch, DIFFERENCE)
    *found, patched = run(family, lines, tmp_path, MODES[mode]).values()
    for each, (rule, writes) in zip(found, NEURONS_AND_STEPS.items(), strict=True):
        expected = [difference(logits(family, text(row), writes(family, row)), row) for row in ROWS]
        measure = each.measures[0]
        np.testing.assert_allclose(measure.patched[0], expected, atol=3e-4, err_msg=rule)
        assert np.abs(measure.patched[0] - measure.base[0]).max() > 0.1, rule
    own = inside(family, "encoder")
    source = [read(family, text(row, "other"), own)[text(row, "other").last] for row in ROWS]
    for neuron, values in enumerate(patched.measures[0].patched, 2):
        for row, vector, value in zip(ROWS, source, values, strict=True):

            def change(old: Tensor, vector: Tensor = vector, neuron: int = neuron) -> Tensor:
                new = old.clone()
                new[:, neuron] = vector[neuron]
                return new

            writes = [(own, [text(row).last], change)]
            np.testing.assert_allclose(
                value, difference(logits(family, text(row), writes), row), atol=3e-4
            )


OVER_KEYS: dict[str, Change] = {
    "ablate SITE layer 1 head 0 at last token with zero": lambda old: 0 * old,
    "set SITE layer 1 head 0 at last token to 0.5": lambda old: torch.full_like(old, 0.5),
    "scale SITE layer 1 head 0 at last token by -1.5": lambda old: -1.5 * old,
}
KEY_SITES = ("scores encoder", "pattern encoder", "scores cross", "pattern cross")


@pytest.mark.parametrize("mode", some([*MODES], ["planned"]))
@pytest.mark.parametrize("family", some(FAMILIES, ("t5 writing", "bart writing")))
def test_written_scores_and_patterns_equal_explicit_attention(
    family: str, mode: str, tmp_path: Path
) -> None:
    rules = {
        (site, rule.replace("SITE", site)): change
        for site in KEY_SITES
        for rule, change in OVER_KEYS.items()
    }
    lines = "".join(
        experiment(f"e{n}", "prompts p", rule, DIFFERENCE) for n, (_, rule) in enumerate(rules)
    )
    found, large = run(family, lines, tmp_path, MODES[mode]).values(), 0
    for each, ((site, rule), change) in zip(found, rules.items(), strict=True):
        component, stack = site.split()
        expected = list[float]()
        for row in ROWS:
            query = text(row).last if stack == "encoder" else len(starts(family)) - 1
            with written_query(family, component, stack, 1, 0, query, change):
                expected.append(difference(logits(family, text(row)), row))
        measure = each.measures[0]
        np.testing.assert_allclose(measure.patched[0], expected, atol=3e-4, err_msg=rule)
        large += np.abs(measure.patched[0] - measure.base[0]).max() > 0.01
    assert large > 0.8 * len(rules)


Turned = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Changes the queries and the keys of a layer, both [head, token, width], after rotary."""


@contextmanager
def turned(family: str, layer: int, edit: Turned) -> Generator[None]:
    """Change the rotated queries and keys of a layer of the encoder: those of its projections in
    T5, which has no rotary, and otherwise those that the library's rotation returns."""
    own = place(family, "q encoder", layer).path.rpartition(".")[0]
    attention = model(family).get_submodule(own)
    with ExitStack() as stack:
        if name_of(family) != "t5gemma":
            names = place(family, "q encoder", 0), place(family, "k encoder", 0)
            q, k = (attention.get_submodule(each.path.rpartition(".")[2]) for each in names)

            def heads(value: Tensor) -> Tensor:
                return value[0].unflatten(-1, (HEADS, -1)).transpose(0, 1).clone()

            def of_query(_: Any, args: Any, output: Tensor) -> Tensor:
                return edit(heads(output), heads(output))[0].transpose(0, 1).flatten(1)[None]

            def of_key(_: Any, args: Any, output: Tensor) -> Tensor:
                return edit(heads(output), heads(output))[1].transpose(0, 1).flatten(1)[None]

            stack.callback(q.register_forward_hook(of_query).remove)
            stack.callback(k.register_forward_hook(of_key).remove)
            yield
            return
        module: Any = sys.modules[type(attention).__module__]
        plain, is_open = module.apply_rotary_pos_emb, [False]

        def rotate(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            query, key = plain(*args, **kwargs)
            if not is_open[0]:
                return query, key
            query, key = edit(query[0].clone(), key[0].clone())
            return query[None], key[None]

        def switch(value: bool) -> Callable[..., None]:
            return lambda *_: is_open.__setitem__(0, value)

        stack.callback(attention.register_forward_pre_hook(switch(True)).remove)
        stack.callback(attention.register_forward_hook(switch(False)).remove)
        stack.enter_context(patch.object(module, "apply_rotary_pos_emb", rotate))
        yield


def rotated(family: str, row: Any, layer: int, name: str = "clean") -> list[Tensor]:
    """The queries and keys of an unpatched run."""
    found: list[list[Tensor]] = [[], []]

    def keep(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        found[0].append(query)
        found[1].append(key)
        return query, key

    with turned(family, layer, keep):
        logits(family, text(row, name))
    return [found[0][0], found[1][-1]]


def of_one(index: int, head: int | slice, at: Sequence[int], change: Change) -> Turned:
    def edit(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        value = (query, key)[index]
        value[head, list(at)] = change(value[head, list(at)])
        return query, key

    return edit


def rotary_rules(family: str, index: int) -> dict[str, Callable[[Any], tuple[int, Turned]]]:
    """Rules on rotated queries or keys, each with its layer and its change of a row."""
    site, every = f"{'qk'[index]}_rot encoder", slice(None)

    def patched(row: Any) -> tuple[int, Turned]:
        at = text(row, "other").subject[-1]
        new = rotated(family, row, 1, "other")[index][:, [at]]
        return 1, of_one(index, every, text(row).subject[-1:], lambda _: new)

    def copied(row: Any) -> tuple[int, Turned]:
        new = rotated(family, row, 1)[index][1, [text(row).last]]
        return 1, of_one(index, 0, [text(row).last], lambda _: new)

    return {
        f"ablate {site} layer 1 heads * at item tokens with zero": lambda row: (
            1,
            of_one(index, every, text(row).items, lambda old: 0 * old),
        ),
        f"scale {site} layer 0 head 1 at last token by -9": lambda row: (
            0,
            of_one(index, 1, [text(row).last], lambda old: -9 * old),
        ),
        f"patch {site} layer 1 heads * at subject token": patched,
        f"set {site} layer 1 head 0 at last token to value({site} layer 1 head 1)": copied,
    }


@pytest.mark.parametrize("mode", some([*MODES], ["planned"]))
@pytest.mark.parametrize("family", some(("t5gemma", "t5 writing", "mbart"), ("t5gemma",)))
def test_rotated_queries_and_keys_of_encoders_equal_hooks(
    family: str, mode: str, tmp_path: Path
) -> None:
    ends, rules = "from other into clean", rotary_rules(family, 0) | rotary_rules(family, 1)
    lines = "".join(
        experiment(f"e{n}", "prompts p", *([ends] if "patch" in rule else []), rule, DIFFERENCE)
        for n, rule in enumerate(rules)
    )
    seen = "observe norm q_rot encoder layer 1 head * at last token"
    lines += experiment("n", "prompts p", seen)
    *found, norms = run(family, lines, tmp_path, MODES[mode]).values()
    large = 0
    for each, (rule, change) in zip(found, rules.items(), strict=True):
        expected = list[float]()
        for row in ROWS:
            layer, edit = change(row)
            with turned(family, layer, edit):
                expected.append(difference(logits(family, text(row)), row))
        measure = each.measures[0]
        np.testing.assert_allclose(measure.patched[0], expected, atol=3e-4, err_msg=rule)
        large += np.abs(measure.patched[0] - measure.base[0]).max() > 0.1
    assert large > 0.7 * len(rules)
    lengths = [rotated(family, row, 1)[0][:, text(row).last].norm(dim=-1).tolist() for row in ROWS]
    np.testing.assert_allclose(norms.measures[0].patched, np.transpose(lengths), rtol=1e-4)


WITHOUT_RULES = {
    "scale mlp_hidden cross layer 0 neuron 3 at last token by 2": "E0413",
    "scale q_rot cross layer 0 head 0 at last token by 2": "E0413",
    "add value(q_rot cross layer 0 head 0) to q_rot cross layer 0 head 0 at last token": "E0413",
    "add 2 * step(embed) to embed encoder at item tokens": "E0341",
    "scale scores encoder layer 0 head 1 dims 1..4 at last token by -4": "E0342",
    "allow attention encoder layer 0 from first token to last token": "E0332",
}


@pytest.mark.parametrize(("line", "code"), WITHOUT_RULES.items())
def test_rule_that_no_encoder_decoder_has_reports_the_code(
    line: str, code: str, tmp_path: Path
) -> None:
    lines = experiment("e", "prompts p", line, DIFFERENCE)
    _, found = try_file(lines, tmp_path, model("t5"), tokenizer=tokenizer())
    assert [each.code for each in found if each.severity == "error"] == [code]
