"""Metrics passed as Python functions."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

import mechdsl

from ..fruit import FRUIT

FILE = (
    FRUIT
    + """
experiment heads {
  model toy
  prompts fruit limit 8
  from clean into fewer
  patch layer 0 head * at last-item token
  measure spread as raw
  measure entropy as raw
}
"""
)


def entropy_of(logits: Any) -> Any:
    probabilities = logits.softmax(-1)
    return -(probabilities * probabilities.log()).sum(-1)


class Scaled:
    def __call__(self, logits: Any) -> Any:
        return entropy_of(logits)


def values(results: mechdsl.Results) -> list[Any]:
    return [measure.patched for measure in results["heads"].measures]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "heads.mech"
    path.write_text(FILE, encoding="utf-8")
    return path


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_callable_metric_equals_the_metric_of_the_language(file: Path) -> None:
    results = mechdsl.run(file, metrics={"spread": entropy_of}, store=False)
    given, own = values(results)
    assert np.allclose(given, own, atol=1e-5)
    assert "SHA-256" in results["heads"].conventions["python"]


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_store_key_depends_on_the_code_of_a_metric(file: Path) -> None:
    def run(metric: Any) -> mechdsl.Results:
        return mechdsl.run(file, metrics={"spread": metric}, store=file.parent / "store")

    first = run(lambda logits: logits[:, 0])
    again = run(lambda logits: logits[:, 0])
    other = run(lambda logits: logits[:, 1])
    assert not any("unchanged since" in note for note in first.notes)
    assert any("unchanged since" in note for note in again.notes), again.notes
    assert not any("unchanged since" in note for note in other.notes)
    assert np.array_equal(values(first)[0], values(again)[0])
    assert not np.array_equal(values(first)[0], values(other)[0])


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_store_key_depends_on_the_closure_of_a_metric(file: Path) -> None:
    def shifted_by(shift: float) -> Any:
        def shifted(logits: Any, rows: Any) -> Any:
            assert len(rows) == len(logits)
            return logits[:, 0] + shift

        return shifted

    def run(shift: float) -> mechdsl.Results:
        return mechdsl.run(file, metrics={"spread": shifted_by(shift)}, store=file.parent / "store")

    first, other = run(0.0), run(1.0)
    assert not any("unchanged since" in note for note in other.notes)
    assert np.allclose(values(other)[0], values(first)[0] + 1)


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_unhashable_metric_is_never_stored(file: Path) -> None:
    for _ in range(2):
        results = mechdsl.run(file, metrics={"spread": Scaled()}, store=file.parent / "store")
        assert any("nothing of it is stored" in note for note in results.notes)
        assert "never stored" in results["heads"].conventions["python"]
    assert mechdsl.runs(file.parent / "store") == []


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_callable_metric_replaces_the_definition_in_the_file(file: Path) -> None:
    line = "metric spread = logit(answer)\n\nexperiment heads"
    text = FILE.replace("experiment heads", line)
    given, own = values(mechdsl.run(text, metrics={"spread": entropy_of}))
    assert np.allclose(given, own, atol=1e-5)


def test_exception_in_a_metric_names_the_metric(file: Path) -> None:
    def broken(logits: Any) -> Any:
        raise ValueError("no such thing")

    only = FILE.replace("  measure entropy as raw\n", "")
    with pytest.raises(mechdsl.MechdslError) as raised:
        mechdsl.run(only, metrics={"spread": broken})
    assert 'metrics["spread"]' in str(raised.value)


def test_metric_that_is_not_callable_raises_type_error(file: Path) -> None:
    with pytest.raises(TypeError, match="metrics are a dict of functions"):
        mechdsl.run(file, metrics={"spread": 3})  # type: ignore[dict-item]


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_run_in_second_thread_waits_for_first(file: Path) -> None:
    """Attention functions and hooks of a run belong to the process."""
    order: list[str] = []

    def second(logits: Any) -> Any:
        order.append("second")
        return entropy_of(logits)

    def first(logits: Any) -> Any:
        if not order:
            other.start()
            time.sleep(0.3)
        order.append("first")
        return entropy_of(logits)

    def run(metric: Any) -> None:
        found.append(values(mechdsl.run(file, metrics={"spread": metric}, limit=2, store=False)))

    found: list[list[Any]] = []
    other = Thread(target=run, args=(second,))
    run(first)
    other.join()
    assert order == sorted(order)
    for own, same in zip(*found, strict=True):
        np.testing.assert_array_equal(own, same)


def test_failure_of_a_callable_metric_names_its_line(file: Path) -> None:
    """Once, with the line of the function."""

    def fails(logits: Any) -> Any:
        return logits.sum() / {}["nothing"]  # this line

    with pytest.warns(mechdsl.MechdslWarning, match="E0223") as warned:
        mechdsl.run(file, metrics={"spread": fails}, store=False)
    found = [str(each.message) for each in warned if "E0223" in str(each.message)]
    assert len(found) == 1
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = next(n for n, text in enumerate(lines, 1) if text.endswith("# this line"))
    assert f'passed as `metrics["spread"]`, at test_metrics.py:{line}, in' in found[0]
