"""Groups of features, listed or read from graphs, against hooks on the bare model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mechdsl
from mechdsl.base import limits
from mechdsl.show.reports import graph as graph_report

from ..execute.support import ROWS, ids_of
from .models import double
from .support import experiment, rows, run_file, try_file
from .test_attribution_graphs import BLOCKS, EVERY, T0, T2, transcoders
from .test_circuit_files import SMALL

LISTED = "group g = features 1, 3 of t0, feature 2 of t2, feature 5 of t0\n"
CHOSEN = {0: [1, 3, 5], 2: [2]}
ZERO = "ablate g at tokens * with zero"


def changed_logits(
    family: str,
    ids: Sequence[int],
    own: Mapping[int, Any],
    change: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """[vocab] logits of the bare model in which the features of each MLP's input are changed.

    Args:
        own: The transcoders by layer, as formulas.
        change: Returns the features [token, feature] for a layer and the current ones.
    """
    model = copy.deepcopy(double(family))
    blocks = model.get_submodule(BLOCKS.get(family, "model.layers"))
    for layer, each in own.items():
        inputs: list[Tensor] = []

        def write(
            _: nn.Module, given: Any, output: Tensor, layer: int = layer, each: Any = each,
            inputs: list[Tensor] = inputs,
        ) -> Tensor:  # fmt: skip
            codes = each.encode(inputs[-1])
            return output + ((change(layer, codes) - codes) @ each.weights["W_dec"])[None]

        block = blocks[layer]
        block.mlp.register_forward_pre_hook(
            lambda _, given, inputs=inputs: inputs.append(given[0][0])
        )
        getattr(block, "post_feedforward_layernorm", block.mlp).register_forward_hook(write)
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0, -1]


def without(chosen: Mapping[int, list[int]]) -> Callable[[int, Tensor], Tensor]:
    def change(layer: int, codes: Tensor) -> Tensor:
        codes = codes.clone()
        codes[:, chosen.get(layer, [])] = 0
        return codes

    return change


def expected_differences(
    family: str, own: Mapping[int, Any], chosen: Mapping[int, list[int]]
) -> list[float]:
    """logit(answer) - logit(wrong) of each row without the features."""
    found: list[float] = []
    for text, record in zip(rows("clean"), ROWS, strict=True):
        logits = changed_logits(family, text.ids, own, without(chosen))
        good, bad = (ids_of([record[name]])[-1] for name in ("a", "b"))
        found.append(float(logits[good] - logits[bad]))
    return found


def write_graph(
    folder: Path, features: Sequence[str], supernodes: Sequence[Sequence[str]] = (), **other: Any
) -> None:
    """Write a graph with a token, some features at token 3, and a logit."""
    nodes = [
        {"node_id": "E_7_0", "feature_type": "embedding", "layer": "E", "ctx_idx": 0},
        {"node_id": "4_9_5", "feature_type": "logit", "layer": "4", "ctx_idx": 5},
        {"node_id": "0_2_3", "feature_type": "mlp reconstruction error", "layer": "2",
         "ctx_idx": 3},
    ]  # fmt: skip
    nodes += [
        {
            "node_id": name,
            "feature_type": "cross layer transcoder",
            "layer": name.split("_")[0],
            "ctx_idx": int(name.split("_")[2]),
        }
        for name in features
    ]
    links = [{"source": "E_7_0", "target": name, "weight": 0.5} for name in features]
    content = {"metadata": {}, "qParams": {"supernodes": supernodes}, "nodes": nodes}
    text = json.dumps({**content, "links": links, **other})
    (folder / "graph.json").write_text(text, encoding="utf-8")


FEATURES = ("0_1_3", "0_3_3", "0_5_3", "2_2_3", "0_1_2", "0_11_3")
SUPERNODES = [["capital", "0_1_3", "0_3_3", "0_5_3", "2_2_3", "0_1_2", "E_7_0"], ["other", "2_2_3"]]


@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "transcoder"), ("gpt2", "jumprelu_transcoder"), ("gemma2", "sparsify")],
)
def test_features_of_a_group_are_ablated_together(
    family: str, kind: str, mode: str, data: Path
) -> None:
    """Listed, and read from the supernode of a graph, in two experiments of a file."""
    _, own = transcoders(family, kind, data, [0, 2])
    write_graph(data, FEATURES, SUPERNODES)
    text = T0 + T2 + LISTED + 'group h = saved("graph.json", "capital", t0, t2)\n'
    text += experiment("listed", ZERO) + experiment("read", ZERO.replace("g", "h"))
    found = run_file(text, data, family, mode)
    expected = expected_differences(family, own, CHOSEN)
    for name in ("listed", "read"):
        np.testing.assert_allclose(found[name].measures[0].patched[0], expected, atol=1e-4)
    plain = expected_differences(family, own, {})
    assert np.abs(np.array(plain) - expected).max() > 0.05
    assert [cell.site for cell in found["listed"].cells] == ["L0.mlp_out g + L2.mlp_out g"]
    made = found["read"].conventions["group h"]
    assert made.startswith(
        "4 features of supernode `capital` of graph.json, without 1 other node, SHA-256 "
    )
    assert "group g" not in found["listed"].conventions


NEIGHBOURS = {
    "patched": ("from other into clean", "patch {} at last token"),
    "scaled": ("scale {} at cue token by 2",),
    "clamped": ("clamp {} at last token to 1.5", "ablate z layer 1 head 0 at tokens * with zero"),
    "derived": ("run cut {{ ablate {} at tokens * with zero }}", "from cut into clean",
                "patch resid_post layer 2 at cue token"),
    "generated": ("generate 3", "ablate {} at tokens * with zero during each step"),
    "without error": ("clamp {} at last token to 0.5 without error",),
}  # fmt: skip


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_rule_with_a_group_equals_a_rule_for_each_basis(name: str, data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])

    def ran(written: Sequence[str], before: str) -> dict[str, Any]:
        lines = []
        for line in NEIGHBOURS[name]:
            outer, brace, inner = line.partition("{{ ")
            rules = [(inner or line).replace(" }}", "").format(each) for each in written]
            found = " ".join(rules) if brace else "\n  ".join(rules if "{}" in line else [line])
            lines.append(f"{outer}{{ {found} }}" if brace else found)
        return run_file(T0 + T2 + before + experiment("e", *lines), data, "llama", "planned")

    grouped = ran(["g"], LISTED)["e"].measures[0].patched
    separate = ran(["features 1, 3, 5 of t0", "feature 2 of t2"], "")["e"].measures[0].patched
    np.testing.assert_array_equal(grouped, separate)


def test_ranked_features_in_a_group_are_those_of_the_observation(data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    seen = experiment("seen", "observe features of t0 at tokens * top 6", measure="", stats="")
    picked = "group g = features top 2 of seen of t0, feature 2 of t2\n"
    found = run_file(T0 + T2 + picked + seen + experiment("e", ZERO), data, "llama", "planned")
    best = [int(cell.coords["feature"]) for cell in found["seen"].cells[:2]]
    listed = f"group g = features {best[0]}, {best[1]} of t0, feature 2 of t2\n"
    other = run_file(T0 + T2 + listed + experiment("e", ZERO), data, "llama", "planned")
    np.testing.assert_allclose(
        found["e"].measures[0].patched, other["e"].measures[0].patched, atol=1e-6
    )


def test_saved_graph_report_is_read_back_as_a_group(data: Path) -> None:
    """The round trip of `report graph`, with the supernodes that a viewer adds."""
    _, own = transcoders("llama", "transcoder", data, [0, 2])
    text = T0 + T2 + experiment("e", EVERY, "report graph", measure="")
    found = run_file(text, data, "llama", "planned")["e"]
    report = next(each for each in found.reports if each.kind == "graph")
    graph_report.save(found, report, data / "graph.json")
    assert found.circuit is not None
    assert found.circuit.graph is not None
    nodes = [node for node in found.circuit.graph.nodes if node.kind == "feature"]
    chosen = {at: sorted({node.number for node in nodes if node.layer == at}) for at in (0, 2)}
    read = 'group g = saved("graph.json", t0, t2)\n' + experiment("e", ZERO)
    again = run_file(T0 + T2 + read, data, "llama", "planned")["e"]
    expected = expected_differences("llama", own, chosen)
    np.testing.assert_allclose(again.measures[0].patched[0], expected, atol=1e-4)
    count = sum(map(len, chosen.values()))
    assert again.conventions["group g"].startswith(f"{count} features of graph.json, SHA-256 ")


def test_group_of_a_basis_family_has_the_layer_of_each_feature(data: Path) -> None:
    """The features of one file at two layers of a basis, whose sites have the layers."""
    basis = "basis b = random(dims: 12) at mlp_out layer *\n"
    write_graph(data, FEATURES)
    groups = 'group g = saved("graph.json", b)\n'
    groups += (
        "group h = mlp_out layer 0 features 1, 3, 5, 11 of b, mlp_out layer 2 feature 2 of b\n"
    )
    text = basis + groups + experiment("e", ZERO) + experiment("f", ZERO.replace("g", "h"))
    found = run_file(text, data, "llama", "planned")
    read, listed = (found[name].measures[0].patched for name in "ef")
    np.testing.assert_array_equal(read, listed)
    assert [cell.site for cell in found["e"].cells] == ["L0.mlp_out g + L2.mlp_out g"]


def test_stored_run_depends_on_the_content_of_the_graph(tmp_path: Path) -> None:
    """The key depends on all nodes, even if the chosen features are the same."""
    path = tmp_path / "e.mech"
    basis = "basis b = random(dims: 3) at mlp_out layer *\n"
    group = 'group g = saved("graph.json", "a", b)\n'
    text = SMALL.replace('circuit c = saved("c.json", size: 2)\n', basis + group)
    path.write_text(text.replace("ablate all but c", "ablate g"), "utf-8")
    runs: list[tuple[bool, float]] = []
    for features, chosen in (((0, 1), 0), ((0, 1), 0), ((0, 2), 0), ((0, 2), 2)):
        names = [f"0_{number}_3" for number in features]
        write_graph(tmp_path, names, [["a", f"0_{chosen}_3"]])
        found = mechdsl.run(path, store=tmp_path / "store")
        (result,) = found.files[0].experiments
        value = float(result.measures[0].patched.mean())
        runs.append(("unchanged" in str(found.notes), value))
    assert [each[0] for each in runs] == [False, True, False, False]
    assert runs[0][1] == runs[1][1] == runs[2][1] != runs[3][1]


def test_group_from_a_changed_graph_has_other_values(data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    text = 'group g = saved("graph.json", t0, t2)\n' + experiment("e", ZERO)
    write_graph(data, FEATURES[:2])
    first = run_file(T0 + T2 + text, data, "llama", "planned")["e"]
    write_graph(data, FEATURES[2:4])
    other = run_file(T0 + T2 + text, data, "llama", "planned")["e"]
    change = first.measures[0].patched - other.measures[0].patched
    assert np.abs(change).max() > 1e-3


WRONG_CALLS = {
    'saved("none.json", t0)': ("E0342", "`none.json` can't be read: no such file or directory"),
    'saved("graph.pt", t0)': ("E0342", "`graph.pt` is a pickle, which may run code"),
    'saved("graph.json", "capitl", t0, t2)': ("E0342", "has no supernode `capitl`"),
    'saved("graph.json", "capital", t0)': ("E0342", "features of layer 2, and no basis is of this"),
    'saved("graph.json", t0, t0, t2)': ("E0342", "layer 0, and `t0`, `t0` are of this layer"),
    'saved("graph.json", t9)': ("E0201", "there is no basis called `t9`"),
    'saved("graph.json")': ("E0207", "takes the path of a graph"),
    'saved("graph.json", t0, t2, size: 3)': ("E0207", "`size` is not an argument of `saved`"),
    'saved("graph.json", t0, t2) at resid_post layer 1': ("E0342", "have the sites of their trans"),
    "sae(3)": ("E0342", "`sae(3)` doesn't choose sites"),
    "features 1, 900 of t0, feature 1 of t2": ("E0301", "feature 900 does not exist in `t0`"),
    "features 1 of t0, L0H1": ("E0207", "`g` has features of bases and other sites"),
}


@pytest.mark.parametrize("written", WRONG_CALLS)
def test_group_that_can_not_be_read_is_an_error(written: str, data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    write_graph(data, FEATURES, SUPERNODES)
    code, reason = WRONG_CALLS[written]
    text = T0 + T2 + f"group g = {written}\n" + experiment("e", ZERO)
    _, found = try_file(text, data, "llama")
    errors = [each for each in found if each.severity == "error"]
    assert [each.code for each in errors] == [code]
    assert reason in errors[0].message


def test_group_of_features_in_another_statement_is_an_error(data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    text = T0 + T2 + LISTED + experiment("e", "observe norm g at last token", measure="")
    _, found = try_file(text, data, "llama")
    errors = [each for each in found if each.severity == "error"]
    assert [each.code for each in errors] == ["E0207"]
    assert "is a group of features, which this statement doesn't take" in errors[0].message


def node(name: str, **other: Any) -> dict[str, Any]:
    kind = {"feature_type": "cross layer transcoder", "layer": name[0], "ctx_idx": 3}
    return {"node_id": name, **kind, **other}


def link(source: str, target: str, weight: Any = 0.5) -> dict[str, Any]:
    return {"source": source, "target": target, "weight": weight}


TWO = [node("0_1_3"), node("2_2_3")]
HOSTILE: dict[str, tuple[Any, str]] = {
    "no object": ([1], "is not a JSON object"),
    "no nodes": ({"links": []}, "has no list `nodes`"),
    "no links": ({"nodes": []}, "has no list `links`"),
    "a node of another type": ({"nodes": [3], "links": []}, "a node without the texts `node_id`"),
    "no token": ({"nodes": [node("0_1_3", ctx_idx="3")], "links": []}, "`ctx_idx` isn't the"),
    "a layer that is no number": ({"nodes": [node("0_1_3", layer="x")], "links": []}, "`layer`"),
    "another name": ({"nodes": [node("0_1")], "links": []}, "name isn't `LAYER_FEATURE_TOKEN`"),
    "another layer": ({"nodes": [node("0_1_3", layer="1")], "links": []}, "name isn't `LAYER_FEAT"),
    "a node twice": ({"nodes": [*TWO, TWO[0]], "links": []}, "has two nodes `0_1_3`"),
    "a huge number": ({"nodes": [node(f"0_{'9' * 50}_3")], "links": []}, "name isn't `LAYER_"),
    "an unknown end": ({"nodes": TWO, "links": [link("0_1_3", "1_1_3")]}, "`target` isn't a node"),
    "NaN": (
        {"nodes": TWO, "links": [link("0_1_3", "2_2_3", float("nan"))]},
        "is not a JSON object",
    ),
    "a text as weight": ({"nodes": TWO, "links": [link("0_1_3", "2_2_3", "1")]}, "isn't a finite"),
    "a cycle": (
        {"nodes": TWO, "links": [link("0_1_3", "2_2_3"), link("2_2_3", "0_1_3")]},
        "a link from `2_2_3` to `0_1_3`, which doesn't lead from a layer to a later one",
    ),
    "a loop": ({"nodes": TWO, "links": [link("0_1_3", "0_1_3")]}, "doesn't lead from a layer"),
    "a supernode of numbers": (
        {"nodes": TWO, "links": [], "qParams": {"supernodes": [["a", 3]]}},
        "has `supernodes` that aren't lists of names",
    ),
    "a supernode of another node": (
        {"nodes": TWO, "links": [], "qParams": {"supernodes": [["a", "0_9_9"]]}},
        "has the supernode `a` with `0_9_9`, which isn't one of its nodes",
    ),
    "no features": ({"nodes": [], "links": []}, "has no features"),
    "an unknown layer": ({"nodes": [node("7_1_3")], "links": []}, "has features of layer 7"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_malformed_graph_is_an_error(name: str, data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    content, reason = HOSTILE[name]
    (data / "graph.json").write_text(json.dumps(content), encoding="utf-8")
    assert reason in problem(data)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"{", b"[" * 200_000, b'"\\ud800"'],
    ids=["bytes", "cut", "deep", "lone"],
)
def test_graph_that_is_not_a_json_object_is_an_error(content: bytes, data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    (data / "graph.json").write_bytes(content)
    assert problem(data) == "invalid group: `graph.json` is not a JSON object"


def test_graph_file_above_the_size_limit_is_an_error(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    write_graph(data, FEATURES)
    monkeypatch.setattr(limits, "GRAPH_FILE", 100)
    assert "bytes, more than 100" in problem(data)


def test_two_supernodes_of_one_name_are_an_error(data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    write_graph(data, FEATURES, [["a", "0_1_3"], ["a", "2_2_3"], ["b", "E_7_0"]])
    assert "has 2 supernodes `a`" in problem(data, '"a", ')
    assert "the supernode `b` of `graph.json` has no features" in problem(data, '"b", ')


def problem(data: Path, supernode: str = "") -> str:
    """The message of the only error."""
    text = f'group g = saved("graph.json", {supernode}t0, t2)\n' + experiment("e", ZERO)
    _, found = try_file(T0 + T2 + text, data, "llama")
    errors = [each for each in found if each.severity == "error"]
    assert [each.code for each in errors] == ["E0342"]
    return errors[0].message
