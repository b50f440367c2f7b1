"""Features of attribution graphs in the JSON files of circuit-tracer and Neuronpedia.

A file has `nodes` and `links`; `qParams` has the supernodes that a user made in a viewer, each with
its name and the names of its nodes. The node of a feature is called `LAYER_FEATURE_TOKEN`.

References:
    github.com/safety-research/circuit-tracer, `circuit_tracer/frontend/graph_models.py`
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias, cast

from mechdsl.base import limits
from mechdsl.base.files import UnreadableFile, load_json
from mechdsl.base.records import Record, record
from mechdsl.base.text import count_noun, name_list
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.dictionaries.folder import read_limited_file

LayerFeature: TypeAlias = tuple[int, int]
"""A layer, and a feature of its transcoder."""

FEATURES = ("cross layer transcoder", "unexplored node")
"""Types of the nodes that are features."""

_FORM = "write the file with `create_graph_files` of circuit-tracer, or with `report graph`"

_CONVERSION = (
    'write its JSON with circuit-tracer where you trust the file: `create_graph_files("FILE", '
    '"graph", "folder")`'
)

_FEATURE = re.compile(r"(\d{1,4})_(\d{1,9})_(\d{1,9})")


@record
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
                raise UnreadableFile(f"`{written}` has no features", _FORM)
            return self.features, f"{count_noun(len(self.features), 'feature')} of {written}"
        found = [each for each in self.supernodes if each[0] == name]
        if not found:
            names = [each[0] for each in self.supernodes]
            hint = f'leave out the name for all features of the graph: `saved("{written}", t0)`'
            if names:
                hint = did_you_mean(name, names, f"it has {name_list(names[:10])}")
            raise UnreadableFile(f"`{written}` has no supernode `{name}`", hint)
        if len(found) > 1:
            reason = f"`{written}` has {len(found):,} supernodes `{name}`"
            raise UnreadableFile(reason, "rename them in the viewer, and save the graph again")
        ((_, features, others),) = found
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
        found: Any = load_json(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise UnreadableFile(f"`{written}` is not a JSON object", _FORM) from None
    return found, sha256(content).hexdigest()


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
        return UnreadableFile(f"`{self.written}` {reason}", _FORM)

    def _read_node(self, node: Any) -> None:
        known = cast("Mapping[str, Any]", node) if isinstance(node, dict) else {}
        name, kind, token = (known.get(key) for key in ("node_id", "feature_type", "ctx_idx"))
        if not isinstance(name, str) or not isinstance(kind, str):
            raise self._error("has a node without the texts `node_id` and `feature_type`")
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
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
                raise self._error(f"has a link whose `{key}` is no node of the file")
            ends.append(self.depths[name])
        said = f"a link from `{known['source']}` to `{known['target']}`"
        weight = known.get("weight")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(cast("float", weight)):
            raise self._error(f"has {said} whose `weight` isn't a finite number")
        if not any(of[0] < to[0] and of[1] <= to[1] for of in ends[0] for to in ends[1]):
            reason = "which doesn't lead from a layer to a later one at the same or a later token"
            raise self._error(f"has {said}, {reason}")

    def _read_supernode(self, given: Any) -> tuple[str, frozenset[LayerFeature], int]:
        """Read `["name", "node", …]`."""
        parts = cast("list[Any]", given) if isinstance(given, list) else []
        if not parts or not all(isinstance(each, str) for each in parts):
            raise self._error("has `supernodes` that aren't lists of names")
        name, *members = cast("list[str]", parts)
        for member in members:
            if member not in self.depths:
                reason = f"has the supernode `{name}` with `{member}`, which is no node of the file"
                raise self._error(reason)
        features = frozenset(self.features[each] for each in members if each in self.features)
        return name, features, sum(each not in self.features for each in members)
