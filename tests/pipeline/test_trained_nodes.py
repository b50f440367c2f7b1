"""Circuits among the nodes of a group that a training chooses: `nodes: g` with `group g = fit(…)`.

A circuit of a trained group equals that of the same nodes listed in the file, whose scores other
tests compare with plain passes. Further tests: the order of trainings, rows, keys and errors.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mechdsl
from mechdsl.base import limits
from mechdsl.pipeline.trained_files import fits_of_file
from mechdsl.resolve.types import SiteCoordinate, SitePoint, TrainedMask

from ..cli.conftest import Command, command
from ..quick import some
from .test_discovered_circuits import discovers
from .test_discovered_circuits import write as write_names
from .test_edge_scores import fit
from .test_trained_circuits import PATCHES
from .test_trained_dictionaries import checked, experiment, run, train, write
from .test_trained_rotations import LOSS, training_errors

__all__ = ["command"]

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
SAME = "validation: 25%, batch: 2"
CIRCUIT = fit(f"{SAME}, nodes: g")
NEURONS = "mlp_hidden layers 0..1 neurons *"
BASIS = (
    "basis f = fit(sae(features: 24, k: 4), prompts: p, steps: 4, batch: 16) at mlp_out layer 1 "
    "at tokens *\n"
)
FEATURES = "features * of f"
USE = experiment("from turned into clean", "ablate all but c at tokens * with turned")


def choose(
    call: str = "atp(size: 3)",
    at: str = NEURONS,
    options: str = SAME,
    prompts: str = "p",
    name: str = "g",
) -> str:
    given = f"{call}, prompts: {prompts}, from: other, maximise: {LOSS}, {options}"
    return f"group {name} = fit({given}) at {at} at tokens *\n"


def chosen_nodes(path: Path, family: str) -> str:
    """The line of a file that lists the nodes of a trained group."""
    (group,) = (
        own.file
        for own in fits_of_file(checked(path, family)).values()
        if own.training.definition == "g"
    )
    (trained,) = (each for each in train(path, family) if each.basis == "g")
    assert isinstance(group, TrainedMask)
    stored = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    found = [group.candidates[number] for number in stored["chosen"]]
    points = [each for each in found if isinstance(each, SitePoint)]
    numbers = [str(each.number) for each in found if isinstance(each, SiteCoordinate)]
    listed = [f"L{each.layer}N{each.unit}" for each in points]
    features = f"features {', '.join(numbers)} of f"
    return f"group g = {', '.join(listed) if listed else features}\n"


KINDS = {
    "scores": ("", "atp(size: 3)", NEURONS, SAME),
    "mask": ("", "mask(size: 3)", "mlp_hidden layer 1 neurons *", f"{SAME}, steps: 4"),
    "search": ("", "forward_selection(size: 2)", "mlp_hidden layer 1 neurons 0..7", SAME),
    "faithfulness": ("", "atp(faithfulness: 0.1)", NEURONS, SAME),
    "features": (BASIS, "atp(size: 3)", FEATURES, SAME),
}


@pytest.mark.parametrize("kind", some(list(KINDS), ["features"]))
@pytest.mark.parametrize("family", some(["gpt2", "llama", "gpt_neox"], ["llama"]))
def test_circuit_of_trained_nodes_equals_that_of_the_same_listed_nodes(
    kind: str, family: str, tmp_path: Path
) -> None:
    basis, call, at, options = KINDS[kind]
    path = write(tmp_path, basis, choose(call, at, options), CIRCUIT, USE)
    trained = train(path, family)
    assert [each.basis for each in trained][-2:] == ["g", "c"]
    own = run(path, family).files[0].experiments[0]
    listed = chosen_nodes(path, family)
    other = tmp_path / "other"
    other.mkdir()
    again = write(other, basis, listed, CIRCUIT, USE)
    found = train(again, family)[-1]
    assert found.seconds > 0  # in another store
    assert found.folder.name == trained[-1].folder.name
    text = (trained[-1].folder / "mask.json").read_text("utf-8")
    assert (found.folder / "mask.json").read_text("utf-8") == text
    expected = run(again, family).files[0].experiments[0]
    assert (own.measures[0].patched == expected.measures[0].patched).all()
    assert any(word in text for word in ("mlp_hidden", "feature"))
    assert "group g" in own.conventions


def test_circuit_in_the_file_of_trained_neurons_equals_that_of_listed_ones(tmp_path: Path) -> None:
    edges = "circuit c = g -> logits, embed -> g\n"
    path = write(tmp_path, choose(), edges, USE)
    train(path)
    own = run(path).files[0].experiments[0]
    listed = write(tmp_path, chosen_nodes(path, "llama"), edges, USE)
    expected = run(listed, store=False).files[0].experiments[0]
    assert (own.measures[0].patched == expected.measures[0].patched).all()
    assert abs(own.measures[0].patched - own.measures[0].base).max() > 1e-3


@pytest.mark.slow
def test_key_of_a_circuit_depends_on_the_chosen_nodes(tmp_path: Path) -> None:
    keys = set[str]()
    for group in (choose(), choose("atp(size: 4)"), choose(at="mlp_hidden layer 2 neurons *")):
        keys.add(train(write(tmp_path, group, CIRCUIT, PATCHES))[-1].folder.name)
    assert len(keys) == 3
    more = choose("atp(size: 3)", options=f"{SAME}, limit: 4")  # the same rows and choice
    assert train(write(tmp_path, more, CIRCUIT, PATCHES))[-1].folder.name in keys


def test_run_without_fit_names_both_trainings(tmp_path: Path) -> None:
    with pytest.raises(mechdsl.MechdslError) as found:
        run(write(tmp_path, choose(), CIRCUIT, PATCHES))
    assert {each.code for each in found.value.diagnostics} == {"E0642"}
    said = " ".join(each.message for each in found.value.diagnostics)
    assert "`g` isn't trained" in said
    assert "`c` isn't trained" in said


def test_circuit_isn_t_trained_after_its_group_failed(tmp_path: Path) -> None:
    flat = choose().replace(LOSS, "logit(answer) - logit(answer)")
    problems = training_errors(write(tmp_path, flat, CIRCUIT, PATCHES))
    assert [each.code for each in problems] == ["E0643", "E0643"]
    assert "a basis or group that it needs isn't trained" in problems[1].message


def test_block_of_the_group_alone_is_split_for_its_circuit(tmp_path: Path) -> None:
    group = choose(prompts="second").replace("from: other", "from: turned")
    path = write(tmp_path, group, CIRCUIT, PATCHES)
    nodes, _ = fits_of_file(checked(path, "llama")).values()
    (measured,) = checked(path, "llama").experiments
    assert set(nodes.training.sample.table.row_keys).isdisjoint(measured.table.row_keys)
    assert len(measured.table) > 0


def test_block_without_split_is_split_for_the_circuit_and_its_nodes(tmp_path: Path) -> None:
    """Also for an experiment that names the group alone."""
    rule = ("from other into clean", "ablate all but c at tokens * with other")
    alone = experiment("ablate g at tokens * with zero", name="alone", block="p")
    path = write(tmp_path, choose(), CIRCUIT, experiment(*rule, block="p"), alone)
    found = checked(path, "llama")
    fits = list(fits_of_file(found).values())
    assert [own.training.definition for own in fits] == ["g", "c"]
    trained = {key for own in fits for key in own.training.sample.table.row_keys}
    for each in found.experiments:
        assert trained.isdisjoint(each.table.row_keys)
        assert each.table.row_keys
    train(path)
    for own in run(path).files[0].experiments:
        assert "(automatic: `g`, `c` are trained on part `train`)" in own.conventions["rows"]


MISTAKES = {
    "held out": (
        choose(options="validation: 0%"),
        CIRCUIT,
        "E0345",
        "`c` measures rows that `g` is trained on",
    ),
    "seed": (choose(options=f"{SAME}, seed: 2"), CIRCUIT, "E0345", "and `seed` for both"),
    "seeds": (choose("mask(size: 2)", options="seeds: 2"), CIRCUIT, "E0207", "each of 2 seeds"),
    "heads": (choose(at="layers * heads *"), CIRCUIT, "E0207", "`nodes` are neurons or"),
    "dimensions": (choose(at="resid_post layer 1 dims *"), CIRCUIT, "E0207", "has no features"),
}


@pytest.mark.parametrize("key", MISTAKES)
def test_mistake_in_trained_nodes_is_an_error(key: str, tmp_path: Path) -> None:
    group, circuit, code, said = MISTAKES[key]
    problems = training_errors(write(tmp_path, group, circuit, PATCHES))
    assert {each.code for each in problems} == {code}, problems
    assert said in " ".join(f"{each.message} {each.help_text}" for each in problems)


def test_group_with_an_error_is_reported_once(tmp_path: Path) -> None:
    (problem,) = training_errors(write(tmp_path, choose("greedy(size: 2)"), CIRCUIT, PATCHES))
    assert problem.code == "E0342"


def test_held_out_rows_may_be_those_of_the_group_if_the_file_allows_it(tmp_path: Path) -> None:
    allowed = choose(options="validation: 0%, measure_on_training_rows: true")
    assert len(train(write(tmp_path, allowed, CIRCUIT, PATCHES))) == 2


def test_run_trains_the_nodes_of_a_discovered_circuit(tmp_path: Path, command: Command) -> None:
    group = (
        "group g = fit(atp(size: 4), prompts: ioi, from: abc, maximise: logit(answer) - "
        "logit(wrong)) at mlp_hidden layer 0 neurons * at tokens *\n"
    )
    path = write_names(tmp_path, group, discovers(nodes="heads, mlps, g"))
    shown = command("run", path, "--store", tmp_path / "s")
    assert shown.status == 0, shown.err
    assert "`g`, `c` are trained on part `train`" in " ".join(shown.out.split())


def test_dictionary_of_a_circuit_that_is_only_compared_is_trained(tmp_path: Path) -> None:
    """No experiment has a rule on the circuit. Some of its features send."""
    known = ("feature 3 of f -> logits", "feature 5 of f -> L2H0.q", "L0H1 -> logits")
    lines = f"group g = features 3, 5 of f\n{CIRCUIT}circuit d = {', '.join(known)}\n"
    compare = "experiment e { model m observe edge_auroc c with d as ranks }\n"
    path = write(tmp_path, BASIS, lines, compare)
    trained = train(path)
    assert [each.basis for each in trained] == ["f", "c"]
    content = json.loads((trained[-1].folder / "mask.json").read_text("utf-8"))
    sizes = {
        label: abs(own) for label, own in zip(content["labels"], content["scores"], strict=True)
    }
    wins = [
        (sizes[own] > size) + (sizes[own] == size) / 2
        for own in known
        for other, size in sizes.items()
        if other not in known
    ]
    found = run(path).files[0].experiments[0].measures[0]
    assert found.patched[0, 0] == pytest.approx(sum(wins) / len(wins))


@pytest.mark.parametrize("fails", ["group", "circuit"])
def test_run_of_a_failed_discovery_reports_the_failed_training(
    fails: str, tmp_path: Path, command: Command
) -> None:
    """Not the circuit that needs a failed group, nor a command that would fail in the same way."""
    flat, aim = "logit(answer) - logit(answer)", "logit(answer) - logit(wrong)"
    group = (
        f"group g = fit(atp(size: 4), prompts: ioi, from: abc, maximise: "
        f"{flat if fails == 'group' else aim}) at mlp_hidden layer 0 neurons * at tokens *\n"
    )
    using = "acdc(threshold: 99)" if fails == "circuit" else "eap top 4 edges"
    path = write_names(tmp_path, group, discovers(using, nodes="heads, mlps, g"))
    shown = command("run", path, "--store", tmp_path / "s")
    name = {"group": "g", "circuit": "c"}[fails]
    assert shown.status == 2
    assert shown.err.count("error[") == 2
    assert f"error[E0643]: `{name}` can't be trained" in shown.err
    assert f"error[E0642]: `{name}` isn't trained: its training failed" in shown.err
    assert "an error before this one reports the cause" in shown.err
    assert "mechdsl fit" not in shown.err


def test_group_of_more_nodes_than_the_limit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CIRCUIT_NEURONS", 5)
    (problem,) = training_errors(write(tmp_path, choose("atp(size: 6)"), CIRCUIT, PATCHES))
    assert problem.code == "E0207"
    assert "`g` chooses 6 sites, and at most 5 can be nodes" in problem.message
    assert problem.help_text == "write a smaller `size` in the `fit` of the group"


def test_more_candidates_than_nodes_are_planned_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the candidates are placeholders until the training decides the number."""
    text = choose("atp(faithfulness: 0.5)")
    monkeypatch.setattr(limits, "CIRCUIT_NEURONS", 5)
    found = checked(write(tmp_path, text, CIRCUIT, PATCHES), "llama")
    group, circuit = fits_of_file(found).values()
    assert isinstance(group.file, TrainedMask)
    assert isinstance(circuit.file, TrainedMask)
    assert len(group.file.members) == len(group.file.candidates) // 2 > 5
    senders = {own[0] for own in circuit.file.candidates if isinstance(own, tuple)}
    neurons = {own for own in senders if own.site == "mlp_hidden" and own.unit is not None}
    assert len(neurons) == 5
