"""`basis b = python("mp.py:MPSAE", features: 12)`: a custom encoder, against its formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import FileResult

from ..execute.support import by_name, run_on, shared
from ..reference.forward import Changes, Write
from .models import bare
from .support import BLOCKS, agree, experiment, plain, records, rows, tokens, unpatched, worked_out

FEATURES, LAYER = 9, 1
CODE = """
import torch

class Wavy:
    def __init__(self):
        self.w = torch.linspace(-1, 1, 9 * WIDTH).view(9, WIDTH).sin()

    def encode(self, vectors):
        return (vectors @ self.w.T).tanh()

    def decode(self, features):
        return features.pow(3) @ self.w

def make():
    return Wavy()

class Needs:
    def __init__(self, size):
        pass

class Wrong(Wavy):
    def decode(self, features):
        return features

class Broken(Wavy):
    def encode(self, vectors):
        raise RuntimeError("no weights")

number = 3
"""


def ran(text: str, folder: Path, python: str = "run") -> tuple[FileResult | None, list[Diagnostic]]:
    width = bare("llama").config.hidden_size
    (folder / "mp.py").write_text(CODE.replace("WIDTH", str(width)), encoding="utf-8")
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{text}'
    options = RunOptions(settings=CheckSettings(python=python))  # type: ignore[arg-type]
    source = Source(whole, folder / "file.mech")
    return run_on(source, {"m": shared(bare("llama"))}, options)


def basis(name: str = "Wavy", features: int = FEATURES) -> str:
    call = f'python("mp.py:{name}", features: {features})'
    return f"basis b = {call} at resid_post layer {LAYER}\n"


def wave() -> Tensor:
    width = bare("llama").config.hidden_size
    return torch.linspace(-1, 1, 9 * width).view(9, width).sin().double()


def encode(x: Tensor) -> Tensor:
    return (x @ wave().T).tanh()


def decode(features: Tensor) -> Tensor:
    return features.pow(3) @ wave()


@pytest.mark.parametrize("name", ["Wavy", "make"])
def test_rules_on_features_of_a_python_encoder_equal_the_reference(name: str, data: Path) -> None:
    lines = {
        "patched": "from other into clean  patch features 2, 5 of b at last token",
        "scaled": "for c in [0, 2] { scale feature 1..2 of b at tokens * by c }",
        "whole": f"set resid_post layer {LAYER} at last token to reconstruction of b",
    }
    text = basis(name) + "".join(experiment(key, line) for key, line in lines.items())
    found = by_name(*ran(text, data))

    def patched(n: int) -> list[Changes]:
        other = rows("other")[n]
        source = encode(plain("llama", other)["resid_post", LAYER][other.last, 0])

        def act(x: Tensor) -> Tensor:
            now = encode(x)
            new = now.clone()
            new[..., [2, 5]] = source[[2, 5]]
            return x + decode(new) - decode(now)

        return [([Write("resid_post", LAYER, act, rows()[n].last)], ())]

    def scaled(n: int, c: float, i: int) -> list[Changes]:
        def act(x: Tensor) -> Tensor:
            now = encode(x)
            new = now.clone()
            new[..., i] *= c
            return x + decode(new) - decode(now)

        at = tokens(rows()[n], "tokens *")
        return [([Write("resid_post", LAYER, act, position) for position in at], ())]

    def whole(n: int) -> list[Changes]:
        write = Write("resid_post", LAYER, lambda x: decode(encode(x)), rows()[n].last)
        return [([write], ())]

    pairs = [(c, i) for c in (0, 2) for i in (1, 2)]
    cases = (("patched", (), [()], patched), ("scaled", ("c", "feature"), pairs, scaled))
    for key, axes, cells, changes in (*cases, ("whole", (), [()], whole)):
        expected = worked_out("llama", cells, changes, rows(), records())
        agree(found[key], axes, expected, unpatched("llama"), most=False, large=0.01)


@pytest.mark.parametrize(
    ("name", "features", "codes", "message"),
    [
        ("Wavey", 9, ["E0222"], "defines no function `Wavey`"),
        ("Needs", 9, ["E0222"], "takes 1 argument, but is called with 0"),
        ("number", 9, ["E0222"], "defines no function `number`"),
        ("Wavy", 8, ["E0223"], "`encode` returned [3, 9]"),
        ("Wrong", 9, ["E0223"], "`decode` returned [3, 9]"),
        ("Broken", 9, ["E0223"], "`encode` raised RuntimeError: no weights"),
        ("Wavy", 0, ["E0342"], "`features` is a whole number"),
    ],
)
def test_invalid_python_encoders_are_errors(
    name: str, features: int, codes: list[str], message: str, data: Path
) -> None:
    text = basis(name, features) + experiment("e", "clamp feature 1 of b at last token to 1")
    result, problems = ran(text, data)
    errors = [each for each in problems if each.severity == "error"]
    assert result is None or not result.experiments
    assert [each.code for each in errors] == codes
    assert message in errors[0].message + errors[0].label_text


def test_python_encoder_without_permission_is_an_error(data: Path) -> None:
    text = basis() + experiment("e", "clamp feature 1 of b at last token to 1")
    _, problems = ran(text, data, "refuse")
    assert [each.code for each in problems if each.severity == "error"] == ["E0221"]
