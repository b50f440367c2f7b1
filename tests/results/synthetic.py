"""Synthetic experiments with known effects."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.base.text import Source, Span
from mechdsl.program import spec
from mechdsl.resolve.cells import CellKey
from mechdsl.results.assembly.collection import add_statistics, add_verdicts
from mechdsl.results.experiment_result import ExperimentResult, Replies
from mechdsl.statistics.measurements import MeasureData, RandomControlValues
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import Reply

from ..parsing import parse

SPAN = Span(Source(""), 0, 0)


def statistics(**values: Any) -> spec.Statistics:
    return spec.Statistics(span=SPAN, **{"resamples": 1000, **values})


def report(kind: str, **values: Any) -> spec.Report:
    return spec.Report(span=SPAN, kind=kind, **values)


def expectation(line: str) -> spec.Expectation:
    """Build the expectation of `expect LINE`, as lowering does."""
    tree, diagnostics = parse(Source(f"mech 1\nexperiment e {{\n  expect {line}\n}}\n"))
    assert not diagnostics, diagnostics
    block = tree.statements[-1]
    assert isinstance(block, ast.ExperimentDef)
    found = block.statements[0]
    assert isinstance(found, ast.Expect)
    return spec.Expectation(
        span=found.span,
        text=line,
        condition=found.condition,
        top=found.top if isinstance(found.top, int) else None,
        contains=found.contains,
        on_mean=found.relaxed is not None,
        citing=found.citing.value if found.citing else None,
    )


def experiment(
    expects: tuple[str, ...] = (), name: str = "where", **values: Any
) -> spec.Experiment:
    return spec.Experiment(
        span=SPAN,
        name=name,
        model="toy",
        prompts="fruit",
        measures=(),
        statistics=statistics(**values),
        expects=tuple(expectation(line) for line in expects),
    )


def measure(patched: Any, base: Any, source: Any = None, **values: Any) -> MeasureData:
    patched = np.asarray(patched, dtype=np.float64)
    given: dict[str, Any] = {
        "label": "ld",
        "metric": "logit(answer) - logit(wrong)",
        "effect": "recovery" if source is not None else "delta",
        "kind": "number",
        "per_prompt": False,
        "inert": np.zeros(len(patched), dtype=bool),
        "unit": "logit",
        **values,
    }
    call = re.fullmatch(r"(\w+)(\([^()]*\))?", given["metric"])
    return MeasureData(
        word=call[1] if call else "",
        patched=patched,
        base=np.atleast_2d(np.asarray(base, dtype=np.float64)),
        source=None if source is None else np.atleast_2d(np.asarray(source, dtype=np.float64)),
        **given,
    )


def heads(layers: int = 3, count: int = 4, prompts: int = 64, seed: int = 0) -> ExperimentResult:
    """A sweep over heads: L2H1 recovers 60 %, L1H3 takes 20 % away, layer 0 is inert."""
    random = np.random.default_rng(seed)
    base = random.normal(-2.0, 1.0, (1, prompts))
    source = base + random.normal(5.0, 1.0, (1, prompts))
    true = np.zeros((layers, count))
    true[2, 1], true[1, 3] = 0.6, -0.2
    places = list(itertools.product(range(layers), range(count)))
    share = np.array([true[place] for place in places])[:, None]
    noise = random.normal(0, 0.15, (len(places), prompts))
    patched = base + share * (source - base) + noise
    inert = np.array([layer == 0 for layer, _ in places])
    patched[inert] = base
    return ExperimentResult(
        name="where",
        model="toy",
        axes=("layer", "head"),
        cells=tuple(
            CellKey({"layer": a, "head": b}, f"L{a}H{b}.z", "last-item token", ("fig", "plum"))
            for a, b in places
        ),
        measures=(measure(patched, base, source, inert=inert),),
        runs={"clean": {"ld": source[0]}, "fewer": {"ld": base[0]}},
        accuracy={
            "clean": (np.arange(prompts) % 16 > 0).astype(np.float64),
            "fewer": np.ones(prompts),
        },
        base="fewer",
        source="clean",
        conventions={
            "dtype": "float32",
            "rows": f"{prompts} of 120 kept",
            "answer": "tokenised as the prompt's continuation; a leading token that all answers "
            "share is moved into the prompt",
        },
        hashes={"model": "sha256:1", "data": "sha256:2"},
        row_ids=tuple(range(prompts)),
        row_values={"count": [2 + i % 3 for i in range(prompts)]},
    )


def positions(layers: int = 4, prompts: int = 48) -> ExperimentResult:
    """A sweep over layers and positions with long names."""
    random = np.random.default_rng(3)
    base = random.normal(-2.0, 1.0, (1, prompts))
    source = base + random.normal(5.0, 1.0, (1, prompts))
    names = ["first-item of part1 token", "last-item of part1 token", "last token"]
    places = list(itertools.product(range(layers), names))
    share = np.array(
        [[0.0, max(0.0, 0.9 - 0.3 * a), a / (layers - 1)][names.index(p)] for a, p in places]
    )
    patched = (
        base + share[:, None] * (source - base) + random.normal(0, 0.3, (len(places), prompts))
    )
    return replace(
        heads(prompts=prompts),
        name="where_is_the_count",
        axes=("layer", "position"),
        aliases={"item": "position"},
        cells=tuple(
            CellKey({"layer": a, "position": p}, f"L{a}.resid_post", p, ("apple", "pear", "plum"))
            for a, p in places
        ),
        measures=(
            measure(
                patched,
                base,
                source,
                label="logit(answer) - logit(answer of fewer)",
                metric="logit(answer) - logit(answer of fewer)",
            ),
        ),
        runs={},
        accuracy={},
    )


def wrote() -> ExperimentResult:
    """Three prompts with two samples each; one cell lacks the second prompt."""

    def reply(text: str, ended: Literal["end", "stop", "length", "broken"] = "end") -> Reply:
        return Reply(tuple(range(len(text.split()))), text, ended)

    refusal = "i can not help with that"
    base = {row: (reply(refusal), reply(f"no , {refusal}", "stop")) for row in (4, 7, 9)}
    softer = {row: (reply("i can help with that"), base[row][1]) for row in (4, 9)}
    comply = {row: (reply(" sure , take the knife", "length"), reply("")) for row in (4, 7, 9)}
    source = {row: (reply("sure"), reply("yes", "broken")) for row in (4, 7, 9)}
    places = itertools.product(range(2), range(2))
    cells = tuple(
        CellKey({"layer": a, "head": b}, f"L{a}H{b}.z", "last token", (":",)) for a, b in places
    )
    made = measure(np.zeros((4, 3)), np.zeros(3), label="exact_match", metric="exact_match")
    return replace(
        heads(prompts=3),
        name="refusals",
        measures=(made,),
        runs={},
        accuracy={},
        base="clean",
        source="harmless",
        row_ids=(4, 7, 9),
        cells=cells,
        replies=Replies(
            (base, softer, comply, base),
            {"clean": base, "harmless": source},
            {row: f"user : how do i {row} ?\nassistant :" for row in (4, 7, 9)},
        ),
    )


def finished(result: ExperimentResult, *expects: str, **values: Any) -> ExperimentResult:
    said = experiment(expects, result.name, **values)
    return add_verdicts(add_statistics(result, said, seed=0), said)


def with_controls(result: ExperimentResult, draws: int = 39) -> ExperimentResult:
    """Add random-control draws with effects around 0 to every measure."""
    random = np.random.default_rng(5)
    values: list[Floats] = []
    for data in result.measures:
        cells = len(result.cells)
        effects = np.linspace(-0.12, 0.12, draws)[:, None] + random.normal(0.0, 0.02, cells)
        unit = 1.0
        if data.effect == "recovery":
            assert data.source is not None
            unit = float((data.source - data.base).mean())
        drawn = data.base + unit * effects[:, :, None]
        values.append(np.where(np.isnan(data.patched), np.nan, drawn))
    counts = np.full(len(result.cells), draws)
    return replace(result, drawn=RandomControlValues(tuple(values), counts, draws, "random heads"))


def counted(layers: int = 3, items: int = 6, prompts: int = 96) -> ExperimentResult:
    """Patching item k makes later layers answer k: a number and a category over layer and item."""
    random = np.random.default_rng(7)
    count = 2 + np.arange(prompts) % (items - 1)
    places = list(itertools.product(range(layers), range(1, items + 1)))
    guess = np.full((len(places), prompts), np.nan)
    for cell, (layer, item) in enumerate(places):
        right = random.random(prompts) < (layer + 1) / layers * 0.85
        other = np.clip(item + random.integers(-2, 3, prompts), 1, 9)
        guess[cell] = np.where(count >= item, np.where(right, item, other), np.nan)
    numbers = np.array([[item] for _, item in places])
    prob = np.clip((guess == numbers) * 0.7 + random.random(guess.shape) * 0.2, 0, 1)
    prob[np.isnan(guess)] = np.nan
    given: dict[str, Any] = {"effect": "raw", "unit": ""}
    base = np.zeros(prompts)
    named = [f"item {item} token" for _, item in places]
    return replace(
        heads(prompts=prompts),
        name="countscope",
        axes=("layer", "position"),
        aliases={"item": "position"},
        cells=tuple(
            CellKey({"layer": a, "position": name}, f"L{a}.resid_post", name, ("apple", "pear"))
            for (a, _), name in zip(places, named, strict=True)
        ),
        measures=(
            measure(prob, base, label='prob(" {item.index}")', metric="prob", **given),
            measure(
                guess,
                count,
                label="argmax(1..9)",
                metric="argmax(1..9)",
                kind="category",
                truth=count[None].astype(np.float64),
                **given,
            ),
        ),
        runs={},
        accuracy={},
        row_values={"count": count.tolist()},
    )


def read_tokens(layers: int = 1, prompts: int = 24) -> ExperimentResult:
    """A sweep over all tokens of prompts of two lengths, from the right."""
    random = np.random.default_rng(9)
    fruits = ["apple", "pear", "plum", "fig", "kiwi"]
    lists = [[f" {fruits[(i + k) % 5]}" for k in range(2 + i % 3)] for i in range(prompts)]
    texts = tuple(("Part", " 1", ":", *each, " Count", " 1", ":") for each in lists)
    longest = max(map(len, texts))
    labels = list(range(-longest, 0))
    places = list(itertools.product(range(layers), labels))
    base = random.normal(-2.0, 0.5, (1, prompts))
    source = base + 4.0
    share = np.array([0.8 if p == -4 else 0.2 if p == -1 else 0.0 for _, p in places])[:, None]
    patched = base + share * 4.0 + random.normal(0, 0.3, (len(places), prompts))
    hits: list[tuple[tuple[int, ...], ...]] = []
    for cell, (_, label) in enumerate(places):
        inside = [len(text) + label >= 0 for text in texts]
        patched[cell, [not each for each in inside]] = np.nan
        hits.append(
            tuple(
                (len(text) + label,) if each else ()
                for text, each in zip(texts, inside, strict=True)
            )
        )
    return replace(
        heads(prompts=prompts),
        name="every_token",
        axes=("layer", "position") if layers > 1 else ("position",),
        cells=tuple(
            CellKey(
                {"layer": a, "position": p} if layers > 1 else {"position": p},
                f"L{a}.resid_post",
                str(p),
            )
            for a, p in places
        ),
        measures=(measure(patched, base, source),),
        runs={},
        accuracy={},
        texts=texts,
        hits=tuple(hits),
    )


def swept(
    rows: int = 12,
    columns: int = 12,
    *,
    scale: float = 0.6,
    words: bool = False,
    gaps: bool = False,
    prompts: int = 24,
) -> ExperimentResult:
    """Layers by heads, or by positions with long names, with effects on the diagonal.

    scale: the largest effect. words: the columns are positions. gaps: cells are left out, others
    have few prompts or none.
    """
    random = np.random.default_rng(11)
    axis = "position" if words else "head"
    names: list[Any] = list(range(columns))
    if words:
        ends = ["first-item of part1 token", "last token", "subject token of the other sentence"]
        names = [f"{ends[n % 3]} {n}" if n % 3 != 1 else f"token {n}" for n in names]
    places = [
        (row, column)
        for row, column in itertools.product(range(rows), range(columns))
        if not gaps or not row or (row + column) % 5
    ]
    base = random.normal(0.0, scale, (1, prompts))
    effect = [scale * ((-1) ** row if row % columns == column else 0.02) for row, column in places]
    noise = random.normal(0.0, scale / 20, (len(places), prompts))
    patched = base + np.array(effect)[:, None] + noise
    if gaps:
        patched[::7, 4:] = np.nan
        patched[5::23] = np.nan
    cells = [
        CellKey(
            {"layer": row, axis: names[column]},
            f"L{row}.resid_post" if words else f"L{row}H{column}.z",
            str(names[column]) if words else "last token",
            ("fig", "plum"),
        )
        for row, column in places
    ]
    return replace(
        heads(prompts=prompts),
        name="swept",
        axes=("layer", axis),
        cells=tuple(cells),
        measures=(measure(patched, base),),
        runs={},
        accuracy={},
        source=None,
        conventions={},
    )
