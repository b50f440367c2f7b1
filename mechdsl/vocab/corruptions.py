"""Changes that a `corrupt` block can make: one entry per change, one per noise distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NoReturn, Protocol, TypeVar, cast

from mechdsl.base import limits
from mechdsl.base.limits import is_whole_number
from mechdsl.base.records import Record, Registry
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.prompts import BadCall
from mechdsl.diagnostics.syntax import NotSupported, UnknownWord
from mechdsl.syntax import ast
from mechdsl.syntax.tree_builder import ChangeSignature
from mechdsl.vocab.sites import SITES, unknown_component

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Parameters = Mapping[str, object]
"""`param` values of the file."""


class CorruptibleRow(Protocol):
    """A row that is being corrupted; each change sees the result of the preceding ones."""

    def assign(self, names: tuple[ast.Name, ...], value: ast.Expr) -> None:
        """Assign an expression, evaluated for this corruption, to names."""
        ...

    def exchange(self, first: ast.Name, second: ast.Name) -> None:
        """Swap the values of two names."""
        ...

    def use_template(self, text: ast.String) -> None:
        """Write the row with a different template."""
        ...

    def plain_value(self, name: ast.Name) -> object:
        """Return the value of a name: a number, a text, a boolean, a list of these, or None."""
        ...

    def put(self, name: ast.Name, value: float | str) -> None:
        """Assign a value to a name."""
        ...

    def permutation(self, name: ast.Name, size: int) -> Sequence[int]:
        """Return a seeded permutation of 0..size-1 for this corruption, row and name."""
        ...

    def refuse(self, node: ast.Node, reason: str, hint: str) -> NoReturn:
        """Report E0503 for a part of the change that isn't possible in this row."""
        ...


# --- kinds of changes -----------------------------------------------------------------------------

C = TypeVar("C", ast.ChangeLine, ast.ValueDef)


class ChangeKind(Generic[C]):
    """One kind of line in a `corrupt` block: the base of the four classes below."""

    name: ClassVar[str]
    usage: ClassVar[str]
    """Example in the language reference."""
    meaning: ClassVar[str]
    signature: ClassVar[ChangeSignature]
    later: ClassVar[bool] = False
    """Whether the kind is reserved but not implemented."""

    def problems(self, change: C, parameters: Parameters) -> list[Diagnostic]:
        """Return the errors that can be found without a row: E0101, E0108 and those of the kind."""
        wrong = None if isinstance(change, ast.ValueDef) else self.signature.problem(change)
        if wrong is not None:
            return [wrong]
        if self.later:
            return [NotSupported(span=change.span, what=f"`{self.name}`")]
        return self.refusals(change, parameters)

    def refusals(self, change: C, parameters: Parameters) -> list[Diagnostic]:
        """Return further errors in a line whose parts are valid."""
        return []

    def reads(self, change: C) -> tuple[ast.Expr, ...]:
        """Return the expressions whose names must be names of the row."""
        if isinstance(change, ast.ValueDef):
            return (change.value,)
        return (*change.values, *(e for e in (change.given, change.by) if e is not None))

    def writes(self, change: C) -> tuple[ast.Name, ...]:
        """Return the names that receive a new value from an expression.

        For a name that only occurs in a list, these are the names of the list's items.
        """
        return ()

    def templates(self, change: C) -> tuple[ast.String, ...]:
        """Return the templates that whole rows are written with."""
        return ()


class ValueChange(ChangeKind[C]):
    """A change to the values of a row, before its text is written."""

    def apply(self, row: CorruptibleRow, change: C) -> None:
        """Change the row."""
        raise NotImplementedError


class TokenChange(ChangeKind[ast.ChangeLine]):
    """A change that replaces tokens (`change.tokens`) of the prompt by a different text."""

    inserts: ClassVar[bool] = False
    """Whether it inserts tokens at a place instead, each with this text."""

    def text(self, change: ast.ChangeLine) -> ast.Expr | None:
        """Return the replacement, a text in each row; None for tokens inserted into images."""
        return change.given


class ActivationChange(ChangeKind[ast.ChangeLine]):
    """A change that keeps the text and adds noise (at `change.at`) while the model runs."""

    def noise(self, change: ast.ChangeLine, parameters: Parameters) -> NoiseSettings:
        """Return the noise settings of a change without errors."""
        raise NotImplementedError

    def reads(self, change: ast.ChangeLine) -> tuple[ast.Expr, ...]:
        """Return nothing, because the change reads no value of the row."""
        return ()


class ImageChange(ChangeKind[ast.ChangeLine]):
    """A change to an image or region before preprocessing, or to patches (`change.tokens`) after
    it."""

    of: ClassVar[Literal["blur", "mask", "noise", "silence", "swap"]]
    most: ClassVar[float] = 0.0
    """The largest permitted amount."""

    def amount(self, change: ast.ChangeLine) -> int | float | str | ast.Expr | None:
        """Return a number, or the name of one; None if there is no amount."""
        return None

    def reads(self, change: ast.ChangeLine) -> tuple[ast.Expr, ...]:
        """Return the amount if it is an expression; the region isn't a value of the row."""
        amount = self.amount(change)
        return (amount,) if isinstance(amount, ast.Expr) else ()


CHANGES: Registry[ChangeKind[Any]] = Registry("change")

K = TypeVar("K", bound=ChangeKind[Any])


def change(name: str) -> Callable[[type[K]], type[K]]:
    """Register a kind of change.

    Its word begins a line of a `corrupt` block, and remains available as a name everywhere else.
    """

    def entered(kind: type[K]) -> type[K]:
        kind.name = name
        CHANGES.add(name, kind())
        return kind

    return entered


def change_signatures() -> dict[str, ChangeSignature]:
    """Return the signature of each registered word that begins a change."""
    return {word: kind.signature for word, kind in CHANGES.items() if kind is not SET}


def change_kind(line: ast.CorruptLine) -> ChangeKind[Any]:
    """Return the kind of a line. The grammar accepts only registered words."""
    return SET if isinstance(line, ast.ValueDef) else CHANGES[line.word]


W = TypeVar("W", TokenChange, ActivationChange, ImageChange)


def changes_of_kind(
    kind: type[W], lines: Sequence[ast.CorruptLine]
) -> list[tuple[W, ast.ChangeLine]]:
    """Return the lines of this kind, each with its registered kind."""
    worded = [line for line in lines if isinstance(line, ast.ChangeLine)]
    kinds = [(change_kind(line), line) for line in worded]
    return [(entry, line) for entry, line in kinds if isinstance(entry, kind)]


def patch_changes(lines: Sequence[ast.CorruptLine]) -> list[tuple[ImageChange, ast.ChangeLine]]:
    """Return the image changes that name patches."""
    return [each for each in changes_of_kind(ImageChange, lines) if each[1].tokens is not None]


def change_problems(lines: Sequence[ast.CorruptLine], parameters: Parameters) -> list[Diagnostic]:
    """Return the errors in a `corrupt` block that can be found without a row."""
    return [d for line in lines for d in change_kind(line).problems(line, parameters)]


# --- changes of values ----------------------------------------------------------------------------


class SetChange(ValueChange[ast.ValueDef]):
    """Assignment, the only kind without a keyword."""

    name = "set"
    usage = "count = count - 1"
    meaning = "assigns another value; values derived from it change with it"

    def writes(self, change: ast.ValueDef) -> tuple[ast.Name, ...]:
        return change.names

    def apply(self, row: CorruptibleRow, change: ast.ValueDef) -> None:
        row.assign(change.names, change.value)


SET = CHANGES.add(SetChange.name, SetChange())


@change("swap")
class SwapChange(ValueChange[ast.ChangeLine]):
    usage = "swap count, number"
    meaning = (
        "exchanges two values; for images, also two regions, each a box, with their contents "
        "resized to fit (bilinear)"
    )
    signature = ChangeSignature((ast.Name, ast.Name))

    def apply(self, row: CorruptibleRow, change: ast.ChangeLine) -> None:
        first, second = cast("tuple[ast.Name, ast.Name]", change.values)
        row.exchange(first, second)


@change("template")
class TemplateChange(ValueChange[ast.ChangeLine]):
    usage = 'template "{fruits}"'
    meaning = "inserts the same values into another template"
    signature = ChangeSignature((ast.String,))

    def templates(self, change: ast.ChangeLine) -> tuple[ast.String, ...]:
        return cast("tuple[ast.String]", change.values)

    def apply(self, row: CorruptibleRow, change: ast.ChangeLine) -> None:
        row.use_template(*self.templates(change))


@change("blur")
class BlurChange(ImageChange):
    usage = "blur image radius 8"
    meaning = (
        "blurs an image or a region with a Gaussian of this radius, in pixels of the file; the "
        "rows must be images"
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
        "makes a region of an image, or the whole image (`mask image`), gray: 128 of 255. "
        "`mask image row 3..5 col 2..4 tokens` masks patches of the image as the model receives "
        "it, after all other changes; `blur` and `noise` accept patches too, with a radius in "
        "pixels of that image"
    )
    signature = ChangeSignature((ast.Name,), either=True)
    of = "mask"


@change("noise")
class NoiseChange(ImageChange):
    usage = "noise image by 40"
    meaning = (
        "adds normal noise with this standard deviation of 255 to each channel of each pixel of an "
        "image or a region, or to each sample of a sound, whose full scale is 255; drawn for each "
        "row"
    )
    signature = ChangeSignature((ast.Name,), either=True, needs=("by",))
    of = "noise"
    most = 10_000

    def amount(self, change: ast.ChangeLine) -> int | float | str | ast.Expr | None:
        return change.by


@change("silence")
class SilenceChange(ImageChange):
    usage = "silence a"
    meaning = "replaces a sound in a prompt by silence of the same length"
    signature = ChangeSignature((ast.Name,))
    of = "silence"


# --- changes of tokens ----------------------------------------------------------------------------


@change("replace")
class ReplaceChange(TokenChange):
    usage = 'replace item tokens with "thing"'
    meaning = (
        "replaces the text of these tokens: `fruits tokens` replaces the whole span once, "
        "`item tokens` every item"
    )
    signature = ChangeSignature(tokens=True, needs=("given",))


@change("insert")
class InsertChange(TokenChange):
    usage = 'insert 4 tokens before last token with " apple"'
    meaning = (
        "inserts tokens before the first or `after` the last token of a position, each with this "
        "text of one token. All other tokens stay as they are. `inserted tokens` are the positions "
        "of the new ones, at which rules write vectors: `set embed at inserted tokens to m`"
    )
    signature = ChangeSignature((ast.Number,), counted=True, may=("given",))
    inserts = True

    def refusals(self, change: ast.ChangeLine, parameters: Parameters) -> list[Diagnostic]:
        (count,) = change.values
        number = _number(count, parameters)
        reason, node = f"takes 1 to {limits.INSERTED:,} tokens", count
        if number is not None and 1 <= number <= limits.INSERTED:
            if change.given is None or isinstance(change.given, ast.String):
                return []
            reason = "takes a text; a rule writes vectors, `set embed at inserted tokens to m`"
            node = change.given
        return [BadCall(span=node.span, name=self.name, reason=reason, usage=self.usage)]


# --- changes of activations -----------------------------------------------------------------------


class NoiseSettings(Record):
    """Settings of `gaussian(std: 3 sd of subject, samples: 10)`."""

    kind: str
    """Name in the registry of noise kinds."""
    site: str
    std: float | None
    """Standard deviation in activation units; None if `sds` specifies it."""
    sds: float | None
    """Standard deviation in multiples of the standard deviation of embeddings."""
    sd_of: ast.Quantity | None = None
    """The quantity in `3 sd of subject`, if it names a span."""
    samples: int = 1


@change("add")
class AddChange(ActivationChange):
    usage = "add gaussian(std: 3 sd) to embed at fruits tokens"
    meaning = "adds noise to an activation and leaves the text or image unchanged"
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
        """Read the noise settings; None with errors E0108, E0203 or E0515."""
        call = change.values[0]
        if isinstance(call, ast.Name):
            call = ast.Call(call.id, (), span=call.span)
        assert isinstance(call, ast.Call)
        assert change.to is not None
        kind = NOISES.get(call.name)
        if kind is None:
            known = ", ".join(f"`{name}`" for name in NOISES)
            hint = did_you_mean(call.name, NOISES, f"the types are {known}")
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
                    if not is_whole_number(number) or not 1 <= number <= limits.SAMPLES:
                        return refused(f"takes 1 to {limits.SAMPLES:,} samples", argument)
                    samples = int(number)
                case None:
                    return refused("takes named arguments", argument)
                case name:
                    return refused(f"has no argument `{name}`", argument)
        if (std is None and sds is None) or (sds is not None and sds <= 0):
            return refused("needs a standard deviation above 0", call)
        if wrong:
            return None, wrong
        return NoiseSettings(kind.name, "embed", std, sds, sd_of, samples), []


def _number(node: object, parameters: Parameters) -> int | float | None:
    """Evaluate a number or the name of a parameter."""
    value = node.value if isinstance(node, ast.Number) else None
    if isinstance(node, ast.Name):
        parameter = parameters.get(node.id)
        value = parameter if isinstance(parameter, int | float) else None
    return value


class NoiseKind(Record):
    """A noise distribution, scaled by `std`."""

    name: str
    usage: str
    meaning: str
    standard: Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]
    """Draws samples of a given shape with mean 0 and standard deviation 1."""


NOISES: Registry[NoiseKind] = Registry("noise")

GAUSSIAN = NOISES.add(
    "gaussian",
    NoiseKind(
        name="gaussian",
        usage="gaussian(std: 3 sd, samples: 10)",
        meaning="independent normal noise in every dimension",
        standard=lambda generator, shape: generator.standard_normal(shape),
    ),
)
