"""`ablate … with zero, mean, resample`: an axis of fills, each cell equal to one experiment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.store.store import Store

from ..execute import support as plain
from ..execute.support import MODES
from ..quick import in_turn
from ..reference.forward import Write
from .paths import End, copied
from .support import (
    BLOCKS,
    Text,
    codes,
    difference,
    edited,
    experiment,
    records,
    rows,
    run_file,
    tokens,
    try_file,
)
from .support import plain as reference

RULES = {
    "heads": "ablate z layer * head 1..2 at last token, cue token",
    "occurrences": "ablate resid_post layer 0..1 at each item token",
    "joined": "ablate mlp_out layers 0..1 at {last token, cue token}",
}
OCCURRING = ("zero", "mean", "mean of turned by cue", "resample")


def files(key: str) -> tuple[str, tuple[str, ...], str]:
    """All fills in one experiment, and each in a separate one."""
    fills = OCCURRING
    rule, beside = RULES[key], "set attn_out layer 2 at last token to 0.5"
    every = experiment("every", f"{rule} with {', '.join(fills)}", beside)
    lone = "".join(
        experiment(f"f{n}", f"{rule} with {fill}", beside) for n, fill in enumerate(fills)
    )
    return every, fills, lone


def same(found: dict[str, ExperimentResult], fills: tuple[str, ...]) -> None:
    every = found["every"]
    assert every.axes[-1] == "fill"
    assert [cell.coords["fill"] for cell in every.cells[: len(fills)]] == list(fills)
    values = every.measures[0].patched
    values = values.reshape(-1, len(fills), values.shape[-1])
    spread = 0.0
    for n in range(len(fills)):
        own = found[f"f{n}"].measures[0]
        np.testing.assert_allclose(values[:, n], own.patched, atol=1e-4)
        spread = max(spread, float(np.nanmax(np.abs(own.patched - values[:, 0]))))
    assert spread > 0.1


EACH = [
    pytest.param(name, mode, marks=() if "llama" in name or mode == "planned" else pytest.mark.slow)
    for name in ("gpt2", "llama", "gpt_neox")
    for mode in MODES
]


@pytest.mark.parametrize(("name", "mode"), EACH)
@pytest.mark.parametrize("key", RULES)
def test_each_cell_of_a_fill_axis_equals_a_separate_experiment(
    data: Path, key: str, name: str, mode: str
) -> None:
    every, fills, lone = files(key)
    same(run_file(every + lone, data, name, mode), fills)


def test_store_shares_rows_between_fill_axes_and_separate_fills(tmp_path: Path) -> None:
    """Stored rows are cache hits in either order; equal rows run once."""
    rule = "ablate z layer 1 head 1..2 at last token with"
    lone = [f"{rule} {fill}" for fill in OCCURRING]
    every = f"{rule} {', '.join(OCCURRING)}"

    def ran(rules: list[str], store: Path) -> int:
        done: list[int] = []
        how = RunOptions(on_profile=lambda _, profile: done.append(profile.distinct))
        text = "".join(
            plain.experiment(f"e{n}", "prompts p", one, plain.DIFFERENCE)
            for n, one in enumerate(rules)
        )
        with Store(store) as kept, kept.begin(text, {}) as opened:
            found, problems = plain.try_file(text, tmp_path, plain.bare("llama"), how, run=opened)
            assert found is not None, problems
            opened.finish({}, {})
        return sum(done)

    rows = 2 * len(plain.ROWS)
    assert ran(lone, tmp_path / "a") == len(OCCURRING) * rows
    assert ran([every], tmp_path / "a") == 0
    assert ran([every], tmp_path / "b") == len(OCCURRING) * rows
    assert ran(lone, tmp_path / "b") == 0
    assert ran([every, *lone], tmp_path / "c") == len(OCCURRING) * rows


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("ablate z layer 1 head 1 at last token with zero, maen", "E0203"),
        ("ablate z layer 1 head 1 at last token with zero by cue, mean", "E0201"),
        ("ablate z layer 1 head 9 at last token with zero, mean", "E0301"),
        (
            "ablate z layer 1 head 1 at last token with zero, mean\n"
            "  ablate z layer 2 head 1 at last token with zero, mean",
            "E0320",
        ),
        ("ablate z layer 1 head 1 at each item token with zero, mean of longer", "E0108"),
    ],
)
def test_invalid_fill_lists_are_reported_once(data: Path, rule: str, code: str) -> None:
    assert codes(experiment("e", rule), data).count(code) == 1


# --- rows of other blocks and of splits -----------------------------------------------------------

PARTS = BLOCKS.replace('  rows "data.jsonl"\n', '  rows "data.jsonl"\n  split 50%\n', 1)


def taken(name: str, donor: Text, n: int, layer: int, at: str) -> float:
    """The effect of a donor's activation at one token."""
    text, record = rows()[n], records()[n]
    ends = [End("resid_post", layer)]
    writes = copied(ends, reference(name, donor), tokens(donor, at), tokens(text, at))
    return difference(edited(name, text, writes).logits, record)


@pytest.mark.parametrize(("mode", "name"), in_turn(list(MODES), ["gpt2", "llama", "gpt_neox"]))
def test_resample_of_another_block_writes_vectors_of_its_rows(
    data: Path, name: str, mode: str
) -> None:
    """A block of one row gives that row; otherwise the content of the row selects one."""
    rule = "ablate resid_post layer 0..1 at last token with resample of"
    text = "".join(experiment(f"e{n}", f"{rule} {b}") for n, b in enumerate(("single", "second")))
    found = run_file(text, data, name, mode)
    drawn: set[int] = set()
    for layer in range(2):
        for n in range(len(records())):
            one = taken(name, rows("single")[0], n, layer, "last token")
            assert found["e0"].measures[0].patched[layer, n] == pytest.approx(one, abs=1e-4)
            each = [taken(name, donor, n, layer, "last token") for donor in rows("second")]
            errors = np.abs(found["e1"].measures[0].patched[layer, n] - np.array(each))
            assert errors.min() < 1e-4
            assert (errors < 1e-3).sum() == 1
            drawn.add(int(errors.argmin()))
    assert len(drawn) > 1


def test_resample_donor_depends_only_on_the_row(data: Path) -> None:
    rule = "ablate resid_post layer 1 at last token with resample of second"
    whole = run_file(experiment("e", rule), data, "llama", "planned")["e"].measures[0].patched
    keep = "  keep logit(answer) > -1000000\n  keep rank(answer) > 0"
    again = run_file(experiment("e", rule, keep), data, "llama", "planned")["e"].measures[0].patched
    np.testing.assert_allclose(again, whole, atol=1e-5)
    first = run_file(
        experiment("e", rule).replace("prompts p", "prompts p limit 2"), data, "llama", "planned"
    )["e"]
    assert first.row_ids is not None
    np.testing.assert_allclose(first.measures[0].patched, whole[:, list(first.row_ids)], atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_mean_of_a_split_equals_the_reference(data: Path, name: str) -> None:
    """Also within a block: means of one part are written into the other."""
    rule = "ablate resid_post layer 0..1 at last token with mean of p.train"
    one, other = experiment("a", rule), experiment("b", rule, block="second")
    text = one.replace("prompts p", "prompts p.test") + other
    text += experiment("c", rule).replace("prompts p", "prompts p.train")
    found = run_file(text, data, name, "planned", blocks=PARTS)
    train, test = found["c"].row_ids, found["a"].row_ids
    assert train is not None
    assert test is not None
    assert len(train) == 2
    assert not {*train} & {*test}
    for layer in range(2):
        every = [reference(name, rows()[n])["resid_post", layer][-1, 0] for n in train]
        mean = torch.stack(every).mean(0)
        for key, block, own in (("a", "clean", test), ("b", "second", range(4))):
            values = found[key].measures[0].patched[layer]
            for value, n in zip(values, own, strict=True):
                text_of = rows(block)[n]
                write = Write("resid_post", layer, mean, text_of.last, 0)
                record = records("p" if block == "clean" else block)[n]
                by_hand = difference(edited(name, text_of, [write]).logits, record)
                assert value == pytest.approx(by_hand, abs=1e-4)


def test_mean_of_a_corruption_ignores_a_source_run_of_the_same_block(data: Path) -> None:
    """`second.turned` differs from `second`, which `from second into clean` makes a run."""
    rule = "ablate resid_post layer 0..1 at last token with mean of second.turned"
    text = experiment("a", rule) + experiment("b", "from second into clean", rule)
    text += experiment("c", rule.removesuffix(".turned"))
    found = run_file(text, data, "llama", "planned")
    a, b, c = (found[key].measures[0].patched for key in "abc")
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(a - c).max() > 0.01


_SELF = "patch z layer 1 head 1 at last token with clean"


@pytest.mark.parametrize(
    ("rule", "warned"),
    [
        ("patch resid_post layer 1 at cue token with clean", True),
        ("patch resid_post layer 1 at cue token onto cue token with clean", True),
        ("patch resid_post layer 1 at cue token onto last token with clean", False),
        ("patch resid_post layer 1 at cue token into layer 2 with clean", False),
        (f"{_SELF} patch z layer 2 head 0 at last token with clean", True),
        (f"observe norm resid_post layer 2 at last token {_SELF}", True),
        (f"ablate z layers * heads * at last token with mean {_SELF}", False),
        (f"{_SELF} ablate z layers * heads * at last token with mean", False),
        (f"scale embed at tokens * by 0.5 {_SELF}", False),
        (f"block attention layer 0 from last token to cue token {_SELF}", False),
        (f"patch resid_post layer 0 at cue token with longer {_SELF}", False),
    ],
)
def test_patch_from_the_base_run_without_effect_is_a_warning(
    data: Path, rule: str, warned: bool
) -> None:
    _, diagnostics = try_file(experiment("e", rule), data, "llama")
    assert ("W0732" in [found.code for found in diagnostics]) == warned


def test_patch_from_the_base_run_restores_what_another_rule_ablates(data: Path) -> None:
    """The patch is of the run without rules, so it has an effect next to an ablation."""
    ablated = "ablate z layers * heads * at last token with mean"
    text = experiment("a", ablated) + experiment("b", ablated, _SELF) + experiment("c", _SELF)
    found = run_file(text, data, "llama", "planned")
    a, b, c = (found[key].measures[0].patched - found[key].measures[0].base for key in "abc")
    assert np.abs(b - a).max() > 1e-3
    assert np.abs(c).max() == 0
