"""`replace block` in encoder-decoders, against the bare model with copies of blocks in its lists:
one unpadded prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from mechdsl.loading.loader import adopt_model

from ..image_prompts import test_encoded_images as images
from ..image_prompts import test_sounds as sounds
from ..image_prompts.support import experiment as of_inputs
from ..quick import some
from . import test_encoder_decoder_replies as replies
from .encoder_decoders import (
    Array,
    Write,
    copied,
    difference,
    logits,
    model,
    place,
    read,
    run,
    starts,
    text,
    tokenizer,
    zeroed,
)
from .support import DIFFERENCE, MODES, ROWS, Record, check_file, experiment, try_file, write_rows

FAMILIES = (
    "t5 writing",
    "bart writing",
    "t5gemma writing",
    "mt5",
    "umt5",
    "marian writing",
    "pegasus writing",
)
Replaced = Mapping[int, int | None]
"""Layer of a block → layer of its replacement; None for identity."""
Cell = tuple[str, Replaced]
"""`encoder` or `decoder`, and its blocks."""

CASES: dict[str, Sequence[Cell]] = {
    "replace block encoder layer * with identity": [("encoder", {n: None}) for n in range(2)],
    "replace block layer * with identity": [("decoder", {n: None}) for n in range(3)],
    "replace block decoder layers 0, 2 with identity": [("decoder", {0: None, 2: None})],
    "replace block layer 1..2 with block layer 0": [("decoder", {n: 0}) for n in (1, 2)],
    "replace block layer 0 with block layer 2": [("decoder", {0: 2})],
    "for l in 0..1 { replace block layer l + 1 with block decoder layer l }": [
        ("decoder", {n + 1: n}) for n in range(2)
    ],
    "replace block encoder layer 0 with block encoder layer 1 "
    "replace block encoder layer 1 with block encoder layer 0": [("encoder", {0: 1, 1: 0})],
}


def list_of(module: Any, stack: str) -> nn.ModuleList:
    """The blocks of a stack."""
    for name in (f"{stack}.block", f"model.{stack}.layers", f"{stack}.layers"):
        found = dict(module.named_modules()).get(name)
        if found is not None:
            return found
    return module.get_submodule("decoder.model.decoder.layers")


def _pass_on(block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def replaced(module: Any, stack: str, pairs: Replaced) -> Generator[None]:
    """Put copies of blocks into a stack; block 0 of T5 keeps the position biases of the stack."""
    blocks = list_of(module, stack)
    before = list(blocks)
    for to, of in pairs.items():
        made = copy.deepcopy(before[to if of is None else of])
        if of is None:
            made.register_forward_hook(_pass_on, with_kwargs=True, prepend=True)
        for part in made.modules():
            if getattr(part, "layer_idx", None) is not None:
                part.layer_idx = to
        if module.config.model_type in ("t5", "mt5") and to == 0:
            part: Any = made.get_submodule("layer.0.SelfAttention")
            own: Any = before[0].get_submodule("layer.0.SelfAttention")
            part.has_relative_attention_bias = True
            part.relative_attention_bias = own.relative_attention_bias
        blocks[to] = made
    try:
        yield
    finally:
        for number, block in enumerate(before):
            blocks[number] = block


def value(family: str, cell: Cell, record: Record, writes: Sequence[Write] = ()) -> float:
    with replaced(model(family), *cell):
        return difference(logits(family, text(record), writes), record)


def check(found: Any, expected: Sequence[Sequence[float]]) -> None:
    """Compare the cells of an experiment, each with an effect above 0.1."""
    measure = found.measures[0]
    np.testing.assert_allclose(measure.patched, expected, atol=3e-4)
    assert (np.abs(measure.patched - measure.base).max(axis=1) > 0.1).all()


@pytest.mark.parametrize("mode", some([*MODES], ["planned"]))
@pytest.mark.parametrize("family", some(FAMILIES, FAMILIES[:3]))
def test_replaced_blocks_of_text_encoder_decoders_equal_hooks(
    family: str, mode: str, tmp_path: Path
) -> None:
    lines = "".join(
        experiment(f"e{n}", "prompts p", line, DIFFERENCE) for n, line in enumerate(CASES)
    )
    found = run(family, lines, tmp_path, MODES[mode])
    for each, cells in zip(found.values(), CASES.values(), strict=True):
        base = [difference(logits(family, text(record)), record) for record in ROWS]
        np.testing.assert_allclose(each.measures[0].base[0], base, atol=2e-4)
        check(each, [[value(family, cell, record) for record in ROWS] for cell in cells])


@pytest.mark.parametrize("name", some(("multilingual", "vit", "deit"), ["vit"]))
def test_replaced_blocks_of_encoders_of_sounds_and_images_equal_hooks(name: str) -> None:
    """The encoder's output of each sound or image is cached by its replaced blocks."""
    source: Any = sounds if name == "multilingual" else images
    found = source.run_text(
        "".join(of_inputs(f"e{n}", *[line]) for n, line in enumerate(CASES)), name
    )
    for each, cells in zip(found, CASES.values(), strict=True):
        expected = list[list[float]]()
        for cell in cells:
            with replaced(source.bare(name), *cell):
                expected.append([source.difference(name, n, n) for n in range(4)])
        check(each, expected)


SKIP = "replace block encoder layer 0 with identity"
EXCHANGE = "replace block layer 1 with block layer 2"
SKIPPED: Cell = ("encoder", {0: None})
EXCHANGED: Cell = ("decoder", {1: 2})


@pytest.mark.parametrize("mode", some([*MODES], ["planned"]))
@pytest.mark.parametrize("family", some(FAMILIES, FAMILIES[:2]))
def test_replaced_blocks_with_other_rules_and_runs_equal_hooks(
    family: str, mode: str, tmp_path: Path
) -> None:
    last = [len(starts(family)) - 1]
    ablate = "ablate z cross layer 2 head 1 at last token with zero"
    patch = "patch resid_post encoder layer 0 at last token"
    query = "scale q cross layer 1 head 0 at last token by -3"
    runs = f"run skipped {{ {SKIP} }}", "from skipped into clean"
    bodies = {
        "a": ["from other into clean", SKIP, patch],
        "b": [EXCHANGE, SKIP, ablate],
        "c": [*runs, "patch attn_out cross layer 1 at last token"],
        "d": [*runs, "patch k cross layer 2 heads * at tokens *"],
        "e": [EXCHANGE, query],
        "f": [f"run skipped {{ {SKIP} }}", "from clean into skipped", EXCHANGE, ablate],
    }
    lines = "".join(experiment(key, "prompts p", *body, DIFFERENCE) for key, body in bodies.items())
    found = run(family, lines, tmp_path, MODES[mode])
    head, cross = place(family, "z cross", 2, 1), place(family, "attn_out cross", 1)
    keys, own = place(family, "k cross", 2), place(family, "resid_post encoder", 0)
    asked = place(family, "q cross", 1, 0)
    expected = {key: list[float]() for key in bodies}
    for record in ROWS:
        base, other = text(record), text(record, "other")
        write = copied(family, other, own, [base.last], [other.last])
        with replaced(model(family), *SKIPPED):
            vectors, every = read(family, base, cross), read(family, base, keys)
        expected["a"].append(value(family, SKIPPED, record, [write]))
        expected["c"].append(
            difference(logits(family, base, [(cross, last, lambda _, v=vectors: v[last])]), record)
        )
        tokens = range(len(base.ids))
        expected["d"].append(
            difference(logits(family, base, [(keys, tokens, lambda _, v=every: v)]), record)
        )
        expected["e"].append(
            value(family, EXCHANGED, record, [(asked, last, lambda vector: -3 * vector)])
        )
        with replaced(model(family), *SKIPPED):
            both = value(family, EXCHANGED, record, [zeroed(head, last)])
        expected["b"].append(both)
        expected["f"].append(both)
    for key in bodies:
        check(found[key], [expected[key]])


TOKENS = 5
SCHEDULED: dict[str, tuple[Cell, Sequence[int]]] = {
    SKIP: (SKIPPED, range(9)),
    f"{SKIP} during prefill": (SKIPPED, range(9)),
    "replace block layer 2 with identity": (("decoder", {2: None}), range(9)),
    EXCHANGE: (EXCHANGED, range(9)),
    f"{EXCHANGE} during prefill": (EXCHANGED, [0]),
    f"{EXCHANGE} during step 1..4": (EXCHANGED, range(1, 5)),
    f"{EXCHANGE} during step 2": (EXCHANGED, [2]),
    "replace block layer 0 with identity during step 2..4": (("decoder", {0: None}), range(2, 5)),
}
"""Line → its blocks, and the steps in which it acts."""


@torch.no_grad()
def reply(
    family: str, record: Record, cell: Cell, steps: Sequence[int]
) -> tuple[list[int], list[Array]]:
    """A reply with the library's cache, and the logits of each step.

    Blocks of the decoder compute keys of the encoder's output themselves.
    """
    module, own, found = model(family), starts(family), list[Array]()
    cache, ids = EncoderDecoderCache(DynamicCache(), DynamicCache()), list[int]()
    given: dict[str, Any] = {"input_ids": torch.tensor([text(record).ids])}
    if cell[0] == "encoder":
        with replaced(module, *cell):
            given = {"encoder_outputs": module.get_encoder()(**given)}
    else:
        given = {"encoder_outputs": module.get_encoder()(**given)}
    for step in range(TOKENS):
        pairs = cell[1] if cell[0] == "decoder" and step in steps else {}
        cross, before = cache.cross_attention_cache, dict[int, Any]()
        for to in pairs if step else ():
            before[to], cache.is_updated[to] = cross.layers[to], False
            cross.layers[to] = type(cross.layers[to])()
        with replaced(module, "decoder", pairs):
            output = module(
                **given,
                decoder_input_ids=torch.tensor([own]),
                past_key_values=cache,
                use_cache=True,
            )
        for to, layer in before.items():
            cross.layers[to] = layer
        found.append(output.logits[0, -1].double().numpy())
        ids.append(int(found[-1].argmax()))
        if step == 0 and 0 in steps and max(steps) == 0:  # its keys were those of the replacement
            for to in pairs:
                cache.is_updated[to] = False
                cross.layers[to] = type(cross.layers[to])()
        own = ids[-1:]
        if own[0] == module.config.eos_token_id:
            return ids[:-1], found
    return ids, found


@pytest.mark.parametrize("options", some(["planned", "plain"], ["planned"]))
@pytest.mark.parametrize("family", some(FAMILIES, FAMILIES[:2]))
def test_replies_with_replaced_blocks_equal_those_of_the_library(
    family: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = replies.record_logits(monkeypatch)
    body = "prompts p", f"generate {TOKENS}"
    lines = "".join(
        experiment(f"e{n}", *body, line, "measure length as raw")
        for n, line in enumerate(SCHEDULED)
    )
    found = run(family, lines, tmp_path, MODES[options])
    for number, (cell, acting) in enumerate(SCHEDULED.values()):
        made = found[f"e{number}"].replies
        expected = [reply(family, record, cell, acting) for record in ROWS]
        replies.check(made.cells[0], expected, steps)
        clean = [list(made.runs["clean"][n][0].ids) for n in range(len(ROWS))]
        assert clean != [ids for ids, _ in expected], number


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_measures_at_steps_with_replaced_blocks_equal_the_logits_of_generation(
    family: str, tmp_path: Path
) -> None:
    line = [SKIP, f"{SKIP} during prefill", EXCHANGE]
    lines = "".join(
        experiment(
            f"e{n}", "prompts p", f"generate {TOKENS}", own, "measure entropy at each step as raw"
        )
        for n, own in enumerate(line)
    )
    found = run(family, lines, tmp_path)
    for each, cell in zip(found.values(), (SKIPPED, SKIPPED, EXCHANGED), strict=True):
        for column, record in enumerate(ROWS):
            ids, scores = reply(family, record, cell, range(9))
            expected = [replies.entropy(own) for own in scores[: len(ids) or 1]]
            own = each.measures[0].patched[: len(expected), column]
            np.testing.assert_allclose(own, expected, atol=3e-4)


REJECTED = {
    "replace block cross layer 0 with identity": ("E0207", "`cross` is attention of the decoder's"),
    "replace block encoder layer 0 with block layer 1": ("E0207", "is in another stack"),
    "replace block encoder layer 2 with identity": ("E0302", "layer 2 does not exist"),
    "replace block layer 1 with identity  ablate z cross layer 1 head 0 at last token with zero": (
        "E0414",
        "z cross",
    ),
    f"{SKIP}  scale mlp_out encoder layer 0 at last token by 2": ("E0414", "mlp_out encoder"),
    f"generate 3  {SKIP} during step 1..2": (
        "E0207",
        "the encoder reads the prompt in the prefill",
    ),
    "generate 3  replace block layer 1 with identity during prefill": ("E0207", "without keys"),
    "ablate all but c at tokens * with zero  replace block layer 1 with block layer 0": (
        "E0108",
        "`replace block` together with a circuit",
    ),
}


@pytest.mark.parametrize(("line", "expected"), REJECTED.items())
def test_invalid_block_of_an_encoder_decoder_reports_the_code(
    line: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    before = "circuit c = L0H0 -> L1H0.q\n" if "all but c" in line else ""
    measure = "measure length as raw" if "generate" in line else DIFFERENCE
    lines = before + experiment("e", "prompts p", line.replace("  ", "\n  "), measure)
    _, found = try_file(lines, tmp_path, model("t5"), tokenizer=tokenizer())
    problems = [each for each in found if each.severity == "error"]
    assert problems[0].code == expected[0]
    assert expected[1] in problems[0].message


def test_conventions_name_position_biases_of_t5(tmp_path: Path) -> None:
    lines = experiment("e", "prompts p", SKIP, DIFFERENCE)
    said, other = (dict(run(name, lines, tmp_path)["e"].conventions) for name in ("t5", "umt5"))
    assert said["position biases"].startswith("block 0 computes them for all blocks of its stack")
    assert "position biases" not in other
    assert "all tokens of the prompt pass through the encoder's blocks" in said["blocks"]


def test_replaced_block_hits_the_tokens_of_its_stack(tmp_path: Path) -> None:
    lines = [SKIP, EXCHANGE]
    written = "".join(
        experiment(f"e{n}", "prompts p", line, DIFFERENCE) for n, line in enumerate(lines)
    )
    loaded, problems = adopt_model("m", model("t5"), tokenizer())
    assert loaded is not None, problems
    write_rows(tmp_path)
    checked = check_file(written, tmp_path, loaded)
    found = [each.rules[0].positions.written[()].hits for each in checked.experiments]
    counts = [sum(map(len, hits)) for hits in found[0]]
    assert sorted(counts) == sorted(len(text(row).ids) for row in ROWS)
    for count, encoded, decoded in zip(counts, *found, strict=True):
        assert [at for hit in encoded for at in hit] == list(range(count))
        assert [at for hit in decoded for at in hit] == [count]
