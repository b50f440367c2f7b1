"""Properties of every run: batches, row order, self-patches and an unchanged model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mechdsl.execute.patching.writes
from mechdsl.execute.patching.writes import build_writes
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.forward.hooks.batch import SiteWrite
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import RESTART_PASSES

from ..quick import in_turn, some
from .support import (
    DIFFERENCE,
    MODES,
    ROWS,
    bare,
    difference,
    experiment,
    prompts,
    run_file,
    with_execution,
    write_rows,
)

FAMILIES = ("gpt2", "llama", "gpt_neox")
TEXT = experiment(
    "heads", "prompts p", "from longer into clean", "patch layer * head * at last-item token",
    DIFFERENCE, "measure kl(clean) as delta", 'measure logprob("w3 w4") as delta',
) + experiment(
    "stream", "prompts p", "from other into clean",
    "patch resid_pre layer * at each token of subject, last token", DIFFERENCE,
) + experiment(
    "means", "prompts p", "ablate mlp_out layer * at {cue token, last token} with mean", DIFFERENCE
) + experiment(
    "others", "prompts p", "ablate attn_out layer * at {cue token, last token} with resample",
    DIFFERENCE,
)  # fmt: skip


def values(text: str, folder: Path, model: Any, options: RunOptions | None = None) -> list[Any]:
    found = run_file(text, folder, model, options)
    return [(name, m.patched, m.base) for name, r in found.items() for m in r.measures]


@cache
def whole(family: str) -> list[Any]:
    """Planned values of `TEXT`, for data in any folder."""
    with TemporaryDirectory() as folder:
        return values(TEXT, Path(folder), bare(family))


def equal(a: list[Any], b: list[Any], tolerance: float) -> None:
    for (name, patched, base), (other, patched2, base2) in zip(a, b, strict=True):
        assert name == other
        np.testing.assert_allclose(patched, patched2, atol=tolerance, rtol=0)
        np.testing.assert_allclose(base, base2, atol=tolerance, rtol=0)


# --- batches and order (A1, A14) ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "side"), in_turn([1, 25, 60, 10_000], ["right", "left"], [1, 60])
)
def test_values_do_not_depend_on_batch_size_and_padding_side(
    folder: Path, tokens: int, side: Any
) -> None:
    options = RunOptions(execution=ExecutionOptions(side, pass_tokens=tokens, prompt_tokens=tokens))
    equal(values(TEXT, folder, bare("gpt2"), options), whole("gpt2"), 1e-4)


SWITCHED_OFF = [frozenset(off) for n in (1, 2, 3, 4) for off in combinations(RESTART_PASSES, n)]


@pytest.mark.parametrize(
    "off", some(SWITCHED_OFF, SWITCHED_OFF[::2]), ids=lambda off: "+".join(sorted(off))
)
def test_restart_passes_leave_values_unchanged(folder: Path, off: frozenset[str]) -> None:
    """All sets of these passes; `test_planner` has each pass on any rule."""
    equal(values(TEXT, folder, bare("llama"), RunOptions(without=off)), whole("llama"), 1e-4)


def test_reordered_data_reorders_the_values(folder: Path) -> None:
    text = TEXT[: TEXT.index("experiment others")]
    first = values(text, folder, bare("gpt2"))
    order = [2, 0, 3, 1]
    write_rows(folder, [ROWS[i] for i in order])
    second = values(text, folder, bare("gpt2"))
    moved = [(name, patched[:, order], base[:, order]) for name, patched, base in first]
    equal(second, moved, 1e-4)


def test_second_run_has_identical_values(folder: Path) -> None:
    equal(values(TEXT, folder, bare("llama")), whole("llama"), 0.0)


# --- self-patches (A6) ----------------------------------------------------------------------------


SELF = "patch {site} at {{first token, cue token, last token}} with clean"
SITES = (
    "embed", "resid_pre layer *", "attn_norm layer *", "q layer * head *", "k layer * head *",
    "v layer * head *", "z layer * head *", "head_out layer * head *", "attn_out layer *",
    "mlp_norm layer *", "mlp_hidden layer * neurons *", "mlp_out layer *",
    "resid_post layer 0..1",  # the last one is scaled away again by the final norm
)  # fmt: skip


def self_patches() -> str:
    return "".join(
        experiment(
            f"e{n}", "prompts p", "from longer into clean", SELF.format(site=site), DIFFERENCE
        )
        for n, site in enumerate(SITES)
    )


def all_cells(options: RunOptions) -> RunOptions:
    """Run inert cells like others."""
    return replace(options, without=options.without | {"inert"})


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_patch_of_a_run_with_itself_changes_nothing(folder: Path, family: str) -> None:
    for mode in MODES if family == "llama" else ("planned",):
        options = all_cells(MODES[mode])
        for result in run_file(self_patches(), folder, bare(family), options).values():
            measure = result.measures[0]
            assert np.abs(measure.patched - measure.base).max() <= 1e-5
            assert measure.inert.all()


def scaled(factor: float) -> Callable[..., list[SiteWrite]]:
    def build(*args: Any, **named: Any) -> list[SiteWrite]:
        return [
            SiteWrite(w.site, w.layer, w.rows, w.positions, w.units, w.values * factor, w.mode)
            for w in build_writes(*args, **named)
        ]

    return build


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundredfold_self_patch_changes_every_cell(
    folder: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechdsl.execute.patching.writes, "build_writes", scaled(100))
    options = all_cells(RunOptions())
    for result in run_file(self_patches(), folder, bare(family), options).values():
        measure = result.measures[0]
        assert (np.abs(measure.patched - measure.base).max(axis=1) > 1e-3).all()


# --- the model afterwards (A7) --------------------------------------------------------------------


@torch.no_grad()
def outputs(model: Any) -> list[Tensor]:
    return [model(torch.tensor([p.ids])).logits for p in prompts()]


def assert_untouched(model: nn.Module, before: list[Tensor], weights: dict[str, Tensor]) -> None:
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert "forward" not in module.__dict__, name
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not model.training


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), FAMILIES, MODES))
def test_run_leaves_the_model_unchanged(folder: Path, family: str, mode: str) -> None:
    model = bare(family)
    before, weights = outputs(model), snapshot(model)
    run_file(TEXT, folder, model, MODES[mode])
    assert_untouched(model, before, weights)


@pytest.mark.parametrize("call", [1, 4, 9])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_during_a_pass_leaves_the_model_unchanged(
    folder: Path, error: type[BaseException], call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bare("llama")
    before, weights = outputs(model), snapshot(model)
    run_file(TEXT, folder, model)
    block = type(model.model.layers[0].mlp)
    original, calls = block.forward, [0]
    begun = [False]

    def broken(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls[0] += begun[0]
        if calls[0] > call:
            raise error("in the middle")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(block, "forward", broken)
    options = with_execution(
        MODES["small passes"], on_progress=lambda *_: begun.__setitem__(0, True)
    )
    with pytest.raises(error, match="in the middle"):
        run_file(TEXT, folder, model, options)
    monkeypatch.undo()
    assert_untouched(model, before, weights)


def test_interrupt_between_passes_leaves_the_model_unchanged(folder: Path) -> None:
    model = bare("gpt2")
    before, weights = outputs(model), snapshot(model)
    counts: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        counts.append((done, total))
        if len(counts) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_file(TEXT, folder, model, with_execution(MODES["small passes"], on_progress=interrupt))
    assert_untouched(model, before, weights)


def test_progress_counts_up_to_the_total(folder: Path) -> None:
    counts: list[tuple[int, int]] = []
    options = with_execution(RunOptions(), on_progress=lambda *pair: counts.append(pair))
    run_file(TEXT, folder, bare("gpt2"), options)
    done = [d for d, _ in counts]
    assert done == sorted(done)
    assert counts[-1][0] == counts[-1][1]


# --- the bare model's logits (A10) ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatched_values_equal_the_bare_model(folder: Path, family: str) -> None:
    model = bare(family)
    found = run_file(TEXT, folder, model, MODES["padded on the right"])["heads"].measures[0]
    for n, (logits, record) in enumerate(zip(outputs(model), ROWS, strict=True)):
        assert abs(found.base[0, n] - difference(logits[0], record)) <= 1e-5


# --- any rule -------------------------------------------------------------------------------------

ANY_SITE = st.sampled_from(
    [
        "embed",
        "resid_pre layer *",
        "resid_pre layers 0..1",
        "attn_norm layer 1",
        "q layer * heads 0, 2",
        "k layer 0..1 head *",
        "v layers * heads *",
        "z layer * head 1..2",
        "layer 2 head *",
        "head_out layer 0, 2 head *",
        "attn_out layer * window 2",
        "mlp_norm layer 50%",
        "mlp_hidden layer 1 neurons 3..20",
        "mlp_out layer *",
        "L1.resid",
        "L2H3",
        "final_norm",
        "logits",
    ]
)
ANY_POSITION = st.sampled_from(
    ["last token", "first token", "subject token", "subject tokens", "each token of subject",
     "item 1 token", "last-item token", "each item token", "token -2", "token -3..-1",
     "tokens -2..-1", "cue token, last token", "{cue token, subject token}", "subject token + 1",
     "tokens between subject token and last token", '"w41" token']
)  # fmt: skip
ANY_METRIC = st.sampled_from(
    ["logit(answer) - logit(wrong)", "kl(clean)", "logprob(answer)", 'logprob("w3 w9 w4")', "loss",
     "entropy at cue token", "cosine(L2.resid, clean)", "prob(answer)"]
)  # fmt: skip


@st.composite
def any_rules(draw: Callable[..., Any]) -> list[str]:
    """One or two rules that sweep different axes."""
    first, at = draw(ANY_SITE), draw(ANY_POSITION)
    fill = draw(st.sampled_from(["patch", "zero", "mean", "resample"]))
    uneven = at == "subject tokens" or "between" in at
    if fill == "patch" or (uneven and fill != "zero"):
        rules = [f"patch {first} at {at}"]
    else:
        rules = [f"ablate {first} at {at} with {fill}"]
    if draw(st.booleans()):
        rules.append(draw(st.sampled_from(
            ["patch mlp_out layers 0..1 at cue token", "ablate L1H2 at last token with zero",
             "patch resid_mid layers 1 at {cue token, last token} with other"]
        )))  # fmt: skip
    return rules


def any_run(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Sample this many rules and execution options."""
    drawn = given(
        rules=any_rules(),
        metric=ANY_METRIC,
        direction=st.sampled_from(["longer into clean", "clean into longer", "other into clean"]),
        family=st.sampled_from(["gpt2", "llama"]),
        side=st.sampled_from(["left", "right"]),
        tokens=st.sampled_from([15, 50, 4096]),
    )
    chosen = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    return lambda test: chosen(drawn(test))


def plain_and_batched_agree(
    folder: Path, rules: list[str], metric: str, direction: str, family: str, side: Any, tokens: int
) -> None:
    text = experiment("e", "prompts p", f"from {direction}", *rules, f"measure {metric} as delta")
    plain = values(text, folder, bare(family), MODES["plain"])
    options = RunOptions(execution=ExecutionOptions(side, pass_tokens=tokens, prompt_tokens=tokens))
    equal(values(text, folder, bare(family), options), plain, 1e-4)


@any_run(8)
def test_plain_and_batched_plans_agree_on_any_rule(folder: Path, **drawn: Any) -> None:
    plain_and_batched_agree(folder, **drawn)


@pytest.mark.slow
@any_run(100)
def test_plain_and_batched_plans_agree_on_many_rules(folder: Path, **drawn: Any) -> None:
    plain_and_batched_agree(folder, **drawn)
