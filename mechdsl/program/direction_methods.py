"""Registry of direction methods: the functions of a file that make a direction, `NAME(…)`.

A method that computes its vector from activations is one class under `direction_method`. A module
outside the package adds a method with such a class, when it is imported before a file is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, cast

from mechdsl.base.limits import is_integer, is_number
from mechdsl.base.records import Record, Registry, attribute_problem
from mechdsl.base.text import name_list
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
    listed = f"write one of {name_list([quoted(each) for each in kinds])}"
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
        rows = " and ".join(each.text for each in samples)
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
    return DIRECTION_METHODS.class_decorator(name, _class_problem)


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


def _class_problem(name: str, entry: object) -> str | None:
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
    found = DIRECTION_METHODS[name]
    assert isinstance(found, FittedMethod)
    return found


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
    found: object = call_method(method, function, *arguments)
    if found is None:
        return None
    pair = cast("tuple[object, ...]", found) if isinstance(found, tuple) else ()
    match pair:
        case (str(reason), str(hint)):
            return reason, hint
        case _:
            said = "must return None or two texts, the problem and the fix"
            raise MethodError(method, function, f"returned {found!r}; it {said}")


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
    found: object = call_method(method, "default_options", samples)
    if not isinstance(found, Mapping):
        raise MethodError(method, "default_options", f"returned {found!r}; it must return a dict")
    values = cast("Mapping[object, object]", found)
    for name, value in values.items():
        if name not in method.options or not isinstance(value, bool | int | float | str):
            said = "must name options, with numbers or texts as values"
            raise MethodError(method, "default_options", f"returned {found!r}; it {said}")
    return cast("Mapping[str, Constant]", values)


def description(
    method: FittedMethod, samples: Sequence[RowSummary], options: Mapping[str, Constant]
) -> str:
    """Return the description of a fit. Raises MethodError."""
    found: object = call_method(method, "describe", samples, options)
    if not isinstance(found, str) or not found:
        raise MethodError(method, "describe", f"returned {found!r}; it must return a text")
    return found


def fitted_vector(
    method: FittedMethod, samples: Sequence[RowVectors], options: Mapping[str, Constant], width: int
) -> Floats:
    """Return the vector of a fit, [width] float64. Raises MethodError and what `fit` raises."""
    found: object = call_method(method, "fit", samples, options)
    import numpy as np

    if not isinstance(found, np.ndarray) or not np.issubdtype(found.dtype, np.floating):
        kind = found.dtype if isinstance(found, np.ndarray) else type(found).__name__
        said = "it must return an array of float64"
        raise MethodError(method, "fit", f"returned `{kind}`; {said}")
    if found.shape != (width,):
        said = f"it must return [{width}], one number per coordinate"
        raise MethodError(method, "fit", f"returned the shape {list(found.shape)}; {said}")
    if type(method).__module__.partition(".")[0] != _PACKAGE and not np.isfinite(found).all():
        raise MethodError(method, "fit", "returned NaN or infinity")
    return np.ascontiguousarray(found, dtype=np.float64)


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

        a, b = (each.mean() for each in samples)
        found = a - b
        scale = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)))
        least = ROUNDING_UNITS * samples[0].rounding * scale
        count = min(each.count for each in samples)
        small = float(np.linalg.norm(found)) <= least / count**0.5
        return np.zeros_like(found) if small else found


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
        classes = np.array([names.index(each) for each in rows.targets], dtype=np.int64)
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
