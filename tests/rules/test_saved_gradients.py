"""`save gradient of`: vectors in the file, against plain autograd on the bare model in 64 bits, one
unpadded prompt at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mechdsl.execute.patching import differentiated_run
from mechdsl.planner.passes import save_costs
from mechdsl.results.experiment_result import FileResult

from ..execute.support import MODES, PROMPTS, ROWS, Prompt, check_file, prompt, try_file
from ..execute.test_save import EXPERIMENT
from ..quick import in_turn
from ..reference.gradients import taken
from ..reference.noise import noise
from .models import bare, double
from .test_estimates import ONE, call_metric, logits_at_the_end, metrics, where

FAMILIES = ("gpt2", "llama", "gpt_neox")


def save(
    folder: Path, family: str, *lines: str, mode: str = "planned", prompts: str = PROMPTS
) -> FileResult:
    text = EXPERIMENT.format("\n  ".join(lines))
    result, found = try_file(text, folder, bare(family), MODES[mode], prompts=prompts)
    assert result is not None, found
    return result


def errors(folder: Path, *lines: str, prompts: str = PROMPTS) -> list[Any]:
    text = EXPERIMENT.format("\n  ".join(lines))
    _, found = try_file(text, folder, bare("llama"), prompts=prompts)
    return [each for each in found if each.severity == "error"]


def gradient(
    family: str,
    row: int,
    site: str,
    layer: int | None,
    text: str,
    run: str = "clean",
    moved: Tensor | None = None,
) -> Tensor:
    """[T, units, width] of one prompt, from autograd."""
    own = prompt(ROWS[row], run)
    compared = logits_at_the_end(family, tuple(prompt(ROWS[row], "other").ids))
    forward = call_metric(family, text, own, ROWS[row], compared)
    return taken(double(family), where(family, site, layer), forward, moved).gradient


def agrees(vector: Tensor, expected: Tensor) -> float:
    """Assert that the vector equals the reference; return the largest number."""
    largest = float(expected.abs().max())
    allowed = min(1e-4, max(1e-3 * largest, 2e-6))
    assert float((vector.double() - expected).abs().max()) <= allowed
    return largest


def columns(path: Path) -> tuple[dict[str, Tensor], list[tuple[int, int, int]]]:
    """The tensors of a file, and the (row, token, position) of each vector."""
    tensors = load_file(path)
    names = ("row", "token", "position")
    return tensors, list(zip(*(tensors[name].tolist() for name in names), strict=True))


PLACES: Sequence[Callable[[Prompt], Sequence[int]]] = (
    lambda own: [own.cue],
    lambda own: own.subject,
    lambda own: [own.last],
)


@pytest.mark.parametrize("run", ["clean", "longer"])
@pytest.mark.parametrize(
    ("mode", "family"),
    in_turn(["plain", "planned", "padded on the right", "small passes"], FAMILIES),
)
def test_saved_gradients_of_sites_and_positions_equal_autograd(
    family: str, mode: str, run: str, tmp_path: Path
) -> None:
    """Streams of several layers at once, heads and MLPs, in prompts of several lengths."""
    at = f"of {run} at cue token, subject tokens, last token"
    lines = [
        f'save gradient of {ONE} by resid_post layer 0..1 {at} to "a.safetensors"',
        f'save gradient of {ONE} by z layer 1 {at} to "b.safetensors"',
        f'save gradient of {ONE} by z layer 1 head 1, 3 {at} to "c.safetensors"',
        f'save gradient of {ONE} by mlp_out layer 2 {at} to "d.safetensors"',
        f'save gradient of {ONE} by embed {at} to "e.safetensors"',
    ]
    sites = [
        ("a.safetensors", "resid_post.layer0", "resid_post", 0, None),
        ("a.safetensors", "resid_post.layer1", "resid_post", 1, None),
        ("b.safetensors", "z.layer1", "z", 1, None),
        ("c.safetensors", "z.layer1.head1", "z", 1, 1),
        ("c.safetensors", "z.layer1.head3", "z", 1, 3),
        ("d.safetensors", "mlp_out.layer2", "mlp_out", 2, None),
        ("e.safetensors", "embed", "embed", None, None),
    ]
    files = {each.path.name: each.path for each in save(tmp_path, family, *lines, mode=mode).saved}
    largest = 0.0
    for file, name, site, layer, unit in sites:
        tensors, places = columns(files[file])
        assert sorted(places) == sorted(
            (row, token, position)
            for row in range(len(ROWS))
            for position, of in enumerate(PLACES)
            for token in of(prompt(ROWS[row], run))
        )
        by_row = [gradient(family, row, site, layer, ONE, run) for row in range(len(ROWS))]
        for vector, (row, token, _) in zip(tensors[name], places, strict=True):
            own = by_row[row][token]
            largest = max(largest, agrees(vector, own.flatten() if unit is None else own[unit]))
    assert largest > 0.3


@pytest.mark.parametrize("mode", ["planned", "padded on the right", "small passes"])
@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_saved_gradients_of_all_metrics_equal_autograd(
    family: str, mode: str, tmp_path: Path
) -> None:
    """Texts of several tokens, whole vocabularies, other runs, the loss and other positions."""
    lines = [
        f'save gradient of {text} by resid_post layer 1 at tokens * to "{n}.safetensors"'
        for n, text in enumerate(metrics(family))
    ]
    found = save(tmp_path, family, *lines, mode=mode).saved
    for each, text in zip(found, metrics(family), strict=True):
        tensors, places = columns(each.path)
        largest = 0.0
        for vector, (row, token, _) in zip(tensors["resid_post.layer1"], places, strict=True):
            expected = gradient(family, row, "resid_post", 1, text)[token].flatten()
            largest = max(largest, agrees(vector, expected))
        assert largest > 1e-3, text


def test_several_gradient_saves_in_one_experiment_equal_autograd(tmp_path: Path) -> None:
    """Activations and gradients by two metrics in two runs, and a sweep of the same experiment."""
    lines = [
        "from other into clean",
        "patch layer 1 head * at last token",
        "measure logit(answer) as delta",
        'save resid_post layer 1 of clean at last token to "a.safetensors"',
        f'save gradient of {ONE} by resid_post layer 1 of clean at last token to "b.safetensors"',
        'save gradient of loss by resid_post layer 1 of clean at cue token to "c.safetensors"',
        f'save gradient of {ONE} by resid_post layer 1 of other at last token to "d.safetensors"',
    ]
    result = save(tmp_path, "llama", *lines)
    assert [each.name for each in result.experiments] == ["e"]
    files = {each.path.name: columns(each.path) for each in result.saved}
    for file, text, run in (("b", ONE, "clean"), ("c", "loss", "clean"), ("d", ONE, "other")):
        tensors, places = files[f"{file}.safetensors"]
        for vector, (row, token, _) in zip(tensors["resid_post.layer1"], places, strict=True):
            expected = gradient("llama", row, "resid_post", 1, text, run)[token].flatten()
            assert agrees(vector, expected) > 1e-3
    ends = files["a.safetensors"][0]["resid_post.layer1"]
    assert not torch.allclose(ends, files["b.safetensors"][0]["resid_post.layer1"])


@pytest.mark.parametrize("mode", ["planned", "small passes"])
def test_saved_mean_gradients_weight_rows_equally(mode: str, tmp_path: Path) -> None:
    """A row counts once, whatever the number of its tokens."""
    at = "at subject tokens, last token"
    line = f'save mean of gradient of {ONE} by resid_post layer * {at} to "a.safetensors"'
    (found,) = save(tmp_path, "llama", line, mode=mode).saved
    tensors = load_file(found.path)
    for layer in range(3):
        every = [gradient("llama", row, "resid_post", layer, ONE)[:, 0] for row in range(len(ROWS))]
        for position, of in enumerate(PLACES[1:]):
            own = [
                each[list(of(prompt(record)))].mean(0)
                for each, record in zip(every, ROWS, strict=True)
            ]
            vector = tensors[f"resid_post.layer{layer}.position{position}"]
            agrees(vector, torch.stack(own).mean(0))
    assert f"mean of gradient of {ONE} by resid_post layer *" in found.line


NOISED = "corrupt noised { add gaussian(std: 1.5, samples: 3) to embed at subject tokens }"


@pytest.mark.parametrize("mode", ["planned", "small passes"])
def test_saved_gradients_of_each_noise_draw_equal_autograd(mode: str, tmp_path: Path) -> None:
    text = PROMPTS.replace("corrupt other", f"{NOISED}\n  corrupt other")
    at = "of noised at subject tokens, last token"
    line = f'save gradient of {ONE} by embed {at} to "a.safetensors"'
    (found,) = save(tmp_path, "llama", line, mode=mode, prompts=text).saved
    tensors, places = columns(found.path)
    checked = check_file(EXPERIMENT.format(line), tmp_path, shared_model(), text)
    table = checked.saving[0].table
    keys = dict(zip(table.row_ids, table.row_keys, strict=True))
    largest, seen = 0.0, set[int]()
    for vector, draw, (row, token, _) in zip(
        tensors["embed"], tensors["draw"].tolist(), places, strict=True
    ):
        own = prompt(ROWS[row])
        moved = torch.zeros(len(own.ids), 1, len(vector), dtype=torch.float64)
        for at_token in own.subject:
            drawn = noise(keys[row], draw, at_token, len(vector))
            moved[at_token, 0] = 1.5 * drawn
        expected = gradient("llama", row, "embed", None, ONE, moved=moved)[token].flatten()
        largest, seen = max(largest, agrees(vector, expected)), seen | {draw}
    assert seen == {0, 1, 2}
    assert largest > 0.1


def shared_model() -> Any:
    from ..execute.support import shared

    return shared(bare("llama"))


def test_saved_gradient_file_names_the_metric_and_the_run(tmp_path: Path) -> None:
    """The metric is in the file, in the printed line and in the plan."""
    site = "z layer 1 at tokens *"
    line = f'save gradient of {ONE} at cue token by {site} to "a.safetensors" as float16'
    (found,) = save(tmp_path, "llama", line).saved
    with safe_open(found.path, "pt") as file:
        assert file.metadata()["gradient"] == f"{ONE} at cue token"
        assert file.metadata()["run"] == "clean"
    assert found.line.startswith(f"e: gradient of {ONE} at cue token by z layer 1 of clean at")
    assert load_file(found.path)["z.layer1"].dtype == torch.float16
    tensors, places = columns(found.path)
    after = np.array([token > prompt(ROWS[row]).cue for row, token, _ in places])
    assert not tensors["z.layer1"][torch.from_numpy(after)].any()


def test_plan_counts_one_pass_for_all_gradient_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward and one backward pass for all sites of a batch."""
    passes: list[int] = []
    compute = differentiated_run.compute_gradients

    def counted(total: Tensor, leaves: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor]:
        passes.append(len(leaves))
        return compute(total, leaves, keep=keep)

    monkeypatch.setattr(differentiated_run, "compute_gradients", counted)
    line = f'save gradient of {ONE} by resid_post layer * at tokens * to "a.safetensors"'
    save(tmp_path, "llama", line, mode="small passes")
    checked = check_file(EXPERIMENT.format(line), tmp_path, shared_model())
    (cost,) = save_costs(checked.saving, 20)
    assert passes == [3] * len(passes)
    assert cost.cost.backwards == cost.cost.forwards == len(passes) > 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "gradient of correct by resid_post layer 1",
            "can't differentiate `correct`: it is a step",
        ),
        ("gradient of rank(answer) by embed", "can't differentiate `rank(answer)`: it is a step"),
        ("gradient of logit(answer) > 1 by embed", None),
        ("gradient of kl(clean) by embed", "where its gradient is 0"),
        ("gradient of logit(answer) by pattern layer 1", "differentiate with respect to `pattern`"),
        ("gradient of logit(answer) by embed of healed", "the run `healed`: it has rules"),
        ('gradient of python("f.py:f") by embed', None),
        ("gradient of logit(answr) by embed", None),
        ("gradient of logit(answer) by resid_pst layer 1", None),
        ("gradient of logit(answer) by features 3 of nothing", None),
        ("gradient of logit(answer) at cue tken by embed", None),
        ("gradient of logit(answer) at each item token by embed", None),
    ],
)
def test_invalid_gradient_saves_are_errors(line: str, said: str | None, tmp_path: Path) -> None:
    healed = "run healed { from other into clean patch resid_post layer 0 at cue token }"
    lines = [healed] if "healed" in line else []
    (found,) = errors(tmp_path, *lines, f'save {line} at last token to "a.safetensors"')
    if said is not None:
        assert found.code == "E0608"
        assert said in found.message
    assert not (tmp_path / "a.safetensors").exists()
    assert json.dumps(found.message)
