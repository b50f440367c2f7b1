"""Messages about blocks, parts of a split and trainings that have too few rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic

HEAD = 'mech 1\n\nmodel lm = zoo("names")\n\n'
NAMES = """prompts ioi {
  io in ["Mary", "John", "Tom"]
  s in ["Anna", "Luke", "Peter"]
  template "When {io} and {s1 = s} went to the shop, {s2 = s} gave a bag to"
  answer " {io}"
}
"""
DRAWN = NAMES.replace('s in ["Anna", "Luke", "Peter"]', "s = other(io)")
ONE = """prompts ioi {
  name in ["Mary", "John", "Tom", "Anna", "Luke"]
  pair = list(name, 2, sep: " ", distinct: true)
  n = 2
  template "When {pair} went to the shop, {cue = pair[1]} gave a bag to"
  answer " {pair[2]}"
}
"""
CIRCUIT = "circuit c = fit(eap(size: 12), prompts: ioi, with: mean, maximise: logprob(answer))\n"
ABLATED = "ablate all but c at tokens * with mean"
HEADS = "ablate layer * heads * at last token"


def found(tmp_path: Path, *parts: str, code: str) -> list[Diagnostic]:
    path = tmp_path / "file.mech"
    path.write_text("".join((HEAD, *parts)), encoding="utf-8")
    return [each for each in mechdsl.validate(path) if each.code == code]


def experiment(rule: str, limit: str = "", block: str = "ioi", name: str = "e") -> str:
    lines = (
        "model lm",
        f"prompts {block}{limit}",
        *rule.split("\n"),
        "measure prob(answer) as raw",
    )
    return f"experiment {name} {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


ONE_OF_THREE = CIRCUIT.replace("prompts: ioi", "prompts: ioi, limit: 20")
ALONE: dict[str, tuple[tuple[str, ...], str]] = {
    "limit": ((NAMES, experiment(f"{HEADS} with mean", " limit 1")), "than `limit 1`"),
    "resample": ((NAMES, experiment(f"{HEADS} with resample", " limit 1")), "than `limit 1`"),
    "one of two fills": ((NAMES, experiment(f"{HEADS} with zero, mean", " limit 1")), "`limit 1`"),
    "groups": (
        (NAMES.replace(', "Luke", "Peter"', ""), experiment(f"{HEADS} with mean by io")),
        "give `ioi` more rows",
    ),
    "automatic split": ((DRAWN, ONE_OF_THREE, experiment(ABLATED)), "`prompts ioi limit 40`"),
    "split": (
        (
            DRAWN.replace("answer", "split 80%\n  answer"),
            experiment(f"{HEADS} with mean", block="ioi.test"),
        ),
        "`prompts ioi.test limit 40`",
    ),
    "without draws": (
        (NAMES.replace(', "Luke", "Peter"', ""), CIRCUIT, experiment(ABLATED)),
        "`with mean of ioi.train`",
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_mean_without_a_second_row_is_a_warning_with_its_fix(name: str, tmp_path: Path) -> None:
    parts, fix = ALONE[name]
    (warning,) = found(tmp_path, *parts, code="W0732")
    assert "has no second row, so each row keeps its values" in warning.message
    assert fix in warning.help_text


ENOUGH: dict[str, tuple[str, ...]] = {
    "two rows": (NAMES, experiment(f"{HEADS} with mean", " limit 2")),
    "zero": (NAMES, experiment(f"{HEADS} with zero", " limit 1")),
    "the training rows": (NAMES, CIRCUIT, experiment(f"{ABLATED} of ioi.train")),
    "groups of three": (NAMES, experiment(f"{HEADS} with mean by io")),
    "another rule": (
        NAMES,
        experiment(f"{HEADS} with mean\nablate mlp_out layer 0 at tokens * with zero", " limit 1"),
    ),
    "another run": (
        NAMES.replace("answer", "corrupt turned { s2 = io }\n  answer"),
        experiment(f"{HEADS} with mean of turned", " limit 1"),
    ),
}


@pytest.mark.parametrize("name", ENOUGH)
def test_mean_that_changes_rows_has_no_warning(name: str, tmp_path: Path) -> None:
    assert not found(tmp_path, *ENOUGH[name], code="W0732")


def test_groups_of_rows_that_a_check_does_not_read_have_no_warning(tmp_path: Path) -> None:
    """Each group has three rows, of which a check of five rows may read one."""
    path, large = tmp_path / "file.mech", NAMES.replace("{io} and", "{io}{n} and")
    large = large.replace("prompts ioi {", "prompts ioi {\n  n in 1..500")
    text = HEAD + large + experiment(f"{HEADS} with mean by n")
    checked = check_source(Source(text, path), CheckSettings(prompts_enough=1))
    codes = {each.code for each in checked.diagnostics}
    assert "W0790" in codes
    assert "W0732" not in codes


def test_mean_of_one_row_leaves_the_run_unchanged(tmp_path: Path) -> None:
    """The claim of W0732, in numbers: the metric is that of the base run."""
    path = tmp_path / "file.mech"
    path.write_text(HEAD + NAMES + experiment(f"{HEADS} with mean", " limit 1"), encoding="utf-8")
    (done,) = mechdsl.run(path).files[0].experiments
    (measure,) = done.measures
    assert measure.base.shape[0] == 1
    np.testing.assert_allclose(
        measure.patched, np.broadcast_to(measure.base, measure.patched.shape), atol=1e-5
    )


SINGLE = NAMES.replace(', "John", "Tom"', "").replace(', "Luke", "Peter"', "")
TOO_FEW: dict[str, tuple[tuple[str, ...], str]] = {
    "drawn": (
        (ONE, CIRCUIT, experiment(ABLATED)),
        "write how many rows to draw, `limit: 400` in `fit(…)` or `prompts ioi limit 40`",
    ),
    "automatic split": (
        (SINGLE, CIRCUIT, experiment(ABLATED)),
        "give it more values: mechdsl trains on 80 % of the rows",
    ),
    "split": (
        (
            SINGLE.replace("  answer", "  split 25%\n  answer"),
            experiment(f"{HEADS} with zero", block="ioi.train"),
        ),
        "or write another share than `split 25%`",
    ),
}


@pytest.mark.parametrize("name", TOO_FEW)
def test_part_without_rows_names_the_reason(name: str, tmp_path: Path) -> None:
    parts, fix = TOO_FEW[name]
    errors = found(tmp_path, *parts, code="E0509")
    assert fix in errors[0].help_text


FITS = (
    "basis f = fit(sae(features: 16, k: 4), prompts: ioi) at resid_post layer 1\n",
    "direction d = fit(vector(length: 8), prompts: ioi, minimise: loss) at resid_post layer 1\n",
    "lens l = fit(tuned_lens, prompts: ioi) at resid_post layer *\n",
    "probe t = fit(ridge, prompts: ioi, target: n) at resid_post layer 1\n",
    CIRCUIT.replace("c = ", "other = "),
    "group g = fit(mask(size: 2), prompts: ioi, with: zero, minimise: loss) at layers * heads *\n",
)
USES = (
    "ablate feature 0 of f at last token with zero",
    "add 2 * d to resid_post layer 1 at last token",
    "observe tuned_lens(l) at resid_post layer 0 at last token",
    "observe probe(t) at resid_post layer 1 at last token",
    "ablate other at tokens * with zero",
    "ablate g at last token with zero",
)


@pytest.mark.parametrize(("line", "rule"), zip(FITS, USES, strict=True))
def test_training_on_one_row_names_rows_and_limit(line: str, rule: str, tmp_path: Path) -> None:
    other = NAMES.replace("prompts ioi", "prompts second").replace("shop", "school")
    uses = experiment(rule, block="second")

    if rule.startswith("observe"):
        uses = uses.replace("  measure prob(answer) as raw\n", "")
    (error,) = found(tmp_path, ONE, other, line, uses, code="E0342")
    assert "`ioi` has 1 row, fewer than 2" in error.message
    assert "write how many rows to sample: `limit: 400`" in error.help_text
    limited = line.replace("prompts: ioi", "prompts: ioi, limit: 1")
    (error,) = found(tmp_path, ONE, other, limited, uses, code="E0342")
    assert "write a larger number than `limit: 1`" in error.help_text


GROUP = "group c = fit(mask(size: 2), prompts: ioi, with: mean, maximise: logprob(answer)) "
GROUP += "at layers * heads * at last token\n"
OF_TWO: dict[str, tuple[str, str, int]] = {
    "circuit": (CIRCUIT, "limit: 2", 1),
    "group": (GROUP, "limit: 2", 1),
    "zero": (CIRCUIT.replace("mean", "zero"), "limit: 2", 0),
    "three rows": (CIRCUIT, "limit: 3", 0),
    "no validation": (CIRCUIT, "limit: 2, validation: 0%", 0),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_mean_of_one_training_row_is_an_error(name: str, tmp_path: Path) -> None:
    line, more, count = OF_TWO[name]
    line = line.replace("prompts: ioi", f"prompts: ioi.train, {more}")
    block = DRAWN.replace("answer", "split 50%\n  answer")
    rule = (
        "ablate c at last token with zero" if "group" in line else "ablate c at tokens * with zero"
    )
    own = experiment(rule, " limit 4", block="ioi.test")
    problems = found(tmp_path, block, line, own, code="E0342")
    assert len(problems) == count
    for problem in problems:
        assert "it trains on 1 row and holds out 1" in problem.message
        assert problem.help_text == "name more rows, or write `validation: 0%`"


def test_split_of_an_imported_block_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "block.mech").write_text(f"mech 1\n{NAMES}", encoding="utf-8")
    use = 'use "block.mech"\n'
    (error,) = found(tmp_path, use, CIRCUIT, experiment(ABLATED), code="E0345")
    assert "in `prompts ioi` of " in error.help_text
    assert "block.mech;" in error.help_text
    part = CIRCUIT.replace("prompts: ioi", "prompts: ioi.train")
    tested = experiment(ABLATED, block="ioi.test")
    errors = found(tmp_path, use, part, tested, code="E0201")
    assert len(errors) == 2
    assert all("block.mech: it makes `ioi.train`" in each.help_text for each in errors)
