"""Made-up experiments with effects that are known."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from mechdsl import spec
from mechdsl.results.cell import CellKey
from mechdsl.results.data import MeasureData
from mechdsl.results.experiment import ExperimentResult
from mechdsl.source import Source, Span
from mechdsl.syntax import ast
from mechdsl.syntax.parse import parse
from mechdsl.tabulate import with_statistics, with_verdicts

SPAN = Span(Source(""), 0, 0)


def statistics(**values: Any) -> spec.Statistics:
    return spec.Statistics(span=SPAN, **{"resamples": 1000, **values})


def report(kind: str, **values: Any) -> spec.Report:
    return spec.Report(span=SPAN, kind=kind, **values)


def expectation(line: str) -> spec.Expectation:
    """What `expect LINE` says, as lowering builds it."""
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
    return MeasureData(
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


def finished(result: ExperimentResult, *expects: str, **values: Any) -> ExperimentResult:
    said = experiment(expects, result.name, **values)
    return with_verdicts(with_statistics(result, said, seed=0), said)
