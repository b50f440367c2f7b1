"""What `x in …` ranges over. Ranges stay ranges, so that a huge one costs nothing."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import accumulate
from typing import cast, overload

from mechdsl.base import limits
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import UnknownName, did_you_mean
from mechdsl.diagnostics.e05_data import BadCall, BadValue, NoRows, TooMany, UnknownValue
from mechdsl.prompts.values import Value
from mechdsl.syntax import ast

Constants = Mapping[str, int | float | str | bool]
Words = Callable[[str], Sequence[str] | None]
"""The plain words of a model's tokenizer, by the model's name; None for an unknown name."""


class Steps(Sequence[Value]):
    """`low`, `low + step`, … up to `high`, in decimal arithmetic: 0.3, not 0.30000000000000004."""

    def __init__(self, low: int | float, high: int | float, step: int | float) -> None:
        self._low, self._step = Decimal(str(low)), Decimal(str(step))
        self._whole = all(isinstance(n, int) for n in (low, step))
        self._length = max(0, int((Decimal(str(high)) - self._low) // self._step) + 1)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Value]: ...
    def __getitem__(self, index: int | slice) -> Value | Sequence[Value]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(index)
        value = self._low + index * self._step
        return int(value) if self._whole else float(value)


class Chain(Sequence[Value]):
    """Several sequences behind one another."""

    def __init__(self, parts: Sequence[Sequence[Value]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Value]: ...
    def __getitem__(self, index: int | slice) -> Value | Sequence[Value]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        before = self._ends[part - 1] if part else 0
        return self._parts[part][index - before]

    def __iter__(self) -> Iterator[Value]:
        for part in self._parts:
            yield from part


class _RefusedDomain(Exception):
    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.code)
        self.diagnostic = diagnostic


def make_domain(
    domain: ast.Domain, *, prompts: str, constants: Constants, words: Words | None
) -> tuple[Sequence[Value], list[Diagnostic]]:
    """The values of a domain. Codes: E0201, E0501, E0503, E0506, E0509, E0515."""
    try:
        values = _Maker(prompts, constants, words).values(domain)
    except _RefusedDomain as refused:
        return (), [refused.diagnostic]
    if not len(values):
        hint = "ranges go upwards and include both ends"
        return (), [
            NoRows(span=domain.span, prompts=prompts, reason="this range is empty", hint=hint)
        ]
    return values, []


class _Maker:
    def __init__(self, prompts: str, constants: Constants, words: Words | None) -> None:
        self.prompts = prompts
        self.constants = constants
        self.words = words

    def values(self, domain: ast.Domain) -> Sequence[Value]:
        match domain.values:
            case ast.Range() as inner:
                return self.range(inner, domain.step)
            case ast.ListOf(items=items):
                parts: list[Sequence[Value]] = []
                for item in items:
                    if isinstance(item, ast.Range):
                        parts.append(self.range(item, None))
                    else:
                        parts.append((self.constant(item),))
                return Chain(parts)
            case ast.Call(name="words"):
                return self.words_of(domain.values)
            case other:
                return (self.constant(other),)

    def range(self, node: ast.Range, step: ast.Expr | None) -> Sequence[Value]:
        low, high = self.number(node.low), self.number(node.high)
        by = 1 if step is None else self.number(step)
        if by <= 0:
            assert step is not None
            raise self.bad(step, "steps go upwards", "write a step above 0")
        count = (high - low) / by + 1
        if count > limits.DOMAIN:
            raise _RefusedDomain(
                TooMany(
                    span=node.span,
                    what=f"`{node.span.written}`",
                    amount=f"{count:,.0f} values" if count < 1e30 else f"{count:.0e} values",
                    most=limits.DOMAIN,
                    hint="write a smaller range, or a larger `step`",
                )
            )
        if all(isinstance(n, int) for n in (low, high, by)):
            return range(cast("int", low), cast("int", high) + 1, cast("int", by))
        return Steps(low, high, by)

    def number(self, node: ast.Expr) -> int | float:
        value = self.constant(node)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(node, f"{value!r} is not a number", "ranges go from number to number")
        return value

    def constant(self, node: ast.Expr) -> int | float | str | bool:
        match node:
            case ast.Number(value=value) | ast.String(value=value) | ast.Percent(value=value):
                return value
            case ast.Negative(operand=operand):
                return -self.number(operand)
            case ast.Binary(operator=sign, left=left, right=right) if sign != "/":
                a, b = self.number(left), self.number(right)
                return a + b if sign == "+" else a - b if sign == "-" else a * b
            case ast.Name(id=name) if name in self.constants:
                return self.constants[name]
            case ast.Name(id=name) if name in ("true", "false"):
                return name == "true"
            case ast.Name(id=name):
                otherwise = (
                    "a domain is fixed for all rows: it holds numbers, texts and parameters; "
                    "restrict combinations with `where`"
                )
                hint = did_you_mean(name, self.constants, otherwise)
                raise _RefusedDomain(
                    UnknownValue(span=node.span, prompts=self.prompts, name=name, hint=hint)
                )
            case _:
                hint = "a domain is fixed for all rows: write numbers, texts or parameters"
                if isinstance(node, ast.Call):
                    hint = did_you_mean(node.name, ["words"], hint)
                raise self.bad(node, "it isn't fixed", hint)

    def words_of(self, node: ast.Call) -> Sequence[Value]:
        usage = "words(MODEL)"
        model = node.arguments[0].value if len(node.arguments) == 1 else None
        if not isinstance(model, ast.Name):
            reason = "takes one argument, the name of a model"
            raise _RefusedDomain(BadCall(span=node.span, name="words", reason=reason, usage=usage))
        if self.words is None:
            reason = "the model's tokenizer isn't at hand"
            raise self.bad(node, reason, "write the words in a list")
        found = self.words(model.id)
        if found is None:
            # As it is said where the file's names are bound, so that it is said once.
            raise _RefusedDomain(
                UnknownName(span=model.span, kind="model", name=model.id, hint="define it first")
            )
        return tuple(found)

    def bad(self, node: ast.Node, reason: str, hint: str) -> _RefusedDomain:
        text = node.span.text
        return _RefusedDomain(
            BadValue(span=node.span, expression=text, reason=reason, rows="every row", hint=hint)
        )
