"""The savings of each planner pass: counts of tokens through each block's modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.run.panel import Execution
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import PASS_NAMES, RESTART_PASSES

from ..models import families
from .support import (
    DIFFERENCE,
    EVERY_PASS,
    PROMPTS,
    ROWS,
    adopted,
    check_file,
    execute_file,
    experiment,
    prompts,
    word_tokenizer,
)

FAMILY = "llama"
LAYERS = 3
FROM = ("prompts p", "from longer into clean")
TOKENS = sum(len(prompt.ids) for prompt in prompts())
"""Tokens of all clean prompts."""
PARTS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "o": "self_attn.o_proj", "mlp": "mlp"}


@dataclass
class Work:
    """Work of the modules of a Llama."""

    unpatched: bool
    """Count padded prompts; otherwise packed rows and full passes, from the first row on."""
    started: bool = False
    tokens: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(part, block) → number of computed tokens."""
    widths: list[tuple[int, int]] = field(default_factory=list)
    """(tokens, logits of each) of every unembedding."""
    execution: Execution = field(default_factory=Execution)

    def of(self, part: str) -> list[int]:
        """Tokens per block."""
        return [self.tokens[part, layer] for layer in range(LAYERS)]

    @property
    def through(self) -> int:
        """Tokens through all blocks' MLPs."""
        return sum(count for (part, _), count in self.tokens.items() if part == "mlp")

    def counts(self, hidden: Tensor) -> bool:
        return hidden.shape[0] > 1 if self.unpatched else self.started

    @contextmanager
    def on(self, model: nn.Module) -> Any:
        """Replace the forwards of the modules, which do the work: reused activations never reach
        them."""
        with ExitStack() as stack:
            for layer, block in enumerate(model.model.layers):
                for part, path in PARTS.items():
                    module = block.get_submodule(path)
                    module.forward = self._counted(module.forward, part, layer)
                    stack.callback(module.__dict__.pop, "forward")
            handle = model.lm_head.register_forward_hook(self._unembedded)
            stack.callback(handle.remove)
            yield

    def _counted(self, forward: Callable[..., Any], part: str, layer: int) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.counts(hidden):
                self.tokens[part, layer] += hidden.shape[0] * hidden.shape[1]
            return forward(hidden, *args, **kwargs)

        return run

    def _unembedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.counts(output):
            self.widths.append((output.shape[0] * output.shape[1], output.shape[2]))


def work_of(
    folder: Path,
    text: str,
    without: Iterable[str] = (),
    *,
    unpatched: bool = False,
    model: LoadedModel | None = None,
    **options: Any,
) -> Work:
    """The work of a file's patched rows, or of its unpatched runs, in one batch of prompts."""
    model = model or adopted(FAMILY)
    work = Work(unpatched)
    checked = check_file(text, folder, model)

    def started(done: int, total: int) -> None:
        work.started = True

    with work.on(model.module):
        given = ExecutionOptions(on_progress=started, **options)
        work.execution = execute_file(checked, model, without, given)
    return work


def only(*passes: str) -> frozenset[str]:
    return EVERY_PASS - set(passes)


def sweep(
    site: str, at: str = "last token", measure: str = DIFFERENCE, *, run: str = "longer"
) -> str:
    return experiment("e", "prompts p", f"from {run} into clean", f"patch {site} at {at}", measure)


def count_tokens_from(first: Callable[[Any], int]) -> int:
    """Tokens from one on, over all prompts."""
    return sum(prompt.last - first(prompt) + 1 for prompt in prompts())


# --- rows -----------------------------------------------------------------------------------------


def test_plain_loop_computes_every_token_in_every_block(folder: Path) -> None:
    work = work_of(folder, sweep("resid_post layer *"), EVERY_PASS)
    padded = len(ROWS) * max(len(prompt.ids) for prompt in prompts())
    assert work.of("mlp") == work.of("q") == [3 * padded] * LAYERS
    assert work.execution.profile.passes == 3


def test_resume_skips_the_blocks_before_a_write(folder: Path) -> None:
    """With one cell per layer, rows of one cell enter the first block, rows of all the last."""
    text = sweep("resid_pre layer *")
    assert work_of(folder, text, only("resume")).of("mlp") == [TOKENS, 2 * TOKENS, 3 * TOKENS]
    assert work_of(folder, text, only("last")).of("mlp")[:2] == [3 * TOKENS, 3 * TOKENS]


def test_prefix_computes_one_token_for_a_write_at_the_last_token(folder: Path) -> None:
    text = sweep("resid_pre layer *")
    rows = len(ROWS)
    assert work_of(folder, text, only("prefix")).of("mlp") == [3 * rows] * LAYERS
    assert work_of(folder, text, only("prefix", "resume")).of("mlp") == [rows, 2 * rows, 3 * rows]
    assert work_of(folder, text).of("mlp") == [rows, 2 * rows, 3 * rows]


@pytest.mark.parametrize(
    ("at", "first"),
    [("cue token", lambda p: p.cue), ("subject token", lambda p: p.subject[-1])],
)
def test_prefix_computes_only_tokens_from_the_write_on(
    folder: Path, at: str, first: Callable[[Any], int]
) -> None:
    count = count_tokens_from(first)
    work = work_of(folder, sweep("resid_pre layer *", at), only("prefix", "resume"))
    assert work.of("mlp") == [count, 2 * count, 3 * count]


def test_last_computes_only_the_read_tokens_of_the_last_block(folder: Path) -> None:
    count = count_tokens_from(lambda p: p.subject[-1])
    rows = len(ROWS)
    work = work_of(folder, sweep("resid_pre layer *", "subject token"))
    assert work.of("mlp") == [count, 2 * count, 3 * rows]
    assert work.of("o") == [count, 2 * count, 3 * rows]
    assert work.of("k") == [rows, rows + count, rows + 2 * count], "the last token sees all keys"
    kept = work_of(folder, sweep("resid_pre layer *", "subject token"), {"last"})
    assert kept.of("mlp") == [count, 2 * count, 3 * count]


def test_last_computes_nothing_after_the_last_read_token(folder: Path) -> None:
    measure = "measure logit(answer) - logit(wrong) at cue token as delta"
    text = sweep("resid_pre layer *", "subject token", measure)
    count = sum(prompt.cue - prompt.subject[-1] + 1 for prompt in prompts())
    assert work_of(folder, text).of("mlp") == [count, 2 * count, 3 * len(ROWS)]


def test_loss_reads_all_tokens_of_the_last_block(folder: Path) -> None:
    text = sweep("resid_pre layer *", "subject token", "measure loss as delta")
    count = count_tokens_from(lambda p: p.subject[-1])
    assert work_of(folder, text).of("mlp") == [count, 2 * count, 3 * count]


@pytest.mark.parametrize("site", ["z layer * heads *", "attn_out layer *", "resid_mid layer *"])
def test_inside_skips_projections_in_the_block_of_a_write_after_attention(
    folder: Path, site: str
) -> None:
    """Only one token changes in this block; the last token sees it in the next block."""
    rows = len(ROWS)
    work = work_of(folder, sweep(site, "cue token"))
    assert work.of("q") == work.of("k") == [0, rows, 3 * rows]
    whole = work_of(folder, sweep(site, "cue token"), {"inside", "inert"})
    assert whole.of("q") == whole.of("k") == [rows, 3 * rows, 5 * rows]


def test_inside_skips_the_mlp_in_the_block_of_a_write_to_its_output(folder: Path) -> None:
    rows = len(ROWS)
    work = work_of(folder, sweep("mlp_out layer *", "cue token"))
    assert work.of("q") == [0, rows, 3 * rows]
    assert work.of("mlp") == [0, 2 * rows, 2 * rows], "a write of the last block isn't seen"
    whole = work_of(folder, sweep("mlp_out layer *", "cue token"), {"inside", "inert"})
    assert whole.of("mlp") == [2 * rows, 4 * rows, 3 * rows]


def test_inside_projects_no_token_in_the_block_of_a_written_key(folder: Path) -> None:
    """Later tokens of the block attend to the new key with their cached queries."""
    rows = len(ROWS)
    work = work_of(folder, sweep("k layer 1 heads *", "cue token"))
    assert work.of("q") == [0, 0, 2 * rows]
    assert work.of("o") == [0, 2 * rows, rows]


@pytest.mark.slow
def test_no_planner_pass_adds_work(folder: Path) -> None:
    """No pass adds work."""
    text = sweep("z layer * head 0..1", "subject token, cue token")
    whole, none = work_of(folder, text), work_of(folder, text, only())
    for name in PASS_NAMES:
        assert work_of(folder, text, {name}).through >= whole.through, name
        assert work_of(folder, text, only(name)).through <= none.through


# --- which rows -----------------------------------------------------------------------------------


def test_inert_rows_are_not_run(folder: Path) -> None:
    """The first token is equal in both runs; a cell at the subject runs."""
    text = sweep("resid_pre layer *", "first token, subject token", run="other")
    profile = work_of(folder, text).execution.profile
    assert profile.rows == profile.distinct == 3 * len(ROWS)
    every = work_of(folder, text, {"inert"}).execution.profile
    assert every.rows == every.distinct == 6 * len(ROWS)


def test_file_of_inert_rows_runs_no_pass(folder: Path) -> None:
    text = sweep("resid_pre layer *", "first token", run="other")
    work = work_of(folder, text)
    assert work.through == work.execution.profile.passes == 0
    assert work_of(folder, text, {"inert"}).through > 0


SECOND = ("measure prob(answer) as delta", "measure loss as delta")


@pytest.mark.parametrize("second", SECOND)
def test_equal_rows_of_two_experiments_run_once(folder: Path, second: str) -> None:
    rule = "patch z layer 0..1 head * at cue token"
    first = experiment("a", *FROM, rule, DIFFERENCE)
    one = experiment("a", *FROM, rule, DIFFERENCE, second)
    text = first + experiment("b", *FROM, rule, second)
    alone, both = work_of(folder, one), work_of(folder, text)
    count = 2 * 4 * len(ROWS)
    assert alone.execution.profile.distinct == both.execution.profile.distinct == count
    assert both.execution.profile.rows == 2 * count
    assert both.tokens == alone.tokens, "the second experiment adds no token"
    assert work_of(folder, text, {"share"}).execution.profile.distinct == 2 * count


def test_rows_with_different_numbers_of_noise_draws_are_not_shared(folder: Path) -> None:
    """Equal writes, but one experiment averages over three draws of its source."""
    noise = "corrupt noised { add gaussian(std: 0.5, samples: 3) to embed at subject tokens }"
    blocks = PROMPTS.replace("corrupt other { subject = alt }", noise)
    rule = "ablate z layer 0 head * at cue token with zero"
    text = experiment("one", "prompts p", rule, DIFFERENCE)
    text += experiment("three", "prompts p", "from noised into clean", rule, DIFFERENCE)
    model = adopted(FAMILY)
    profile = execute_file(check_file(text, folder, model, blocks), model).profile
    assert profile.rows == profile.distinct == 2 * 4 * len(ROWS)


def test_cells_with_equal_rows_run_once(folder: Path) -> None:
    """Two names denote one position."""
    text = sweep("resid_pre layer 1", "cue token, token -2")
    profile = work_of(folder, text).execution.profile
    assert (profile.rows, profile.distinct) == (2 * len(ROWS), len(ROWS))


def test_rows_of_all_cells_share_one_pass(folder: Path) -> None:
    text = sweep("z layer * head *") + experiment(
        "f", *FROM, "patch resid_pre layer * at cue token", DIFFERENCE
    )
    assert work_of(folder, text).execution.profile.passes == 1
    assert work_of(folder, text, {"join"}).execution.profile.passes == 15


def test_passes_have_the_given_number_of_tokens(folder: Path) -> None:
    text = sweep("z layer * head *")
    count = LAYERS * 4 * len(ROWS)
    for tokens in (1, 7, 16):
        profile = work_of(folder, text, pass_tokens=tokens).execution.profile
        assert profile.tokens == [tokens] * (count // tokens) + [count % tokens] * (
            count % tokens > 0
        )


# --- unpatched runs, logits and kernels -----------------------------------------------------------


def test_run_that_is_only_read_stops_after_the_last_read_block(folder: Path) -> None:
    rule = "patch resid_pre layer 0..1 at cue token with other"
    text = experiment("e", "prompts p", rule, DIFFERENCE)
    padded = len(ROWS) * max(len(prompt.ids) for prompt in prompts())
    stopped = work_of(folder, text, unpatched=True)
    assert stopped.of("mlp") == [2 * padded, padded, padded]
    whole = work_of(folder, text, {"stop_early"}, unpatched=True)
    assert whole.of("mlp") == [2 * padded] * LAYERS


@pytest.mark.parametrize("unpatched", [False, True])
def test_only_read_logits_are_computed(folder: Path, unpatched: bool) -> None:
    text = sweep("z layer * head *")
    read = {word for record in ROWS for word in (record["a"], record["b"])}
    narrow = work_of(folder, text, unpatched=unpatched)
    # unpatched runs also compute the largest and smallest logit, on which rounding depends
    assert {width for _, width in narrow.widths} == {len(read) + 2 * unpatched}
    wide = work_of(folder, text, {"unembed"}, unpatched=unpatched)
    assert {width for _, width in wide.widths} == {families.VOCABULARY}
    assert sum(n for n, _ in wide.widths) == sum(n for n, _ in narrow.widths)


def test_one_wide_metric_needs_the_whole_vocabulary(folder: Path) -> None:
    work = work_of(folder, sweep("z layer * head *", measure="measure prob(answer) as delta"))
    assert {width for _, width in work.widths} == {families.VOCABULARY}


def test_only_tokens_that_are_read_are_unembedded(folder: Path) -> None:
    work = work_of(folder, sweep("resid_pre layer 0", "subject token"))
    assert sum(count for count, _ in work.widths) == len(ROWS)


@pytest.mark.parametrize(("without", "calls"), [((), False), (("fuse",), True)])
def test_activation_functions_run_in_one_kernel(
    folder: Path, without: tuple[str, ...], calls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adopted("gpt2")
    kind = type(model.module.transformer.h[0].mlp.act)
    original, seen = kind.forward, Counter[str]()

    def forward(self: nn.Module, given: Tensor) -> Tensor:
        seen["calls"] += 1
        return original(self, given)

    monkeypatch.setattr(kind, "forward", forward)
    execute_file(check_file(sweep("z layer * head *"), folder, model), model, without)
    assert (seen["calls"] > 0) is calls


# --- cost grows with what changes -----------------------------------------------------------------


@cache
def deep() -> LoadedModel:
    module = families.module(FAMILY, num_hidden_layers=8)
    model, diagnostics = adopt_model("m", module, word_tokenizer())
    assert model is not None, render_full(diagnostics, color=False, width=100)
    return model


SITES = (
    "resid_pre layer {}",
    "resid_post layer {}",
    "z layer {} head *",
    "mlp_out layer {}",
    "k layer {} head 1",
)


@pytest.mark.parametrize("site", SITES)
def test_twice_as_many_layers_are_at_most_twice_the_work(folder: Path, site: str) -> None:
    """Rows of later layers are cheaper."""
    few = work_of(folder, sweep(site.format("4..7"), "cue token"), model=deep()).through
    below = work_of(folder, sweep(site.format("0..3"), "cue token"), model=deep()).through
    many = work_of(folder, sweep(site.format("0..7"), "cue token"), model=deep()).through
    assert 0 < few < below
    assert few + below == many <= 2 * below


@pytest.mark.parametrize("without", [(), *((name,) for name in RESTART_PASSES)])
def test_twice_as_many_heads_or_prompts_are_twice_the_work(
    folder: Path, without: tuple[str, ...]
) -> None:
    one = work_of(folder, sweep("z layer * head 0..1", "cue token"), without).through
    assert work_of(folder, sweep("z layer * head 0..3", "cue token"), without).through == 2 * one
    half = sweep("z layer * head 0..1", "cue token").replace("prompts p", "prompts p limit 2")
    assert work_of(folder, half, without).through < one


def test_second_experiment_on_the_same_rows_adds_no_work(folder: Path) -> None:
    rule = "patch resid_pre layer * at cue token"
    one = experiment("a", *FROM, rule, DIFFERENCE)
    again = experiment("b", *FROM, rule, "measure logit(wrong) as raw")
    assert work_of(folder, one + again).tokens == work_of(folder, one).tokens
    shared = work_of(folder, one + again, unpatched=True)
    assert shared.tokens == work_of(folder, one, unpatched=True).tokens


def test_counting_leaves_values_unchanged(folder: Path) -> None:
    """The counters have no effect on values."""
    text = sweep("z layer * head *")
    model = adopted(FAMILY)
    counted = work_of(folder, text).execution.measured["e"].patched[0]
    bare_run = execute_file(check_file(text, folder, model), model).measured["e"].patched[0]
    np.testing.assert_allclose(counted, bare_run, atol=1e-6)
