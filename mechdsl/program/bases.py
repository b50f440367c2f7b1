"""`basis NAME = …` as typed data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mechdsl.base.files import UnreadableFile
from mechdsl.base.limits import is_integer
from mechdsl.base.records import closest_name
from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import did_you_mean, has_errors
from mechdsl.diagnostics.rules import BadBasis
from mechdsl.diagnostics.syntax import BadArgument, NotSupported, UnknownWord
from mechdsl.program import spec
from mechdsl.program.activation_trainers import (
    LENS_EXAMPLE,
    LENS_SITES,
    OTHER_DICTIONARY_TRAINERS,
    OTHER_LENS_TRAINERS,
    OTHER_PROBE_TRAINERS,
    OTHER_SOLVED_TRAINERS,
    PROBE_EXAMPLE,
    PROBE_SITES,
)
from mechdsl.program.direction_methods import (
    BASIS_METHODS,
    EFFECT_OPTIONS,
    FILLS,
    OBJECTIVES,
    PROBE_OPTIONS,
    ROW_OPERANDS,
    BasisMethod,
)
from mechdsl.program.directions import (
    check_fit_rows,
    check_row_limit,
    decoded_basis,
    fitted_block,
    training_call,
)
from mechdsl.program.effect_trainers import (
    EDGE_MASK_EXAMPLE,
    MASK_EXAMPLE,
    NODE_EXAMPLE,
    NODE_SEARCH_EXAMPLE,
    OTHER_EFFECT_TRAINERS,
    OTHER_MASK_OPTIONS,
    SCORE_EXAMPLE,
    SEARCH_EXAMPLE,
    TRAINING_ARGUMENTS,
)
from mechdsl.program.group_files import (
    LayerFeature,
    has_positions,
    is_mask,
    load_group,
    read_graph,
    read_mask,
    read_positions,
)
from mechdsl.program.names import Namespace
from mechdsl.program.paths import SAVED_PATH, path_to_read
from mechdsl.program.python_functions import is_python_call
from mechdsl.program.references import all_tokens, lists_positions
from mechdsl.program.spec import Constant, constant_value
from mechdsl.program.trainers import (
    TRAINERS,
    ChoosingTrainer,
    DictionaryTrainer,
    EdgeSearchTrainer,
    EditTrainer,
    EffectTrainer,
    MaskTrainer,
    NodeSearchTrainer,
    PairedTrainer,
    ProbeTrainer,
    ScaleTrainer,
    ScoringTrainer,
    Statement,
    Trainer,
    find_own_trainer,
    find_trainer,
    trainer_arguments,
    trainer_call,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

if TYPE_CHECKING:
    from mechdsl.program.spec import Definitions


_SITES = {"lens": LENS_SITES, "probe": PROBE_SITES}
"""First word of a statement → an example of its site and positions; others: a site."""

_TRAINED_ONLY = {
    "lens": f"train one: `{LENS_EXAMPLE}`; "
    '`observe tuned_lens("lens.safetensors")` reads a file without this line',
    "probe": f"train one: `{PROBE_EXAMPLE}`",
}
"""First word of a statement that only has the method `fit` → hint for other methods."""

_MASKS = {"group": ("sites", MASK_EXAMPLE), "circuit": ("edges", EDGE_MASK_EXAMPLE)}
"""First word of a statement with a mask → what it chooses, and an example."""

GROUP_EXAMPLE = 'saved("graph.json", "capital", t0, t1)'
MASK_FILE_EXAMPLE = 'saved("out/g/mask.json")'
CIRCUIT_EXAMPLE = 'saved("circuit.json")'

_DAS = f"train a rotation: `fit(das(dims: 2), {TRAINING_ARGUMENTS})`"

_ROTATION = f'{_DAS}; or load a matrix: `saved("rotation.safetensors", "rotation")`'

OTHER_METHODS = {
    "das": _ROTATION,
    "boundless_das": f"train a rotation: `fit(boundless_das(penalty: 1), {TRAINING_ARGUMENTS})`",
    "rotation": _ROTATION,
    "dictionary": 'write `sae("path/to/sae")` or `transcoder("path/to/transcoder")`',
    "clt": 'write `transcoder("path/to/clt") at mlp_out layer 3`, which can be observed',
    "identity": "write `neurons`",
    "standard": "write `neurons`",
}
"""Methods of other tools → hint."""

OTHER_OPTIONS: dict[str, str] = dict.fromkeys(
    ("n_components", "components", "component", "k", "n", "rank", "dim", "size"), "dims"
)
"""Names of an option in other tools → the option."""


OTHER_TRAINERS: dict[str, str] = {
    **OTHER_DICTIONARY_TRAINERS,
    **OTHER_EFFECT_TRAINERS,
    **OTHER_SOLVED_TRAINERS,
    **OTHER_LENS_TRAINERS,
    **OTHER_PROBE_TRAINERS,
    "pca": "write `pca(fruit.train, dims: 8)` without `fit`",
}
"""What else may be written inside of `fit(…)` → hint."""

OTHER_TRAINER_OPTIONS: dict[str, str] = {
    "d_sae": "features",
    "dict_size": "features",
    "size": "features",
    "n_features": "features",
    "dims": "features",
    "l1": "penalty",
    "l1_coefficient": "penalty",
    "l0_coefficient": "penalty",
    "sparsity": "penalty",
    "architecture": "kind",
    "activation": "kind",
    "norm": "length",
    "scale": "length",
    "magnitude": "length",
    "weight_decay": "penalty",
}
"""Names of a trainer's option in other tools → the option."""

OTHER_OBJECTIVES: dict[str, str] = {
    "fill": "with",
    "ablate": "with",
    "source": "from",
    "maximize": "maximise",
    "minimize": "minimise",
    "objective": "maximise",
    "loss": "minimise",
    "lr": "rate",
    "learning_rate": "rate",
    "epochs": "steps",
    **dict.fromkeys(("y", "label", "labels", "value", "predict", "column"), "target"),
    "batch_size": "batch",
    **dict.fromkeys(
        ("accumulation", "grad_accum", "accumulate_grad_batches", "gradient_accumulation_steps"),
        "accumulate",
    ),
    **dict.fromkeys(("dtype", "amp", "autocast", "mixed_precision", "bf16", "fp16"), "precision"),
    **dict.fromkeys(("repeats", "restarts", "runs", "replicates", "num_seeds"), "seeds"),
}
"""Names of an option of a training in other tools → the option."""


def lower_basis(statement: ast.BasisDef, parts: Definitions, scope: Namespace) -> spec.Basis | None:
    """Lower a basis, a lens or a probe; None after an error that doesn't depend on the model.

    Codes: E0201, E0203, E0207, E0342.
    """
    call, what = statement.source, statement.word
    method = BASIS_METHODS.get(call.name)
    if what in _TRAINED_ONLY and (method is None or method.takes != "training"):
        reason, hint = f"`{call.span.written}` isn't a {what}", _TRAINED_ONLY[what]
        scope.diagnostics.append(BadBasis(span=call.span, reason=reason, hint=hint, what=what))
        return None
    if method is None:
        known = ", ".join(f"`{basis_method.example}`" for _, basis_method in BASIS_METHODS.items())
        hint = did_you_mean(call.name, BASIS_METHODS, f"methods are {known}")
        hint = OTHER_METHODS.get(call.name, hint)
        scope.diagnostics.append(
            UnknownWord(span=call.span, kind="basis method", word=call.name, hint=hint)
        )
        return None
    before = len(scope.diagnostics)
    check_arguments(call, method, parts, scope, what=what)
    if statement.site is None:
        written = f"{what} {statement.name.id} = {call.span.written}"
        written += f" {_SITES.get(what, 'at resid_post layer 2')}"
        scope.diagnostics.append(
            BadBasis(
                span=call.span,
                reason=f"`{statement.name.id}` has no site",
                hint=f"add the site: `{written}`",
                what=what,
            )
        )
    elif statement.at is not None and not _reads_rows(call, method, parts):
        scope.diagnostics.append(
            BadBasis(
                span=statement.at.span,
                reason=f"`{call.name}` reads no activations, so it has no position",
                hint=f"remove `at {statement.at.span.written}`",
            )
        )
    for axis in () if statement.site is None or what in _TRAINED_ONLY else statement.site.axes:
        if axis.word == "feature" or axis.plural:
            scope.diagnostics.append(
                BadBasis(
                    span=axis.span,
                    reason="a basis has one site, or one per layer or head",
                    hint="write the singular: `layer *` makes a basis of each layer",
                )
            )
    if has_errors(scope.diagnostics[before:]) or statement.site is None:
        _note_meant_kind(statement.name, call, what, scope)
        return None
    return spec.Basis(
        span=statement.span,
        name=statement.name.id,
        method=call,
        site=statement.site,
        at=statement.at,
    )


def check_trained_direction(
    statement: ast.DirectionDef, parts: Definitions, scope: Namespace
) -> bool:
    """Whether a direction has no error in the call `fit(…)`, if it is one.

    Codes: E0201, E0203, E0207, E0342.
    """
    call, before = training_call(statement.value), len(scope.diagnostics)
    if call is not None:
        check_arguments(call, BASIS_METHODS[call.name], parts, scope, what="direction")
    return not has_errors(scope.diagnostics[before:])


def lower_mask(statement: ast.GroupDef, parts: Definitions, scope: Namespace) -> spec.Basis | None:
    """Lower a group that a training chooses, and report errors that don't depend on the model; None
    after an error.

    Codes: E0201, E0203, E0207, E0342.
    """
    call, site, at = statement.source, statement.site, statement.at
    assert call is not None
    if not _check_mask(call, "group", parts, scope):
        _note_meant_kind(statement.name, call, "group", scope)
        return None
    several = at is not None and lists_positions(at)
    if site is None:
        reason = f"`{statement.name.id}` has no sites to choose from"
        problem = call, reason, "add them: `at layers * heads * at last token`"
    else:
        problem = _place_problem(site) if several else _candidate_problem(site)
    if problem is None:
        assert site is not None
        return spec.Basis(
            span=statement.span,
            name=statement.name.id,
            method=call,
            site=site,
            at=at,
            chooses_positions=several,
        )
    scope.diagnostics.append(
        BadBasis(span=problem[0].span, reason=problem[1], hint=problem[2], what="group")
    )
    return None


def lower_saved_circuit(
    statement: ast.CircuitDef, parts: Definitions, scope: Namespace
) -> spec.Circuit | None:
    """Lower a circuit that is read from a file; None after an error.

    Codes: E0201, E0207, E0342.
    """
    call = statement.source
    assert call is not None
    before = len(scope.diagnostics)
    paths = [each.value for each in call.arguments if each.name is None]
    named = [each for each in call.arguments if each.name is not None]
    given = [constant_value(path, parts.parameters) for path in paths]
    if len(given) != 1 or not isinstance(given[0], str):
        reason, hint = "takes the path of a file, in quotes", f"write `{CIRCUIT_EXAMPLE}`"
        scope.diagnostics.append(
            BadArgument(span=call.span, name=call.name, reason=reason, hint=hint)
        )
    for argument in named:
        for part in walk(argument.value):
            _ = isinstance(part, ast.Name) and scope.has("param", part.id)
        if argument.name == "nodes":
            _are_nodes(argument.value, parts, scope)
            continue
        if argument.name != "size":
            others = {"top": "size", "n": "size", "edges": "size", "features": "nodes"}
            known = "size", "nodes"
            scope.diagnostics.append(_unknown_option(argument, call.name, known, others))
            continue
        value = constant_value(argument.value, parts.parameters)
        if not is_integer(value, least=1):
            reason, hint = "`size` is a number of edges", "write `size: 100`"
            scope.diagnostics.append(
                BadBasis(span=argument.span, reason=reason, hint=hint, what="circuit")
            )
    if statement.at is not None:
        reason = "positions of a circuit in a file are those of its edges"
        hint = "write them where it is used: `ablate all but c at last token with mean`"
        scope.diagnostics.append(
            BadBasis(span=statement.at.span, reason=reason, hint=hint, what="circuit")
        )
    if has_errors(scope.diagnostics[before:]):
        return None
    named = [each.value for each in named if each.name == "nodes"]
    nodes = tuple(ast.Site((name,), span=name.span) for name in named if isinstance(name, ast.Name))
    return spec.Circuit(
        span=statement.span,
        name=statement.name.id,
        edges=(),
        source=statement.source,
        nodes=nodes,
    )


def lower_saved_group(
    statement: ast.GroupDef, parts: Definitions, scope: Namespace
) -> spec.Group | None:
    """Lower a group that is read from an attribution graph or from the file of a training; None
    after an error.

    Codes: E0201, E0207, E0342, E0532, E0535.
    """
    call = statement.source
    assert call is not None
    before = len(scope.diagnostics)
    texts, bases = _group_arguments(call, parts, scope)
    place = statement.site if statement.at is None else statement.at
    if place is not None:
        reason = "the features of a file have the sites of their transcoders"
        reason = reason if bases else "the sites of a group in a file are those of the file"
        hint = "write positions where the group is used: `ablate g at last token with zero`"
        bad = BadBasis(span=place.span, reason=reason, hint=hint, what="group")
        scope.diagnostics.append(bad)
    if has_errors(scope.diagnostics[before:]):
        return None
    path, problems = path_to_read(SAVED_PATH, texts[0], call.span)
    scope.diagnostics.extend(problems)
    if path is None:
        return None
    try:
        content, digest = load_group(path, texts[0])
        if is_mask(content) and has_positions(content):
            return _lower_saved_positions(statement, content, digest, (texts, bases))
        if is_mask(content):
            return _lower_saved_mask(statement, content, digest, (texts, bases))
        if not bases:
            scope.diagnostics.append(_bad_group_call(call))
            return None
        file = read_graph(content, digest, texts[0])
        features, said = file.choose(texts[1] if len(texts) > 1 else None, texts[0])
        sites = tuple(_list_feature_sites(sorted(features), bases, call, texts[0], parts))
    except UnreadableFile as problem:
        bad = BadBasis(span=call.span, reason=problem.reason, hint=problem.hint, what="group")
        scope.diagnostics.append(bad)
        return None
    made = f"{said}, SHA-256 {digest[:12]}…"
    name = statement.name.id
    return spec.Group(span=statement.span, name=name, sites=sites, digest=digest, made=made)


def _lower_saved_mask(
    statement: ast.GroupDef,
    content: Mapping[str, object],
    digest: str,
    given: tuple[Sequence[str], Sequence[ast.Name]],
) -> spec.Group:
    """Lower the group that a training chose, from its file. Raises UnreadableFile.

    Args:
        given: The texts and the bases of the call.
    """
    texts, bases = given
    written, name = texts[0], statement.name.id
    mask = read_mask(content, digest, written, tuple(basis.id for basis in bases))
    if len(texts) > 1:
        reason = f"`{written}` has the sites of a trained group, without supernodes"
        call = ", ".join((f'saved("{written}"', *(basis.id for basis in bases)))
        raise UnreadableFile(reason, f"write `group {name} = {call})`")
    span = statement.span
    return spec.Group(
        span=span,
        name=name,
        dictionary=mask.dictionary,
        sites=mask.list_sites(span),
        digest=digest,
        made=mask.made,
        prompts=mask.prompts,
        ranked=mask.list_ranked(span),
        candidates=mask.last,
    )


def _lower_saved_positions(
    statement: ast.GroupDef,
    content: Mapping[str, object],
    digest: str,
    given: tuple[Sequence[str], Sequence[ast.Name]],
) -> spec.Group:
    """Lower the positions that a training chose, from its file. Raises UnreadableFile.

    Args:
        given: The texts and the bases of the call.
    """
    texts, bases = given
    written, name = texts[0], statement.name.id
    if len(texts) > 1 or bases:
        reason = f"`{written}` has the positions of a trained group, without supernodes and bases"
        raise UnreadableFile(reason, f'write `group {name} = saved("{written}")`')
    positions = read_positions(content, digest, written)
    return spec.Group(
        span=statement.span,
        name=name,
        sites=(),
        digest=digest,
        made=positions.made,
        prompts=positions.prompts,
        at=positions.at,
        labels=positions.labels,
    )


def _bad_group_call(call: ast.Call) -> BadArgument:
    """Return E0207 for a call without a file, or without bases for the features of a graph."""
    reason = "takes the path of a graph, the name of a supernode if you want one, and bases"
    hint = f"write `{GROUP_EXAMPLE}`; for a group that a training chose, `{MASK_FILE_EXAMPLE}`"
    return BadArgument(span=call.span, name=call.name, reason=reason, hint=hint)


def _group_arguments(
    call: ast.Call, parts: Definitions, scope: Namespace
) -> tuple[list[str], list[ast.Name]]:
    """Return the path and the supernode of `saved("graph.json", "capital", t0, t1)`, and the names
    of bases. Codes: E0201, E0207."""
    before = len(scope.diagnostics)
    texts: list[str] = []
    bases: list[ast.Name] = []
    for argument in call.arguments:
        value = constant_value(argument.value, parts.parameters)
        if argument.name is not None:
            scope.diagnostics.append(_unknown_option(argument, call.name, (), {}))
        elif isinstance(value, str) and not bases:
            texts.append(value)
            if isinstance(argument.value, ast.Name):
                scope.has("param", argument.value.id)
        elif isinstance(argument.value, ast.Name):
            if scope.use("basis", argument.value.id, argument.value.span):
                bases.append(argument.value)
        else:
            texts.clear()
            break
    if not 1 <= len(texts) <= 2 and not has_errors(scope.diagnostics[before:]):
        scope.diagnostics.append(_bad_group_call(call))
    return texts, bases


def _list_feature_sites(
    features: Sequence[LayerFeature],
    names: Sequence[ast.Name],
    call: ast.Call,
    written: str,
    parts: Definitions,
) -> Iterator[ast.Site]:
    """Yield the features of a file as those of the transcoders of their layers.

    Raises:
        UnreadableFile: A layer has no transcoder among the bases, or two.
    """
    span = call.span
    for layer in dict.fromkeys(layer for layer, _ in features):
        sites = [
            (name, several)
            for name in names
            if (several := _covers(parts.bases.get(name.id), layer, parts)) is not None
        ]
        if len(sites) != 1:
            listed = name_list(name.id for name, _ in sites)
            reason = f"`{written}` has features of layer {layer}, and "
            reason += f"{listed} are of this layer" if sites else "no basis is of this layer"
            hint = f"name one transcoder at `mlp_out layer {layer}`"
            raise UnreadableFile(reason, hint)
        ((name, several),) = sites

        def axis(word: ast.AxisWord, numbers: Sequence[int], of: str | None) -> ast.Axis:
            values = tuple(ast.AxisRange(ast.Bound(n, span=span), span=span) for n in numbers)
            return ast.Axis(word, True, values, of=of, span=span)

        numbers = [feature for number, feature in features if number == layer]
        axes = [axis("feature", numbers, name.id)]
        components = ()
        if several:
            axes.insert(0, axis("layer", [layer], None))
            components = (ast.Name("mlp_out", span=span),)
        yield ast.Site(components, tuple(axes), span=span)


def _covers(basis: spec.Basis | None, layer: int, parts: Definitions) -> bool | None:
    """Return whether a basis has several layers, if it is at the outputs of the MLP of this layer;
    None if not."""
    if basis is None or [name.id for name in basis.site.names] != ["mlp_out"]:
        return None
    axis = next((own for own in basis.site.axes if own.word == "layer"), None)
    if axis is None:
        return None
    several = axis.plural or len(axis.values) > 1

    def number(bound: ast.Bound) -> int:
        given = parts.parameters.get(bound.name or "", bound.value)
        return (given if isinstance(given, int) else -1) + bound.offset

    for value in axis.values:
        if isinstance(value, ast.Star):
            return True
        if not isinstance(value, ast.AxisRange):
            continue
        low = number(value.low)
        high = low if value.high is None else number(value.high)
        if layer in value.numbers(low, high):
            return several or high > low
    return None


NODES_EXAMPLE = "`group g = mlp_hidden layer 0 neurons 0..30` or `group g = features 3, 12 of f`"
"""Groups of neurons and of features that `nodes` can name."""


def lower_circuit_mask(
    statement: ast.CircuitDef, parts: Definitions, scope: Namespace
) -> spec.Basis | None:
    """Lower a circuit whose edges a training chooses, and report errors that don't depend on the
    model; None after an error.

    Codes: E0108, E0201, E0203, E0207, E0342.
    """
    call, at = statement.source, statement.at
    assert call is not None
    if not _check_mask(call, "circuit", parts, scope):
        _note_meant_kind(statement.name, call, "circuit", scope)
        return None
    given = {argument.name: argument.value for argument in call.arguments}
    nodes, stack = given.get("nodes"), given.get("stack")
    if nodes is not None and not _are_nodes(nodes, parts, scope):
        return None
    if stack is not None and not _is_stack(stack, nodes, scope):
        return None
    span, every = statement.name.span, spec.EVERY_EDGE if stack is None else spec.EVERY_VISION_EDGE
    return spec.Basis(
        span=statement.span,
        name=statement.name.id,
        method=call,
        site=ast.Site((ast.Name(every, span=span),), span=span),
        at=all_tokens() if at is None else at,
        chooses_edges=True,
    )


def _is_stack(stack: ast.Node, nodes: ast.Node | None, scope: Namespace) -> bool:
    """Whether `stack` names a stack whose edges alone are chosen from, without `nodes`, which are
    of the language model; reports E0207 or E0108 otherwise."""
    if not isinstance(stack, ast.Name) or stack.id != "vision":
        reason = "isn't a stack whose edges alone can be chosen from"
        hint = "write `stack: vision`, or leave it out for the edges of the language model"
        name = stack.span.written
        scope.diagnostics.append(BadArgument(span=stack.span, name=name, reason=reason, hint=hint))
        return False
    if nodes is not None:
        what = "a neuron or feature of the vision encoder as a node of a circuit"
        later = "remove `nodes`: the nodes are heads and MLPs"
        scope.diagnostics.append(NotSupported(span=nodes.span, what=what, later=later))
        return False
    return True


def _are_nodes(nodes: ast.Node, parts: Definitions, scope: Namespace) -> bool:
    """Whether `nodes` names a group, perhaps of features of known bases; reports E0201 or E0207
    otherwise."""
    if isinstance(nodes, ast.Name):
        sites = parts.groups[nodes.id].sites if nodes.id in parts.groups else ()
        of = {site.basis_name: site.span for site in sites}
        bases = (
            (name, span) for name, span in of.items() if name not in (None, ast.STANDARD_BASIS)
        )
        known = [scope.use("basis", name, span) for name, span in bases]
        return scope.use("group", nodes.id, nodes.span) and all(known)
    name, reason = nodes.span.written, "isn't the name of a group of neurons or features"
    hint = f"define one, and write its name: {NODES_EXAMPLE}"
    scope.diagnostics.append(BadArgument(span=nodes.span, name=name, reason=reason, hint=hint))
    return False


def _check_mask(call: ast.Call, what: Statement, parts: Definitions, scope: Namespace) -> bool:
    """Whether the call of a group or a circuit trains a mask; reports the problem otherwise."""
    before, method = len(scope.diagnostics), BASIS_METHODS.get(call.name)
    if method is not None and method.takes == "training":
        check_arguments(call, method, parts, scope, what=what)
        return not has_errors(scope.diagnostics[before:])
    chosen, example = _MASKS[what]
    reason = f"`{call.span.written}` doesn't choose {chosen}"
    otherwise = f"list {chosen}, or train a mask: {example}, or read "
    if what == "circuit":
        otherwise += f"a file: `{CIRCUIT_EXAMPLE}`"
    else:
        otherwise += f"a file: `{MASK_FILE_EXAMPLE}` or `{GROUP_EXAMPLE}`"
    hint = did_you_mean(call.name, ("fit", "saved"), otherwise)
    scope.diagnostics.append(BadBasis(span=call.span, reason=reason, hint=hint, what=what))
    return False


def _note_meant_kind(name: ast.Name, call: ast.Call, what: Statement, scope: Namespace) -> None:
    """Note the kind that an invalid definition should have, if its trainer trains another one."""
    method = BASIS_METHODS.get(call.name)
    if method is None or method.takes != "training" or name.id not in scope.definitions:
        return
    trainer = find_trainer(trainer_call(call))
    if trainer is not None and not _can_declare(what, trainer):
        scope.definitions[name.id].meant = trainer.declares


def _can_declare(what: str, trainer: Trainer) -> bool:
    """Whether a statement with this first word can have a trainer."""
    return trainer.declares == what or (what == "circuit" and isinstance(trainer, MaskTrainer))


def _place_problem(site: ast.Site) -> tuple[ast.Node, str, str] | None:
    """Return the problem with the site at which positions are chosen."""
    several = any(axis.plural and len(axis.values) > 1 for axis in site.axes)
    several = several or any(
        not isinstance(value, ast.AxisRange) or value.high is not None or axis.window is not None
        for axis in site.axes
        for value in axis.values
    )
    if not (several or site.ranked or site.basis_name is not None):
        return None
    reason = "a group has sites at one position, or positions at one site"
    hint = "name one vector, such as `resid_post layer 2`; or join the positions: `{A, B}`"
    return site, reason, hint


def _candidate_problem(site: ast.Site) -> tuple[ast.Node, str, str] | None:
    """Return the problem with what a group is chosen from: the node, the reason and a hint."""
    whole = site.basis_name is not None and site.coordinates is None
    picked = any(isinstance(v, ast.RankedSelection) for axis in site.axes for v in axis.values)
    if site.short or site.ranked or not site.axes or whole or picked:
        reason = "a group has layers, heads, neurons, features or dimensions, which axes name"
        hint = "write `layers * heads *`, `features * of f`, or `resid_post layer 2 dims *`"
        return site, reason, hint
    for axis in site.axes:
        several = axis is site.coordinates or isinstance(axis.values[0], ast.Star)
        if axis.window is not None or (several and not axis.plural):
            reason = "a group is chosen from sites that are written together"
            return axis, reason, "write the plural, without `window`: `layers * heads *`"
    return None


def check_arguments(
    call: ast.Call,
    method: BasisMethod,
    parts: Definitions,
    scope: Namespace,
    *,
    what: Statement = "basis",
) -> None:
    """Check the arguments of a call without the model.

    Codes: E0201, E0203, E0207, E0342.

    Args:
        what: First word of the statement; directions have only the method `fit`.
    """
    values = [a.value for a in call.arguments if a.name is None]
    for argument in call.arguments:
        if argument.name is None:
            continue
        if argument.name not in method.options:
            others = {**OTHER_OPTIONS, **(OTHER_OBJECTIVES if method.takes == "training" else {})}
            scope.diagnostics.append(_unknown_option(argument, call.name, method.options, others))
        elif argument.name == "limit":
            check_row_limit(call, argument, parts, scope)
        elif argument.name not in ("weights", "prompts", *EFFECT_OPTIONS, *PROBE_OPTIONS):
            value = constant_value(argument.value, parts.parameters)
            problem = method.check_option(argument.name, value)
            if problem is not None:
                scope.diagnostics.append(
                    BadBasis(span=argument.span, reason=problem[0], hint=problem[1], what=what)
                )
        for part in walk(argument.value):
            if isinstance(part, ast.Name):
                scope.has("param", part.id)
    problem = _missing_argument(call, method, values)
    if problem is not None:
        if _misspelt_options(call, method).isdisjoint(method.required):
            scope.diagnostics.append(problem)
        return
    if _reads_rows(call, method, parts):
        check_fit_rows(fitted_block(method, call), parts, scope)
    elif method.takes == "training" and not _check_decoder(call, what, parts, scope):
        return
    if method.takes == "training" and _misspelt_options(call, method).isdisjoint(EFFECT_OPTIONS):
        _check_trainer(call, what, parts, scope)
        _check_patience(call, what, parts, scope)
    if method.takes == "jacobian" and not isinstance(values[1], ast.SiteMap):
        reason, hint = "takes two sites with `->` between them", f"write `{method.example}`"
        scope.diagnostics.append(
            BadArgument(span=values[1].span, name=call.name, reason=reason, hint=hint)
        )
    for value in values if method.takes == "directions" else ():
        scope.use("direction", value.span.written, value.span)
    if method.takes == "tokens":
        _check_matrix_rows(call, method, values, parts, scope)
    if method.takes in ("file", "dictionary"):
        _check_texts(call, method, values, parts, scope)


_DECODER = "prompts: decoder of big"

_ROW_OPTIONS = ("limit", "measure_on_training_rows")
"""Options of `fit` that a training on a decoder doesn't have, because it reads no prompts."""


def _reads_rows(call: ast.Call, method: BasisMethod, parts: Definitions) -> bool:
    """Whether a basis is computed from activations of rows."""
    return method.takes in ROW_OPERANDS and decoded_basis(call, parts.prompts) is None


def _check_decoder(call: ast.Call, what: Statement, parts: Definitions, scope: Namespace) -> bool:
    """Whether a training can read the decoder of a dictionary; reports the problem otherwise.

    Codes: E0201 for a name that isn't a basis, E0207 for options that need prompts, E0342 for other
    trainers.
    """
    before, inner = len(scope.diagnostics), trainer_call(call)
    decoder = decoded_basis(call, parts.prompts)
    assert decoder is not None
    if is_python_call(inner) or (inner.name in TRAINERS and inner.name != "sae"):
        reason = f"`{inner.name}` isn't trained on the decoder of a dictionary"
        hint = f"name a prompt set, or write `fit(sae(features: 64, k: 4), {_DECODER})`"
        scope.diagnostics.append(BadBasis(span=inner.span, reason=reason, hint=hint, what=what))
    elif scope.use("basis", decoder.of.whole, decoder.span):
        for argument in (each for each in call.arguments if each.name in _ROW_OPTIONS):
            name, reason = str(argument.name), "needs prompts, and this training reads a decoder"
            scope.diagnostics.append(
                BadArgument(span=argument.span, name=name, reason=reason, hint=f"remove `{name}`")
            )
    return not has_errors(scope.diagnostics[before:])


def keep_decoders(parts: Definitions, scope: Namespace) -> None:
    """Remove bases that are trained on a decoder that doesn't exist, and report E0342 for them,
    unless that of the other basis is reported."""
    every = dict(parts.bases)
    for name, basis in every.items():
        decoder, seen = decoded_basis(basis.method, parts.prompts), [name]
        while decoder is not None:
            of = every.get(decoder.of.whole)
            if of is None or of.name in seen:
                del parts.bases[name]
                if of is not None and of.name == name:
                    reason = f"`{name}` is trained on its own decoder"
                    hint = f"name another dictionary: `{_DECODER}`"
                    scope.diagnostics.append(BadBasis(span=decoder.span, reason=reason, hint=hint))
                break
            if not _has_decoder(of):
                del parts.bases[name]
                if seen == [name]:
                    reason = f"`{of.name}` isn't a dictionary, so it has no decoder"
                    hint = 'name a basis such as `sae("path/to/sae")` or `fit(sae(…), …)`'
                    scope.diagnostics.append(BadBasis(span=decoder.span, reason=reason, hint=hint))
                break
            seen.append(of.name)
            decoder = decoded_basis(of.method, parts.prompts)


def _has_decoder(basis: spec.Basis) -> bool:
    """Whether a basis is a dictionary of a folder or a trained one."""
    takes = BASIS_METHODS[basis.method.name].takes
    if takes != "training":
        return takes == "dictionary"
    return isinstance(find_trainer(trainer_call(basis.method)), DictionaryTrainer)


def _unknown_option(
    argument: ast.Argument, called: str, options: Sequence[str], others: Mapping[str, str]
) -> BadArgument:
    """Return E0207 for an argument that isn't an option, with the one that is probably meant.

    Args:
        others: Names in other tools → an option.
    """
    known = ", ".join(f"`{option}: …`" for option in options)
    hint = f"it takes {known or 'none'}"
    if argument.name is not None:
        hint = did_you_mean(argument.name, options, hint)
        meant = others.get(argument.name)
        hint = f"write `{meant}: …`" if meant in options else hint
    name = argument.name or argument.value.span.written
    reason = f"is not an argument of `{called}`"
    return BadArgument(span=argument.span, name=name, reason=reason, hint=hint)


def _check_patience(call: ast.Call, what: str, parts: Definitions, scope: Namespace) -> None:
    """Report E0342 for early stopping without held-out rows, or of a mask of edges."""
    named = {argument.name: argument for argument in call.arguments}
    trainer = find_trainer(trainer_call(call))
    if what == "circuit" and "patience" in named and isinstance(trainer, MaskTrainer):
        reason = "`patience` would stop a mask of edges while most of them are open"
        scope.diagnostics.append(
            BadBasis(span=named["patience"].span, reason=reason, hint="remove it", what=what)
        )
    if "patience" not in named or "validation" not in named:
        return
    if constant_value(named["validation"].value, parts.parameters) == 0:
        reason = "`patience` needs held-out rows, and `validation: 0%` holds out none"
        hint = "remove `patience`, or write `validation: 10%`"
        scope.diagnostics.append(
            BadBasis(span=named["patience"].span, reason=reason, hint=hint, what=what)
        )


def _check_trainer(call: ast.Call, what: str, parts: Definitions, scope: Namespace) -> None:
    """Report E0203 for an unknown trainer, E0207 and E0342 for its arguments.

    Args:
        call: The `fit(…)` with the trainer.
        what: First word of the statement.
    """
    node = trainer_call(call)
    trainer = _known_trainer(node, scope)
    if trainer is None:
        return
    name = trainer.name
    if not _can_declare(what, trainer):
        reason = f"`{name}` trains a {trainer.declares}, not a {what}"
        place = "" if trainer.declares == "circuit" else " at …"
        hint = f"write `{trainer.declares} NAME = {call.name}({trainer.example}, …){place}`"
        if what in ("group", "circuit") and isinstance(trainer, ScoringTrainer):
            is_search = isinstance(trainer, EdgeSearchTrainer | NodeSearchTrainer)
            examples = {
                "group": NODE_SEARCH_EXAMPLE if is_search else NODE_EXAMPLE,
                "circuit": SEARCH_EXAMPLE if is_search else SCORE_EXAMPLE,
            }
            hint += f", or choose {'sites' if what == 'group' else 'edges'}: {examples[what]}"
        scope.diagnostics.append(BadBasis(span=node.span, reason=reason, hint=hint, what=what))
        return
    options: dict[str, Constant] = {}
    for argument in trainer_arguments(node):
        value = constant_value(argument.value, parts.parameters)
        if isinstance(argument.value, ast.Name):
            scope.has("param", argument.value.id)
        problem = _trainer_problem(trainer, argument, value)
        if problem is not None:
            scope.diagnostics.append(problem)
            return
        assert argument.name is not None
        assert value is not None
        options[argument.name] = value
    missing = [each for each in trainer.required if each not in options]
    if missing:
        reason, hint = f"needs `{missing[0]}: …`", f"write `{trainer.example}`"
        scope.diagnostics.append(BadArgument(span=node.span, name=name, reason=reason, hint=hint))
        return
    scope.diagnostics.extend(_unused_options(call, trainer))
    wrong = trainer.check(options)
    if wrong is None and _accumulates(call, parts):
        wrong = trainer.check_parts(options)
    if wrong is not None:
        scope.diagnostics.append(
            BadBasis(span=node.span, reason=wrong[0], hint=wrong[1], what=what)
        )
    problem = _objective_problem(call, trainer, what) or _target_problem(call, trainer, scope)
    if problem is not None:
        scope.diagnostics.append(problem)


def _accumulates(call: ast.Call, parts: Definitions) -> bool:
    """Whether the gradients of a step are those of several batches."""
    every = (argument.value for argument in call.arguments if argument.name == "accumulate")
    return any(constant_value(each, parts.parameters) != 1 for each in every)


def _known_trainer(node: ast.Call, scope: Namespace) -> Trainer | None:
    """Return the trainer of `das(dims: 2)` or `python("own.py:Trainer")`; None after an error."""
    if is_python_call(node):
        trainer, problems = find_own_trainer(node)
        scope.diagnostics.extend(problems)
        return trainer
    known_trainer = find_trainer(node)
    if known_trainer is None:
        known = ", ".join(f"`{each.example}`" for _, each in TRAINERS.items())
        hint = did_you_mean(node.name, TRAINERS, f"it can be {known}")
        hint = OTHER_TRAINERS.get(node.name, hint)
        problem = UnknownWord(span=node.span, kind="trainer", word=node.name, hint=hint)
        scope.diagnostics.append(problem)
    return known_trainer


def _unused_options(call: ast.Call, trainer: Trainer) -> Iterator[BadArgument]:
    """Yield the problems with options of `fit` that a training doesn't use."""
    for argument in call.arguments:
        if argument.name in trainer.unused:
            has_steps = "steps" not in trainer.unused
            why = "uses all vectors in every step" if has_steps else "isn't trained in steps"
            if argument.name == "precision" and not isinstance(trainer, ScoringTrainer):
                why = "computes in 64 bits"
            hint = f"remove `{argument.name}`"
        elif argument.name == "seeds" and isinstance(trainer, ScoringTrainer):
            hint = f"declare a {trainer.declares} for each seed: `seed: 1`"
            why = "has no random start"
        else:
            continue
        reason = f"is not an argument of `fit` with `{trainer.name}`, which {why}"
        yield BadArgument(span=argument.span, name=str(argument.name), reason=reason, hint=hint)


def _target_problem(call: ast.Call, trainer: Trainer, scope: Namespace) -> BadArgument | None:
    """Return the problem with the value that a probe predicts and the model that runs its rows, or
    with such arguments of another trainer. Reports E0201 for a model."""
    given = {each.name: each for each in call.arguments if each.name in PROBE_OPTIONS}
    if not isinstance(trainer, ProbeTrainer):
        for name, argument in given.items():
            reason = f"is not an argument of `fit` with `{trainer.name}`, which predicts no value"
            hint = "remove it; `ridge` and `logistic` predict a value of the rows"
            return BadArgument(span=argument.span, name=str(name), reason=reason, hint=hint)
        return None
    if "target" not in given:
        reason = f"with `{trainer.name}` needs `target: …`, the value of the rows that is predicted"
        hint = f"write `fit({trainer.example}, prompts: fruit.train, target: count)`"
        return BadArgument(span=call.span, name=call.name, reason=reason, hint=hint)
    model = given.get("model")
    if model is not None:
        written = model.value.span.written
        name = model.value.id if isinstance(model.value, ast.Name) else written
        scope.use("model", name, model.value.span)
    return None


def _objective_problem(call: ast.Call, trainer: Trainer, what: str) -> BadArgument | None:
    """Return the problem with the run and the measure that a trainer learns from, or with such
    arguments of a dictionary.

    Args:
        what: First word of the statement.
    """
    given = {each.name: each for each in call.arguments if each.name in EFFECT_OPTIONS}
    if isinstance(trainer, PairedTrainer):
        partner = given.pop("with", None)
        problem = _partner_problem(call, partner, trainer)
        if problem is not None:
            return problem
    if not isinstance(trainer, EffectTrainer):
        for name, argument in given.items():
            reason = f"isn't an argument of `fit` with `{trainer.name}`, which learns from vectors"
            hint = "remove it; `das(…)` is trained on a measure"
            return BadArgument(span=argument.span, name=str(name), reason=reason, hint=hint)
        return None
    measures = [each for each in OBJECTIVES if each in given]
    reason, hint, span = "", f"write `fit({trainer.example}, {TRAINING_ARGUMENTS})`", call.span
    if trainer.declares == "direction":
        hint = f"write `fit({trainer.example}, prompts: fruit.train, maximise: logit(answer))`"
    fill, source = given.get("with"), given.get("from")
    if fill is not None and not isinstance(trainer, ChoosingTrainer):
        reason, hint = f"with `{trainer.name}` has no `with`", "remove it; `mask(…)` can ablate"
        span = fill.span
    elif source is not None and isinstance(trainer, ScaleTrainer | EditTrainer):
        reason = f"with `{trainer.name}` has no `from`, because it uses no other run"
        hint = "remove it; a measure can name the run: `maximise: logit(answer of fewer)`"
        span = source.span
    elif fill is not None and source is not None:
        reason, hint = "has both `from` and `with`", "keep one: the sites of a run, or an ablation"
        span = fill.span
    elif fill is not None and fill.value.span.written not in FILLS:
        reason = f"has no fill `{fill.value.span.written}`"
        hint, span = "write `with: zero` or `with: mean`", fill.span
    elif fill is None and source is None and trainer.declares != "direction":
        reason = f"with `{trainer.name}` needs `from: …`, the run whose vectors come in"
        if isinstance(trainer, ChoosingTrainer):
            reason += ", `with: zero` or `with: mean`"
    elif trainer.any_run and source is not None:
        reason = f"with `{trainer.name}` has no `from`"
        hint = "name the run with the tokens: `prompts: longer of fruit.train`"
        span = source.span
    elif not measures:
        reason = f"with `{trainer.name}` needs `maximise: …` or `minimise: …`, a measure"
    elif len(measures) > 1:
        reason, hint = "has both `maximise` and `minimise`", "keep one, such as their difference"
        span = given[measures[1]].span
    elif what != "circuit" and (own := next((n for n in ("nodes", "stack") if n in given), "")):
        of = {"nodes": "which are those of a circuit", "stack": "which is that of a circuit"}[own]
        reason, hint, span = f"of a {what} has no `{own}`, {of}", "remove it", given[own].span
    return BadArgument(span=span, name=call.name, reason=reason, hint=hint) if reason else None


def _partner_problem(
    call: ast.Call, partner: ast.Argument | None, trainer: Trainer
) -> BadArgument | None:
    """Return the problem with the other vectors that a trainer needs."""
    example = f"fit({trainer.example}, prompts: fruit.train, with: resid_post layer 3)"
    hint = f"write `{example}`, or values of the rows: `with: [count, item]`"
    if partner is None:
        reason = f"with `{trainer.name}` needs `with: …`, the vectors to correlate with"
        return BadArgument(span=call.span, name=call.name, reason=reason, hint=hint)
    value = partner.value
    items = value.items if isinstance(value, ast.ListLiteral) else (value,)
    named = bool(items) and all(isinstance(item, ast.Name) for item in items)
    if named or isinstance(value, ast.Site | ast.SiteView):
        return None
    written = value.span.written
    reason = f"with `{trainer.name}` has no vectors `{written}` to correlate with"
    return BadArgument(span=partner.span, name=call.name, reason=reason, hint=hint)


def _trainer_problem(
    trainer: Trainer, argument: ast.Argument, value: Constant | None
) -> BadArgument | BadBasis | None:
    """Return the problem with one argument of a trainer."""
    name = argument.name
    if name is None or name not in trainer.options:
        others = OTHER_MASK_OPTIONS if isinstance(trainer, MaskTrainer) else OTHER_TRAINER_OPTIONS
        others = {**others, **trainer.other_options}
        return _unknown_option(argument, trainer.name, trainer.options, others)
    problem = trainer.check_option(name, value)
    if problem is None:
        return None
    return BadBasis(span=argument.span, reason=problem[0], hint=problem[1], what=trainer.declares)


def _misspelt_options(call: ast.Call, method: BasisMethod) -> set[str | None]:
    """Return the options that unknown arguments probably mean; E0207 reports the arguments."""
    names = [a.name for a in call.arguments if a.name is not None and a.name not in method.options]
    return {closest_name(name, method.options) for name in names}


def _missing_argument(
    call: ast.Call, method: BasisMethod, values: Sequence[ast.Node]
) -> BadArgument | None:
    """Return E0207 for a call with a wrong number of operands, or without a required option."""
    one, two = (
        ("block", "dictionary", "python", "training"),
        ("value and block", "jacobian", "file"),
    )
    wanted = {**dict.fromkeys(one, 1), **dict.fromkeys(two, 2)}
    fewest = {"tokens": 2, "directions": 1}.get(method.takes)
    exact = len(values) == wanted.get(method.takes, 0)
    enough = exact if fewest is None else len(values) >= fewest
    given = {OTHER_OPTIONS.get(a.name, a.name) for a in call.arguments if a.name is not None}
    missing = [each for each in method.required if each not in given]
    if enough and not missing:
        return None
    mapped = any(isinstance(value, ast.SiteMap) for value in values)
    example = BASIS_METHODS["jacobian"].example if mapped else method.example
    if enough and method.takes == "training":
        example = f"{call.name}({values[0].span.written}, {missing[0]}: fruit.train, …)"
    return BadArgument(
        span=call.span,
        name=call.name,
        reason=f"needs `{missing[0]}: …`" if enough else f"is written `{method.example}`",
        hint=f"write `{example}`",
    )


def _check_matrix_rows(
    call: ast.Call,
    method: BasisMethod,
    values: Sequence[ast.Node],
    parts: Definitions,
    scope: Namespace,
) -> None:
    """Report E0207 unless the arguments are `unembed` and texts."""
    if not (isinstance(values[0], ast.Name) and values[0].id == "unembed"):
        scope.diagnostics.append(
            BadArgument(
                span=values[0].span,
                name=call.name,
                reason=f"has no matrix `{values[0].span.written}`",
                hint=f"write `{method.example}`",
            )
        )
    _check_texts(call, method, values[1:], parts, scope)


def _check_texts(
    call: ast.Call,
    method: BasisMethod,
    values: Sequence[ast.Node],
    parts: Definitions,
    scope: Namespace,
) -> None:
    for value in values:
        if not isinstance(constant_value(value, parts.parameters), str):
            scope.diagnostics.append(
                BadArgument(
                    span=value.span,
                    name=call.name,
                    reason="takes texts in quotes",
                    hint=f"write `{method.example}`",
                )
            )
