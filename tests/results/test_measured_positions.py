"""Measures that differ only by position are distinguished in names, JSON and expectations."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

import mechdsl
from mechdsl.base.text import measure_names
from mechdsl.diagnostics.syntax import RepeatedStatement
from mechdsl.show.output import show_report

from ..fruit import head

TEXT = (
    head("corrupt fewer { count = count - 1 }").replace("count in 3..9", "count in 4..9")
    + """
metric ld = logit(" 3")

experiment read {
  model toy
  prompts fruit limit 16
  from clean into fewer
  patch resid_post layer 1..2 at last token
  measure ld at item 1 token as raw
  measure ld at item  2 token as raw
  measure prob(answer) at last token as delta
  report table
EXPECT
}
"""
)


def text(*expects: str, **replaced: str) -> str:
    found = TEXT.replace("EXPECT", "\n".join(f"  expect {each}" for each in expects))
    for old, new in replaced.items():
        found = found.replace(old, new)
    return found


@pytest.fixture(scope="module")
def results() -> mechdsl.Results:
    return mechdsl.run(text())


def test_labels_have_the_position_only_if_it_distinguishes_them(results: mechdsl.Results) -> None:
    (found,) = results.files[0].experiments
    labels = [each.label for each in found.measures]
    assert labels == ["ld at item 1 token", "ld at item 2 token", "prob(answer)"]
    assert [each.at for each in found.measures] == ["item 1 token", "item 2 token", "last token"]
    assert found.conventions["measured"] == (
        "`ld` at `item 1 token` and `item 2 token`; `prob(answer)` at `last token`"
    )
    out = io.StringIO()
    show_report(found, found.reports[0], Console(file=out, width=120))
    assert "read: ld at item 1 token\n" in out.getvalue()
    assert "read: ld at item 2 token\n" in out.getvalue()


def test_unpatched_runs_keep_measures_of_both_positions(results: mechdsl.Results) -> None:
    """Regression: two measures of one name were merged."""
    document = json.loads(results.to_json())["files"][0]["experiments"][0]
    alone = {
        item: mechdsl.run(
            re.sub(rf"\n  measure ld at item +{3 - item} token as raw", "", text())
        ).files[0].experiments[0]
        for item in (1, 2)
    }  # fmt: skip
    for run in ("clean", "fewer"):
        found = {each["label"]: each for each in document["runs"][run]}
        for item, other in alone.items():
            each = found[f"ld at item {item} token"]
            assert each["at"] == f"item {item} token"
            assert each["mean"] == pytest.approx(other.runs[run]["ld"].mean(), abs=1e-5)
    means = [each["mean"] for each in document["runs"]["clean"][:2]]
    assert abs(means[0] - means[1]) > 0.5
    for cell in document["cells"]:
        at = [each.get("at") for each in cell["measures"]]
        assert at == ["item 1 token", "item 2 token", "last token"]


def test_measure_without_a_position_has_none_in_json(results: mechdsl.Results) -> None:
    plain = TEXT.replace("EXPECT", "").replace("prob(answer) at last token", "prob(answer)")
    (found,) = mechdsl.run(plain).files[0].experiments
    document = json.loads(mechdsl.run(plain).to_json())["files"][0]["experiments"][0]
    assert found.measures[2].at is None
    assert "at" not in document["cells"][0]["measures"][2]


def refused(source: str) -> str:
    with pytest.raises(mechdsl.MechdslError) as caught:
        mechdsl.run(source)
    (problem,) = [each for each in caught.value.diagnostics if each.code[0] == "E"]
    assert problem.code == "E0605"
    return problem.help_text


NAMED = re.compile(r"add `(metric (\w+) = .*?)` and `measure \2 …`, then write `(.*?)`")


RATIOS = "logprob(answer) as relative\n  measure logprob(answer) as relative per prompt"


@pytest.mark.parametrize(
    ("expect", "metric", "line"),
    [
        ("max(raw of ld) > -50", "ld", "at item  2 token as raw"),
        ("max(ld) > -50", "ld", "at item  2 token as raw"),
        ("max(relative) > -50", "logprob(answer)", "as relative per prompt"),
    ],
)
def test_fix_in_the_ambiguity_message_works(expect: str, metric: str, line: str) -> None:
    written = text(expect).replace("prob(answer) at last token as delta", RATIOS)
    found = NAMED.search(refused(written))
    assert found is not None
    above, name, measure = found.groups()
    mended = written.replace("\nexperiment", f"\n{above}\n\nexperiment")
    mended = mended.replace(f"measure {metric} {line}", f"measure {name} {line}")
    mended = mended.replace(expect, f"max({measure}) > -50")
    (outcome,) = mechdsl.run(mended).files[0].experiments[0].outcomes
    assert outcome.holds
    assert name in [each.label for each in mechdsl.run(mended).files[0].experiments[0].measures]


def test_measure_unique_by_name_and_effect_is_selected() -> None:
    """Item 2 has more than five distinct prefixes, item 1 only four."""
    mixed = text("max(ld) > -50", **{"item 1 token as raw": "item 1 token as delta"})
    assert refused(mixed) == "name a metric, as in `delta of ld`"
    for effect, value in (("delta", 0.0), ("raw", None)):
        named = mixed.replace("max(ld)", f"max({effect} of ld)")
        found = mechdsl.run(named).files[0].experiments[0]
        (outcome,) = found.outcomes
        number = [each.effect for each in found.measures].index(effect)
        largest = float(found.statistics[number].mean.max())
        assert outcome.value == pytest.approx(largest if value is None else value)
        assert outcome.holds == (effect == "raw")


def test_repeated_measure_at_one_position_is_rejected() -> None:
    (found,) = [
        each
        for each in mechdsl.validate(text(**{"item  2 token": "item 1 token"}))
        if each.severity == "error"
    ]
    assert isinstance(found, RepeatedStatement)


def test_confusion_by_a_category_at_two_positions_shows_both(tmp_path: Path) -> None:
    written = text(
        **{'metric ld = logit(" 3")': "metric guess = argmax(1..9)", "measure ld": "measure guess"}
    ).replace("report table", "report confusion layer by guess")
    (found,) = mechdsl.run(written).files[0].experiments
    out = io.StringIO()
    show_report(found, found.reports[0], Console(file=out, width=120))
    assert out.getvalue().count("read: guess at item") == 2


def test_measure_names_include_the_name_without_position() -> None:
    assert measure_names("ld") == ("ld",)
    assert measure_names("ld at item 1 token") == ("ld at item 1 token", "ld")
