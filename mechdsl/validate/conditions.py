"""What an expectation says, with its names bound: values, and conditions on them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from mechdsl.base.percent import Percent
from mechdsl.base.record import Record, record
from mechdsl.resolve.open_axes import COMPONENT

if TYPE_CHECKING:
    from mechdsl.resolve.cell_key import CellKey

# --- which cells --------------------------------------------------------------------------------

SHORT_COMPONENTS = {"resid": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}
"""`L3.mlp` is `mlp_out layer 3`."""

_SITE = re.compile(r"(?:L(?P<layer>[^HN.]+)(?:(?P<unit>[HN])(?P<index>[^.]+))?\.)?(?P<name>\w+)")
"""`L2H0.z`, `L0-2.resid_post`, `L3H*.z`, `embed`."""
_UNITS = {"H": "head", "N": "neuron"}
Coordinates = dict[str, int | float | str]


def full_component(name: str) -> str:
    """The registered name of a component that may be written short."""
    return SHORT_COMPONENTS.get(name, name)


def place_of(cell: CellKey) -> tuple[Coordinates, set[str]]:
    """All coordinates of a cell, those included that its experiment doesn't sweep but its site's
    name shows, and its components (several where rules act together)."""
    found: Coordinates = {}
    components: set[str] = set()
    rules = cell.site.split(" + ")
    for rule in rules:
        # `L0H2.z → L1H1.k`: a path is at its sender, and its receiver has axes of its own.
        for written, prefix in zip(rule.split(" → "), ("", "to_"), strict=False):
            part = _SITE.fullmatch(written)
            if part is None:
                continue
            if not prefix:
                components.add(part["name"])
            if len(rules) > 1:
                continue
            if (part["layer"] or "").isdigit():
                found[f"{prefix}layer"] = int(part["layer"])
            if part["unit"] and part["index"].isdigit():
                found[prefix + _UNITS[part["unit"]]] = int(part["index"])
    return {**cell.also, **found, **cell.coords}, components


@record
class CellSelection(Record):
    """Which cells are meant: ranges of coordinates, and a component."""

    text: str
    ranges: Mapping[str, tuple[tuple[int | float | str, int | float | str], ...]]
    """Axis -> ranges with both ends included, one of which has to hold it."""
    component: str | None = None

    def matches(self, cell: CellKey, open_axes: Collection[str] = ()) -> bool:
        """open_axes: those of which a cell may have any value, for it isn't known yet."""
        coordinates, components = place_of(cell)
        named = self.component if COMPONENT not in open_axes else None
        if named and components and named not in components:
            return False
        return all(
            axis in open_axes
            or (axis in coordinates and any(_within(coordinates[axis], *e) for e in allowed))
            for axis, allowed in self.ranges.items()
        )

    def find(self, cells: Iterable[CellKey]) -> list[int]:
        """Indices of the cells that are meant."""
        return [index for index, cell in enumerate(cells) if self.matches(cell)]


def _within(value: int | float | str, low: int | float | str, high: int | float | str) -> bool:
    if isinstance(value, str) and isinstance(low, Percent) and value.endswith("%"):
        value = float(value[:-1])  # a layer by its relative depth
    if isinstance(value, str) or isinstance(low, str) or isinstance(high, str):
        return str(value) == str(low)
    return low <= value <= high


# --- values -------------------------------------------------------------------------------------


@record
class Constant(Record):
    value: float


@record
class OfCells(Record):
    """One number of the cells of a measure. `only` and `cell` read a single one."""

    how: Literal["max", "min", "mean", "cell", "only"]
    measure: int
    where: tuple[CellSelection, ...] = ()
    experiment: str | None = None
    """`delta of other`: whose measure it is, `measure` counts there; None is this experiment."""


@record
class Accuracy(Record):
    run: str


@record
class Correlation(Record):
    """Over the cells that both experiments have."""

    how: Literal["spearman", "pearson"]
    measure: int
    experiment: str


@record
class Arithmetic(Record):
    operator: Literal["+", "-", "*", "/"]
    left: Value
    right: Value


@record
class Absolute(Record):
    operand: Value


@record
class Area(Record):
    """Under the curve of a measure over an axis, divided by the axis's range."""

    measure: int
    axis: str
    where: tuple[CellSelection, ...] = ()


@record
class Ranking(Record):
    """`auroc(effect, truth)`: how well an effect ranks what is true."""

    measure: int
    where: tuple[CellSelection, ...] = ()
    """Which cells are ranked; with a column, the one whose rows are."""
    truth: tuple[CellSelection, ...] | None = None
    """A cell that one of these names is true; None where a column says what is."""
    column: str | None = None
    """A variable of the prompts that is true or false, over the rows of one cell."""


Value = Constant | OfCells | Accuracy | Correlation | Area | Ranking | Arithmetic | Absolute


_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def truth_of(value: object) -> bool | None:
    """What a value of the prompts says, as far as it is a truth value; 0 and 1 are, and a column
    of CSV has them as texts."""
    if isinstance(value, str):
        return _TRUTHS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


# --- conditions ---------------------------------------------------------------------------------


@record
class Comparison(Record):
    operator: Literal["<", "<=", ">", ">=", "=", "!="]
    left: Value
    right: Value


@record
class InBand(Record):
    """`v near x within t`, `v in a..b`: both ends included."""

    value: Value
    low: float
    high: float


@record
class BestIs(Record):
    """`argmax(recovery) = L9H9`."""

    how: Literal["argmax", "argmin"]
    measure: int
    where: tuple[CellSelection, ...]
    site: CellSelection
    equal: bool = True


@record
class TopContains(Record):
    """`top 3 contains L9H9, L9H6`, by absolute value."""

    top: int
    measure: int
    sites: tuple[CellSelection, ...]


@record
class Both(Record):
    operator: Literal["and", "or"]
    left: Condition
    right: Condition


@record
class Negation(Record):
    operand: Condition


Condition = Comparison | InBand | BestIs | Both | Negation
Statement = Condition | TopContains
"""What stands behind `expect`."""
