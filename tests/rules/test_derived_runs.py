"""Derived runs as sources, as bases and in metrics, against two or three stages of plain changes
to one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from mechdsl.diagnostics.syntax import UnusedName
from mechdsl.results.experiment_result import ExperimentResult

from ..quick import some
from ..reference.forward import Changes, Edge, Run, Write
from .paths import End, copied
from .support import (
    MANY,
    Array,
    Key,
    Text,
    agree,
    codes,
    difference,
    edited,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    token,
    tokens,
    try_file,
    worked_out,
)

FAMILIES = ("llama", "gpt2", "gpt_neox")
HEADS = range(4)
RUNS = {
    "healed": "from clean into longer  patch resid_post layer 0 at cue token",
    "edges": "from other into clean  patch layer 1 heads 0..1 at {cue token, last token} "
    "block attention layer 2 from last token to cue token",
    "flat": "ablate mlp_out layers 0..1 at last token with mean of longer "
    "set attn_out layer 1 at cue token to 0.3",
    "turn": "from clean into other  swap resid_post layer 0 at cue token with last token "
    "freeze mlp_out layer 2 at last token  ablate layer 1 head 3 at cue token with zero",
    # made of another run with rules
    "twice": "from healed into clean  patch layer 1 heads * at cue token",
    "third": "from clean into healed  patch mlp_out layer 1 at last token "
    "patch resid_post layer 0 at cue token with other",
    "held": "from healed into healed  freeze mlp_out layer 1 at last token "
    "patch layer 0 head 1 at last token with third",
}
NEEDS = {"twice": ("healed",), "third": ("healed",), "held": ("healed", "third")}
BASES = {"healed": "longer", "edges": "clean", "flat": "clean", "turn": "other",
         "twice": "clean", "third": "longer", "held": "longer"}  # fmt: skip
"""The run whose texts each derived run has."""


def defined(*names: str) -> list[str]:
    """The lines that define runs, with those that they need before them."""
    every = dict.fromkeys(n for name in names for n in (*_needed(name), name))
    return [f"run {name} {{ {RUNS[name]} }}" for name in every]


def _needed(name: str) -> list[str]:
    return [n for need in NEEDS.get(name, ()) for n in (*_needed(need), need)]


# --- the reference --------------------------------------------------------------------------------


def _copy(of: Run, ends: Sequence[End], read: Sequence[int], written: Sequence[int]) -> list[Write]:
    return copied(ends, of, read, written)


def changes_of(name: str, run: str, n: int) -> tuple[list[Write], list[Edge]]:
    """Writes into the base of a derived run, in one row; later writes override earlier ones."""
    base = rows(BASES[run])[n]

    def at(written: str, run: str = run) -> list[int]:
        return tokens(text_of(run, n), written)

    cue, last = at("cue token"), at("last token")
    match run:
        case "healed":
            clean = plain(name, rows("clean")[n])
            return _copy(clean, [End("resid_post", 0)], at("cue token", "clean"), cue), []
        case "edges":
            other = plain(name, rows("other")[n])
            read = at("{cue token, last token}", "other")
            ends = [End("z", 1, 0), End("z", 1, 1)]
            return _copy(other, ends, read, [*cue, *last]), [Edge("block", 2, last, cue)]
        case "flat":
            means = [
                torch.stack(
                    [
                        plain(name, text)["mlp_out", layer][tokens(text, "last token")[0], 0]
                        for text in rows("longer")
                    ]
                ).mean(0)
                for layer in (0, 1)
            ]
            writes = [Write("mlp_out", layer, means[layer], last[0], 0) for layer in (0, 1)]
            set_to = torch.full_like(means[0], 0.3)
            return [*writes, Write("attn_out", 1, set_to, cue[0], 0)], []
        case "turn":
            own = plain(name, base)
            swapped = _copy(own, [End("resid_post", 0)], [*cue, *last], [*last, *cue])
            frozen = _copy(own, [End("mlp_out", 2)], last, last)
            nothing = torch.zeros_like(own["z", 1][0, 3])
            return [*swapped, *frozen, Write("z", 1, nothing, cue[0], 3)], []
        case "twice":
            heads = [End("z", 1, head) for head in HEADS]
            return _copy(stage(name, "healed", n), heads, at("cue token", "healed"), cue), []
        case "third":
            before, edges = changes_of(name, "healed", n)
            clean, other = plain(name, rows("clean")[n]), plain(name, rows("other")[n])
            mlp = _copy(clean, [End("mlp_out", 1)], at("last token", "clean"), last)
            again = _copy(other, [End("resid_post", 0)], at("cue token", "other"), cue)
            return [*before, *mlp, *again], edges
        case _:
            before, edges = changes_of(name, "healed", n)
            own, third = stage(name, "healed", n), stage(name, "third", n)
            frozen = _copy(own, [End("mlp_out", 1)], last, last)
            return [*before, *frozen, *_copy(third, [End("z", 0, 1)], last, last)], edges


@cache
def stage(name: str, run: str, n: int) -> Run:
    """A row of a run, with rules or without."""
    if run not in RUNS:
        return plain(name, rows(run)[n])
    return edited(name, rows(BASES[run])[n], *changes_of(name, run, n))


def measured(name: str, run: str) -> Array:
    """[prompt]"""
    found = [difference(stage(name, run, n).logits, r) for n, r in enumerate(records())]
    return np.array(found)


def text_of(run: str, n: int) -> Text:
    """The text of a row in a run, with rules or without."""
    return rows(BASES.get(run, run))[n]


def from_into(name: str, source: str, base: str, ends: Callable[..., Sequence[End]],
              cells: Sequence[Key], at: str = "last token") -> dict[Key, list[float]]:  # fmt: skip
    """Values of each cell with the source's vectors in the base, whose rules still apply."""

    def changes(n: int, *key: int) -> Sequence[Changes]:
        before, edges = changes_of(name, base, n) if base in RUNS else ([], [])
        read, written = tokens(text_of(source, n), at), tokens(text_of(base, n), at)
        own = copied(ends(*key), stage(name, source, n), read, written)
        return [([*before, *own], edges)]

    texts = [text_of(base, n) for n in range(len(records()))]
    return worked_out(name, cells, changes, texts, records())


EACH_HEAD = product(range(3), HEADS)


def heads(layer: int, head: int) -> list[End]:
    return [End("z", layer, head)]


# --- sources and bases ----------------------------------------------------------------------------


@cache
def results(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    """Results with each run as the source, as the base, and named in a patch."""
    text = ""
    sweep = "patch layer * head * at last token"
    for run in RUNS:
        text += experiment(f"of_{run}", *defined(run), f"from {run} into clean", sweep)
        text += experiment(f"on_{run}", *defined(run), f"from turned into {run}", sweep)
        into = "from other into longer"
        text += experiment(f"with_{run}", *defined(run), into, f"{sweep} with {run}")
    return run_file(text, data, name, mode)


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("name", some(FAMILIES, FAMILIES[:2]))
@pytest.mark.parametrize("run", list(RUNS))
def test_derived_run_as_source_and_base_equals_the_reference(
    data: Path, name: str, run: str, mode: str
) -> None:
    found = results(data, name, mode)
    for key, source, base in (
        (f"of_{run}", run, "clean"),
        (f"on_{run}", "turned", run),
        (f"with_{run}", run, "longer"),
    ):
        values = from_into(name, source, base, heads, EACH_HEAD)
        agree(found[key], ("layer", "head"), values, measured(name, base), large=0.02, most=False)
        if not key.startswith("with"):
            end = found[key].measures[0].source
            assert end is not None
            np.testing.assert_allclose(end[0], measured(name, source), atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_of_each_derived_run_change_the_reference_values(name: str) -> None:
    """Otherwise the comparisons above would be trivial."""
    for run, base in BASES.items():
        assert np.abs(measured(name, run) - measured(name, base)).max() > 0.02, run


@pytest.mark.parametrize("mode", MANY)
def test_experiment_rule_overrides_a_derived_run_at_the_same_site(data: Path, mode: str) -> None:
    """The experiment's write applies where both write to a site; elsewhere both apply."""
    text = experiment("e", *defined("healed"), "from other into healed",
                      "patch resid_post layer * at cue token")  # fmt: skip
    found = run_file(text, data, "llama", mode)["e"]
    values: dict[Key, list[float]] = {}
    for layer in range(3):
        values[(layer,)] = []
        for n, record in enumerate(records()):
            cue = tokens(rows("longer")[n], "cue token")
            healed, _ = changes_of("llama", "healed", n)
            read = tokens(rows("other")[n], "cue token")
            own = copied([End("resid_post", layer)], plain("llama", rows("other")[n]), read, cue)
            writes = own if layer == 0 else [*healed, *own]
            values[(layer,)].append(
                difference(edited("llama", rows("longer")[n], writes).logits, record)
            )
    agree(found, ("layer",), values, measured("llama", "healed"), large=0.02, most=False)


@pytest.mark.parametrize("mode", MANY)
def test_attention_edits_of_a_derived_run_and_its_experiment_both_apply(
    data: Path, mode: str
) -> None:
    rule = "reweight attention layer * from last token to subject token by 4"
    text = experiment("e", *defined("edges"), "from clean into edges", rule)
    found = run_file(text, data, "llama", mode)["e"]

    def changes(n: int, layer: int) -> Sequence[Changes]:
        writes, edges = changes_of("llama", "edges", n)
        last, subject = (tokens(rows()[n], at) for at in ("last token", "subject token"))
        return [(writes, [*edges, Edge("reweight", layer, last, subject, 4.0)])]

    cells = [(n,) for n in range(3)]
    values = worked_out("llama", cells, changes, rows(), records())
    agree(found, ("layer",), values, measured("llama", "edges"), large=0.02, most=False)


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("name", some(FAMILIES, FAMILIES[:2]))
def test_metrics_relative_to_a_derived_run_equal_the_reference(
    data: Path, name: str, mode: str
) -> None:
    rule = "patch resid_post layer 1 at cue token"
    lines = [*defined("third"), "from other into clean", rule]
    text = "".join(
        experiment(key, *lines, measure=f"measure {metric} as raw")
        for key, metric in (
            ("kl", "kl(third)"),
            ("cosine", "cosine(resid_post layer 2, third)"),
            ("healed", "kl(healed)"),
        )
    )
    found = run_file(text, data, name, mode)
    for n in range(len(records())):
        base, other = rows()[n], rows("other")[n]
        read, cue = tokens(other, "cue token"), tokens(base, "cue token")
        writes = copied([End("resid_post", 1)], plain(name, other), read, cue)
        own = edited(name, base, writes)
        for key, run in (("kl", "third"), ("healed", "healed")):
            reference = stage(name, run, n).logits[-1].log_softmax(-1)
            kl = (reference.exp() * (reference - own.logits[-1].log_softmax(-1))).sum()
            assert found[key].measures[0].patched[0, n] == pytest.approx(float(kl), abs=1e-4)
        there = stage(name, "third", n)["resid_post", 2][-1, 0]
        here = own["resid_post", 2][-1, 0]
        cosine = torch.cosine_similarity(there, here, 0)
        measure = found["cosine"].measures[0].patched[0, n]
        assert measure == pytest.approx(float(cosine), abs=1e-4)


@pytest.mark.parametrize("mode", MANY)
def test_ablation_with_the_mean_of_a_derived_run_equals_the_reference(
    data: Path, mode: str
) -> None:
    """The mean is over the run's rows, of vectors with its rules applied."""
    rule = "ablate layer * head * at last token with mean of third"
    text = experiment("e", *defined("third"), rule)
    found = run_file(text, data, "llama", mode)["e"]
    count = len(records())

    def changes(n: int, layer: int, head: int) -> Sequence[Changes]:
        vectors = [stage("llama", "third", row)["z", layer][-1, head] for row in range(count)]
        mean = torch.stack(vectors).mean(0)
        return [([Write("z", layer, mean, tokens(rows()[n], "last token")[0], head)], ())]

    values = worked_out("llama", EACH_HEAD, changes, rows(), records())
    agree(found, ("layer", "head"), values, measured("llama", "clean"), large=0.02, most=False)


@pytest.mark.parametrize("mode", MANY)
def test_accuracy_of_a_derived_run_equals_the_reference(data: Path, mode: str) -> None:
    lines = ["patch resid_post layer 2 at last token", "expect accuracy(third) > -1"]
    text = experiment("e", *defined("third"), "from third into clean", *lines)
    found = run_file(text, data, "llama", mode)["e"]
    right = [
        float(stage("llama", "third", n).logits[-1].argmax() == token(r["a"]))
        for n, r in enumerate(records())
    ]
    assert found.accuracy["third"].tolist() == right


@pytest.mark.parametrize("mode", MANY)
def test_multi_token_metric_on_a_derived_run_equals_the_reference(data: Path, mode: str) -> None:
    """The text follows the prompt, and the rules still apply."""
    lines = [*defined("third"), "from clean into third", "patch layer 2 head * at last token"]
    text = experiment("e", *lines, measure='measure logprob(" w5 w7 w9") as delta')
    found = run_file(text, data, "llama", mode)["e"]
    more = [token(word) for word in ("w5", "w7", "w9")]
    for n in range(len(records())):
        base = rows("longer")[n]
        writes, edges = changes_of("llama", "third", n)
        last = [base.last]
        values = []
        for head in (None, *HEADS):
            clean = plain("llama", rows()[n])
            own = copied(heads(2, head), clean, [rows()[n].last], last) if head is not None else []
            longer = type(base)((*base.words, "w5", "w7"), base.spans)
            logits = edited("llama", longer, [*writes, *own], edges).logits.log_softmax(-1)
            values.append(sum(float(logits[base.last + k, t]) for k, t in enumerate(more)))
        np.testing.assert_allclose(found.measures[0].base[0, n], values[0], atol=1e-4)
        np.testing.assert_allclose(found.measures[0].patched[:, n], values[1:], atol=1e-4)


def test_derived_runs_with_one_name_are_local_to_their_experiments(data: Path) -> None:
    """Each name refers to the run of the same experiment."""
    sweep = "patch layer * head * at last token"
    text = experiment("a", *defined("healed"), "from healed into clean", sweep)
    other = RUNS["turn"]
    text += experiment("b", f"run healed {{ {other} }}", "from healed into clean", sweep)
    found = run_file(text, data, "llama", "planned")
    for key, run in (("a", "healed"), ("b", "turn")):
        values = from_into("llama", run, "clean", heads, EACH_HEAD)
        agree(found[key], ("layer", "head"), values, measured("llama", "clean"), large=0.02,
              most=False)  # fmt: skip


def test_mean_in_a_derived_run_uses_the_rows_after_keep(data: Path) -> None:
    """`keep` removes rows before the means are computed."""
    rule = "ablate mlp_out layer 1 at last token with mean"
    lines = ["keep prob(answer) > 0.012", f"run flat {{ {rule} }}", "from flat into clean"]
    text = experiment("e", *lines, "patch resid_post layer 2 at last token")
    found = run_file(text, data, "llama", "planned")["e"]
    kept = [
        n
        for n, r in enumerate(records())
        if plain("llama", rows()[n]).logits[-1].softmax(-1)[token(r["a"])] > 0.012
    ]
    assert found.row_ids is not None
    assert list(found.row_ids) == kept
    assert 1 < len(kept) < len(records())
    vectors = [plain("llama", rows()[n])["mlp_out", 1][-1, 0] for n in kept]
    mean = torch.stack(vectors).mean(0)
    values = [
        difference(
            edited("llama", rows()[n], [Write("mlp_out", 1, mean, rows()[n].last, 0)]).logits,
            records()[n],
        )
        for n in kept
    ]
    source = found.measures[0].source
    assert source is not None
    np.testing.assert_allclose(source[0], values, atol=1e-4)


def test_resample_in_a_derived_run_permutes_rows_without_fixed_points(data: Path) -> None:
    """`resample` gives each row the values of another row, independent of the batches."""
    line = "run mixed { ablate mlp_out layer 1 at last token with resample }"
    text = experiment("e", line, "from mixed into clean", "patch resid_post layer 2 at last token")
    found = [run_file(text, data, "llama", mode)["e"] for mode in ("planned", "small passes")]
    count = len(records())
    given = [plain("llama", rows()[n])["mlp_out", 1][-1, 0] for n in range(count)]
    of: list[int] = []
    for n in range(count):
        own = [
            difference(
                edited("llama", rows()[n], [Write("mlp_out", 1, each, rows()[n].last, 0)]).logits,
                records()[n],
            )
            for each in given
        ]
        for each in found:
            end = each.measures[0].source
            assert end is not None
            of.append(int(np.abs(np.array(own) - end[0, n]).argmin()))
            assert abs(own[of[-1]] - end[0, n]) < 1e-4
    assert of[::2] == of[1::2]
    assert sorted(of[::2]) == list(range(count))
    assert all(n != donor for n, donor in enumerate(of[::2]))


# --- errors ---------------------------------------------------------------------------------------


REFUSED = {
    "run r { from clean into other patch resid_post layer * at cue token }": "E0108",
    "run r { from clean into other patch resid_post layer 0 at each item token }": "E0108",
    "run r { from clean into other path L0H1 -> L1H0.q at cue token }": "E0108",
    'run r { replace cue token with "w3" }': "E0108",
    "run r { from clean, longer into other patch resid_post layer 0 at cue token }": "E0207",
    "run r { from clean into other }": "E0207",
    "run r { from r into clean patch resid_post layer 0 at cue token }": "E0201",
    "run r { patch resid_post layer 0 at cue token }": "E0602",
    "run other { ablate resid_post layer 0 at cue token with zero }": "E0202",
    "run clean { ablate resid_post layer 0 at cue token with zero }": "E0202",
    "run r { ablate resid_post layer 0 at cue token with zero measure loss as raw }": "E0101",
    "run r { ablate resid_post layer 0 at item 5 token with zero }": "E0309",
}


@pytest.mark.parametrize("line", list(REFUSED))
def test_unsupported_rules_in_a_derived_run_are_errors(data: Path, line: str) -> None:
    name = line.split()[1]
    source = "longer" if name in ("other", "clean") else name
    text = experiment("e", line, f"from {source} into clean", "patch mlp_out layer 1 at cue token")
    assert REFUSED[line] in codes(text, data)


def test_replace_on_a_derived_run_is_an_error(data: Path) -> None:
    rule = 'replace cue token with "w3"'
    text = experiment("e", *defined("healed"), "from clean into healed", rule)
    assert "E0108" in codes(text, data)


FITS = (
    "direction d = mean_difference(healed, p)",
    "direction d = mean(p.healed)",
    "direction d = mean(healed of p)",
)


@pytest.mark.parametrize("definition", FITS)
def test_fit_on_rows_of_a_run_with_rules_reports_e0108_and_the_mean_of_the_run(
    data: Path, definition: str
) -> None:
    rule = "add d to resid_post layer 1 at last token"
    text = experiment("e", *defined("healed"), "from healed into clean", rule)
    result, found = try_file(f"{definition} at resid_post layer 1\n{text}", data, "llama")
    assert result is None
    [error] = [each for each in found if each.severity == "error"]
    assert error.code == "E0108"
    assert "with mean of RUN" in str(error.help_text)


def test_unused_derived_run_is_a_warning(data: Path) -> None:
    text = experiment("e", *defined("healed"), "from other into clean",
                      "patch mlp_out layer 1 at cue token")  # fmt: skip
    result, found = try_file(text, data, "llama")
    assert result is not None
    assert [d.code for d in found if d.code == "W0730"]
    used = experiment("used", *defined("healed"), "from healed into clean",
                      "patch mlp_out layer 1 at cue token")  # fmt: skip
    result, found = try_file(text + used, data, "llama")
    assert result is not None
    assert [d.name for d in found if isinstance(d, UnusedName) and d.kind == "run"] == ["healed"]


@pytest.mark.parametrize(("ends", "stays"), [("healed into clean", 0), ("clean into healed", 1)])
def test_conventions_print_that_writes_of_the_base_run_stay(
    data: Path, ends: str, stays: int
) -> None:
    rule = "patch mlp_out layer 1 at cue token"
    text = experiment("e", *defined("healed"), f"from {ends}", rule)
    result, _ = try_file(text, data, "llama")
    assert result is not None
    said = result.experiments[0].conventions["run healed"]
    assert said.endswith("its writes stay in place under the experiment's rules") == bool(stays)


def test_accuracy_of_a_derived_run_with_keep_is_an_error(data: Path) -> None:
    lines = ["keep correct", f"run flat {{ {RUNS['flat']} }}", "from flat into clean"]
    rule = "patch resid_post layer 2 at last token"
    assert "E0108" in codes(experiment("e", *lines, rule, "expect accuracy(flat) > 0"), data)
