"""Paths in encoder-decoders, against plain hooks that hold all else for one unpadded prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ..image_prompts import test_sounds as sounds
from .encoder_decoders import (
    ENCODER_LAYERS,
    HEADS,
    LAYERS,
    LIKE_T5,
    WIDTH,
    Place,
    Text,
    Write,
    copied_columns,
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
    zeroed,
)
from .support import DIFFERENCE, MODES, ROWS, Array, Record, experiment, token, try_file
from .test_encoder_decoder_blocks import replaced

FROM = ("prompts p", "from other into clean")

End = tuple[str, int, int | None]
"""Site, layer, and head or None."""


def module_of(family: str, end: End) -> Place:
    """The module of a site; the inputs of MLPs are in addition to `place`."""
    site, layer, head = end
    component, _, stack = site.partition(" ")
    if component == "logits":
        raise ValueError
    if component != "mlp_norm":
        return place(family, site, layer, head)
    encodes = stack == "encoder"
    if name_of(family) in LIKE_T5:
        block = f"{'encoder' if encodes else 'decoder'}.block.{layer}"
        return Place(f"{block}.layer.{1 if encodes else 2}.layer_norm")
    block = f"model.{'encoder' if encodes else 'decoder'}.layers.{layer}"
    if name_of(family) == "t5gemma":
        return Place(f"{block}.pre_feedforward_layernorm")
    return Place(f"{block}.fc1", of_input=True)


BROKEN = "ablate z encoder layer 0 head 1 at subject token with zero"


BLOCKS: dict[str, tuple[str, dict[int, int | None]]] = {
    "replace block layer 0 with identity": ("decoder", {0: None}),
    "replace block layer 1 with block layer 2": ("decoder", {1: 2}),
    "replace block encoder layer 0 with block encoder layer 1": ("encoder", {0: 1}),
}


def writes_of(family: str, of: Text, rule: str) -> list[Write]:
    """The writes of another rule, which is `BROKEN`, one of `BLOCKS` or none."""
    return [zeroed(place(family, "z encoder", 0, 1), of.subject[-1:])] if rule == BROKEN else []


def blocks_of(family: str, rule: str) -> AbstractContextManager[None]:
    """Replace the blocks of another rule."""
    return replaced(model(family), *BLOCKS[rule]) if rule in BLOCKS else nullcontext()


@cache
def plain(family: str, of: Text, own: Place, rule: str = "") -> Tensor:
    """[token, width] of a module in a run with another rule."""
    if not rule:
        return read(family, of, own)
    count = len(plain(family, of, own))
    with blocks_of(family, rule):
        return seen(family, of, writes_of(family, of, rule), own, range(count))


def seen(family: str, of: Text, writes: Sequence[Write], own: Place, at: Sequence[int]) -> Tensor:
    """[token, width] of some tokens of a module in a run."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    logits(family, of, [*writes, (own, at, keep)])
    return found[0]


def constant(values: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda old: values.to(old.dtype)


def fixed(family: str, of: Text, rule: str, *, mlps: bool) -> Iterator[Write]:
    """Hold every head and, unless they may change, every MLP of a run."""
    sites = [("z encoder", ENCODER_LAYERS), ("z", LAYERS), ("z cross", LAYERS)]
    sites += [] if mlps else [("mlp_out encoder", ENCODER_LAYERS), ("mlp_out", LAYERS)]
    for site, layers in sites:
        for layer in range(layers):
            own = place(family, site, layer)
            held = plain(family, of, own, rule)
            yield own, range(len(held)), constant(held)


@dataclass(frozen=True)
class Prompt:
    """A row: its prompts, and the positions that are read and written."""

    base: Text
    source: Text
    read: tuple[int, ...]
    written: tuple[int, ...]

    @staticmethod
    def of(family: str, record: Record, *, encodes: bool) -> Prompt:
        base, source = text(record), text(record, "other")
        last = (len(starts(family)) - 1,)
        if not encodes:
            return Prompt(base, source, last, last)
        return Prompt(base, source, source.subject[-1:], base.subject[-1:])


def changed_senders(
    family: str, prompt: Prompt, senders: Sequence[End], rule: str = "", share: float = 1.0
) -> Iterator[Write]:
    """Move the senders of a path to their values in the source run."""
    for end in senders:
        own, now = module_of(family, end), list(prompt.written)
        new = plain(family, prompt.source, module_of(family, (*end[:2], None)))[list(prompt.read)]
        old = plain(family, prompt.base, module_of(family, (*end[:2], None)), rule)[now]
        at = slice(None) if end[2] is None else slice(end[2] * WIDTH, (end[2] + 1) * WIDTH)
        yield own, now, constant((old + share * (new - old))[:, at])


def patched(
    family: str,
    prompt: Prompt,
    senders: Sequence[End],
    receivers: Sequence[End],
    *,
    mlps: bool = False,
    rule: str = "",
    share: float = 1.0,
) -> Array:
    """Logits [token, vocab] of a path, by its definition.

    share: The part of the changes at the senders and at the receivers that is written.
    """
    base, others = prompt.base, writes_of(family, prompt.base, rule)
    first = [*fixed(family, base, rule, mlps=mlps), *others]
    first += changed_senders(family, prompt, senders, rule, share)
    with blocks_of(family, rule):
        if receivers[0][0] == "logits":
            return logits(family, base, first)
        writes = []
        for end in receivers:
            own = module_of(family, end)
            received = seen(family, base, first, own, prompt.written)
            writes.append((own, prompt.written, constant(received)))
        return logits(family, base, [*writes, *others])


@dataclass(frozen=True)
class Case:
    line: str
    cells: Callable[[], list[tuple[list[End], list[End]]]]
    encodes: bool = False
    mlps: bool = False
    rule: str = ""
    """Another rule of the experiment."""

    @property
    def lines(self) -> tuple[str, ...]:
        return (self.rule, self.line) if self.rule else (self.line,)


def heads(site: str, layers: Sequence[int]) -> list[End]:
    return [(site, layer, head) for layer in layers for head in range(HEADS)]


ALL = range(LAYERS)
CASES = {
    "decoder to logits": Case(
        "path z layer * head * -> logits at last token",
        lambda: [([of], [("logits", 0, None)]) for of in heads("z", ALL)],
    ),
    "cross to logits": Case(
        "path z cross layer * head * -> logits at last token",
        lambda: [([of], [("logits", 0, None)]) for of in heads("z cross", ALL)],
    ),
    "cross to logits through mlps": Case(
        "path z cross layer * head * -> logits at last token through mlps",
        lambda: [([of], [("logits", 0, None)]) for of in heads("z cross", ALL)],
        mlps=True,
    ),
    "cross to later queries": Case(
        "path z cross layer * head 1 -> q cross layer 2 head * at last token",
        lambda: [
            ([("z cross", layer, 1)], [("q cross", 2, head)])
            for layer in (0, 1)
            for head in range(HEADS)
        ],
    ),
    "heads to the query of the same layer": Case(
        "path z layer 1 head * -> q cross layer 1 head 0 at last token",
        lambda: [([of], [("q cross", 1, 0)]) for of in heads("z", [1])],
    ),
    "cross to inputs of mlps": Case(
        "path attn_out cross layer * -> mlp_norm layer 1 at last token",
        lambda: [([("attn_out cross", layer, None)], [("mlp_norm", 1, None)]) for layer in (0, 1)],
    ),
    "mlps to values": Case(
        "path mlp_out layer * -> v layer 2 heads * at last token",
        lambda: [([("mlp_out", layer, None)], heads("v", [2])) for layer in (0, 1)],
    ),
    "encoder to its keys": Case(
        "path z encoder layer 0 head * -> k encoder layer 1 head * at subject token",
        lambda: [([of], [to]) for of in heads("z encoder", [0]) for to in heads("k encoder", [1])],
        encodes=True,
    ),
    "encoder to its mlp": Case(
        "path z encoder layer * head 0 -> mlp_norm encoder layer 1 at subject token",
        lambda: [([("z encoder", layer, 0)], [("mlp_norm encoder", 1, None)]) for layer in (0, 1)],
        encodes=True,
    ),
    "encoder to values": Case(
        "path z encoder layer * heads * -> v cross layer * heads * at subject token",
        lambda: [
            (heads("z encoder", [of]), heads("v cross", [to]))
            for of in range(ENCODER_LAYERS)
            for to in ALL
        ],
        encodes=True,
    ),
    "embedding of the encoder to its blocks": Case(
        "path embed encoder -> v encoder layer * heads * at subject token",
        lambda: [
            ([("embed encoder", 0, None)], heads("v encoder", [to])) for to in range(ENCODER_LAYERS)
        ],
        encodes=True,
    ),
    "streams to inputs of cross attention": Case(
        "path resid_post layer * -> attn_norm cross layer 2 at last token",
        lambda: [
            ([("resid_post", layer, None)], heads("q cross", [2])) for layer in range(LAYERS - 1)
        ],
    ),
    "contributions of cross attention to streams": Case(
        "path head_out cross layer * head * -> resid_pre layer 2 at last token",
        lambda: [([of], [("resid_pre", 2, None)]) for of in heads("z cross", (0, 1))],
    ),
    "cross to later queries, with a rule in the encoder": Case(
        "path z cross layer * head 1 -> q cross layer 2 heads * at last token",
        lambda: [([("z cross", layer, 1)], heads("q cross", [2])) for layer in (0, 1)],
        rule=BROKEN,
    ),
    "encoder to values, with a rule in the encoder": Case(
        "path mlp_out encoder layer * -> v cross layers * heads * at subject token",
        lambda: [
            ([("mlp_out encoder", layer, None)], heads("v cross", ALL))
            for layer in range(ENCODER_LAYERS)
        ],
        encodes=True,
        rule=BROKEN,
    ),
    "cross to later queries, without a block": Case(
        "path z cross layer 1 head * -> q cross layer 2 heads * at last token",
        lambda: [([of], heads("q cross", [2])) for of in heads("z cross", [1])],
        rule="replace block layer 0 with identity",
    ),
    "decoder to logits, with a replaced block": Case(
        "path z layer * head * -> logits at last token",
        lambda: [([of], [("logits", 0, None)]) for of in heads("z", ALL)],
        rule="replace block layer 1 with block layer 2",
    ),
    "encoder to values, with a replaced block": Case(
        "path mlp_out encoder layer * -> v cross layers * heads * at subject token",
        lambda: [
            ([("mlp_out encoder", layer, None)], heads("v cross", ALL))
            for layer in range(ENCODER_LAYERS)
        ],
        encodes=True,
        rule="replace block encoder layer 0 with block encoder layer 1",
    ),
    "encoder to all keys": Case(
        "path mlp_out encoder layer * -> k cross layers * heads * at subject token",
        lambda: [
            ([("mlp_out encoder", layer, None)], heads("k cross", ALL))
            for layer in range(ENCODER_LAYERS)
        ],
        encodes=True,
    ),
    "all heads of cross attention to logits": Case(
        "path z cross layers * heads * -> logits at last token",
        lambda: [(heads("z cross", ALL), [("logits", 0, None)])],
    ),
    "embedding of the encoder to inputs of its attention": Case(
        "path embed encoder -> attn_norm encoder layer 1 at subject token",
        lambda: [
            (
                [("embed encoder", 0, None)],
                [end for each in "qkv" for end in heads(f"{each} encoder", [1])],
            )
        ],
        encodes=True,
    ),
    "encoder to its output": Case(
        "path z encoder layer * head * -> final_norm encoder at subject token through mlps",
        lambda: [
            ([of], [("final_norm encoder", 0, None)])
            for of in heads("z encoder", range(ENCODER_LAYERS))
        ],
        encodes=True,
        mlps=True,
    ),
}


def expected_values(family: str, case: Case) -> Array:
    """The measure in every cell, [cell, row]."""
    found = []
    for senders, receivers in case.cells():
        row = []
        for record in ROWS:
            prompt = Prompt.of(family, record, encodes=case.encodes)
            whole = patched(family, prompt, senders, receivers, mlps=case.mlps, rule=case.rule)
            row.append(difference(whole, record))
        found.append(row)
    return np.array(found)


slow = pytest.mark.slow
FAMILIES = [
    "t5",
    "bart",
    *(pytest.param(family, marks=slow) for family in ("mt5", "mbart", "t5gemma")),
]


QUICK = (
    "cross to logits",
    "heads to the query of the same layer",
    "encoder to its mlp",
    "encoder to values",
    "cross to later queries, with a rule in the encoder",
    "encoder to values, with a replaced block",
)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("t5", QUICK),
        ("bart", QUICK),
        *(
            pytest.param(family, tuple(CASES), marks=slow)
            for family in ("t5", "mt5", "bart", "mbart", "t5gemma")
        ),
    ],
)
def test_paths_equal_hooks(family: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """On ragged prompts, all in one file."""
    lines = "".join(
        experiment(f"e{n}", *FROM, *CASES[name].lines, DIFFERENCE) for n, name in enumerate(names)
    )
    found = run(family, lines, tmp_path)
    for n, name in enumerate(names):
        case = CASES[name]
        measure, expected = found[f"e{n}"].measures[0], expected_values(family, case)
        np.testing.assert_allclose(measure.patched, expected, atol=3e-5, rtol=1e-4, err_msg=name)
        own = {n: writes_of(family, text(record), case.rule) for n, record in enumerate(ROWS)}
        with blocks_of(family, case.rule):
            base = [difference(logits(family, text(ROWS[n]), own[n]), ROWS[n]) for n in own]
        assert np.abs(expected - base).max() > 0.003, name


@pytest.mark.parametrize("mode", ["small passes", "plain"])
def test_paths_in_small_and_plain_passes_equal_planned_ones(mode: str, tmp_path: Path) -> None:
    names = ("cross to later queries", "encoder to values", "cross to logits")
    lines = "".join(
        experiment(f"e{n}", *FROM, *CASES[name].lines, DIFFERENCE) for n, name in enumerate(names)
    )
    every = [run("t5", lines, tmp_path, MODES[each]) for each in ("planned", mode)]
    for name in every[0]:
        one, other = (each[name].measures[0].patched for each in every)
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_path_from_a_run_with_rules_equals_the_path_with_these_rules(tmp_path: Path) -> None:
    case = CASES["cross to later queries, with a rule in the encoder"]
    rule, line = case.lines
    lines = experiment(
        "e", "prompts p", f"run broken {{ {rule} }}", "from other into broken", line, DIFFERENCE
    )
    measure = run("t5", lines, tmp_path)["e"].measures[0]
    np.testing.assert_allclose(measure.patched, expected_values("t5", case), atol=3e-5, rtol=1e-4)


@torch.no_grad()
def test_effects_of_all_senders_with_frozen_norms_add_up(tmp_path: Path) -> None:
    """To the effect of the whole stream, divided by the norm of the base run."""
    senders = ("embed", "z layers * heads *", "z cross layers * heads *", "mlp_out layers *")
    lines = "".join(
        experiment(
            f"e{n}",
            *FROM,
            f"path {sender} -> logits at last token with frozen norms",
            DIFFERENCE,
        )
        for n, sender in enumerate(senders)
    )
    found = [each.measures[0] for each in run("t5", lines, tmp_path).values()]
    total = np.sum([measure.patched[0] - measure.base[0] for measure in found], axis=0)
    bare, own = model("t5"), place("t5", "resid_post", LAYERS - 1)
    for n, record in enumerate(ROWS):
        base, other = (plain("t5", text(record, name), own)[-1] for name in ("clean", "other"))
        norm = bare.decoder.final_layer_norm
        size = (base.pow(2).mean() + norm.variance_epsilon).sqrt()
        change = bare.lm_head((other - base) / size * norm.weight * bare.model_dim**-0.5)
        expected = float(change[token(record["a"])] - change[token(record["b"])])
        assert total[n] == pytest.approx(expected, abs=1e-4)
        assert abs(expected) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_of_paths_equal_central_differences(family: str, tmp_path: Path) -> None:
    names = ("cross to logits", "cross to later queries", "encoder to values")
    lines = "".join(
        experiment(f"e{n}", *FROM, *CASES[name].lines, "using eap", DIFFERENCE)
        for n, name in enumerate(names)
    )
    found = run(family, lines, tmp_path)
    for n, name in enumerate(names):
        case, expected = CASES[name], []
        for senders, receivers in case.cells():
            row = []
            for record in ROWS:
                prompt = Prompt.of(family, record, encodes=case.encodes)
                ends = [
                    difference(patched(family, prompt, senders, receivers, share=share), record)
                    for share in (0.01, -0.01)
                ]
                row.append((ends[0] - ends[1]) / 0.02)
            expected.append(row)
        measure = found[f"e{n}"].measures[0]
        np.testing.assert_allclose(
            measure.patched - measure.base, expected, atol=1e-3, rtol=1e-2, err_msg=name
        )


def test_inputs_of_a_group_of_heads_are_those_of_their_stack(tmp_path: Path) -> None:
    """Queries of heads of cross attention, not those of the decoder's own attention."""
    group = "group readers = z cross layer 1 head 0, z cross layer 2 head 1\n"
    line = "path z layer 1 head * -> q readers at last token"
    lines = group + experiment("e", *FROM, line, DIFFERENCE)
    measure = run("t5", lines, tmp_path)["e"].measures[0]
    ends: list[End] = [("q cross", 1, 0), ("q cross", 2, 1)]
    case = Case(line, lambda: [([of], ends) for of in heads("z", [1])])
    expected = expected_values("t5", case)
    np.testing.assert_allclose(measure.patched, expected, atol=3e-5, rtol=1e-4)
    assert np.abs(expected - measure.base).max() > 1e-3


def test_paths_over_sounds_equal_hooks() -> None:
    """In Whisper, whose decoder begins with four tokens."""
    name, last = "multilingual", 3
    lines = (
        "path z cross layer * head * -> logits at last token",
        "path z encoder layer * heads * -> v cross layers * heads * at a frame 3 token",
    )
    texts = (
        sounds.experiment(f"e{n}", "from clean into changed", each) for n, each in enumerate(lines)
    )
    logits_of, values_of = (each.measures[0] for each in sounds.run_text("".join(texts), name))
    tokens = {"encoder": sounds.FRAMES, "": last + 1, "cross": last + 1}

    def seen(sound: int, site: str, layer: int, writes: Sequence[Write] = ()) -> Tensor:
        found: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            found.append(value.clone())
            return value

        count = sounds.FRAMES if site == "v cross" else tokens[site.partition(" ")[2]]
        sounds.outputs(name, sound, [*writes, (sounds.place(site, layer), range(count), keep)])
        return found[0]

    every = [("z encoder", 2), ("mlp_out encoder", 2), ("z", 3), ("z cross", 3), ("mlp_out", 3)]
    for n in range(len(sounds.RECORDS)):
        base, held = sounds.other(n), list[Write]()
        for site, layers in every:
            for layer in range(layers):
                value = seen(base, site, layer)
                held.append((sounds.place(site, layer), range(len(value)), constant(value)))
        expected = []
        for layer, head in itertools.product(range(3), range(sounds.HEADS)):
            own, columns = sounds.place("z cross", layer), slice(5 * head, 5 * head + 5)
            write = copied_columns(own, [last], columns, seen(n, "z cross", layer))
            expected.append(sounds.difference(name, n, base, [*held, write]))
        np.testing.assert_allclose(logits_of.patched[:, n], expected, atol=1e-4)
        assert np.abs(np.array(expected) - logits_of.base[0, n]).max() > 0.01
        expected = []
        for layer in range(2):
            value = seen(n, "z encoder", layer)[2:3]
            first = [*held, (sounds.place("z encoder", layer), [2], constant(value))]
            received = [seen(base, "v cross", to, first)[2:3] for to in range(3)]
            writes = [
                (sounds.place("v cross", to), [2], constant(own)) for to, own in enumerate(received)
            ]
            expected.append(sounds.difference(name, n, base, writes))
        np.testing.assert_allclose(values_of.patched[:, n], expected, atol=1e-4)
        assert np.abs(np.array(expected) - values_of.base[0, n]).max() > 0.01


ERRORS = {
    "path z encoder layer 0 head * -> q layer 1 head * at subject token": "E0335",
    "path z encoder layer 0 head * -> logits at subject token": "E0335",
    "path z layer 0 head * -> k cross layer 1 head * at last token": "E0335",
    "path z layer 0 head * -> v encoder layer 1 head * at subject token": "E0335",
    "path z cross layer 1 head * -> q cross layer 1 head * at last token": "E0335",
    "path mlp_out layer 1 -> q cross layer 1 head * at last token": "E0335",
    "path mlp_out encoder layer 1 -> q encoder layer 1 head * at subject token": "E0335",
    "path q cross layer 0 head * -> logits at last token": "E0334",
    "path z cross layer 0 head * -> z cross layer 1 head * at last token": "E0334",
    "path z cross layer 0 head * -> logits at subject token": "E0316",
    "path mixed -> q layer 1 heads * at last token": "E0317",
    "path z layer 0 head * -> logits at last token with frozen norms\n  using eap_ig": "E0608",
    "path z layer 0 head * -> q cross layer 1 head * at last token\n  using cdt": "E0608",
}


@pytest.mark.parametrize(("line", "code"), ERRORS.items())
def test_path_that_the_model_lacks_reports_the_code(line: str, code: str, tmp_path: Path) -> None:
    lines = "group mixed = z layer 0 head 0, z encoder layer 0 head 0\n"
    lines += experiment("e", *FROM, line, DIFFERENCE)
    _, found = try_file(lines, tmp_path, model("bart"), None, tokenizer=tokenizer())
    assert [each.code for each in found if each.severity == "error"] == [code]
