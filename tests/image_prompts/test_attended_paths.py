"""Paths in Llama 3.2 Vision, against plain hooks that hold heads and MLPs of the bare model at the
values of the base run: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ..quick import some
from .support import BLOCK, RECORDS, experiment
from .test_attended_blocks import tower
from .test_attended_encoder import LOCAL, column
from .test_attended_encoder import WIDTH as TOWER_WIDTH
from .test_attended_images import (
    CROSS,
    IMAGE,
    LAYERS,
    WIDTH,
    Hook,
    bare,
    block_at,
    folder,
    hooked,
    other,
    processor,
    run_text,
    token,
    try_text,
)

ALL = range(len(RECORDS))
MARKED = BLOCK.replace("{photo} how many", "{photo} how {mark} many").replace(
    "corrupt changed { file = other }",
    'mark = if n < 3 then "red" else "blue"\n'
    '  corrupt changed {\n file = other\n mark = if n < 3 then "green" else "circle"\n }',
)
"""The two runs differ in the image and in a word of the text."""


def given(n: int, changed: bool) -> dict[str, Any]:
    words = ("green", "circle") if changed else ("red", "blue")
    text = f"{IMAGE} how {words[n >= 2]} many {RECORDS[n]['what']} are there ? answer :"
    picture = Image.open(folder() / f"{other(n) if changed else n}.png").convert("RGB")
    read: Any = processor()
    return dict(read(text=[text], images=[[picture]], return_tensors="pt"))


def run(n: int, changed: bool, hooks: Sequence[Hook] = ()) -> float:
    with torch.no_grad(), hooked(hooks):
        logits = bare()(**given(n, changed), use_cache=False).logits[0, -1]
    answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
    return float(logits[answer] - logits[wrong])


Place = tuple[str, bool]
"""The path of a module, and whether the site is its input."""


def recorded(n: int, changed: bool, places: Sequence[Place], hooks: Sequence[Hook] = ()) -> Any:
    """Place → its value in a run, after the hooks."""
    found: dict[Place, Tensor] = {}

    def keep(place: Place) -> Callable[[Tensor], Tensor]:
        def change(value: Tensor) -> Tensor:
            found[place] = value.clone()
            return value

        return change

    run(n, changed, [*hooks, *((*place, keep(place)) for place in places)])
    return found


def attention(layer: int) -> str:
    return f"{block_at(layer)}.{'cross_attn' if layer in CROSS else 'self_attn'}"


HEADS_OF_TEXT: list[Place] = [(f"{attention(layer)}.o_proj", True) for layer in range(LAYERS)]
MLPS_OF_TEXT: list[Place] = [(f"{block_at(layer)}.mlp", False) for layer in range(LAYERS)]
HEADS_OF_TOWER: list[Place] = [
    (f"{tower(layer)}.self_attn.o_proj", True) for layer in range(LOCAL + 1)
]
MLPS_OF_TOWER: list[Place] = [(f"{tower(layer)}.mlp", False) for layer in range(LOCAL + 1)]


def part(place: Place, columns: slice, tokens: Sequence[int], value: Tensor) -> Hook:
    """Replace some columns of some tokens by those of another tensor."""

    def change(now: Tensor) -> Tensor:
        now = now.clone()
        for at in tokens:
            now[0, at, columns] = value[0, at, columns]
        return now

    return (*place, change)


def held(place: Place, value: Tensor) -> Hook:
    return (*place, lambda _: value)


def frozen(n: int) -> list[Hook]:
    """Norms of the text with the divisors of the base run."""
    paths = [f"{block_at(layer)}.{name}" for layer in range(LAYERS) for name in NORMS]
    paths += [f"{attention(layer)}.q_norm" for layer in CROSS]
    paths.append("model.language_model.norm")
    before = recorded(n, True, [(path, True) for path in paths])
    changes: list[Hook] = []
    for path in paths:
        module, base = bare().get_submodule(path), before[path, True]
        scale = (base.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
        seen: list[Tensor] = []

        def keep(value: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen[:] = [value]
            return value

        def norm(
            _: Tensor, seen: list[Tensor] = seen, weight: Any = module.weight, by: Any = scale
        ) -> Tensor:
            return weight * seen[0] * by

        changes += [(path, True, keep), (path, False, norm)]
    return changes


NORMS = ("input_layernorm", "post_attention_layernorm")


class Path:
    """A path from columns of one place to columns of others."""

    def __init__(
        self,
        sender: Place,
        head: int | None,
        receivers: Mapping[Place, int | None] | None,
        *,
        vision: bool = False,
        mlps: bool = True,
        norms: bool = False,
    ) -> None:
        """receivers: None for the logits. mlps: whether MLPs are held. norms: likewise norms."""
        self.sender, self.head, self.receivers = sender, head, receivers
        self.vision, self.mlps, self.norms = vision, mlps, norms

    def columns(self, head: int | None) -> slice:
        width = TOWER_WIDTH if self.vision else WIDTH
        return slice(None) if head is None else slice(head * width, (head + 1) * width)

    def value(self, n: int) -> float:
        return run(n, True, self.sent(n) if self.receivers is None else self.all_received(n))

    def all_received(self, n: int) -> list[Hook]:
        """The receivers of the pass in which all else is held."""
        ends = self.receivers or {}
        read = recorded(n, True, [*ends], self.sent(n))
        at = self.token(n)
        return [self.received(place, head, at, read[place]) for place, head in ends.items()]

    def sent(self, n: int) -> list[Hook]:
        """The sender's vector, with all else held."""
        heads, mlps = (
            (HEADS_OF_TOWER, MLPS_OF_TOWER)
            if self.vision
            else (
                HEADS_OF_TEXT,
                MLPS_OF_TEXT,
            )
        )
        sublayers = [*heads, *(mlps if self.mlps else ())]
        source = recorded(n, False, [self.sender])[self.sender]
        base = recorded(n, True, [*sublayers, self.sender])
        at = self.token(n)
        hooks = [held(place, base[place]) for place in sublayers]
        hooks.append(part(self.sender, self.columns(self.head), [at], self.placed(n, source)))
        return [*hooks, *(frozen(n) if self.norms else [])]

    def token(self, n: int) -> int:
        return column(other(n), 1, 2) if self.vision else -1

    def placed(self, n: int, source: Tensor) -> Tensor:
        """The source's vector, at the token of the base run."""
        if not self.vision:
            return source
        assert column(n, 1, 2) == column(other(n), 1, 2)
        return source

    def received(self, place: Place, head: int | None, at: int, value: Tensor) -> Hook:
        if place[0].endswith("q_norm"):  # [1, head, token, width]

            def change(now: Tensor) -> Tensor:
                now = now.clone()
                heads = slice(None) if head is None else head
                now[0, heads, at] = value[0, heads, at]
                return now

            return (*place, change)
        return part(place, self.columns(head), [at], value)


def z(layer: int) -> Place:
    return HEADS_OF_TEXT[layer]


def q(layer: int) -> Place:
    if layer in CROSS:
        return f"{attention(layer)}.q_norm", False
    return f"{attention(layer)}.q_proj", False


def mlp(layer: int) -> Place:
    return MLPS_OF_TEXT[layer]


def mlp_input(layer: int) -> Place:
    return f"{block_at(layer)}.mlp", True


PATHS: dict[str, list[Path]] = {
    "path z layer 0 head * -> q layer 2 heads * at last token": [
        Path(z(0), head, {q(2): None}) for head in range(4)
    ],
    "path z layer 0 heads * -> q cross layer 1 head * at last token": [
        Path(z(0), None, {q(1): head}) for head in range(4)
    ],
    "path z cross layer 1 head * -> q cross layer 3 heads * at last token": [
        Path(z(1), head, {q(3): None}) for head in range(4)
    ],
    "path z cross layer 1 head 2 -> q layer 2 heads * at last token": [Path(z(1), 2, {q(2): None})],
    "path mlp_out layer * -> logits at last token": [
        Path(mlp(layer), None, None) for layer in range(LAYERS)
    ],
    "path z layer 2 heads * -> logits at last token": [Path(z(2), None, None)],
    "path mlp_out layer 1 -> mlp_norm layer 3 at last token": [
        Path(mlp(1), None, {mlp_input(3): None})
    ],
    "path z cross layer 1 heads * -> mlp_norm layer 1 at last token": [
        Path(z(1), None, {mlp_input(1): None})
    ],
    "path z layer 0 heads * -> q cross layer 3 heads * at last token through mlps": [
        Path(z(0), None, {q(3): None}, mlps=False)
    ],
    "path z cross layer 1 heads * -> q cross layer 3 heads * at last token with frozen norms": [
        Path(z(1), None, {q(3): None}, norms=True)
    ],
    "path z cross layer 1 head 1 -> logits at last token with frozen norms": [
        Path(z(1), 1, None, norms=True)
    ],
}
ONE = "photo row 1 col 2 token"


def tower_q(layer: int) -> Place:
    return f"{tower(layer)}.self_attn.q_proj", False


IN_TOWER: dict[str, list[Path]] = {
    f"path z vision layer 0 head * -> q vision layer 1 heads * at {ONE}": [
        Path(HEADS_OF_TOWER[0], head, {tower_q(1): None}, vision=True) for head in range(2)
    ],
    f"path mlp_out vision layer * -> mlp_norm vision layer 2 at {ONE}": [
        Path(MLPS_OF_TOWER[layer], None, {(f"{tower(2)}.mlp", True): None}, vision=True)
        for layer in range(2)
    ],
    f"path z vision layer 1 heads * -> q vision layer 2 head * at {ONE}": [
        Path(HEADS_OF_TOWER[1], None, {tower_q(2): head}, vision=True) for head in range(2)
    ],
    f"path z vision layer 0 heads * -> q vision layer 2 heads * at {ONE} through mlps": [
        Path(HEADS_OF_TOWER[0], None, {tower_q(2): None}, vision=True, mlps=False)
    ],
}


@pytest.mark.parametrize("mode", some(["planned", "plain", "small passes"], ["planned"]))
@pytest.mark.parametrize("paths", [PATHS, IN_TOWER], ids=["text", "encoder"])
def test_paths_equal_hooks_on_the_bare_model(paths: dict[str, list[Path]], mode: str) -> None:
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(paths)
    )
    base = [run(n, True) for n in ALL]
    for found, (rule, cells) in zip(run_text(text, mode, MARKED), paths.items(), strict=True):
        [measure] = found.measures
        expected = np.array([[path.value(n) for n in ALL] for path in cells])
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        shown = measure.patched
        if len(shown) > len(expected):  # senders without receivers after them change nothing
            np.testing.assert_allclose(
                shown[len(expected) :], [base] * (len(shown) - len(expected)), atol=1e-4
            )
            shown = shown[: len(expected)]
        np.testing.assert_allclose(shown, expected, atol=2e-4, err_msg=rule)
        assert np.abs(expected - base).max() > 0.05, rule
        heads, mlps = "the heads (z, z cross)", "the MLPs (mlp_out) of layers 0 to 3"
        if paths is IN_TOWER:
            heads, mlps = "the heads of the vision encoder (z vision)", "its MLPs (mlp_out vision)"
        held = heads if "through mlps" in rule else f"{heads} and {mlps}"
        said = f"except for the senders, {held} are held at the base run"
        assert found.conventions["path"].startswith(said), found.conventions["path"]


ERRORS = {
    "path z layer 0 head 0 -> k cross layer 1 head 0 at last token": "E0335",
    "path v cross layer 1 head 0 -> logits at photo row 1 col 1 token": "E0334",
    "path z cross layer 3 head 0 -> q cross layer 1 head 0 at last token": "E0335",
    "path z vision layer 0 head 0 -> v cross layer 1 head 0 at photo row 1 col 1 token": "E0335",
    "path z vision layer 0 head 0 -> q vision layer 2 head 0 at photo tokens": "E0307",
    "path z layer 0 head 0 -> q layer 1 head 0 at last token": "E0414",
}


@pytest.mark.parametrize(("rule", "code"), ERRORS.items())
def test_impossible_path_reports_the_code_before_anything_runs(rule: str, code: str) -> None:
    _, found = try_text(experiment("e", "from clean into changed", rule))
    assert next(each.code for each in found if each.severity == "error") == code


def test_path_with_another_rule_and_a_derived_run_equal_hooks() -> None:
    """A rule changes the base run, or a run that the sender's value is from."""
    rule = "path z cross layer 1 heads * -> q layer 2 heads * at last token"
    scale = "scale mlp_out layer 0 at last token by -2"
    text = experiment("e", "from clean into changed", f"{scale}\n  {rule}")
    text += experiment("r", f"run turned {{ {scale} }}", "from turned into changed", rule)
    together, derived = run_text(text, block=MARKED)

    def turned(value: Tensor) -> Tensor:
        value = value.clone()
        value[0, -1] *= -2
        return value

    hook: Hook = (f"{block_at(0)}.mlp", False, turned)
    sublayers = [*HEADS_OF_TEXT, *MLPS_OF_TEXT]
    for found, on_base in ((together, True), (derived, False)):
        expected: list[float] = []
        for n in ALL:
            own = [hook] if on_base else []
            source = recorded(n, False, [z(1)], [] if on_base else [hook])[z(1)]
            base = recorded(n, True, sublayers, own)
            hooks = [held(place, base[place]) for place in sublayers]
            hooks.append(part(z(1), slice(None), [-1], source))
            read = recorded(n, True, [q(2)], hooks)[q(2)]
            expected.append(run(n, True, [*own, part(q(2), slice(None), [-1], read)]))
        np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=2e-4)
        assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.05
