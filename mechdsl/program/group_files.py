"""Groups in JSON files: features of attribution graphs, and sites that a training chose.

A graph of circuit-tracer or Neuronpedia has `nodes` and `links`; `qParams` has the supernodes that
a user made in a viewer, each with its name and the names of its nodes. The node of a feature is
called `LAYER_FEATURE_TOKEN`.

In `mask.json` of a training, `sites` lists the candidates, `["z", 2, 0]`, `["resid_post", 3, null,
null, 12]` or `["resid_post", 3, null, "f", 12]`, `labels` their names, `scores` or `probabilities`
a number for each, `chosen` the numbers of those of the group, and `dictionaries` the SHA-256 of
`f`. Candidates that are positions are `[4]`; `positions` has their text in the file, `at`, and
their `labels`.

References:
    github.com/safety-research/circuit-tracer, `circuit_tracer/frontend/graph_models.py`
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard, cast

from mechdsl.base import limits
from mechdsl.base.files import UnreadableFile, load_object
from mechdsl.base.limits import is_integer, is_number
from mechdsl.base.records import Record
from mechdsl.base.text import Source, Span, count_noun, name_list
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.dictionaries.folder import read_limited_file
from mechdsl.syntax import ast
from mechdsl.syntax.frontend import parse
from mechdsl.syntax.traversal import number_names
from mechdsl.syntax.tree_builder import RegisteredWords

LayerFeature: TypeAlias = tuple[int, int]
"""A layer, and a feature of its transcoder."""

FEATURES = ("cross layer transcoder", "unexplored node")
"""Types of the nodes that are features."""

_GRAPH_FORM = "write the file with `create_graph_files` of circuit-tracer, or with `report graph`"

_CONVERSION = (
    'write its JSON with circuit-tracer where you trust the file: `create_graph_files("FILE", '
    '"graph", "folder")`'
)

_FEATURE = re.compile(r"(\d{1,4})_(\d{1,9})_(\d{1,9})")


class GraphFile(Record):
    """The features of a graph, and of its supernodes."""

    digest: str
    """SHA-256 of the file."""
    features: frozenset[LayerFeature]
    supernodes: tuple[tuple[str, frozenset[LayerFeature], int], ...]
    """(name, features, number of other nodes) of each."""

    def choose(self, name: str | None, written: str) -> tuple[frozenset[LayerFeature], str]:
        """Return the features of a supernode, or of the whole graph, and what they are.

        Raises:
            UnreadableFile: It has no features, or the name is that of no or of several supernodes.
        """
        if name is None:
            if not self.features:
                raise UnreadableFile(f"`{written}` has no features", _GRAPH_FORM)
            return self.features, f"{count_noun(len(self.features), 'feature')} of {written}"
        supernodes = [supernode for supernode in self.supernodes if supernode[0] == name]
        if not supernodes:
            names = [supernode[0] for supernode in self.supernodes]
            hint = f'leave out the name for all features of the graph: `saved("{written}", t0)`'
            if names:
                hint = did_you_mean(name, names, f"it has {name_list(names[:10])}")
            raise UnreadableFile(f"`{written}` has no supernode `{name}`", hint)
        if len(supernodes) > 1:
            reason = f"`{written}` has {len(supernodes):,} supernodes `{name}`"
            raise UnreadableFile(reason, "rename them in the viewer, and save the graph again")
        ((_, features, others),) = supernodes
        if not features:
            reason = f"the supernode `{name}` of `{written}` has no features"
            raise UnreadableFile(
                reason, "a group has features; tokens, errors and logits have none"
            )
        said = f"{count_noun(len(features), 'feature')} of supernode `{name}` of {written}"
        return features, said + (f", without {count_noun(others, 'other node')}" if others else "")


def load_group(path: Path, written: str) -> tuple[object, str]:
    """Load the JSON file of a group, and return its content and its SHA-256.

    Args:
        written: The path as the user wrote it.

    Raises:
        UnreadableFile: The file is missing or too large, or isn't JSON.
    """
    large = "prune the graph with a lower `node_threshold`"
    content = read_limited_file(path, written, limits.GRAPH_FILE, pickled=_CONVERSION, large=large)
    try:
        group = load_object(content)
    except ValueError as error:
        hint = f"{error}; {_GRAPH_FORM}"
        raise UnreadableFile(f"`{written}` is not a JSON object", hint) from None
    return group, sha256(content).hexdigest()


def read_graph(content: object, digest: str, written: str) -> GraphFile:
    """Read the features of a graph.

    Args:
        digest: SHA-256 of the file.
        written: The path as the user wrote it.

    Raises:
        UnreadableFile: The file has another form, or its links don't make an attribution graph.
    """
    return _Reader(written).read(content, digest)


class _Reader:
    """Reads the content of a file."""

    def __init__(self, written: str) -> None:
        self.written = written
        self.features: dict[str, LayerFeature] = {}
        """Name of a node → its feature."""
        self.others: set[str] = set()
        """Names of nodes that aren't features. An error of circuit-tracer may have the name of a
        feature, `0_LAYER_TOKEN`."""
        self.depths: dict[str, list[tuple[float, int]]] = {}
        """Name → (layer, token) of the nodes with this name."""

    def read(self, found: Any, digest: str) -> GraphFile:
        parts = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
        for name in ("nodes", "links"):
            if not isinstance(parts.get(name), list):
                raise self._error(f"has no list `{name}`, as an attribution graph has")
        for node in parts["nodes"]:
            self._read_node(node)
        for link in parts["links"]:
            self._check_link(link)
        options = parts.get("qParams")
        supernodes = options.get("supernodes") if isinstance(options, dict) else None
        listed = cast("Any", supernodes or [])
        if not isinstance(listed, list):
            raise self._error("has `supernodes` that aren't lists of names")
        groups = [self._read_supernode(each) for each in cast("list[Any]", listed)]
        return GraphFile(digest, frozenset(self.features.values()), tuple(groups))

    def _error(self, reason: str) -> UnreadableFile:
        return UnreadableFile(f"`{self.written}` {reason}", _GRAPH_FORM)

    def _read_node(self, node: Any) -> None:
        known = cast("Mapping[str, Any]", node) if isinstance(node, dict) else {}
        name, kind, token = (known.get(key) for key in ("node_id", "feature_type", "ctx_idx"))
        if not isinstance(name, str) or not isinstance(kind, str):
            raise self._error("has a node without the texts `node_id` and `feature_type`")
        if not is_integer(token, least=0):
            raise self._error(f"has the node `{name}`, whose `ctx_idx` isn't the number of a token")
        layer = str(known.get("layer"))
        if layer != "E" and not re.fullmatch(r"\d{1,4}", layer):
            raise self._error(f"has the node `{name}`, whose `layer` isn't a number or `E`")
        is_feature = kind in FEATURES
        if name in (self.features if is_feature else self.others):
            raise self._error(f"has two nodes `{name}`")
        depth = {"embedding": -1.0, "logit": math.inf}.get(kind, -1.0 if layer == "E" else None)
        self.depths.setdefault(name, []).append((float(layer) if depth is None else depth, token))
        if not is_feature:
            self.others.add(name)
            return
        match = _FEATURE.fullmatch(name)
        if match is None or (match[1], int(match[3])) != (layer, token):
            reason = "whose name isn't `LAYER_FEATURE_TOKEN` with its layer and token"
            raise self._error(f"has the feature `{name}`, {reason}")
        self.features[name] = int(match[1]), int(match[2])

    def _check_link(self, link: Any) -> None:
        """Check that a link leads to a later layer, and not to an earlier token."""
        known = cast("Mapping[str, Any]", link) if isinstance(link, dict) else {}
        ends: list[list[tuple[float, int]]] = []
        for key in ("source", "target"):
            name = known.get(key)
            if not isinstance(name, str) or name not in self.depths:
                raise self._error(f"has a link whose `{key}` isn't a node of the file")
            ends.append(self.depths[name])
        said = f"a link from `{known['source']}` to `{known['target']}`"
        weight = known.get("weight")
        if not is_number(weight) or not math.isfinite(weight):
            raise self._error(f"has {said} whose `weight` isn't a finite number")
        if not any(of[0] < to[0] and of[1] <= to[1] for of in ends[0] for to in ends[1]):
            reason = "which doesn't lead from a layer to a later one at the same or a later token"
            raise self._error(f"has {said}, {reason}")

    def _read_supernode(self, given: Any) -> tuple[str, frozenset[LayerFeature], int]:
        """Read `["name", "node", …]`."""
        parts = cast("list[Any]", given) if isinstance(given, list) else []
        if not parts or not all(isinstance(part, str) for part in parts):
            raise self._error("has `supernodes` that aren't lists of names")
        name, *members = cast("list[str]", parts)
        for member in members:
            if member not in self.depths:
                reason = f"has the supernode `{name}` with `{member}`, which isn't one of its nodes"
                raise self._error(reason)
        features = frozenset(self.features[each] for each in members if each in self.features)
        return name, features, sum(each not in self.features for each in members)


# --- masks of trainings ---------------------------------------------------------------------------

SavedPoint: TypeAlias = tuple[str, int | None, int | None]
"""Site, layer and unit."""

_MASK_FORM = "write the file with `mechdsl fit FILE --out FOLDER`"


LISTED_SITES = 8
"""Members of a group that a convention lists."""


class _Candidate(NamedTuple):
    """One entry of `sites`."""

    point: SavedPoint
    number: int | None
    """Of a dimension or a feature; None for a site."""


class SavedMask(Record):
    """The group of a file."""

    digest: str
    """SHA-256 of the file."""
    chosen: tuple[_Candidate, ...]
    """The group, in the order of the candidates."""
    ranked: tuple[_Candidate, ...]
    """The group, best first."""
    last: tuple[SavedPoint, ...]
    """For each site and layer of the candidates, the one with the largest unit."""
    made: str
    """What was read, for conventions."""
    prompts: tuple[str, ...]
    """Digests of the prompts that the group was chosen on; empty if the file has none."""
    dictionary: tuple[str, str] | None = None
    """The basis of its features and the SHA-256 in the file; None for sites and dimensions."""

    @property
    def _basis(self) -> str | None:
        return None if self.dictionary is None else self.dictionary[0]

    def list_sites(self, span: Span) -> tuple[ast.Site, ...]:
        """Return the group: a site for each member, or the dimensions of each vector."""
        layers: dict[SavedPoint, list[int]] = {}
        for point, number in self.chosen:
            layers.setdefault(point, []).extend(() if number is None else (number,))
        return tuple(_site(point, numbers, span, self._basis) for point, numbers in layers.items())

    def list_ranked(self, span: Span) -> tuple[ast.Site, ...]:
        """Return each member, best first."""
        return tuple(
            _site(point, () if number is None else (number,), span, self._basis)
            for point, number in self.ranked
        )


def is_mask(content: object) -> TypeGuard[dict[str, Any]]:
    """Whether the content of a JSON file is a trained mask."""
    return isinstance(content, dict) and {"labels", "sites", "chosen"} <= content.keys()


def read_mask(
    content: Mapping[str, Any], digest: str, written: str, bases: Sequence[str] = ()
) -> SavedMask:
    """Read the group of a `mask.json`.

    Args:
        digest: SHA-256 of the file.
        written: The path as the user wrote it.
        bases: The names after the path: for features, the name of their dictionary.

    Raises:
        UnreadableFile: The file is malformed, or has edges; the bases don't fit, or the file
            doesn't identify the dictionary of its features.
    """
    from mechdsl.base.side_files import check_entries
    from mechdsl.program.saved_forms import MaskForm

    _reject_edges(content["sites"], written)
    form = check_entries(MaskForm, content, written, hint=_MASK_FORM)
    listed = form.sites
    dictionary = _find_dictionary(content, written, bases)
    basis = None if dictionary is None else dictionary[0]
    try:
        every = [_candidate(each) for each in listed]
        given, chosen = form.scores or form.probabilities or [], form.chosen
        scores = [math.nan if score is None else score for score in given]
        sound = len(set(chosen)) == len(chosen) and len(scores) == len(every)
        sound = sound and all(math.isfinite(scores[number]) for number in chosen)
        sound = sound and len({number is None for _, number in every}) == 1
        of_bases = {entry[3] if len(entry) == 5 else None for entry in listed}
        sound = sound and len(of_bases) == 1
        sound = sound and (basis is None or len({point for point, _ in every}) == 1)
        if not sound or len(set(every)) < len(every):
            raise ValueError
        ranked = chosen
        if not form.ranked:
            ranked = sorted(chosen, key=lambda each: (-abs(scores[each]), each))
        group = tuple(every[number] for number in ranked)
    except (KeyError, TypeError, ValueError, IndexError):
        reason = f"`{written}` has no group: `chosen` has the numbers of some of its `sites`"
        raise UnreadableFile(reason, _MASK_FORM) from None
    what = "site" if every[0].number is None else "dimension" if basis is None else "feature"
    made = f"{len(group):,} of {count_noun(len(every), what)} of {written}: {_name(group, basis)}; "
    made += f"SHA-256 {digest[:12]}…"
    listed = tuple(every[number] for number in sorted(chosen))
    prompts = tuple(form.prompts)
    last = tuple(_last_points(every))
    return SavedMask(digest, listed, group, last, made, prompts, dictionary)


def _first_entry(listed: object) -> list[Any]:
    """Return the first entry of `sites`; an empty list without any."""
    entries = cast("list[Any]", listed) if isinstance(listed, list) else []
    return cast("list[Any]", entries[0]) if entries and isinstance(entries[0], list) else []


def _reject_edges(listed: object, written: str) -> None:
    """Raise UnreadableFile if the sites of a file are edges."""
    first = _first_entry(listed)
    if len(first) > 5:
        reason = f"`{written}` is a circuit of edges"
        raise UnreadableFile(reason, f'read it as a circuit: `circuit c = saved("{written}")`')


class SavedPositions(Record):
    """A group of positions that is read from a file."""

    at: ast.Positions
    """The candidates."""
    labels: tuple[str, ...]
    """Labels of the chosen positions."""
    made: str
    """Description of the file, for conventions."""
    prompts: tuple[str, ...]
    """Digests of the prompts that the group was chosen on; empty if the file has none."""


def has_positions(content: Mapping[str, Any]) -> bool:
    """Whether a trained mask chose positions."""
    return len(_first_entry(content["sites"])) == 1


def read_positions(content: Mapping[str, Any], digest: str, written: str) -> SavedPositions:
    """Read the positions that a `mask.json` chose.

    Args:
        digest: SHA-256 of the file.
        written: The path as the user wrote it.

    Raises:
        UnreadableFile: The file is malformed, or its positions depend on a parameter.
    """
    from mechdsl.base.side_files import check_entries
    from mechdsl.program.saved_forms import MaskForm

    form = check_entries(MaskForm, content, written, hint=_MASK_FORM)
    try:
        if form.positions is None:
            raise ValueError
        text, labels, chosen = form.positions.at, form.positions.labels, form.chosen
        sound = len(set(chosen)) == len(chosen)
        if not sound or not len(labels) == len(set(labels)) == len(form.sites):
            raise ValueError
        group = tuple(labels[number] for number in sorted(chosen))
        names = [form.labels[number] for number in sorted(chosen)]
    except (ValueError, IndexError):
        reason = f"`{written}` has numbers of positions without the text of `positions`"
        hint = "train it again, and write the file: `mechdsl fit FILE --fresh --out FOLDER`"
        raise UnreadableFile(reason, hint) from None
    source = Source(f"mech 1\ngroup g = fit(x) at resid_post layer 0 at {text}\n")
    tree, problems = parse(source, RegisteredWords())
    _, *defined = tree.statements  # after the version
    at = defined[0].at if len(defined) == 1 and isinstance(defined[0], ast.GroupDef) else None
    if problems or tree.lost or at is None:
        raise UnreadableFile(f"`{written}` has `{text[:80]}`, which aren't positions", _MASK_FORM)
    name = next(iter(number_names(at)), None)
    if name is not None:
        reason = f"`{written}` has the positions `{text[:80]}`, without a number for `{name}`"
        hint = f"write a number instead of `{name}` in the `fit` of the group, and train it again"
        raise UnreadableFile(reason, hint)
    listed = ", ".join(names[:LISTED_SITES])
    more = len(group) - LISTED_SITES
    listed += f" and {more:,} more" if more > 0 else ""
    made = f"{len(group):,} of {count_noun(len(labels), 'position')} of {written}: {listed}; "
    made += f"SHA-256 {digest[:12]}…"
    return SavedPositions(at, group, made, tuple(form.prompts))


def _find_dictionary(
    content: Mapping[str, Any], written: str, bases: Sequence[str]
) -> tuple[str, str] | None:
    """Return the name of the dictionary of the features of a file, as this program has it, and its
    SHA-256 in the file; None for sites and dimensions. Raises UnreadableFile."""
    first = _first_entry(content["sites"])
    if len(first) != 5 or not isinstance(first[3], str):
        if bases:
            reason = f"`{written}` has the sites of a trained group, without bases"
            raise UnreadableFile(reason, f'write `group g = saved("{written}")`')
        return None
    name, known = first[3], content.get("dictionaries")
    dictionary = cast("Mapping[str, Any]", known).get(name) if isinstance(known, dict) else None
    if not isinstance(dictionary, str) or not dictionary:
        reason = f"`{written}` has features of `{name}`, and doesn't identify this basis"
        hint = f"list the features: `group g = features 3, 12 of {name}`"
        raise UnreadableFile(reason, hint)
    if len(bases) != 1:
        reason = f"`{written}` has features of one dictionary, `{name}`"
        raise UnreadableFile(reason, f'name it: `group g = saved("{written}", {name})`')
    return bases[0], dictionary


def _candidate(entry: Any) -> _Candidate:
    """Return an entry of `sites`. Raises ValueError and TypeError."""
    site, layer, unit, *rest = entry
    numbers = [each for each in (layer, unit) if each is not None]
    if rest:
        _, number = rest
        numbers.append(number)
    whole = all(is_integer(own, least=0) for own in numbers)
    if not re.fullmatch(r"[a-z_]{1,40}( [a-z]{1,40})?", site) or not whole:
        raise ValueError
    return _Candidate((site, layer, unit), rest[1] if rest else None)


def _name(group: Sequence[_Candidate], basis: str | None) -> str:
    """Return the first members of a group as a file names them, for conventions.

    Args:
        basis: The dictionary of features; None for sites and dimensions.
    """
    of = "" if basis is None else f" of {basis}"
    names: list[str] = []
    for (site, layer, unit), number in group[:LISTED_SITES]:
        word = "dim" if basis is None else "feature"
        axes = ("layer", layer), (_unit_word(site), unit), (word, number)
        words = (f"{word} {own}" for word, own in axes if own is not None)
        names.append(" ".join((site, *words)) + of)
    more = len(group) - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "")


def _unit_word(site: str) -> ast.AxisWord:
    """Return the word before the number of a unit."""
    return "neuron" if site.split()[0] == "mlp_hidden" else "head"


def _last_points(candidates: Iterable[_Candidate]) -> Iterator[SavedPoint]:
    """Yield for each site and layer the candidate with the largest unit."""
    last_layers: dict[tuple[str, int | None], int | None] = {}
    for (site, layer, unit), _ in candidates:
        old = last_layers.get((site, layer))
        last_layers[site, layer] = unit if old is None or unit is None else max(old, unit)
    for (site, layer), unit in last_layers.items():
        yield site, layer, unit


def _site(
    point: SavedPoint, numbers: Sequence[int], span: Span, basis: str | None = None
) -> ast.Site:
    """Return a site, or dimensions or features of its vector, as a file names it."""
    site, layer, unit = point
    word: ast.AxisWord = "dim" if basis is None else "feature"
    given: dict[ast.AxisWord, Sequence[int]] = {
        "layer": () if layer is None else (layer,),
        _unit_word(site): () if unit is None else (unit,),
        word: numbers,
    }
    axes = tuple(
        ast.Axis(name, True, _values(own, span), of=basis if name == word else None, span=span)
        for name, own in given.items()
        if own
    )
    return ast.Site(tuple(ast.Name(each, span=span) for each in site.split()), axes, span=span)


def _values(numbers: Sequence[int], span: Span) -> tuple[ast.AxisRange, ...]:
    return tuple(ast.AxisRange(ast.Bound(number, span=span), span=span) for number in numbers)
