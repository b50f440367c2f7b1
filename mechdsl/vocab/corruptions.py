"""What a `corrupt` block can do: one entry per kind of change, one per kind of noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mechdsl.base.registry import Registry
from mechdsl.syntax import ast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ChangingRow(Protocol):
    """A row that is being corrupted; each change sees what the ones before it did."""

    def assign(self, names: tuple[ast.Name, ...], value: ast.Expr) -> None:
        """Give these names a new value, drawn for this corruption."""
        ...

    def exchange(self, first: ast.Name, second: ast.Name) -> None:
        """Swap the values of two names."""
        ...

    def use_template(self, text: ast.String) -> None:
        """Write the row with another template."""
        ...


@dataclass(frozen=True)
class Change:
    """A kind of change. `apply` changes the row's values; kinds that work on tokens or on
    activations have none, since they need the tokenised prompt."""

    name: str
    usage: str
    meaning: str
    node: type[ast.Change]
    stage: Literal["values", "tokens", "activations"]
    apply: Callable[[ChangingRow, Any], None] | None = None


CHANGES: Registry[Change] = Registry("change")


def change_of(node: ast.Change) -> Change | None:
    """The registered kind of a change, None where this version has none."""
    return next((entry for _, entry in CHANGES.items() if isinstance(node, entry.node)), None)


def _change(entry: Change) -> Change:
    return CHANGES.add(entry.name, entry)


def _assign(row: ChangingRow, change: ast.Derived) -> None:
    row.assign(change.names, change.value)


def _exchange(row: ChangingRow, change: ast.SwapValues) -> None:
    row.exchange(change.first, change.second)


def _use_template(row: ChangingRow, change: ast.Template) -> None:
    row.use_template(change.text)


SET = _change(
    Change(
        name="set",
        usage="count = count - 1",
        meaning="a value is another one; what is derived from it follows",
        node=ast.Derived,
        stage="values",
        apply=_assign,
    )
)

SWAP = _change(
    Change(
        name="swap",
        usage="swap a, b",
        meaning="two values change places",
        node=ast.SwapValues,
        stage="values",
        apply=_exchange,
    )
)

TEMPLATE = _change(
    Change(
        name="template",
        usage='template "{counterfactual}"',
        meaning="the same values in another text",
        node=ast.Template,
        stage="values",
        apply=_use_template,
    )
)

REPLACE = _change(
    Change(
        name="replace",
        usage='replace item tokens with "thing"',
        meaning="the text of these tokens is another one",
        node=ast.ReplaceTokens,
        stage="tokens",
    )
)

ADD = _change(
    Change(
        name="add",
        usage="add gaussian(std: 3 sd) to embed at subject tokens",
        meaning="noise is added to an activation; the text stays",
        node=ast.AddNoise,
        stage="activations",
    )
)


@dataclass(frozen=True)
class NoiseKind:
    """A distribution of noise, scaled by `std`."""

    name: str
    usage: str
    meaning: str
    standard: Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]
    """Draws of this shape with mean 0 and standard deviation 1."""


NOISES: Registry[NoiseKind] = Registry("noise")

GAUSSIAN = NOISES.add(
    "gaussian",
    NoiseKind(
        name="gaussian",
        usage="gaussian(std: 3 sd, samples: 10)",
        meaning="independent normal noise on every dimension",
        standard=lambda generator, shape: generator.standard_normal(shape),
    ),
)
