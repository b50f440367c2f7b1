"""The canonical text of expressions and statements, each on one line and without comments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

from mechdsl.base.text import count_noun
from mechdsl.syntax import ast
from mechdsl.syntax.ast import unescape
from mechdsl.syntax.forms import FORMS, FormField, FormPart, chosen_parts

# Precedence of each type of expression, and the least one that a grammar position accepts.
CONDITION = 1

_AND, _NOT, _COMPARISON = 2, 3, 4

SUM = 5

_PRODUCT, _FACTOR, _ATOM = 6, 7, 8


def _binding(node: Any) -> int:
    match node:
        case ast.Conditional():
            return 0
        case ast.Logical(operator="or"):
            return CONDITION
        case ast.Logical():
            return _AND
        case ast.Not():
            return _NOT
        case ast.Compare() | ast.InRange() | ast.Near():
            return _COMPARISON
        case ast.Binary(operator="+" | "-"):
            return SUM
        case ast.Binary():
            return _PRODUCT
        case ast.Negative():
            return _FACTOR
        case _:
            return _ATOM


def format_expression(node: Any) -> str:
    """Format an expression for a position that takes a sum or `if … then … else …`."""
    return _plain(node) if isinstance(node, ast.Conditional) else format_operand(node, SUM)


def format_operand(node: Any, least: int) -> str:
    """Format an expression, in brackets if its precedence is lower than its position needs."""
    text = _plain(node)
    return f"({text})" if _binding(node) < least else text


def format_values(node: Any) -> str:
    """Format a range or an expression."""
    if isinstance(node, ast.Range):
        return f"{format_operand(node.low, SUM)}..{format_operand(node.high, SUM)}"
    return format_expression(node)


def _plain(node: Any) -> str:
    match node:
        case ast.Number():
            return _number(node)
        case ast.Percent():
            return format_percentage(node.value)
        case ast.String():
            return format_string(node.value)
        case ast.Name():
            return node.id
        case ast.ShortSite():
            return _short(node)
        case ast.QualifiedRef():
            return f"{node.name} of {format_ref(node.of)}"
        case ast.ExperimentMeasure():
            return f"{_plain(node.measure)} of {node.experiment.id}"
        case ast.Attribute():
            return f"{node.name}.{node.attribute}"
        case ast.Index():
            return f"{node.name}[{_inside(node.index)}]"
        case ast.Call():
            return format_call(node)
        case ast.ListLiteral():
            return f"[{', '.join(map(format_values, node.items))}]"
        case ast.EdgeTokenOf():
            return f"{node.which} token of {format_operand(node.of, _ATOM)}"
        case ast.ClassOutput():
            return f"class {format_operand(node.of, _ATOM)}"
        case ast.Negative():
            return f"-{format_operand(node.operand, _FACTOR)}"
        case ast.Binary() | ast.Logical():
            own = _binding(node)
            left, right = format_operand(node.left, own), format_operand(node.right, own + 1)
            return f"{left} {node.operator} {right}"
        case ast.Conditional():
            condition = format_operand(node.condition, CONDITION)
            then, otherwise = format_expression(node.then), format_expression(node.otherwise)
            return f"if {condition} then {then} else {otherwise}"
        case ast.Compare():
            left, right = format_operand(node.left, SUM), format_operand(node.right, SUM)
            return f"{left} {node.operator} {right}"
        case ast.InRange():
            return f"{format_operand(node.value, SUM)} in {format_values(node.within)}"
        case ast.Near():
            value, target = format_operand(node.value, SUM), format_operand(node.target, SUM)
            return f"{value} near {target} within {format_operand(node.tolerance, SUM)}"
        case ast.Not():
            return f"not {format_operand(node.operand, _NOT)}"
        case _:
            raise TypeError(f"{type(node).__name__} isn't an expression")


def _inside(node: Any) -> str:
    match node:
        case ast.RankedSelection():
            return format_ranked(node)
        case ast.Coordinates(items=items):
            return ", ".join(f"{item.word} {item.value}" for item in items)
        case _:
            return format_operand(node, SUM)


def _number(node: ast.Number) -> str:
    """Format a number as in the source (`1e6`) if it has one."""
    written = node.span.text
    if written[:1].isdigit():
        try:
            same = type(node.value)(written) == node.value
        except ValueError:
            same = False
        if same:
            return written
    return repr(node.value)


def format_percentage(value: float) -> str:
    """Format a percentage (`50%`, `12.5%`), never with an exponent, which the grammar lacks."""
    digits = format(Decimal(repr(value)), "f")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return f"{digits}%"


def format_string(value: str) -> str:
    """Escape and quote a text."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    text = escaped.replace("\n", "\\n").replace("\t", "\\t")
    assert unescape(text) == value
    return f'"{text}"'


def _short(node: ast.ShortSite) -> str:
    unit = f"{node.unit}{node.index}" if node.unit else ""
    return f"L{node.layer}{unit}" + (f".{node.component}" if node.component else "")


def format_ref(node: ast.Ref) -> str:
    """Format a reference: `fruit`, `fruit.train`."""
    return node.name if node.part is None else f"{node.name}.{node.part}"


def join_items(items: Iterable[str]) -> str:
    """Join items with commas: `a, b, c`."""
    return ", ".join(items)


def format_names(items: Iterable[ast.Name]) -> str:
    """Format names separated by commas."""
    return join_items(item.id for item in items)


def format_call(node: ast.Call | ast.Name) -> str:
    """Format a call, without brackets if it has no arguments."""
    if isinstance(node, ast.Name):
        return node.id
    if not node.arguments:
        return node.name
    return f"{node.name}({join_items(map(_argument, node.arguments))})"


def _argument(node: ast.Argument) -> str:
    value: Any = node.value
    if isinstance(value, ast.Quantity):
        text = f"{value.value!r} {value.unit}" + (f" of {value.of}" if value.of else "")
    elif isinstance(value, ast.Site):
        text = format_site(value)
    elif isinstance(value, ast.SiteView):
        text = format_site(value.site)
        text += "" if value.run is None else f" of {value.run.whole}"
        text += "" if value.at is None else f" at {format_positions(value.at)}"
    elif isinstance(value, ast.SiteMap):
        text = format_site_map(value)
    else:
        text = format_values(value)
    return text if node.name is None else f"{node.name}: {text}"


def format_site_map(node: ast.SiteMap) -> str:
    text = f"{format_site(node.source)} -> {format_site(node.target)}"
    return text if node.at is None else f"{text} at {format_position(node.at)}"


def format_domain(node: ast.Domain) -> str:
    """Format the domain of a value."""
    return format_values(node.values) + (
        f" step {format_operand(node.step, SUM)}" if node.step else ""
    )


# --- sites ------------------------------------------------------------------------------------


def format_site(node: ast.Site) -> str:
    """Format a site: `resid_post layer 3 in basis b`."""
    dims = [axis for axis in node.axes if axis.word == "dim"]
    parts = [name.id for name in node.names]
    parts += [format_axis(axis) for axis in node.axes if axis.word != "dim"]
    if node.short is not None:
        parts.append(_short(node.short))
    if node.ranked is not None:
        parts.append(
            f"of {format_ranked(node.ranked)}" if node.names else format_ranked(node.ranked)
        )
    if node.basis is not None:
        parts.append(f"in basis {node.basis}")
    parts += map(format_axis, dims)
    if node.excluded:
        parts.append(f"except {join_items(map(_exception, node.excluded))}")
    return " ".join(parts)


def _exception(node: ast.Site | ast.AxisRange) -> str:
    return format_site(node) if isinstance(node, ast.Site) else format_axis_value(node)


def format_axis(node: ast.Axis) -> str:
    """Format an axis: `layer 1, 3..5 window 2`."""
    text = (
        f"{node.word}{'s' if node.plural else ''} {join_items(map(format_axis_value, node.values))}"
    )
    if node.window is not None:
        text += f" window {node.window}"
    return text + (f" of {node.of}" if node.of else "")


def format_axis_value(node: ast.AxisValue) -> str:
    """Format a value of an axis: `*`, `3`, `l + 1..50%`, `top 3 of seen`."""
    if isinstance(node, ast.Star):
        return "*"
    if isinstance(node, ast.RankedSelection):
        return format_ranked(node)
    step = f" step {node.step}" if node.step != 1 else ""
    return _bound(node.low) + (f"..{_bound(node.high)}{step}" if node.high else "")


def _bound(node: ast.Bound) -> str:
    if node.percent is not None:
        return format_percentage(node.percent)
    if node.name is not None:
        return node.name + _offset(node.offset)
    return str(node.value)


def _offset(offset: int | ast.Variable) -> str:
    if isinstance(offset, ast.Variable):
        return f" {'-' if offset.negative else '+'} {offset.name}"
    return f" {'-' if offset < 0 else '+'} {abs(offset)}" if offset else ""


def format_ranked(node: ast.RankedSelection) -> str:
    """Format a ranked selection: `top 25% of caap(a: 1)`, `best of select`."""
    of = format_cells(node)
    if node.which == "best":
        return f"best of {of}"
    amount = node.amount
    text = format_percentage(amount.value) if isinstance(amount, ast.Percent) else str(amount)
    return f"top {text} of {of}"


def format_cells(node: ast.RankedSelection | ast.MapOf) -> str:
    """Format a selection of an experiment's cells: `caap`, `caap(a: 1)`."""
    return format_call(ast.Call(node.of, node.cell, span=node.span))


def format_edge(node: ast.Edge, run: ast.Ref | None = None) -> str:
    """Format an edge: `attention layer * from Q to K`. `run`: the observed run."""
    parts = ["attention", *([node.stack.id] if node.stack else []), *map(format_axis, node.axes)]
    parts += [format_site(node.heads)] if node.heads is not None else []
    parts += [] if run is None else [f"of {format_ref(run)}"]
    return (
        f"{' '.join(parts)} from {format_positions(node.queries)} to {format_positions(node.keys)}"
    )


# --- positions --------------------------------------------------------------------------------


def format_positions(node: ast.Positions) -> str:
    """Format positions (`token 0, 3, last token`); indices after the first omit `token`."""
    texts: list[str] = []
    before: ast.TokenIndex | None = None
    for item in node.items:
        index = _token_index(item)
        bare = _is_bare(item) and index is not None and not isinstance(index.low, ast.Variable)
        if bare and index is not None and before is not None and before.plural == index.plural:
            texts.append(_index(index))
        else:
            texts.append(format_position(item))
        before = index
    return join_items(texts)


def _token_index(item: ast.Position) -> ast.TokenIndex | None:
    base = item.body.base if isinstance(item.body, ast.Point) else None
    return base if isinstance(base, ast.TokenIndex) else None


def _is_bare(item: ast.Position) -> bool:
    alone = item.align is None and not item.and_answer
    return alone and isinstance(item.body, ast.Point) and item.body.offset == 0


def format_position(node: ast.Position) -> str:
    """Format one item of a list of positions."""
    also = " and answer" if node.and_answer else ""
    return _position_set(node.body) + also + (f" align {node.align}" if node.align else "")


def _position_set(node: ast.Point | ast.Between | ast.Except) -> str:
    if isinstance(node, ast.Point):
        return _base(node.base) + _offset(node.offset)
    each = "each token" if node.each else "tokens"
    if isinstance(node, ast.Between):
        return f"{each} between {_position_set(node.low)} and {_position_set(node.high)}"
    return each if node.excluded is None else f"{each} except {_position_set(node.excluded)}"


def _base(node: ast.PointBase) -> str:
    match node:
        case ast.TokenIndex():
            return f"{_tokens(node.plural)} {_index(node)}"
        case ast.SpanTokens():
            each = "each " if node.each else ""
            last = "" if node.high is None else f"..{node.high}"
            numbers = "" if node.low is None else f" {node.low}{last}"
            return f"{each}{format_span(node.of)} {_tokens(node.plural)}{numbers}"
        case ast.EachStep():
            return "each step"
        case ast.EachTokenOf():
            return f"each token of {format_span(node.of)}"
        case ast.EdgeToken():
            return f"{node.which} token" + (f" of {format_span(node.of)}" if node.of else "")
        case ast.RankedTokens():
            return f"{format_ranked(node.ranked)} {_tokens(node.plural)}"
        case ast.PositionUnion():
            return f"{{{format_positions(node.items)}}}"
        case ast.ChosenTokens():
            return f"{node.name} tokens" if node.plural else f"each {node.name} token"


def _tokens(plural: bool) -> str:
    return "tokens" if plural else "token"


def _index(node: ast.TokenIndex) -> str:
    low = _counter(node.low)
    return low if node.high is None else f"{low}..{node.high}"


def _counter(node: int | ast.Variable | None) -> str:
    """Format a counter: `*`, `3`, `i`, `-i`, `i + 1`."""
    if isinstance(node, ast.Variable):
        return ("-" if node.negative else "") + node.name + _offset(node.offset)
    return "*" if node is None else str(node)


def format_span(node: ast.SpanRef) -> str:
    """Format a span: `item 3`, `last-item of part1`, `"Answer"`, `image row 3 col 4`."""
    if node.literal is not None:
        text = format_string(node.literal)
    else:
        text = f"{node.edge}-{node.name}" if node.edge else str(node.name)
    if node.occurrence is not None:
        text += f" {format_occurrence(node.occurrence)}"
    if node.view is not None:
        text += f" {format_view(node.view)}"
    if node.row is not None and node.col is not None:
        text += f" row {format_occurrence(node.row)} col {format_occurrence(node.col)}"
    return text + (f" of {node.of}" if node.of else "")


def format_view(node: ast.ImageView) -> str:
    """Format a view of an image or a sound: `tile 2`, `thumbnail`, `frame 3`."""
    word = "frame" if node.is_frame else "tile"
    return "thumbnail" if node.number is None else f"{word} {format_occurrence(node.number)}"


def format_occurrence(node: ast.Occurrence) -> str:
    """Format an occurrence: `*`, `3`, `2..5`, `i`."""
    low = _counter(node.low)
    return low if node.high is None else f"{low}..{_counter(node.high)}"


def _written(node: ast.Expr | ast.ActivationRead | ast.StepFraction) -> str:
    """Format the value of a rule: an expression, a run's activation or a step."""
    if not isinstance(node, ast.ActivationRead | ast.StepFraction):
        return format_operand(node, SUM)
    factor = _factor(node.factor)
    if isinstance(node, ast.StepFraction):
        return f"{factor}step({node.component.id})"
    at = _of("at", node.at, format_positions)
    return f"{factor}value({format_site(node.site)}{at}){_of('of', node.of, format_ref)}"


def _factor(node: ast.Expr | None) -> str:
    """Format the leading factor of a product; empty without one."""
    return "" if node is None else f"{format_operand(node, SUM + 1)} * "


def _of(word: str, node: Any, text: Any) -> str:
    """Return ` word text(node)`, or an empty string."""
    return "" if node is None else f" {word} {text(node)}"


def _sum(node: ast.Expr) -> str:
    return format_operand(node, SUM)


def _region(node: ast.Name | ast.Position) -> str:
    return node.id if isinstance(node, ast.Name) else format_position(node)


def _node(node: ast.Name | ast.FeaturesOf) -> str:
    return node.id if isinstance(node, ast.Name) else f"features of {node.basis.id}"


def _map_of(node: ast.MapOf) -> str:
    return _factor(node.weight) + format_cells(node)


# --- statements -------------------------------------------------------------------------------


def format_header(node: Any) -> str | None:
    """Format the text before the brace of a block statement; None for other statements."""
    if isinstance(node, ast.ModelDef) and node.is_edited:
        return f"model {node.name.id} = {_sum(node.source)} with"
    form = FORMS.get(type(node))
    return _format_parts(form.parts[:-1], node) if form is not None and form.body else None


def statement_body(node: Any) -> tuple[Any, ...]:
    """Return the lines in the braces of a block statement."""
    if isinstance(node, ast.ModelDef):
        return node.edits
    form = FORMS.get(type(node))
    return getattr(node, form.body) if form is not None and form.body else ()


def format_line(node: Any) -> str:
    """Format a statement without lines in braces."""
    form = FORMS.get(type(node))
    return _formless(node) if form is None else _format_parts(form.parts, node)


def _format_parts(parts: Iterable[FormPart], node: Any) -> str:
    """Format the words and fields of a form."""
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, FormField):
            value = getattr(node, part.name)
            texts.append(part.name if part.kind == "flag" else _WRITERS[part.kind](value))
        else:
            texts.append(_format_parts(chosen_parts(part, node), node))
    texts = [text for text in texts if text]
    return "".join(text if text[0] == "," else f" {text}" for text in texts).removeprefix(" ")


def _formless(node: Any) -> str:
    """Format a statement that has no form."""
    match node:
        case ast.Version():
            return f"mech {node.number}"
        case ast.Argument():
            return _argument(node)
        case ast.ModelDef():
            return f"model {node.name.id} = {_sum(node.source)}"
        case ast.RenameLine():
            pairs = ", ".join(f"{new.id} = {_plain(old)}" for new, old in node.pairs)
            return f"rename {{ {pairs} }}"
        case ast.Text():
            word = "" if node.name.id in ("answer", "wrong") else "text "
            equals = " =" if word else ""
            return f"{word}{node.name.id}{equals} {format_expression(node.value)}"
        case ast.ChangeLine():
            return _change(node)
        case ast.Rule():
            error = " without error" if node.drops_error else ""
            during = "" if node.during is None else f" {_during(node.during)}"
            return f"{format_line(node.body)}{error}{during}"
        case ast.EditWeights():
            return _edit_weights(node)
        case ast.ProjectOut():
            return _project_out(node)
        case ast.Generate():
            return _generate(node)
        case ast.ObserveAttention(what=ast.Name(id=what)):
            ends = (
                f"from {format_positions(node.edge.queries)} to {format_positions(node.edge.keys)}"
            )
            run, name = _of("of", node.run, format_ref), _of("as", node.name, _plain)
            return f"observe {what}{run} {ends}{name}"
        case ast.ObserveAttention():
            by, name = _of("by", node.by, _plain), _of("as", node.name, _plain)
            return f"observe {format_edge(node.edge, node.run)}{by}{name}"
        case ast.Measure():
            at, per = _of("at", node.at, format_position), _of("per", node.per, _plain)
            over = _of("auc over" if node.area else "mean over", node.over, _plain)
            return f"measure {_sum(node.metric)}{at} as {node.effect.id}{per}{over}"
        case ast.Stats():
            return _stats(node)
        case ast.Save():
            return _save(node)
        case _:
            raise TypeError(f"{type(node).__name__} isn't a statement")


def _change(node: ast.ChangeLine) -> str:
    values = ", ".join(format_operand(value, SUM) for value in node.values)
    if node.before is not None or node.after is not None:
        values += f" {'token' if values == '1' else 'tokens'}"
    return (
        f"{node.word} {values if node.tokens is None else format_positions(node.tokens)}"
        + _of("to", node.to, format_site)
        + _of("at", node.at, format_positions)
        + _of("before", node.before, format_positions)
        + _of("after", node.after, format_positions)
        + _of("with", node.given, _sum)
        + _of("by", node.by, _sum)
        + _of("radius", node.radius, str)
    )


def _edit_weights(node: ast.EditWeights) -> str:
    weights, value = f"weights of {format_site(node.site)}", _sum(node.value)
    if node.verb == "add":
        return f"add {value} to {weights}"
    return f"{node.verb} {weights} {'by' if node.verb == 'scale' else 'to'} {value}"


def _project_out(node: ast.ProjectOut) -> str:
    place = "weights"
    if node.site is not None and node.at is not None:
        place = f"{format_site(node.site)} at {format_positions(node.at)}"
    direction = "" if node.direction is None else f"{_sum(node.direction)} from "
    return f"project out {direction}{place}"


def _stats(node: ast.Stats) -> str:
    return (
        "stats"
        + (f" {format_call(node.resampling)}" if node.resampling else "")
        + _of("test", node.test, format_call)
        + _of("confidence", node.confidence, _plain)
        + _of("correct", node.correction, _plain)
        + _of("verdicts", node.verdicts, _plain)
        + _of("by", node.by, _plain)
    )


def _save(node: ast.Save) -> str:
    where = f"{format_site(node.site)}{_of('of', node.run, format_ref)}"
    where += f" at {format_positions(node.at)}"
    what = "mean of " if node.mean else ""
    if node.gradient is not None:
        what += f"gradient of {_sum(node.gradient.metric)}"
        what += _of("at", node.gradient.at, format_position) + " by "
    what = what if node.rows is None else f"top {node.rows} rows of "
    return f"save {what}{where} to {_plain(node.file)}" + _of("as", node.dtype, _plain)


def _during(node: ast.During) -> str:
    if node.phase == "after prefill":
        return node.phase
    if node.phase == "each step":
        return "during each step"
    return f"during step {format_axis_value(node.steps)}" if node.steps else f"during {node.name}"


def _generate(node: ast.Generate) -> str:
    settings = _lines(node.settings)
    stops = join_items(map(_plain, node.stops))
    return (
        f"generate {node.tokens}"
        + (f" with {settings}" if settings else "")
        + (f" until {stops}" if stops else "")
    )


def _lines(nodes: Iterable[ast.Node]) -> str:
    return join_items(map(format_line, nodes))


def _observed(what: ast.Call | ast.Name) -> str:
    # `at` before the site is optional; the canonical text has it only after a call
    # (`probe(count) at`).
    return format_call(what) + (" at" if isinstance(what, ast.Call) else "")


_WRITERS: Mapping[str, Callable[[Any], str]] = {
    "axis": format_axis,
    "axis_value": format_axis_value,
    "call": format_call,
    "call_or_name": format_call,
    "columns": lambda count: f"width {count_noun(count, 'column')}",
    "condition": lambda node: format_operand(node, CONDITION),
    "count": str,
    "direction": _sum,
    "domain": format_domain,
    "edge": format_edge,
    "edges": lambda edges: join_items(map(format_site_map, edges)),
    "expr": format_expression,
    "further": lambda fills: "".join(f", {format_line(each)}" for each in fills),
    "integer": str,
    "maps": lambda maps: join_items(map(_map_of, maps)),
    "name": _plain,
    "names": format_names,
    "new": _plain,
    "new_names": format_names,
    "nodes": lambda nodes: join_items(map(_node, nodes)),
    "number_or_name": _sum,
    "observed": _observed,
    "other_features": lambda axis: f"with {format_axis(axis)}",
    "percent": _plain,
    "picks": _lines,
    "position": format_position,
    "positions": format_positions,
    "ref": format_ref,
    "refs": lambda refs: join_items(map(format_ref, refs)),
    "region": _region,
    "site": format_site,
    "sites": lambda sites: join_items(map(format_site, sites)),
    "string": _plain,
    "sum": _sum,
    "training": format_call,
    "word": str,
    "word_itself": _plain,
    "written": _written,
}
"""How fields are printed, by kind; see `mechdsl.syntax.forms`."""
