"""The work that `plan` reports equals the work of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mechdsl.execute.patching.rows
import mechdsl.execute.unpatched_runs
from mechdsl.checks.file_check import CheckSettings
from mechdsl.execute.patching import held_passes, rows
from mechdsl.execute.run_record import ExecutionOptions, ExecutionProfile
from mechdsl.forward.hooks.batch import Batch
from mechdsl.forward.packed.packed_pass import PackedResult, run_packed
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.cost import Cost
from mechdsl.planner.passes import PASS_NAMES, PASSES, PlanCost, make_plan, plan_cost
from mechdsl.planner.plan import Plan

from ..operations import OperationCounter
from .support import (
    DIFFERENCE,
    bare,
    check_file,
    execute_file,
    experiment,
    run_file,
    shared,
    write_rows,
)

FROM = "from other into clean"
HEADS = "patch layer * head * at last token"
SWEEPS = {
    "heads": (FROM, HEADS),
    "residual": (FROM, "patch resid_pre layer * at each token of subject"),
    "windows": (FROM, "patch mlp_out layer * window 2 at cue token"),
    "keys": ("ablate k layers 1..2 heads * at subject tokens with zero",),
    "last block": (FROM, "patch resid_post layer 2 at each token of cue"),
}


def costs(
    text: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    without: frozenset[str] = frozenset(),
    family: str = "llama",
) -> tuple[PlanCost, list[PackedResult]]:
    """(planned cost, results of the packed passes)."""
    plans: list[Plan] = []
    done: list[PackedResult] = []

    def counted(*args: Any, **kwargs: Any) -> PackedResult:
        done.append(run_packed(*args, **kwargs))
        return done[-1]

    monkeypatch.setattr(mechdsl.execute.patching.rows, "run_packed", counted)
    options = RunOptions(without=without, on_profile=lambda plan, _: plans.append(plan))
    run_file(text, folder, bare(family), options)
    return plan_cost(plans[0]), done


def rows_only(cost: Cost, plan: PlanCost) -> int:
    """Tokens through blocks without those of unpatched runs, which are the same throughout."""
    lengths = 13 + 8 + 10 + 13
    runs = 1 if plan.plain.forwards - plan.plain.rows == 4 else 2
    return cost.tokens - runs * lengths * 3


@pytest.mark.parametrize("without", [(), ("prefix",), ("resume",), ("inside",), ("last",)])
@pytest.mark.parametrize("name", list(SWEEPS))
def test_planned_tokens_through_blocks_equal_those_of_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, without: tuple[str, ...]
) -> None:
    text = experiment("e", "prompts p", *SWEEPS[name], DIFFERENCE)
    off = frozenset({*without, "stop_early"})
    planned, done = costs(text, folder, monkeypatch, off)
    assert rows_only(planned.planned, planned) == sum(sum(each.work) for each in done)
    assert planned.planned.rows <= planned.plain.rows


AT_CUE = "measure logit(answer) - logit(wrong) at cue token as delta"
READ_ELSEWHERE = {
    "in the middle": (FROM, HEADS.replace("last", "subject"), AT_CUE),
    "in the middle and at the end": (
        FROM, "patch resid_pre layer * at each token of subject", DIFFERENCE,
        "measure logit(answer) at cue token as raw",
    ),
    "inside the model": (
        FROM, "patch z layer * head 0 at subject tokens", "measure cosine(L1.resid, clean) as raw"
    ),
    "at all tokens": (FROM, "patch mlp_out layer * at cue token", "measure loss as raw"),
    "attention": (
        FROM, "patch z layer 0 heads * at subject tokens",
        "observe attention layer 2 head * from last token to cue token",
        "measure attention as delta",
    ),
    "by receivers": (FROM, "path z layer * head * -> q layer * head 1 at cue token", DIFFERENCE),
    "by receivers and at all tokens": (
        FROM, "path z layer 0 head * -> q layer 1 head 1 at cue token", "measure loss as raw"
    ),
    "by receivers past mlps": (
        FROM, "path mlp_out layer * -> v layer 2 head 0..1 at cue token through mlps", DIFFERENCE
    ),
    "behind held sublayers": (FROM, "path z layer * head * -> logits at last token", DIFFERENCE),
}  # fmt: skip


@pytest.mark.parametrize("name", list(READ_ELSEWHERE))
def test_planned_tokens_depend_on_the_measured_positions(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text = experiment("e", "prompts p", *READ_ELSEWHERE[name])
    planned, done = costs(text, folder, monkeypatch, frozenset({"stop_early"}))
    assert rows_only(planned.planned, planned) == sum(sum(each.work) for each in done)


WHOLE = {
    "to neurons": "path z layer 0 head * -> mlp_hidden layer 2 neuron 3 at last token",
    "with frozen norms": "path z layer * head 1 -> logits at last token with frozen norms",
    "to the end and to heads": "path z layer 0 head * -> ends at last token",
}


@pytest.mark.parametrize("name", list(WHOLE))
def test_planned_full_passes_of_paths_equal_those_of_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokens: list[int] = []
    real = rows.run_full

    def counted(model: Any, batch: Batch, *given: Any, **named: Any) -> Any:
        tokens.append(int(batch.lengths.sum()) * model.shape.n_layers)
        return real(model, batch, *given, **named)

    for module in (rows, held_passes):
        monkeypatch.setattr(module, "run_full", counted)
    text = "group ends = L2H1.q, L2H3.q, logits\n"
    text += experiment("e", "prompts p", FROM, WHOLE[name], DIFFERENCE)
    planned, _ = costs(text, folder, monkeypatch, frozenset({"stop_early"}))
    assert rows_only(planned.planned, planned) == sum(tokens)


def test_plan_lists_every_pass_and_no_pass_adds_cost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = experiment("e", "prompts p", FROM, HEADS, DIFFERENCE)
    planned, done = costs(text, folder, monkeypatch)
    names = [saving.name for saving in planned.savings]
    of_rows = (one.name for one in PASSES if one.shown is not None)
    assert names == [name for name in of_rows if name != "cache"], "no rule writes anything"
    before = planned.plain
    for saving in planned.savings:
        assert saving.after.multiply_adds <= before.multiply_adds, saving.name
        assert saving.after.tokens <= before.tokens, saving.name
        assert saving.after.forwards <= before.forwards, saving.name
        before = saving.after
    assert before.multiply_adds < planned.plain.multiply_adds / 4
    assert planned.plain.cells == 3 * 4
    assert before.forwards == 2 + len(done), "a pass over each run's prompts, one over all rows"


def test_disabled_planner_passes_save_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = experiment("e", "prompts p", FROM, HEADS, DIFFERENCE)
    planned, _ = costs(text, folder, monkeypatch, frozenset(PASS_NAMES))
    assert all(saving.after == planned.plain for saving in planned.savings)
    assert not any(saving.on for saving in planned.savings)


def test_plan_counts_the_multiply_adds_of_the_plain_loop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiply-adds of linear maps, counted with hooks on the model, and those of attention."""
    text = experiment("e", "prompts p", FROM, HEADS, DIFFERENCE)
    model = bare("llama")
    counted = [0]

    def count(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        counted[0] += args[0].numel() * output.shape[-1]

    maps = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    handles = [m.register_forward_hook(count) for m in maps]
    with torch.inference_mode():
        for length in (13, 8, 10, 13):
            ids = torch.ones((1, length), dtype=torch.long)
            model(input_ids=ids, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    planned, _ = costs(text, folder, monkeypatch)
    heads = model.config.num_attention_heads * model.config.head_dim
    pairs = sum(n * (n + 1) // 2 for n in (13, 8, 10, 13))
    once = counted[0] + 3 * pairs * 2 * heads
    passes = planned.plain.forwards // 4
    assert planned.plain.multiply_adds == once * passes


BATCHED = {
    "nothing is averaged": (FROM, HEADS),
    "a mean": ("ablate layer * head * at last token with mean",),
    "two means": (
        FROM, "ablate layer * head * at last token with mean of other",
        "freeze L1.mlp at last token",
        "ablate mlp_out layer 0 at last token with mean",
    ),
    "cells given whole": ('set mlp_out layer * at cue token to python("own.py:same")',),
    "a run with donors": (
        "run mixed { ablate mlp_out layer 1 at last token with resample }",
        "from mixed into clean", HEADS,
    ),
    "another row": ("ablate layer * head * at last token with resample",),
    "rows that are kept": ("keep logit(answer) > -1000", FROM, HEADS),
    "a run with rules": (
        "run healed { from other into longer patch resid_post layer 0 at cue token",
        "ablate mlp_out layer 1 at last token with mean of turned }",
        "from healed into clean", HEADS,
    ),
    "rows on a run with rules": (
        "run healed { from other into longer patch resid_post layer 0 at cue token }",
        "from clean into healed", HEADS,
    ),
    "a run to compare with": (FROM, HEADS, "measure kl(longer) as raw"),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [4096, 30])
@pytest.mark.parametrize("name", list(BATCHED))
def test_planned_forward_passes_equal_those_of_the_run(
    folder: Path, name: str, tokens: int
) -> None:
    """All stages share a single batch of prompts; with several batches, each stage recomputes its
    inputs. Each run has separate passes: none is short enough to share one.
    """
    done: list[tuple[Plan, ExecutionProfile]] = []
    options = RunOptions(
        settings=CheckSettings(python="run"),
        on_profile=lambda *each: done.append(each),
        execution=ExecutionOptions(pass_tokens=1 << 20, prompt_tokens=tokens),
    )
    (folder / "own.py").write_text("def same(v):\n    return 2 * v\n", encoding="utf-8")
    lines = [*BATCHED[name], *([] if "measure" in BATCHED[name][-1] else [DIFFERENCE])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechdsl.execute.unpatched_runs, "MAX_SHARED_TOKENS", 0)
        run_file(experiment("e", "prompts p", *lines), folder, bare("llama"), options)
    ((plan, profile),) = done
    planned = plan_cost(plan, 1 << 20, tokens).planned
    assert planned.forwards == profile.passes + profile.unpatched_passes


@pytest.mark.parametrize(
    "measures",
    [(), pytest.param(("measure logit(answer) as raw",), marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_plan_counts_the_prefill_of_replies_and_the_values_that_a_rule_reads(
    family: str, measures: tuple[str, ...], tmp_path: Path
) -> None:
    """Replies of both runs are generated in passes that aren't read."""
    write_rows(tmp_path)
    model, found = shared(bare(family)), list[tuple[float, float]]()
    for rule in ("scale resid_post layer 1", "patch resid_post layer 1"):
        end = " by 2" if rule.startswith("scale") else ""
        lines = ("prompts p limit 1", FROM, "generate 4", f"{rule} at last token{end}", *measures)
        text = experiment("e", *lines, 'measure matches("w1") as raw')
        checked = check_file(text, tmp_path, model)
        execute_file(checked, model)  # the first run of a model tries the cache
        with OperationCounter() as counter:
            execute_file(checked, model)
        planned = plan_cost(make_plan(checked.experiments)).planned.multiply_adds
        found.append((planned, counter.get_total_flops() / 2))
    assert all(0.65 < planned / counted < 1.05 for planned, counted in found), found
    (plain, without), (patched, read) = found
    if not measures:
        assert 0.9 < (patched - plain) / (read - without) < 1.1
