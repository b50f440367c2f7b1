"""Trainers of the user's Python files: `fit(python("own.py:Trainer", features: 64), …)`.

A trainer is a subclass of `torch.nn.Module`. Its methods determine what it makes, so that a file is
checked without running the class.
"""

from __future__ import annotations

import ast as python
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from mechdsl.base.limits import is_integer
from mechdsl.base.records import Record
from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.names import PythonNotFound
from mechdsl.dictionaries.folder import TENSORS, Architecture
from mechdsl.program.direction_methods import Problem
from mechdsl.program.python_functions import (
    PythonFunction,
    find_function,
    is_python_call,
    top_level_definitions,
)
from mechdsl.program.spec import Constant
from mechdsl.program.trainers import (
    TRAINERS,
    DictionaryOutline,
    IterativeTrainer,
    MaskTrainer,
    RotationTrainer,
    Trainer,
    VectorTrainer,
)
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from torch import Generator, Tensor, device

    from mechdsl.fits.own_modules import (
        OwnDictionary,
        OwnGates,
        OwnModule,
        OwnRotation,
        OwnVector,
    )


class Parameters(Record):
    """Parameters of a method, without `self`."""

    required: tuple[str, ...]
    optional: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


class PythonClass(Record):
    """A class that was found but not yet run."""

    function: PythonFunction
    """Creates an object."""
    methods: Mapping[str, Parameters]
    """Those of the class and of its base classes in the same file."""
    texts: Mapping[str, str]
    """Class attributes that are texts."""
    has_base: bool
    """Whether a base class is imported, such as `torch.nn.Module`."""

    def __hash__(self) -> int:
        return hash(self.function)


def find_class(node: ast.Call) -> tuple[PythonClass | None, list[Diagnostic]]:
    """Find the class that `python("file.py:Name")` refers to, without running any of it.

    Codes: E0222, E0532, E0535.
    """
    function, problems = find_function(node, "trainer")
    if function is None:
        return None, problems
    tree = python.parse(function.path.read_bytes(), filename=function.file)
    classes = {
        each.name: each for each in top_level_definitions(tree) if isinstance(each, python.ClassDef)
    }
    bases = [*_with_bases(classes[function.name], classes)]
    methods: dict[str, Parameters] = {}
    texts: dict[str, str] = {}
    for each in reversed(bases):
        for statement in each.body:
            match statement:
                case python.FunctionDef(name=name):
                    methods[name] = _parameters(statement.args)
                case (
                    python.Assign(targets=[python.Name(id=name)], value=python.Constant(value=text))
                    | python.AnnAssign(
                        target=python.Name(id=name), value=python.Constant(value=text)
                    )
                ) if isinstance(text, str):
                    texts[name] = text
                case _:
                    pass
    written = [base for each in bases for base in each.bases]
    has_base = any(not isinstance(base, python.Name) or base.id not in classes for base in written)
    return PythonClass(function, methods, texts, has_base), []


def _with_bases(
    own: python.ClassDef, classes: Mapping[str, python.ClassDef]
) -> Iterator[python.ClassDef]:
    """Yield a class, and then its base classes that are defined before it in the same file."""
    yield own
    for base in own.bases:
        found = classes.get(base.id) if isinstance(base, python.Name) else None
        if found is not None and found.lineno < own.lineno:
            yield from _with_bases(found, classes)


def _parameters(own: python.arguments) -> Parameters:
    places = [each.arg for each in (*own.posonlyargs, *own.args)]
    count = len(places) - len(own.defaults)
    names = [each.arg for each in own.kwonlyargs]
    named = list(zip(names, own.kw_defaults, strict=True))
    required = (name for name, default in named if default is None)
    optional = (name for name, default in named if default is not None)
    return Parameters((*places[1:count], *required), (*places[max(1, count) :], *optional))


class OwnTrainer(Trainer):
    """A class of a Python file."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]]
    """Those that the class must have → the arguments that they are called with."""
    given: ClassVar[str]
    """The argument of `__init__` that isn't an option."""
    sizes: ClassVar[tuple[str, ...]] = ()
    """Options that are known before training: positive whole numbers that a call must have."""

    def __init__(self, own: PythonClass) -> None:
        """Describe a class that `find_problem` has nothing against."""
        self.own, self.name = own, own.function.name
        parameters = own.methods["__init__"]
        self.options = tuple(name for name in parameters.names if name != self.given)
        required = (name for name in parameters.required if name != self.given)
        self.required = tuple(dict.fromkeys((*self.needed_sizes(own), *required)))
        given = "".join(f", {name}: 8" for name in self.required)
        self.example = f'python("{own.function.file}:{self.name}"{given})'

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OwnTrainer) and self.own == other.own

    def __hash__(self) -> int:
        return hash(self.own)

    @classmethod
    def needed_sizes(cls, own: PythonClass) -> tuple[str, ...]:
        """Return the options of a class that are known before training."""
        return cls.sizes

    @classmethod
    def find_problem(cls, own: PythonClass) -> Problem | None:
        """Return the reason that a class with the methods can't be used, or None."""
        name = own.function.name
        created = own.methods.get("__init__", Parameters((), ()))
        needs = (cls.given, *cls.needed_sizes(own))
        missing = [each for each in needs if each not in created.names]
        if missing:
            reason = f"`{name}.__init__` has no parameter `{missing[0]}`"
            return reason, f"write `def __init__(self, {', '.join(needs)}):`"
        for method, arguments in cls.methods.items():
            found = own.methods[method]
            count = len([each for each in found.required if each != "progress"])
            if count > len(arguments) or len(found.names) < len(arguments):
                written = ", ".join(("self", *arguments))
                reason = f"`{name}.{method}` is called with {len(arguments) or 'no'} arguments"
                reason = reason.removesuffix("s") if len(arguments) == 1 else reason
                return reason, f"write `def {method}({written}):`"
        return None

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if value is None:
            return f"`{name}` isn't a constant", f"write a number or a text: `{name}: 8`"
        whole = is_integer(value, least=1)
        if name in self.needed_sizes(self.own) and not whole:
            return f"`{name}` is a whole number from 1 on", f"write `{name}: 8`"
        return None

    def open(
        self, given: object, options: Mapping[str, Constant], seed: int, like: Tensor
    ) -> OwnModule:
        """Run the file, and create the object. Raises PythonFailure.

        Args:
            given: The argument that isn't an option.
            seed: Determines random numbers of the object.
            like: A tensor whose device and dtype its parameters get.
        """
        from mechdsl.fits.own_modules import OwnModule

        function, named = self.own.function, {**options, self.given: given}
        create = partial(function.load(), **named)
        return OwnModule(create, self.name, function.failure, seed, like)


def _draw_seed(random: Generator) -> int:
    import torch

    return int(torch.randint(2**62, (1,), generator=random))


class OwnDictionaryTrainer(OwnTrainer, IterativeTrainer):
    """A dictionary in a known architecture, with a loss of the user's own."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = {"loss": ("vectors",), "weights": ()}
    given = "width"
    sizes = ("features",)
    architectures: ClassVar[tuple[Architecture, ...]] = ("standard", "topk", "jumprelu", "gated")

    @classmethod
    def architecture(cls, own: PythonClass) -> Architecture | None:
        """Return the architecture of the dictionary that a class trains; None if it is unknown."""
        written = own.texts.get("architecture", "standard")
        return next((each for each in cls.architectures if each == written), None)

    @classmethod
    def needed_sizes(cls, own: PythonClass) -> tuple[str, ...]:
        return (*cls.sizes, "k") if cls.architecture(own) == "topk" else cls.sizes

    @classmethod
    def find_problem(cls, own: PythonClass) -> Problem | None:
        if cls.architecture(own) is None:
            known = name_list(f'"{each}"' for each in cls.architectures)
            return f"there is no architecture `{own.texts['architecture']}`", f"it can be {known}"
        return super().find_problem(own)

    def outline(self, options: Mapping[str, Constant]) -> DictionaryOutline:
        architecture = self.architecture(self.own)
        assert architecture is not None
        k = int(options["k"]) if architecture == "topk" else None
        return DictionaryOutline(architecture, int(options["features"]), k)

    def check(self, options: Mapping[str, Constant]) -> Problem | None:
        if "k" in self.needed_sizes(self.own) and int(options["k"]) > int(options["features"]):
            said = f"`k: {options['k']}` is more than `features: {options['features']}`"
            return said, "write a smaller `k`"
        return None

    def start(
        self,
        widths: tuple[int, int],
        options: Mapping[str, Constant],
        random: Generator,
        device: device,
    ) -> OwnDictionary:
        import torch

        from mechdsl.fits.own_modules import OwnDictionary

        outline, (_, width) = self.outline(options), widths
        features = outline.features
        shapes = {"W_enc": (width, features), "W_dec": (features, width), "b_dec": (width,)}
        wanted = {each: shapes.get(each, (features,)) for each in TENSORS[outline.architecture]}
        like = torch.zeros((), device=device)
        return OwnDictionary(self.open(width, options, _draw_seed(random), like), wanted)


class OwnVectorTrainer(OwnTrainer, VectorTrainer):
    """A vector that is added, with a parametrization or a penalty of the user's own."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = {"vector": ()}
    given = "vectors"

    def start(self, like: Tensor, options: Mapping[str, Constant], random: Generator) -> OwnVector:
        from mechdsl.fits.own_modules import OwnVector

        return OwnVector(self.open(like, options, _draw_seed(random), like), like)


class OwnRotationTrainer(OwnTrainer, RotationTrainer):
    """A subspace, with a parametrization or a penalty of the user's own."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = {"directions": ()}
    given = "vectors"
    sizes = ("dims",)

    def size(self, options: Mapping[str, Constant], width: int) -> int:
        return int(options["dims"])

    def start(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> OwnRotation:
        from mechdsl.fits.own_modules import OwnRotation

        module = self.open(like, options, _draw_seed(random), like)
        return OwnRotation(module, (int(options["dims"]), like.shape[1]))


class OwnMaskTrainer(OwnTrainer, MaskTrainer):
    """A mask, with gates of the user's own."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = {"probabilities": (), "sample": ("rows",)}
    given = "count"
    sizes = ("size",)

    def size(self, options: Mapping[str, Constant]) -> int:
        return int(options["size"])

    def start(self, count: int, options: Mapping[str, Constant], seed: int) -> OwnGates:
        import torch

        from mechdsl.fits.own_modules import OwnGates

        module = self.open(count, options, seed, torch.zeros((), dtype=torch.float64))
        return OwnGates(module, count, self.size(options), seed)


OWN_TRAINERS: tuple[type[OwnTrainer], ...] = (
    OwnDictionaryTrainer,
    OwnVectorTrainer,
    OwnRotationTrainer,
    OwnMaskTrainer,
)


def find_own_trainer(call: ast.Call) -> tuple[OwnTrainer | None, list[Diagnostic]]:
    """Find the trainer of `python("own.py:Trainer", …)`, without running any of it.

    Codes: E0222, E0532, E0535.
    """
    own, problems = find_class(call)
    if own is None:
        return None, problems
    found = [each for each in OWN_TRAINERS if {*each.methods} <= {*own.methods}]
    if not own.has_base:
        problem = "it has no base class", f"write `class {own.function.name}(torch.nn.Module):`"
    elif len(found) == 1:
        problem = found[0].find_problem(own)
    else:
        problem = _method_problem(own, found)
    if problem is None:
        return found[0](own), []
    written = f'python("{own.function.file}:{own.function.name}")'
    reason, hint = problem
    return None, [PythonNotFound(span=call.span, written=written, reason=reason, hint=hint)]


def _method_problem(own: PythonClass, found: Sequence[type[OwnTrainer]]) -> Problem:
    """Return the problem with a class that makes nothing or several things."""
    name = own.function.name
    if found:
        listed = name_list(method for each in found for method in each.methods)
        return f"`{name}` makes several things: it defines {listed}", "write one class for each"
    for each in OWN_TRAINERS:
        lacks = [method for method in each.methods if method not in own.methods]
        if len(lacks) < len(each.methods):
            written = ", ".join(("self", *each.methods[lacks[0]]))
            reason = f"`{name}` has no method `{lacks[0]}`"
            return reason, f"define it: `def {lacks[0]}({written}):`"
    makes = {"`loss` and `weights`": "a dictionary", "`vector`": "a direction"}
    makes |= {"`directions`": "a rotation", "`probabilities` and `sample`": "a mask"}
    listed = ", ".join(f"{methods} for {what}" for methods, what in makes.items())
    return f"`{name}` has no method of a trainer", f"define {listed}"


def find_trainer(call: ast.Call) -> Trainer | None:
    """Return the trainer of a call such as `das(dims: 2)` or `python("own.py:Trainer")`; None for
    an unknown one."""
    return find_own_trainer(call)[0] if is_python_call(call) else TRAINERS.get(call.name)


def trainer_arguments(call: ast.Call) -> Sequence[ast.Argument]:
    """Return the arguments of such a call that are options."""
    return call.arguments[1:] if is_python_call(call) else call.arguments
