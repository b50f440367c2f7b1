"""Replies of models whose blocks attend to an image, with cached keys and values, against plain
hooks on full passes of the bare model: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mechdsl.execute import image_vectors
from mechdsl.execute import unpatched_runs as replies_of_rows
from mechdsl.execute.image_vectors import provide_images
from mechdsl.execute.run.panel import execute
from mechdsl.forward.generation import replies as replies_module
from mechdsl.forward.generation.cached_pass import CachedPass, choose_method
from mechdsl.forward.hooks.model import IMAGE_INPUTS
from mechdsl.planner.passes import make_plan
from mechdsl.results.assembly.collection import check_denominators
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import check_file
from ..generate.support import Act, Rules, agree, greedy, written
from . import test_attended_encoder as encoder
from .support import BLOCK, RECORDS, experiment
from .test_attended_images import (
    GRIDS,
    HEADS,
    WIDTH,
    Hook,
    at,
    bare,
    block_at,
    folder,
    inputs,
    loaded,
    outputs,
    patch,
    replied,
    run_text,
    token,
    words,
)

WRITTEN = 'measure matches("1|2|3") as raw'
TOKENS, FROM = 4, "from changed into clean"
ALL = range(len(RECORDS))
OF_IMAGE = ("k cross", "v cross")


# --- passes with cached keys, with logits -----------------------------------------------------


@cache
def prompts() -> tuple[tuple[tuple[int, ...], ...], int]:
    """The prompts of the records in their order, and their number of image tokens."""
    text = experiment("e", "ablate mlp_out layer 0 at last token with zero")
    rows = check_file(text, folder(), loaded(), BLOCK).experiments[0].table.runs["clean"].rows
    provide_images(loaded(), rows)
    source = rows[0].source
    of_text = {tuple(row.ids[source:]): tuple(row.ids) for row in rows}
    every = [of_text[tuple(inputs(n, n)["input_ids"][0].tolist())] for n in ALL]
    return tuple(every), source


def vector(seed: int, width: int) -> tuple[float, ...]:
    draws = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return tuple((3 * draws).tolist())


def length(n: int) -> int:
    return len(inputs(n, n)["input_ids"][0])


def act(
    row: int, n: int, site: str, layer: int, *, place: int | None, seed: int, **more: Any
) -> Act:
    """Set a vector of the text, counted from its end, or of a token of the image."""
    whole = site == "resid_post"
    width = HEADS * WIDTH if whole else WIDTH
    position = place
    if place is not None and site not in OF_IMAGE:
        position = prompts()[1] + length(n) + place
    unit = 0 if whole else seed % 2
    return Act(row, site, layer, "set", vector(seed, width), unit=unit, position=position, **more)


ROWS = (0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 3)
"""[row] its record: prompts of several lengths, with several rows each."""


def mixed() -> Rules:
    """Different rules for rows of the same prompt, in the prefill and in steps."""
    here = patch(0, 1, 2)
    acts = [
        act(1, 0, "z cross", 3, place=-1, seed=1),
        act(2, 0, "resid_post", 1, place=-3, seed=2),
        act(2, 0, "z", 2, place=None, seed=3, steps=(2, 3)),
        act(3, 0, "v cross", 3, place=here, seed=4),
        act(3, 0, "z cross", 1, place=None, seed=5, steps=(1, 2)),
        act(4, 1, "z cross", 3, place=None, seed=6, steps=(1, None)),
        act(6, 2, "k cross", 3, place=patch(2, 1, 1), seed=7),
        act(6, 2, "v cross", 1, place=patch(2, 1, 2), seed=8),
        act(7, 2, "resid_post", 3, place=None, seed=9, steps=(2, None)),
        act(9, 3, "v", 2, place=-2, seed=10),
        act(10, 3, "v", 2, place=None, seed=11, steps=(1, None)),
        act(10, 3, "resid_post", 0, place=-1, seed=12),
        act(11, 3, "z cross", 3, place=-1, seed=13),
        act(11, 3, "v cross", 3, place=patch(3, 1, 3), seed=14),
    ]
    return Rules(acts)


def edited() -> Rules:
    """Edits of keys and values between the prefill and the first step, and other rules."""
    kept = [
        act(1, 0, "v", 2, place=-2, seed=21),
        act(2, 0, "v cross", 3, place=patch(0, 1, 2), seed=22),
        act(3, 0, "k cross", 3, place=patch(0, 1, 1), seed=23),
        act(4, 1, "k", 0, place=-1, seed=24),
        act(6, 2, "v cross", 1, place=patch(2, 1, 2), seed=25),
        act(9, 3, "v", 0, place=-3, seed=26),
        act(10, 3, "v cross", 3, place=patch(3, 1, 1), seed=27),
    ]
    acts = [
        act(6, 2, "v cross", 1, place=patch(2, 1, 1), seed=28),
        act(10, 3, "z", 2, place=None, seed=29, steps=(2, None)),
    ]
    return Rules(acts, kept=kept)


def hook(each: Act, n: int, position: int) -> Hook:
    """The plain hook of a write; position: in the text, or among the image's tokens."""
    value = torch.tensor(each.values)
    if each.site in ("k", "v"):  # projections, before rotary embedding
        path = f"{block_at(each.layer or 0)}.self_attn.{each.site}_proj"
        own = slice(each.unit * WIDTH, (each.unit + 1) * WIDTH)

        def change(now: Tensor) -> Tensor:
            now = now.clone()
            now[0, position, own] = value
            return now

        return path, False, change
    head = None if each.site == "resid_post" else each.unit
    return at(each.site, each.layer or 0, [position], head, lambda now: value.expand_as(now))


def decoded(row: int, rules: Rules, tokens: int = TOKENS) -> tuple[list[int], Tensor]:
    """The reply after a prompt, and the logits [step, vocab] of its tokens."""
    n, source = ROWS[row], prompts()[1]
    count, reply, found, held = length(n), list[int](), list[Tensor](), list[Hook]()
    for step in range(tokens):
        hooks = list[Hook]()
        for each in (own for own in rules.acts if own.row == row):
            if each.position is not None:
                place = each.position - (0 if each.site in OF_IMAGE else source)
                hooks.append(hook(each, n, place))
                continue
            first, last = each.steps
            last = step if last is None else min(step, last)
            hooks += [hook(each, n, count + now - 1) for now in range(first, last + 1)]
        if step == 1:
            held = keys_as_they_were(n, row, rules, hooks)
        found.append(outputs(n, n, [*hooks, *held], reply).logits[0, -1].double())
        reply.append(int(found[-1].argmax()))
    return reply, torch.stack(found)


def keys_as_they_were(n: int, row: int, rules: Rules, hooks: Sequence[Hook]) -> list[Hook]:
    """Keys and values of the prompt in the prefill, with the edits that follow it."""
    edits = [each for each in rules.kept if each.row == row]
    if not edits:
        return []
    source, count, found = prompts()[1], length(n), list[Hook]()
    for layer in (0, 2):
        for site in ("k", "v"):
            path, values = f"{block_at(layer)}.self_attn.{site}_proj", list[Tensor]()

            def keep(now: Tensor, values: list[Tensor] = values) -> Tensor:
                values.append(now.clone())
                return now

            outputs(n, n, [*hooks, (path, False, keep)])
            [now] = values
            for each in edits:
                if (each.site, each.layer) == (site, layer):
                    assert each.position is not None
                    now = hook(each, n, each.position - source)[2](now)

            def put(later: Tensor, now: Tensor = now) -> Tensor:
                return torch.cat([now, later[:, count:]], 1)

            found.append((path, False, put))
    across = (each for each in edits if each.site in OF_IMAGE)
    return [*found, *(hook(each, n, each.position or 0) for each in across)]


def generate(rules: Rules, **settings: Any) -> Any:
    every, source = prompts()
    given = [every[n] for n in ROWS]
    sources = [source] * len(given)
    return written(loaded(), given, greedy(TOKENS), rules, sources=sources, **settings)


@pytest.mark.parametrize("make", [Rules, mixed, edited])
def test_logits_of_cached_passes_equal_plain_hooks(make: Callable[[], Rules]) -> None:
    rules = make()
    expected = [decoded(row, rules) for row in range(len(ROWS))]
    agree(generate(rules), expected)
    agree(generate(rules, limit=1), expected)
    if not (rules.acts or rules.kept):
        return
    plain = [decoded(row, Rules()) for row in range(len(ROWS))]
    changed = {each.row for each in (*rules.acts, *rules.kept)}
    for row in changed:
        assert (expected[row][1] - plain[row][1]).abs().max() > 0.1, row


def test_equal_rows_share_blocks_until_their_rules_act() -> None:
    """With groups, as for equal cells; a rule in a late block shares earlier ones."""
    rules = Rules(
        [
            act(1, 0, "z cross", 3, place=None, seed=31, steps=(2, None)),
            act(2, 0, "z cross", 3, place=None, seed=31, steps=(2, None)),
            act(6, 2, "resid_post", 2, place=None, seed=32, steps=(1, None)),
            act(7, 2, "v cross", 3, place=patch(2, 1, 1), seed=33),
        ]
    )
    groups = np.array([0, 1, 1, 0, 0, 0, 2, 3, 0, 0, 0, 0])
    agree(generate(rules, groups=groups), [decoded(row, rules) for row in range(len(ROWS))])


def test_cached_passes_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_method(loaded()).kind == choose_method(loaded(), inside=True).kind == "cached"
    counts: list[int] = []
    run = CachedPass.run

    def look(self: CachedPass) -> Tensor:
        counts.append(self.tokens.count)
        return run(self)

    monkeypatch.setattr(CachedPass, "run", look)
    monkeypatch.setattr(replies_module, "FullPasses", None)
    generate(mixed())
    assert counts[-1] == 1


# --- files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A rule of a file, and its plain hooks at a step."""

    rule: str
    hooks: Callable[[int, range], list[Hook]]
    """Of a record and the positions of the tokens of its reply so far, the last token first."""


def newest(
    site: str, layer: int, first: int = 0, last: int | None = None, head: int | None = None
) -> Callable[[int, range], list[Hook]]:
    """Vectors of the newest tokens, set to zero in steps from `first` to `last`."""

    def hooks(n: int, steps: range) -> list[Hook]:
        count = length(n)
        chosen = [s for s in steps if s >= first and (last is None or s <= last)]
        places = [count - 1 + s for s in chosen]
        return [at(site, layer, places, head, torch.zeros_like)] if places else []

    return hooks


def without_image(n: int, steps: range) -> list[Hook]:
    """The values of all patches in layer 1, set to zero in all steps."""
    rows, cols = (2 * each for each in GRIDS[n])
    every = [patch(n, row, col) for row in range(1, rows + 1) for col in range(1, cols + 1)]
    return [at("v cross", 1, every, None, torch.zeros_like)]


CASES = (
    Case("ablate z cross layer 3 heads * at last token with zero", newest("z cross", 3)),
    Case(
        "ablate z cross layer 1 heads * at last token with zero during step 2..3",
        newest("z cross", 1, 2, 3),
    ),
    Case(
        "ablate z layer 2 head 1 at last token with zero during step 1..2",
        newest("z", 2, 1, 2, 1),
    ),
    Case(
        "ablate mlp_out layer 1 at last token with zero during prefill", newest("mlp_out", 1, 0, 0)
    ),
    Case("ablate v cross layer 1 heads * at photo tokens with zero", without_image),
)


def replied_with(n: int, hooks: Callable[[int, range], list[Hook]]) -> list[int]:
    found: list[int] = []
    for step in range(TOKENS):
        given = hooks(n, range(step + 1))
        best = int(outputs(n, n, given, found).logits[0, -1].argmax())
        if best == token("</s>"):
            break
        found.append(best)
    return found


def replies_of(found: ExperimentResult, n: int) -> list[int]:
    assert found.replies is not None
    return [*found.replies.cells[0][n][0].ids]


def test_replies_of_files_under_every_schedule_equal_hooks() -> None:
    text = "".join(
        experiment(f"r{n}", FROM, f"generate {TOKENS}", case.rule, measure=WRITTEN)
        for n, case in enumerate(CASES)
    )
    plain = [replied(n, ()) for n in ALL]
    for found, case in zip(run_text(text), CASES, strict=True):
        expected = [replied_with(n, case.hooks) for n in ALL]
        assert [replies_of(found, n) for n in ALL] == expected, case.rule
        assert expected != plain, case.rule
        assert "kept keys" not in found.conventions


def test_cached_replies_need_fewer_products_than_full_passes() -> None:
    """As `plan` estimates both."""
    rule = "ablate z cross layer * head * at last token with zero"
    text = experiment("e", "generate 3", rule, measure=WRITTEN)
    plan = make_plan(check_file(text, folder(), loaded(), BLOCK).experiments)
    run_text(text)  # images, and the trial of the cache
    found = list[float]()
    for given in (plan, replace(plan, keeps_tokens=False)):
        with FlopCounterMode(display=False) as counter:
            execute(given, {"m": loaded()}, None, check=check_denominators)
        found.append(counter.get_total_flops())
    assert found[1] > 8 * found[0]


# --- rules in the encoder -------------------------------------------------------------------------

IN_ENCODER = "scale resid_post vision layer 0 at photo row 1 col 2 token by -3"
ENCODER_RULES = {
    IN_ENCODER: lambda n, steps: [scaled(n)],
    f"{IN_ENCODER}\n  ablate z cross layer 3 heads * at last token with zero during step 1..3": (
        lambda n, steps: [scaled(n), *(silent(n, step) for step in steps if step)]
    ),
    f"{IN_ENCODER}\n  ablate v cross layer 1 heads * at photo row 2 col 1 token with zero": (
        lambda n, steps: [scaled(n), at("v cross", 1, [patch(n, 2, 1)], None, torch.zeros_like)]
    ),
}


def scaled(n: int) -> Hook:
    return encoder.scaled("resid_post", 0, [encoder.column(n, 1, 2)], -3)


def silent(n: int, step: int) -> Hook:
    return at("z cross", 3, [length(n) - 1 + step], None, torch.zeros_like)


def test_replies_of_rules_in_the_encoder_and_in_the_text_equal_hooks() -> None:
    text = "".join(
        experiment(f"r{n}", f"generate {TOKENS}", rule, measure=WRITTEN)
        for n, rule in enumerate(ENCODER_RULES)
    )
    expected = [[replied_with(n, hooks) for n in ALL] for hooks in ENCODER_RULES.values()]
    for found, own in zip(run_text(text), expected, strict=True):
        assert [replies_of(found, n) for n in ALL] == own
        assert "kept keys" not in found.conventions
    assert expected[0] != [replied(n, ()) for n in ALL]
    assert len({str(own) for own in expected}) > 1


EVERY_CHANGE = "".join(
    experiment(f"e{n}", FROM, f"generate {TOKENS}{more}", rule, measure=WRITTEN)
    for n, (rule, more) in enumerate(
        {
            "patch resid_post vision layer * at photo row 1 col 2 token": "",
            "replace block vision layer * with identity": "",
            "block attention vision layer 1 heads * from photo tokens to photo tokens": "",
            IN_ENCODER: " with temperature 1, samples 3",
            "ablate z layer 2 heads * at last token with zero": "",
        }.items()
    )
)


@dataclass
class Recorded:
    """What was computed for the replies of `EVERY_CHANGE`."""

    logits: dict[tuple[int, ...], Tensor]
    """By what the draws of a row depend on, and step."""
    replies: list[Any]
    encoded: int
    """Number of images that passed the first block of the encoder."""


def record(monkeypatch: pytest.MonkeyPatch, *, cached: bool) -> Recorded:
    plan = make_plan(check_file(EVERY_CHANGE, folder(), loaded(), f"seed 7\n{BLOCK}").experiments)
    found, choose = Recorded({}, [], 0), replies_module.choose_next_tokens

    def keep(logits: Tensor, of: Any, how: Any, rows: Sequence[tuple[int, ...]], step: int) -> Any:
        for state, row in zip(of.tolist(), rows, strict=True):
            found.logits[*row, step] = logits[state].clone()
        return choose(logits, of, how, rows, step)

    def count(_: Any, args: Any, output: Tensor) -> None:
        found.encoded += len(output)

    handle = bare().model.vision_model.transformer.layers[0].register_forward_hook(count)
    with monkeypatch.context() as patched:
        patched.setattr(replies_module, "choose_next_tokens", keep)
        values = execute(
            replace(plan, keeps_tokens=cached), {"m": loaded()}, None, check=check_denominators
        )
    handle.remove()
    found.replies = [each.replies for each in values.measured.values()]
    return found


def test_replies_of_changed_images_in_cached_passes_equal_full_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The encoder runs once for each row, also for several samples."""
    prompts()  # encodes the images without changes
    cached, full = (record(monkeypatch, cached=own) for own in (True, False))
    assert cached.replies == full.replies
    assert cached.logits.keys() == full.logits.keys()
    for key, logits in cached.logits.items():
        torch.testing.assert_close(logits, full.logits[key], atol=1e-5, rtol=1e-5)
    assert cached.encoded == full.encoded
    assert cached.encoded == len(ALL) * (3 + 3 + 1 + 1 + 2)  # the last are the runs that are read


@pytest.mark.parametrize("most", [1, 1 << 11])
def test_replies_do_not_depend_on_the_images_that_are_encoded_together(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    together = record(monkeypatch, cached=True)
    known = vars(IMAGE_INPUTS[loaded().module])["_prepare"]
    tokens = {*known}
    monkeypatch.setattr(replies_of_rows, "_MAX_CHANGED_BYTES", most)
    monkeypatch.setattr(image_vectors, "DEFAULT_PASS_TOKENS", 1)
    assert record(monkeypatch, cached=True).replies == together.replies
    assert {*known} == tokens


def blocked(n: int, path: str, first: int, last: int, keys: Sequence[int]) -> list[int]:
    """The reply while the newest tokens of some steps don't attend to these keys."""
    count = length(n)

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].clone()
        for query in range(count - 1 + first, min(count + last, mask.shape[2])):
            mask[:, :, query, list(keys)] = torch.finfo(torch.float32).min
        return args, {**kwargs, "attention_mask": mask}

    bare().set_attn_implementation("eager")  # with explicit masks
    handle = bare().get_submodule(path).register_forward_pre_hook(hide, with_kwargs=True)
    try:
        return replied_with(n, lambda *_: [])
    finally:
        handle.remove()
        bare().set_attn_implementation("sdpa")


def test_replies_with_blocked_attention_equal_hooks() -> None:
    """To the image, and to earlier tokens, in all steps or in some of them."""
    cross, own = f"{block_at(3)}.cross_attn", f"{block_at(2)}.self_attn"
    rules: dict[str, Callable[[int], list[int]]] = {
        "block attention cross layer 3 heads * from last token to photo row 1 col * tokens": (
            lambda n: blocked(n, cross, 0, TOKENS, top(n))
        ),
        "block attention cross layer 3 heads * from last token to photo row 1 col * tokens "
        "during step 1..2": lambda n: blocked(n, cross, 1, 2, top(n)),
        "block attention layer 2 heads * from last token to what tokens": (
            lambda n: blocked(n, own, 0, TOKENS, words(n))
        ),
    }
    text = "".join(
        experiment(f"r{n}", f"generate {TOKENS}", rule, measure=WRITTEN)
        for n, rule in enumerate(rules)
    )
    plain = [replied(n, ()) for n in ALL]
    for found, (rule, reply) in zip(run_text(text), rules.items(), strict=True):
        expected = [reply(n) for n in ALL]
        assert [replies_of(found, n) for n in ALL] == expected, rule
        assert expected != plain, rule


def top(n: int) -> list[int]:
    """The patches of the first row of an image."""
    return [patch(n, 1, col) for col in range(1, 2 * GRIDS[n][1] + 1)]
