"""A sandbox for chat templates: Jinja without files, network or time, with bounded work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, NoReturn, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from mechdsl.base import limits
from mechdsl.base.limits import CHAT_DATE

_CHARACTERS_PER_STEP = 20
"""Number of characters that cost as much as a node of the template."""

_LARGE = 1_000_000
"""Maximum base of a power."""

# Filters with linear cost; the others are reimplemented below or omitted.
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse",
    "round", "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper",
    "wordcount",
)  # fmt: skip

_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(
        (
            "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii",
            "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper",
            "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex",
            "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip",
            "swapcase", "title", "upper",
        )
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}  # fmt: skip


class WorkLimitExceeded(TemplateError):
    """A template that exceeds its budget."""


def _fail(what: str) -> NoReturn:
    raise WorkLimitExceeded(what)


class _Budget:
    """The remaining budget of a rendering."""

    def __init__(self) -> None:
        self.left = limits.CHAT_STEPS

    def spend(self, steps: int) -> bool:
        """Spend steps; returns True, so that it can be part of a condition."""
        self.left -= steps
        if self.left < 0:
            _fail(f"it takes more than {limits.CHAT_STEPS:,} steps")
        return True

    def whole(self, value: Any) -> Any:
        """Return the value unless it is too large, counting all contents with repeats."""
        waiting = [value]
        characters = 0
        while waiting:
            each = waiting.pop()
            if isinstance(each, str):
                characters += len(each)
            elif isinstance(each, Mapping):
                waiting += cast("Mapping[Any, Any]", each).values()
                characters += 1
            elif isinstance(each, Sequence):
                waiting += cast("Sequence[Any]", each)
                characters += 1
            if characters > limits.TEXT or len(waiting) > limits.TEXT:
                _fail(f"it builds a text or list of more than {limits.TEXT:,} parts")
        self.spend(1 + characters // _CHARACTERS_PER_STEP)
        return value


class _Bounds(Extension):
    """The budget of an environment, and the functions that templates call to spend it."""

    tags = {"generation"}  # noqa: RUF012 (declared so in the base class)

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.budget = _Budget()

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse `{% generation %}`, which marks an assistant's text, as its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)

    def spend(self, steps: int) -> bool:
        return self.budget.spend(steps)

    def joined(self, *parts: Any) -> str:
        """Compute the operator `~`."""
        return self.budget.whole("".join(str(self.budget.whole(part)) for part in parts))

    def whole(self, value: Any) -> Any:
        """Return the value unless it is too large."""
        return self.budget.whole(value)


def _sized(bounds: _Bounds, run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that its arguments and its result are bounded."""

    @wraps(run)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        for each in args:
            if isinstance(each, str | list | tuple | dict):
                bounds.whole(each)
        return bounds.whole(run(*args, **kwargs))

    return bounded


def _replaced(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    times = text.count(old)
    if len(text) + times * len(new) > limits.TEXT:
        _fail(f"it builds a text of more than {limits.TEXT:,} characters")
    return text.replace(old, new, -1 if count is None else count)


def _joined(parts: Iterable[Any], sep: str = "", attribute: object = None) -> str:
    if attribute is not None:
        _fail("it uses `join` with an attribute")
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) + len(texts) * len(sep) > limits.TEXT:
        _fail(f"it builds a text of more than {limits.TEXT:,} characters")
    return str(sep).join(texts)


def _joined_by(sep: str, parts: Iterable[Any]) -> str:
    return _joined(parts, sep)


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Format as transformers' templates do: without HTML escapes."""
    if indent is not None and not 0 <= indent <= 16:
        _fail("it indents by more than 16")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raised(message: Any = "") -> NoReturn:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    return CHAT_DATE.strftime(str(form)[:100])


def _numbers(first: int, *more: int) -> range:
    numbers = range(first, *more)
    if len(numbers) > limits.CHAT_STEPS:
        _fail("its range is too long")
    return numbers


def _mapping(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Names(Namespace):
    """`namespace()`, without names that begin with `_`."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"`{name}` can't be set")
        super().__setitem__(name, value)


_CALLED = (_raised, _now, _numbers, _mapping, _Names)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment that a template runs in; one per template."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would run before the bounds are in place
            extensions=[loopcontrols, _Bounds],
        )
        self.bounds = cast("_Bounds", self.extensions[_Bounds.identifier])
        own = {"tojson": _as_json, "replace": _replaced, "join": _joined}
        filters = {name: FILTERS[name] for name in _FILTERS} | own
        self.filters = {name: _sized(self.bounds, run) for name, run in filters.items()}
        self.finalize = self.bounds.whole
        self.globals = {
            "raise_exception": _raised,
            "strftime_now": _now,
            "range": _numbers,
            "dict": _mapping,
            "namespace": _Names,
        }

    def compiled(self, text: str) -> Callable[[Mapping[str, Any]], str]:
        """Compile a template to a function from names to text.

        Raises:
            Exception: `TemplateError`, or any exception that Python raises for an invalid template.
        """
        tree = self.parse(text)
        self._bound(tree)
        template = self.from_string(tree)

        def render(names: Mapping[str, Any]) -> str:
            self.bounds.budget = _Budget()
            return template.render(names)

        return render

    def variables(self, text: str) -> set[str]:
        """Return the names of a template that it doesn't define; those of functions are left out.

        Raises:
            Exception: As `compiled`.
        """
        return find_undeclared_variables(self.parse(text)) - self.globals.keys()

    def _bound(self, tree: nodes.Template) -> None:
        """Make loop rounds and macro calls cost what they contain, and check values that grow."""
        _Grown().visit(tree)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
            assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block)
            cost = nodes.Const(sum(map(_weight, node.find_all(nodes.Node))))
            node.body.insert(0, nodes.ExprStmt(_call("spend", cost)))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(_call("spend", cost), node.test)

    # --- calls --------------------------------------------------------------------------------

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call an object only if it is known to be harmless."""
        on = getattr(obj, "__self__", None)
        name = str(getattr(obj, "__name__", ""))
        if on is self.bounds:
            return context.call(obj, *args, **kwargs)
        if isinstance(on, str) and name in ("replace", "join"):
            made = _replaced if name == "replace" else _joined_by
            return self.bounds.whole(context.call(made, on, *args, **kwargs))
        known = name in _METHODS.get(type(on), ()) or any(obj is each for each in _CALLED)
        inner = isinstance(obj, Macro | LoopContext | BlockReference | Undefined)
        if not (known or inner or isinstance(on, LoopContext)):
            raise SecurityError(f"`{name or type(obj).__name__}` can't be called")
        return self.bounds.whole(context.call(obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        texts = (str, list, tuple)
        numbers = all(isinstance(each, int | float) for each in (left, right))
        if operator == "*" and not numbers:
            size = len(left) if isinstance(left, texts) else len(right)
            times = right if isinstance(left, texts) else left
            if size * times > limits.TEXT:
                _fail(f"it builds a text or list of more than {limits.TEXT:,} parts")
        elif operator in ("**", "%") and not numbers:
            raise SecurityError(f"`{operator}` works only on numbers")
        elif operator == "**" and (abs(left) > _LARGE or abs(right) > 64):
            _fail("it computes a number that is too large")
        value = super().call_binop(context, operator, left, right)
        if isinstance(value, int) and abs(value) > _LARGE**64:
            _fail("it computes a number that is too large")
        return self.bounds.whole(value)


def _weight(node: nodes.Node) -> int:
    """Return the cost of a node; for text it includes its length."""
    text = node.data if isinstance(node, nodes.TemplateData) else ""
    return 1 + len(text) // _CHARACTERS_PER_STEP


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    """Build a call of the extension, under a name that no template can rebind."""
    of = nodes.ExtensionAttribute(_Bounds.identifier, name)
    return nodes.Call(of, list(args), [], None, None)


class _Grown(NodeTransformer):
    """A transformer that adds size checks to everything that can hold the same value twice."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def _whole(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        stored = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if stored else _call("whole", node)

    visit_List = visit_Tuple = visit_Dict = _whole
