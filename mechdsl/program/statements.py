"""The statements of an experiment by type; E0108 for those that mechdsl can't execute yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

from mechdsl.base import limits
from mechdsl.base.text import SHUFFLED_SUFFIX, Span, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.syntax import (
    BadArgument,
    DuplicateName,
    NotSupported,
    RepeatedStatement,
    UnexpectedToken,
    UnknownName,
)
from mechdsl.program import spec
from mechdsl.program.names import Namespace, line_reference
from mechdsl.program.spec import CLEAN
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import NodeT, depth, number_names, rewrite, walk

if TYPE_CHECKING:
    from mechdsl.program.spec import Definitions


BASIS_HINT = (
    "use a basis in `patch`, `ablate`, `set`, `add`, `scale`, `clamp` and `observe value`, at the "
    "written site, or features as the ends of a `path`"
)

DIMS_HINT = "use `dims` in `patch`, `ablate`, `set`, `add`, `scale`, `clamp` and `observe value`"

# Lists of which a statement takes one item.
LIST_HINTS: dict[type[ast.Node], str] = {
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
        self.observed: list[tuple[ast.AnyObserve, tuple[str, ...]]] = []
        """`observe` lines, with the `for` variables around them."""
        self.measures: list[ast.Measure] = []
        self.stats: list[ast.Stats] = []
        self.reports: list[ast.Report] = []
        self.expects: list[ast.Expect] = []
        self.against: list[ast.ControlLine] = []
        self.generate: list[ast.Generate] = []
        self.using: list[ast.Using] = []
        self.derived: list[ast.RunDef] = []
        self.saves: list[ast.Save] = []
        self.saved_directions: list[ast.SaveDirection] = []
        self.known_runs: dict[str, Span] = {}
        """Names of the runs defined so far in the experiment itself."""
        self.elsewhere: dict[str, spec.ExternalRunSpec] = {}
        """Runs of other blocks and models by name."""
        self.read_groups: dict[Span, tuple[str, str]] = {}
        """Site that names a group of coordinates → the group, and what was read from a file."""
        self.unsupported = False

    @property
    def diagnostics(self) -> list[Diagnostic]:
        return self.scope.diagnostics

    @property
    def directions(self) -> list[str]:
        """Names of directions, and of `for` variables over directions."""
        names = self.scope.names("direction")
        values = [(loop.name, part) for loop in self.loops for part in walk(loop.domain)]
        looped = (name for name, part in values if isinstance(part, ast.Name) and part.id in names)
        return [*names, *looped]

    def later(self, span: Span, what: str, hint: str = NotSupported.later) -> None:
        self.unsupported = True
        self.diagnostics.append(NotSupported(span=span, what=what, later=hint))

    def collect(self, statements: Sequence[ast.Statement], loops: tuple[str, ...] = ()) -> None:
        for statement in map(self._with_coordinates, statements):
            match statement:
                case ast.Rule():
                    for part in self._of_each_basis(statement):
                        self.rule(part, loops)
                case (
                    ast.Observe()
                    | ast.ObserveAttention()
                    | ast.ObserveFeatures()
                    | ast.ObserveMaps()
                ):
                    if self._supported(statement):
                        self.observed.append((statement, loops))
                case ast.For():
                    self.loop(statement, loops)
                case ast.RunDef() | ast.Save() | ast.SaveDirection() if loops:
                    word = "run" if isinstance(statement, ast.RunDef) else "save"
                    self.later(statement.span, f"a `{word}` within a `for`")
                    if isinstance(statement, ast.SaveDirection):  # which may need no prompts
                        self.saved_directions.append(statement)
                case ast.Discover() | ast.Search():
                    self.unsupported = True
                    if loops:  # its other errors are reported
                        word = "discover" if isinstance(statement, ast.Discover) else "search"
                        self.later(statement.span, f"a `{word}` within a `for`")
                case ast.RunDef():
                    self.derived.append(statement)
                case ast.Save():
                    self.saves.append(statement)
                case ast.SaveDirection():
                    self.saved_directions.append(statement)
                case ast.UseModel():
                    self.once(statement, self.models, "model")
                case ast.UsePrompts():
                    self.once(statement, self.prompts, "prompts")
                case ast.FromInto():
                    self.once(statement, self.from_into, "from … into …")
                case ast.Stats():
                    self.once(statement, self.stats, "stats")
                case ast.ControlLine():
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

    def _with_coordinates(self, statement: NodeT) -> NodeT:
        """Return a statement that names the coordinates of groups that a training chooses from,
        where it names such a group as its site: `g` becomes `g features * of f`."""
        groups = {
            name: mask.site.axes
            for name, mask in self.parts.masks.items()
            if mask.site.coordinates is not None
        }

        def change(node: ast.Node) -> ast.Node:
            if not isinstance(node, ast.Site):
                return node
            if node.bare is not None and node.bare.id in groups and node.basis is None:
                axes = groups[node.bare.id]
                self.read_groups[node.span] = node.bare.id, ""
                return replace(node, axes=tuple(replace(axis, span=node.span) for axis in axes))
            alone = (
                replace(item, axes=()) if isinstance(item, ast.Site) and is_group(item) else item
                for item in node.excluded
            )
            return replace(node, excluded=tuple(alone)) if node.excluded else node

        def is_group(site: ast.Site) -> bool:
            if len(site.names) != 1 or site.names[0].id not in groups:
                return False
            self.read_groups[site.span] = site.names[0].id, ""
            return True

        return rewrite(statement, change) if groups else statement

    def _of_each_basis(self, rule: ast.Rule) -> tuple[ast.Rule, ...]:
        """Return a rule for each basis of the group of features that a rule names as its site; the
        rule itself if it names none. Both ends of a path name features of one basis."""
        for end in _list_ends(rule.body):
            for item in end.excluded:
                if isinstance(item, ast.Site):
                    self._join_group(item)
        if isinstance(rule.body, ast.PathRule):
            sender, receiver = map(self._of_one_basis, (rule.body.sender, rule.body.receiver))
            return (replace(rule, body=replace(rule.body, sender=sender, receiver=receiver)),)
        named = getattr(rule.body, "site", None)
        every = self._join_group(named) if isinstance(named, ast.Site) else ()

        def at(site: ast.Site) -> ast.Rule:
            return rewrite(
                rule, lambda node: site if node == named and node.span == site.span else node
            )

        return tuple(map(at, every)) or (rule,)

    def _join_group(self, named: ast.Site) -> Sequence[ast.Site]:
        """Return a site for each basis of the group of features that a site names; empty if it
        names none."""
        word = named.bare if named.basis is None else None
        group = None if word is None else self.parts.groups.get(word.id)
        if group is None or not group.names_features:
            return ()
        self.scope.has("group", group.name)
        if group.made:
            # For trained groups, the experiment prints this and compares the prompts.
            self.read_groups[named.span] = group.name, "" if group.candidates else group.made
        return join_features(group.sites, named)

    def _of_one_basis(self, named: ast.Site) -> ast.Site:
        """Return the features of a group that is an end of a path, or the site itself if it names
        none; E0207 for features of several bases."""
        every = self._join_group(named)
        if len(every) > 1:
            several = name_list([str(site.basis_name) for site in every])
            reason = f"has features of {several}, and an end of a path has those of one basis"
            hint = "define a group for each basis, and write an experiment for each"
            said = named.span.written
            bad = BadArgument(span=named.span, name=said, reason=reason, hint=hint)
            self.diagnostics.append(bad)
            self.unsupported = True
        return every[0] if len(every) == 1 else named

    def once(self, statement: NodeT, seen: list[NodeT], what: str) -> None:
        """Record a statement that may occur once in an experiment."""
        if seen:
            self.diagnostics.append(
                RepeatedStatement(
                    span=statement.span,
                    what=what,
                    block=self.definition.name.id,
                    first=seen[0].span.line,
                    hint=LIST_HINTS.get(type(statement), "keep one of them"),
                )
            )
        else:
            seen.append(statement)

    def loop(self, statement: ast.For, loops: tuple[str, ...]) -> None:
        name = statement.name
        taken = next((x for x in self.loops if x.name == name.id), None)
        if taken is not None:
            self.diagnostics.append(
                DuplicateName(
                    span=name.span, name=name.id, first=line_reference(taken.span, name.span)
                )
            )
        else:
            self._check_loop_name(statement)
            domain = statement.domain
            self.loops.append(spec.Loop(span=name.span, name=name.id, domain=domain, within=loops))
        mark_names_used(statement.domain, self)
        self.collect(statement.body, (*loops, name.id))

    def _check_loop_name(self, loop: ast.For) -> None:
        """Report E0202 for a variable of a `for` that a rule could also read as a definition: with
        the name of a direction or, in a loop over words, of a group or circuit."""
        name, numbers = loop.name, {*self.scope.names("param"), *(x.name for x in self.loops)}
        words = {x.id for x in walk(loop.domain) if isinstance(x, ast.Name)} - numbers
        first = self.scope.definitions.get(name.id)
        kinds = ("direction", *(("group", "circuit") if words else ()))
        if first is not None and first.kind in kinds:
            where = line_reference(first.span, name.span)
            self.diagnostics.append(DuplicateName(span=name.span, name=name.id, first=where))

    def rule(self, rule: ast.Rule, loops: tuple[str, ...]) -> None:
        """Record a rule that can be executed; E0108 at unsupported parts."""
        before = len(self.diagnostics)
        if isinstance(rule.body, ast.RegisteredRule):
            self._amount(rule.body)
        if self._supported(rule) and not has_errors(self.diagnostics[before:]):
            self.rules.append((rule, loops))

    def _supported(self, statement: ast.Node) -> bool:
        """Whether all parts can be executed; E0108 at those that can't."""
        before, whole = len(self.diagnostics), set[Span]()
        for node in walk(statement):
            if isinstance(node, ast.ObserveFeatures):
                known = self.scope.use("basis", node.basis.id, node.basis.span)
                self.unsupported = self.unsupported or not known
            elif isinstance(node, ast.Name) and self._chooses_positions(node.id):
                self._reject_group(node.id, node.span, "chooses positions, not sites")
            elif isinstance(node, ast.SpanTokens) and node.plural != node.each and node.low is None:
                whole.add(node.of.span)
            elif isinstance(node, ast.SpanRef) and self._chooses_positions(node.name):
                if node.span not in whole or node.span.written != node.name:
                    self._reject_group(node.name, node.span, "names several positions")
            elif isinstance(node, ast.SpanRef) and self._is_rejected(node.name):
                self.unsupported = True  # perhaps a group of positions
            elif isinstance(node, ast.Site) and (name := node.basis_name) is not None:
                if self._takes_basis(statement, node):
                    known = name == ast.STANDARD_BASIS or name in {loop.name for loop in self.loops}
                    known = known or self.scope.use("basis", name, node.span)
                    self.unsupported = self.unsupported or not known
                elif name == ast.STANDARD_BASIS:
                    self.later(node.span, "`dims` in this statement", DIMS_HINT)
                else:
                    self.scope.has("basis", name)
                    self.later(node.span, "a basis in this statement", BASIS_HINT)
        return not has_errors(self.diagnostics[before:])

    def _takes_basis(self, statement: ast.Node, site: ast.Site) -> bool:
        """Whether the site of a rule or an `observe` line may be coordinates of a basis."""
        if isinstance(statement, ast.Observe):
            what = statement.what
            word = what.id if isinstance(what, ast.Name) else what.name
            return self.scope.words.observation(word).of_coordinates and statement.site is site
        match statement.body if isinstance(statement, ast.Rule) else None:
            case (
                ast.Patch(site=own)
                | ast.Ablate(site=own)
                | ast.SetSite(site=own)
                | ast.Add(site=own)
                | ast.Scale(site=own)
                | ast.Clamp(site=own, direction=None)
                | ast.ProjectOut(site=own, direction=None)
            ):
                return own is site
            case ast.PathRule(sender=of, receiver=to):
                return site in (of, to) and site.basis_name != ast.STANDARD_BASIS
            case _:
                return False

    def _chooses_positions(self, name: str | None) -> TypeGuard[str]:
        """Whether a name is that of a group of positions that a training chooses, or chose in a
        file."""
        chosen = name in self.parts.masks and self.parts.masks[name].chooses_positions
        return chosen or name in self.parts.positions

    def _is_rejected(self, name: str | None) -> bool:
        """Whether a name is that of a group whose file or training has an error."""
        group = self.parts.groups.get(name or "")
        return group is not None and not group.sites and name not in self.parts.masks

    def _reject_group(self, name: str, span: Span, reason: str) -> None:
        """Report E0207 for a group of positions that isn't named as one."""
        hint = f"write `at {name} tokens`, or `at each {name} token` for one run each"
        self.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
        self.unsupported = True

    def _amount(self, body: ast.RegisteredRule) -> None:
        """Report E0101 if a verb has the wrong word, or none, before its number."""
        takes, verb = self.scope.words.verbs[body.verb.id], body.verb.id
        if takes == body.before:
            return
        span, expectation = body.span, f"end of the `{verb}` statement"
        if body.value is not None:
            span, expectation = body.value.span, f"`{body.before} {body.value.span.text}`"
        expected = f"`{takes}` and a number" if takes else f"no number after `{verb}`"
        self.unsupported = True
        self.diagnostics.append(UnexpectedToken(span=span, found=expectation, expected=expected))


def _list_ends(body: ast.Node) -> list[ast.Site]:
    """Return the sites of a rule, of which a path has two."""
    ends = (getattr(body, name, None) for name in ("site", "sender", "receiver"))
    return [end for end in ends if isinstance(end, ast.Site)]


def read_groups_of(rule: ast.Rule, work: Statements) -> tuple[tuple[str, str], ...]:
    """Return the groups of coordinates that a rule names, also after `except`, and what was read of
    each from a file."""
    ends = _list_ends(rule.body)
    named = (work.read_groups.get(node.span) for end in ends for node in (end, *end.excluded))
    return tuple(dict.fromkeys(group for group in named if group is not None))


def join_features(sites: Sequence[ast.Site], named: ast.Site) -> list[ast.Site]:
    """Return the sites of a group of features with one site for each basis and vector.

    Args:
        named: The site that names the group.
    """
    found: dict[ast.Site, list[ast.AxisValue]] = {}
    for site in sites:
        axis = site.coordinates
        assert axis is not None
        joined = replace(axis, values=(), plural=True, span=named.span)
        axes = tuple(joined if own is axis else own for own in site.axes)
        alone = replace(site, axes=axes, excluded=named.excluded, span=named.span)
        values = found.setdefault(alone, [])
        values += [value for value in axis.values if value not in values]
    return [
        replace(
            site,
            axes=tuple(
                replace(own, values=tuple(values)) if own is site.coordinates else own
                for own in site.axes
            ),
        )
        for site, values in found.items()
    ]


def mark_names_used(node: ast.Node, work: Statements) -> None:
    """Mark groups and parameters that a rule refers to as used."""
    for part in walk(node):
        if isinstance(part, ast.Name):
            kinds = ("group", "circuit", "param", "direction", "basis")
            _ = any(work.scope.has(kind, part.id) for kind in kinds)
        elif isinstance(part, ast.RankedSelection):
            _ = any(work.scope.has(kind, part.of) for kind in ("group", "circuit"))
        elif isinstance(part, ast.SpanRef) and (
            part.name in work.parts.masks or part.name in work.parts.positions
        ):
            work.scope.has("group", part.name)
        elif isinstance(part, ast.Index):
            work.scope.has("direction", part.name)
    for name in number_names(node):
        work.scope.has("param", name)


def resolve_run_name(
    ref: ast.Ref, prompts: spec.Prompts, work: Statements, *, shuffled: bool = False
) -> str | None:
    """Resolve the name of a run: `clean`, a corruption, another block or its corruption, or another
    model.

    Codes: E0201 if it doesn't exist, E0202 if it is ambiguous.

    Args:
        shuffled: Whether rows of another block are randomly assigned to those of the sampled one.
    """
    if ref.part is None and ref.name in work.known_runs:
        return ref.name
    names = [CLEAN, *(c.name for c in prompts.corruptions)]
    blocks, models = work.scope.names("prompts"), work.scope.names("model")
    if ref.part is None and ref.name in names:
        if ref.name in (*blocks, *models):
            first = work.scope.definitions[ref.name]
            what = "model" if first.kind == "model" else "block of prompts"
            where = (
                f"the {what} {line_reference(first.span, ref.span)}; it is also a run of "
                f"`{prompts.name}`"
            )
            work.diagnostics.append(DuplicateName(span=ref.span, name=ref.name, first=where))
        return ref.name
    if ref.name == prompts.name and ref.part in (None, *names):
        return ref.part or CLEAN
    block = work.parts.prompts.get(ref.name)
    if block is not None and block is not prompts and work.scope.has("prompts", ref.name):
        run = ref.part or CLEAN
        if run == CLEAN or run in [c.name for c in block.corruptions]:
            name = ref.name if run == CLEAN else f"{ref.name}.{run}"
            name += SHUFFLED_SUFFIX if shuffled else ""
            there = spec.ExternalRunSpec(
                span=ref.span, name=name, prompts=ref.name, run=run, shuffled=shuffled
            )
            note_external_run(work, there)
            return name
        names, prompts = [CLEAN, *(c.name for c in block.corruptions)], block
        blocks, models = [], []
    if ref.part is None and ref.name in work.parts.models and work.scope.has("model", ref.name):
        note_external_run(work, spec.ExternalRunSpec(span=ref.span, name=ref.name, model=ref.name))
        return ref.name
    known = [*names, *work.known_runs]
    work.diagnostics.append(_unknown_run(ref, prompts, known, blocks, models))
    return None


def note_external_run(work: Statements, run: spec.ExternalRunSpec) -> None:
    work.elsewhere.setdefault(run.name, run)


def _unknown_run(
    ref: ast.Ref,
    prompts: spec.Prompts,
    own: Sequence[str],
    blocks: Sequence[str],
    models: Sequence[str],
) -> Diagnostic:
    runs = name_list(own)
    hint = f"runs of `{prompts.name}` are {runs}"
    others = [*blocks, *(models if len(models) > 1 else ())]
    others = [name for name in others if name != prompts.name]
    if others:
        hint += "; other runs are " + name_list(others)
    written = ref.name if ref.part is None else f"{ref.name}.{ref.part}"
    if written in ("zero", "mean", "resample"):
        hint = f"write `ablate … with {written}` for that; a `patch` reads a run: " + runs
        return UnknownName(span=ref.span, kind="run", name=written, hint=hint)
    own_part = ref.part is not None and ref.name == prompts.name
    hint = did_you_mean(
        ref.name if ref.part is None else ref.part,
        [*own, *others],
        hint,
        written=lambda near: f"{ref.name}.{near}" if own_part and near != CLEAN else near,
    )
    return UnknownName(span=ref.span, kind="run", name=written, hint=hint)


def reject_argument(node: ast.Node, name: str, reason: str, hint: str, work: Statements) -> None:
    work.diagnostics.append(BadArgument(span=node.span, name=name, reason=reason, hint=hint))


def expand_metrics(expression: ast.Expr, parts: Definitions, scope: Namespace) -> ast.Expr:
    """Replace the names of metrics in an expression by their definitions."""
    written = expression
    reason = "is defined in terms of itself"
    for step in range(len(parts.metrics) + 1):
        found = False
        # A name in a metric's argument is a text, a run or a site, even if a metric has the same
        # name.
        arguments = {
            part.span
            for call in walk(expression)
            if isinstance(call, ast.Call)
            for part in walk(call.arguments)
        }

        def change(node: ast.Node, arguments: set[Span] = arguments) -> ast.Node:
            nonlocal found
            metric = isinstance(node, ast.Name) and node.span not in arguments
            if isinstance(node, ast.Name) and metric and node.id in parts.metrics:
                found = True
                scope.has("metric", node.id)
                return parts.metrics[node.id]
            if isinstance(node, ast.Name):
                scope.has("param", node.id)
            return node

        expression = rewrite(expression, change)
        if not found:
            return expression
        if sum(1 for _ in walk(expression)) > limits.PARTS:
            reason = f"has more than {limits.PARTS:,} terms after its metrics are expanded"
            break
        if depth(expression) > limits.DEPTH + 1:
            reason = (
                f"is nested more than {limits.DEPTH} levels deep after its metrics are expanded"
            )
            break
        if step >= limits.CHAIN:
            reason = f"depends on a chain of more than {limits.CHAIN} metrics"
            break
    for name in parts.metrics:
        scope.has("metric", name)
    scope.diagnostics.append(
        BadArgument(
            span=written.span,
            name=written.span.written,
            reason=reason,
            hint="a metric may use other metrics, but not in a cycle",
        )
    )
    return written
