"""Groups that `saved("mask.json")` reads: sites that a training chose.

Values are compared with plain passes over the bare model, one unpadded prompt at a time.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mechdsl

from ..execute.support import ROWS, ids_of
from .models import double
from .support import experiment, rows, run_file, try_file

HEADS: list[list[Any]] = [["z", layer, head] for layer in range(3) for head in range(4)]
SCORES = [0.1, -0.9, 0.2, None, 0.3, 0.4, 0.4, 0.05, -0.6, 0.0, 0.2, 0.1]
CHOSEN = [1, 5, 6, 8]
BEST = [1, 8, 5, 6]
"""The chosen heads by the sizes of their scores; the earlier of two equal ones first."""


def write_mask(folder: Path, **other: Any) -> None:
    """Write a group of four heads."""
    labels = [f"L{layer}H{head}.z" for _, layer, head in HEADS]
    content = {"sites": HEADS, "labels": labels, "scores": SCORES, "chosen": CHOSEN, **other}
    (folder / "mask.json").write_text(json.dumps(content), "utf-8")


OUTPUTS = {"llama": ("model.layers", "self_attn.o_proj"), "gpt2": ("transformer.h", "attn.c_proj")}


def without_heads(family: str, numbers: list[int]) -> nn.Module:
    """The bare model without some heads."""
    model = copy.deepcopy(double(family))
    path, name = OUTPUTS[family]
    for point in (HEADS[n] for n in numbers):

        def write(_: Any, given: Any, head: int = point[2]) -> Any:
            heads = given[0].clone().unflatten(-1, (4, -1))
            heads[..., head, :] = 0
            return heads.flatten(-2), *given[1:]

        model.get_submodule(f"{path}.{point[1]}.{name}").register_forward_pre_hook(write)
    return model


def differences(model: nn.Module) -> list[float]:
    """logit(answer) - logit(wrong) of each row, one unpadded prompt at a time."""
    found: list[float] = []
    for text, record in zip(rows("clean"), ROWS, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([list(text.ids)])).logits[0, -1]
        good, bad = (ids_of([record[key]])[-1] for key in ("a", "b"))
        found.append(float(logits[good] - logits[bad]))
    return found


SLOW = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")]
READ = 'group g = saved("mask.json")\n'
ZERO = "ablate {} at tokens * with zero"
TOP = "for n in 1..4 { ablate top n of g at tokens * with zero }"


@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "ranked"), [("llama", False), ("gpt2", True), ("gpt2", False), ("llama", True)]
)
def test_saved_group_has_the_sites_and_the_order_of_its_file(
    family: str, ranked: bool, mode: str, data: Path
) -> None:
    """A search writes its group in the order of addition, whatever the scores."""
    order = [5, 1, 8, 6] if ranked else BEST
    write_mask(data, **({"chosen": order, "ranked": True} if ranked else {}))
    text = READ + experiment("e", ZERO.format("g")) + experiment("top", TOP)
    found = run_file(text, data, family, mode)
    whole = differences(without_heads(family, CHOSEN))
    np.testing.assert_allclose(found["e"].measures[0].patched[0], whole, atol=1e-4)
    for count in range(1, 5):
        expected = differences(without_heads(family, order[:count]))
        np.testing.assert_allclose(found["top"].measures[0].patched[count - 1], expected, atol=1e-4)
    one, two = (differences(without_heads(family, order[:count])) for count in (3, 4))
    assert np.abs(np.subtract(one, two)).max() > 1e-3
    made = found["e"].conventions["group g"]
    listed = ", ".join(f"z layer {HEADS[n][1]} head {HEADS[n][2]}" for n in order)
    assert made.startswith(f"4 of 12 sites of mask.json: {listed}; SHA-256 ")
    assert made.endswith("may be measured here")
    assert found["top"].conventions["group g"] == made


NEIGHBOURS = {
    "patched": ("from other into clean", "patch {} at last token"),
    "all but": ("ablate layers * heads * except {} at tokens * with zero",),
    "loop": ("for site in [{}, k] {{ scale site at last token by 2 }}",),
    "derived": ("run cut {{ ablate {} at tokens * with zero }}", "from cut into clean",
                "patch resid_post layer 1 at last token"),
    "generated": ("generate 3", "ablate {} at tokens * with zero during each step"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_saved_group_equals_a_listed_group(name: str, data: Path) -> None:
    write_mask(data)
    heads = ", ".join(f"L{HEADS[n][1]}H{HEADS[n][2]}" for n in CHOSEN)
    text = f"{READ}group h = {heads}\ngroup k = L0H0\n"
    for own in "gh":
        text += experiment(f"with_{own}", *(line.format(own) for line in NEIGHBOURS[name]))
    found = run_file(text, data, "llama", "planned")
    read, listed = (found[f"with_{own}"].measures[0].patched for own in "gh")
    np.testing.assert_array_equal(read, listed)
    assert "group g" in found["with_g"].conventions
    assert "group g" not in found["with_h"].conventions


def test_saved_dimensions_are_changed_together(data: Path) -> None:
    dims = [["resid_post", 1, None, None, number] for number in range(12)]
    write_mask(data, sites=dims)
    model = copy.deepcopy(double("llama"))

    def write(_: Any, given: Any, output: Any) -> Any:
        vectors = (output[0] if isinstance(output, tuple) else output).clone()
        vectors[..., CHOSEN] = 0
        return (vectors, *output[1:]) if isinstance(output, tuple) else vectors

    model.get_submodule("model.layers.1").register_forward_hook(write)
    found = run_file(READ + experiment("e", ZERO.format("g")), data, "llama", "planned")
    expected = differences(model)
    np.testing.assert_allclose(found["e"].measures[0].patched[0], expected, atol=1e-4)
    made = found["e"].conventions["group g"]
    assert "4 of 12 dimensions of mask.json: resid_post layer 1 dim 1, " in made
    assert made.endswith("so they may be measured here")


EDGE = ["resid_pre", 0, None, "q", 0, 0]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"sites": [*HEADS[:-1], ["z", 11, 3]]}, "has `L11H3.z`, and the model"),
    "more heads": ({"sites": [*HEADS[:-1], ["z", 2, 7]]}, "has `L2H7.z`, and the model"),
    "edges": ({"sites": [EDGE] * 12}, "is a circuit of edges"),
    "positions": ({"sites": [[n] for n in range(12)]}, "without the text of `positions`"),
    "features": ({"sites": [["resid_post", 1, None, "f", n] for n in range(12)]}, "of `f`, and"),
    "unknown number": ({"chosen": [12]}, "has no group"),
    "negative number": ({"chosen": [-1]}, "`chosen.0` of"),
    "number twice": ({"chosen": [1, 1]}, "has no group"),
    "nothing chosen": ({"chosen": []}, "`chosen` of"),
    "chosen without score": ({"chosen": [3]}, "has no group"),
    "score missing": ({"scores": SCORES[:-1]}, "has no group"),
    "unknown site": ({"sites": [*HEADS[:-1], ["x", 2, 3]]}, "has `x`, and the model"),
    "name of another form": ({"sites": [*HEADS[:-1], ["z; x", 2, 3]]}, "has no group"),
    "site twice": ({"sites": [*HEADS[:-1], HEADS[0]]}, "has no group"),
    "text as layer": ({"sites": [*HEADS[:-1], ["z", "2", 3]]}, "has no group"),
    "no list": ({"sites": 3}, "`sites` of"),
    "no entries": ({"sites": [3]}, "`sites.0` of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_group_file_that_does_not_fit_is_an_error(name: str, data: Path) -> None:
    other, reason = WRONG[name]
    write_mask(data, **other)
    _, found = try_file(READ + experiment("e", ZERO.format("g")), data, "llama")
    errors = [each for each in found if each.severity == "error"]
    assert [each.code for each in errors] == ["E0342"]
    assert reason in errors[0].message


@pytest.mark.parametrize(
    "call", ['saved("no.json")', "fit(maks(size: 2), prompts: p) at layers * heads *"]
)
@pytest.mark.parametrize("use", ["g", "top 1 of g", "layer * head * except top 1 of g"])
def test_group_with_an_error_has_no_further_one_where_it_is_used(
    call: str, use: str, data: Path
) -> None:
    rule = f"ablate {use} at tokens * with zero"
    text = f"group g = {call}\n" + experiment("e", rule, "against random(3)")
    _, found = try_file(text, data, "llama")
    (error,) = (each for each in found if each.severity == "error")
    assert error.code == {"s": "E0342", "f": "E0203"}[call[0]]


def test_call_with_a_supernode_for_a_trained_group_is_an_error(data: Path) -> None:
    write_mask(data)
    text = 'group g = saved("mask.json", "capital")\n' + experiment("e", ZERO.format("g"))
    _, found = try_file(text, data, "llama")
    assert [each.code for each in found if each.severity == "error"] == ["E0342"]


TRAINED = """mech 1

model tiny = zoo("induction")

prompts repeats {
  word in words(tiny)
  half = list(word, 4, sep: " ", distinct: true)
  template "{half} {cue = half[1]}"
  answer " {half[2]}"
  split 50%
}

GROUP

experiment e {
  prompts repeats.test limit 6
  for n in 1..2 { ablate top n of g at tokens * with zero }
  measure logprob(answer) as raw
}
"""
LINE = (
    "group g = fit(CALL, prompts: repeats.train, limit: 8, with: zero, minimise: logprob(answer)) "
    "at layers * heads * at last token"
)


@pytest.mark.parametrize(
    "call",
    ["atp(size: 2)", "forward_selection(size: 2)", pytest.param("mask(size: 2)", marks=SLOW)],
)
def test_exported_group_has_the_values_of_the_trained_group(call: str, tmp_path: Path) -> None:
    path, store = tmp_path / "e.mech", tmp_path / "store"
    path.write_text(TRAINED.replace("GROUP", LINE.replace("CALL", call)), "utf-8")
    mechdsl.fit(path, store=store, out=tmp_path / "out")
    trained = mechdsl.run(path, store=store).files[0].experiments[0]
    path.write_text(TRAINED.replace("GROUP", 'group g = saved("out/g/mask.json")'), "utf-8")
    read = mechdsl.run(path, store=False).files[0].experiments[0]
    np.testing.assert_array_equal(read.measures[0].patched, trained.measures[0].patched)


def test_stored_run_depends_on_the_content_of_the_file(tmp_path: Path) -> None:
    path, store = tmp_path / "e.mech", tmp_path / "store"
    path.write_text(TRAINED.replace("GROUP", READ), "utf-8")
    runs: list[tuple[bool, float]] = []
    for scores, chosen in (
        ([1.0, 2.0], [0, 1]), ([1.0, 2.0], [0, 1]), ([2.0, 1.0], [0, 1]), ([1.0, 3.0], [0, 1])
    ):  # fmt: skip
        write_mask(
            tmp_path, sites=[["z", 0, 0], ["z", 1, 1]], labels=["", ""], scores=scores,
            chosen=chosen,
        )  # fmt: skip
        found = mechdsl.run(path, store=store)
        (result,) = found.files[0].experiments
        runs.append(("unchanged" in str(found.notes), float(result.measures[0].patched[0].mean())))
    assert [each[0] for each in runs] == [False, True, False, False]
    assert runs[0][1] == runs[1][1] == runs[3][1] != runs[2][1]
