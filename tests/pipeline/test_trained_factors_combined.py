"""Random files with two trained factorizations, components, correlations or mixtures.

Their rules are combined in one experiment, in corrupted and derived runs and in completions, with
several experiments on one block. The reference is plain hooks on the bare model in float64, one
unpadded prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from ..reference.forward import Write, forward
from ..rules.models import double
from ..rules.support import Text, difference, edited, plain, records, rows, tokens
from .test_trained_components import Encode, weights
from .test_trained_dictionaries import experiment, run, train, write
from .test_trained_factors_in_runs import METHODS, TOKENS

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
FAMILIES = ("gpt2", "llama", "gpt_neox")
POSITIONS = ("last token", "left tokens", "right token")
EVERY = "tokens *"
RAW = "measure logit(answer) - logit(wrong) as raw"
FEATURES = 2
"""Number of features that rules name, which all bases have."""


@dataclass(frozen=True)
class Basis:
    """Trained tensors, and the function with which hooks encode."""

    encode: Encode
    own: dict[str, Any]

    def change(self, x: Tensor, values: Mapping[int, Callable[[float], float]]) -> Tensor:
        """Return a vector with new values of some features."""
        flat = x.detach().numpy().reshape(1, -1)
        old = self.encode(flat, self.own)[0]
        change = sum((new(old[n]) - old[n]) * self.own["W_dec"][n] for n, new in values.items())
        return torch.from_numpy(flat[0] + change).reshape(x.shape)

    def rebuild(self, x: Tensor) -> Tensor:
        flat = x.detach().numpy().reshape(1, -1)
        found = self.encode(flat, self.own) @ self.own["W_dec"] + self.own["b_dec"]
        return torch.from_numpy(found).reshape(x.shape)


@dataclass(frozen=True)
class Rule:
    verb: str
    basis: str
    feature: int
    at: str

    @property
    def text(self) -> str:
        site = f"feature {self.feature} of {self.basis} at {self.at}"
        return {
            "zero": f"ablate {site} with zero",
            "set": f"set {site} to 0.7",
            "scale": f"scale {site} by 0.4",
            "add": f"add 1.5 to {site}",
            "patch": f"patch {site}",
            "rebuild": f"set resid_post layer 1 at {self.at} to reconstruction of {self.basis}",
        }[self.verb]

    def act(self, bases: Mapping[str, Basis], other: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Return the rule's function of a vector; `other` is the source run's vector."""
        basis = bases[self.basis]
        if self.verb == "rebuild":
            return basis.rebuild
        new: Callable[[float], float] = {
            "zero": lambda _: 0.0,
            "set": lambda _: 0.7,
            "scale": lambda old: 0.4 * old,
            "add": lambda old: old + 1.5,
            "patch": lambda _: self._read(basis, other),
        }[self.verb]
        return lambda x: basis.change(x, {self.feature: new})

    def _read(self, basis: Basis, other: Tensor | None) -> float:
        assert other is not None
        return float(basis.encode(other.numpy().reshape(1, -1), basis.own)[0][self.feature])


@dataclass(frozen=True)
class Drawn:
    """An experiment of a random file."""

    kind: str
    rules: tuple[Rule, ...]
    """The rules; the derived run's rule is first, if there is one."""

    def text(self, name: str) -> str:
        lines = [rule.text for rule in self.rules]
        measure = RAW
        match self.kind:
            case "corrupted":
                lines = ["from turned into clean", *lines]
            case "derived":
                patch = "patch layer 2 heads * at last token"
                lines = [f"run changed {{ {lines[0]} }}", "from changed into clean", patch,
                         *lines[1:]]  # fmt: skip
            case "replies":
                lines = [f"generate {TOKENS}", *lines]
                measure = "measure entropy at each step as raw"
            case _:
                pass
        return experiment(*lines, name=name, measure=measure)

    def expected(self, family: str, bases: Mapping[str, Basis]) -> list[list[float]]:
        """[cell, row]"""
        texts = zip(rows("second"), rows("second.turned"), records("second"), strict=True)
        if self.kind == "replies":
            steps = [_entropies(family, text, self.rules, bases) for text, _, _ in texts]
            return [list(each) for each in zip(*steps, strict=True)]
        found: list[float] = []
        for text, turned, record in texts:
            measured = self.rules[1:] if self.kind == "derived" else self.rules
            source = plain(family, turned) if self.kind == "corrupted" else None
            writes = _writes(text, measured, bases, source)
            if self.kind == "derived":
                changed = edited(family, text, _writes(text, self.rules[:1], bases))["z", 2]
                (at,) = tokens(text, "last token")
                writes += [Write("z", 2, changed[at, h], at, h) for h in range(changed.shape[1])]
            found.append(difference(edited(family, text, writes).logits, record))
        return [found]


def _writes(
    text: Text, rules: tuple[Rule, ...], bases: Mapping[str, Basis], source: Any = None
) -> list[Write]:
    found: list[Write] = []
    for rule in rules:
        for at in tokens(text, rule.at):
            other = None if source is None else source["resid_post", 1][at].double()
            found.append(Write("resid_post", 1, rule.act(bases, other), at))
    return found


def _entropies(
    family: str, text: Text, rules: tuple[Rule, ...], bases: Mapping[str, Basis]
) -> list[float]:
    """Entropies of the next token; rules at all tokens also act on generated tokens."""
    ids, found = [*text.ids], list[float]()
    for _ in range(TOKENS):
        writes: list[Write] = []
        for rule in rules:
            where = range(len(ids)) if rule.at == EVERY else tokens(text, rule.at)
            writes += [Write("resid_post", 1, rule.act(bases, None), at) for at in where]
        after = forward(family, double(family), ids, writes)
        chances = after.logits[-1].double().log_softmax(-1)
        found.append(float(-(chances.exp() * chances).sum()))
        ids.append(int(chances.argmax()))
    return found


def draw(random: Random, kind: str) -> Drawn:
    """Draw rules at different tokens of one site."""
    verbs = ["zero", "set", "scale", "add", "rebuild"]
    where = random.sample(POSITIONS, 2)
    if kind == "replies":
        where = random.choice([[EVERY], ["left tokens", "right token"]])
    rules: list[Rule] = []
    for at in where:
        verb = random.choice(verbs if kind != "corrupted" or rules else ["patch"])
        rules.append(Rule(verb, random.choice("fh"), random.randrange(FEATURES), at))
    return Drawn(kind, tuple(rules))


@pytest.mark.slow
@pytest.mark.parametrize("seed", some(range(30), range(3)))
def test_random_files_with_two_trained_bases_equal_hooks(seed: int, tmp_path: Path) -> None:
    random, family = Random(seed), FAMILIES[seed % len(FAMILIES)]
    first, second = random.sample(list(METHODS), 2)
    kinds = ["plain", "corrupted", "derived", "replies", random.choice(["plain", "corrupted"])]
    drawn = {f"e{number}": draw(random, kind) for number, kind in enumerate(kinds)}
    # Each basis is used, so that `fit` trains it.
    uses = experiment("set resid_post layer 1 at last token to reconstruction of f", name="use_f")
    uses += experiment("set resid_post layer 1 at last token to reconstruction of h", name="use_h")
    declared = METHODS[first].declared, METHODS[second].declared.replace("basis f", "basis h")
    body = "".join(each.text(name) for name, each in drawn.items())
    path = write(tmp_path, *declared, body, uses)
    trained = {fit.basis: weights(fit) for fit in train(path, family)}
    bases = {
        "f": Basis(METHODS[first].encode, trained["f"]),
        "h": Basis(METHODS[second].encode, trained["h"]),
    }
    done = {each.name: each.measures[0].patched for each in run(path, family).files[0].experiments}
    for name, each in drawn.items():
        said = f"{name} of {first} and {second} on {family}: {each}"
        np.testing.assert_allclose(done[name], each.expected(family, bases), atol=1e-4,
                                   err_msg=said)  # fmt: skip
