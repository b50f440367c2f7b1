"""Changes that a `corrupt` block can make: one entry per change, one per noise distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NoReturn, Protocol, TypeVar, cast

from mechdsl.base import limits
from mechdsl.base.records import Registry
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.names import UnknownWord
from mechdsl.diagnostics.prompts import BadCall
from mechdsl.diagnostics.syntax import NotSupported
from mechdsl.syntax import ast
from mechdsl.syntax.tree_builder import ChangeSignature, register_change
from mechdsl.vocab.sites import SITES, unknown_component

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


"""Draws of noise that one metric is averaged over."""

Parameters = Mapping[str, object]
"""The `param`s of the file."""


class CorruptibleRow(Protocol):
    """A row that is being corrupted; each change sees what the ones before it did."""

    def assign(self, names: tuple[ast.Name, ...], value: ast.Expr) -> None:
        """Give these names a new value, an expression drawn for this corruption."""
        ...

    def exchange(self, first: ast.Name, second: ast.Name) -> None:
        """Swap the values of two names."""
        ...

    def use_template(self, text: ast.String) -> None:
        """Write the row with another template."""
        ...

    def plain_value(self, name: ast.Name) -> object:
        """The value of a name: a number, a text, true or false, a list of these, or None."""
        ...

    def put(self, name: ast.Name, value: float | str) -> None:
        """Give a name this value."""
        ...

    def permutation(self, name: ast.Name, size: int) -> Sequence[int]:
        """A seeded order of 0..size-1, drawn for this corruption, this row and this name."""
        ...

    def refuse(self, node: ast.Node, reason: str, hint: str) -> NoReturn:
        """E0503 at a part of the change: this row can't be changed so."""
        ...


# --- kinds of changes -----------------------------------------------------------------------------

C = TypeVar("C", ast.ChangeLine, ast.ValueDef)


class ChangeKind(Generic[C]):
    """One kind of line in a `corrupt` block: subclass one of the three below."""

    name: ClassVar[str]
    usage: ClassVar[str]
    """An example, as the page of the language shows it."""
    meaning: ClassVar[str]
    signature: ClassVar[ChangeSignature]
    later: ClassVar[bool] = False
    """Part of the language, but not executed yet."""

    def problems(self, change: C, parameters: Parameters) -> list[Diagnostic]:
        """What is wrong with how it is written, as far as that needs no row: E0101, E0108 and the
        entry's own."""
        wrong = None if isinstance(change, ast.ValueDef) else self.signature.problem(change)
        if wrong is not None:
            return [wrong]
        if self.later:
            return [NotSupported(span=change.span, what=f"`{self.name}`")]
        return self.refusals(change, parameters)

    def refusals(self, change: C, parameters: Parameters) -> list[Diagnostic]:
        """What else is wrong with one whose parts are right."""
        return []

    def reads(self, change: C) -> tuple[ast.Expr, ...]:
        """The expressions in it, whose names must be names of the row."""
        if isinstance(change, ast.ValueDef):
            return (change.value,)
        return (*change.values, *(e for e in (change.given, change.by) if e is not None))

    def writes(self, change: C) -> tuple[ast.Name, ...]:
        """The names that are given a new value by an expression, which for names that only lists
        draw means each of their items."""
        return ()

    def templates(self, change: C) -> tuple[ast.String, ...]:
        """The texts in it that whole rows are written with."""
        return ()


class ValueChange(ChangeKind[C]):
    """Changes the values of a row, before its text is written."""

    def apply(self, row: CorruptibleRow, change: C) -> None:
        """Change the row."""
        raise NotImplementedError


class TokenChange(ChangeKind[ast.ChangeLine]):
    """Writes another text in place of tokens (`change.tokens`) of the written prompt."""

    def text(self, change: ast.ChangeLine) -> ast.Expr:
        """What stands there instead; a text in each row."""
        raise NotImplementedError


class ActivationChange(ChangeKind[ast.ChangeLine]):
    """Leaves the text as it is, and adds noise (at `change.at`) while the model runs."""

    def noise(self, change: ast.ChangeLine, parameters: Parameters) -> NoiseSettings:
        """What is added, of a change without problems."""
        raise NotImplementedError

    def reads(self, change: ast.ChangeLine) -> tuple[ast.Expr, ...]:
        """Nothing of the row."""
        return ()


class ImageChange(ChangeKind[ast.ChangeLine]):
    """Changes an image, or a region of it, before it is made ready for the model; or patches of it
    (`change.tokens`) behind that."""

    of: ClassVar[Literal["blur", "mask", "noise", "swap"]]
    most: ClassVar[float] = 0.0
    """The largest amount."""

    def amount(self, change: ast.ChangeLine) -> int | float | str | ast.Expr | None:
        """A number, or the name of one; None where there is none."""
        return None

    def reads(self, change: ast.ChangeLine) -> tuple[ast.Expr, ...]:
        """The amount, where it is an expression; the part is no value of the row."""
        found = self.amount(change)
        return (found,) if isinstance(found, ast.Expr) else ()


CHANGES: Registry[ChangeKind[Any]] = Registry("change")

K = TypeVar("K", bound=ChangeKind[Any])


def change(name: str) -> Callable[[type[K]], type[K]]:
    """Register a kind of change; its word begins a line of a `corrupt` block from now on, and is
    free as a name everywhere else."""

    def entered(kind: type[K]) -> type[K]:
        kind.name = name
        CHANGES.add(name, kind())
        register_change(name, kind.signature)
        return kind

    return entered


def change_kind(line: ast.CorruptLine) -> ChangeKind[Any]:
    """The entry of a line. The grammar knows no word without one."""
    return SET if isinstance(line, ast.ValueDef) else CHANGES[line.word]


W = TypeVar("W", TokenChange, ActivationChange, ImageChange)


def changes_of_kind(
    kind: type[W], lines: Sequence[ast.CorruptLine]
) -> list[tuple[W, ast.ChangeLine]]:
    """The lines with an entry of this kind, each behind its entry."""
    worded = [line for line in lines if isinstance(line, ast.ChangeLine)]
    found = [(change_kind(line), line) for line in worded]
    return [(entry, line) for entry, line in found if isinstance(entry, kind)]


def patch_changes(lines: Sequence[ast.CorruptLine]) -> list[tuple[ImageChange, ast.ChangeLine]]:
    """The changes of images that name patches."""
    return [each for each in changes_of_kind(ImageChange, lines) if each[1].tokens is not None]


def change_problems(lines: Sequence[ast.CorruptLine], parameters: Parameters) -> list[Diagnostic]:
    """What is wrong with the lines of a `corrupt` block before there is a row."""
    return [d for line in lines for d in change_kind(line).problems(line, parameters)]


# --- changes of values ----------------------------------------------------------------------------


class SetChange(ValueChange[ast.ValueDef]):
    """The one kind that has no word of its own."""

    name = "set"
    usage = "count = count - 1"
    meaning = "a value is another one; what is derived from it follows"

    def writes(self, change: ast.ValueDef) -> tuple[ast.Name, ...]:
        return change.names

    def apply(self, row: CorruptibleRow, change: ast.ValueDef) -> None:
        row.assign(change.names, change.value)


SET = CHANGES.add(SetChange.name, SetChange())


@change("swap")
class SwapChange(ValueChange[ast.ChangeLine]):
    usage = "swap count, number"
    meaning = (
        "two values change places; of images also two regions, each a box: what lies in one is "
        "resized to the other (bilinear)"
    )
    signature = ChangeSignature((ast.Name, ast.Name))

    def apply(self, row: CorruptibleRow, change: ast.ChangeLine) -> None:
        first, second = cast("tuple[ast.Name, ast.Name]", change.values)
        row.exchange(first, second)


@change("template")
class TemplateChange(ValueChange[ast.ChangeLine]):
    usage = 'template "{fruits}"'
    meaning = "the same values in another text"
    signature = ChangeSignature((ast.String,))

    def templates(self, change: ast.ChangeLine) -> tuple[ast.String, ...]:
        return cast("tuple[ast.String]", change.values)

    def apply(self, row: CorruptibleRow, change: ast.ChangeLine) -> None:
        row.use_template(*self.templates(change))


@change("blur")
class BlurChange(ImageChange):
    usage = "blur image radius 8"
    meaning = (
        "an image, or a region of it, is blurred, with a Gaussian of this radius, in pixels of the "
        "file; rows are images"
    )
    signature = ChangeSignature((ast.Name,), either=True, needs=("radius",))
    of = "blur"
    most = 1_000

    def amount(self, change: ast.ChangeLine) -> int | float | str | ast.Expr | None:
        return change.radius


@change("mask")
class MaskChange(ImageChange):
    usage = "mask object"
    meaning = (
        "a region of an image, or all of it (`mask image`), is gray: 128 of 255; "
        "`mask image row 3..5 col 2..4 tokens` is of patches, as is `blur` or `noise` of them: of "
        "the image as the model gets it, with a radius in its pixels, behind all other changes"
    )
    signature = ChangeSignature((ast.Name,), either=True)
    of = "mask"


@change("noise")
class NoiseChange(ImageChange):
    usage = "noise image by 40"
    meaning = (
        "noise is added to each number of each pixel of an image or a region: normal, of this "
        "standard deviation of 255, drawn for each row"
    )
    signature = ChangeSignature((ast.Name,), either=True, needs=("by",))
    of = "noise"
    most = 10_000

    def amount(self, change: ast.ChangeLine) -> int | float | str | ast.Expr | None:
        return change.by


# --- changes of tokens ----------------------------------------------------------------------------


@change("replace")
class ReplaceChange(TokenChange):
    usage = 'replace item tokens with "thing"'
    meaning = (
        "the text of these tokens is another one: a span that is named becomes it once, "
        "`fruits tokens` as a whole, `item tokens` every item"
    )
    signature = ChangeSignature(tokens=True, needs=("given",))

    def text(self, change: ast.ChangeLine) -> ast.Expr:
        assert change.given is not None
        return change.given


# --- changes of activations -----------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseSettings:
    """`gaussian(std: 3 sd of subject, samples: 10)`, read."""

    kind: str
    """Name in the registry of noises."""
    site: str
    std: float | None
    """In activation units; None where it is `sds`."""
    sds: float | None
    """Standard deviations."""
    sd_of: ast.Quantity | None = None
    """`3 sd of subject`, where it names a span."""
    samples: int = 1


@change("add")
class AddChange(ActivationChange):
    usage = "add gaussian(std: 3 sd) to embed at fruits tokens"
    meaning = "noise is added to an activation; the text, or the image, stays"
    signature = ChangeSignature((ast.Call,), needs=("to", "at"))

    def refusals(self, change: ast.ChangeLine, parameters: Parameters) -> list[Diagnostic]:
        return self._read(change, parameters)[1]

    def noise(self, change: ast.ChangeLine, parameters: Parameters) -> NoiseSettings:
        noise, wrong = self._read(change, parameters)
        assert noise is not None, wrong
        return noise

    def _read(
        self, change: ast.ChangeLine, parameters: Parameters
    ) -> tuple[NoiseSettings | None, list[Diagnostic]]:
        """The noise, or why there is none: E0108, E0203, E0515."""
        call = change.values[0]
        if isinstance(call, ast.Name):
            call = ast.Call(call.id, (), span=call.span)
        assert isinstance(call, ast.Call)
        assert change.to is not None
        kind = NOISES.get(call.name)
        if kind is None:
            known = ", ".join(f"`{name}`" for name in NOISES)
            hint = did_you_mean(call.name, NOISES, f"there is {known}")
            return None, [UnknownWord(span=call.span, kind="noise", word=call.name, hint=hint)]
        wrong: list[Diagnostic] = []
        site = change.to
        names = [name.id for name in site.names]
        unknown = [name for name in site.names if name.id not in SITES]
        if unknown:
            wrong.append(unknown_component(unknown[0].id, unknown[0].span))
        elif names != ["embed"] or site.axes or site.basis is not None:
            what = "noise on another site than `embed`"
            wrong.append(NotSupported(span=site.span, what=what))

        def refused(reason: str, node: ast.Node) -> tuple[None, list[Diagnostic]]:
            bad = BadCall(span=node.span, name=kind.name, reason=reason, usage=kind.usage)
            return None, [*wrong, bad]

        std: float | None = None
        sds: float | None = None
        sd_of: ast.Quantity | None = None
        samples = 1
        for argument in call.arguments:
            value = argument.value
            match argument.name:
                case "std":
                    if isinstance(value, ast.Quantity) and value.unit == "sd":
                        sds = value.value
                        sd_of = value if value.of is not None else None
                    else:
                        number = _number(value, parameters)
                        std = number if number is not None and number > 0 else None
                case "samples":
                    number = _number(value, parameters)
                    if number is None or number != int(number) or not 1 <= number <= limits.SAMPLES:
                        return refused(f"takes 1 to {limits.SAMPLES:,} samples", argument)
                    samples = int(number)
                case None:
                    return refused("takes arguments with names", argument)
                case name:
                    return refused(f"has no argument `{name}`", argument)
        if (std is None and sds is None) or (sds is not None and sds <= 0):
            return refused("needs a standard deviation above 0", call)
        if wrong:
            return None, wrong
        return NoiseSettings(kind.name, "embed", std, sds, sd_of, samples), []


def _number(node: object, parameters: Parameters) -> int | float | None:
    """A number, or the parameter that a name stands for."""
    value = node.value if isinstance(node, ast.Number) else None
    if isinstance(node, ast.Name):
        found = parameters.get(node.id)
        value = found if isinstance(found, int | float) else None
    return value


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
