"""Calls of the Python interface that type checkers accept, and calls that they reject.

`make lint` checks this file: an ignored error that isn't reported is an error itself.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import torch

import mechdsl
from mechdsl.show.output import PlanText, PrintedText


def margin(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0]


def with_rows(logits: torch.Tensor, rows: list[dict[str, Any]]) -> list[float]:
    return [float(row["count"]) for row in rows]


def halved(vectors: torch.Tensor) -> torch.Tensor:
    return vectors * 0.5


def accepted(path: Path, model: Any, tokenizer: Any) -> None:
    results = mechdsl.run(
        path,
        {"toy": (model, tokenizer)},
        metrics={"margin": margin, "own": with_rows},
        rules={"halved": halved, "same": lambda vectors: vectors},
        set={"depth": 1, "name": "x", "share": 0.5, "flag": True},
        store=False,
        against="last",
    )
    assert_type(results, mechdsl.Results)
    assert_type(results["heads"], mechdsl.ExperimentResult)
    mechdsl.run(path, against=results, store="store")
    mechdsl.validate("mech 1", metrics={"margin": margin}, rules={"halved": halved})
    assert_type(mechdsl.validate(path), mechdsl.Diagnostics)
    assert_type(mechdsl.plan(path, rules={"halved": halved}), PlanText)
    assert_type(mechdsl.graph(path), PrintedText)
    assert_type(mechdsl.graph(path, format="text"), PrintedText)
    assert_type(mechdsl.graph(path, format="svg"), PrintedText)
    assert_type(mechdsl.explain(path, format="json"), PrintedText)
    assert_type(mechdsl.diff("last", results), mechdsl.Differences)
    assert_type(mechdsl.runs()[0].results, mechdsl.Results)
    results.plot("heatmap", measure="recovery")
    results.plot("heatmap", width=1)
    results["heads"].plot("heatmap", "layer", by="head")
    results["heads"].plot("lines", "layer", measure="recovery")
    results["heads"].plot("overlay", top=3)


def rejected(path: Path, results: mechdsl.Results) -> None:
    mechdsl.run(3)  # pyright: ignore[reportArgumentType]
    mechdsl.run(path, metrics={"margin": 3})  # pyright: ignore[reportArgumentType]
    mechdsl.run(path, rules={"halved": with_rows})  # pyright: ignore[reportArgumentType]
    mechdsl.run(path, set={"depth": [1]})  # pyright: ignore[reportArgumentType]
    mechdsl.run(path, store=True)  # pyright: ignore[reportArgumentType]
    mechdsl.run(path, alow_python=True)  # pyright: ignore[reportCallIssue]
    mechdsl.graph(path, format="png")  # pyright: ignore[reportArgumentType]
    mechdsl.explain(path, format="svg")  # pyright: ignore[reportArgumentType]
    results.plot("heatmp")  # pyright: ignore[reportCallIssue, reportArgumentType]
    results["heads"].plot("heatmap", top=3)  # pyright: ignore[reportArgumentType]
    results["heads"].plot("overlay", "layer")  # pyright: ignore[reportArgumentType]
