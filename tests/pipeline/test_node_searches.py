"""Groups that a file declares with `fit(forward_selection(…))`.

Each step is compared with a search by plain passes over the bare model in float64, one unpadded
prompt at a time. Further tests: packed passes, the end of a search, use in rules, checkpoints,
keys, cost, and errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mechdsl
from mechdsl.base.arrays import Floats
from mechdsl.execute.mask_training import MaskRows, NodeRows, NodeSearch, find_group
from mechdsl.execute.training import TrainingJob
from mechdsl.fits.reports import NodeSearchReport
from mechdsl.planner.training_cost import training_cost
from mechdsl.resolve.types import PositionChoice, SiteCoordinate, SitePoint, TrainedMask

from ..quick import in_turn, some
from ..rules.models import double
from .test_node_scores import HERE, SOURCES, check_mistake, fit, stored, training_rows
from .test_trained_coordinate_masks import sae
from .test_trained_coordinate_masks import value_by_hand as coordinate_value
from .test_trained_dictionaries import experiment, train, write
from .test_trained_masks import HEADS, PATCHES, value_by_hand
from .test_trained_node_circuits import COMPLETE, EVERY_HEAD, LAST, check, trained, zeroed
from .test_trained_rotations import LOSS

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
CALL = "forward_selection(size: 3)"
ALL = "validation: 0%"


def find(path: Path, family: str, side: Any = None) -> tuple[TrainedMask, MaskRows, Any]:
    """Return the group, its rows and its report."""
    mask, found = training_rows(path, double(family), side)
    job = TrainingJob(path.parent, {}, path.parent, lambda: False, lambda *_: None)
    report = find_group(mask, found, job)
    assert isinstance(report, NodeSearchReport)
    return mask, found, report


def mean_of_sites(
    family: str, mask: TrainedMask, masked: MaskRows, source: str, at: str, written: Sequence[int]
) -> float:
    """The mean over training rows of plain passes that write some sites."""
    points = [each for each in mask.candidates if isinstance(each, SitePoint)]
    gates = torch.zeros(len(points), dtype=torch.float64)
    gates[list(written)] = 1
    rows = masked.objective.table.row_ids
    values = [value_by_hand(family, row, points, gates, source, at) for row in rows]
    return torch.stack(values).mean().item()


# --- steps ----------------------------------------------------------------------------------------

WHERE = (("layers * heads 1..2", LAST), ("layers 0..1 heads 0..2", "subject tokens"))


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES))
@pytest.mark.parametrize(
    ("where", "given"),
    in_turn(WHERE, [("maximise", "left"), ("minimise", "right")], quick=WHERE[:1]),
)
def test_each_step_adds_the_site_with_the_largest_joint_effect(
    where: tuple[str, str], given: tuple[str, Any], family: str, source: str, tmp_path: Path
) -> None:
    sites, at = where
    aim, side = given
    source = "with: zero" if "subject" in at and source == "with: mean" else source
    line = fit(ALL, call=CALL, source=source, objective=f"{aim}: {LOSS}", at=f"{sites} at {at}")
    mask, masked, report = find(write(tmp_path, line, PATCHES), family, side)
    sign = 1 if aim == "maximise" else -1

    def mean(written: Sequence[int]) -> float:
        return mean_of_sites(family, mask, masked, source, at, written)

    chosen: list[int] = []
    value = mean([])
    changes: list[float] = []
    scores = np.zeros(len(mask.candidates))
    for _ in range(3):
        due = [n for n in range(len(mask.candidates)) if n not in chosen]
        means = np.array([mean([*chosen, n]) for n in due])
        best = int(np.argmax(sign * means))
        scores[due] = means - value
        if sign * (means[best] - value) <= 0:
            break
        changes.append(means[best] - value)
        chosen, value = [*chosen, due[best]], means[best]
    assert chosen
    assert min(sign * each for each in changes) > 1e-5
    content = json.loads((tmp_path / "mask.json").read_text("utf-8"))
    assert content["chosen"] == chosen
    assert content["ranked"] is True
    np.testing.assert_allclose(content["scores"], scores, atol=1e-5)
    assert [*report.chosen] == [content["labels"][n] for n in chosen]
    np.testing.assert_allclose([*report.chosen.values()], changes, atol=1e-5)
    rest = [n for n in range(len(mask.candidates)) if n not in chosen]
    assert report.trained == pytest.approx(mean(chosen), abs=1e-5)
    assert report.alone == pytest.approx(mean(rest), abs=1e-5)
    random = [mean(each) for each in masked.random_choices(chosen, masked.declared.seed)]
    assert report.random == pytest.approx(np.mean(random), abs=1e-5)
    ends = range(min(len(chosen) + 1, 3))
    assert report.steps == 1 + sum(len(mask.candidates) - n for n in ends)
    assert ("until none" in report.made) == (len(chosen) < 3)


@pytest.mark.parametrize(("basis", "family"), [("features", "llama"), ("dimensions", "gpt2")])
@pytest.mark.parametrize("source", some(SOURCES, ["with: mean"]))
def test_search_over_coordinates_equals_plain_passes(
    source: str, basis: str, family: str, tmp_path: Path
) -> None:
    declared, at = "", "resid_post layer 1 dims 0..5"
    if basis == "features":
        declared, at = sae(tmp_path, family), "features * of f"
    call = "forward_selection(size: 2)"
    line = fit(ALL, call=call, source=source, at=f"{at} at {LAST}")
    mask, masked, _ = find(write(tmp_path, declared, line, PATCHES), family)
    assert all(isinstance(each, SiteCoordinate) for each in mask.candidates)

    def mean(written: Sequence[int]) -> float:
        shares = torch.zeros(len(mask.candidates), dtype=torch.float64)
        shares[list(written)] = 1
        rows = masked.objective.table.row_ids
        every = [coordinate_value(family, n, mask, shares, basis, source, LAST) for n in rows]
        return torch.stack(every).mean().item()

    chosen: list[int] = []
    for _ in range(2):
        due = [n for n in masked.active.tolist() if n not in chosen]
        best = max(due, key=lambda n: mean([*chosen, n]))
        chosen += [best] if mean([*chosen, best]) > mean(chosen) else []
    content = json.loads((tmp_path / "mask.json").read_text("utf-8"))
    assert content["chosen"] == chosen


CANDIDATES = {
    "heads": f"{HEADS} at {LAST}",
    "ragged": f"{HEADS} at tokens *",
    "whole": "z layers 0..1 at last token",
    "neurons": "mlp_hidden layers 1..2 neurons 3, 7 at last token",
    "positions": "mlp_out layer 1 at item 1 token, cue token, last token",
    "features": "features * of f at last token",
}


@pytest.mark.parametrize(("name", "source"), in_turn([*CANDIDATES], SOURCES))
def test_packed_groups_equal_single_ones(name: str, source: str, tmp_path: Path) -> None:
    """In passes of three groups in two rows."""
    source = "with: zero" if name == "ragged" and source == "with: mean" else source
    declared = sae(tmp_path) if name == "features" else ""
    call, at = "forward_selection(size: 1)", CANDIDATES[name]
    line = fit(ALL, call=call, source=source, at=at)
    path = write(tmp_path, declared, line, PATCHES)
    if name == "positions":
        rule = experiment("ablate mlp_out layer 1 at g tokens with zero", block="p")
        line = line.replace("validation", "measure_on_training_rows: true, validation")
        path = write(tmp_path, line, rule)
    mask, masked = training_rows(path, double("llama"), "right")
    assert (name == "positions") == isinstance(mask.candidates[0], PositionChoice)
    random = np.random.default_rng(1)
    groups = random.random((3, len(mask.candidates))) < 0.5
    packed = masked.means(masked.trained, groups, 6)
    edits = [torch.from_numpy(each).float() for each in groups]
    single = [masked.mean(masked.trained, each, 1) for each in edits]
    np.testing.assert_allclose(packed, single, atol=1e-6)
    assert len({round(each, 6) for each in single}) > 1


# --- the end of a search --------------------------------------------------------------------------


@pytest.mark.parametrize("aim", ["maximise", "minimise"])
def test_search_ends_where_no_site_improves_the_measure(aim: str, tmp_path: Path) -> None:
    call = "forward_selection(size: 11)"
    line = fit(ALL, call=call, source="with: zero", objective=f"{aim}: {LOSS}")
    mask, masked, report = find(write(tmp_path, line, PATCHES), "llama")
    sign, size = (1 if aim == "maximise" else -1), len(report.chosen)
    assert 1 < size < 11
    assert all(sign * each > 0 for each in report.chosen.values())
    content = json.loads((tmp_path / "mask.json").read_text("utf-8"))
    left = [n for n in range(12) if n not in content["chosen"]]
    own = mean_of_sites("llama", mask, masked, "with: zero", LAST, content["chosen"])
    for n in left:
        more = mean_of_sites("llama", mask, masked, "with: zero", LAST, [*content["chosen"], n])
        assert sign * (more - own) <= 0
    word = {"maximise": "larger", "minimise": "smaller"}[aim]
    assert f", until none makes it {word}; " in report.made


@pytest.mark.parametrize("minimises", [False, True])
@pytest.mark.parametrize(("last", "size"), [(2e-6, 2), (2e-3, 3)])
def test_search_ends_at_improvements_within_rounding(
    minimises: bool, last: float, size: int
) -> None:
    """Three sites, of which the last adds little to a measure of 8, with a rounding of 1e-6."""
    gains = np.array([2.0, 1.0, last]) * (-1 if minimises else 1)
    declared, model = SimpleNamespace(minimises=minimises), SimpleNamespace(rounding=1e-6)
    masked = SimpleNamespace(active=np.arange(3), declared=declared, model=model)
    rows: Any = SimpleNamespace(candidates=range(3), masked=masked, batch=8, trained=np.arange(2))
    rows.means_with = lambda trained, left, batch: 8 + ~left @ gains
    search = NodeSearch(rows, 3)
    for _ in search.run():
        pass
    assert search.chosen == [0, 1, 2][:size]
    assert search.gain == pytest.approx(last, rel=1e-4)


def test_search_without_an_improvement_is_an_error(tmp_path: Path) -> None:
    """Nothing is below a divergence of 0."""
    path = write(tmp_path, fit(call=CALL, objective="minimise: kl(clean)"), PATCHES)
    with pytest.raises(mechdsl.MechdslError, match="no site alone makes the measure smaller"):
        train(path)


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_top_n_of_a_search_is_its_first_n_sites(family: str, tmp_path: Path) -> None:
    """Also where a later site changed the measure more."""
    call, aim = "forward_selection(size: 5)", "maximise: kl(clean)"
    line = fit(ALL, call=call, source="with: zero", objective=aim)
    loop = "for n in [1, 2, 3, 4, 5] { ablate top n of g at last token with zero }"
    text = [
        line,
        experiment(loop, name="curve", measure=COMPLETE),
        experiment("ablate g at last token with zero", name="all", measure=COMPLETE),
    ]
    fits, found = trained(write(tmp_path, *text), family)
    content = stored(fits["g"])
    order = [EVERY_HEAD[n] for n in content["chosen"]]
    sizes = [abs(content["scores"][n]) for n in content["chosen"]]
    every = [zeroed(EVERY_HEAD, LAST)]
    check(family, found["curve"], [zeroed(order[:n], LAST) for n in range(1, 6)], every)
    check(family, found["all"], [zeroed(order, LAST)], every)
    said = found["all"].conventions["group g"]
    assert "one after another, by effects on kl(clean), to maximise it" in said
    assert "changes in the order of addition" in said
    assert sizes != sorted(sizes, reverse=True)


# --- checkpoints, memory, keys and cost -----------------------------------------------------------


def test_node_search_resumes_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, fit(ALL, call=CALL), PATCHES)
    (whole,) = train(path)
    content = (whole.folder / "mask.json").read_bytes()
    steps: list[int] = []
    real = NodeSearch.progress.__get__

    def progress(self: NodeSearch) -> tuple[int, int]:
        steps.append(real(self)[0])
        if len(steps) == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(NodeSearch, "progress", property(progress))
    with pytest.raises(KeyboardInterrupt):
        train(path, fresh=True)
    (again,) = train(path, fresh=True)
    assert steps == [1, 2, 3]
    assert (again.folder / "mask.json").read_bytes() == content
    assert again.report == whole.report


def test_node_search_halves_its_passes_when_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, fit(ALL, call=CALL), PATCHES)
    _, _, whole = find(path, "llama")
    real, sizes = NodeRows.means_with, list[int]()

    def means_with(self: NodeRows, rows: Any, groups: Any, batch: int) -> Floats:
        sizes.append(batch)
        if batch > 2:
            raise MemoryError
        return real(self, rows, groups, batch)

    monkeypatch.setattr(NodeRows, "means_with", means_with)
    _, _, halved = find(path, "llama")
    assert sizes[:6] == [64, 32, 16, 8, 4, 2]
    assert {*sizes[6:]} == {2}
    assert [*halved.chosen] == [*whole.chosen]
    np.testing.assert_allclose([*halved.chosen.values()], [*whole.chosen.values()], atol=1e-6)


@pytest.mark.slow
def test_key_of_a_search_depends_on_its_arguments(tmp_path: Path) -> None:
    variants = {
        "size": fit(ALL, call="forward_selection(size: 2)"),
        "aim": fit(ALL, call=CALL, objective=f"minimise: {LOSS}"),
        "scores": fit(ALL, call="atp(size: 3)"),
        "source": fit(ALL, call=CALL, source="with: zero"),
    }
    every = [fit(ALL, call=CALL), *variants.values()]
    found = [train(write(tmp_path, text, PATCHES))[0] for text in every]
    assert len({each.folder.name for each in found}) == len(every)
    assert len({(each.folder / "mask.json").read_bytes() for each in found}) == len(every)


@pytest.mark.parametrize("source", some(SOURCES, ["from: other"]))
def test_planned_cost_of_a_node_search_is_within_a_factor_of_two(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, fit(call=CALL, source=source), PATCHES)
    mask, found = training_rows(path, double("gpt2"))
    price = training_cost("g", mask, found.objective, found.model.shape)
    monkeypatch.setattr(TrainingJob, "write_card", lambda *_: None)
    job = TrainingJob(tmp_path, {}, tmp_path, lambda: False, lambda *_: None)
    with FlopCounterMode(display=False) as flops:
        find_group(mask, found, job)
    assert (price.steps, price.cost.backwards) == (1 + 12 + 11 + 10, 0)
    assert 1 / 2 < 2 * price.cost.multiply_adds / flops.get_total_flops() < 2


SHARES = {
    "forward_selection(size: 25%)": 3,
    "forward_selection(size: 12.5%)": 2,  # of 1.5
    "atp(size: 1%)": 1,
    "mask(size: 25%)": 3,
}


@pytest.mark.parametrize("call", SHARES)
def test_share_is_rounded_half_up_and_at_least_one(call: str, tmp_path: Path) -> None:
    """Of 12 heads, as `top 25% of` counts them."""
    options = f"{ALL}, steps: 2" if call.startswith("mask") else ALL
    same = re.sub(r"[0-9.]+%", str(SHARES[call]), call)
    (own,) = train(write(tmp_path, fit(options, call=call), PATCHES))
    (other,) = train(write(tmp_path, fit(options, call=same), PATCHES), fresh=True)
    chosen = stored(own)["chosen"]
    assert len(chosen) == SHARES[call]
    assert chosen == stored(other)["chosen"]


# --- mistakes -------------------------------------------------------------------------------------

WHOLE = f"fit({CALL}, prompts: p, from: other, maximise: {LOSS})"
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "no size": ("(size: 3)", "", "E0207", "needs `size: …`"),
    "typo": ("size: 3", "siz: 3", "E0207", "did you mean `size`"),
    "other name": ("size: 3", "heads: 3", "E0207", "write `size: …`"),
    "zero": ("size: 3", "size: 0", "E0342", "whole number from 1 on"),
    "no share": ("size: 3", "size: 0%", "E0342", "isn't above 0% and at most 100%"),
    "whole": ("size: 3", "size: 100%", "E0342", "leaves out none of the 12 sites"),
    "all": ("size: 3", "size: 12", "E0342", "a group of 12 sites leaves out none of the 12 sites"),
    "rate": ("other, ", "other, rate: 0.1, ", "E0207", "isn't trained in steps"),
    "seeds": ("other, ", "other, seeds: 2, ", "E0207", "declare a group for each seed"),
    "circuit": ("group g", "circuit g", "E0342", "choose edges: `circuit c = fit(acdc("),
    "greedy": (CALL, "greedy(size: 3)", "E0342", "`group movers = fit(forward_selection(size: 4)"),
    "name": ("forward_selection", "stepwise", "E0203", "fit(forward_selection(size: 4)"),
    "near": ("forward_selection", "forward_selction", "E0203", "did you mean `forward_selection`"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_argument_of_a_group_by_a_search_is_rejected(name: str, tmp_path: Path) -> None:
    check_mistake(WHOLE, MISTAKES[name], tmp_path)


def test_search_needs_no_gradient(tmp_path: Path) -> None:
    """`rank` is a step function."""
    line = fit(call="forward_selection(size: 1)", objective="maximise: rank(answer)")
    (found,) = train(write(tmp_path, line, PATCHES))
    assert isinstance(found.report, NodeSearchReport)
    assert min(found.report.chosen.values()) > 0
