"""Registries of the functions of a file that make a direction or a basis, `NAME(…)`.

A method that computes its vector from activations is one class under `direction_method`, one that
makes a
basis one under `basis_method`. A module outside the package adds a method with such a
class, when it is imported before a file is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, cast

from mechdsl.base.limits import is_integer, is_number
from mechdsl.base.records import Record, Registry, attribute_problem
from mechdsl.base.text import Percent, name_list
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.program.spec import Constant
from mechdsl.syntax.words import name_problem

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats

OperandKind = Literal["two", "block", "value and block", "texts", "file", "direction", "training"]

FITTED_OPERANDS: tuple[OperandKind, ...] = ("two", "block", "value and block")

Problem = tuple[str, str]
"""What is wrong, and how to correct it, both in lower case."""


def check_kind(method: str, value: Constant | None, kinds: Sequence[str]) -> Problem | None:
    """Return the problem with the value of an option `kind`, or None."""
    if value in kinds:
        return None
    quoted = '"{}"'.format
    listed = f"write one of {name_list([quoted(kind) for kind in kinds])}"
    hint = did_you_mean(str(value), kinds, listed, written=quoted)
    return f"`{method}` has no such kind", hint


class RowVectors(Protocol):
    """The vectors that `fit` reads: one of each row that has the position."""

    @property
    def count(self) -> int:
        """Number of rows."""
        ...

    @property
    def targets(self) -> Sequence[float | str]:
        """[row] the value named first in the call; empty for methods that take no value."""
        ...

    @property
    def classes(self) -> Sequence[float | str]:
        """Each target once, in ascending order."""
        ...

    @property
    def rounding(self) -> float:
        """Machine epsilon of the model's dtype."""
        ...

    def mean(self) -> Floats:
        """[width] float64."""
        ...

    def matrix(self) -> Floats:
        """[row, width] float64, in the order of `targets`; only if `needs_rows` is true."""
        ...


class RowSummary(Record):
    """The rows of a fit, before any activation is read."""

    text: str
    """`40 rows of fruit`"""
    value: str = ""
    """The value named first in the call, as the file writes it."""
    classes: Sequence[float | str] = ()
    """Each target once, in ascending order."""


class DirectionMethod:
    """A function that makes a direction."""

    name: ClassVar[str]
    takes: ClassVar[OperandKind]
    """Positional arguments."""
    example: ClassVar[str]
    """A call, as messages show it."""
    options: ClassVar[tuple[str, ...]] = ()
    """Names of the arguments that are written `NAME: VALUE`."""
    at_a_site: ClassVar[bool] = False
    """Whether the direction is computed from activations."""


class FittedMethod(DirectionMethod):
    """A method that computes a vector from activations at one site and position.

    The package handles the options `prompts` and `limit`; a subclass that supports them lists them
    in `options`.
    """

    at_a_site = True
    words: ClassVar[tuple[str, ...]] = ()
    """The options whose value is a word: `kind: ridge`."""
    min_rows: ClassVar[int] = 1
    """Fewest rows with the position that `fit` can use."""
    needs_rows: ClassVar[bool] = True
    """Whether `fit` calls `matrix`; if not, vectors are added up and not stored."""
    sums_heads: ClassVar[bool] = False
    """Whether several heads are fitted separately and added after the output projection."""

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        """Return the problem with an option's value, or None.

        Args:
            name: One of `options`.
            value: None if the file has no constant there.
        """
        return None

    def default_options(self, samples: Sequence[RowSummary]) -> Mapping[str, Constant]:
        """Return values of options that the call leaves out."""
        return {}

    def check_samples(
        self, samples: Sequence[RowSummary], options: Mapping[str, Constant]
    ) -> Problem | None:
        """Return the reason that these rows can't be fitted, or None."""
        return None

    def describe(self, samples: Sequence[RowSummary], options: Mapping[str, Constant]) -> str:
        """Return the description that results and `explain` print."""
        rows = " and ".join(sample.text for sample in samples)
        given = "".join(f", {name} {value}" for name, value in options.items())
        return f"{self.name} of {rows}{given}"

    def fit(self, samples: Sequence[RowVectors], options: Mapping[str, Constant]) -> Floats:
        """Compute the direction.

        Args:
            samples: One per block of the call.
            options: Values of the call, and of `default_options`.

        Returns:
            [width] float64.
        """
        raise NotImplementedError


DIRECTION_METHODS: Registry[DirectionMethod] = Registry("direction method")

MethodT = TypeVar("MethodT", bound=FittedMethod)

_PACKAGE = __name__.partition(".")[0]


def direction_method(name: str) -> Callable[[type[MethodT]], type[MethodT]]:
    """Register a subclass of `FittedMethod` as the function `name` of files.

    Raises ValueError or TypeError for a class that can't be used.
    """
    return DIRECTION_METHODS.class_decorator(name, _direction_class_problem)


def call_class_problem(
    name: str,
    entry: object,
    base: type,
    *,
    arguments: str,
    tuples: Mapping[str, str],
    counts: tuple[str, ...] = (),
    bare: bool = False,
) -> str | None:
    """Return the reason that a class can't be registered as the function `name` of files.

    Args:
        arguments: Those of an example, for the message: `dims: 8`.
        tuples: Attributes that are tuples of names, each with an example of a name.
        counts: As in `attribute_problem`.
        bare: Whether the name alone is a call.
    """
    wrong = name_problem(name)
    if wrong is not None:
        return wrong
    if not (isinstance(entry, type) and issubclass(entry, base)):
        return f"it must be a subclass of `{base.__name__}`"
    example: object = getattr(entry, "example", None)
    if not isinstance(example, str) or not example.startswith(name if bare else f"{name}("):
        return f'`example` must be a call: `example = "{name}({arguments})"`'
    for attribute, one in tuples.items():
        names: object = getattr(entry, attribute)
        if not isinstance(names, tuple) or not all(isinstance(each, str) for each in names):
            return f'`{attribute}` must be a tuple of names: `{attribute} = ("{one}",)`'
    return attribute_problem(entry, counts=counts)


def _direction_class_problem(name: str, entry: object) -> str | None:
    """Return the reason that a class can't be registered."""
    tuples = {"options": name, "words": name}
    wrong = call_class_problem(
        name, entry, FittedMethod, arguments="fruit", tuples=tuples, counts=("min_rows",)
    )
    if wrong is not None:
        return wrong
    assert isinstance(entry, type)
    assert issubclass(entry, FittedMethod)
    takes = getattr(entry, "takes", None)
    if takes not in FITTED_OPERANDS:
        return f"`takes` must be one of {name_list(FITTED_OPERANDS)}, not `{takes}`"
    if entry.fit is FittedMethod.fit:
        return "it has no `fit(self, samples, options)`"
    return None


def fitted_method(name: str) -> FittedMethod:
    """Return a registered method that computes its vector from activations."""
    method = DIRECTION_METHODS[name]
    assert isinstance(method, FittedMethod)
    return method


# --- calls of registered classes ------------------------------------------------------------------


class MethodError(Exception):
    """A mistake in a registered class from outside the package."""

    def __init__(self, method: object, function: str, reason: str) -> None:
        kind = type(method)
        super().__init__(f"`{kind.__name__}.{function}` {reason}")
        self.hint = f"correct `{kind.__name__}.{function}` in the module `{kind.__module__}`"


def call_method(method: object, function: str, *arguments: object) -> Any:
    """Call a method of a registered class. Raises MethodError for one from outside the package."""
    try:
        return getattr(method, function)(*arguments)
    except Exception as error:
        if type(method).__module__.partition(".")[0] == _PACKAGE:
            raise
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise MethodError(method, function, f"raised {said}") from error


def _problem(method: FittedMethod, function: str, *arguments: object) -> Problem | None:
    outcome: object = call_method(method, function, *arguments)
    if outcome is None:
        return None
    pair = cast("tuple[object, ...]", outcome) if isinstance(outcome, tuple) else ()
    match pair:
        case (str(reason), str(hint)):
            return reason, hint
        case _:
            said = "must return None or two texts, the problem and the fix"
            raise MethodError(method, function, f"returned {outcome!r}; it {said}")


def option_problem(method: FittedMethod, name: str, value: Constant | None) -> Problem | None:
    """Return the problem with an option's value. Raises MethodError."""
    return _problem(method, "check_option", name, value)


def sample_problem(
    method: FittedMethod, samples: Sequence[RowSummary], options: Mapping[str, Constant]
) -> Problem | None:
    """Return the reason that rows can't be fitted. Raises MethodError."""
    return _problem(method, "check_samples", samples, options)


def option_defaults(method: FittedMethod, samples: Sequence[RowSummary]) -> Mapping[str, Constant]:
    """Return values of options that a call leaves out. Raises MethodError."""
    defaults: object = call_method(method, "default_options", samples)
    if not isinstance(defaults, Mapping):
        raise MethodError(
            method, "default_options", f"returned {defaults!r}; it must return a dict"
        )
    values = cast("Mapping[object, object]", defaults)
    for name, value in values.items():
        if name not in method.options or not isinstance(value, bool | int | float | str):
            said = "must name options, with numbers or texts as values"
            raise MethodError(method, "default_options", f"returned {defaults!r}; it {said}")
    return cast("Mapping[str, Constant]", values)


def description(
    method: FittedMethod, samples: Sequence[RowSummary], options: Mapping[str, Constant]
) -> str:
    """Return the description of a fit. Raises MethodError."""
    text: object = call_method(method, "describe", samples, options)
    if not isinstance(text, str) or not text:
        raise MethodError(method, "describe", f"returned {text!r}; it must return a text")
    return text


def fitted_vector(
    method: FittedMethod, samples: Sequence[RowVectors], options: Mapping[str, Constant], width: int
) -> Floats:
    """Return the vector of a fit, [width] float64. Raises MethodError and what `fit` raises."""
    vector: object = call_method(method, "fit", samples, options)
    import numpy as np

    if not isinstance(vector, np.ndarray) or not np.issubdtype(vector.dtype, np.floating):
        kind = vector.dtype if isinstance(vector, np.ndarray) else type(vector).__name__
        said = "it must return an array of float64"
        raise MethodError(method, "fit", f"returned `{kind}`; {said}")
    if vector.shape != (width,):
        said = f"it must return [{width}], one number per coordinate"
        raise MethodError(method, "fit", f"returned the shape {list(vector.shape)}; {said}")
    if type(method).__module__.partition(".")[0] != _PACKAGE and not np.isfinite(vector).all():
        raise MethodError(method, "fit", "returned NaN or infinity")
    return np.ascontiguousarray(vector, dtype=np.float64)


# --- the methods of the language ------------------------------------------------------------------

ROUNDING_UNITS = 4.0
"""A difference of means below this number of rounding units of the means counts as 0."""


@direction_method("mean_difference")
class MeanDifference(FittedMethod):
    """The mean of the first rows minus the mean of the second rows."""

    takes = "two"
    example = "mean_difference(harmful, harmless)"
    options = ("prompts", "limit")
    needs_rows = False

    def describe(self, samples: Sequence[RowSummary], options: Mapping[str, Constant]) -> str:
        return f"mean over {samples[0].text} − mean over {samples[1].text}"

    def fit(self, samples: Sequence[RowVectors], options: Mapping[str, Constant]) -> Floats:
        import numpy as np

        a, b = (sample.mean() for sample in samples)
        difference = a - b
        scale = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)))
        least = ROUNDING_UNITS * samples[0].rounding * scale
        count = min(sample.count for sample in samples)
        small = float(np.linalg.norm(difference)) <= least / count**0.5
        return np.zeros_like(difference) if small else difference


@direction_method("mean")
class Mean(FittedMethod):
    """The mean of the rows."""

    takes = "block"
    example = "mean(fruit)"
    options = ("limit",)
    needs_rows = False
    sums_heads = True

    def describe(self, samples: Sequence[RowSummary], options: Mapping[str, Constant]) -> str:
        return f"mean over {samples[0].text}"

    def fit(self, samples: Sequence[RowVectors], options: Mapping[str, Constant]) -> Floats:
        return samples[0].mean()


@direction_method("pca")
class PrincipalComponent(FittedMethod):
    """A principal component of the rows."""

    takes = "block"
    example = "pca(fruit, component: 1)"
    options = ("component", "limit")
    min_rows = 2

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if not is_integer(value, least=1):
            return "components are counted from 1", "write `component: 2`"
        return None

    def describe(self, samples: Sequence[RowSummary], options: Mapping[str, Constant]) -> str:
        number = options.get("component", 1)
        return f"principal component {number} of {samples[0].text}, its largest coordinate positive"

    def fit(self, samples: Sequence[RowVectors], options: Mapping[str, Constant]) -> Floats:
        from mechdsl.fits.geometry import pca

        component = int(options.get("component", 1))
        return pca(samples[0].matrix(), component)[component - 1]


@direction_method("probe")
class Probe(FittedMethod):
    """The weights of a linear probe: ridge for numbers, logistic for two classes."""

    takes = "value and block"
    example = "probe(count, fruit)"
    options = ("kind", "penalty", "limit")
    words = ("kind",)
    min_rows = 2

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "penalty":
            if not is_number(value) or value < 0:
                return "a penalty is a number from 0 on", "write `penalty: 1`"
        elif value not in ("ridge", "logistic"):
            return f"there is no probe of the kind `{value}`", "write `ridge` or `logistic`"
        return None

    def default_options(self, samples: Sequence[RowSummary]) -> Mapping[str, Constant]:
        numbers = all(isinstance(each, float) for each in samples[0].classes)
        return {"kind": "ridge" if numbers else "logistic", "penalty": 1}

    def check_samples(
        self, samples: Sequence[RowSummary], options: Mapping[str, Constant]
    ) -> Problem | None:
        name, classes = samples[0].value, len(samples[0].classes)
        numbers = all(isinstance(each, float) for each in samples[0].classes)
        kind = options["kind"]
        if classes < 2:
            return f"`{name}` is the same in all rows", "name a value that differs"
        if kind == "ridge" and not numbers:
            return f"`{name}` isn't a number", "write `kind: logistic`, for two classes"
        if kind == "logistic" and classes > 2:
            hint = "keep rows of two of them (`where`)" + ", or write `kind: ridge`" * numbers
            return f"`{name}` has {classes} values, not two classes", hint
        if kind == "logistic" and not float(options["penalty"]):
            return "without a penalty it may have no minimum", "write `penalty: 1`"
        return None

    def describe(self, samples: Sequence[RowSummary], options: Mapping[str, Constant]) -> str:
        to = ""
        if options["kind"] == "logistic":
            first, second = (
                f"{each:g}" if isinstance(each, float) else each for each in samples[0].classes
            )
            to = f", from `{first}` to `{second}`"
        return f"{options['kind']} probe{to}, penalty {options['penalty']}, on {samples[0].text}"

    def fit(self, samples: Sequence[RowVectors], options: Mapping[str, Constant]) -> Floats:
        """[width]: the weights of a ridge regression, or those of the second class less those of
        the first."""
        import numpy as np

        from mechdsl.fits.regression import fit_logistic, fit_ridge

        rows = samples[0]
        penalty = float(options["penalty"])
        if options["kind"] == "ridge":
            numbers = np.array(rows.targets, dtype=np.float64)
            return fit_ridge(rows.matrix(), numbers, penalty).weights[:, 0]
        names = list(rows.classes)
        classes = np.array([names.index(target) for target in rows.targets], dtype=np.int64)
        weights = fit_logistic(rows.matrix(), classes, penalty).logits.weights
        return weights[:, 1] - weights[:, 0]


class _Unembedding(DirectionMethod):
    takes = "texts"
    example = 'unembedding(" Mary", " John")'


class _Saved(DirectionMethod):
    takes = "file"
    example = 'saved("refusal.safetensors", "direction")'


class _Unit(DirectionMethod):
    takes = "direction"
    example = "unit(refusal)"


class _Trained(DirectionMethod):
    takes = "training"
    example = "fit(vector(length: 8), prompts: fruit.train, maximise: logit(answer))"
    at_a_site = True


DIRECTION_METHODS.add("unembedding", _Unembedding())
DIRECTION_METHODS.add("saved", _Saved())
DIRECTION_METHODS.add("unit", _Unit())
DIRECTION_METHODS.add("fit", _Trained())


BasisOperand = Literal[
    "block",
    "value and block",
    "jacobian",
    "directions",
    "tokens",
    "file",
    "weights",
    "nothing",
    "dictionary",
    "python",
    "training",
]
"""What a method computes the basis from: activations of a prompt set, their means for each value of
its rows, derivatives of one site by another on a prompt set, directions of the file, rows of the
unembedding, a tensor of a file, a weight matrix of the site's layer, nothing but the width, a
dictionary, a Python file, or a training on activations of a prompt set."""

ROW_OPERANDS: tuple[BasisOperand, ...] = ("block", "value and block", "jacobian", "training")
"""Operands that are computed on rows of a prompt set, at a position."""

BASIS_OPERANDS: tuple[BasisOperand, ...] = (
    "block",
    "value and block",
    "tokens",
    "file",
    "weights",
    "nothing",
)
"""Operands that classes from outside the package can take."""


class BasisInput(Protocol):
    """The numbers that `build` may read."""

    @property
    def width(self) -> int:
        """Numbers of a vector at the site."""
        ...

    def matrix(self) -> Floats:
        """The operand, float64.

        [row, width] activations, [value, width] their means, [direction, width] directions,
        [token, width] rows of the unembedding, a tensor of the file, [width, input] the weight
        matrix that writes to the site, or [width, width] the mean of JᵀJ or JJᵀ over the rows, for
        Jacobians J.
        """
        ...

    def next_map(self) -> Floats:
        """[output, width]: the weights that read the site; only if the method reads them."""
        ...

    def normal(self, rows: int) -> Floats:
        """[rows, width] standard normal numbers that depend on the seed and the basis's name."""
        ...


@dataclass(frozen=True, eq=False)
class LinearMap:
    """Directions of a basis. The coordinates of x are those of x − center along them."""

    directions: Floats
    """[coordinate, width], linearly independent."""
    center: Floats | None = None
    """[width]; None for 0."""


class BasisMethod:
    """A function that makes a basis of independent directions."""

    name: ClassVar[str]
    takes: ClassVar[BasisOperand]
    example: ClassVar[str]
    """A call, as messages show it."""
    options: ClassVar[tuple[str, ...]] = ()
    """Names of the arguments that are written `NAME: VALUE`, with a constant each."""
    required: ClassVar[tuple[str, ...]] = ()
    """Options that a call must have."""
    reads_next_map: ClassVar[bool] = False
    """Whether it reads the weights that read the site: of `mlp_hidden` or `z`."""

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        """Return the problem with an option's value, or None.

        Args:
            name: One of `options`.
            value: None if the file has no constant there.
        """
        return None

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        """Return the number of coordinates, or the reason that there is no such basis.

        Args:
            width: Numbers of a vector at the site.
            rows: Rows of the operand: prompts, values, tokens or rows of a tensor; the inputs of a
                weight matrix.
            options: Values of the call.
        """
        raise NotImplementedError

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        """Return the description that results and `explain` print.

        Args:
            operand: `40 rows of fruit`
        """
        given = "".join(f", {name} {value}" for name, value in options.items())
        return f"{self.name} of {operand}{given}" if operand else f"{self.name}{given}"

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        """Compute the basis, with `size` coordinates."""
        raise NotImplementedError


BASIS_METHODS: Registry[BasisMethod] = Registry("basis method")

BasisMethodT = TypeVar("BasisMethodT", bound=BasisMethod)


def basis_method(name: str) -> Callable[[type[BasisMethodT]], type[BasisMethodT]]:
    """Register a subclass of `BasisMethod` as the function `name` of files.

    Raises ValueError or TypeError for a class that can't be used.
    """
    return BASIS_METHODS.class_decorator(name, _basis_class_problem)


def _basis_class_problem(name: str, entry: object) -> str | None:
    """Return the reason that a class can't be registered."""
    tuples = {"options": "dims", "required": "dims"}
    wrong = call_class_problem(
        name, entry, BasisMethod, arguments="dims: 8", tuples=tuples, bare=True
    )
    if wrong is not None:
        return wrong
    assert isinstance(entry, type)
    assert issubclass(entry, BasisMethod)
    takes = getattr(entry, "takes", None)
    if takes not in BASIS_OPERANDS and entry.__module__ != __name__:
        return f"`takes` must be one of {name_list(BASIS_OPERANDS)}, not `{takes}`"
    if entry.build is BasisMethod.build or entry.size is BasisMethod.size:
        return "it needs `size(self, width, rows, options)` and `build(self, given, options, size)`"
    return None


def basis_size(
    method: BasisMethod, width: int, rows: int, options: Mapping[str, Constant]
) -> int | Problem:
    """Return the number of coordinates, or the problem. Raises MethodError."""
    size: object = call_method(method, "size", width, rows, options)
    match size:
        case int() if not isinstance(size, bool) and 1 <= size <= width:
            return size
        case (str(reason), str(hint)):
            return reason, hint
        case _:
            said = f"it must return a number from 1 to {width}, or the problem and the fix"
            raise MethodError(method, "size", f"returned {size!r}; {said}")


def linear_map(
    method: BasisMethod, given: BasisInput, options: Mapping[str, Constant], size: int
) -> LinearMap:
    """Compute a basis. Raises MethodError and what `build` raises."""
    built: object = call_method(method, "build", given, options, size)
    import numpy as np

    if not isinstance(built, LinearMap):
        said = f"it must return a `LinearMap`, not a `{type(built).__name__}`"
        raise MethodError(method, "build", said)
    directions = np.asarray(built.directions, dtype=np.float64)
    if directions.shape != (size, given.width):
        said = f"it must return [{size}, {given.width}], one direction per coordinate"
        raise MethodError(method, "build", f"returned {list(directions.shape)}; {said}")
    center = None if built.center is None else np.asarray(built.center, dtype=np.float64)
    if center is not None and center.shape != (given.width,):
        said = f"returned a center of {list(center.shape)}, not [{given.width}]"
        raise MethodError(method, "build", said)
    if not np.isfinite(directions).all() or (center is not None and not np.isfinite(center).all()):
        raise ValueError("it has NaN or infinity")
    return LinearMap(directions, center)


# --- the methods of the language ------------------------------------------------------------------


class _WithDims(BasisMethod):
    """A method with the option `dims`."""

    options = ("dims",)

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "limit":  # checked with the rows
            return None
        if not is_integer(value, least=1):
            return "`dims` is a whole number from 1 on", "write `dims: 8`"
        return None

    def _most(self, most: int, what: str, options: Mapping[str, Constant]) -> int | Problem:
        dims = int(options.get("dims", most))
        if dims > most:
            return f"`dims: {dims}` is more than {most}, {what}", f"write `dims: {most}` or less"
        return dims


@basis_method("pca")
class PrincipalComponents(_WithDims):
    """Principal components of the rows, the largest first, centred at the mean of the rows.

    With `each_token: true`, every token of the position is a row; otherwise, a row is the mean over
    its tokens.
    """

    takes = "block"
    example = "pca(fruit, dims: 8)"
    options = ("dims", "limit", "each_token")
    required = ("dims",)

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name != "each_token":
            return super().check_option(name, value)
        if isinstance(value, bool):
            return None
        return "`each_token` is true or false", "write `each_token: true`"

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        vectors = "tokens" if options.get("each_token") else "rows"
        if rows < 2:
            return f"principal components need at least 2 {vectors}", "name a block with more rows"
        most = f"the most that {rows} {vectors} can span"
        what = "the numbers of a vector" if width < rows else most
        return self._most(min(width, rows - 1), what, options)

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        rows = f"each token of {operand}" if options.get("each_token") else operand
        return f"{options['dims']} principal components of {rows}, centred at their mean"

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        from mechdsl.fits.geometry import pca

        rows = given.matrix()
        return LinearMap(pca(rows, size)[:size], rows.mean(axis=0))


@basis_method("class_means")
class ClassMeans(_WithDims):
    """The subspace of the differences between class means, centred at the mean of the class means.

    Each class counts once, whatever the number of its rows. The directions are the principal
    components of the class means, the largest first.
    """

    takes = "value and block"
    example = "class_means(kind, fruit)"
    options = ("dims", "limit")

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        if rows < 2:
            return "the value is the same in all rows", "name a value that differs"
        most = min(width, rows - 1)
        what = "the numbers of a vector" if width < rows - 1 else f"the most for {rows} classes"
        return self._most(most, what, options)

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        what = f"{options['dims']} principal components" if "dims" in options else "span"
        return f"{what} of the class means of {operand}, centred at their mean"

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        from mechdsl.fits.geometry import pca

        means = given.matrix()
        return LinearMap(pca(means, size), means.mean(axis=0))


@basis_method("jacobian")
class JacobianVectors(_WithDims):
    """Singular vectors of the Jacobians of one site by another, of all rows together.

    The right singular vectors are eigenvectors of the mean of JᵀJ over the rows, and belong to the
    earlier site; the left ones are those of the mean of JJᵀ, and belong to the later site. The
    basis is the first step of the local interaction basis (Bushnaq et al. 2024, arXiv 2405.10928),
    which also scales by the spread of the activations.
    """

    takes = "jacobian"
    example = "jacobian(fruit, resid_post layer 0 -> resid_post layer 2, dims: 8)"
    options = ("dims", "limit")
    required = ("dims",)

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        if rows < 1:
            return "a Jacobian needs at least 1 row", "name a block with more rows"
        return self._most(width, "the numbers of a vector", options)

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        return f"the first {options['dims']} {operand}"

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        from mechdsl.fits.geometry import principal_axes

        return LinearMap(principal_axes(given.matrix(), size))


@basis_method("random")
class RandomDirections(_WithDims):
    """Orthonormal directions that span a uniformly distributed random subspace."""

    takes = "nothing"
    example = "random(dims: 16)"
    required = ("dims",)

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        return self._most(width, "the numbers of a vector", options)

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        return f"{options['dims']} random orthonormal directions"

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        import numpy as np

        columns, upper = np.linalg.qr(given.normal(size).T)
        # With signs of the diagonal, the distribution is uniform (Mezzadri 2007).
        return LinearMap((columns * np.sign(np.diag(upper))).T)


class StandardBasis(BasisMethod):
    """The numbers of the vector themselves."""

    name = "neurons"
    takes = "nothing"
    example = "neurons"

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        return width

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        return "the numbers of the vector"

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        import numpy as np

        return LinearMap(np.eye(size))


BASIS_METHODS.add("neurons", StandardBasis())  # also a word of sites, unlike names of plugins


@basis_method("rows")
class UnembeddingRows(BasisMethod):
    """Rows of the unembedding, one for each token."""

    takes = "tokens"
    example = 'rows(unembed, " 3", " 2")'

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        if rows > width:
            reason = f"{rows:,} rows of {width} numbers depend on each other"
            return f"{reason}, so that coordinates aren't unique", f"name at most {width} tokens"
        return rows

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        return f"rows of the unembedding: {operand}"

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        return LinearMap(given.matrix())


@basis_method("svd")
class SingularVectors(_WithDims):
    """Left singular vectors of the weights that write to the site, the largest values first."""

    takes = "weights"
    example = "svd(weights: mlp_out)"
    options = ("weights", "dims")
    required = ("weights",)

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        return None if name == "weights" else super().check_option(name, value)

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        return self._most(min(width, rows), "the rank of the weights", options)

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        dims = f"the first {options['dims']} " if "dims" in options else ""
        return f"{dims}left singular vectors of {operand}"

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        import numpy as np

        vectors = np.linalg.svd(given.matrix(), full_matrices=False)[0].T[:size]
        # The sign of a singular vector is arbitrary: its largest number is positive.
        largest = np.abs(vectors).argmax(axis=1)
        return LinearMap(vectors * np.sign(vectors[np.arange(size), largest])[:, None])


@basis_method("directions")
class NamedDirections(BasisMethod):
    """Directions of the file, such as differences of means."""

    takes = "directions"
    example = "directions(more, less)"

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        if rows > width:
            reason = f"{rows:,} directions of {width} numbers depend on each other"
            return (
                f"{reason}, so that coordinates aren't unique",
                f"name at most {width} directions",
            )
        return rows

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        return f"directions {operand}"

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        return LinearMap(given.matrix())


class _PartsOfDirections(NamedDirections):
    """Directions split by the weights that read the site: the parts in one of two spaces.

    Source: Makelov et al. 2023, arXiv 2311.17030.
    """

    space: ClassVar[str]
    reads_next_map = True

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        return f"the parts of {operand} in the {self.space} of the weights that read the site"

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        import numpy as np

        from mechdsl.fits.geometry import split_by_rows

        whole = given.matrix()
        read, unread = split_by_rows(whole, given.next_map())
        parts = read if self.space == "row space" else unread
        lengths = np.linalg.norm(parts, axis=1)
        if (lengths <= 1e-6 * np.linalg.norm(whole, axis=1)).any():  # 0 up to rounding
            raise ValueError(f"a direction has no part in the {self.space} of the weights")
        return LinearMap(parts)


@basis_method("row_space")
class RowSpaceParts(_PartsOfDirections):
    """The parts of directions that the weights after the site read."""

    example = "row_space(d)"
    space = "row space"


@basis_method("null_space")
class NullSpaceParts(_PartsOfDirections):
    """The parts of directions that the weights after the site don't read, which change nothing
    directly."""

    example = "null_space(d)"
    space = "null space"


@basis_method("saved")
class SavedDirections(BasisMethod):
    """The rows of a matrix in a safetensors file, such as a learned rotation."""

    takes = "file"
    example = 'saved("rotation.safetensors", "rotation")'

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        if rows > width:
            reason = f"it has {rows:,} directions for vectors of {width} numbers"
            return f"{reason}, so that coordinates aren't unique", (
                f"save at most {width} directions; `sae(…)` reads larger dictionaries"
            )
        return rows

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        return operand

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        return LinearMap(given.matrix())


def _check_labels(value: Constant | None) -> Problem | None:
    """Check the path of a file with descriptions of features."""
    if isinstance(value, str) and value:
        return None
    return "`labels` is the path of a file, in quotes", 'write `labels: "features.jsonl"`'


@basis_method("sae")
class SparseAutoencoder(BasisMethod):
    """The features of a sparse autoencoder, from a folder of SAELens or sparsify or a file."""

    takes = "dictionary"
    example = 'sae("path/to/sae")'
    options = ("labels",)

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        return _check_labels(value)

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        return rows

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        return operand

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        raise TypeError("the features of a dictionary aren't linear")


@basis_method("transcoder")
class Transcoder(SparseAutoencoder):
    """The features of a transcoder, which reconstructs the output of an MLP from its input."""

    example = 'transcoder("path/to/transcoder")'


@basis_method("python")
class PythonEncoder(BasisMethod):
    """A user-defined object with `encode` and `decode`, from a Python file."""

    takes = "python"
    example = 'python("mp.py:MPSAE", features: 512)'
    options = ("features", "labels")
    required = ("features",)

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "labels":
            return _check_labels(value)
        if not is_integer(value, least=1):
            return "`features` is a whole number from 1 on", "write `features: 512`"
        return None

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        return int(options["features"])

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        return operand

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        raise TypeError("the features of a Python object aren't linear")


TRAINING_DEFAULTS: Mapping[str, Constant] = {
    "steps": 4000,
    "batch": 512,
    "rate": 0.001,
    "seed": 0,
    "validation": Percent(10),
    "accumulate": 1,
    "precision": "fp32",
    "measure_on_training_rows": False,
}
"""Options of a training with a default; a trainer can have other defaults. `patience` has none:
then it doesn't stop early."""

BFLOAT16 = "bf16"
"""The value of `precision` with products of matrices in bfloat16."""

PRECISIONS = (TRAINING_DEFAULTS["precision"], BFLOAT16)
"""Values of `precision`."""

TRAINING_OPTIONS = (*TRAINING_DEFAULTS, "patience", "seeds")
"""Options of a training with a constant."""

MOST_SEEDS = 100
"""Largest value of `seeds`."""

OBJECTIVES = ("maximise", "minimise")
"""Options with the measure that a rotation, a vector or a mask is trained on."""

ROTATION_OPTIONS = ("from", *OBJECTIVES)
"""Options of trainers on a measure; `from` names the run whose vectors come in, or that a vector is
compared with."""

EFFECT_OPTIONS = (*ROTATION_OPTIONS, "with", "nodes", "stack")
"""The same with the options of masks: `with` has the fill of a mask that ablates, `nodes` the
neurons or features that are nodes of a circuit, and `stack` the stack of its edges."""

PROBE_OPTIONS = ("target", "model")
"""Options of trainers of probes: the value that is predicted, and the model that runs the rows."""

FILLS = ("zero", "mean")
"""Values of `with`."""


@basis_method("fit")
class TrainedBasis(BasisMethod):
    """Features or directions that `mechdsl fit` trains, with a trainer of
    `mechdsl.program.trainers`."""

    takes = "training"
    example = "fit(sae(features: 512, k: 8), prompts: fruit.train)"
    options = ("prompts", "limit", *EFFECT_OPTIONS, *PROBE_OPTIONS, *TRAINING_OPTIONS)
    required = ("prompts",)

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "measure_on_training_rows":
            fine, what = isinstance(value, bool), "`true` or `false`"
        elif name == "rate":
            fine, what = is_number(value) and 0 < value < 1, "a number between 0 and 1"
        elif name == "precision":
            fine, what = value in PRECISIONS, '"fp32" or "bf16", in quotes'
        elif name == "validation":
            fine, what = isinstance(value, Percent) and 0 <= value <= 50, "from 0% to 50%"
        else:
            least = {"steps": 0, "seed": 0, "seeds": 2}.get(name, 1)
            most = MOST_SEEDS if name == "seeds" else None
            fine = is_integer(value, least=least) and (most is None or value <= most)
            what = f"a whole number from {least} " + ("on" if most is None else f"to {most}")
        others = {
            "patience": 3,
            "seeds": 5,
            "accumulate": 4,
            "precision": '"bf16"',
            "measure_on_training_rows": "true",
        }
        example = {**TRAINING_DEFAULTS, **others}[name]
        example = f"{example:g}%" if isinstance(example, Percent) else example
        return None if fine else (f"`{name}` is {what}", f"write `{name}: {example}`")

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        return rows

    def describe(self, operand: str, options: Mapping[str, Constant]) -> str:
        return operand

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        """Return the directions of a trained rotation; dictionaries aren't linear maps."""
        return LinearMap(given.matrix())
