"""Execution order of derived experiments, and placeholders for pending results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mechdsl.base.text import Source
from mechdsl.cli.entry import app
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.pipeline import computation as running
from mechdsl.pipeline.options import RunOptions

from ..run_source import run_source
from .support import HEAD, best_sites, checked, experiment, patched, run

DELTA = "measure logit(answer) as delta"


def ablate(name: str, what: str, prompts: str = "fruit.test limit 6") -> str:
    return experiment(name, f"ablate {what} at last token with zero", DELTA, prompts=prompts)


HEADS = ablate("heads", "layer * head *", "fruit.train limit 6")
LAYERS = experiment(
    "layers",
    "ablate mlp_out layer * at last token with zero",
    "ablate best of heads at last token with zero",
    DELTA,
)
LAST = ablate("last", "top 2 of layers", "fruit limit 6")


def test_chain_of_experiments_runs_in_three_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    waves: list[list[str]] = []
    whole = running.execute

    def spy(plan: object, *rest: object, **named: object) -> object:
        names = [p.experiment.name for panel in plan.panels for p in panel.experiments]  # type: ignore[attr-defined]
        waves.append(sorted(names))
        return whole(plan, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "execute", spy)
    alone = ablate("alone", "mlp_out layer *", "fruit.train limit 6")
    found = run(LAST + alone + LAYERS + HEADS)
    assert waves == [["alone", "heads"], ["layers"], ["last"]]
    assert list(found) == ["last", "alone", "layers", "heads"]
    # The site of a cell joins both rules, so a head named by both is written twice.
    best = best_sites(found["heads"], 1)[0]
    layers = sorted(found["layers"].records(), key=lambda r: -r["mean"])[:2]
    own = [r["site"].split(" + ")[0].removesuffix("_out") for r in layers]
    by_hand = run(
        f"\ngroup hand = {best}, {', '.join(own)}\n" + ablate("last", "hand", "fruit limit 6")
    )
    assert np.allclose(patched(found["last"]), patched(by_hand["last"]), atol=1e-5)


def test_placeholders_for_sites_are_the_first_cells() -> None:
    done = checked(ablate("a", "top 3 of heads") + HEADS)
    assert not has_errors(done.diagnostics)
    (one,) = (e for e in done.experiments if e.name == "a")
    assert one.rules[0].sites is not None
    points = one.rules[0].sites.points[()]
    assert [(p.site, p.layer, p.unit) for p in points] == [("z", 0, 0), ("z", 0, 1), ("z", 0, 2)]
    assert one.stand_ins == ("heads",)
    assert [e.name for e in done.experiments] == ["a", "heads"]


def test_placeholders_for_tokens_are_the_first_tokens() -> None:
    places = experiment("places", "ablate embed at token * align left with zero", DELTA)
    text = experiment("a", "ablate embed at top 25% of places tokens with zero", DELTA) + places
    (one,) = (e for e in checked(text).experiments if e.name == "a")
    rows = one.table.runs["clean"].rows
    hits = one.rules[0].positions.written[()].hits
    for row, hit in zip(rows, hits, strict=True):
        assert hit == (tuple(range(int(len(row.ids) / 4 + 0.5))),)


def test_other_errors_are_reported_with_placeholders() -> None:
    text = ablate("a", "top 3 of heads").replace("last token", "lost token")
    assert {d.code for d in checked(text + HEADS).diagnostics} == {"E0308", "W0720"}


def test_error_of_a_source_experiment_is_reported_once() -> None:
    broken = HEADS.replace("head *", "head 99")
    assert [d.code for d in checked(ablate("a", "best of heads") + broken).diagnostics] == ["E0301"]


def test_plan_reports_placeholders(tmp_path: Path) -> None:
    path = tmp_path / "a.mech"
    path.write_text(HEAD + ablate("a", "top 3 of heads") + HEADS, encoding="utf-8")
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert shown.exit_code == 0, shown.output
    said = "a is counted with placeholders: its inputs are known only after heads has run"
    assert said in shown.output
    shown = CliRunner().invoke(app, ["explain", str(path)])
    assert "top 3 of heads: known only after `heads` has run" in shown.output


def test_only_runs_dependencies_but_reports_one_experiment() -> None:
    alone = ablate("alone", "mlp_out layer *", "fruit.train limit 6")
    text = LAST + alone + LAYERS + HEADS
    found = run(text, only=["layers"])
    assert list(found) == ["layers"]
    assert np.array_equal(patched(found["layers"]), patched(run(text)["layers"]))


def test_only_may_name_several_experiments() -> None:
    text = ablate("alone", "mlp_out layer *", "fruit.train limit 6") + LAYERS + HEADS
    assert list(run(text, only=["heads", "alone"])) == ["alone", "heads"]


def test_progress_covers_all_waves() -> None:
    told: list[tuple[int, int]] = []
    options = RunOptions(execution=ExecutionOptions(on_progress=lambda *now: told.append(now)))
    result, found = run_source(Source(HEAD + LAST + LAYERS + HEADS), options)
    assert result is not None
    assert not has_errors(found)
    done = [now for now, _ in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1]
    assert {total for _, total in told} == {told[-1][1]}


def test_zero_denominator_fails_only_its_experiment() -> None:
    text = experiment(
        "a",
        "from clean into fewer",
        "patch best of heads at last token",
        "measure logprob(answer) - logprob(answer) as recovery",
    )
    result, found = run_source(Source(HEAD + text + HEADS))
    assert result is not None
    assert [each.name for each in result.experiments] == ["heads"]
    assert [each.name for each in result.lost] == ["a"]
    assert [d.code for d in found if d.severity == "error"] == ["E0604"]


def test_source_experiment_without_rows_fails_its_derived_experiment() -> None:
    """The source experiment keeps no row, so both experiments fail."""
    places = experiment(
        "places",
        "keep logit(answer) > 1000",
        "ablate embed at token * align left with zero",
        DELTA,
    )
    text = experiment("a", "ablate embed at top 25% of places tokens with zero", DELTA) + places
    result, found = run_source(Source(HEAD + text))
    assert result is None
    errors = [d for d in found if d.severity == "error"]
    assert [d.code for d in errors] == ["E0613", "E0622"]
    assert errors[1].message == "`a` uses the results of `places`, which could not be computed"


def test_derived_experiment_fails_if_the_ranking_measure_fails() -> None:
    """The other measure of the source experiment is computed."""
    heads = experiment(
        "heads",
        "from clean into fewer",
        "patch layer 1 head * at last token",
        "measure logprob(answer) - logprob(answer) as recovery",
        DELTA,
        prompts="fruit.train limit 6",
    )
    result, found = run_source(Source(HEAD + ablate("a", "best of heads") + heads))
    assert result is not None
    assert [each.name for each in result.experiments] == ["heads"]
    errors = [d for d in found if d.severity == "error"]
    assert [d.code for d in errors] == ["E0604", "E0622"]
    assert errors[1].label_text == "needs its first measure"
