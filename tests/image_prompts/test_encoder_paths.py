"""`path` in vision encoders of prompts, against plain hooks on the encoder of the bare model, which
hold the outputs of heads and MLPs of all of its tokens: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from ..quick import some
from . import test_vision_encoder as plain
from .reference import Edit, at, edited_module, one_head, record_value
from .support import experiment
from .test_encoder_attention import attended, between, blocked
from .test_families import ALL, TWO, bare, both, difference, inputs, run_text
from .test_token_patches import HEADS, TOWERS, WIDTH, Tower, other, shifted

FRONTS = {name: Tower(front=count) for name, count in plain.CLASS_TOKENS.items()}
NAMES = (
    "llava_class",
    "paligemma",
    "llava_next",
    "gemma3",
    "internvl",
    "smolvlm",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "idefics2_wide",
)
QUICK = ("paligemma", "qwen2_5_vl")
MODES = some(["planned", "padded on the right", "small passes"], ["planned"])
SIZE = WIDTH // HEADS


def tower(name: str) -> Tower:
    return FRONTS.get(name) or TOWERS[name]


@dataclass(frozen=True)
class Place:
    """A site of a layer; with a head, its vector."""

    site: str
    layer: int
    head: int | None = None

    def of_head(self, edit: Edit) -> Edit:
        return edit if self.head is None else one_head(edit, self.head, SIZE)

    def own(self, value: Tensor) -> Tensor:
        """The vectors of the head, or all of them."""
        return value if self.head is None else value[:, self.head * SIZE : (self.head + 1) * SIZE]


def find_module(name: str, place: Place) -> tuple[str, bool]:
    """The module of a site in the encoder, and whether the site is its input."""
    own, site = tower(name), place.site
    part, is_input = {
        "resid_pre": ("", True),
        "attn_norm": (own.attention, True),
        "z": (own.z, True),
        "attn_out": (own.attention, False),
        "mlp_norm": (own.mlp, True),
        "mlp_out": (own.mlp, False),
    }.get(site, (f"{own.attention}.{site}_proj", False))
    if name == "internvl" and site in ("q", "k"):
        part = f"{own.attention}.{site}_norm"
    return f"{own.blocks}.{place.layer}.{part}".rstrip("."), is_input


@contextmanager
def edited(name: str, place: Place, edit: Edit, model: Any = None) -> Generator[None]:
    """Change a site of the encoder, [token, width] of all tiles or images.

    model: One with other derivatives.
    """
    path, is_input = find_module(name, place)
    module = (bare(name).model if model is None else model).get_submodule(path)
    with edited_module(module, lambda value: edit(value.flatten(0, -2)), is_input=is_input):
        yield


def state(name: str, place: Place, run: Callable[[], object], model: Any = None) -> Tensor:
    return record_value(partial(edited, name, Place(place.site, place.layer), model=model), run)


@cache
def seen(name: str, place: Place, n: int, image: int) -> Tensor:
    return state(name, place, partial(bare(name).run, inputs(name, n, image)))


@dataclass(frozen=True)
class Path:
    sender: Place
    receiver: Place
    through_mlps: bool = False


def keep(value: Tensor) -> Edit:
    return lambda _: value.clone()


def received(
    name: str,
    path: Path,
    run: Callable[[], object],
    read: Callable[[Place], Tensor],
    sent: tuple[Sequence[int], Tensor],
    model: Any = None,
) -> Tensor:
    """What the receiver reads with the sender's vectors written and all else held, [token, width].

    read: The values of the base run. sent: The tokens and the vectors of the sender. model: One
    with other derivatives.
    """
    sender, sites = path.sender, ("z",) if path.through_mlps else ("z", "mlp_out")
    edits = {
        Place(site, layer): keep(read(Place(site, layer))) for site in sites for layer in (0, 1)
    }
    own, write = Place(sender.site, sender.layer), sender.of_head(at(*sent))
    held = edits.pop(own, None)
    with ExitStack() as stack:
        for place, edit in edits.items():
            stack.enter_context(edited(name, place, edit, model))
        edit = write if held is None else (lambda value: write(held(value)))
        stack.enter_context(edited(name, own, edit, model))
        return path.receiver.own(state(name, path.receiver, run, model))


def changed(name: str, path: Path, n: int) -> float:
    """The difference of logits of a prompt with its other image and with the changed receiver."""
    own, base, model = tower(name), other(n), bare(name)
    here, run = own.cell(base, 1, 2), partial(model.run, inputs(name, n, base))
    sent = here, path.sender.own(seen(name, path.sender, n, n))[own.cell(n, 1, 2)]
    found = received(name, path, run, lambda place: seen(name, place, n, base), sent)
    with edited(name, path.receiver, path.receiver.of_head(at(here, found[here]))):
        return difference(run())


def heads(site: str, layer: int) -> list[Place]:
    return [Place(site, layer, head) for head in range(HEADS)]


CASES: dict[str, list[Path]] = {
    "z vision layer 0 head * -> attn_norm vision layer 1": [
        Path(sender, Place("attn_norm", 1)) for sender in heads("z", 0)
    ],
    "mlp_out vision layer 0 -> mlp_norm vision layer 1": [
        Path(Place("mlp_out", 0), Place("mlp_norm", 1))
    ],
    "attn_out vision layer 0 -> mlp_norm vision layer 0": [
        Path(Place("attn_out", 0), Place("mlp_norm", 0))
    ],
    "resid_pre vision layer 0 -> resid_pre vision layer 1": [
        Path(Place("resid_pre", 0), Place("resid_pre", 1))
    ],
    "attn_out vision layer 0 -> attn_norm vision layer 1 ... through mlps": [
        Path(Place("attn_out", 0), Place("attn_norm", 1), through_mlps=True)
    ],
}
OF_HEADS: dict[str, list[Path]] = {
    "z vision layer 0 head 1 -> q vision layer 1 head *": [
        Path(Place("z", 0, 1), to) for to in heads("q", 1)
    ],
    "mlp_out vision layer 0 -> v vision layer 1 head *": [
        Path(Place("mlp_out", 0), to) for to in heads("v", 1)
    ],
    "resid_pre vision layer 0 -> k vision layer 1 head *": [
        Path(Place("resid_pre", 0), to) for to in heads("k", 1)
    ],
}
"""In encoders with a module for each of queries, keys and values."""
CELL = "photo row 1 col 2 token"


def line_of(case: str) -> str:
    ends, _, through = case.partition(" ... ")
    return f"path {ends} at {CELL} {through}".strip()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_paths_in_the_encoder_equal_hooks(name: str, mode: str) -> None:
    cases = CASES if name.startswith("qwen") else CASES | OF_HEADS
    text = "".join(
        experiment(f"e{n}", "from clean into changed", line_of(case))
        for n, case in enumerate(cases)
    )
    largest = 0.0
    for found, (case, paths) in zip(run_text(name, text, mode), cases.items(), strict=True):
        measure = found.measures[0]
        expected = [[changed(name, path, n) for n in ALL] for path in paths]
        np.testing.assert_allclose(measure.patched, expected, atol=2e-4, err_msg=case)
        base = [difference(bare(name).run(inputs(name, n, other(n)))) for n in ALL]
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        effect = np.abs(measure.patched - measure.base).max()
        assert effect > 1e-3, case
        largest = max(largest, effect)
    assert largest > 0.1


def multiplied(patches: Sequence[int]) -> Edit:
    def edit(value: Tensor) -> Tensor:
        value[list(patches)] *= -3
        return value

    return edit


@pytest.mark.parametrize("name", some(("llava_next", "gemma3", "qwen2_5_vl"), ["qwen2_5_vl"]))
def test_path_with_another_rule_in_the_encoder_equals_hooks(name: str) -> None:
    """All else is held at the base run with the other rule."""
    line = f"path z vision layer 0 head 1 -> mlp_norm vision layer 1 at {CELL}"
    rule = "scale mlp_out vision layer 0 at photo row 2 col 1 token by -3"
    [found] = run_text(name, experiment("e", "from clean into changed", line, rule))
    path, own, model = Path(Place("z", 0, 1), Place("mlp_norm", 1)), tower(name), bare(name)
    values = list[float]()
    for n in ALL:
        base, given = other(n), inputs(name, n, other(n))
        here, scale = own.cell(base, 1, 2), multiplied(own.cell(base, 2, 1))

        def run(given: dict[str, Tensor] = given, scale: Edit = scale) -> Tensor:
            with edited(name, Place("mlp_out", 0), scale):
                return model.run(given)

        def read(place: Place, run: Callable[[], Tensor] = run, scale: Edit = scale) -> Tensor:
            found = list[Tensor]()

            def keep_last(value: Tensor) -> Tensor:
                found.append(value.clone())
                return value

            # Its hook comes first, before the edit of `run`, so the edit is repeated.
            with edited(name, place, keep_last):
                run()
            is_edited = (place.site, place.layer) == ("mlp_out", 0)
            return scale(found[0].clone()) if is_edited else found[0]

        sent = here, path.sender.own(seen(name, path.sender, n, n))[own.cell(n, 1, 2)]
        plain_run = partial(model.run, given)
        got = received(name, path, plain_run, read, sent)
        with edited(name, path.receiver, at(here, got[here])):
            values.append(difference(run()))
    measure = found.measures[0]
    np.testing.assert_allclose(measure.patched[0], values, atol=2e-4)
    base_run = [difference(bare(name).run(inputs(name, n, other(n)))) for n in ALL]
    assert np.abs(np.array(values) - base_run).max() > 0.1


@pytest.mark.parametrize("name", some(("gemma3", "paligemma", "smolvlm"), ["paligemma"]))
def test_path_with_blocked_attention_in_the_encoder_equals_hooks(name: str) -> None:
    """All else is held at the base run with the blocked attention."""
    line = f"path z vision layer 0 head 1 -> mlp_norm vision layer 1 at {CELL}"
    rule = "block attention vision layer 1 heads * from photo tokens to photo row 2 col 1 token"
    [found] = run_text(name, experiment("e", "from clean into changed", line, rule))
    path, own, model = Path(Place("z", 0, 1), Place("mlp_norm", 1)), tower(name), bare(name)
    module, values = model.model.get_submodule(f"{own.blocks}.1.{own.attention}"), list[float]()
    for n in ALL:
        base, given = other(n), inputs(name, n, other(n))
        here = own.cell(base, 1, 2)
        change = between(own.every(base), own.cell(base, 2, 1), blocked)
        with attended(module, change, again=True):
            run = partial(model.run, given)
            states = {
                Place(site, layer): state(name, Place(site, layer), run)
                for site in ("z", "mlp_out")
                for layer in (0, 1)
            }
            sent = here, path.sender.own(seen(name, path.sender, n, n))[own.cell(n, 1, 2)]
            got = received(name, path, run, states.__getitem__, sent)
            with edited(name, path.receiver, at(here, got[here])):
                values.append(difference(run()))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=2e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.1


def doubled_at_the_end(value: Tensor) -> Tensor:
    value[-1] *= 2
    return value


LINE = f"path z vision layer 0 head 1 -> attn_norm vision layer 1 at {CELL}"


@pytest.mark.parametrize("name", some(("llava_next", "gemma3", "qwen3_vl"), ["gemma3"]))
def test_path_in_the_second_of_two_images_equals_hooks(name: str) -> None:
    """Next to a rule of the language model."""
    block = TWO.replace('" w1 w2"', '" w1"').replace('" w2 w2"', '" w2"')
    line = LINE.replace("photo", "two")
    text = experiment(
        "e", "from changed into clean", line, "scale resid_post layer 0 at last token by 2"
    )
    [found] = run_text(name, text.replace("prompts ask", "prompts both"), block=block)
    path, own, values = Path(Place("z", 0, 1), Place("attn_norm", 1)), tower(name), list[float]()
    for n in ALL:
        run = partial(bare(name).run, both(name, n))
        of_z = state(name, path.sender, partial(bare(name).run, both(name, n, swapped=True)))
        # The images are `n` and its successor; in the other run, they are exchanged.
        here = [shifted(name, n, n) + patch for patch in own.cell(other(n), 1, 2)]
        there = [shifted(name, n, other(n)) + patch for patch in own.cell(n, 1, 2)]
        sent = here, path.sender.own(of_z)[there]
        given = received(name, path, run, lambda place, run=run: state(name, place, run), sent)
        with edited(name, path.receiver, at(here, given[here])):
            logits = bare(name).run(both(name, n), blocks={0: doubled_at_the_end})
            values.append(difference(logits))
    measure = found.measures[0]
    np.testing.assert_allclose(measure.patched[0], values, atol=2e-4)
    assert np.abs(measure.patched - measure.base).max() > 0.05


REJECTED = {
    f"path z vision layer 0 head 0 -> logits at {CELL}": (
        "E0335",
        "a path stays within the vision encoder or within the language model",
    ),
    f"path embed -> q vision layer 1 head 0 at {CELL}": ("E03", ""),
    f"path z vision layer 1 head 0 -> q vision layer 1 head 0 at {CELL}": (
        "E0335",
        "every receiver reads before or at the site that the sender writes",
    ),
    f"path q vision layer 0 head 0 -> q vision layer 1 head 0 at {CELL}": (
        "E0334",
        "`z vision`",
    ),
    f"{LINE} with frozen norms": ("E0108", "a path with frozen norms in the vision encoder"),
    f"generate 3\n  {LINE}": ("E0108", "`path` together with `generate`"),
    f"path z layer 0 head 0 -> q layer 1 head 0 at {CELL}\n"
    "  scale z vision layer 0 at photo tokens by 2": (
        "E0108",
        "a `path` of the language model together with sites in the vision encoder",
    ),
    f"{LINE}\n  replace block vision layer 0 with identity": ("E0414", "z vision"),
}


@pytest.mark.parametrize(("line", "expected"), REJECTED.items())
def test_invalid_path_in_the_encoder_reports_the_code(line: str, expected: tuple[str, str]) -> None:
    with pytest.raises(AssertionError) as problem:
        run_text("qwen2_5_vl", experiment("e", "from clean into changed", line))
    assert f"error[{expected[0]}" in str(problem.value)
    assert expected[1] in str(problem.value)
