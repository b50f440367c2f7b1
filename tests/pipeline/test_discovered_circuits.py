"""Circuits that an experiment discovers and tests, against definitions and plain passes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl

from ..cli.conftest import Command, command
from ..quick import some
from ..rules.test_dictionaries import make

__all__ = ["command"]

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
LM = 'model lm = zoo("names")'
WIDTH = 128
DIFFERENCE = "logit(answer) - logit(wrong)"
BLOCK = """
prompts ioi {
  io in ["Mary", "John", "Tom", "Anna", "Luke"]
  s = other(io)
  place in ["shop", "park"]
  template "When {io} and {s1 = s} went to the {place}, {s2 = s} gave a bag to"
  answer " {io}"
  wrong " {s}"
  corrupt abc { io, s1, s2 = others(io, s) }
  corrupt abd { s2 = io }
}
"""
METHODS = {
    "eap top 12 edges": "eap(size: 12)",
    "eap_ig(steps: 3) until faithfulness > 0.8": "eap_ig(steps: 3, faithfulness: 0.8)",
    "acdc(threshold: 0.5)": "acdc(threshold: 0.5)",
    "coarse_to_fine(threshold: 0.5)": "coarse_to_fine(threshold: 0.5)",
    "greedy top 100 edges": "greedy(size: 100)",
}
EAP, SEARCH = "eap top 12 edges", "acdc(threshold: 0.5)"


def discovers(
    using: str = EAP,
    *more: str,
    name: str = "e",
    circuit: str = "c",
    use: str = "prompts ioi limit 12",
    run: str = "from clean into abc",
    measure: str = f"measure {DIFFERENCE} as recovery",
    nodes: str = "heads, mlps",
) -> str:
    line = f"discover {circuit} over {nodes} using {using}"
    lines = (use, run, line, measure, *more)
    return f"experiment {name} {{\n" + "".join(f"  {each}\n" for each in lines if each) + "}\n"


def defined(
    trainer: str, *more: str, aim: str = f"maximise: {DIFFERENCE}", metric: str = DIFFERENCE
) -> tuple[str, str]:
    """The block and the rest of a file with the definition that `discovers` stands for."""
    block = BLOCK.replace("  corrupt abd", "  split 50%\n  corrupt abd")
    circuit = f"circuit c = fit({trainer}, prompts: ioi.train, limit: 12, from: abc, {aim})\n"
    lines = (
        "prompts ioi.test limit 12",
        "from abc into clean",
        "ablate all but c at tokens * with abc",
        f"measure {metric} as faithfulness",
        *more,
    )
    return block, circuit + "experiment e {\n" + "".join(f"  {each}\n" for each in lines) + "}\n"


def write(folder: Path, *parts: str, block: str = BLOCK) -> Path:
    path = folder / "file.mech"
    path.write_text("\n".join(["mech 1", LM, block, *parts]), encoding="utf-8")
    return path


def run(path: Path, name: str = "e", **options: Any) -> Any:
    return mechdsl.run(path, store=path.parent / "store", **options)[name]


@pytest.mark.parametrize("using", some(METHODS, [EAP, SEARCH]))
def test_discovered_circuit_equals_its_definition(using: str, tmp_path: Path) -> None:
    found = run(write(tmp_path, discovers(using)))
    block, rest = defined(METHODS[using])
    expected = run(write(tmp_path, rest, block=block), fit=True)
    assert found.cells[0].name == expected.cells[0].name == "all but c"
    for own, other in zip(found.measures, expected.measures, strict=True):
        assert own.effect == other.effect == "faithfulness"
        np.testing.assert_array_equal(own.patched, other.patched)
        np.testing.assert_array_equal(own.base, other.base)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.1
    assert found.to_text(200).count("random circuits, 8 draws") == 1


AT = "s2 token, last token"


@pytest.mark.parametrize(
    ("using", "at", "joined"),
    [
        (EAP, AT, f"{{{AT}}}"),
        (SEARCH, "last token", "last token"),
        pytest.param(SEARCH, AT, f"{{{AT}}}", marks=pytest.mark.slow),
        pytest.param("greedy top 100 edges", AT, f"{{{AT}}}", marks=pytest.mark.slow),
    ],
)
def test_circuit_at_positions_equals_its_definition(
    using: str, at: str, joined: str, tmp_path: Path
) -> None:
    """The rule ablates all other edges at the tokens of all positions."""
    found = run(write(tmp_path, discovers(using, nodes=f"heads, mlps at {at}")))
    block, rest = defined(METHODS[using])
    rest = rest.replace(f"{DIFFERENCE})", f"{DIFFERENCE}) at {at}", 1)
    rest = rest.replace("at tokens * with", f"at {joined} with")
    expected = run(write(tmp_path, rest, block=block), fit=True)
    own, other = found.measures[0], expected.measures[0]
    np.testing.assert_array_equal(own.patched, other.patched)
    assert np.abs(own.patched - own.base).max() > 0.1
    assert found.conventions["circuit"] == expected.conventions["circuit"]
    assert (" at s2 token" in found.conventions["circuit c"]) == (at == AT)


FEATURES = {
    "features of f": "group own = features * of f",
    "features of f, features of t": "group own = features * of f, features * of t",
    "few": "group own = features 1, 4, 6 of f, feature 2 of t",
    "cells": "group own = mlp_hidden layer 0 neurons 0..5",
    "cells, features of t": "group own = mlp_hidden layer 0 neurons 0..5, features * of t",
    "cells, late": "group own = mlp_hidden layer 0 neurons 0..5, features 2, 5 of t",
    "both": "group own = features 2, 5 of t, mlp_hidden layer 0 neurons 0..5",
}
GROUPS = """
basis f = sae("sae") at mlp_out layer 0
basis t = sae("sae") at mlp_out layer 1
group few = features 1, 4, 6 of f, feature 2 of t
group cells = mlp_hidden layer 0 neurons 0..5
group late = features 2, 5 of t
group both = mlp_hidden layer 0 neurons 0..5, features 2, 5 of t
"""


@pytest.mark.parametrize(
    ("nodes", "using"),
    [
        ("few", EAP),
        ("cells, late", EAP),
        pytest.param("both", "eap_ig(steps: 3) until faithfulness > 0.8", marks=pytest.mark.slow),
        pytest.param("cells, features of t", SEARCH, marks=pytest.mark.slow),
        pytest.param("features of f, features of t", EAP, marks=pytest.mark.slow),
        pytest.param("features of f", EAP, marks=pytest.mark.slow),
        pytest.param("cells", "eap_ig(steps: 3) until faithfulness > 0.8", marks=pytest.mark.slow),
        pytest.param("few", SEARCH, marks=pytest.mark.slow),
    ],
)
def test_circuit_of_features_equals_its_definition(nodes: str, using: str, tmp_path: Path) -> None:
    """The definition names all features of the dictionaries, or those of the group."""
    make(tmp_path, "topk", WIDTH)
    text = discovers(using, nodes=f"{nodes}, heads, mlps")
    found = run(write(tmp_path, GROUPS, text))
    block, rest = defined(METHODS[using])
    rest = rest.replace("maximise:", "nodes: own, maximise:")
    expected = run(write(tmp_path, GROUPS, FEATURES[nodes], rest, block=block), fit=True)
    own, other = found.measures[0], expected.measures[0]
    np.testing.assert_array_equal(own.patched, other.patched)
    assert np.abs(own.patched - own.base).max() > 0.1
    assert found.conventions["circuit"] == expected.conventions["circuit"]
    whole = run(write(tmp_path, discovers(using)))
    assert whole.conventions["circuit"] != found.conventions["circuit"]


@pytest.mark.parametrize(("name", "metric"), [("kl(clean)",) * 2, ("loss",) * 2, ("far", "loss")])
def test_search_lowers_a_distance(name: str, metric: str, tmp_path: Path) -> None:
    using, defines = "acdc(threshold: 0.2)", "metric far = loss\n" if name == "far" else ""
    text = defines + discovers(using, measure=f"measure {name} as recovery")
    found = run(write(tmp_path, text))
    block, rest = defined(using, aim=f"minimise: {metric}", metric=metric)
    expected = run(write(tmp_path, rest, block=block), fit=True)
    np.testing.assert_array_equal(found.measures[0].patched, expected.measures[0].patched)
    assert found.statistics[0].mean[0] > 0.3


@pytest.mark.parametrize("difference", [DIFFERENCE, "logit(wrong) - logit(answer)"])
def test_search_for_a_measure_that_the_run_lowers_has_a_note(
    difference: str, tmp_path: Path
) -> None:
    """The clean run has the larger difference with `abc` for all edges."""
    found = run(write(tmp_path, discovers(SEARCH, measure=f"measure {difference} as recovery")))
    said = " ".join(found.conventions["circuit c"].split())
    note = (
        "note: the measure is larger with every edge ablated than in the unpatched run, so this "
        "circuit doesn't explain the run's value; `minimise: …` keeps the edges that do"
    )
    assert (note in said) == (difference != DIFFERENCE)


@pytest.mark.parametrize("aim", ["maximise", "minimise"])
def test_search_away_from_the_clean_run_is_a_warning(aim: str, tmp_path: Path) -> None:
    """The clean run has the larger difference, also if the search is already in the store."""
    block, rest = defined("acdc(threshold: 0.2)", aim=f"{aim}: {DIFFERENCE}", metric=DIFFERENCE)
    path = write(tmp_path, rest, block=block)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            mechdsl.fit(path, store=tmp_path / "store")
        assert sum("W0739" in str(each.message) for each in found) == (aim == "minimise")


def test_recovery_of_a_discovered_circuit_is_that_of_the_runs(tmp_path: Path) -> None:
    """With 0 at the run `abc` and 1 at the clean run, as `from clean into abc` says."""
    line = f"measure {DIFFERENCE} as raw"
    found = run(write(tmp_path, discovers(SEARCH, line)))
    check = (
        "experiment runs {\n  prompts ioi.test limit 12\n  from abc into clean\n"
        f"  patch resid_post layer 1 at tokens *\n  measure {DIFFERENCE} as raw\n}}\n"
    )
    block, _ = defined("eap(size: 12)")
    runs = run(write(tmp_path, check, block=block), "runs").measures[0]
    raw = found.measures[1]
    clean, other = runs.base[0].mean(), runs.patched[0].mean()
    expected = (raw.patched[0].mean() - other) / (clean - other)
    assert found.statistics[0].mean[0] == pytest.approx(expected, abs=1e-5)
    assert 0.1 < expected < 2


def test_expectations_and_reports_name_the_recovery(tmp_path: Path) -> None:
    more = ("expect recovery > 0.5", "report table", 'report graph to "c.svg"')
    found = run(write(tmp_path, discovers(SEARCH, *more)))
    assert found.outcomes[0].holds
    assert (tmp_path / "c.svg").exists()


def test_circuits_of_two_models_name_their_model(tmp_path: Path, command: Command) -> None:
    path = write(
        tmp_path,
        'model early = zoo("names/step-400")\n',
        discovers(use="model lm\n  prompts ioi limit 12"),
        "experiment other {\n  model early\n  prompts ioi limit 12\n  from abc into clean\n"
        f"  ablate all but c at tokens * with abc\n  measure {DIFFERENCE} as faithfulness\n"
        "  against random(3)\n}\n",
    )
    store = tmp_path / "store"
    shown = command("fit", path, "--store", store, "--out", tmp_path / "out")
    assert shown.status == 0
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"c-lm", "c-early"}
    assert "c (early) copied to " in shown.out
    assert " c (lm) " in shown.out
    results = mechdsl.run(path, store=store)
    for name, model in (("e", "lm"), ("other", "early")):
        assert f" trained in `{model}` on " in results[name].conventions["circuit c"]


def test_run_trains_only_what_experiments_discover(tmp_path: Path, command: Command) -> None:
    other = (
        "circuit d = fit(eap(size: 3), prompts: ioi, from: abd, maximise: logit(answer))\n"
        "experiment other {\n  prompts ioi\n  from abd into clean\n"
        "  ablate d at tokens * with abd\n  measure logit(answer) as delta\n}\n"
    )
    path = write(tmp_path, discovers(), other)
    arguments = ("run", path, "--store", tmp_path / "s")
    shown = command(*arguments)
    assert shown.status != 0
    assert "error[E0642]: `d` isn't trained" in shown.err
    assert "e: faithfulness of" in shown.out
    assert " c  " in shown.err  # the table of trainings
    assert " c  " not in command(*arguments).err


SPLIT = BLOCK.replace("  corrupt abd", "  split 50%\n  corrupt abd")
TRAINED = (
    "basis a = fit(sae(features: 8, k: 2), prompts: ioi.train, limit: 12, steps: 4) "
    "at mlp_out layer 0 at tokens *\n"
)
NODES = {
    "features": ("features of a", ""),
    "group": ("g", "group g = features 1..5 of a\n"),
    "joined": ("features of a, g", "group g = mlp_hidden layer 1 neurons 0..3\n"),
}


@pytest.mark.parametrize("kind", some(NODES, ["features"]))
def test_run_discovers_a_circuit_of_a_trained_dictionary(
    kind: str, tmp_path: Path, command: Command
) -> None:
    """After `fit`, it trains the circuit only if its statement changed, without a warning."""
    nodes, group = NODES[kind]
    store = tmp_path / "store"

    def changed(using: str) -> Path:
        text = discovers(using, "against none", nodes=f"heads, mlps, {nodes}")
        return write(tmp_path, TRAINED + group, text, block=SPLIT)

    assert command("fit", changed(EAP), "--store", store).status == 0
    fitted = command("run", changed(EAP), "--store", store)
    assert (fitted.status, "error" in fitted.err, " c  " in fitted.err) == (0, False, False)
    shown = command("run", changed("eap top 11 edges"), "--store", store)
    assert (shown.status, "error" in shown.err, " c  " in shown.err) == (0, False, True)
    assert " a  " not in shown.err
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        own = mechdsl.run(changed("eap top 10 edges"), store=store)["e"]
    assert not [each for each in found if "E0643" in str(each.message)]
    expected = mechdsl.run(changed("eap top 10 edges"), store=tmp_path / "other", fit=True)["e"]
    np.testing.assert_array_equal(own.measures[0].patched, expected.measures[0].patched)
    assert own.conventions["circuit c"] == expected.conventions["circuit c"]


def test_circuit_of_an_untrained_dictionary_is_one_error(tmp_path: Path, command: Command) -> None:
    rest = (
        "experiment rest {\n  prompts ioi.test limit 12\n  from abc into clean\n"
        f"  ablate all but c at tokens * with abc\n  measure {DIFFERENCE} as delta\n"
        "  against none\n}\n"
    )
    text = discovers(nodes="heads, mlps, features of a")
    path = write(tmp_path, TRAINED, text, rest, block=SPLIT)
    shown = command("run", path, "--store", tmp_path / "store")
    assert shown.status == 2
    assert shown.err.count("error[") == 1
    assert "error[E0642]: `a` isn't trained" in shown.err
    assert "mechdsl run --fit" in shown.err
    with pytest.raises(mechdsl.MechdslError) as found:
        mechdsl.run(path, store=tmp_path / "store")
    assert [each.code for each in found.value.diagnostics] == ["E0642"]


def test_circuit_is_known_in_other_experiments(tmp_path: Path) -> None:
    more = (
        "experiment rest {\n  prompts ioi limit 12\n  from abc into clean\n"
        "  ablate top 3 of c at tokens * with abc\n"
        f"  measure {DIFFERENCE} as delta\n  against none\n}}\n"
    )
    second = discovers("eap top 5 edges", name="f", circuit="f", run="from clean into abd")
    path = write(tmp_path, discovers(), more, second)
    results = mechdsl.run(path, store=tmp_path / "store")
    assert {each.name for each in results.experiments} == {"e", "rest", "f"}
    text = results.to_text()
    assert "part `test` of a 50% split (automatic: `c`, `f` are trained on part `train`)" in (
        " ".join(text.split())
    )


def test_block_with_a_split_uses_its_parts(tmp_path: Path) -> None:
    block, _ = defined("eap(size: 12)")
    split = run(write(tmp_path, discovers(), block=block))
    whole = run(write(tmp_path, discovers()))
    np.testing.assert_array_equal(split.measures[0].patched, whole.measures[0].patched)


def test_run_without_a_store_reports_e0642(tmp_path: Path, command: Command) -> None:
    path = write(tmp_path, discovers())
    shown = command("run", path, "--no-store")
    assert shown.status != 0
    assert "error[E0642]: `c` isn't trained: the run has no store" in shown.err
    with pytest.raises(mechdsl.MechdslError, match="E0208"):
        mechdsl.run(path, store=False)


def test_plan_counts_the_training(tmp_path: Path) -> None:
    assert "training" in str(mechdsl.plan(write(tmp_path, discovers())))


@pytest.mark.parametrize(
    "nodes", ["heads, mlps", "heads, mlps, features of f, few", f"heads, mlps at {AT}"]
)
def test_formatted_statement_parses_to_itself(nodes: str, tmp_path: Path, command: Command) -> None:
    path = write(tmp_path, discovers(nodes=nodes))
    assert command("fmt", path).status == 0
    assert f"  discover c over {nodes} using {EAP}\n" in path.read_text("utf-8")


def change(old: str, new: str) -> str:
    text = discovers()
    assert old in text
    return text.replace(old, new)


ERRORS = {
    "heads alone": (change("heads, mlps", "heads"), "E0207", "write `over heads, mlps`"),
    "neurons": (change("heads, mlps", "heads, neurons"), "E0207", "define a group, such as"),
    "features alone": (
        GROUPS + discovers(nodes="features of f, heads"),
        "E0207",
        "write `over heads, mlps, features of f`",
    ),
    "unknown dictionary": (
        GROUPS + discovers(nodes="heads, mlps, features of ff"),
        "E0201",
        "did you mean `f`?",
    ),
    "neurons and features of one MLP": (
        GROUPS + discovers(nodes="heads, mlps, few, cells"),
        "E0207",
        "name either neurons or features of layer 0",
    ),
    "neurons and heads": (
        GROUPS + "group hs = L0H1, L0H2\n" + discovers(nodes="heads, mlps, cells, hs"),
        "E0207",
        "`c` has `L0H1`, and `nodes` are neurons or features",
    ),
    "trained group and dictionary": (
        GROUPS
        + "group own = fit(atp(size: 2), prompts: ioi, limit: 12, from: abc, maximise: "
        + "logit(answer)) at mlp_hidden layer 0 neurons * at tokens *\n"
        + discovers(nodes="heads, mlps, own, features of t"),
        "E0207",
        "joins `own` with other nodes, and this file doesn't list its sites",
    ),
    "neurons and a dictionary of one MLP": (
        GROUPS + discovers(nodes="heads, mlps, features of f, cells"),
        "E0207",
        "name either neurons or features of layer 0",
    ),
    "group of another group": (
        GROUPS + "group g = cells, features 1 of t\n" + discovers(nodes="heads, mlps, g"),
        "E0207",
        "is a group, and a group lists only sites",
    ),
    "twice": (
        GROUPS + discovers(nodes="heads, mlps, features of f, features of f"),
        "E0207",
        "remove one of them",
    ),
    "group of heads": (
        "group hs = L0H1, L0H2\n" + discovers(nodes="heads, mlps, hs"),
        "E0207",
        "name neurons or features only",
    ),
    "not a dictionary": (
        "basis b = pca(ioi, dims: 2) at mlp_out layer 0\n"
        + discovers(nodes="heads, mlps, features of b"),
        "E0342",
        "transcoder",
    ),
    "nodes": (change("12 edges", "12 nodes"), "E0207", "write `top 12 edges`"),
    "until": (discovers("eap until recovery > 0.9"), "E0207", "until faithfulness > 0.9"),
    "no size": (discovers("eap"), "E0342", "eap(size: 20)"),
    "two sizes": (discovers("eap(size: 3) top 12 edges"), "E0207", "remove one of them"),
    "threshold": (discovers("acdc(threshold: 1) top 3 edges"), "E0207", "remove `top 3 edges`"),
    "greedy": (discovers("greedy until faithfulness > 0.5"), "E0207", "write `top 20 edges`"),
    "mask": (discovers("mask(size: 4)"), "E0207", "`acdc`"),
    "unknown": (discovers("eapp top 3 edges"), "E0203", "did you mean `eap`?"),
    "reversed": (discovers(run="from abc into clean"), "E0207", "write `from clean into abc`"),
    "misspelt run": (discovers(run="from clean into abe"), "E0201", "did you mean"),
    "no run": (discovers(run=""), "E0207", "from clean into fewer"),
    "two runs": (discovers(run="from clean into abc, abd"), "E0207", "from clean into abc"),
    "part": (discovers(use="prompts ioi.train"), "E0207", "write `prompts ioi`"),
    "misspelt block": (discovers(use="prompts iox"), "E0201", "did you mean `ioi`?"),
    "effect": (discovers(measure="measure logit(answer) as delta"), "E0207", "as recovery"),
    "position": (
        discovers(measure="measure entropy at s2 token as recovery"),
        "E0207",
        "name no position",
    ),
    "no measure": (discovers(measure=""), "E0207", "add one"),
    "rule": (discovers(EAP, "patch L0H1 at last token"), "E0207", "another experiment"),
    "second": (discovers(EAP, f"discover d over heads, mlps using {EAP}"), "E0207", "for each"),
    "replies": (discovers(EAP, "generate 3"), "E0207", "another experiment"),
    "name": (discovers(circuit="lm"), "E0202", "rename"),
    "positions at the end": (discovers(f"{EAP} at last token"), "E0101", "after the nodes"),
    "positions before the nodes": (
        change("c over", "c at last token over"),
        "E0101",
        "after the nodes",
    ),
    "sweep": (discovers(nodes="heads, mlps at token *"), "E0304", "name each position"),
    "common token": (
        discovers(nodes="heads, mlps at last token, tokens *"),
        "E0342",
        "write `tokens except …`",
    ),
    "misspelt position": (
        discovers(nodes="heads, mlps at s3 token, last token"),
        "E0308",
        "`s1`, `s2`",
    ),
    "loop": (
        discovers().replace("discover", "for l in 0..1 { discover").replace("edges\n", "edges }\n"),
        "E0108",
        "",
    ),
    "derived": (
        discovers(EAP, "run d { patch L0H1 at last token }", run="from clean into d"),
        "E0207",
        "from clean into",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_invalid_discovery_reports_code_and_fix(case: str, tmp_path: Path) -> None:
    text, code, said = ERRORS[case]
    make(tmp_path, "topk", WIDTH)
    path = write(tmp_path, text)
    found = mechdsl.validate(path).errors
    assert code in [each.code for each in found]
    assert said in found.render()
    assert len(found) <= 2
