"""`save` lines that read results of other experiments: the same files as with the sites by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mechdsl.results.experiment_result import ExperimentResult, FileResult

from .support import ABSOLUTE, DIFFERENCE, MODES, bare, experiment, try_file


def measured(name: str, *lines: str) -> str:
    return experiment(name, "prompts p", *lines)


def save(name: str, *lines: str, prompts: str = "prompts p") -> str:
    return experiment(name, prompts, *lines, stats="")


SWEEP = measured(
    "sweep", "from longer into clean", "patch head_out layer * head * at last token", DIFFERENCE
)
LOOK = measured(
    "look",
    "observe norm head_out layer * head * of longer at last token as norms",
    "observe attention layer 1 head 0 from last token to each item token as seen",
)
HURT = "run hurt { from longer into clean patch SITE at last token }"


def run(folder: Path, *experiments: str, mode: str = "planned") -> FileResult:
    result, found = try_file("".join(experiments), folder, bare("llama"), MODES[mode])
    assert result is not None, found
    errors = [each for each in found if each.severity == "error"]
    assert not errors
    return result


def best_heads(found: ExperimentResult) -> list[str]:
    """The heads by their first measure, the largest first."""
    measure = found.measures[0]
    values = measure.patched if measure.effect == "raw" else measure.patched - measure.base
    order = values.mean(axis=1).argsort()[::-1]
    coords = [found.cells[n].coords for n in order]
    return [f"L{each['layer']}H{each['head']}" for each in coords]


@pytest.mark.parametrize("mode", ["plain", "planned", "small passes"])
def test_save_of_top_sites_equals_named_sites(mode: str, tmp_path: Path) -> None:
    line = 'save top 2 of sweep at cue token to "a.safetensors"'
    result = run(tmp_path, SWEEP, save("e", line), mode=mode)
    first, second = best_heads(result.experiments[0])[:2]
    assert first != "L0H0"
    lines = [
        f'save head_out layer {each[1]} head {each[3]} at cue token to "{each}.safetensors"'
        for each in (first, second)
    ]
    run(tmp_path, save("e", *lines), mode=mode)
    found = load_file(tmp_path / "a.safetensors")
    for each in (first, second):
        tensor = f"head_out.layer{each[1]}.head{each[3]}"
        expected = load_file(tmp_path / f"{each}.safetensors")[tensor]
        torch.testing.assert_close(found[tensor], expected, atol=ABSOLUTE, rtol=1e-3)


@pytest.mark.parametrize("mode", ["plain", "planned"])
@pytest.mark.parametrize("measure", ["", "measure prob(answer) as raw"])
def test_save_of_a_derived_run_with_top_sites_equals_named_sites(
    measure: str, mode: str, tmp_path: Path
) -> None:
    """A run whose rule patches a selected head, in an experiment with and without measures."""
    rest = [measure, 'save resid_post layer 2 of hurt at last token to "a.safetensors"']
    rest = [each for each in rest if each]
    picked = save("e", HURT.replace("SITE", "top 1 of sweep"), *rest)
    result = run(tmp_path, SWEEP, picked, mode=mode)
    first = best_heads(result.experiments[0])[0]
    found = load_file(tmp_path / "a.safetensors")["resid_post.layer2"]
    tensors: dict[str, torch.Tensor] = {}
    for site in (first, "L0H0"):
        run(tmp_path, save("e", HURT.replace("SITE", site), *rest), mode=mode)
        tensors[site] = load_file(tmp_path / "a.safetensors")["resid_post.layer2"]
    torch.testing.assert_close(found, tensors[first], atol=ABSOLUTE, rtol=1e-3)
    assert (found - tensors["L0H0"]).abs().max() > 0.01


def test_save_with_top_results_of_an_observation_equals_its_values(tmp_path: Path) -> None:
    """Top results are used in a derived run and as positions."""
    lines = [
        HURT.replace("SITE", "top 1 of norms"),
        'save resid_post layer 2 of hurt at last token to "a.safetensors"',
        'save mean of resid_post layer 1 at top 2 of seen tokens to "b.safetensors"',
        'save resid_post layer 1 at top 2 of seen tokens to "c.safetensors"',
    ]
    result = run(tmp_path, LOOK, save("e", *lines))
    norms, seen = (next(e for e in result.experiments if e.name == f"look.{n}")
                   for n in ("norms", "seen"))  # fmt: skip
    first = best_heads(norms)[0]
    found = load_file(tmp_path / "a.safetensors")["resid_post.layer2"]
    run(tmp_path, save("e", HURT.replace("SITE", first), lines[1]))
    expected = load_file(tmp_path / "a.safetensors")["resid_post.layer2"]
    torch.testing.assert_close(found, expected, atol=ABSOLUTE, rtol=1e-3)
    every = load_file(tmp_path / "c.safetensors")
    values = torch.from_numpy(seen.measures[0].patched)
    for column, row in enumerate(seen.row_ids):
        tokens = every["token"][every["row"] == row].tolist()
        own = values[:, column].nan_to_num(-1).argsort(descending=True)[:2] + 1
        assert sorted(tokens) == sorted(own.tolist())
    parts = [every["resid_post.layer1"][every["row"] == row].mean(0) for row in seen.row_ids]
    mean = load_file(tmp_path / "b.safetensors")["resid_post.layer1"]
    torch.testing.assert_close(mean, torch.stack(parts).mean(0), atol=ABSOLUTE, rtol=1e-3)


def test_save_of_prompts_with_replies_has_the_generated_replies(tmp_path: Path) -> None:
    """The rows have the replies that were generated, not placeholders."""
    writer = measured("writer", "generate 3", "measure length as raw")
    line = 'save resid_post layer 1 at last token to "a.safetensors"'
    text = writer + save("e", line, prompts="prompts p with replies of writer")
    run(tmp_path, text)
    rows = [json.loads(each) for each in (tmp_path / "a.jsonl").open(encoding="utf-8")]
    run(tmp_path, save("e", "generate 3", "measure length as raw",
                       'save resid_post layer 1 at each step to "b.safetensors"'))  # fmt: skip
    own = [json.loads(each) for each in (tmp_path / "b.jsonl").open(encoding="utf-8")]
    assert {each["row"]: each["ids"] for each in rows} == {each["row"]: each["ids"] for each in own}


def test_failed_selection_loses_only_its_file(tmp_path: Path) -> None:
    keeps = measured("sweep", "ablate head_out layer * head * at last token with zero",
                       "keep logit(answer) > 1000", DIFFERENCE)  # fmt: skip
    picked = save("e", 'save top 2 of sweep at cue token to "a.safetensors"')
    other = save("f", 'save resid_post layer 1 at cue token to "b.safetensors"')
    result, found = try_file(keeps + picked + other, tmp_path, bare("llama"))
    assert result is not None
    assert {each.code for each in found if each.severity == "error"} == {"E0613", "E0622"}
    assert [each.path.name for each in result.saved] == ["b.safetensors"]


def test_save_of_top_sites_gives_no_selection_warning(tmp_path: Path) -> None:
    text = SWEEP + save("e", 'save top 2 of sweep at cue token to "a.safetensors"')
    _, found = try_file(text, tmp_path, bare("llama"))
    assert "W0721" not in [each.code for each in found]
