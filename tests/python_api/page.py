"""The reference part of docs/python.md, from the docstrings of the public names."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import mechdsl

PAGE = Path(__file__).parents[2] / "docs" / "python.md"

START = "## Reference\n"
"""The heading of the generated part, which is the last one."""

NOTE = "<!-- Written by `make python-page` from the docstrings. -->"

FUNCTIONS = (
    "run", "fit", "validate", "plan", "graph", "explain", "runs", "diff", "export", "objective",
)  # fmt: skip

CLASSES = (
    "Results",
    "TrainedFit",
    "ExperimentResult",
    "Diagnostics",
    "Diagnostic",
    "MechdslError",
    "MechdslWarning",
    "Runs",
    "Run",
    "Differences",
    "VerdictComparison",
    "ExportedModel",
    "Objective",
)

_SECTIONS = ("Args", "Returns", "Raises")


@dataclass
class Docstring:
    """A docstring in Google style."""

    text: str = ""
    args: dict[str, str] = field(default_factory=dict[str, str])
    returns: str = ""
    raises: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def summary(self) -> str:
        return self.text.split("\n\n", maxsplit=1)[0]


def read_docstring(value: object) -> Docstring:
    """Parse the docstring of a function, a class or a property."""
    found = Docstring()
    parts = re.split(rf"^({'|'.join(_SECTIONS)}):\n", inspect.getdoc(value) or "", flags=re.M)
    found.text = "\n\n".join(_joined(each) for each in parts[0].split("\n\n")).strip()
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        if name == "Returns":
            found.returns = _joined(body)
        else:
            entries = dict(_entries(body))
            (found.args if name == "Args" else found.raises).update(entries)
    return found


def _joined(text: str) -> str:
    return " ".join(text.split())


def _entries(body: str) -> Iterator[tuple[str, str]]:
    for entry in re.split(r"\n(?=\S)", dedent(body).strip()):
        name, _, text = entry.partition(":")
        yield name, _joined(text)


def attribute_docstrings(kind: type) -> dict[str, str]:
    """Return the texts after the fields of a class, by name."""
    tree = ast.parse(dedent(inspect.getsource(kind)))
    (definition,) = tree.body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for line, after in zip(definition.body, definition.body[1:], strict=False):
        match line, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(value=str(text))):
                found[name] = _joined(text)
            case _:
                pass
    return found


def members(kind: type) -> list[str]:
    """Return the public names of a class in source order, without those of `list` and Exception."""
    inherited = {name for base in kind.__mro__[1:] for name in dir(base)}
    own = [*getattr(kind, "__dataclass_fields__", ()), *inspect.get_annotations(kind), *vars(kind)]
    return [
        name
        for name in dict.fromkeys(own)
        if not name.startswith("_") and (name in vars(kind) or name not in inherited)
    ]


def signature_of(name: str, function: object) -> str:
    """Return a call with one parameter per line and the default values."""
    assert callable(function)
    found = inspect.signature(function)
    lines: list[str] = []
    keyword = False
    for each in found.parameters.values():
        if each.name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and not keyword:
            lines.append("*")
            keyword = True
        default = "" if each.default is each.empty else f" = {each.default!r}"
        lines.append(f"{each.name}: {each.annotation}{default}")
    result = f" -> {found.return_annotation}"
    flat = f"{name}({', '.join(lines)}){result}"
    if len(flat) <= 88:
        return flat
    return f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + f"){result}"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |"
    yield "|---|---|"
    for name, text in rows:
        yield f"| `{name}` | {text.replace('|', chr(92) + '|')} |"
    yield ""


def _function(title: str, function: object, marks: str, *, name: str) -> Iterator[str]:
    own = read_docstring(function)
    yield f"{marks} `{title}`"
    yield ""
    yield "```py"
    yield signature_of(name, function)
    yield "```"
    yield ""
    yield own.text
    yield ""
    assert callable(function)
    names = [each for each in inspect.signature(function).parameters if each != "self"]
    described = read_docstring(mechdsl.run).args if "other arguments" in own.text else {}
    told = {
        each: own.args.get(each) or ("As for `run`." if each in described else "") for each in names
    }
    rows = [(each, text) for each, text in told.items() if text]
    if rows:
        yield from _table(("argument", "meaning"), rows)
    if own.returns:
        yield f"Returns: {own.returns}"
        yield ""
    for error, text in own.raises.items():
        yield f"Raises `{error}`: {text}"
        yield ""


def _class(name: str) -> Iterator[str]:
    kind = getattr(mechdsl, name)
    yield f"### `{name}`"
    yield ""
    yield read_docstring(kind).text
    yield ""
    texts = attribute_docstrings(kind)
    rows: list[tuple[str, str]] = []
    detailed: list[str] = []
    for member in members(kind):
        value = inspect.getattr_static(kind, member, None)
        called = inspect.isfunction(value)
        if called or not (text := texts.get(member, "")):
            own = read_docstring(value)
            text = own.summary
            if called and (own.args or own.raises or own.text != own.summary):
                detailed.append(member)
        rows.append((f"{member}()" if called else member, text))
    if rows:
        yield from _table(("name", "meaning"), rows)
    for member in detailed:
        yield from _function(f"{name}.{member}", getattr(kind, member), "####", name=member)


def reference() -> str:
    """Return the generated part of the page, from its heading to the end."""
    lines = [START.rstrip("\n"), "", NOTE, "", "### `mechdsl`", ""]
    rows = [
        (name, read_docstring(getattr(mechdsl, name)).summary) for name in (*FUNCTIONS, *CLASSES)
    ]
    lines += _table(("name", "meaning"), rows)
    for name in FUNCTIONS:
        lines += _function(name, getattr(mechdsl, name), "###", name=f"mechdsl.{name}")
    for name in CLASSES:
        lines += _class(name)
    return "\n".join(lines).rstrip() + "\n"


def page() -> str:
    """Return the page with its reference part rebuilt."""
    return PAGE.read_text(encoding="utf-8").split(START)[0] + reference()
