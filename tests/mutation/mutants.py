"""Small changes to the source of a module, one at a time.

Annotations, strings, messages, asserts, raised exceptions and `__repr__` aren't changed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

SWAPPED_NAMES = {
    left: right
    for pair in (
        ("min", "max"),
        ("any", "all"),
        ("minimum", "maximum"),
        ("argmin", "argmax"),
        ("amin", "amax"),
        ("logical_and", "logical_or"),
        ("zeros", "ones"),
        ("zeros_like", "ones_like"),
        ("floor", "ceil"),
        ("union", "intersection"),
    )
    for left, right in (pair, pair[::-1])
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
SYMMETRIC = frozenset({"min", "max", "np.minimum", "np.maximum"})
"""Calls whose arguments may be swapped."""
COLLECTING = frozenset({"add", "append", "extend", "update", "setdefault", "clear", "at"})
"""Methods whose call as a statement can be left out."""
KEYED = frozenset({"add", "get", "setdefault", "pop", "sorted", "number", "_number", "hash"})
"""Calls whose tuples are keys."""


@dataclass(frozen=True)
class Mutant:
    """One change."""

    kind: str
    module: str
    """Path below the package, as `planner/cost.py`."""
    function: str
    """Qualified name; empty at the top of the module."""
    before: str
    after: str
    count: int
    """Index among changes with the same text in the function."""
    lines: tuple[int, int]
    """First and last line of the statement, or of the head of one that has a body."""
    in_body: bool
    """Whether the change runs in a function, not at import."""
    source: str
    """Source of the changed module."""

    @property
    def name(self) -> str:
        again = f" (no. {self.count + 1})" if self.count else ""
        return f"{self.module}:{self.function}{again}: {self.before} → {self.after}"

    def is_python(self) -> bool:
        """Whether the changed module compiles."""
        try:
            compile(self.source, self.module, "exec")
        except SyntaxError:
            return False
        return True


def mutants(module: str, source: str) -> list[Mutant]:
    """All changes of a module, in the order of its text."""
    tree = ast.parse(source)
    raw = source.encode()
    starts = [0]
    for line in raw.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    found: list[Mutant] = []
    counts: dict[tuple[str, str, str], int] = {}
    for kind, place, node, text in _walk(tree, _Place((), (1, 1), in_body=False), None):
        begin = starts[node.lineno - 1] + node.col_offset
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        end = starts[node.end_lineno - 1] + node.end_col_offset
        changed = (raw[:begin] + text.encode() + raw[end:]).decode()
        before, after = _short(ast.unparse(node), text)
        function = ".".join(place.path)
        key = (function, before, after)
        count = counts[key] = counts.get(key, -1) + 1
        found.append(
            Mutant(
                kind, module, function, before, after, count, place.lines, place.in_body, changed
            )
        )
    return found


def _short(before: str, after: str) -> tuple[str, str]:
    """Both texts on one line; long ones are cut to the context of the difference."""
    before, after = " ".join(before.split()), " ".join(after.split())
    if after.startswith("(") and after.endswith(")"):
        after = after[1:-1]
    head = 0
    while head < min(len(before), len(after)) and before[head] == after[head]:
        head += 1
    begin = max(0, head - 40)
    if begin < 12:
        begin = 0
    cut = [text[begin : begin + 90] for text in (before, after)]
    return tuple(  # type: ignore[return-value]
        ("…" if begin else "") + part + ("…" if begin + 90 < len(text) else "")
        for part, text in zip(cut, (before, after), strict=True)
    )


@dataclass(frozen=True)
class _Place:
    path: tuple[str, ...]
    lines: tuple[int, int]
    in_body: bool


def _walk(
    node: ast.AST, place: _Place, parent: ast.AST | None
) -> Iterator[tuple[str, _Place, ast.expr | ast.stmt, str]]:
    """(kind, where, what, text in its place)"""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
        return
    if isinstance(node, ast.stmt):
        body = getattr(node, "body", None)
        last = body[0].lineno - 1 if body else node.end_lineno
        assert last is not None
        place = replace(place, lines=(node.lineno, max(last, node.lineno)))
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        if node.name in ("__repr__", "__str__"):
            return
        place = replace(place, path=(*place.path, node.name))
    if isinstance(node, ast.expr | ast.stmt):
        for kind, text in _changes(node, parent):
            yield kind, place, node, text
    for child in _children(node):
        enters = isinstance(node, ast.FunctionDef) and isinstance(child, ast.stmt)
        inner = replace(place, in_body=True) if enters and not place.in_body else place
        yield from _walk(child, inner, node)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    skipped: list[ast.AST] = []
    if isinstance(node, ast.FunctionDef):
        skipped += [*node.decorator_list, *([node.returns] if node.returns else [])]
    elif isinstance(node, ast.ClassDef):
        skipped += [*node.decorator_list, *node.bases, *node.keywords]
    elif isinstance(node, ast.arg):
        return
    elif isinstance(node, ast.AnnAssign):
        skipped.append(node.annotation)
    elif isinstance(node, ast.match_case):
        skipped.append(node.pattern)
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name == "isinstance":
            skipped += node.args[1:]
        elif name == "cast":
            skipped += node.args[:1]
        elif name == "TypeVar":
            return
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield child


def _changes(node: ast.expr | ast.stmt, parent: ast.AST | None) -> Iterator[tuple[str, str]]:
    """(kind, text in its place)"""
    if isinstance(node, ast.expr) and _is_condition(node, parent):
        yield "guard", "(True)"
        yield "guard", "(False)"
        if not isinstance(node, ast.Compare):
            yield "negation", f"(not ({ast.unparse(node)}))"
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                ops = [*node.ops[:i], COMPARISONS[type(op)](), *node.ops[i + 1 :]]
                yield "comparison", _text(ast.Compare(node.left, ops, node.comparators))
                if isinstance(op, ast.Lt | ast.Gt):
                    other = ast.Gt() if isinstance(op, ast.Lt) else ast.Lt()
                    ops = [*node.ops[:i], other, *node.ops[i + 1 :]]
                    yield "comparison", _text(ast.Compare(node.left, ops, node.comparators))
        case ast.BoolOp():
            other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield "negation", _text(ast.BoolOp(other, node.values))
            for rest in _without_one(node.values):
                yield "guard", _text(rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))
        case ast.BinOp(left=left, right=right, op=op):
            strings = any(
                isinstance(side, ast.JoinedStr)
                or (isinstance(side, ast.Constant) and isinstance(side.value, str))
                for side in (left, right)
            )
            if type(op) in ARITHMETIC and not strings:
                yield "arithmetic", _text(ast.BinOp(left, ARITHMETIC[type(op)](), right))
        case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
            yield "negation", _text(operand)
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            yield "arithmetic", _text(operand)
        case ast.Constant(value=bool() as value):
            yield "constant", str(not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", f"({value + 1})"
            yield "constant", f"({value - 1})"
        case ast.Call():
            yield from _calls(node)
        case ast.Attribute(attr=attr) if attr in SWAPPED_NAMES:
            if isinstance(node.ctx, ast.Load):
                yield "extreme", _text(ast.Attribute(node.value, SWAPPED_NAMES[attr], ast.Load()))
        case ast.Name(id=name) if name in SWAPPED_NAMES and isinstance(node.ctx, ast.Load):
            yield "extreme", SWAPPED_NAMES[name]
        case ast.Tuple(elts=elements) | ast.Set(elts=elements) if len(elements) > 1:
            if isinstance(node, ast.Set) or _is_key(node, parent):
                for rest in _without_one(elements):
                    other = ast.Set(rest) if isinstance(node, ast.Set) else ast.Tuple(rest)
                    yield "element", _text(other)
        case ast.Subscript(slice=ast.Slice() as index):
            for end in ("lower", "upper"):
                at = getattr(index, end)
                if at is not None and not isinstance(at, ast.Constant):
                    ends = {"lower": index.lower, "upper": index.upper, "step": index.step}
                    ends[end] = ast.BinOp(at, ast.Add(), ast.Constant(1))
                    yield "index", ast.unparse(ast.Subscript(node.value, ast.Slice(**ends)))
        case ast.AugAssign() | ast.Continue() | ast.Break():
            yield "statement", "pass"
        case ast.Assign(targets=[ast.Subscript()]):
            yield "statement", "pass"
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr=attr))) if attr in COLLECTING:
            yield "statement", "pass"
        case _:
            pass


def _calls(node: ast.Call) -> Iterator[tuple[str, str]]:
    for i, keyword in enumerate(node.keywords):
        # Lengths are checked, and types are what they are anyway.
        if keyword.arg not in (None, "strict") and not ast.unparse(keyword).startswith("dtype=np."):
            rest = node.keywords[:i] + node.keywords[i + 1 :]
            yield "keyword", _text(ast.Call(node.func, node.args, rest))
    for i, (one, other) in enumerate(zip(node.args, node.args[1:], strict=False)):
        same = ast.unparse(one) == ast.unparse(other) or ast.unparse(node.func) in SYMMETRIC
        if type(one) is type(other) and isinstance(one, ast.Name | ast.Attribute) and not same:
            args = [*node.args[:i], other, one, *node.args[i + 2 :]]
            yield "swap", _text(ast.Call(node.func, args, node.keywords))
    if isinstance(node.func, ast.Name) and node.func.id == "range":
        end = 0 if len(node.args) == 1 else 1
        for change in (ast.Add(), ast.Sub()):
            args = list(node.args)
            args[end] = ast.BinOp(args[end], change, ast.Constant(1))
            yield "index", _text(ast.Call(node.func, args, []))


def _is_condition(node: ast.expr, parent: ast.AST | None) -> bool:
    match parent:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            return node is test
        case ast.comprehension(ifs=ifs):
            return any(node is test for test in ifs)
        case _:
            return False


def _is_key(node: ast.Tuple, parent: ast.AST | None) -> bool:
    if not isinstance(node.ctx, ast.Load):
        return False
    match parent:
        case ast.Dict(keys=keys):
            return any(node is key for key in keys)
        case ast.DictComp(key=key):
            return node is key
        case ast.SetComp() | ast.Lambda() | ast.Compare():
            return True
        case ast.Call(func=func):
            return ast.unparse(func).rpartition(".")[2] in KEYED
        case ast.Assign(targets=[target]):
            return "key" in ast.unparse(target)
        case ast.AnnAssign() | ast.Return():
            return isinstance(parent, ast.AnnAssign)
        case _:
            return False


def _without_one(nodes: Sequence[ast.expr]) -> Iterator[list[ast.expr]]:
    for i in range(len(nodes)):
        yield [*nodes[:i], *nodes[i + 1 :]]


def _text(node: ast.expr) -> str:
    return f"({ast.unparse(ast.fix_missing_locations(node))})"
