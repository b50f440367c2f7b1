"""Paths to the logits and to other receivers at once: edges are patched separately.

The reference has no held pass. It computes a sender's contribution to the stream from the weights,
and adds the change before the norm of each receiver and before the final norm. Everything else in
that pass is computed (Conmy et al. 2023, arXiv 2304.14997).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.diagnostics.rendering import render_full
from mechdsl.results.experiment_result import ExperimentResult

from ..execute import test_masked
from ..quick import in_turn, some
from ..reference.forward import Run, Write, forward, stack
from .models import double
from .paths import End, plain
from .support import (
    QUICK,
    Array,
    difference,
    experiment,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
)

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "gpt_neox_sequential")
QUICKLY = {("planned", "gpt2"), ("plain", "llama"), ("planned", "gpt_neox")}
"""Modes and models that aren't slow; `gpt_neox_sequential` has the structure of gpt2."""
LAST, HEADS = 2, 4


@dataclass(frozen=True)
class Case:
    sender: End
    receivers: tuple[End, ...]
    end: bool = True
    at: str = "last token"
    run: str = "longer"
    base: str = "clean"
    measured: str = "last token"
    beside: str = ""
    """Another rule."""
    writes: tuple[tuple[str, int, float], ...] = ()
    """Its reference: site, layer, and the factor at all tokens."""

    @property
    def sites(self) -> str:
        named = [_written(end) for end in self.receivers] + ["logits"] * self.end
        return ", ".join(named)

    def lines(self, key: str) -> str:
        rule = f"path {_written(self.sender)} -> {key}_ends at {self.at}"
        lines = [rule, self.beside] if self.beside else [rule]
        measure = f"measure logit(answer) - logit(wrong) at {self.measured} as delta"
        own = experiment(key, f"from {self.run} into {self.base}", *lines, measure=measure)
        return f"group {key}_ends = {self.sites}\n{own}"


def _written(end: End) -> str:
    """The text of a site in a model of three layers."""
    layer = "" if end.layer is None else f" layer {end.layer}"
    unit = "" if end.unit is None else f" head {end.unit}"
    return f"{end.site}{layer}{unit}"


@torch.no_grad()
def gained(name: str, case: Case, base: Run, source: Run, here: int, there: int) -> Tensor:
    """[d_model]: the change of the stream where the sender writes."""
    end, parts = case.sender, stack(name, double(name))
    if end.site in ("mlp_out", "attn_out", "resid_post", "embed"):
        return source[end.site, end.layer][there, 0] - base[end.site, end.layer][here, 0]
    assert end.site == "z"
    assert end.layer is not None
    assert end.unit is not None
    block = parts.block(end.layer)
    weight, bias = parts.output(block)
    each = weight.unflatten(0, (HEADS, -1))
    z = base["z", end.layer][here].clone()
    sums: list[Tensor] = []
    for own in (z, torch.cat([z[: end.unit], source["z", end.layer][there][end.unit, None],
                              z[end.unit + 1 :]])):  # fmt: skip
        total = torch.einsum("hd,hdm->m", own, each)
        sums.append(parts.behind_attention(block, total if bias is None else total + bias))
    return sums[1] - sums[0]


@torch.no_grad()
def patched(name: str, case: Case, n: int) -> Tensor:
    """[T, vocab]"""
    model, ids = double(name), rows(case.base)[n].ids
    parts = stack(name, model)
    rules = [Write(site, layer, lambda now, by=by: now * by) for site, layer, by in case.writes]
    base = forward(name, model, ids, rules) if rules else plain(name, model, ids)
    source = plain(name, model, rows(case.run)[n].ids)
    writes: list[Write] = []
    spots = zip(
        tokens(rows(case.base)[n], case.at), tokens(rows(case.run)[n], case.at), strict=True
    )
    for here, there in spots:
        more = gained(name, case, base, source, here, there)
        for end in case.receivers:
            assert end.layer is not None
            first, second = parts.norms(parts.block(end.layer))
            in_mlp = end.site == "mlp_norm"
            read = "resid_mid" if in_mlp and not parts.parallel else "resid_pre"
            stream = (base[read, end.layer][here, 0] + more)[None, None]
            if in_mlp or end.site == "attn_norm":
                normed = (second if in_mlp else first)(stream)[0, 0]
                writes.append(Write(end.site, end.layer, normed, here))
                continue
            made = parts.project(parts.block(end.layer), first(stream))
            value = made["qkv".index(end.site)][0, 0]
            for unit in range(len(value)) if end.unit is None else [end.unit]:
                writes.append(Write(end.site, end.layer, value[unit], here, unit))
        if case.end:
            add = Write("resid_post", LAST, lambda now, more=more: now + more, here)
            writes.append(add)
    return forward(name, model, ids, [*writes, *rules]).logits


# --- cases ----------------------------------------------------------------------------------------

Z, M = End("z", 0, 1), End("mlp_out", 1)
CASES: dict[str, Case] = {
    "a_query": Case(Z, (End("q", 2, 1),)),
    "two_queries": Case(Z, (End("q", 2, 1), End("q", 2, 3))),
    "two_that_are_apart": Case(M, (End("q", 2, 0), End("v", 2, 1))),
    "keys": Case(M, (End("k", 2, 0), End("k", 2, 1)), at="cue token", measured="cue token"),
    "an_mlp": Case(Z, (End("mlp_norm", 2),)),
    "an_mlp_of_the_next_layer": Case(M, (End("mlp_norm", 2),)),
    "an_mlp_of_its_layer": Case(End("z", 1, 2), (End("mlp_norm", 1),)),
    "attention": Case(Z, (End("attn_norm", 1),), at="{cue token, last token}"),
    "everywhere": Case(M, (End("attn_norm", 2),), at="tokens *", run="other"),
    "from_the_stream": Case(End("resid_post", 0), (End("q", 2, 1), End("k", 2, 0))),
    "from_the_embedding": Case(
        End("embed"), (End("v", 1, 0),), run="other", at="subject token", measured="subject token"
    ),
    "attention_as_a_sender": Case(End("attn_out", 1), (End("q", 2, 0),)),
    "out_of_the_longer_run": Case(Z, (End("q", 2, 1),), run="clean", base="longer"),
    "beside_a_scaled_mlp": Case(
        Z, (End("q", 2, 1),), beside="scale mlp_out layer 1 at tokens * by -1",
        writes=(("mlp_out", 1, -1.0),),
    ),
    "beside_a_scaled_stream": Case(
        M, (End("q", 2, 1),), beside="scale resid_post layer 2 at tokens * by 0.5",
        writes=(("resid_post", LAST, 0.5),),
    ),
}  # fmt: skip


def there(name: str, key: str) -> bool:
    """In a parallel block no head sends to the MLP of its layer."""
    return not (name == "gpt_neox" and key == "an_mlp_of_its_layer")


@cache
def results(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    text = ""
    for key, case in CASES.items():
        if there(name, key):
            text += case.lines(key)
            text += replace(case, end=False).lines(f"{key}_alone")
            text += replace(case, receivers=()).lines(f"{key}_end")
    return run_file(text, data, name, mode, precise=name != "gemma2")


@cache
def expected(name: str, case: Case) -> Array:
    """[prompt]"""
    found: list[float] = []
    for n, record in enumerate(records()):
        (at,) = tokens(rows(case.base)[n], case.measured)
        found.append(difference(patched(name, case, n), record, at))
    return np.array(found)


def of(found: ExperimentResult) -> Array:
    return found.measures[0].patched[0]


def fine(name: str) -> float:
    """Norms of gemma2 compute in 32 bits."""
    return 1e-4 if name == "gemma2" else 1e-5


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(n, m, marks=() if (m, n) in QUICKLY else pytest.mark.slow)
        for n in FAMILIES
        for m in QUICK
    ],
)
@pytest.mark.parametrize("key", list(CASES))
def test_paths_to_the_end_equal_the_reference(data: Path, key: str, name: str, mode: str) -> None:
    """Each of the two types of receivers alone equals the reference, too."""
    if not there(name, key):
        pytest.skip("no path leads there")
    case, found = CASES[key], results(data, name, mode)
    both, alone, end = (of(found[f"{key}{kind}"]) for kind in ("", "_alone", "_end"))
    parts = replace(case, end=False), replace(case, receivers=())
    np.testing.assert_allclose(both, expected(name, case), atol=fine(name))
    np.testing.assert_allclose(alone, expected(name, parts[0]), atol=fine(name))
    np.testing.assert_allclose(end, expected(name, parts[1]), atol=fine(name))


@pytest.mark.parametrize("name", some(FAMILIES, FAMILIES[:4]))
@pytest.mark.parametrize("key", list(CASES))
def test_reference_values_of_joint_and_separate_receivers_differ(name: str, key: str) -> None:
    if not there(name, key):
        pytest.skip("no path leads there")
    case = CASES[key]
    both = expected(name, case)
    for other in (replace(case, end=False), replace(case, receivers=())):
        assert np.abs(both - expected(name, other)).max() > 10 * fine(name)


# --- laws -----------------------------------------------------------------------------------------

WHOLE: dict[str, tuple[str, str, str]] = {
    "gpt2": ("z layer 2 head 1", "mlp_norm layer 2", "z layer 2 head 1"),
    "llama": ("z layer 2 head *", "mlp_norm layer 2", "z layer 2 head *"),
    "gemma2": ("attn_out layer 2", "mlp_norm layer 2", "attn_out layer 2"),
    "gpt_neox_sequential": ("z layer 2 head 1", "mlp_norm layer 2", "z layer 2 head 1"),
    "gpt_neox": ("z layer 1 head *", "attn_norm layer 2, mlp_norm layer 2", "z layer 1 head *"),
}


@pytest.mark.parametrize(("name", "mode"), in_turn(list(WHOLE), QUICK))
def test_paths_to_all_readers_equal_a_patch(data: Path, name: str, mode: str) -> None:
    """Paths to all readers of a sender equal a patch of the sender."""
    sender, receivers, patch = WHOLE[name]
    start = "from longer into clean"
    text = f"group ends = {receivers}, logits\n"
    text += experiment("edges", start, f"path {sender} -> ends at last token")
    text += experiment("whole", start, f"patch {patch} at last token")
    text += experiment("direct", start, f"path {sender} -> logits at last token")
    found = run_file(text, data, name, mode, precise=name != "gemma2")
    edges, whole, direct = (found[key].measures[0].patched for key in ("edges", "whole", "direct"))
    np.testing.assert_allclose(edges, whole, atol=fine(name))
    assert np.abs(edges - direct).max() > 10 * fine(name)
    assert np.abs(edges - found["edges"].measures[0].base).max() > 0.02


@pytest.mark.parametrize("mode", QUICK)
def test_sweep_cells_have_only_the_receivers_that_they_reach(data: Path, mode: str) -> None:
    """The last layers reach only the end."""
    start, at = "from longer into clean", "at last token"
    text = "group ends = q layer 1 head 0, q layer 1 head 2, final_norm\n"
    text += "group inside = q layer 1 head 0, q layer 1 head 2\n"
    text += experiment("both", start, f"path resid_post layer * -> ends {at}")
    text += experiment("end", start, f"path resid_post layer * -> logits {at}")
    text += experiment("inner", start, f"path resid_post layer 0 -> inside {at}")
    found = run_file(text, data, "llama", mode, precise=True)
    both, end = found["both"].measures[0].patched, found["end"].measures[0].patched
    assert [cell.coords["layer"] for cell in found["both"].cells] == [0, 1, 2]
    np.testing.assert_allclose(both[1:], end[1:], atol=1e-9)
    assert np.abs(both[0] - end[0]).max() > 1e-3
    assert np.abs(both[0] - found["inner"].measures[0].patched[0]).max() > 1e-3
    case = Case(End("resid_post", 0), (End("q", 1, 0), End("q", 1, 2)))
    np.testing.assert_allclose(both[0], expected("llama", case), atol=1e-5)


@pytest.mark.parametrize("mode", QUICK)
def test_path_to_the_end_on_a_derived_run_equals_the_path_with_its_rules(
    data: Path, mode: str
) -> None:
    """The values equal those with the rules in the experiment."""
    text = ""
    for key, case in CASES.items():
        if case.writes:
            text += case.lines(key)
            path = f"path {_written(case.sender)} -> {key}_ends at {case.at}"
            start = f"run {key}_there {{ {case.beside} }}", f"from {case.run} into {key}_there"
            text += experiment(f"{key}_run", *start, path)
    found = run_file(text, data, "llama", mode, precise=True)
    for key, case in CASES.items():
        if case.writes:
            np.testing.assert_allclose(of(found[f"{key}_run"]), of(found[key]), atol=1e-9)


# --- conventions and errors -----------------------------------------------------------------------


@pytest.mark.slow
def test_conventions_of_paths_to_the_end_state_full_forward_passes(data: Path) -> None:
    found = results(data, "llama", "planned")
    said = found["a_query"].conventions
    assert ("the change that only the senders cause in the stream after the last block") in said[
        "path"
    ]
    assert "full forward passes" in said["passes"]
    for kind in ("alone", "end"):
        assert "alone change" not in found[f"a_query_{kind}"].conventions["path"]


REFUSED: dict[tuple[str, str], str] = {
    ("q layer 2 head 1", "L0H1 -> ends at last token through mlps"): "an MLP would see",
    ("q layer 2 head 1", "L0H1 -> ends at last token with frozen norms"): "would be frozen",
    ("resid_pre layer 2", "L0H1 -> ends at last token"): "already carries",
    ("q layer 1 head 1, q layer 2 head 1", "L0H1 -> ends at last token"): "reads after",
    ("q layer 1 head 1, mlp_norm layer 1", "L0H1 -> ends at last token"): "reads after",
    ("q layer 1 head 1", "layers 0..1 head * -> ends at last token"): "isn't before",
}


@pytest.mark.parametrize("lines", list(REFUSED))
def test_invalid_receivers_next_to_the_end_are_errors(data: Path, lines: tuple[str, str]) -> None:
    text = f"group ends = {lines[0]}, logits\n"
    text += experiment("e", "from longer into clean", f"path {lines[1]}")
    result, found = try_file(text, data, "llama")
    assert result is None
    assert [d.code for d in found] == ["E0334"]
    assert REFUSED[lines] in render_full(found, color=False, width=300)


def test_path_to_the_end_in_a_model_with_norms_after_sums_is_an_error(tmp_path: Path) -> None:
    """A change before such a norm differs from the change after it."""
    rule = next(line for line in test_masked.FILE.splitlines() if "SITE" in line)
    path = 'path z layer 0 head 1 -> ends at "w8" token'
    given = {"bert": (test_masked.masked_model()[1], test_masked.tokenizer())}
    file = tmp_path / "masked.mech"
    for ends in ("logits", "q layer 1 head 0, logits"):
        text = test_masked.FILE.replace(rule, path)
        text = text.replace("mech 1\n", f"mech 1\ngroup ends = {ends}\n")
        file.write_text(text, encoding="utf-8")
        if ends == "logits":
            mechdsl.run(file, models=given)
    with pytest.raises(mechdsl.MechdslError, match="E0108") as found:
        mechdsl.run(file, models=given)
    assert "the sum of the outputs of blocks" in " ".join(str(found.value).split())


def test_observation_of_a_path_reads_the_last_pass(data: Path) -> None:
    """The change by the senders appears after the last block."""
    start, rule = "from longer into clean", "path L0H1 -> ends at last token"
    look = "observe logit_lens resid_post layer 2 at last token"
    text = "group ends = L2H1.q, logits\n"
    text += experiment("plain", start, rule) + experiment("seen", start, rule, look)
    found = run_file(text, data, "llama", "planned", precise=True)
    values, seen = (found[key].measures[0].patched for key in ("plain", "seen"))
    np.testing.assert_allclose(values, seen, atol=1e-6)
    assert np.abs(values[0] - unpatched("llama")).max() > 1e-2
