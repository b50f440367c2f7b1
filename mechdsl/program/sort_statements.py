"""The statements of an experiment, sorted; E0108 for those that can't be executed yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported, UnexpectedToken
from mechdsl.diagnostics.e02_names import DuplicateName, RepeatedStatement
from mechdsl.program import spec
from mechdsl.program.namespace import Namespace, place
from mechdsl.syntax import ast
from mechdsl.syntax.reserved import STACKS
from mechdsl.syntax.verbs import VERBS
from mechdsl.syntax.walk import numbers_named, walk

if TYPE_CHECKING:
    from mechdsl.program.definitions import Definitions

NodeT = TypeVar("NodeT", bound=ast.Node)

# What the grammar knows and no stage executes yet, by the class of its node.
LATER: dict[type[ast.Node], str] = {
    ast.Discover: "`discover`",
    ast.Search: "`search`",
    ast.ObserveFeatures: "`observe features`",
}

# Of which several stand in one statement.
LISTED: dict[type[ast.Node], str] = {
    ast.FromInto: "keep one of them; several runs are a list: `from A, B into C`",
    ast.UseModel: "keep one of them; several models are a list: `model A, B`",
}


class Statements:
    """Collects the statements of one experiment."""

    def __init__(self, definition: ast.ExperimentDef, parts: Definitions, scope: Namespace) -> None:
        self.definition = definition
        self.parts = parts
        self.scope = scope
        self.models: list[ast.UseModel] = []
        self.prompts: list[ast.UsePrompts] = []
        self.from_into: list[ast.FromInto] = []
        self.keep: list[ast.Expr] = []
        self.loops: list[spec.Loop] = []
        self.rules: list[tuple[ast.Rule, tuple[str, ...]]] = []
        self.observed: list[tuple[ast.Observing, tuple[str, ...]]] = []
        """`observe` lines, with the `for` variables around them."""
        self.measures: list[ast.Measure] = []
        self.stats: list[ast.Stats] = []
        self.reports: list[ast.Report] = []
        self.expects: list[ast.Expect] = []
        self.against: list[ast.Against] = []
        self.generate: list[ast.Generate] = []
        self.using: list[ast.Using] = []
        self.derived: list[ast.RunDef] = []
        self.saves: list[ast.Save] = []
        self.known_runs: dict[str, Span] = {}
        """Names of the runs that are defined so far in the experiment itself."""
        self.elsewhere: dict[str, spec.Elsewhere] = {}
        """Runs of other blocks and models, by their names."""
        self.unsupported = False

    @property
    def diagnostics(self) -> list[Diagnostic]:
        return self.scope.diagnostics

    def later(self, span: Span, what: str) -> None:
        self.unsupported = True
        self.diagnostics.append(NotSupported(span=span, what=what))

    def collect(self, statements: Sequence[ast.Statement], loops: tuple[str, ...] = ()) -> None:
        for statement in statements:
            match statement:
                case ast.Rule():
                    self.rule(statement, loops)
                case ast.Observe() | ast.ObserveAttention() | ast.ObserveMaps():
                    if self._supported(statement):
                        self.observed.append((statement, loops))
                case ast.For():
                    self.loop(statement, loops)
                case ast.RunDef() | ast.Save() if loops:
                    word = "run" if isinstance(statement, ast.RunDef) else "save"
                    self.later(statement.span, f"a `{word}` within a `for`")
                case ast.RunDef():
                    self.derived.append(statement)
                case ast.Save():
                    self.saves.append(statement)
                case ast.UseModel():
                    self.once(statement, self.models, "model")
                case ast.UsePrompts():
                    self.once(statement, self.prompts, "prompts")
                case ast.FromInto():
                    self.once(statement, self.from_into, "from … into …")
                case ast.Stats():
                    self.once(statement, self.stats, "stats")
                case ast.Against():
                    self.once(statement, self.against, "against")
                case ast.Generate():
                    self.once(statement, self.generate, "generate")
                case ast.Using():
                    self.once(statement, self.using, "using")
                case ast.Keep():
                    self.keep.append(statement.condition)
                case ast.Measure():
                    self.measures.append(statement)
                case ast.Report():
                    self.reports.append(statement)
                case ast.Expect():
                    self.expects.append(statement)
                case _:
                    self.later(statement.span, LATER[type(statement)])

    def once(self, statement: NodeT, seen: list[NodeT], what: str) -> None:
        """Keep a statement that may stand once in an experiment."""
        if seen:
            self.diagnostics.append(
                RepeatedStatement(
                    span=statement.span,
                    what=what,
                    block=self.definition.name.id,
                    first=seen[0].span.line,
                    hint=LISTED.get(type(statement), "keep one of them"),
                )
            )
        else:
            seen.append(statement)

    def loop(self, statement: ast.For, loops: tuple[str, ...]) -> None:
        name = statement.name
        taken = next((x for x in self.loops if x.name == name.id), None)
        if taken is not None:
            self.diagnostics.append(
                DuplicateName(span=name.span, name=name.id, first=place(taken.span, name.span))
            )
        else:
            domain = statement.domain
            self.loops.append(spec.Loop(span=name.span, name=name.id, domain=domain, within=loops))
        use_names(statement.domain, self)
        self.collect(statement.body, (*loops, name.id))

    def rule(self, rule: ast.Rule, loops: tuple[str, ...]) -> None:
        """Keep a rule that can be executed; E0108 at the part that can't."""
        before = len(self.diagnostics)
        if isinstance(rule.body, ast.Registered):
            self._amount(rule.body)
        if self._supported(rule) and len(self.diagnostics) == before:
            self.rules.append((rule, loops))

    def _supported(self, statement: ast.Node) -> bool:
        """Whether all parts can be executed; E0108 at those that can't."""
        before = len(self.diagnostics)
        for node in walk(statement):
            if type(node) in LATER:
                self.later(node.span, LATER[type(node)])
            elif isinstance(node, ast.Site) and node.basis is not None:
                self.later(node.span, "a subspace")
            elif isinstance(node, ast.Axis) and node.word == "feature":
                self.later(node.span, f"`{node.word}` sites")
            elif isinstance(node, ast.Edge) and node.stack is not None and node.stack.id in STACKS:
                self.later(node.stack.span, f"attention of the stack `{node.stack.id}`")
        return len(self.diagnostics) == before

    def _amount(self, body: ast.Registered) -> None:
        """E0101 where a verb has another word before its number, or none."""
        takes, verb = VERBS[body.verb.id], body.verb.id
        if takes == body.before:
            return
        span, found = body.span, f"end of the `{verb}` statement"
        if body.value is not None:
            span, found = body.value.span, f"`{body.before} {body.value.span.text}`"
        expected = f"`{takes}` and a number" if takes else f"no number behind `{verb}`"
        self.unsupported = True
        self.diagnostics.append(UnexpectedToken(span=span, found=found, expected=expected))


def use_names(node: ast.Node, work: Statements) -> None:
    """Mark groups and parameters that a rule refers to as used."""
    for part in walk(node):
        if isinstance(part, ast.Name):
            _ = any(work.scope.has(kind, part.id) for kind in ("group", "param", "direction"))
        elif isinstance(part, ast.Index):
            work.scope.has("direction", part.name)
    for name in numbers_named(node):
        work.scope.has("param", name)
