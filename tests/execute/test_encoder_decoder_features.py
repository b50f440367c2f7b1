"""Circuits of encoder-decoders with features as nodes, against plain hooks for one unpadded prompt
in which every named feature reads and sends separately."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.diagnostics.rendering import render_full

from ..rules import test_dictionaries as dictionaries
from ..rules import test_transcoders as transcoders
from .encoder_decoder_circuits import EMBED, ENCODED, LOGITS, Edge, Features, list_edges
from .encoder_decoders import model, tokenizer
from .support import DIFFERENCE, ROWS, experiment, token, try_file
from .test_encoder_decoder_circuits import (
    SCORES,
    WITH_FEATURES,
    expected,
    fitted,
    inputs,
    opened,
    path_scores,
    ran,
)

slow = pytest.mark.slow
NUMBERS = (3, 5, 7)


def feature(number: int) -> tuple[str, int, int]:
    return "feature", 1, number


def write(family: str, folder: Path) -> str:
    """Write a dictionary, for mT5 a transcoder; returns the line of the file."""
    if family == "mt5 features":
        read = transcoders.make(folder, "skip_transcoder", 16)
        own = Features(NUMBERS, read.encode, read.weights["W_dec"], of_inputs=True)
        WITH_FEATURES[family] = {("mlp_out", 1): own}
        return 'basis f = transcoder("of_mlp") at mlp_out layer 1\n'
    made = dictionaries.make(folder, "standard", 16)
    WITH_FEATURES[family] = {("mlp_out", 1): Features(NUMBERS, made.encode, made.w_dec)}
    return 'basis f = sae("sae") at mlp_out layer 1\n'


SOME: dict[str, list[Edge]] = {
    "embed -> features 3, 5 of f": [(EMBED, feature(3)), (EMBED, feature(5))],
    "z cross layer 1 head 0 -> feature 5 of f": [(("z cross", 1, 0), feature(5))],
    "feature 5 of f -> q cross layer 2 head 1": [(feature(5), ("q cross", 2, 1))],
    "feature 3 of f -> L2.mlp": [(feature(3), ("mlp_norm", 2, 0))],
    "feature 7 of f -> logits": [(feature(7), LOGITS)],
    "L0.mlp -> L1.mlp": [(("mlp_out", 0, 0), ("mlp_norm", 1, 0))],
    "L1.mlp -> logits": [(("mlp_out", 1, 0), LOGITS)],
    "embed encoder -> mlp_norm encoder layer 1": [(ENCODED, ("mlp_norm encoder", 1, 0))],
    "mlp_out encoder layer 1 -> v cross layer 1 head 0": [
        (("mlp_out encoder", 1, 0), ("v cross", 1, 0))
    ],
}
CIRCUIT = f"circuit c = {', '.join(SOME)}\n"
CASES = [
    ("c", "zero", "tokens *"),
    ("all but c", "zero", "tokens *"),
    ("all but c", "turned", "tokens *"),
    ("c", "mean", "last token"),
    ("all but c", "other", "subject token"),
]


@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize("family", ["t5 features", "mt5 features"])
def test_circuit_of_features_equals_hooks(family: str, mode: str, tmp_path: Path) -> None:
    lines = (
        write(family, tmp_path)
        + CIRCUIT
        + "".join(
            experiment(f"e{n}", "prompts p", f"ablate {rule} at {at} with {fill}", DIFFERENCE)
            for n, (rule, fill, at) in enumerate(CASES)
        )
    )
    found = ran(family, lines, tmp_path, mode)
    every = set(list_edges(opened(family)))
    named = {edge for own in SOME.values() for edge in own}
    assert named < every
    base = expected(family, (), "zero", "tokens *")
    for n, (rule, fill, at) in enumerate(CASES):
        ablated = named if rule == "c" else every - named
        values = found[f"e{n}"].measures[0].patched[0]
        own = expected(family, ablated, fill, at)
        np.testing.assert_allclose(values, own, atol=1e-4, err_msg=str(CASES[n]))
        assert np.abs(own - base).max() > 1e-3 or at == "subject token", CASES[n]
    assert "3 features of f" in found["e0"].conventions["features of circuits"]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("t5 features", "eap"),
        pytest.param("mt5 features", "eap of zero", marks=slow),
        pytest.param("t5 features", "inputs", marks=slow),
        pytest.param("mt5 features", "activations", marks=slow),
    ],
)
def test_scores_of_edges_of_features_equal_derivatives(
    family: str, name: str, tmp_path: Path
) -> None:
    group = write(family, tmp_path) + "group g = features 3, 5, 7 of f"
    maker, source, fill, at, path, steps = SCORES[name]
    found = fitted(family, f"{maker}, nodes: g", source, f"at {at}", tmp_path, group)
    every = [path_scores(family, n, fill, at, path, steps) for n in range(len(ROWS))]
    assert {*found} == {*every[0]}
    values = np.array([*found.values()])
    others = np.array([sum(each[edge] for each in every) / len(every) for edge in found])
    np.testing.assert_allclose(values, others, atol=1e-4, rtol=5e-5)
    assert np.ptp(others) > 1e-3


@pytest.mark.parametrize("family", ["bart", "t5gemma"])
def test_features_of_an_mlp_that_is_no_module_are_an_error(family: str, tmp_path: Path) -> None:
    rule = "ablate c at tokens * with zero"
    lines = write("t5 features", tmp_path) + "circuit c = embed -> feature 3 of f\n"
    lines += experiment("e", "prompts p", rule, DIFFERENCE)
    result, problems = try_file(lines, tmp_path, model(family), tokenizer=tokenizer())
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    assert problem.code == "E0108"
    assert "the MLP isn't one module" in render_full([problem], color=False, width=200)


@pytest.mark.parametrize("family", ["t5", "bart", "t5gemma"])
def test_all_nodes_of_the_attention_of_a_decoder_equal_its_heads(
    family: str, tmp_path: Path
) -> None:
    """Also if norms follow sums (BART), or the output of attention (T5Gemma)."""
    ends = ("q cross layer 1 head 0", "q cross layer 2 head 1", "L2H0.k", "L1.mlp", "logits")
    width = model(family).config.d_model if family != "t5gemma" else 0
    width = width or model(family).config.decoder.hidden_size
    dictionaries.make(tmp_path, "standard", width)
    lines = 'basis a = sae("sae") at attn_out layer 1\n'
    for name, nodes in (("w", ("layer 1 heads *",)), ("c", ("features * of a", "L1.attn"))):
        lines += f"circuit {name} = {', '.join(f'{of} -> {to}' for of in nodes for to in ends)}\n"
        rule = f"ablate {name} at tokens * with turned"
        lines += experiment(f"e{name}", "prompts p", rule, DIFFERENCE)
    found = ran(family, lines, tmp_path, "planned")
    parts, whole = (found[key].measures[0] for key in ("ec", "ew"))
    np.testing.assert_allclose(parts.patched, whole.patched, atol=1e-4)
    assert np.abs(parts.patched - parts.base).max() > 1e-3


@pytest.mark.parametrize(
    ("family", "block"), [("t5", "encoder.block.1"), ("bart", "model.encoder.layers.1")]
)
def test_dictionary_in_an_encoder_equals_hooks(family: str, block: str, tmp_path: Path) -> None:
    """Regression: a file of a dictionary was E0342 there, although `fit(sae(…))` trains one."""
    own = dictionaries.make(tmp_path, "standard", 16)
    config = tmp_path / "sae" / "cfg.json"
    text_ = config.read_text(encoding="utf-8").replace("blocks.", "encoder.")
    config.write_text(text_, encoding="utf-8")
    lines = 'basis f = sae("sae") at resid_post encoder layer 1\n' + experiment(
        "e", "prompts p", "ablate features 3, 5 of f at last token with zero", DIFFERENCE
    )
    found = ran(family, lines, tmp_path)["e"]
    module = copy.deepcopy(model(family)).double()

    def without(_: Any, args: Any, output: Any) -> Any:
        whole = (output[0] if isinstance(output, tuple) else output).clone()
        active = own.encode(whole[0, -2])[[3, 5]]  # a token after the text ends it
        whole[0, -2] -= active @ own.w_dec[[3, 5]]
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    module.get_submodule(block).register_forward_hook(without)
    expected_ = []
    for record in ROWS:
        with torch.no_grad():
            logits = module(**inputs(family, record)).logits[0, -1]
        expected_.append(float(logits[token(record["a"])] - logits[token(record["b"])]))
    measure = found.measures[0]
    assert np.abs(measure.patched[0] - expected_).max() < 1e-4
    assert np.abs(measure.patched[0] - measure.base[0]).max() > 1e-3
