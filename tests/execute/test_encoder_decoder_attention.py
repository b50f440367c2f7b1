"""Scores and patterns of encoder-decoders, against attention computed from the bare model's
projections for one unpadded prompt."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from .encoder_decoders import (
    ENCODER_LAYERS,
    HEADS,
    LAYERS,
    WITH_SECOND,
    cases,
    copied,
    difference,
    logits,
    model,
    name_of,
    place,
    read_attention,
    run,
    starts,
    text,
    tokenizer,
    written,
    written_query,
    zeroed,
)
from .support import DIFFERENCE, ROWS, WITHOUT_PLAN, Record, experiment, try_file

FAMILIES = ("t5", "bart", "t5gemma")


def units(stack: str) -> Iterator[tuple[int, int]]:
    """Layers and heads in the order of cells."""
    return product(range(ENCODER_LAYERS if stack == "encoder" else LAYERS), range(HEADS))


def last_query(family: str, stack: str, record: Record, name: str = "clean") -> int:
    return text(record, name).last if stack == "encoder" else len(starts(family)) - 1


def effect(family: str, record: Record, changes: AbstractContextManager[None]) -> float:
    """The change of the logit difference."""
    base = text(record)
    with changes:
        changed = logits(family, base)
    return difference(changed, record) - difference(logits(family, base), record)


def patched(
    family: str, site: str, stack: str, layer: int, head: int, record: Record
) -> AbstractContextManager[None]:
    """The last query's vector over keys of the other run."""
    source = read_attention(family, text(record, "other"), site, stack, layer)
    vector = source[head, last_query(family, stack, record, "other")]
    query = last_query(family, stack, record)
    return written_query(family, site, stack, layer, head, query, lambda _: vector)


SITES = ["pattern encoder", "scores cross", "pattern", "scores encoder", "pattern cross", "scores"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", some(SITES, SITES[:3]))
def test_patched_queries_equal_explicit_attention(family: str, site: str, tmp_path: Path) -> None:
    """Two experiments of one file."""
    (component, _, stack), where = site.partition(" "), "layer * head * at last token"
    line, scaled = f"patch {site} {where}", f"scale {site} {where} by 0.5"
    lines = experiment("e", "prompts p", "from other into clean", line, DIFFERENCE)
    lines += experiment("n", "prompts p", scaled, DIFFERENCE)
    found = run(family, lines, tmp_path)
    for name in ("e", "n"):
        expected = []
        for layer, head in units(stack):
            row = []
            for record in ROWS:
                query = last_query(family, stack, record)
                halved = written_query(
                    family, component, stack, layer, head, query, lambda own: 0.5 * own
                )
                change = patched(family, component, stack, layer, head, record)
                row.append(effect(family, record, change if name == "e" else halved))
            expected.append(row)
        measure = found[name].measures[0]
        np.testing.assert_allclose(measure.patched - measure.base, expected, atol=2e-4)
        if stack:
            assert np.abs(expected).max() > 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_rows_equal_single_passes(family: str, tmp_path: Path) -> None:
    lines = "".join(
        experiment(f"e{number}", "prompts p", "from other into clean", line, DIFFERENCE)
        for number, line in enumerate((
            "patch pattern encoder layer * head * at subject token",
            "patch scores cross layer * head * at last token",
            "freeze pattern cross layers * heads * at last token\n"
            "  patch resid_post encoder layer 0 at subject token",
        ))
    )  # fmt: skip
    planned, plain = (run(family, lines, tmp_path, each) for each in (None, WITHOUT_PLAN))
    for name, found in planned.items():
        given, expected = found.measures[0].patched, plain[name].measures[0].patched
        np.testing.assert_allclose(given, expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_act_together_with_heads_and_blocked_edges(family: str, tmp_path: Path) -> None:
    lines = (
        "prompts p",
        "from other into clean",
        "patch pattern encoder layer 1 head 0 at last token",
        "block attention cross layer 1 head 1 from last token to subject tokens",
        "patch scores cross layer 2 head 0 at last token",
        "patch v cross layer 0 head 1 at last token",
        DIFFERENCE,
    )
    measure = run(family, experiment("e", *lines), tmp_path)["e"].measures[0]
    expected = []
    for record in ROWS:
        base, source = text(record), text(record, "other")
        own = place(family, "v cross", 0, 1)
        vectors = copied(family, source, own, [base.last], [source.last])
        query = last_query(family, "cross", record)

        def hide(weights: Tensor, keys: Any = base.subject) -> Tensor:
            weights[list(keys)] = 0
            return weights / weights.sum()

        changes = [
            patched(family, "pattern", "encoder", 1, 0, record),
            patched(family, "scores", "cross", 2, 0, record),
            written_query(family, "pattern", "cross", 1, 1, query, hide),
        ]
        with ExitStack() as opened:
            for change in changes:
                opened.enter_context(change)
            changed = logits(family, base, [vectors])
        expected.append(difference(changed, record) - difference(logits(family, base), record))
    np.testing.assert_allclose((measure.patched - measure.base)[0], expected, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["q", "k"])
def test_queries_and_keys_after_rotary_equal_hooks(family: str, site: str, tmp_path: Path) -> None:
    """Both runs have the same positions, so a copied vector is rotated by the same angle."""
    line = f"patch {site}_rot layer * head * at last token"
    lines = experiment("e", "prompts p", "from other into clean", line, DIFFERENCE)
    measure = run(family, lines, tmp_path)["e"].measures[0]
    last, expected = len(starts(family)) - 1, []
    for layer, head in units(""):
        row = []
        for record in ROWS:
            own, source = place(family, site, layer, head), text(record, "other")
            changed = logits(family, text(record), [copied(family, source, own, [last], [last])])
            row.append(difference(changed, record))
        expected.append(row)
    np.testing.assert_allclose(measure.patched, expected, atol=2e-4)


@contextmanager
def sees(family: str, layer: int, heads: Sequence[int], query: int, key: int) -> Generator[None]:
    """Own attention of the decoder, with a mask that shows one later key to some heads."""
    count = len(starts(family))

    def show(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if (args[0] if args else kwargs["hidden_states"]).shape[1] != count:  # a later step
            return args, kwargs
        hidden = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)
        mask = hidden.repeat(1, HEADS, 1, 1)
        mask[0, list(heads), query, key] = 0
        word = "mask" if name_of(family) == "t5" else "attention_mask"
        return args, {**kwargs, word: mask}

    path = place(family, "z", layer).path.rpartition(".")[0]
    handle = model(family).get_submodule(path).register_forward_pre_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", cases(["bart", *WITH_SECOND]))
def test_allowed_keys_of_the_decoder_equal_a_mask_on_the_bare_model(
    family: str, tmp_path: Path
) -> None:
    """Decoders begin with two tokens. In two experiments, with a rule in the encoder and a blocked
    edge to it."""
    edge = "from first token to last token"
    others = (
        "ablate resid_post encoder layer 0 at subject token with zero",
        "block attention cross layer 1 head 1 from last token to subject tokens",
    )
    lines = experiment(
        "e", "prompts p", f"allow attention layer * head * {edge}", DIFFERENCE
    ) + experiment("n", "prompts p", *others, f"allow attention layers 0..1 {edge}", DIFFERENCE)
    found = run(family, lines, tmp_path)
    expected = [
        [effect(family, record, sees(family, layer, [head], 0, 1)) for record in ROWS]
        for layer, head in units("")
    ]
    measure = found["e"].measures[0]
    np.testing.assert_allclose(measure.patched - measure.base, expected, atol=2e-5)
    assert np.abs(expected).max() > 0.01
    together = []
    for record in ROWS:
        base = text(record)
        removed = zeroed(place(family, "resid_post encoder", 0), base.subject[-1:])

        def hide(weights: Tensor, keys: Any = base.subject) -> Tensor:
            weights[list(keys)] = 0
            return weights / weights.sum()

        with ExitStack() as opened:
            for layer in (0, 1):
                opened.enter_context(sees(family, layer, range(HEADS), 0, 1))
            opened.enter_context(written_query(family, "pattern", "cross", 1, 1, 1, hide))
            together.append(difference(logits(family, base, [removed]), record))
    np.testing.assert_allclose(found["n"].measures[0].patched[0], together, atol=2e-5)


IMPOSSIBLE = {
    "bart": {
        "allow attention encoder layer 0 from first token to last token": "E0332",
        "allow attention cross layer 0 from last token to subject token": "E0332",
        "allow attention layer 0 from last token to first token": "E0332",
        "block attention layer 0 from last token to tokens *": "E0332",
    },
    "t5": {
        "allow attention layer 0 from first token to last token": "E0332",
        "block attention layer 0 from last token to last token": "E0332",
    },
    "t5gemma": {"allow attention encoder layer 0 from first token to last token": "E0108"},
}


@pytest.mark.parametrize("family", IMPOSSIBLE)
def test_edges_that_a_stack_cannot_change_report_the_code(family: str, tmp_path: Path) -> None:
    for line, code in IMPOSSIBLE[family].items():
        lines = experiment("e", "prompts p", line, DIFFERENCE)
        _, found = try_file(lines, tmp_path, model(family), None, tokenizer=tokenizer())
        assert [each.code for each in found if each.severity == "error"] == [code], line


BLOCKS_IN_STEPS = {
    "from last token to first token": "E0332",
    "from last token to first token during prefill": "E0332",
    "from last token to first token during step 1..2": None,
    "from last token to last token during step 1..2": None,
    "from last token to tokens * during step 1..2": "E0332",
}


def test_block_of_the_only_key_in_the_prompt_reports_e0332_only_in_the_prefill(
    tmp_path: Path,
) -> None:
    """T5's decoder begins with one token; in step 1, it reads two."""

    def codes(line: str) -> list[str]:
        lines = experiment("e", "prompts p", "generate 3", line, "measure length as raw")
        _, found = try_file(lines, tmp_path, model("t5 writing"), None, tokenizer=tokenizer())
        return [each.code for each in found if each.severity == "error"]

    for edges, code in BLOCKS_IN_STEPS.items():
        assert codes(f"block attention layer 0 {edges}") == ([] if code is None else [code]), edges
    for first, code in ((0, ["E0332"]), (1, [])):
        line = "block attention layer 0 from last token to first token during step s"
        assert codes(f"for s in {first}..2 {{ {line} }}") == code


OBSERVED = {
    "entropy encoder": "observe entropy pattern encoder layer * head * at last token",
    "entropy cross": "observe entropy pattern cross layer * head * at last token",
    "distance encoder": "observe distance pattern encoder layer * head * at last token",
    "distance(2) encoder": "observe distance(2) pattern encoder layer * head * at last token",
    "distance": "observe distance pattern layer * head * at last token",
    "received encoder": "observe received pattern encoder layer * head * at last token",
    "received(1..2) encoder": "observe received(1..2) pattern encoder layer * head * at last token",
    "norm scores cross": "observe norm scores cross layer * head * at last token",
}


def observed(name: str, family: str, layer: int, head: int, record: Record) -> float:
    stack = next((each for each in ("encoder", "cross") if each in name), "")
    of, site = text(record), "scores" if "scores" in name else "pattern"
    values = read_attention(family, of, site, stack, layer)[head]
    query = last_query(family, stack, record)
    keys = torch.arange(values.shape[1])
    away = (query - keys).abs()
    if name.startswith("entropy"):
        return float(torch.special.entr(values[query]).sum())
    if name.startswith("norm"):
        return float(values[query].norm())
    if name.startswith("distance"):
        return float((values[query] * (away.clamp(max=2) if "(2)" in name else away)).sum())
    near = (away > 0) & (away <= (2 if "(1..2)" in name else 99))
    return float(values[near, query].mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_observed_patterns_equal_explicit_attention(family: str, tmp_path: Path) -> None:
    lines = "".join(
        experiment(f"e{number}", "prompts p", line) for number, line in enumerate(OBSERVED.values())
    )
    found = run(family, lines, tmp_path)
    for number, name in enumerate(OBSERVED):
        stack = next((each for each in ("encoder", "cross") if each in name), "")
        expected = [
            [observed(name, family, *unit, record) for record in ROWS] for unit in units(stack)
        ]
        given = found[f"e{number}"].measures[0].patched
        np.testing.assert_allclose(given, expected, atol=1e-4, err_msg=name)


def entropies(family: str, record: Record) -> list[float]:
    """Those of the distributions at each step of a reply."""
    reply, found = written(family, text(record), count=4)
    steps = [torch.tensor(each).log_softmax(-1) for each in found[: len(reply) or 1]]
    return [float(-(each.exp() * each).sum()) for each in steps]


@pytest.mark.parametrize("family", ["bart writing", "t5 forced"])
def test_allowed_keys_of_a_prefill_equal_the_cached_model(family: str, tmp_path: Path) -> None:
    """The first token, which sees the second one in the first pass, is cached for later steps."""
    rule = "allow attention layers * from first token to last token"
    lines = ("prompts p", "generate 4", rule, "measure entropy at each step as raw")
    measure = run(family, experiment("e", *lines), tmp_path)["e"].measures[0]
    moved = 0.0
    for row, record in enumerate(ROWS):
        with ExitStack() as opened:
            for layer in range(LAYERS):
                opened.enter_context(sees(family, layer, range(HEADS), 0, 1))
            expected = entropies(family, record)
        given = measure.patched[: len(expected), row]
        np.testing.assert_allclose(given, expected, atol=2e-5)
        moved = max(moved, abs(expected[-1] - entropies(family, record)[len(expected) - 1]))
    assert moved > 1e-3
