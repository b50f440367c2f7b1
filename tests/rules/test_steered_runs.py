"""Derived runs with steering, attention edges, position ids, replaced blocks or a Python function,
against two calls of the bare model with plain hooks, one unpadded prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, as_in_the_data, by_name, run_on, shared
from ..quick import in_turn
from .models import bare, double, on_the_model
from .support import (
    BLOCKS,
    QUICK,
    Key,
    Text,
    agree,
    codes,
    difference,
    experiment,
    records,
    rows,
    run_file,
    tokens,
)
from .test_allow_attention import ATTENTION, masked, visible

FAMILIES = ("gpt2", "llama", "gpt_neox")
LISTS = {"gpt2": "transformer.h", "llama": "model.layers", "gpt_neox": "gpt_neox.layers"}
LAYERS = range(3)
COUNT = len(records())

Edit = Callable[[str, int, Tensor], Tensor]
"""The new vector from the model's name, a prompt's number and the current vector [width]."""


@dataclass(frozen=True)
class Steered:
    """A derived run, with reference edits."""

    written: str
    base: str = "clean"
    edits: Sequence[tuple[int, str, Edit]] = ()
    """At the output of a block, at a position."""
    allowed: Sequence[tuple[int, str, str]] = ()
    numbers: Callable[[Text], Mapping[int, int]] = field(default=lambda text: {})
    blocks: Mapping[int, int | None] = field(default_factory=dict[int, "int | None"])
    before: str | None = None
    """The derived run that it starts from."""

    @property
    def text(self) -> str:
        """The run whose texts the derived run has."""
        return RUNS[self.before].text if self.before is not None else self.base


# --- the reference --------------------------------------------------------------------------------


@torch.no_grad()
@on_the_model
def called(
    model: Any, name: str, text: Text, every: Sequence[Steered], n: int,
    patches: Sequence[tuple[int, int, Tensor]] = (),
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(logits [T, vocab], output of each block [T, width]) of the bare model.

    every: changes, in order. patches: (layer, position, vector), applied after them.
    """
    blocks = model.get_submodule(LISTS[name])
    before, count = list(blocks), len(text.ids)
    pairs: dict[int, int | None] = {}
    for run in every:
        pairs.update(run.blocks)
    places, streams = torch.arange(count), dict[int, Tensor]()
    for run in every:
        for place, number in run.numbers(text).items():
            places[place] = number
    for to, of in pairs.items():
        if of is None:
            before[to].register_forward_hook(handed_on, with_kwargs=True)
        else:
            blocks[to] = copy.deepcopy(before[of])
    for layer in LAYERS:
        seen = visible(name, layer, count)
        for run in every:
            for at, query, key in run.allowed:
                for place in tokens(text, query) if at == layer else ():
                    seen[:, place, tokens(text, key)] = True
        added = torch.where(seen, 0.0, -torch.inf).to(torch.float64)[None]
        attention = model.get_submodule(ATTENTION[name].format(layer))
        attention.register_forward_pre_hook(masked(added), with_kwargs=True)

        def leaves(module: Any, args: Any, out: Any, layer: int = layer) -> Any:
            stream = (out[0] if isinstance(out, tuple) else out).clone()
            for run in every:
                for at, position, edit in run.edits:
                    for place in tokens(text, position) if at == layer else ():
                        stream[0, place] = edit(name, n, stream[0, place])
            for at, place, vector in patches:
                if at == layer:
                    stream[0, place] = vector
            streams[layer] = stream[0].clone()
            return (stream, *out[1:]) if isinstance(out, tuple) else stream

        blocks[layer].register_forward_hook(leaves)
    ids = torch.tensor([text.ids])
    logits = model(input_ids=ids, position_ids=places[None], use_cache=False).logits[0]
    return logits, [streams[layer] for layer in LAYERS]


def handed_on(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    stream = args[0] if args else kwargs["hidden_states"]
    return (stream, *out[1:]) if isinstance(out, tuple) else stream


@cache
def plain(name: str, run: str, n: int) -> tuple[Tensor, list[Tensor]]:
    return called(name, rows(run)[n], (), n)


def chain(run: str) -> list[Steered]:
    own = RUNS[run]
    return [*(chain(own.before) if own.before is not None else ()), own]


@cache
def stage(name: str, run: str, n: int) -> tuple[Tensor, list[Tensor]]:
    if run not in RUNS:
        return plain(name, run, n)
    return called(name, rows(RUNS[run].text)[n], chain(run), n)


def text_of(run: str, n: int) -> Text:
    return rows(RUNS[run].text if run in RUNS else run)[n]


@cache
def direction(name: str) -> Tensor:
    """[width]: mean_difference(p.other, second) at the output of block 1, last token."""
    means = []
    for run, count in (("other", COUNT), ("second", len(rows("second")))):
        every = [called(name, rows(run)[n], (), n)[1][1][-1] for n in range(count)]
        means.append(torch.stack(every).mean(0))
    return means[0] - means[1]


def unit(name: str) -> Tensor:
    return direction(name) / direction(name).norm()


def from_mean(name: str, n: int, here: Tensor) -> Tensor:
    """The result of `away` in the file: twice as far from the mean over rows."""
    every = [plain(name, "clean", row)[1][1][-1] for row in range(COUNT)]
    return 2 * every[n] - torch.stack(every).mean(0)


PYTHON = """
def away(vectors):
    return 2 * vectors - vectors.mean(0, keepdim=True)

def broken(vectors):
    return None
"""
DIRECTION = "direction d = mean_difference(p.other, second) at resid_post layer 1 at last token\n"
RUNS: dict[str, Steered] = {
    "added": Steered(
        "add 3 * d to resid_post layer 1 at last token",
        edits=[(1, "last token", lambda name, n, x: x + 3 * direction(name))],
    ),
    "put": Steered(
        "from clean into longer  set resid_post layer 0 at cue token to 2 * d",
        "longer",
        edits=[(0, "cue token", lambda name, n, x: 2 * direction(name))],
    ),
    "scaled": Steered(
        "scale resid_post layer 1 at subject tokens by -0.5",
        edits=[(1, "subject tokens", lambda name, n, x: -0.5 * x)],
    ),
    "without": Steered(
        "project out d from resid_post layer 1 at tokens *",
        edits=[(1, "tokens *", lambda name, n, x: x - (x @ unit(name)) * unit(name))],
    ),
    "clamped": Steered(
        "clamp d of resid_post layer 0 at cue token to 4",
        edits=[(0, "cue token", lambda name, n, x: x + (4 - x @ unit(name)) * unit(name))],
    ),
    "ahead": Steered(
        "allow attention layers 0..1 from cue token to last token",
        allowed=[(0, "cue token", "last token"), (1, "cue token", "last token")],
    ),
    "counted": Steered(
        "renumber subject tokens from 9",
        numbers=lambda text: {at: 9 + k for k, at in enumerate(tokens(text, "subject tokens"))},
    ),
    "repeated": Steered("replace block layer 1 with block layer 2", blocks={1: 2}),
    "skipped": Steered("replace block layer 1 with identity", blocks={1: None}),
    "made": Steered(
        'set resid_post layer 1 at last token to python("own.py:away")',
        edits=[(1, "last token", from_mean)],
    ),
    # made of another run with rules
    "twice": Steered(
        "from clean into added  scale resid_post layer 1 at last token by 0.5",
        before="added",
        edits=[(1, "last token", lambda name, n, x: 0.5 * x)],
    ),
    "both": Steered(
        "from clean into counted  replace block layer 2 with block layer 0  "
        "add d to resid_post layer 0 at cue token",
        before="counted",
        blocks={2: 0},
        edits=[(0, "cue token", lambda name, n, x: x + direction(name))],
    ),
}


def defined(run: str) -> list[str]:
    return [f"run {each} {{ {RUNS[each].written} }}" for each in _names(run)]


def _names(run: str) -> list[str]:
    before = RUNS[run].before
    return [*(_names(before) if before is not None else ()), run]


# --- sources, bases and observations --------------------------------------------------------------


@pytest.fixture
def folder(data: Path) -> Path:
    (data / "own.py").write_text(PYTHON, encoding="utf-8")
    return data


@cache
def results(folder: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    text = DIRECTION
    for run in RUNS:
        each = "patch resid_post layer * at last token"
        text += experiment(f"of_{run}", *defined(run), f"from {run} into clean", each)
        each = "patch resid_post layer * at cue token"
        text += experiment(f"on_{run}", *defined(run), f"from other into {run}", each)
        look = f"observe logit_lens resid_post layer * of {run} at last token top 2"
        lens = "measure logit(answer) - logit(wrong) as raw"
        text += experiment(f"lens_{run}", *defined(run), look, measure=lens)
    return by_name(*with_python(text, folder, name, mode))


def with_python(text: str, folder: Path, name: str, mode: str = "planned") -> Any:
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{text}'
    options = replace(MODES[mode], settings=CheckSettings(python="run"))
    return run_on(Source(whole, folder / "file.mech"), {"m": shared(bare(name))}, options)


def measured(name: str, run: str) -> list[float]:
    return [difference(stage(name, run, n)[0], record) for n, record in enumerate(records())]


@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, QUICK, FAMILIES[:2]))
@pytest.mark.parametrize("run", list(RUNS))
def test_steered_run_as_source_and_base_equals_plain_hooks(
    folder: Path, name: str, run: str, mode: str
) -> None:
    found = results(folder, name, mode)
    for key, source, base, at in (
        (f"of_{run}", run, "clean", "last token"),
        (f"on_{run}", "other", run, "cue token"),
    ):
        values: dict[Key, list[float]] = {(layer,): [] for layer in LAYERS}
        for n, record in enumerate(records()):
            text = text_of(base, n)
            (read,), (written,) = tokens(text_of(source, n), at), tokens(text, at)
            streams = stage(name, source, n)[1]
            every = chain(base) if base in RUNS else ()
            for layer in LAYERS:
                patch = (layer, written, streams[layer][read])
                logits, _ = called(name, text, every, n, [patch])
                values[(layer,)].append(difference(logits, record))
        start = np.array(measured(name, base))
        agree(found[key], ("layer",), values, start, large=0.02, most=False)


@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, QUICK, FAMILIES[:2]))
@pytest.mark.parametrize("run", list(RUNS))
def test_logit_lens_of_a_steered_run_equals_plain_hooks(
    folder: Path, name: str, run: str, mode: str
) -> None:
    """The observed values equal those of the bare model with hooks."""
    found = results(folder, name, mode)[f"lens_{run}"]
    model = double(name)
    norms = {
        "gpt2": "transformer.ln_f",
        "llama": "model.norm",
        "gpt_neox": "gpt_neox.final_layer_norm",
    }
    norm, end = model.get_submodule(norms[name]), model.get_output_embeddings()
    with torch.no_grad():
        for n, record in enumerate(records()):
            for layer, stream in enumerate(stage(name, run, n)[1]):
                value = difference(end(norm(stream)), record)
                assert found.measures[0].patched[layer, n] == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_of_each_steered_run_change_the_reference_values(name: str) -> None:
    for run in RUNS:
        change = np.array(measured(name, run)) - np.array(measured(name, RUNS[run].text))
        assert np.abs(change).max() > 0.02, run


def test_conventions_of_a_steered_run_state_its_rules(folder: Path) -> None:
    said = results(folder, "llama", "planned")
    assert "3 * d" in said["of_added"].conventions["run added"]
    assert "norm" in said["of_added"].conventions["direction d"]
    assert "numbered consecutively" in said["of_counted"].conventions["position ids"]
    assert "a different block" in said["of_repeated"].conventions["blocks"]
    assert "`away` receives the clean run of all rows" in said["of_made"].conventions["set"]
    assert "allowed keys" in said["of_ahead"].conventions["edges"]


# --- dependent checks -----------------------------------------------------------------------------


def test_patch_after_the_measured_token_acts_on_a_run_with_allowed_keys(data: Path) -> None:
    """A patch after the measured token has an effect on a run whose tokens see later ones."""
    own = "run ahead { allow attention layer 1 from cue token to last token }"
    rule = "patch resid_post layer 0 at last token"
    measure = "measure logit(answer) - logit(wrong) at cue token as delta"
    text = experiment("on", own, "from longer into ahead", rule, measure=measure)
    text += experiment("off", "from longer into clean", rule, measure=measure)
    found = run_file(text, data, "llama", "planned")
    on, off = (found[key].measures[0] for key in ("on", "off"))
    assert np.abs(on.patched - on.base).max() > 0.02
    assert not np.abs(off.patched - off.base).any()


REMOVED = "run skipped { replace block layer 1 with identity }"


@pytest.mark.parametrize(
    "lines",
    [
        (REMOVED, "from skipped into clean", "patch L1H0 at last token"),
        (REMOVED, "from clean into skipped", "patch mlp_out layer 1 at last token"),
        (REMOVED, "from clean into skipped", "path L0H0 -> L1H0.q at last token"),
        (REMOVED.replace("identity", "identity ablate L1H1 at last token with zero"),
         "from skipped into clean", "patch L0H0 at last token"),
        (REMOVED, "run on { from clean into skipped patch L1H0 at last token }",
         "from on into clean", "patch L0H0 at last token"),
    ],
)  # fmt: skip
def test_sites_in_a_block_that_a_derived_run_removes_are_errors(
    data: Path, lines: tuple[str, ...]
) -> None:
    assert codes(experiment("e", *lines), data) == ["E0414"]


def test_failing_python_function_in_a_derived_run_is_an_error(folder: Path) -> None:
    rule = 'run made { set resid_post layer 1 at last token to python("own.py:broken") }'
    text = experiment("e", rule, "from made into clean", "patch L0H0 at last token")
    result, found = with_python(text, folder, "llama")
    assert [each.code for each in found if each.severity == "error"] == ["E0223"]
    assert result is None or not result.experiments


def test_python_function_in_a_derived_run_receives_the_rows_after_keep(folder: Path) -> None:
    lines = ["keep prob(answer) > 0.012", *defined("made"), "from made into clean"]
    text = experiment("e", *lines, "patch resid_post layer 1 at last token")
    result, _ = with_python(text, folder, "llama")
    found = as_in_the_data(result.experiments[0])
    assert found.row_ids is not None
    kept = list(found.row_ids)
    assert 1 < len(kept) < COUNT
    every = [plain("llama", "clean", n)[1][1][-1] for n in kept]
    mean = torch.stack(every).mean(0)
    for number, (n, own) in enumerate(zip(kept, every, strict=True)):
        patch = (1, tokens(rows()[n], "last token")[0], 2 * own - mean)
        logits, _ = called("llama", rows()[n], (), n, [patch])
        value = difference(logits, records()[n])
        assert found.measures[0].patched[0, number] == pytest.approx(value, abs=1e-4)


def test_zero_direction_in_a_derived_run_is_an_error(data: Path) -> None:
    nothing = "direction none = mean_difference(p, p) at resid_post layer 1 at last token\n"
    rule = "run steered { add none to resid_post layer 1 at last token }"
    text = nothing + experiment("e", rule, "from steered into clean", "patch L0H0 at last token")
    assert "E0641" in codes(text, data)
