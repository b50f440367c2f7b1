"""`ablate … with zero, mean, resample`: an axis of fills, each cell as an experiment of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mechdsl.pipeline.run_options import RunOptions
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.store.store import Store

from ..execute import support as plain
from ..execute.support import MODES
from .support import codes, experiment, run_file

RULES = {
    "heads": "ablate z layer * head 1..2 at last token, cue token",
    "occurrences": "ablate resid_post layer 0..1 at each item token",
    "joined": "ablate mlp_out layers 0..1 at {last token, cue token}",
}
OCCURRING = ("zero", "mean", "mean of turned by cue", "resample")


def files(key: str) -> tuple[str, tuple[str, ...], str]:
    """All fills in one experiment, and each in one of its own."""
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


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("key", RULES)
def test_each_fill_is_what_it_is_alone(data: Path, key: str, name: str, mode: str) -> None:
    every, fills, lone = files(key)
    same(run_file(every + lone, data, name, mode), fills)


def test_values_are_those_of_the_fill_alone(tmp_path: Path) -> None:
    """They are found in a store, whichever was there first; equal rows are run once."""
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
def test_it_is_refused_once(data: Path, rule: str, code: str) -> None:
    assert codes(experiment("e", rule), data).count(code) == 1
