"""Factorizations, components, correlations and mixtures in derived runs, sweeps, completions.

Several experiments of one file use one training. The reference is plain hooks on the bare model in
float64, one unpadded prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import in_turn
from ..reference.forward import Run, Write, forward
from ..rules.models import double
from ..rules.support import difference, edited, plain, records, rows, tokens
from . import test_trained_components as components
from . import test_trained_correlations as correlations
from . import test_trained_factors as factors
from . import test_trained_mixtures as mixtures
from .test_trained_components import Encode, weights
from .test_trained_dictionaries import experiment, run, train, write

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("gpt2", "llama", "gpt_neox")
AT = "resid_post layer 1 at tokens *"
TOKENS = 3


@dataclass(frozen=True)
class Method:
    """A trainer, and the features of vectors [vector, feature], from the tensors of its file."""

    declared: str
    encode: Encode


METHODS = {
    "ica": Method(components.declare(at=AT), components.encode),
    "mixture": Method(mixtures.declare(at=AT), mixtures.encode),
    "cca": Method(correlations.declare(at=AT), components.encode),
    "sparse_cca": Method(correlations.declare(correlations.SPARSE, at=AT), components.encode),
    "semi_nmf": Method(factors.declare(at=AT), factors.encode),
}
DERIVED = (
    f"run changed {{ set {AT} to reconstruction of f }}",
    "from changed into clean",
    "patch layer 2 head * at last token",
)
SWEPT = ("for c in [0, 1, 3] { for i in 0..1 { add c to feature i of f at last token } }",)
REPLIES = (f"generate {TOKENS}", "add 2 to feature 1 of f at tokens *")
FILE = (
    experiment(*DERIVED, name="derived")
    + experiment(*SWEPT, name="swept")
    + experiment(*REPLIES, name="replies", measure="measure entropy at each step as raw")
)


@dataclass(frozen=True)
class Edits:
    """Edits of a site with a trained basis, as writes of hooks."""

    encode: Encode
    own: dict[str, Any]

    def at(self, where: Iterable[int], change: Callable[[Any], Tensor]) -> list[Write]:
        """Writes of a function of the vectors, [vector, width], at some tokens."""

        def act(x: Tensor) -> Tensor:
            return change(x.detach().numpy().reshape(1, -1)).reshape(x.shape)

        return [Write("resid_post", 1, act, token) for token in where]

    def reconstruct(self, x: Any) -> Tensor:
        return torch.from_numpy(self.encode(x, self.own) @ self.own["W_dec"] + self.own["b_dec"])

    def add(self, x: Any, amount: float, feature: int) -> Tensor:
        return torch.from_numpy(x + amount * self.own["W_dec"][feature])


def expect_derived(family: str, edits: Edits) -> list[list[float]]:
    """[head, row]"""
    found: list[list[float]] = []
    texts = rows("second")
    changed = [
        edited(family, each, edits.at(tokens(each, "tokens *"), edits.reconstruct))
        for each in texts
    ]
    for head in range(plain(family, texts[0])["z", 2].shape[1]):
        found.append([])
        for text, other, record in zip(texts, changed, records("second"), strict=True):
            (at,) = tokens(text, "last token")
            write = Write("z", 2, other["z", 2][at, head], at, head)
            found[-1].append(difference(edited(family, text, [write]).logits, record))
    return found


def expect_swept(family: str, edits: Edits) -> list[list[float]]:
    """[number and feature, row]"""
    found: list[list[float]] = []
    for amount in (0, 1, 3):
        for feature in range(2):
            found.append([])
            for text, record in zip(rows("second"), records("second"), strict=True):
                change = partial(edits.add, amount=amount, feature=feature)
                writes = edits.at(tokens(text, "last token"), change)
                found[-1].append(difference(edited(family, text, writes).logits, record))
    return found


def expect_replies(family: str, edits: Edits) -> list[list[float]]:
    """[step, row] entropies of the next token; generated tokens are edited, too."""
    found: list[list[float]] = [[] for _ in range(TOKENS)]
    for text in rows("second"):
        ids = [*text.ids]
        for step in range(TOKENS):
            writes = edits.at(range(len(ids)), partial(edits.add, amount=2, feature=1))
            after: Run = forward(family, double(family), ids, writes)
            chances = after.logits[-1].double().log_softmax(-1)
            found[step].append(float(-(chances.exp() * chances).sum()))
            ids.append(int(chances.argmax()))
    return found


@pytest.mark.parametrize(("method", "family"), in_turn([*METHODS], HERE))
def test_trained_bases_in_derived_runs_sweeps_and_completions_equal_hooks(
    method: str, family: str, tmp_path: Path
) -> None:
    path = write(tmp_path, METHODS[method].declared, FILE)
    (trained,) = train(path, family)
    edits = Edits(METHODS[method].encode, weights(trained))
    done = {each.name: each.measures[0].patched for each in run(path, family).files[0].experiments}
    expected = {
        "derived": expect_derived(family, edits),
        "swept": expect_swept(family, edits),
        "replies": expect_replies(family, edits),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(done[name], values, atol=2e-3, err_msg=name)
    assert np.ptp(done["derived"], axis=0).max() > 1e-3
