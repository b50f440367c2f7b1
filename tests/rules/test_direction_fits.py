"""Rows and vectors that directions are fitted on, against reference fits and means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from rich.console import Console
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, check_source
from mechdsl.execute import vectors as directions
from mechdsl.planner import plan
from mechdsl.resolve.types import FittedVector
from mechdsl.show.prompts import print_prompts, prompts_document

from ..execute.support import Record, ids_of
from ..reference.forward import Changes, Write
from .models import double
from .support import (
    BLOCKS,
    QUICK,
    Text,
    agree,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    tokens,
    unpatched,
    worked_out,
)

THREE = ("gpt2", "llama", "gpt_neox")
SIZED: list[Record] = [
    {"lefts": left.split(), "right": right, "size": size, "side": side, "a": "w3", "b": "w44"}
    for left, right, size, side in [
        ("w31 w6", "w17", 9, "low"),
        ("w2 w27 w19", "w45", 10, "high"),
        ("w48", "w23 w4 w11", 9, "low"),
        ("w10 w16", "w39", 10, "high"),
        ("w5 w6 w22", "w12", 10, "low"),
        ("w33", "w8", 9, "high"),
        ("w9 w15", "w20 w21", 10, "high"),
        ("w7 w30 w41", "w2 w14", 9, "low"),
        ("w26", "w47", 10, "low"),
    ]
]
BLOCK = """
prompts sized {
  rows "sized.jsonl"
  left = list(item, from: lefts, sep: " ")
  template "{left} w43 {right} w40"
  answer " {a}"
  wrong " {b}"
  split 50%
}
"""


@pytest.fixture
def folder(data: Path) -> Path:
    """The data folder with the rows of `sized`."""
    lines = "\n".join(json.dumps(record) for record in SIZED)
    (data / "sized.jsonl").write_text(lines, encoding="utf-8")
    return data


def sized() -> list[Text]:
    found: list[Text] = []
    for record in SIZED:
        left, right = record["lefts"], record["right"].split()
        words = (*left, "w43", *right, "w40")
        first = len(left) + 2
        spans = {
            "left": tuple(range(1, len(left) + 1)),
            "right": tuple(range(first, first + len(right))),
        }
        found.append(Text(words, spans))
    return found


@cache
def matrix(name: str, site: str, layer: int, at: str, unit: int = 0) -> Tensor:
    """[row, width] of `sized`, tokens of a row averaged."""
    found = [plain(name, text)[site, layer][tokens(text, at), unit].mean(0) for text in sized()]
    return torch.stack(found)


def column(name: str) -> list[int | str]:
    return [record[name] for record in SIZED]


def ridge(x: Tensor, y: Sequence[float], penalty: float) -> Tensor:
    """[width]: least squares of the rows and of extra rows √penalty · weights = 0."""
    rows_ = x.numpy()
    width = rows_.shape[1]
    top = np.hstack([rows_, np.ones((len(rows_), 1))])
    below = np.hstack([np.sqrt(penalty) * np.eye(width), np.zeros((width, 1))])
    wanted = np.concatenate([np.array(y, dtype=float), np.zeros(width)])
    found = np.linalg.lstsq(np.vstack([top, below]), wanted, rcond=None)[0]
    return torch.from_numpy(found[:-1])


def logistic(x: Tensor, positive: Sequence[bool], penalty: float) -> Tensor:
    """[width]: the weights of one logit; two that share an L2 penalty have half each."""
    rows_, signs = x.numpy(), np.where(positive, 1.0, -1.0)

    def loss(flat: np.ndarray) -> float:
        margins = signs * (rows_ @ flat[:-1] + flat[-1])
        return float(np.logaddexp(0, -margins).sum() + penalty / 4 * (flat[:-1] ** 2).sum())

    def slope(flat: np.ndarray) -> np.ndarray:
        margins = signs * (rows_ @ flat[:-1] + flat[-1])
        pull = -signs / (1 + np.exp(margins))
        return np.append(rows_.T @ pull + penalty / 2 * flat[:-1], pull.sum())

    start = np.zeros(rows_.shape[1] + 1)
    found = scipy.optimize.minimize(
        loss, start, jac=slope, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000}
    )
    return torch.from_numpy(found.x[:-1])


LINES = """
direction numbers = probe(size, sized) at resid_post layer 1 at last token
direction firm = probe(size, sized, penalty: 30) at resid_post layer 1 at left tokens
direction sides = probe(side, sized) at resid_post layer 1
direction sizes = probe(size, sized, kind: logistic, penalty: 0.3) at resid_post layer 1
direction one_head = probe(size, sized, penalty: 0.5) at z layer 1 head 2 at last token
direction several = mean(sized) at resid_post layer 1 at left tokens
direction of_heads = mean(sized) at head_out layer 1 heads 0..2 at right tokens
direction own = mean(sized) at z layer 1 head 1
direction word = unembedding(" w3")
direction largest = pca(sized) at resid_post layer 1
"""


def made(name: str) -> dict[str, tuple[Tensor, float]]:
    """By name: the direction and its coefficient."""
    last = matrix(name, "resid_post", 1, "last token")
    size = [float(each) for each in column("size")]
    components = torch.linalg.svd(last - last.mean(0)).Vh
    first = components[0] * components[0][components[0].abs().argmax()].sign()
    outputs = [matrix(name, "head_out", 1, "right tokens", head) for head in range(3)]
    return {
        "numbers": (ridge(last, size, 1), 30),
        "firm": (ridge(matrix(name, "resid_post", 1, "left tokens"), size, 30), 60),
        "sides": (logistic(last, [each == "low" for each in column("side")], 1), 20),
        "sizes": (logistic(last, [each == 10 for each in size], 0.3), 20),
        "one_head": (ridge(matrix(name, "z", 1, "last token", 2), size, 0.5), 40),
        "several": (matrix(name, "resid_post", 1, "left tokens").mean(0), 2),
        "of_heads": (torch.stack(outputs).sum(0).mean(0), 4),
        "own": (matrix(name, "z", 1, "last token", 1).mean(0), 9),
        "word": (double(name).get_output_embeddings().weight.detach()[ids_of(["w3"])[-1]], 10),
        "largest": (first, 10),
    }


@pytest.mark.parametrize(("family", "room"), [*((name, None) for name in THREE), ("llama", 1)])
def test_fitted_directions_equal_the_reference(
    family: str, room: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """room: bytes per read batch; with 1 byte, each prompt is a batch."""
    if room is not None:
        monkeypatch.setattr(plan, "READ_BATCH_BYTES", room)
    expected = made(family)
    places = dict.fromkeys(expected, "resid_post layer 1")
    places |= {"one_head": "z layer 1 head 2", "own": "z layer 1 head 2"}
    text = LINES + "".join(
        experiment(f"e_{name}", f"add {number} * {name} to {places[name]} at last token")
        for name, (_, number) in expected.items()
    )
    found = run_file(text, folder, family, "planned", blocks=BLOCKS + BLOCK)
    for name, (vector, number) in expected.items():
        site, unit = ("z", 2) if places[name].startswith("z") else ("resid_post", None)

        def changes(n: int, site: str = site, unit: int | None = unit) -> list[Changes]:
            def add(here: Tensor) -> Tensor:
                return here + number * vector  # noqa: B023

            return [([Write(site, 1, add, rows()[n].last, *([unit] if unit else []))], ())]

        values = worked_out(family, [()], changes, rows(), records())
        try:
            agree(found[f"e_{name}"], (), values, unpatched(family), most=False)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        said = found[f"e_{name}"].conventions[f"direction {name}"]
        assert said.endswith(f"norm {float(vector.norm()):.4g}"), (name, said)
    said = found["e_sides"].conventions["direction sides"]
    assert "from `high` to `low`" in said
    assert "from `9` to `10`" in found["e_sizes"].conventions["direction sizes"]


def test_mean_directions_distinguish_runs_of_one_block(folder: Path) -> None:
    """Sums of directions use the mean of each run."""
    at = "at resid_post layer 1 at last token\n"
    text = f"direction whole = mean_difference(p, p.other) {at}"
    text += f"direction one = mean(p) {at}direction other = mean(p.other) {at}"
    text += "direction same = 2 * (0.5 * one + 0.5 * other) - 2 * other\n"
    for name in ("whole", "same"):
        text += experiment(f"e_{name}", f"add 30 * {name} to resid_post layer 1 at last token")
    found = run_file(text, folder, "llama", "planned", blocks=BLOCKS + BLOCK)
    (one,), (other,) = (found[f"e_{name}"].measures for name in ("whole", "same"))
    np.testing.assert_allclose(one.patched, other.patched, atol=1e-4)
    assert np.abs(one.patched - one.base).max() > 0.1
    said = found["e_whole"].conventions["direction whole"]
    assert float(said.rsplit("norm ", 1)[1]) > 0.1


def test_probe_skips_rows_without_the_position(folder: Path) -> None:
    """The probe's labels are those of the remaining rows."""
    text = "direction d = probe(size, sized, penalty: 2) at resid_post layer 1 at item * token\n"
    text += experiment("e", "add 30 * d to resid_post layer 1 at last token")
    found = run_file(text, folder, "gpt2", "planned", blocks=BLOCKS + BLOCK)["e"]
    fitted: list[Tensor] = []
    for item in (1, 2, 3):
        pairs = zip(sized(), SIZED, strict=True)
        there = [(own, record) for own, record in pairs if len(record["lefts"]) >= item]
        x = torch.stack([plain("gpt2", own)["resid_post", 1][item, 0] for own, _ in there])
        fitted.append(ridge(x, [float(record["size"]) for _, record in there], 2))
        assert len(there) == (9, 6, 3)[item - 1]
        said = found.conventions[f"direction d[item {item}]"]
        assert said.startswith(
            "ridge probe, penalty 2, on " + ("9 rows", "6 of 9", "3 of 9")[item - 1]
        )

    def changes(n: int, item: str) -> list[Changes]:
        vector = 30 * fitted[int(item.split()[1]) - 1]
        return [([Write("resid_post", 1, lambda h: h + vector, rows()[n].last)], ())]

    cells = [(f"item {item}",) for item in (1, 2, 3)]
    values = worked_out("gpt2", cells, changes, rows(), records())
    agree(found, ("position",), values, unpatched("gpt2"), most=False)


def test_directions_of_splits_and_limits_use_the_rows_of_experiments(folder: Path) -> None:
    """Directions of a split or with a limit are fitted on the rows that experiments get."""
    asked = {
        "sized": "sized",
        "sized.train": "sized.train",
        "sized.test": "sized.test",
        "sized, limit: 4": "sized limit 4",
        "sized.test, limit: 2": "sized.test limit 2",
    }
    text = "param few = 4\n" + "".join(
        f"direction d{n} = mean({way}) at resid_post layer 1\n" for n, way in enumerate(asked)
    )
    text = text.replace("mean(sized, limit: 4)", "mean(sized, limit: few)")
    for n, block in enumerate(asked.values()):
        text += experiment(f"r{n}", "scale embed at last token by 2", block=block)
        text += experiment(f"e{n}", f"add 3 * d{n} to resid_post layer 1 at last token")
    found = run_file(text, folder, "gpt2", "planned", blocks=BLOCKS + BLOCK)
    x = matrix("gpt2", "resid_post", 1, "last token")
    picked: list[tuple[int, ...]] = []
    for n in range(len(asked)):
        ids = found[f"r{n}"].row_ids
        assert ids is not None
        picked.append(ids)
        direction = x[list(ids)].mean(0)

        def changes(n: int, direction: Tensor = direction) -> list[Changes]:
            return [([Write("resid_post", 1, lambda h: h + 3 * direction, rows()[n].last)], ())]

        values = worked_out("gpt2", [()], changes, rows(), records())
        agree(found[f"e{n}"], (), values, unpatched("gpt2"), most=False)
    assert [len(each) for each in picked] == [9, len(picked[1]), 9 - len(picked[1]), 4, 2]
    assert sorted(picked[1] + picked[2]) == list(range(9))


FAMILY = "direction d = mean_difference(p.other, second) at resid_post layer * at token -2..-1\n"


def member(name: str, layer: int, token: int) -> Tensor:
    def mean(run: str) -> Tensor:
        found = [plain(name, t)["resid_post", layer][token, 0] for t in rows(run)]
        return torch.stack(found).mean(0)

    return mean("other") - mean("second")


@pytest.mark.parametrize("mode", QUICK)
def test_best_direction_is_selected_by_the_first_measure(mode: str, folder: Path) -> None:
    """By its mean over the rows of the selecting experiment, not those of the using one."""
    first = "measure logit(wrong) - logit(answer) as delta"
    second = "measure logit(answer) - logit(wrong) as raw"
    text = FAMILY
    for way, measures in (("a", (first, second)), ("b", (second, first))):
        text += experiment(
            f"select_{way}", "add 3 * d to resid_post layer 2 at last token",
            block="second", measure="\n  ".join(measures),
        )  # fmt: skip
        text += experiment(
            f"use_{way}", f"add 3 * d[best of select_{way}] to resid_post layer 2 at last token"
        )
    found = run_file(text, folder, "llama", mode)

    def adding(run: str):
        def changes(n: int, layer: int, token: str) -> list[Changes]:
            vector = 3 * member("llama", layer, int(token))
            return [([Write("resid_post", 2, lambda h: h + vector, rows(run)[n].last)], ())]

        return changes

    cells = product(range(3), ("-2", "-1"))
    selecting = worked_out("llama", cells, adding("second"), rows("second"), records("second"))
    means = {cell: float(np.mean(values)) for cell, values in selecting.items()}
    best = {"a": min(means, key=means.__getitem__), "b": max(means, key=means.__getitem__)}
    assert best["a"] != best["b"]
    everywhere = worked_out("llama", cells, adding("clean"), rows(), records())
    for way, cell in best.items():
        values = {(): everywhere[cell]}
        agree(found[f"use_{way}"], (), values, unpatched("llama"), most=False)
        words = found[f"use_{way}"].conventions[f"d[best of select_{way}]"]
        assert words.startswith(f"d[layer {cell[0]}, token {cell[1]}]")


@pytest.mark.parametrize("mode", QUICK)
def test_random_direction_control_has_equal_norms_and_the_reference_band(
    mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draw uses one direction in all cells, and the values equal those of hooks."""
    drawn: dict[str, Tensor] = {}
    draw = directions._draw_like  # pyright: ignore[reportPrivateUsage]

    def noted(like: Tensor, name: str, seed: int, *, shuffles: bool) -> Tensor:
        drawn[name] = draw(like, name, seed, shuffles=shuffles)
        return drawn[name]

    monkeypatch.setattr(directions, "_draw_like", noted)
    text = FAMILY + experiment(
        "e",
        "for c in [1, -2] { add c * d[layer 1, token -1] to resid_post layer 1 at last token }",
        "project out d[layer 0, token -1] from resid_post layer 0 at tokens *",
        "against random(3, directions)",
    )
    found = run_file(text, folder, "llama", mode)["e"]
    own = {layer: member("llama", layer, -1) for layer in (0, 1)}
    names = {layer: [f"d[layer {layer}, token -1] {n}" for n in range(3)] for layer in own}
    assert sorted(drawn) == sorted(names[0] + names[1])
    for layer, length in ((layer, own[layer].norm()) for layer in own):
        vectors = torch.stack([drawn[name] for name in names[layer]])
        assert torch.allclose(vectors.norm(dim=1), length.expand(3), rtol=1e-6)
        cosines = torch.corrcoef(torch.cat([vectors, own[layer][None]]))
        assert (cosines - torch.eye(4)).abs().max() < 0.9
    cells = product((1, -2), range(3))

    def changes(n: int, c: int, draw: int) -> list[Changes]:
        out = drawn[names[0][draw]] / own[0].norm()
        added = c * drawn[names[1][draw]]

        def less(here: Tensor) -> Tensor:
            return here - (here @ out)[:, None] * out

        text = rows()[n]
        away = [Write("resid_post", 0, less, at) for at in tokens(text, "tokens *")]
        return [([*away, Write("resid_post", 1, lambda h: h + added, text.last)], ())]

    expected = worked_out("llama", cells, changes, rows(), records())
    base = unpatched("llama")
    band = found.control(0)
    assert band is not None
    for cell, c in enumerate((1, -2)):
        values = np.array([np.mean(np.array(expected[c, n]) - base) for n in range(3)])
        said = band.low[cell], band.mean[cell], band.high[cell]
        assert np.allclose(said, (values.min(), values.mean(), values.max()), atol=2e-4)
        assert np.ptp(values) > 0.05


LISTS = """mech 1
model toy = zoo("counting")
model twin = zoo("counting")
prompts fruit {
  count in 2..4
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
}
direction d = WAY
experiment e {
  model toy
  prompts fruit limit 12
  add d to resid_post layer * at last token
  measure logit(answer) as delta
}
"""


def checked(way: str) -> CheckedFile:
    return check_source(Source(LISTS.replace("WAY", way)))


def test_direction_limit_selects_the_rows_of_the_same_experiment_limit() -> None:
    """The rows are those of `limit 12` in the experiment; `explain` reports their number."""
    found = checked("mean_difference(fruit, fruit.fewer, limit: 12) at resid_post layer *")
    own = found.experiments[0]
    assert len(own.table) == 12
    direction = own.rules[0].direction
    assert direction is not None
    for member in direction.members.values():
        assert isinstance(member.vector, FittedVector)
        for sample, run in zip(member.vector.samples, ("clean", "fewer"), strict=True):
            rows_ = own.table.runs[run].rows
            assert [row.text for row in sample.run.rows] == [row.text for row in rows_]
    printed = StringIO()
    print_prompts(found, Console(file=printed, width=200))
    made = "mean over 12 rows of fruit − mean over 12 rows of fruit (fewer), at L2.resid_post"
    assert f"direction d[layer 2]: {made}, last token" in printed.getvalue()
    said = prompts_document(found)["experiments"][0]["rules"][0]["directions"]
    assert said[2] == {"name": "d[layer 2]", "made": f"{made}, last token"}
    without = checked("mean(fruit) at resid_post layer 1").experiments[0].rules[0].direction
    assert without is not None
    assert "mean over 3 rows of fruit" in without.members[()].made


@pytest.mark.parametrize(
    "way",
    [
        "mean(fruit, limit: 0) at resid_post layer 1",
        "mean(fruit, limit: few) at resid_post layer 1",
        "mean(fruit, limit: 2.5) at resid_post layer 1",
        "mean_difference(toy, twin, limit: 8) at resid_post layer 1",
        'unembedding(" 3", limit: 8)',
    ],
)
def test_invalid_direction_limit_is_an_error(way: str) -> None:
    assert [each.code for each in checked(way).diagnostics if each.severity == "error"] == ["E0207"]
