"""Forms of circuits, masks and attribution graphs in JSON files.

pydantic models take a while to build, so this module is imported on use.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mechdsl.base.side_files import Finite, SideFile

Whole = Annotated[int, Field(ge=0)]


class ModelSizes(SideFile):
    """The model that a graph was written for."""

    n_layers: Whole | None = None
    n_heads: Whole | None = None
    d_model: Whole | None = None
    parallel_attn_mlp: bool | None = None


class GraphNode(SideFile):
    neurons: list[bool] = Field(default_factory=list[bool])


class GraphEdge(SideFile):
    score: Finite | None = None
    in_graph: bool = False


class ChosenSites(SideFile):
    """Entries of graphs and of trained masks."""

    prompts: list[str] = Field(default_factory=list[str])
    dictionaries: dict[str, str] = Field(default_factory=dict[str, str])


class PositionTexts(SideFile):
    at: str
    """The candidates, as a `.mech` file names them."""
    labels: list[str]


class MaskForm(ChosenSites):
    """`mask.json` of a training."""

    labels: list[str]
    scores: list[Finite | None] | None = None
    probabilities: list[Finite] | None = None
    chosen: list[Whole] = Field(min_length=1)
    sites: list[list[int | str | None]] = Field(default_factory=list[list[int | str | None]])
    ranked: bool = False
    positions: PositionTexts | None = None


class GraphForm(ChosenSites):
    """A graph of EAP-IG or MIB, or a list of edges."""

    cfg: ModelSizes | None = None
    nodes: dict[str, GraphNode] = Field(default_factory=dict[str, GraphNode])
    edges: list[str] | dict[str, GraphEdge]
