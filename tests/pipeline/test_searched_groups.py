"""Groups that an experiment searches for and tests, against their definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.base.text import Source
from mechdsl.program.discovery import expand_searches
from mechdsl.syntax import ast

from ..cli.conftest import Command, command
from ..parsing import parse
from ..quick import some
from .test_discovered_circuits import BLOCK, run, write

__all__ = ["command"]

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
DIFFERENCE = "logit(wrong) - logit(answer)"
HEADS = "ablate layer * head * at tokens * with zero"


def searches(
    search: str = "greedy heads up to 2",
    rule: str = HEADS,
    *more: str,
    name: str = "e",
    use: str = "prompts ioi limit 12",
    run: str = "",
    measure: str = f"measure {DIFFERENCE} as delta",
) -> str:
    lines = (use, run, f"search {search}", rule, measure, *more)
    return f"experiment {name} {{\n" + "".join(f"  {each}\n" for each in lines if each) + "}\n"


def defined(
    what: str, size: int, source: str, sites: str, at: str, rule: str, run: str = ""
) -> tuple[str, str]:
    """The block and the rest of a file with the definition that `searches` stands for."""
    block = BLOCK.replace("  corrupt", "  split 50%\n  corrupt", 1)
    group = (
        f"group e_{what} = fit(forward_selection(size: {size}), prompts: ioi.train, limit: 12, "
        f"{source}, maximise: {DIFFERENCE}) at {sites} at {at}\n"
    )
    lines = ("prompts ioi.test limit 12", run, rule, f"measure {DIFFERENCE} as delta")
    text = group + "experiment e {\n" + "".join(f"  {each}\n" for each in lines if each) + "}\n"
    return block, text


CASES = {
    "heads": (
        ("greedy heads up to 2", HEADS),
        ("heads", 2, "with: zero", "layers * heads *", "tokens *"),
        ("ablate e_heads at tokens * with zero", ""),
    ),
    "patch": (
        ("greedy heads up to 2", "patch layer * head * at last token"),
        ("heads", 2, "from: abc", "layers * heads *", "last token"),
        ("patch e_heads at last token", "from abc into clean"),
    ),
    "some": (
        ("greedy heads up to 1", "ablate layer 1 head 0..2 at last token with mean"),
        ("heads", 1, "with: mean", "layers 1 heads 0..2", "last token"),
        ("ablate e_heads at last token with mean", ""),
    ),
    "mlps": (
        ("greedy mlps up to 1", "ablate mlp_out layer * at last token with mean"),
        ("mlps", 1, "with: mean", "mlp_out layers *", "last token"),
        ("ablate e_mlps at last token with mean", ""),
    ),
    "neurons": (
        ("greedy neurons up to 2", "ablate mlp_hidden layer 1 neuron 0..7 at last token with mean"),
        ("neurons", 2, "with: mean", "mlp_hidden layers 1 neurons 0..7", "last token"),
        ("ablate e_neurons at last token with mean", ""),
    ),
    "dims": (
        ("greedy dims up to 2", "ablate resid_post layer 1 dim 0..7 at last token with mean"),
        ("dims", 2, "with: mean", "resid_post layers 1 dims 0..7", "last token"),
        ("ablate e_dims at last token with mean", ""),
    ),
}


@pytest.mark.parametrize("name", some(CASES, ["heads", "patch", "dims"]))
def test_searched_group_equals_its_definition(name: str, tmp_path: Path) -> None:
    (search, rule), given, (own_rule, source) = CASES[name]
    path = write(tmp_path, searches(search, rule, "against none", run=source))
    found = run(path)
    block, rest = defined(*given, own_rule, source)
    rest = rest.replace(" as delta\n", " as delta\n  against none\n")
    expected = run(write(tmp_path, rest, block=block), fit=True)
    own, other = found.measures[0], expected.measures[0]
    np.testing.assert_array_equal(own.patched, other.patched)
    np.testing.assert_array_equal(own.base, other.base)
    assert np.abs(own.patched - own.base).max() > 1e-3
    group = f"e_{given[0]}"
    assert found.conventions[f"group {group}"] == expected.conventions[f"group {group}"]
    assert found.cells[0].name == expected.cells[0].name


def test_search_maximises_the_first_measure_over_limited_rows() -> None:
    text = searches("greedy heads up to 2", HEADS, "measure entropy as raw")
    tree, _ = parse(Source(f"mech 1\n{BLOCK}{text}"))
    found = expand_searches(tree)
    assert not found.problems
    (group,) = (each for each in found.tree.statements if isinstance(each, ast.GroupDef))
    assert isinstance(group.source, ast.Call)
    given = {each.name: each.value.span.written for each in group.source.arguments if each.name}
    assert given["maximise"] == DIFFERENCE
    assert given["with"] == "zero"
    assert "limit" in given
    (experiment,) = (each for each in found.tree.statements if isinstance(each, ast.ExperimentDef))
    assert not any(isinstance(each, ast.Search) for each in experiment.statements)
    assert len([each for each in experiment.statements if isinstance(each, ast.Measure)]) == 2


def test_run_searches_and_tests_next_to_random_groups(tmp_path: Path, command: Command) -> None:
    other = (
        f"group d = fit(atp(size: 1), prompts: ioi, with: zero, maximise: {DIFFERENCE}, "
        "measure_on_training_rows: true) at layers * heads * at last token\n"
        "experiment other {\n  prompts ioi\n  ablate d at last token with zero\n"
        f"  measure {DIFFERENCE} as delta\n}}\n"
    )
    path = write(tmp_path, searches(), other)
    shown = command("run", path, "--store", tmp_path / "s")
    assert shown.status != 0
    assert "error[E0642]: `d` isn't trained" in shown.err
    assert "e: delta of" in shown.out
    assert "added for trained `e_heads`" in " ".join(shown.out.split())
    text = " ".join(shown.out.split())
    assert "part `test` of a 50% split (automatic: `e_heads` is trained on part `train`)" in text
    assert " e_heads  " in shown.err  # the table of trainings


def test_searched_group_is_known_in_other_experiments(tmp_path: Path) -> None:
    curve = (
        "experiment curve {\n  prompts ioi limit 12\n"
        "  for n in 1..2 { ablate top n of e_heads at tokens * with zero }\n"
        f"  measure {DIFFERENCE} as delta\n  against none\n}}\n"
    )
    block, _ = defined(*CASES["heads"][1], "", "")
    for own in (BLOCK, block):
        use = "ioi" if own == BLOCK else "ioi.test"
        path = write(
            tmp_path, searches(), curve.replace("prompts ioi", f"prompts {use}"), block=own
        )
        results = mechdsl.run(path, store=tmp_path / "store")
        both = results["curve"].measures[0].patched[-1]
        np.testing.assert_allclose(both, results["e"].measures[0].patched[0], atol=1e-5)


def test_experiment_of_a_failed_search_reports_no_command(tmp_path: Path, command: Command) -> None:
    never = "measure 1 / (logit(answer) - logit(answer)) as delta"
    other = "discover d over heads, mlps using acdc(threshold: 99)"
    lines = ("prompts ioi limit 12", "from clean into abc", other)
    lines = (*lines, "measure logit(answer) as recovery")
    text = "experiment f {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"
    shown = command(
        "run", write(tmp_path, searches(measure=never), text), "--store", tmp_path / "s"
    )
    assert shown.status != 0
    for name in ("e_heads", "d"):
        assert f"error[E0643]: `{name}` can't be trained" in shown.err
        assert f"error[E0642]: `{name}` isn't trained: its training failed" in shown.err
    assert "an error before this one reports the cause" in shown.err
    assert "mechdsl fit" not in shown.err


def test_parts_of_a_block_with_an_invalid_search_are_known(tmp_path: Path) -> None:
    test = "experiment t {\n  prompts ioi.test limit 12\n  ablate L0H1 at tokens * with zero\n"
    test += f"  measure {DIFFERENCE} as delta\n}}\n"
    for wrong in ("beam heads up to 2", "greedy heads up to k"):
        found = mechdsl.validate(write(tmp_path, searches(wrong), test)).errors
        assert len(found) == 1, found.render()


def test_run_without_a_store_reports_e0642(tmp_path: Path, command: Command) -> None:
    shown = command("run", write(tmp_path, searches()), "--no-store")
    assert "error[E0642]: `e_heads` isn't trained: the run has no store" in shown.err


def test_plan_counts_the_search(tmp_path: Path) -> None:
    assert "e_heads" in str(mechdsl.plan(write(tmp_path, searches())))


def test_size_may_be_a_parameter(tmp_path: Path) -> None:
    path = write(tmp_path, "param n = 2", searches("greedy heads up to n"))
    same = write(tmp_path, searches())
    first, second = (run(each).measures[0].patched for each in (path, same))
    np.testing.assert_array_equal(first, second)


def test_formatted_statement_parses_to_itself(tmp_path: Path, command: Command) -> None:
    path = write(tmp_path, searches())
    assert command("fmt", path).status == 0
    assert "  search greedy heads up to 2\n" in path.read_text("utf-8")


PATCH = "patch layer * head * at last token"
INTO = "from abc into clean"
ERRORS = {
    "method": (searches("beam heads up to 2"), "E0207", "write `search greedy heads up to 3`"),
    "typo": (searches("gredy heads up to 2"), "E0207", "did you mean `greedy`?"),
    "candidates": (searches("greedy head up to 2"), "E0207", "did you mean `heads`?"),
    "other": (searches("greedy experts up to 2"), "E0207", "write one of `heads`"),
    "zero": (searches("greedy heads up to 0"), "E0207", "write `up to 3`"),
    "unknown size": (searches("greedy heads up to k"), "E0201", "add `param k = 3`"),
    "no rule": (searches(rule=""), "E0207", "add a line such as `ablate layer * head *"),
    "two rules": (searches("greedy heads up to 2", HEADS, HEADS), "E0207", "keep one of them"),
    "plural": (searches(rule=HEADS.replace("head *", "heads *")), "E0207", "write `head *`"),
    "one head": (searches(rule="ablate L0H1 at tokens * with zero"), "E0207", "layer * head *"),
    "axis": (searches("greedy mlps up to 1"), "E0207", "or `search greedy heads …`"),
    "window": (
        searches("greedy mlps up to 1", "ablate mlp_out layer * window 3 at tokens * with zero"),
        "E0207",
        "remove `window`",
    ),
    "position": (searches(rule=HEADS.replace("tokens", "token")), "E0207", "`{A, B}`"),
    "fill": (searches(rule=HEADS.replace("zero", "resample")), "E0207", "`with mean`"),
    "onto": (
        searches(rule=f"{PATCH} onto first token", run=INTO),
        "E0207",
        "write `patch SITE at POSITION`",
    ),
    "during": (searches(rule=f"{HEADS} during prefill"), "E0207", "write `patch SITE"),
    "by": (searches(rule=HEADS.replace("zero", "mean by io")), "E0207", "write `patch SITE"),
    "fills": (searches(rule=f"{HEADS}, mean"), "E0207", "write `patch SITE"),
    "error": (searches(rule=f"{HEADS} without error"), "E0207", "write `patch SITE"),
    "other features": (
        "basis b = pca(ioi, dims: 4) at resid_post layer 0 at last token\n"
        + searches(
            "greedy features up to 2",
            "patch feature * of b at last token with feature * of b",
            run=INTO,
        ),
        "E0207",
        "write `patch SITE",
    ),
    "shuffled": (
        searches(rule=PATCH, run="from abc shuffled into clean"),
        "E0207",
        "write `from abc into clean`",
    ),
    "two sources": (searches(rule=PATCH, run="from abc, abd into clean"), "E0207", INTO),
    "verb": (searches(rule="scale layer * head * at tokens * by 2"), "E0207", "write `ablate"),
    "reversed": (searches(rule=PATCH, run="from clean into abc"), "E0207", INTO),
    "no run": (searches(rule=PATCH), "E0602", ""),
    "misspelt run": (searches(rule=PATCH, run="from abe into clean"), "E0201", "did you mean"),
    "misspelt block": (searches(use="prompts iox"), "E0201", "did you mean `ioi`?"),
    "effect": (searches(measure="measure logit(answer) as recovery"), "E0207", "as delta"),
    "place": (searches(measure="measure entropy at s2 token as raw"), "E0207", "name no position"),
    "no measure": (searches(measure=""), "E0207", "add one"),
    "second": (
        searches("greedy heads up to 2", HEADS, "search greedy heads up to 1"),
        "E0207",
        "for each",
    ),
    "replies": (searches("greedy heads up to 2", HEADS, "generate 3"), "E0207", "another"),
    "estimate": (searches("greedy heads up to 2", HEADS, "using atp"), "E0207", "another"),
    "loop": (
        searches().replace("search", "for l in 0..1 { search").replace("2\n", "2 }\n"),
        "E0108",
        "",
    ),
    "too many": (
        searches("greedy heads up to 8", HEADS, "against none"),
        "E0342",
        "of the 8 sites",
    ),
    "taken": ("group e_heads = L0H1\n" + searches(), "E0202", "rename"),
}


@pytest.mark.parametrize("lines", ["", "against random(3)"])
@pytest.mark.parametrize(
    "rule", [f"{HEADS}".replace("with zero", "with"), HEADS.replace("with zero", "zero")]
)
def test_search_whose_rule_cannot_be_parsed_reports_only_the_rule(
    rule: str, lines: str, tmp_path: Path
) -> None:
    found = mechdsl.validate(write(tmp_path, searches("greedy heads up to 2", rule, lines))).errors
    assert [each.code for each in found] == ["E0101"], found.render()


@pytest.mark.parametrize("case", ERRORS)
def test_invalid_search_reports_code_and_fix(case: str, tmp_path: Path) -> None:
    text, code, said = ERRORS[case]
    found = mechdsl.validate(write(tmp_path, text)).errors
    assert code in [each.code for each in found], found.render()
    assert said in found.render(), found.render()
    assert len(found) <= 2, found.render()
