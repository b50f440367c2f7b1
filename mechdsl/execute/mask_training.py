"""Training of a declared mask, and choice of a declared circuit or group by scores of edges or
nodes: what each chooses, its controls and its file.

A gate m of a site or a position writes x + m (y − x), where x is the vector of the running pass,
after the writes at earlier layers, and y the vector of the source run, the mean of the training
rows, or 0. A gate of a coordinate does the same with the coordinate f of x: the vector becomes
x + decode(f + m (f′ − f)) − decode(f), as rules in a basis write it. A gate of an edge adds
m (y − x) to the stream that the receiver of the edge reads, where x is the output of its sender.

In a training step, every row has its own sample of the gates. After the training, the gates with
the largest probabilities are 1 and the others 0.

The score of the edge from u to v is (u′ − u) · ∂m/∂(input of v), summed over tokens and averaged
over training rows: u′ is the other value of the sender, u its output in the clean run, and m the
measure. One forward and one backward pass of a batch score all edges. Gradients at points of a path
from the other run to the clean one are averaged. The score of a node is the gradient of the measure
by the share of its gate: Σ (y − x) · ∂m/∂x, in the clean run, where all gates are 0, or averaged
over midpoints of a line on which all gates of a site and layer open together.

References:
    Louizos et al. 2018, arXiv 1712.01312; Cao et al. 2021, arXiv 2104.03514 (masks that find
    subnetworks); Bhaskar et al. 2024, arXiv 2406.16778 (masks over edges); Syed et al. 2023,
    arXiv 2310.10348 (EAP); Hanna et al. 2024, arXiv 2403.17806 (EAP-IG, and the selection from the
    end of the model backwards); Mueller et al. 2025, arXiv 2504.13151 (MIB); Nanda 2023,
    Attribution patching (scores of nodes); Sundararajan et al. 2017, arXiv 1703.01365 (on a line);
    Kramár et al. 2024, arXiv 2403.00745 (AtP*); Hsu et al. 2024, arXiv 2407.00886 (CD-T).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import islice, product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.hashing import stable_hash
from mechdsl.base.text import HintedError, count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.dictionaries.features import Dictionary
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.execute.objective_rows import EffectRows
from mechdsl.execute.patching.differentiated_run import (
    BasePatterns,
    DifferentiatedRun,
    DrawLanes,
    renormalize_scores,
    write_point,
)
from mechdsl.execute.patching.writes import (
    group_senders,
    list_other_neurons,
    list_stream_nodes,
    number_unit,
)
from mechdsl.execute.training import TrainingJob, VectorCache, read_settings
from mechdsl.execute.vectors import DirectionFits
from mechdsl.fits.gates import Gates
from mechdsl.fits.reports import MASK_FILE, CircuitReport, MaskReport, NodeReport, NodeSearchReport
from mechdsl.fits.training import Training, TrainingSettings, TrainingState
from mechdsl.forward.hooks.backward_rules import compute_gradients
from mechdsl.forward.hooks.batch import (
    CircuitRead,
    CircuitWrite,
    SenderFill,
    SiteRead,
    SiteWrite,
    indices_to_device,
    number_senders,
    stream_of,
    to_device,
    try_pass,
)
from mechdsl.forward.hooks.circuits import compute_edge_scores, reads_encoder
from mechdsl.forward.hooks.coordinates import OTHERS, CoordinateSystem, FeatureSplit
from mechdsl.forward.hooks.full_pass import open_rules, run_full
from mechdsl.forward.hooks.hook_points import get_scale, undo_scale
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.shape import PaddingSide, unit_count, vector_width
from mechdsl.planner.cost import list_dropped_layers
from mechdsl.planner.rows import number_edge_ends
from mechdsl.planner.training_cost import (
    RANDOM_CONTROLS,
    count_decomposed_parts,
    count_scored_rows,
    count_single_rows,
)
from mechdsl.program import spec
from mechdsl.program.estimators import BackwardRules
from mechdsl.program.trainers import (
    EdgeScoreTrainer,
    EdgeSearchTrainer,
    MaskTrainer,
    NodeScoreTrainer,
    NodeSearchTrainer,
    ScoringTrainer,
)
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.resolve.circuit_files import EMBEDDING, ENCODER_EMBEDDING, VISION_EMBEDDING
from mechdsl.resolve.circuits import (
    NEURONS,
    CircuitDraws,
    EdgeGraph,
    OnePlaceGraph,
    PathGraph,
    PlacedGraph,
    has_two_streams,
)
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.trainings import key_of_candidate, moved_positions, order_places, paired_cells
from mechdsl.resolve.types import (
    BasisTargets,
    CircuitEdge,
    CircuitTargets,
    MaskCandidate,
    PlacedEdge,
    PositionChoice,
    ResolvedExperiment,
    SiteCoordinate,
    SiteLayer,
    SitePoint,
    TrainedMask,
    count_numbers,
)
from mechdsl.resolve.types import Training as DeclaredTraining
from mechdsl.vocab.sites import SITES, in_stack

UNDECIDED = 0.1, 0.9
"""A gate is decided that is chosen with a larger probability, or isn't with a smaller one."""


class NoBasis(Exception):
    """The basis whose coordinates a mask chooses from can't be computed."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        super().__init__()
        self.diagnostics = tuple(diagnostics)


@dataclass(frozen=True, eq=False)
class MaskRows(EffectRows[Tensor]):
    """The rows of a training that writes each candidate of a mask to the share of its gate.

    An edit is [row, candidate] or [candidate] shares from 0 to 1; rows are in ascending order.
    """

    candidates: Sequence[MaskCandidate]

    @cached_property
    def active(self) -> Ints:
        """[gate] numbers of the candidates with a gate: writing the others changes no training
        row."""
        return np.arange(len(self.candidates))

    @property
    def joint(self) -> Sequence[Ints]:
        """Numbers of the candidates of each site and layer."""
        return [np.arange(len(self.candidates))]

    @property
    def _fill(self) -> str | None:
        """`zero` or `mean`; None for the vectors of a run."""
        fill = self.objective.rules[0].spec.fill
        return None if fill is None else fill.span.written

    @cached_property
    def _trained_vectors(self) -> Tensor:
        """[vector] numbers of the vectors of the training rows."""
        rows = np.sort(self.rows[self.held_out_count :])
        return torch.from_numpy(self._vectors_of(rows)[0])

    @cached_property
    def _tokens(self) -> Ints:
        """[vector, 2] the position of each vector, and the number of its token there."""
        cells = [written for written, _ in paired_cells(self.objective)]
        tokens = [
            (number, token)
            for row in np.sort(self.rows).tolist()
            for number, cell in enumerate(cells)
            for hit in cell.hits[row]
            for token in range(len(hit))
        ]
        return np.array(tokens, dtype=np.int64)

    @cached_property
    def _slots(self) -> Ints:
        """[vector] number of its token at its position: vectors with equal numbers are averaged."""
        return np.unique(self._tokens, axis=0, return_inverse=True)[1].reshape(-1)

    def _average(self, read: Callable[[Ints], Sequence[Tensor]]) -> list[Tensor]:
        """Return [token, …]: the means of what is read over the vectors of training rows, for each
        number in `_slots`; 0 if no training row has it, which only masks over positions allow.

        Args:
            read: Returns [vector, …] of some rows, one or more.
        """
        trained = np.bincount(self._slots[self._trained_vectors.numpy()])
        means: list[Tensor] = []
        for part in self._training_parts():
            slots, values = self._slots[self._vectors_of(part)[0]], read(part)
            empty = (value.new_zeros(self._slots.max() + 1, *value.shape[1:]) for value in values)
            means = means or list(empty)
            for slot in np.unique(slots):
                indices = torch.from_numpy(np.flatnonzero(slots == slot))
                share = len(indices) / int(trained[slot])
                for total, value in zip(means, values, strict=True):
                    total[slot] += share * value[indices.to(value.device)].mean(0)
        return means

    def _slots_of(self, rows: Ints) -> Tensor:
        """Return [vector] the numbers of the means of some rows' vectors."""
        return torch.from_numpy(self._slots[self._vectors_of(rows)[0]])

    @property
    def trained(self) -> Ints:
        """[row] ascending numbers of the training rows."""
        return np.sort(self.rows[self.held_out_count :])

    @property
    def prompts(self) -> list[str]:
        """Digests of the prompts of training rows and held-out rows."""
        return [row.digest for row in self.objective.table.runs[spec.CLEAN].rows]

    @property
    def dictionaries(self) -> dict[str, dict[str, str]]:
        """`dictionaries` with the name and SHA-256 of each whose features are candidates or nodes
        of edges; empty without any."""
        return {}

    @property
    def places(self) -> dict[str, dict[str, object]]:
        """`positions` with the text and the labels of positions that are candidates; empty for
        others."""
        return {}

    def random_choices(self, chosen: Sequence[int], seed: int) -> list[list[int]]:
        """Return random choices of the same number of gates.

        Args:
            chosen: Numbers of the gates that the mask chose.
        """
        choices: list[list[int]] = []
        for number in range(RANDOM_CONTROLS):
            random = torch.Generator().manual_seed(stable_hash(seed, "choice", number) % 2**63)
            order = torch.randperm(len(self.active), generator=random)
            choices.append(sorted(order[: len(chosen)].tolist()))
        return choices

    def describe_random(self, chosen: Sequence[int], seed: int) -> str:
        """Return how random choices were drawn, if it isn't as `against random` draws them."""
        return ""

    def means(self, rows: Ints, written: Bools, batch: int) -> Floats:
        """Return [group]: the mean of the measure over rows while the candidates of a group are
        written, for groups of nodes.

        Args:
            written: [group, candidate]
            batch: Largest number of rows of a pass, each counted once for each group.
        """
        rows, size = np.sort(rows), max(1, batch // len(written))
        edit = torch.from_numpy(written).float()[:, None]
        means: list[Floats] = []
        with torch.no_grad():
            for part in (rows[i : i + size] for i in range(0, len(rows), size)):
                lanes = self._lanes(part, len(written))
                values = self._measure(part, lanes, self._writes(part, lanes, edit), [])
                means.append(values.unflatten(0, (len(part), -1)).cpu().numpy())
                self._unpatched.forget()
        return np.concatenate(means).mean(axis=0)

    def _shares(self, rows: Ints, edit: Tensor) -> Tensor:
        """Return [vector, candidate] float32 shares of the vectors of some rows, for one draw of
        the rows after the other if the edit is [draw, 1, candidate]."""
        _, counts = self._vectors_of(rows)
        shares = edit.to(self.model.device, torch.float32)
        shares = shares.expand(*edit.shape[:-2], len(rows), -1)
        shares = shares.repeat_interleave(torch.from_numpy(counts).to(shares.device), dim=-2)
        return shares.flatten(0, -2)


@dataclass(frozen=True, eq=False)
class VectorMaskRows(MaskRows, ABC):
    """The rows of a mask that mixes whole vectors of sites."""

    @property
    @abstractmethod
    def _written(self) -> Sequence[SiteLayer]:
        """Sites and layers that it writes, once each."""

    @property
    def _reads(self) -> Sequence[tuple[int, Sequence[SitePoint]]]:
        if self._fill == "zero":
            return []
        return [(1, [SitePoint(site, layer, None) for site, layer in self._written])]

    @cached_property
    def _means(self) -> list[Tensor]:
        """[token, unit, width] at each site and layer."""
        return self._average(lambda rows: self._split_units(self._vectors_in(rows)))

    def _split_units(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return [vector, unit, width] at each site and layer.

        Args:
            vectors: [vector, width] of each site that is read.
        """
        counts = (unit_count(self.model.shape, *where) for where in self._written)
        return [vector.unflatten(1, (n, -1)) for vector, n in zip(vectors, counts, strict=True)]

    def _incoming(self, rows: Ints) -> dict[SiteLayer, Tensor] | None:
        """Return [vector, units, width] that come in at each site and layer in some rows; None if
        they are 0."""
        if self._fill == "zero":
            return None
        if self._fill == "mean":
            slots = self._slots_of(rows)
            read = [mean[slots.to(mean.device)] for mean in self._means]
        else:
            read = self._split_units(self._vectors_in(rows))
        return dict(zip(self._written, read, strict=True))

    def _mix(
        self,
        where: SiteLayer,
        unit: Tensor,
        lanes: tuple[Tensor, Tensor],
        shares: Tensor,
        incoming: Tensor | None,
    ) -> list[SiteWrite]:
        """Return (1 − m) x and + m y of some units of a site, in this order.

        Args:
            unit: [unit]
            lanes: [vector] each: lanes and tokens.
            incoming: [vector, units, width] y of all units, the same in every draw; None for 0.
            shares: [vector, unit] m
        """
        (lane, token), tensor = lanes, shares.reshape(-1, 1)
        at = (
            lane.repeat_interleave(len(unit)),
            token.repeat_interleave(len(unit)),
            unit.repeat(len(lane)),
        )
        site_writes = [SiteWrite(*where, *at, 1 - tensor, mode="scale")]
        if incoming is not None:
            values = incoming[:, unit.to(incoming.device)]
            values = values.repeat(len(lane) // len(values), 1, 1)
            site_writes.append(SiteWrite(*where, *at, tensor * values.flatten(0, 1), mode="add"))
        return site_writes


@dataclass(frozen=True, eq=False)
class SiteMaskRows(VectorMaskRows):
    """The rows of a mask over sites."""

    candidates: Sequence[SitePoint]

    @cached_property
    def _gates(self) -> dict[SiteLayer, Ints]:
        """The gates at each site and layer."""
        gates: dict[SiteLayer, list[int]] = {}
        for number, point in enumerate(self.candidates):
            gates.setdefault((point.site, point.layer), []).append(number)
        return {where: np.array(numbers, dtype=np.int64) for where, numbers in gates.items()}

    @property
    def joint(self) -> Sequence[Ints]:
        return list(self._gates.values())

    @property
    def _written(self) -> Sequence[SiteLayer]:
        return list(self._gates)

    def _is_of_vectors(self, edit: Tensor) -> bool:
        return edit.dim() == 1 or edit.shape[-2] == 1  # all rows have the same gates

    def _writes(self, rows: Ints, lanes: DrawLanes, edit: Tensor) -> list[SiteWrite]:
        """Return what the gates write at each site."""
        shares, at = self._shares(rows, edit), self._places(rows, lanes)
        incoming = self._incoming(rows) or {}
        writes: list[SiteWrite] = []
        for where, gates in self._gates.items():
            named = [self.candidates[gate].unit for gate in gates.tolist()]
            every = torch.arange(unit_count(self.model.shape, *where))
            unit = every if None in named else torch.tensor(named)
            tensor = shares[:, torch.from_numpy(gates).to(shares.device)].expand(-1, len(unit))
            writes += self._mix(where, unit, at, tensor, incoming.get(where))
        return writes


@dataclass(frozen=True, eq=False)
class StreamEnds:
    """The edges of one stream, among those of all candidates."""

    at: Tensor
    """[K] the numbers of its tokens."""
    ends: list[int]
    """The numbers of its receivers."""
    fills: tuple[SenderFill, ...]
    """Those of its senders, at its tokens."""
    columns: list[int]
    """The numbers of its senders."""


def _find_encoded(run: PromptRun, cell: PositionCell, rows: Ints) -> Tensor:
    """Return [vector] whether each token of a position in some rows is one of an encoder."""
    hits = ((run.rows[row].source, tokens) for row in rows.tolist() for tokens in cell.hits[row])
    return torch.tensor([token < source for source, tokens in hits for token in tokens])


def _take_side(run: PromptRun, cell: PositionCell, *, encodes: bool) -> PositionCell:
    """Return a position with its tokens of the encoder, or of the decoder."""
    hits = tuple(
        tuple(tuple(token for token in tokens if (token < row.source) == encodes) for tokens in own)
        for row, own in zip(run.rows, cell.hits, strict=True)
    )
    return replace(cell, hits=hits)


@dataclass(frozen=True, eq=False)
class EdgeMaskRows(VectorMaskRows):
    """The rows of a mask over the edges between components of the model, perhaps at each of several
    positions."""

    candidates: Sequence[CircuitEdge] | Sequence[PlacedEdge]
    noun: ClassVar[str] = "edge"

    @cached_property
    def edges(self) -> list[CircuitEdge]:
        """The edge of each candidate."""
        return [
            candidate.edge if isinstance(candidate, PlacedEdge) else candidate
            for candidate in self.candidates
        ]

    @cached_property
    def _senders(self) -> dict[SiteLayer, tuple[int, ...]]:
        """The units of all senders, in forward order; without nodes of several neurons."""
        return dict(group_senders(number_edge_ends(self.edges)[0].points, self._splits))

    @cached_property
    def _splits(self) -> dict[SiteLayer, FeatureSplit]:
        """By output, the features that are nodes. Raises NoBasis."""
        rule = self.objective.rules[0]
        fits = DirectionFits(self.model, {}, self.objective.seed, self.side)
        splits: dict[SiteLayer, FeatureSplit] = {}
        for (site, layer), feature in self._circuit.features.items():
            name = feature.member.name
            alone = BasisTargets(name, (name,), ({(layer, None): feature.member},), (), {})
            system, problems = fits.of_basis(alone, rule.spec.span)
            if system is None:
                raise NoBasis(problems)
            assert isinstance(system, Dictionary)
            splits[site, layer] = FeatureSplit(system, feature.which, feature.member.reads)
        return splits

    @cached_property
    def _others(self) -> dict[SiteLayer, tuple[int, ...]]:
        """The neurons that are one node together, by site and layer."""
        return list_other_neurons(self._circuit, self.model.shape)

    @property
    def _written(self) -> Sequence[SiteLayer]:
        return list(self._senders)

    @property
    def _reads(self) -> Sequence[tuple[int, Sequence[SitePoint]]]:
        if not super()._reads:
            return []
        places = [*self._written, *self._encoded]
        return [(1, [SitePoint(site, layer, None) for site, layer in places])]

    @property
    def _encoded(self) -> list[SiteLayer]:
        """Sites whose vectors transcoders encode, instead of the output of the MLP."""
        return [(own.reads, layer) for (_, layer), own in self._splits.items() if own.reads]

    def _split_units(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return [vector, unit, width] at each site and layer; the units of an MLP whose features
        are nodes are these nodes."""
        read = dict(zip([*self._written, *self._encoded], vectors, strict=True))
        units = super()._split_units([read[where] for where in self._written])
        for number, (site, layer) in enumerate(self._written):
            split = self._splits.get((site, layer))
            if split is not None:
                tensor = read[site, layer]
                inputs = read[split.reads, layer] if split.reads else tensor
                with torch.no_grad():
                    units[number] = split.split(tensor, inputs, split.nodes)
        return units

    @cached_property
    def _columns(self) -> dict[SitePoint, int]:
        """The column of each sender in a mask."""
        every = [
            (where, unit)
            for where, units in self._senders.items()
            for unit in (*units, *[OTHERS][: len(self._others.get(where, ()))])
        ]
        number = {each: column for column, each in enumerate(every)}
        numbers = {of: number_unit(of, self._splits) for of, _ in self.edges}
        return {of: number[(of.site, of.layer), unit] for of, unit in numbers.items()}

    @cached_property
    def _receivers(self) -> dict[SitePoint, int]:
        """The row of each receiver in a mask."""
        return {to: n for n, to in enumerate(dict.fromkeys(to for _, to in self.edges))}

    @property
    def _size(self) -> tuple[int, int, int]:
        """Sizes of the masks of all positions, [position, receiver, sender]; without positions of
        edges, one mask."""
        places = {
            candidate.place for candidate in self.candidates if isinstance(candidate, PlacedEdge)
        }
        return max(1, len(places)), len(self._receivers), len(self._columns)

    @cached_property
    def _cells_of_mask(self) -> Tensor:
        """[candidate] number of its entry in the masks, [position, receiver, sender]."""
        _, receivers, senders = self._size
        places = [
            candidate.place if isinstance(candidate, PlacedEdge) else 0
            for candidate in self.candidates
        ]
        return torch.tensor(
            [
                (place * receivers + self._receivers[to]) * senders + self._columns[of]
                for place, (of, to) in zip(places, self.edges, strict=True)
            ]
        )

    def _read(
        self,
        run: PromptRun,
        cell: PositionCell,
        points: Sequence[SitePoint],
        rows: Ints | None = None,
    ) -> list[Tensor]:
        """Return [vector, width] of each point; in an encoder-decoder, 0 at the tokens of the other
        text. Arguments as in `EffectRows`."""
        if not self._has_two_streams:
            return super()._read(run, cell, points, rows)
        rows = np.sort(self.rows if rows is None else rows)
        encoded, tensors = _find_encoded(run, cell, rows), dict[int, Tensor]()
        for encodes in (True, False):
            numbers = [
                n for n, p in enumerate(points) if (SITES[p.site].stack == "encoder") == encodes
            ]
            here, part = encoded == encodes, _take_side(run, cell, encodes=encodes)
            read = (
                super()._read(run, part, [points[n] for n in numbers], rows) if here.any() else []
            )
            for place, number in enumerate(numbers):
                width = count_numbers(points[number], self.model.shape)
                dtype = torch.promote_types(self.model.dtype, torch.float32)
                device = self.model.device
                tensors[number] = torch.zeros(len(encoded), width, dtype=dtype, device=device)
                if read:
                    tensors[number][here.to(device)] = read[place].to(tensors[number])
        return [tensors[number] for number in range(len(points))]

    @cached_property
    def _has_two_streams(self) -> bool:
        """Whether edges are in an encoder and in the decoder that attends to it."""
        return has_two_streams(self.model.shape)

    def _list_streams(
        self,
        rows: Ints,
        fills: tuple[SenderFill, ...],
        receivers: Sequence[tuple[SiteRead, int]],
        count: int,
    ) -> Iterator[StreamEnds]:
        """Yield the part of some edges in each stream, at some tokens.

        Args:
            fills: Those of the senders.
            receivers: The receivers.
            count: Number of the tokens, those of the rows once or several times.
        """
        if not self._has_two_streams:
            senders = range(sum(fill.count for fill in fills))
            ends = list(range(len(receivers)))
            yield StreamEnds(torch.arange(count), ends, fills, list(senders))
            return
        encoded = _find_encoded(self._runs[0], self._cells[0], rows)
        encoded = encoded.repeat(count // len(encoded))
        for encodes in (True, False):
            at = torch.nonzero(encoded == encodes).flatten()
            sender_fills, first, columns = list[SenderFill](), 0, list[int]()
            for fill in fills:
                if (fill.where.stack == "encoder") == encodes:
                    sender_fills.append(
                        replace(fill, values=fill.values[at.to(fill.values.device)])
                    )
                    columns += range(first, first + fill.count)
                first += fill.count
            ends = [n for n, (to, _) in enumerate(receivers) if reads_encoder(to) == encodes]
            if len(at) and sender_fills and ends:
                yield StreamEnds(at, ends, tuple(sender_fills), columns)

    def _places_of(self, rows: Ints) -> Tensor:
        """Return [vector] the mask of each vector of some rows."""
        if self._size[0] == 1:
            return torch.zeros(len(self._vectors_of(rows)[0]), dtype=torch.long)
        return torch.from_numpy(self._tokens[self._vectors_of(rows)[0], 0])

    @cached_property
    def graph(self) -> PathGraph[Any, Any]:
        """The candidates as edges between nodes."""
        placed = [candidate for candidate in self.candidates if isinstance(candidate, PlacedEdge)]
        if placed:
            return PlacedGraph(self.model_graph, placed, order_places(self.objective))
        if self._has_two_streams or self._circuit.stack:
            return self.model_graph
        order = order_places(self.objective)
        return self.model_graph if order.reads_end[0] else OnePlaceGraph(self.model_graph, order)

    @cached_property
    def model_graph(self) -> EdgeGraph:
        """The nodes and edges of the model."""
        circuit = self._circuit
        return EdgeGraph(self.model.shape, circuit.neurons, circuit.features, stack=circuit.stack)

    @property
    def _circuit(self) -> CircuitTargets:
        """All edges, of which the mask chooses some."""
        circuit = self.objective.rules[0].circuit
        assert circuit is not None
        return circuit

    @property
    def dictionaries(self) -> dict[str, dict[str, str]]:
        members = {
            feature.member.name: feature.member.operand
            for feature in self._circuit.features.values()
        }
        digests = {
            n: member.digest for n, member in members.items() if isinstance(member, DictionaryFile)
        }
        return {"dictionaries": digests} if digests else {}

    def random_choices(self, chosen: Sequence[int], seed: int) -> list[list[int]]:
        """Return random circuits of the same number of edges, as `against random` draws them; any
        edges, on paths or not, if there are fewer such circuits than random ones."""
        return self._draw_on_paths(chosen, seed) or super().random_choices(chosen, seed)

    def describe_random(self, chosen: Sequence[int], seed: int) -> str:
        if self._draw_on_paths(chosen, seed):
            return ""
        count = count_noun(len(chosen), "edge")
        return (
            f"random circuits are any {count}, on paths to `{self.end}` or not: fewer than "
            f"{RANDOM_CONTROLS} others have all {count} on paths"
        )

    @property
    def end(self) -> str:
        """The end of all paths, as files name it."""
        return "embed" if self._circuit.stack == "vision" else "logits"

    @cached_property
    def _drawn(self) -> dict[tuple[tuple[int, ...], int], list[list[int]]]:
        """What `_draw_on_paths` drew, by its arguments."""
        return {}

    def _draw_on_paths(self, chosen: Sequence[int], seed: int) -> list[list[int]]:
        """Return random circuits whose edges are all on paths; none if there are too few."""
        key = tuple(chosen), seed
        if key not in self._drawn:
            number = {edge: n for n, edge in enumerate(self.candidates)}
            drawing = CircuitDraws(self.graph, [self.candidates[n] for n in chosen], seed)
            drawn = drawing.draws(RANDOM_CONTROLS)
            draws = [sorted(number[edge] for edge in edges) for edges in drawn]
            self._drawn[key] = draws if len(draws) == RANDOM_CONTROLS else []
        return self._drawn[key]

    def _writes(self, rows: Ints, lanes: DrawLanes, edit: Tensor) -> list[SiteWrite]:
        return []

    def _circuits(self, rows: Ints, lanes: DrawLanes, edit: Tensor) -> list[CircuitWrite]:
        """Return what the gates of each row change of the inputs of receivers."""
        shares = self._shares(rows, edit)
        mask = shares.new_zeros(len(shares), math.prod(self._size))
        mask = mask.index_copy(1, self._cells_of_mask.to(shares.device), shares)
        mask = mask.unflatten(1, self._size)[torch.arange(len(mask)), self._places_of(rows)]
        ends = self._fills(len(shares), self._incoming(rows)), self._ends
        return self._split_write(
            rows, CircuitWrite(*self._places(rows, lanes), *ends, mask, **self._nodes_of(""))
        )

    def _nodes_of(self, stack: str) -> dict[str, Any]:
        """Return the neurons and features that are nodes of a stream, as `CircuitWrite` takes
        them."""
        others, features = list_stream_nodes(self._others, self._splits, stack)
        return {"others": others, "features": features}

    def _split_write(self, rows: Ints, write: CircuitWrite) -> list[CircuitWrite]:
        """Return the parts of a write in each stream, whose mask differs between tokens."""
        if not self._has_two_streams:
            return [write]
        return [
            CircuitWrite(
                write.rows[stream.at],
                write.positions[stream.at],
                stream.fills,
                tuple(write.receivers[n] for n in stream.ends),
                write.mask[stream.at.to(write.mask.device)][:, stream.ends][:, :, stream.columns],
                **self._nodes_of(stream_of(stream.fills)),
            )
            for stream in self._list_streams(rows, write.fills, write.receivers, len(write.rows))
        ]

    def _fills(
        self, count: int, incoming: Mapping[SiteLayer, Tensor] | None
    ) -> tuple[SenderFill, ...]:
        """Return the other values of all senders at some tokens.

        Args:
            count: Number of the tokens.
            incoming: [token, units, width] that come in; None if they are 0.
        """
        fills: list[SenderFill] = []
        for where, units in self._senders.items():
            others = self._others.get(where, ())
            every = [*units, *others]
            if incoming is None:
                values = torch.zeros(count, len(every), vector_width(self.model.shape, *where))
            else:
                split = self._splits.get(where)
                numbers = every if split is None else [split.nodes.index(unit) for unit in every]
                values = incoming[where][:, numbers]
            fills.append(SenderFill(SiteRead(*where), units, values, others))
        return tuple(fills)

    def _fills_of(self, rows: Ints) -> tuple[SenderFill, ...]:
        """Return the other values of all senders at the tokens of some rows."""
        return self._fills(len(self._vectors_of(rows)[0]), self._incoming(rows))

    @property
    def _ends(self) -> tuple[tuple[SiteRead, int], ...]:
        """The receivers of all edges."""
        return tuple(
            (SiteRead(to.site, to.layer), number_unit(to, self._splits)) for to in self._receivers
        )


@dataclass(frozen=True, eq=False)
class PositionMaskRows(VectorMaskRows):
    """The rows of a mask over the positions of one site.

    A row has the tokens of those positions that it has. With `with: mean`, a vector stays as it is
    at a token that no training row has.
    """

    candidates: Sequence[PositionChoice]

    @property
    def places(self) -> dict[str, dict[str, object]]:
        at = self.objective.rules[0].spec.at.span.written
        return {
            "positions": {"at": at, "labels": [candidate.label for candidate in self.candidates]}
        }

    @cached_property
    def active(self) -> Ints:
        """[gate] numbers of the positions that some training row has."""
        return np.unique(self._tokens[self._trained_vectors.numpy(), 0])

    @property
    def _written(self) -> Sequence[SiteLayer]:
        return [(self.declared.made.site, self.declared.made.layer)]

    def _writes(self, rows: Ints, lanes: DrawLanes, edit: Tensor) -> list[SiteWrite]:
        """Return what the gates of each row's tokens write."""
        which, _ = self._vectors_of(rows)
        shares, point = self._shares(rows, edit), self.declared.made
        number, draws = torch.from_numpy(self._tokens[which, :1]), len(shares) // len(which)
        writes = shares.gather(1, number.to(shares.device).repeat(draws, 1))
        if self._fill == "mean":
            known = np.isin(self._slots[which], self._slots[self._trained_vectors.numpy()])
            writes = writes * torch.from_numpy(known).to(writes)[:, None].repeat(draws, 1)
        (where,), incoming = self._written, self._incoming(rows) or {}
        every = torch.arange(unit_count(self.model.shape, *where))
        unit = every if point.unit is None else torch.tensor([point.unit])
        writes, at = writes.expand(-1, len(unit)), self._places(rows, lanes)
        return self._mix(where, unit, at, writes, incoming.get(where))


@dataclass(frozen=True, eq=False)
class CoordinateMaskRows(MaskRows):
    """The rows of a mask over the features or dimensions of one site."""

    candidates: Sequence[SiteCoordinate]

    @cached_property
    def _system(self) -> CoordinateSystem:
        """The basis. Raises NoBasis."""
        rule, point = self.objective.rules[0], self.declared.made
        assert rule.basis is not None
        alone = replace(rule.basis, bases=({None: rule.basis.at(point)},))
        fits = DirectionFits(self.model, {}, self.objective.seed, self.side)
        system, problems = fits.of_basis(alone, rule.spec.span)
        if system is None:
            raise NoBasis(problems)
        return system

    @property
    def dictionaries(self) -> dict[str, dict[str, str]]:
        basis, name = self.objective.rules[0].basis, self.candidates[0].basis
        assert basis is not None
        operand = basis.at(self.declared.made).operand
        if name is None or not isinstance(operand, DictionaryFile):
            return {}
        return {"dictionaries": {name: operand.digest}}

    @cached_property
    def _encoded(self) -> SitePoint:
        """The site whose vectors have the coordinates."""
        sites = self.objective.rules[0].sites
        assert sites is not None
        ((point, *_), *_) = (sites.sources or sites.points).values()
        return point

    @property
    def _reads(self) -> Sequence[tuple[int, Sequence[SitePoint]]]:
        own = (0, list(dict.fromkeys([self.declared.made, self._encoded])))
        return [own] if self._fill is not None else [own, (1, [self._encoded])]

    @property
    def _numbers(self) -> int:
        return super()._numbers + 2 * len(self.candidates)

    @cached_property
    def _means(self) -> Tensor:
        """[token, candidate]"""
        (means,) = self._average(lambda rows: [self._encode(self._vectors_in(rows)[self._place])])
        return means

    @property
    def _place(self) -> int:
        """Number of the vectors of the base run that have the coordinates, in `_vectors`."""
        return int(self._encoded != self.declared.made)

    def _encoded_in(self, rows: Ints) -> tuple[Tensor, Tensor]:
        """Return [vector, candidate] each: coordinates of the base run in some rows, and those that
        come in."""
        vectors = self._vectors_in(rows)
        tensors = self._encode(vectors[self._place])
        if self._fill == "zero":
            return tensors, torch.zeros_like(tensors)
        if self._fill == "mean":
            return tensors, self._means[self._slots_of(rows).to(tensors.device)]
        return tensors, self._encode(vectors[-1])

    @cached_property
    def _coordinates(self) -> tuple[Tensor, Tensor]:
        """The same in all rows."""
        return self._encoded_in(np.sort(self.rows))

    def _coordinates_in(self, rows: Ints) -> tuple[Tensor, Tensor]:
        """Return `_coordinates` in these rows; they are computed again unless all rows fit into
        memory."""
        if self._is_bounded:
            return self._encoded_in(rows)
        which = torch.from_numpy(self._vectors_of(rows)[0])
        coordinates, new = (
            coordinate[which.to(coordinate.device)] for coordinate in self._coordinates
        )
        return coordinates, new

    def _which(self, count: int) -> Tensor | None:
        """Return [count, candidate] numbers of the coordinates; None for all."""
        if len(self.candidates) == self._system.size:
            return None
        numbers = torch.tensor([candidate.number for candidate in self.candidates])
        return numbers.to(self.model.device).expand(count, -1)

    def _encode(self, vectors: Tensor) -> Tensor:
        with torch.no_grad():
            return self._system.encode(vectors, self._which(len(vectors)))

    @cached_property
    def active(self) -> Ints:
        """[gate] numbers of the coordinates that a write changes in some training row."""
        parts = map(self._coordinates_in, self._training_parts())
        changed = [(tensor != new).any(0).cpu().numpy() for tensor, new in parts]
        return np.flatnonzero(np.any(changed, axis=0))

    def _writes(self, rows: Ints, lanes: DrawLanes, edit: Tensor) -> list[SiteWrite]:
        """Return the vectors whose coordinates are f + m (f′ − f)."""
        tensor, new = self._coordinates_in(rows)
        shares = self._shares(rows, edit).to(tensor)
        draws = len(shares) // len(tensor)
        change = shares * (new - tensor).repeat(draws, 1)
        vectors = self._vectors_in(rows)[0].repeat(draws, 1)
        written = self._system.shift(vectors, change, self._which(len(vectors)))
        return [write_point(self.declared.made, self.model, *self._places(rows, lanes), written)]


def open_rows(
    mask: TrainedMask,
    objective: ResolvedExperiment,
    model: LoadedModel,
    side: PaddingSide | None,
    cache: VectorCache,
) -> MaskRows:
    """Return the rows that a mask is trained on."""
    given = mask.training, objective, model, side
    edges = [candidate for candidate in mask.candidates if isinstance(candidate, tuple)]
    placed = [candidate for candidate in mask.candidates if isinstance(candidate, PlacedEdge)]
    if edges or placed:
        return EdgeMaskRows(*given, edges or placed, cache=cache)
    sites = [candidate for candidate in mask.candidates if isinstance(candidate, SitePoint)]
    if sites:
        return SiteMaskRows(*given, sites, cache=cache)
    positions = [
        candidate for candidate in mask.candidates if isinstance(candidate, PositionChoice)
    ]
    if positions:
        return PositionMaskRows(*given, positions, cache=cache)
    coordinates = [
        candidate for candidate in mask.candidates if isinstance(candidate, SiteCoordinate)
    ]
    return CoordinateMaskRows(*given, coordinates, cache=cache)


class TooFewCandidates(Exception):
    """A training chooses as many candidates as change a training row, or more."""

    hint = "write a smaller `size`, or use other rows"

    def __init__(self, mask: TrainedMask, count: int, size: int) -> None:
        every = count_noun(len(mask.candidates), mask.noun)
        text = f"writing them changes the training rows at {count:,} of {every}"
        what = "group" if mask.is_scored else "mask"
        super().__init__(f"{text}, and the {what} chooses {size:,}")


@dataclass(frozen=True, eq=False)
class GateLoss:
    """Gates with their loss, as `mechdsl.fits.training` trains them."""

    gates: Gates
    rows: MaskRows
    batch: int
    """Largest number of rows of a pass."""
    keeps: bool

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self.gates.parameters

    @property
    def memory(self) -> Mapping[str, Tensor]:
        return self.gates.memory

    def _edit(self, gates: Tensor) -> Tensor:
        """Return [..., candidate] shares for [..., gate] values."""
        active = torch.from_numpy(self.rows.active)
        shares = gates.new_zeros(*gates.shape[:-1], len(self.rows.candidates))
        shares = shares.index_copy(-1, active, gates)
        return 1 - shares if self.keeps else shares

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        """Return the mean loss of the rows with these numbers."""
        sign, rows = 1 if self.rows.declared.minimises else -1, inputs.numpy()
        if progress >= 1:  # held-out rows, without gradients
            return torch.tensor(sign * self.mean(rows, self.gates.chosen()))
        drawn = self.gates.sample(len(rows), step, progress)
        return sign * self.rows.values(rows, self._edit(drawn)).mean()

    def loss_of_part(
        self, parts: Sequence[tuple[Tensor, Tensor]], number: int, step: int, progress: float
    ) -> Tensor:
        """Return the loss of a part of a batch, whose rows have the samples of the whole batch."""
        whole, rows = (torch.cat([tensor for tensor, _ in parts]).sort().values, parts[number][0])
        drawn = self.gates.sample(len(whole), step, progress)[torch.isin(whole, rows)]
        sign = 1 if self.rows.declared.minimises else -1
        return sign * self.rows.values(rows.numpy(), self._edit(drawn)).mean()

    def mean(self, rows: Ints, chosen: Sequence[int]) -> float:
        """Return the mean of the measure over rows with these gates open."""
        hard = torch.zeros(len(self.rows.active))
        hard[list(chosen)] = 1
        return self.rows.mean(rows, self._edit(hard), self.batch)

    def after_step(self) -> None:
        self.gates.after_step()

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}


def train_mask(
    declared: TrainedMask,
    rows: MaskRows,
    job: TrainingJob,
) -> MaskReport:
    """Train a mask, and write its sites.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NotFinite: The measure or a score became NaN or infinite.
        NoBasis: The basis whose coordinates it chooses from can't be computed.
        TooFewCandidates: There are no more candidates than it chooses.
        OSError: A file can't be written.
    """
    training, settings = declared.training, read_settings(declared.training, rows.model.device)
    trainer, count = training.trainer_of(MaskTrainer), len(rows.active)
    size = trainer.size(training.of_trainer)
    if count <= size:
        raise TooFewCandidates(declared, count, size)
    with torch.enable_grad():
        gates = trainer.start(count, training.of_trainer, training.seed)
        gates.shrinks = declared.noun == "edge"
        model = GateLoss(gates, rows, settings.batch, declared.keeps)
        loop = Training(
            model, rows, rows.held_out(), settings, lambda tensor, other: (tensor, other)
        )
        job.run(loop)
    likely = gates.probabilities().detach()
    chosen = gates.chosen()
    measured = rows.measured
    single, single_rows = _choose_single_effects(model, settings)
    random = [model.mean(measured, choice) for choice in rows.random_choices(chosen, training.seed)]
    every = torch.ones(len(rows.candidates))
    numbers = rows.active.tolist()
    report = MaskReport(
        *rows.outcome(loop.state),
        chosen={
            label_candidates((rows.candidates[numbers[each]],)): float(likely[each])
            for each in chosen
        },
        candidates=count,
        undecided=_count_undecided(likely, chosen),
        keeps=declared.keeps,
        drawn=rows.describe_random(chosen, training.seed),
        trained=model.mean(measured, chosen),
        random=float(np.mean(random)),
        draws=len(random),
        single=None if single is None else model.mean(measured, single),
        single_rows=single_rows,
        unpatched=rows.mean(measured, None, settings.batch),
        whole=rows.mean(measured, every, settings.batch),
        inactive=len(rows.candidates) - count,
        noun=declared.noun,
    )
    _write_choice(job.folder / MASK_FILE, rows, likely, chosen)
    job.write_card(report)
    return report


def _count_undecided(likely: Tensor, chosen: Sequence[int]) -> int:
    """Return how many gates are chosen and not likely open, or not chosen and not likely closed."""
    least, most = UNDECIDED
    open_gates = likely[list(chosen)]
    return int((open_gates <= most).sum() + (likely >= least).sum() - (open_gates >= least).sum())


def _write_choice(path: Path, rows: MaskRows, likely: Tensor, chosen: Sequence[int]) -> None:
    """Write the candidates with their probabilities, which are 0 without a gate."""
    probabilities = np.zeros(len(rows.candidates))
    probabilities[rows.active] = likely.numpy()
    content = {
        "sites": [key_of_candidate(candidate) for candidate in rows.candidates],
        "labels": [label_candidates((candidate,)) for candidate in rows.candidates],
        "probabilities": probabilities.tolist(),
        "chosen": rows.active[list(chosen)].tolist(),
        **rows.places,
        **rows.dictionaries,
        "prompts": rows.prompts,
    }
    path.write_text(json.dumps(content) + "\n", "utf-8")


def _choose_single_effects(
    model: GateLoss, settings: TrainingSettings
) -> tuple[list[int] | None, int]:
    """Return the gates with the largest effects of opening them alone, as many as the mask chooses,
    and the number of training rows; None if that costs more rows than the training.

    If the mask keeps its choice, they are those with the worst effects.
    """
    rows = model.rows.rows[model.rows.held_out_count :]
    count = len(model.rows.active)
    few = rows[: count_single_rows(count, len(rows), settings.steps, settings.batch)]
    if not len(few):
        return None, 0
    alone = torch.zeros(count, len(model.rows.candidates))
    alone[range(count), model.rows.active] = 1
    effects = [model.rows.mean(few, each, settings.batch) for each in alone]
    wants_low = model.rows.declared.minimises != model.keeps
    order = np.argsort(np.array(effects) * (1 if wants_low else -1), kind="stable")
    return sorted(order[: model.gates.size].tolist()), len(few)


# --- circuits by scores of edges ------------------------------------------------------------------

_ATTENDED = ("q", "k")
"""Receivers whose edges may be scored by exact attention weights."""

_ADDED_AT = {
    "resid_pre": "resid_pre",
    "z": "attn_out",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
    NEURONS: "mlp_out",
}
"""Site of senders → the site where their changes are added, if no norm follows it."""

_EMBEDDINGS = {"": EMBEDDING, "encoder": ENCODER_EMBEDDING, "vision": VISION_EMBEDDING}
"""The stream that enters the first block of each stack."""


def _add_at(model: LoadedModel, point: SitePoint, read: CircuitRead, vectors: Tensor) -> SiteWrite:
    """Add [vector, width] at a site, at the tokens of a read."""
    return replace(write_point(point, model, read.rows, read.positions, vectors), mode="add")


def _write_parts(group: Sequence[tuple[int, SiteWrite]], rows: int) -> list[SiteWrite]:
    """Move numbered writes of the first `rows` lanes to those of the irrelevant parts after them,
    one part for each write."""
    return [
        replace(site_write, rows=site_write.rows + part * rows)
        for part, (_, site_write) in enumerate(group, 1)
    ]


def _move_senders(model: LoadedModel, read: CircuitRead, number: int, share: float) -> SiteWrite:
    """Return what the sum of a sublayer gains if the senders of one site move to other values.

    Args:
        number: That of the site in `read.fills`.
    """
    assert read.changes is not None
    where, columns = list(number_senders(read.fills).items())[number]
    if where in read.activations:
        return _move_neurons(read, where, share)
    site, head = _ADDED_AT[where.site], None
    change = share * read.changes[columns].sum(0)
    if where.site == "z":
        assert where.layer is not None
        is_split = ("attn_out", where.layer) in read.features
        if model.stack(where.stack).anatomy.blocks[where.layer].attn_output_norm is not None:
            site, head = "head_out", 0  # the changes are those before the norm
        elif is_split:  # features read the change
            site, head = "head_out", 0
            tap = model.tap("attn_out", where.layer, where.stack)
            change = undo_scale(change, get_scale(model.module, tap))
    point = SitePoint(in_stack(site, where.stack), where.layer, head)
    return _add_at(model, point, read, change)


def _move_neurons(read: CircuitRead, where: SiteRead, share: float) -> SiteWrite:
    """Move neurons to other values, because a norm follows the sum of what they add."""
    [fill] = [fill for fill in read.fills if fill.where == where]
    units = torch.tensor((*fill.units, *fill.others))
    rows, positions = (
        tensor.repeat_interleave(len(units)) for tensor in (read.rows, read.positions)
    )
    values = share * read.activations[where].flatten()[:, None]
    given = where.site, where.layer, rows, positions, units.repeat(len(read.rows)), values
    return SiteWrite(*given, mode="add", stack=where.stack)


def _add_to_all(totals: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for total, other in zip(totals, others, strict=True):
        total += other


class NoCircuit(HintedError):
    """The scores make no circuit or group."""


@dataclass(frozen=True, eq=False)
class EdgeRows(EdgeMaskRows):
    """The rows of a search for a circuit."""

    batch: int
    """Largest number of rows of a pass."""

    @cached_property
    def pass_rows(self) -> int:
        """Largest number of rows of a pass that scores edges."""
        trainer = self.declared.trainer
        scored = self.scored_by(trainer) if isinstance(trainer, EdgeScoreTrainer) else self
        tokens = int(np.diff(scored._starts).max(initial=1))
        attended = 0
        if isinstance(trainer, EdgeScoreTrainer) and trainer.fixes_attention:
            attended = int(self._runs[0].lengths[self.rows].max(initial=1))
        given = len(self._columns), tokens, self.batch, self.model.shape
        return count_scored_rows(*given, attended=attended)

    def scored_by(self, trainer: EdgeScoreTrainer) -> EdgeRows:
        """Return these rows with the tokens at which a trainer reads or moves senders."""
        return self if trainer.path is None else self._moved

    @cached_property
    def _moved(self) -> EdgeRows:
        """These rows with the tokens at which senders move along a path."""
        cells = moved_positions(self.objective)
        if count_tokens(cells[0]) == count_tokens(self._cells[0]):
            return self
        own = {field.name: getattr(self, field.name) for field in fields(EdgeRows)}
        return MovedEdgeRows(**own, scored=self, moved=cells)

    def describe_rest(self) -> str:
        """Describe the tokens at no position, if there are several positions."""
        here, run = self.trained, self._runs[0]
        total = sum(len(run.rows[row].ids) for row in here.tolist())
        rest = total - len(self._vectors_of(here)[0])
        if self._size[0] == 1 or not rest:
            return ""
        text = f"{rest:,} of {count_noun(total, 'token')} of the training rows"
        return f"; {text} are at no position: edges there aren't candidates, and weren't ablated"

    def describe_path(self, trainer: EdgeScoreTrainer) -> str:
        """Describe the tokens at which senders move along a path, if edges are scored at some."""
        every = sum(len(self._runs[0].rows[row].ids) for row in self.rows.tolist())
        if trainer.path is None or len(self._vectors_of(np.sort(self.rows))[0]) >= every:
            return ""
        what = "the embedding" if trainer.path == "inputs" else "each sender"
        where = "the tokens of `at` only" if self._moved is self else "all tokens"
        return f"; along the path, {what} moved at {where}"

    # --- scores

    def score(self, rows: Ints, trainer: EdgeScoreTrainer, steps: int) -> Floats:
        """Return [candidate]: the sums of scores over some rows. Raises AutogradFailed.

        Args:
            rows: In ascending order; one pass has them all.
            trainer: Which points gradients are taken at.
            steps: Number of points on the path of the trainer.
        """
        scored = self.scored_by(trainer)
        with torch.enable_grad():
            score = scored._score(rows, trainer, steps)[: self._size[0]]
        scored._unpatched.forget()
        return score.flatten().cpu()[self._cells_of_mask].numpy()

    def _score(self, rows: Ints, trainer: EdgeScoreTrainer, steps: int) -> Tensor:
        """Return [position, receiver, sender]: the sums of scores over some rows."""
        lanes = self._lanes(rows)
        if trainer.decomposes:
            return self._score_decomposed(rows, lanes, trainer)
        streams = self._open_streams(rows, lanes)
        if trainer.fixes_attention:
            return self._score_with_patterns(rows, lanes, streams, trainer)
        places = self._scored_places(rows)
        reads = [self._open_read(rows, lanes, stream, places) for stream in streams]

        def score(added: Sequence[SiteWrite], wanted: Sequence[slice]) -> list[Tensor]:
            return self._score_at(rows, lanes, reads, added, wanted, trainer.backward)[0]

        every = [slice(None)] * len(reads)
        scores = score((), every)
        shares = [1 - step / steps for step in range(1, steps)]
        for share in shares if trainer.path == "inputs" else ():
            moves = [_move_senders(self.model, read, 0, share) for read in reads]
            _add_to_all(scores, score(moves, every))
        for number, read in enumerate(reads if trainer.path == "activations" else ()):
            for place, columns in enumerate(number_senders(read.fills).values()):
                wanted = [columns if n == number else slice(0, 0) for n in range(len(reads))]
                for share in shares:
                    move = _move_senders(self.model, read, place, share)
                    _add_to_all(scores, score([move], wanted))
        if not self._has_two_streams:
            return scores[0] / steps
        # The last place is for tokens that aren't scored.
        return self._join_streams(streams, [part / steps for part in scores], self._size[0] + 1)

    def _open_streams(self, rows: Ints, lanes: DrawLanes) -> list[StreamEnds]:
        """Return the edges of each stream at the tokens of some rows."""
        with torch.no_grad():
            fills = self._fills_of(rows)
        lane, _ = self._places(rows, lanes)
        return list(self._list_streams(rows, fills, self._ends, len(lane)))

    def _join_streams(
        self, streams: Sequence[StreamEnds], gradients: Sequence[Tensor], places: int
    ) -> Tensor:
        """Return [place, receiver, sender] of all edges.

        Args:
            gradients: [place, receiver, sender] of each stream.
            places: Number of places.
        """
        total = gradients[0].new_zeros(places, *self._size[1:])
        for stream, part in zip(streams, gradients, strict=True):
            at = torch.tensor(stream.ends)[:, None], torch.tensor(stream.columns)
            total[: len(part), *at] = part
        return total

    def _open_read(
        self, rows: Ints, lanes: DrawLanes, stream_ends: StreamEnds, places: Tensor | None
    ) -> CircuitRead:
        """Return what passes read in one stream.

        Args:
            places: [vector] the numbers of sums that tokens are in, or None for one sum.
        """
        lane, token = self._places(rows, lanes)
        ends = tuple(self._ends[n] for n in stream_ends.ends)
        places = None if places is None else places[stream_ends.at.to(places.device)]
        features = self._nodes_of(stream_of(stream_ends.fills))["features"]
        return CircuitRead(
            lane[stream_ends.at],
            token[stream_ends.at],
            stream_ends.fills,
            ends,
            places,
            features=features,
        )

    def _scored_places(self, rows: Ints) -> Tensor | None:
        """Return [vector] the position of each vector of some rows, or None for one sum."""
        return self._places_of(rows).to(self.model.device) if self._size[0] > 1 else None

    def _score_at(
        self,
        rows: Ints,
        lanes: DrawLanes,
        reads: Sequence[CircuitRead],
        added: Sequence[SiteWrite],
        wanted: Sequence[slice],
        backward: BackwardRules | None = None,
        patterns: Sequence[BasePatterns] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return [position, receiver, sender] of each read: sums of scores with the gradients of
        one pass. Also return [spot, key] gradients by attention weights.

        Args:
            reads: What passes over the rows read; after the first one, with the changes of senders.
            added: How far some senders have moved to their other values; none: the clean run.
            wanted: Senders of each read that are scored.
            backward: Changes of the derivatives, also of the norms before receivers.
            patterns: The attention weights.
        """
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        writes: list[SiteWrite] = []
        for read in reads:
            width = self.model.stack(read.stack).shape.d_model
            size, device = (len(read.rows), width), self.model.device
            leaf = torch.zeros(size, dtype=dtype, device=device, requires_grad=True)
            writes.append(_add_at(self.model, _EMBEDDINGS[read.stack], read, leaf))
        run = self._differentiate(rows, backward)
        weights = [run.zeros(*pattern.size) for pattern in patterns]
        writes += [pattern.added(weight) for pattern, weight in zip(patterns, weights, strict=True)]
        values = self._measure(rows, lanes, [*writes, *added], reads, backward)
        with open_rules(self.model, backward):
            return compute_edge_scores(values.sum(), reads, wanted, weights)

    # --- scores with exact attention weights

    def _score_with_patterns(
        self,
        rows: Ints,
        lanes: DrawLanes,
        streams: Sequence[StreamEnds],
        trainer: EdgeScoreTrainer,
    ) -> Tensor:
        """Return [position, receiver, sender]: sums of scores in the clean run, by the exact
        attention weights for edges into queries and keys."""
        fixed = {n for n, (where, _) in enumerate(self._ends) if where.site in _ATTENDED}
        free = [
            replace(stream, ends=[n for n in stream.ends if n not in fixed]) for stream in streams
        ]
        count = len(rows) if trainer.drops_layers else 1  # absolute values are those of rows
        group = torch.zeros(len(self._vectors_of(rows)[0]), dtype=torch.long)
        if trainer.drops_layers:
            group = torch.from_numpy(np.repeat(np.arange(count), self._vectors_of(rows)[1]))
        places = group * self._size[0] + self._places_of(rows)
        reads = [
            self._open_read(rows, lanes, stream_ends, places.to(self.model.device))
            for stream_ends in free
        ]
        base = self._read_patterns(rows, lanes, sorted(fixed))
        every, slopes = [slice(None)] * len(reads), list[dict[SiteRead, Tensor]]()
        rounds = self._list_rounds(trainer)
        total = torch.zeros(self._size, dtype=torch.float64, device=self.model.device)
        for backward, share in rounds:
            scores, weights = self._score_at(
                rows, lanes, reads, (), every, backward, [*base.values()]
            )
            joined = self._join_streams(free, scores, count * self._size[0])
            joined = joined.unflatten(0, (count, -1))
            joined = joined.abs() if trainer.drops_layers else joined
            total += joined.sum(0) * share.to(total)[:, None]
            pairs = zip(base.items(), weights, strict=True)
            slopes.append({where: patterns.expand(given) for (where, patterns), given in pairs})
        for receivers, column, parts in self._score_patterns(rows, lanes, base, slopes):
            for (_, share), values in zip(rounds, parts, strict=True):
                values = values.abs() if trainer.drops_layers else values
                total[:, receivers, column] += values.sum(0) * share[receivers].to(total)
        return total

    def _list_rounds(self, trainer: EdgeScoreTrainer) -> list[tuple[BackwardRules | None, Tensor]]:
        """List the changes of derivatives that scores are computed with, and [receiver] the share
        of each in a score. The gradient by a receiver in the layer that is left out is 0."""
        if not trainer.drops_layers:
            return [(trainer.backward, torch.ones(len(self._ends), dtype=torch.float64))]
        layers = list_dropped_layers(self.objective)
        own = [(where.stack.replace("cross", ""), where.layer) in layers for where, _ in self._ends]
        shares = 1 / (len(layers) - torch.tensor(own, dtype=torch.float64))
        rules = trainer.backward or BackwardRules()
        return [
            (replace(rules, dropped_layer=layer, dropped_stack=stack), shares)
            for stack, layer in layers
        ]

    def _read_patterns(
        self, rows: Ints, lanes: DrawLanes, receivers: Sequence[int]
    ) -> dict[SiteRead, BasePatterns]:
        """Return the attention weights of the clean run by their sites, of the layers in which some
        queries and keys are receivers."""
        wheres = [self._ends[n][0] for n in receivers]
        reads = dict.fromkeys(own for each in wheres for own in BasePatterns.reads(each))
        with torch.no_grad():
            read = self._read_clean(rows, lanes, [*reads], (), ())
        base_patterns = (BasePatterns.of(each, read, lanes.batch, self.model) for each in wheres)
        return {pattern.where: pattern for pattern in base_patterns}

    def _read_clean(
        self,
        rows: Ints,
        lanes: DrawLanes,
        reads: Sequence[SiteRead],
        writes: Sequence[SiteWrite],
        circuits: Sequence[CircuitWrite],
    ) -> Mapping[SiteRead, Tensor]:
        """Read sites of the clean run with writes and changed edges."""
        return run_full(
            self.model,
            lanes.batch,
            stop=self.model.shape.n_layers,
            writes=[*self._differentiate(rows).noise(lanes), *writes],
            reads=reads,
            circuits=circuits,
        ).reads

    def _score_patterns(
        self,
        rows: Ints,
        lanes: DrawLanes,
        base: Mapping[SiteRead, BasePatterns],
        slopes: Sequence[Mapping[SiteRead, Tensor]],
    ) -> Iterator[tuple[list[int], int, list[Tensor]]]:
        """Yield the receivers that are queries or keys of a layer, the column of a sender, and
        [row, position, receiver] scores of each gradient.

        Each sender needs a pass for queries and one for keys. The weights that they change are
        those of the clean run in this pass, so that all else is.

        Args:
            base: By the sites of the weights.
            slopes: For each gradient, [lane, column, head, key] by the sites of the weights.
        """
        senders = np.array([self._columns[of] for of, _ in self.edges])
        receivers = np.array([self._receivers[to] for _, to in self.edges])
        sites = np.array([self._ends[n][0].site for n in receivers.tolist()])
        held = [patterns.held() for patterns in base.values()]
        with torch.no_grad():
            fills = self._fills_of(rows)
        for column, site in product(np.unique(senders).tolist(), _ATTENDED):
            changed = (senders == column) & (sites == site)
            ends: dict[SiteRead, list[int]] = {}
            for number in np.unique(receivers[changed]).tolist():
                ends.setdefault(self._ends[number][0], []).append(number)
            if not ends:
                continue
            scores = {where: BasePatterns.reads(where)[0] for where in ends}
            with torch.no_grad():
                circuits = self._ablations(rows, lanes, torch.from_numpy(changed[None]), fills)
                read = self._read_clean(rows, lanes, [*scores.values()], held, circuits)
            for where, numbers in ends.items():
                base_patterns = base[replace(where, site="pattern")]
                given = [each[base_patterns.where] for each in slopes]
                sums = self._sum_weights(
                    rows, lanes, where, read[scores[where]], base_patterns, given
                )
                units = [self._ends[number][1] for number in numbers]
                yield numbers, column, [each[..., units] for each in sums]

    def _find_tokens(
        self, rows: Ints, lanes: DrawLanes, where: SiteRead
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the lane, the token and the position of each vector of some rows in the stream
        that a receiver reads."""
        places = (*self._places(rows, lanes), self._places_of(rows))
        if not self._has_two_streams:
            return places
        encoded = _find_encoded(self._runs[0], self._cells[0], rows)
        lane, token, place = (location[encoded == reads_encoder(where)] for location in places)
        return lane, token, place

    def _sum_weights(
        self,
        rows: Ints,
        lanes: DrawLanes,
        where: SiteRead,
        scores: Tensor,
        base: BasePatterns,
        slopes: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return [row, position, unit] of each gradient: the change of attention weights by the
        queries or keys of a layer at each position, times the gradient.

        Args:
            where: The site of the queries or keys.
            scores: [lane, column, head, key] with changed queries or keys.
            base: Those of the clean run.
            slopes: [lane, column, head, key] each
        """
        lane, token, place = self._find_tokens(rows, lanes, where)
        count = unit_count(self.model.stack(where.stack).shape, where.site, where.layer)
        sums = [each.new_zeros(len(rows), self._size[0], count) for each in slopes]
        before, weights = base.scores.double(), base.weights.double()

        def change(scores: Tensor) -> Tensor:
            given = before, weights
            return renormalize_scores(scores, *given, has_sink=base.has_sink) - weights

        if where.site == "q":
            column = lanes.batch.of_read(where).columns(lane, token)
            queries = indices_to_device((lane, column), scores.device)
            at, changed = indices_to_device((lane, place), scores.device), change(scores.double())
            for total, slope in zip(sums, slopes, strict=True):
                total.index_put_(at, (changed * slope).sum(-1)[queries], accumulate=True)
            return sums
        for number in range(self._size[0]):
            there = torch.zeros(len(rows), scores.shape[-1], dtype=torch.bool)
            there[lane[place == number], token[place == number]] = True
            there = to_device(there, scores.device)[:, None, None]
            changed = change(torch.where(there, scores.double(), before))
            for total, slope in zip(sums, slopes, strict=True):
                of_head = (changed * slope).sum((1, 3))
                total[:, number] = of_head.unflatten(1, (count, -1)).sum(2)
        return sums

    # --- scores by contextual decomposition

    def _score_decomposed(self, rows: Ints, lanes: DrawLanes, trainer: EdgeScoreTrainer) -> Tensor:
        """Return [position, receiver, sender]: the sums over rows of the measure of the irrelevant
        part of the output less that of the clean run; 0 for edges into queries and keys.

        A pass has the clean run of the rows, and then irrelevant parts of several edges.
        """
        total = torch.zeros(math.prod(self._size), dtype=torch.float64)
        most = count_decomposed_parts(len(rows), int(lanes.lengths.max()))
        with torch.no_grad():
            edges = self._receive_irrelevant(rows, lanes, trainer, most)
            while group := [*islice(edges, most)]:
                run, every = self._open_parts(rows, lanes, trainer, len(group))
                reading, _ = run.read(_write_parts(group, len(rows)), every, ())
                (values,) = self._readout.tensors(reading)
                whole, *parts = values.double().chunk(1 + len(group))
                for (cell, _), irrelevant in zip(group, parts, strict=True):
                    total[cell] = (irrelevant - whole).sum().cpu()
        return total.unflatten(0, self._size)

    def _open_parts(
        self, rows: Ints, lanes: DrawLanes, trainer: EdgeScoreTrainer, parts: int
    ) -> tuple[DifferentiatedRun, DrawLanes]:
        """Return the run and the lanes of passes with some irrelevant parts of each row."""
        assert trainer.backward is not None
        run = self._differentiate(rows, replace(trainer.backward, parts=parts))
        return run, lanes.take(np.tile(np.arange(len(rows)), 1 + parts))

    def _receive_irrelevant(
        self, rows: Ints, lanes: DrawLanes, trainer: EdgeScoreTrainer, most: int
    ) -> Iterator[tuple[int, SiteWrite]]:
        """Yield the number of each edge in the masks, and what its receiver reads as the irrelevant
        part, except for queries and keys.

        Args:
            most: Largest number of senders in a pass.
        """
        sites = [SiteRead(s, n) for n in range(self.model.shape.n_layers) for s in ("z", "mlp_out")]
        whole = self._read_clean(rows, lanes, sites, (), ())
        lane, token = self._places(rows, lanes)
        place, senders = self._places_of(rows), enumerate(self._send_irrelevant(rows, lanes))
        while group := [*islice(senders, most)]:
            run, every = self._open_parts(rows, lanes, trainer, len(group))
            writes = self._hold_irrelevant(lanes, whole, len(group))
            writes += _write_parts(group, len(rows))
            ends = [self._list_decomposed(column) for column, _ in group]
            reads = {n: self._read_received(n) for own in ends for _, _, n in own}
            _, read = run.read(writes, every, [*dict.fromkeys(reads.values())])
            for part, own in enumerate(ends, 1):
                for cell, number, receiver in own:
                    where, unit = reads[receiver], self._ends[receiver][1]
                    at = torch.nonzero(place == number).flatten()
                    spots = part * len(rows) + lane[at], token[at]
                    index = spots[0], every.batch.of_read(where).columns(*spots)
                    values = read[where][indices_to_device(index, read[where].device)][:, unit]
                    given = lane[at], token[at], torch.full_like(at, unit), values
                    yield cell, SiteWrite(where.site, where.layer, *given)

    def _list_decomposed(self, column: int) -> list[tuple[int, int, int]]:
        """List the edges of a sender, except those into queries and keys: the number in the masks,
        the position and the receiver."""
        size, cells = self._size, self._candidates_of_mask
        triples = list[tuple[int, int, int]]()
        for number, (receiver, (where, _)) in product(range(size[0]), enumerate(self._ends)):
            cell = (number * size[1] + receiver) * size[2] + column
            if where.site not in _ATTENDED and cell in cells:
                triples.append((cell, number, receiver))
        return triples

    @cached_property
    def _candidates_of_mask(self) -> frozenset[int]:
        """The entries of the masks that are candidates."""
        return frozenset(self._cells_of_mask.tolist())

    def _read_received(self, receiver: int) -> SiteRead:
        """Return the site at which a receiver's input is read and written."""
        where, _ = self._ends[receiver]
        if where.layer is None:
            return SiteRead("resid_post", self.model.shape.n_layers - 1)
        return where

    def _hold_irrelevant(
        self, lanes: DrawLanes, whole: Mapping[SiteRead, Tensor], parts: int
    ) -> list[SiteWrite]:
        """Write the clean run's heads and MLPs as irrelevant parts of all rows."""
        site_writes: list[SiteWrite] = []
        for where, values in whole.items():
            frame, units = lanes.batch.of_read(where), values.shape[2]
            lane, token = frame.tokens()
            index = indices_to_device((lane, frame.columns(lane, token)), values.device)
            first = (1 + torch.arange(parts)).repeat_interleave(len(lane)) * len(lanes.used)
            lane, token = first + lane.repeat(parts), token.repeat(parts)
            lane, token = (each.repeat_interleave(units) for each in (lane, token))
            unit = torch.arange(units).repeat(len(lane) // units)
            tensor = values[index].flatten(0, 1).repeat(parts, 1)
            site_writes.append(SiteWrite(where.site, where.layer, lane, token, unit, tensor))
        return site_writes

    def _send_irrelevant(self, rows: Ints, lanes: DrawLanes) -> Iterator[SiteWrite]:
        """Yield the other value of each sender."""
        lane, token = self._places(rows, lanes)
        for fill in self._fills_of(rows):
            for number, unit in enumerate(fill.units):
                given = lane, token, torch.full_like(lane, unit), fill.values[:, number]
                yield SiteWrite(fill.where.site, fill.where.layer, *given)

    # --- circuits

    def mean_with(self, rows: Ints, kept: Sequence[int]) -> float:
        """Return the mean of the measure over rows while all edges but these carry the other
        value."""
        circuit = np.zeros((1, len(self.candidates)), dtype=np.bool_)
        circuit[0, list(kept)] = True
        return float(self.means_with(rows, circuit, self.batch)[0])

    def means_with(self, rows: Ints, circuits: Bools, batch: int) -> Floats:
        """Return [circuit]: the mean of the measure over rows while all edges but those of a
        circuit carry the other value.

        Args:
            circuits: [circuit, edge]
            batch: Largest number of rows of a pass.
        """
        rows, size = np.sort(rows), max(1, batch // len(circuits))
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        means: list[Floats] = []
        with torch.no_grad():
            for part in parts:
                lanes = self._lanes(part, len(circuits))
                fills = () if circuits.all() else self._fills_of(part)
                writes = self._ablations(part, lanes, torch.from_numpy(~circuits), fills)
                values = self._measure(part, lanes, [], writes)
                means.append(values.unflatten(0, (len(part), -1)).cpu().numpy())
                if len(parts) > 1:
                    self._unpatched.forget()
        return np.concatenate(means).mean(axis=0)

    def _ablations(
        self, rows: Ints, lanes: DrawLanes, ablated: Tensor, every_fill: Sequence[SenderFill]
    ) -> list[CircuitWrite]:
        """Return what ablated edges change of the inputs of their receivers.

        Args:
            ablated: [draw, candidate]
            every_fill: Those of all senders; may be empty if no edge is ablated.
        """
        draws = len(ablated)
        every = torch.zeros(draws, math.prod(self._size))
        every = every.index_copy(1, self._cells_of_mask, ablated.float()).unflatten(1, self._size)
        receivers, senders = (every.flatten(0, 1).any(end).any(0) for end in (2, 1))
        if not receivers.any():
            return []
        fills: list[SenderFill] = []
        columns: list[int] = []
        first = 0
        for fill in every_fill:
            own = range(first, first + fill.count)
            first = own.stop
            if senders[own.start : own.stop].any():
                fills.append(replace(fill, values=fill.values.repeat(draws, 1, 1)))
                columns += own
        every, places = every[:, :, receivers][..., columns], self._places_of(rows)
        ends = tuple(e for e, used in zip(self._ends, receivers.tolist(), strict=True) if used)
        lane, token = self._places(rows, lanes)
        if draws > 1 or self._has_two_streams:
            mask = every[:, places].flatten(0, 1)
            write = CircuitWrite(lane, token, tuple(fills), ends, mask, **self._nodes_of(""))
            return self._split_write(rows, write)
        writes: list[CircuitWrite] = []
        for number, mask in enumerate(every[0]):  # one mask for all tokens of a position
            own = torch.nonzero(places == number).flatten()
            if mask.any():
                at, parts = (lane[own], token[own]), tuple(fill.take(own) for fill in fills)
                writes.append(CircuitWrite(*at, parts, ends, mask, **self._nodes_of("")))
        return writes


@dataclass(frozen=True, eq=False)
class MovedEdgeRows(EdgeRows):
    """The rows of scores whose senders move along a path at more tokens than edges are scored at.

    The number of positions is the place of the tokens at no position.
    """

    scored: EdgeRows
    """The rows with the tokens at which edges are scored."""
    moved: tuple[PositionCell, PositionCell]

    @cached_property
    def rows(self) -> Ints:
        return self.scored.rows

    @cached_property
    def _cells(self) -> tuple[PositionCell, PositionCell]:
        return self.moved

    def _scored_places(self, rows: Ints) -> Tensor | None:
        scored, vector = self.scored, self._vectors_of(rows)[0]
        number = dict[tuple[int, int], int]()
        for row in rows.tolist():
            vectors = range(scored._starts[row], scored._starts[row + 1])
            tokens = scored._cells[0].hits[row][0]
            for token, place in zip(tokens, scored._tokens[list(vectors), 0].tolist(), strict=True):
                number[row, token] = place if self._size[0] > 1 else 0
        each = ((row, token) for row in rows.tolist() for token in self.moved[0].hits[row][0])
        places = torch.tensor([number.get(own, self._size[0]) for own in each])
        assert len(places) == len(vector)
        return places.to(self.model.device)


def count_tokens(cell: PositionCell) -> int:
    """Return the number of tokens of a position in all rows."""
    return sum(len(run) for hits in cell.hits for run in hits)


def open_edges(
    circuit: TrainedMask,
    objective: ResolvedExperiment,
    model: LoadedModel,
    side: PaddingSide | None,
    cache: VectorCache,
) -> EdgeRows:
    """Return the rows of a search for a circuit."""
    edges = [candidate for candidate in circuit.candidates if isinstance(candidate, tuple)]
    placed = [candidate for candidate in circuit.candidates if isinstance(candidate, PlacedEdge)]
    batch = int(circuit.training.options["batch"])
    given = circuit.training, objective, model, side, edges or placed, batch
    return EdgeRows(*given, cache=cache)


def find_circuit(declared: TrainedMask, rows: EdgeRows, job: TrainingJob) -> CircuitReport:
    """Find a circuit by scores of edges or by a search, and write it.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NoCircuit: A score isn't finite, or no selected edge leads to the end of the model.
        OSError: A file can't be written.
    """
    if isinstance(declared.training.trainer, EdgeScoreTrainer):
        circuit = _score_edges(declared.training, rows, job)
    else:
        circuit = _search_edges(declared.training, rows, job)
    report = _report(rows, circuit)
    if isinstance(declared.training.trainer, EdgeSearchTrainer):
        report = replace(report, made=report.made + _describe_aim(declared.training, report))
    _write_circuit(job.folder / MASK_FILE, rows, circuit)
    job.write_card(report)
    return report


def _describe_aim(training: DeclaredTraining, report: CircuitReport) -> str:
    """Describe a search whose circuit can't explain the measure, because the measure is better with
    every edge ablated than in the unpatched run; empty for any other search."""
    if not report.is_opposed(minimises=training.minimises):
        return ""
    aim, other = ("smaller", "maximise") if training.minimises else ("larger", "minimise")
    return (
        f"; note: the measure is {aim} with every edge ablated than in the unpatched run, so this "
        f"circuit doesn't explain the run's value; `{other}: …` keeps the edges that do"
    )


@dataclass(frozen=True, eq=False)
class FoundCircuit:
    """A circuit without gates."""

    chosen: Sequence[int]
    """Numbers of its edges, in descending order of the sizes of their scores."""
    scores: Floats
    """[edge] of all edges of the model."""
    steps: int
    """Points at which gradients were taken, or circuits that were measured."""
    selected: int
    """Number of edges before those were removed that don't lead to the end of the model."""
    made: str
    """How its edges were selected."""


def _score_edges(training: DeclaredTraining, rows: EdgeRows, job: TrainingJob) -> FoundCircuit:
    """Return the edges with the largest scores. Raises AutogradFailed and NoCircuit."""
    trainer, options = training.trainer_of(EdgeScoreTrainer), training.of_trainer
    steps, how = trainer.steps(options), trainer.selection(options)
    scoring = EffectScoring(rows, lambda part: rows.score(part, trainer, steps))
    job.search(scoring)
    scores = scoring.scores
    every = np.argsort(-np.abs(scores), kind="stable")
    graph, count = rows.graph, trainer.size(options) or len(every)
    order = [rows.candidates[n] for n in every[:count].tolist()]
    if how == "greedy":
        sizes = dict(zip(rows.candidates, np.abs(scores).tolist(), strict=True))
        order = graph.select_backwards(sizes, count)
    least, said = trainer.faithfulness(options), ""
    if least is not None:

        def keep(size: int) -> Bools:
            kept = graph.keep_leading(frozenset(order[:size]))
            return np.array([edge in kept for edge in rows.candidates])

        search = SizeSearch(scoring, rows, keep, len(order), least)
        job.search(search)
        order, said = order[: search.size], search.describe()
    kept = graph.keep_leading(frozenset(order))
    chosen = [n for n in every.tolist() if rows.candidates[n] in kept]
    if not chosen:
        reason = f"none of the {len(order):,} edges with the largest scores leads to `{rows.end}`"
        raise NoCircuit(reason, "write a larger `size`, or leave `select` out")
    made = _describe(how, len(order), len(chosen), rows.end) + said + rows.describe_rest()
    made += rows.describe_path(trainer)
    return FoundCircuit(chosen, scores, steps, len(order), made)


class EffectScoring:
    """Scores of all candidates, added up over the training rows."""

    def __init__(self, rows: EdgeRows | NodeRows, score: Callable[[Ints], Floats]) -> None:
        """Prepare the scores.

        Args:
            score: Returns [candidate] the sums of scores over some training rows, in one pass.
        """
        self._rows, self._score = rows, score
        self._total = np.zeros(len(rows.candidates))
        self._done = 0

    @property
    def scores(self) -> Floats:
        """[candidate] means over the training rows. Raises NoCircuit unless all are finite."""
        if not np.isfinite(self._total).all():
            raise NoCircuit("a score is NaN or infinite", "use another measure, or other rows")
        return self._total / len(self._rows.trained)

    @property
    def progress(self) -> tuple[int, int]:
        """Number of finished and of all rows."""
        return self._done, len(self._rows.trained)

    def run(self) -> Iterator[None]:
        """Score the rows that are left, and yield after each pass. Raises AutogradFailed.

        If memory runs out, further passes have half as many rows.
        """
        size = self._rows.pass_rows
        while self._done < len(self._rows.trained):
            part = self._rows.trained[self._done : self._done + size]
            score = partial(self._score, part)
            scores = try_pass(score, can_shrink=len(part) > 1)
            if scores is None:
                size = len(part) // 2
                continue
            self._total += scores
            self._done += len(part)
            yield

    def capture(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {"total": self._total.tolist(), "done": self._done}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises KeyError and ValueError."""
        total = np.array(state["total"])
        if total.shape != self._total.shape:
            raise ValueError("a checkpoint of other candidates")
        self._total, self._done = total, int(state["done"])


def _describe(how: str, selected: int, kept: int, end: str) -> str:
    """Describe the selection of edges, which lead to an end."""
    ways = {"greedy": f"from `{end}` backwards", "top": "with the largest scores of all"}
    text, removed = f"{count_noun(selected, 'edge')} selected {ways[how]}", selected - kept
    return f"{text}, {removed:,} of them removed, off any path to `{end}`" if removed else text


def _search_edges(training: DeclaredTraining, rows: EdgeRows, job: TrainingJob) -> FoundCircuit:
    """Return the edges that a search leaves. Raises NoCircuit."""
    search = EdgeSearch(rows, training.trainer_of(EdgeSearchTrainer))
    job.search(search)
    threshold = search.threshold
    made = "ablated one after another, always the edge that makes the measure least worse"
    if threshold is not None:
        *coarse, finest = training.trainer_of(EdgeSearchTrainer).levels
        levels = f"{', '.join(coarse)} and {finest}" if coarse else finest
        made = f"{levels} whose ablation makes the measure worse by {threshold:g} or more"
    order = np.argsort(-np.abs(search.scores), kind="stable")
    chosen = [n for n in order.tolist() if search.kept[n]]
    if not chosen:
        reason = "no edge makes the measure worse by the threshold when it is ablated"
        raise NoCircuit(reason, "write a smaller `threshold`")
    made = f"{made}; {count_noun(search.measured, 'circuit')} measured{rows.describe_rest()}"
    return FoundCircuit(chosen, search.scores, search.measured, len(chosen), made)


class CircuitMeter:
    """The measure of circuits or groups on the training rows."""

    def __init__(self, rows: EdgeRows | NodeRows) -> None:
        self.measured = 0
        """Number of circuits that were measured."""
        self._rows, self._batch = rows, rows.batch

    @property
    def together(self) -> int:
        """Number of circuits in a pass."""
        return max(1, self._batch // len(self._rows.trained))

    def means(self, circuits: Bools) -> Floats:
        """Return [circuit]: the means over training rows of circuits, [circuit, candidate].

        If memory runs out, further passes have half as many rows. Raises NoCircuit.
        """
        self.measured += len(circuits)
        averages: list[Floats] = []
        while sum(map(len, averages)) < len(circuits):
            first = sum(map(len, averages))
            part = circuits[first : first + self.together]
            measure = partial(self._rows.means_with, self._rows.trained, part, self._batch)
            part_means = try_pass(measure, can_shrink=self._batch > 1)
            if part_means is None:
                self._batch //= 2
            else:
                averages.append(part_means)
        means = np.concatenate(averages)
        if not np.isfinite(means).all():
            raise NoCircuit("the measure is NaN or infinite", "use another measure, or other rows")
        return means


class SizeSearch:
    """A search for the smallest circuit or group in an order of candidates whose faithfulness
    exceeds a number.

    Sizes are tried one after another from 1, because faithfulness may fall when one is added.
    """

    def __init__(
        self,
        scoring: EffectScoring,
        rows: EdgeRows | NodeRows,
        keep: Callable[[int], Bools],
        most: int,
        least: float,
    ) -> None:
        """Prepare a search.

        Args:
            keep: Returns [candidate] those that a circuit or group of a size keeps.
            most: Largest size.
            least: Number that the faithfulness exceeds.
        """
        self.size = 0
        """The largest size that was tried."""
        self.faithfulness = math.nan
        """On the training rows, of the circuit with this size."""
        self._scoring, self._keep, self._most, self._least = scoring, keep, most, least
        self._count, self._noun = len(rows.candidates), rows.noun
        self._what = "circuit" if self._noun == "edge" else "group"
        self._meter = CircuitMeter(rows)

    @property
    def progress(self) -> tuple[int, int]:
        """Number of sizes that were tried, and of all sizes."""
        return self.size, self._most

    def run(self) -> Iterator[None]:
        """Search, and yield after each pass. Raises NoCircuit."""
        count = self._count
        whole, clean = self._meter.means(np.array([[False] * count, [True] * count])).tolist()
        if whole == clean:
            reason = f"the measure doesn't change if every {self._noun} is ablated"
            raise NoCircuit(reason, "write `size`")
        while not self.faithfulness > self._least:
            sizes = range(self.size + 1, self._most + 1)[: self._meter.together]
            if not sizes:
                most = count_noun(self._most, self._noun)
                reason = f"no {self._what} of {most} or fewer has a faithfulness above "
                reason += f"{self._least:g}, on training rows"
                raise NoCircuit(reason, "write a smaller `faithfulness`")
            means = self._meter.means(np.stack(list(map(self._keep, sizes))))
            for size, mean in zip(sizes, means.tolist(), strict=True):
                self.size, self.faithfulness = size, (mean - whole) / (clean - whole)
                if self.faithfulness > self._least:
                    break
            yield

    def describe(self) -> str:
        """Describe the circuit."""
        return (
            f", the smallest {self._what} in this order with a faithfulness above {self._least:g} "
            f"({self.faithfulness:.3f}, on training rows)"
        )

    def capture(self) -> dict[str, Any]:
        """Return the state as JSON, with that of the scores."""
        return {**self._scoring.capture(), "size": self.size, "faithfulness": self.faithfulness}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises KeyError."""
        self.size, self.faithfulness = state["size"], state["faithfulness"]


class EdgeSearch:
    """A search for a circuit, which ablates one edge after another for good."""

    def __init__(self, rows: EdgeRows, trainer: EdgeSearchTrainer) -> None:
        self.kept = np.ones(len(rows.candidates), dtype=np.bool_)
        """[edge] whether an edge is in the circuit."""
        self.scores = np.zeros(len(rows.candidates))
        """[edge] the change of the measure when an edge was last ablated, alone or in a group; 0
        for edges that were dropped because they led only to ablated ones."""
        self._meter = CircuitMeter(rows)
        self._rows = rows
        self._value = math.nan
        options = rows.declared.of_trainer
        self.threshold, self._size = trainer.threshold(options), trainer.size(options)
        self._steps = rows.model_graph.list_search_steps(trainer.levels, rows.candidates)
        self._numbers = {edge: number for number, edge in enumerate(rows.candidates)}
        self._decided = 0

    @property
    def measured(self) -> int:
        """Number of circuits that were measured."""
        return self._meter.measured

    @property
    def progress(self) -> tuple[int, int]:
        """Number of finished and of all steps."""
        if self._size is None:
            return self._decided, len(self._steps)
        return int((~self.kept).sum()), len(self.kept) - self._size

    def run(self) -> Iterator[None]:
        """Search, and yield after each step. Raises NoCircuit."""
        if math.isnan(self._value):
            self._value = self._rows.mean(self._rows.trained, None, self._rows.batch)
        if self.threshold is None:
            assert self._size is not None
            yield from self._ablate_least(self._size)
        else:
            yield from self._ablate_below(self.threshold)

    def _ablate_below(self, threshold: float) -> Iterator[None]:
        """Ablate the edges of each step, and restore those that make the measure worse by a
        threshold.

        A pass tries the next steps of one unit, each together with those before it. Once edges are
        restored, the circuits after them in the pass aren't used, so that every decision is that of
        one step after another.
        """
        while self._decided < len(self._steps):
            unit = self._steps[self._decided].unit
            if self._steps[self._decided - 1].unit != unit:  # not where a checkpoint resumes in one
                self._drop_dead()
            due = self._due(unit)
            if not due:
                self._decided += 1
                continue
            tried = [
                [edge for numbers in due[: n + 1] for edge in numbers] for n in range(len(due))
            ]
            for edges, mean in zip(due, self._means(tried).tolist(), strict=True):
                self.scores[edges] = mean - self._value
                self._decided += 1
                if self._worse(mean - self._value) >= threshold:
                    break
                self.kept[edges], self._value = False, mean
            yield

    def _due(self, unit: SitePoint) -> list[list[int]]:
        """Return the edges that are left of each of the next steps of a unit, in one pass."""
        batches: list[list[int]] = []
        for step in self._steps[self._decided : self._decided + self._meter.together]:
            left = [n for n in map(self._numbers.__getitem__, step.edges) if self.kept[n]]
            if step.unit != unit or not left:
                break
            batches.append(left)
        return batches

    def _drop_dead(self) -> None:
        """Ablate the edges that lead only to ablated ones."""
        edges = self._rows.candidates
        left = {edge for edge, kept in zip(edges, self.kept.tolist(), strict=True) if kept}
        dead = left - self._rows.graph.keep_leading(left)
        numbers = [self._numbers[edge] for edge in dead]
        self.kept[numbers], self.scores[numbers] = False, 0

    def _ablate_least(self, size: int) -> Iterator[None]:
        """Ablate the edge that makes the measure least worse, until so many edges are left, with
        edges that then lead only to ablated ones."""
        order = [self._numbers[edge] for step in self._steps for edge in step.edges]
        while self.kept.sum() > size:
            due = [n for n in order if self.kept[n]]
            means = self._means([[n] for n in due])
            self.scores[due] = means - self._value
            least = int(np.argmin([self._worse(mean) for mean in means.tolist()]))
            self.kept[due[least]], self._value = False, float(means[least])
            self._drop_dead()
            yield

    def _worse(self, change: float) -> float:
        """Return how much worse a change makes the measure."""
        return change if self._rows.declared.minimises else -change

    def _means(self, ablated: Sequence[Sequence[int]]) -> Floats:
        """Return [circuit]: the means over training rows with some more edges ablated."""
        circuits = np.tile(self.kept, (len(ablated), 1))
        for circuit, own in zip(circuits, ablated, strict=True):
            circuit[list(own)] = False
        return self._meter.means(circuits)

    # --- checkpoints

    def capture(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {
            "kept": self.kept.tolist(),
            "scores": self.scores.tolist(),
            "numbers": [self._decided, self.measured, self._value],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises KeyError and ValueError."""
        kept, scores = np.array(state["kept"], dtype=np.bool_), np.array(state["scores"])
        if kept.shape != self.kept.shape or scores.shape != self.scores.shape:
            raise ValueError("a checkpoint of other edges")
        self._decided, self._meter.measured, self._value = state["numbers"]
        self.kept, self.scores = kept, scores


# --- groups by scores of nodes --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NodeRows:
    """The rows of a choice of sites, positions or coordinates by scores."""

    masked: MaskRows
    noun: str
    """What one candidate is."""
    batch: int
    """Largest number of rows of a pass."""

    @property
    def candidates(self) -> Sequence[MaskCandidate]:
        return self.masked.candidates

    @property
    def trained(self) -> Ints:
        """[row] ascending numbers of the training rows."""
        return self.masked.trained

    @property
    def pass_rows(self) -> int:
        """Largest number of rows of a pass that scores candidates."""
        return self.batch

    def score(self, rows: Ints, trainer: NodeScoreTrainer, steps: int) -> Floats:
        """Return [candidate]: the sums of scores over some rows. Raises AutogradFailed.

        Args:
            rows: In ascending order; one pass has them all.
            trainer: Where gradients are taken.
            steps: Number of midpoints of each line.
        """
        shares = torch.zeros(len(self.candidates), dtype=torch.float64)
        if not trainer.integrates:
            return self._slopes(rows, shares)
        score = np.zeros(len(self.candidates))
        for numbers in self.masked.joint:
            for step in range(steps):
                moved = shares.clone()
                moved[torch.from_numpy(numbers)] = (step + 0.5) / steps
                score[numbers] += self._slopes(rows, moved)[numbers] / steps
        return score

    def _slopes(self, rows: Ints, shares: Tensor) -> Floats:
        """Return [candidate]: gradients of the sum of the measure over rows by shares."""
        with torch.enable_grad():
            leaf = shares.repeat(len(rows), 1).requires_grad_()
            total = self.masked.values(rows, leaf).sum()
            (slopes,) = compute_gradients(total, [leaf], keep=False)
        return slopes.sum(0).numpy()

    def mean_with(self, rows: Ints, written: Bools) -> float:
        """Return the mean of the measure over rows while some candidates are written.

        Args:
            written: [candidate]
        """
        return self.masked.mean(rows, torch.from_numpy(written).float(), self.batch)

    def means_with(self, rows: Ints, groups: Bools, batch: int) -> Floats:
        """Return [group]: the mean of the measure over rows while all candidates but those of a
        group are written.

        Args:
            groups: [group, candidate]
            batch: Largest number of rows of a pass.
        """
        return self.masked.means(rows, ~groups, batch)


@dataclass(frozen=True, eq=False)
class FoundGroup:
    """A group without gates."""

    chosen: Ints
    """Numbers of its candidates, the most important first."""
    scores: Floats
    """[candidate]"""
    ranks: bool
    """Whether the order of `chosen` isn't that of scores."""
    steps: int
    """Points of each line at which gradients were taken, or groups that were measured."""
    made: str
    """How its candidates were selected."""


def find_group(declared: TrainedMask, masked: MaskRows, job: TrainingJob) -> NodeReport:
    """Choose a group by scores of nodes or by a search, and write it.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NoBasis: The basis whose coordinates it chooses from can't be computed.
        NoCircuit: A score isn't finite, all are 0, or no group has the faithfulness.
        TooFewCandidates: It chooses as many candidates as change a training row, or more.
        OSError: A file can't be written.
    """
    training = declared.training
    trainer = training.trainer_of(ScoringTrainer)
    rows = NodeRows(masked, declared.noun, int(training.options["batch"]))
    size, count = trainer.size(training.of_trainer), len(masked.active)
    if size is not None and size >= count:
        raise TooFewCandidates(declared, count, size)
    if isinstance(trainer, NodeScoreTrainer):
        group = _score_nodes(training, trainer, rows, job)
    else:
        group = _search_nodes(training, rows, job)
    report = _report_nodes(rows, group)
    _write_scores(job.folder / MASK_FILE, rows, group)
    job.write_card(report)
    return report


def _score_nodes(
    training: DeclaredTraining, trainer: NodeScoreTrainer, rows: NodeRows, job: TrainingJob
) -> FoundGroup:
    """Return the candidates with the largest scores. Raises AutogradFailed, NoBasis, NoCircuit."""
    options, noun = training.of_trainer, rows.noun
    size, steps, least = (
        trainer.size(options),
        trainer.steps(options),
        trainer.faithfulness(options),
    )
    scoring = EffectScoring(rows, lambda part: rows.score(part, trainer, steps))
    job.search(scoring)
    scores = scoring.scores
    if not scores.any():
        reason = f"the estimated effect of every {noun} on the measure is 0"
        hint = f"name {noun}s that the measure depends on"
        if not trainer.integrates:
            hint += ", or use `integrated_gradients(size: 4, steps: 16)`"
        raise NoCircuit(reason, hint)
    active = rows.masked.active
    order = active[np.argsort(-np.abs(scores[active]), kind="stable")]
    made = f"the {count_noun(size or 1, noun)} with the largest estimated effects"
    if least is not None:

        def keep(own: int) -> Bools:
            return np.isin(np.arange(len(scores)), order[:own])

        search = SizeSearch(scoring, rows, keep, len(active) - 1, least)
        job.search(search)
        size = search.size
        made = f"{count_noun(size, noun)}{search.describe()}"
    return FoundGroup(order[:size], scores, False, steps, made)


class NodeSearch:
    """A search for a group, which adds one candidate after another."""

    def __init__(self, rows: NodeRows, size: int) -> None:
        """Prepare a search.

        Args:
            size: Largest number of candidates of the group.
        """
        self.chosen: list[int] = []
        """Numbers of the candidates of the group, in the order in which they were added."""
        self.scores = np.zeros(len(rows.candidates))
        """[candidate] the change of the measure when it was last written together with the group:
        those of the group when they were added."""
        self.gain = math.nan
        """How much better the last candidate made the measure, whether it was added or not."""
        self._rows, self._size, self._ends = rows, size, False
        self._meter = CircuitMeter(rows)
        self._value = math.nan

    @property
    def measured(self) -> int:
        """Number of groups that were measured."""
        return self._meter.measured

    @property
    def progress(self) -> tuple[int, int]:
        """Number of candidates of the group, and their largest number."""
        return len(self.chosen), self._size

    def run(self) -> Iterator[None]:
        """Search, and yield after each step. Raises NoCircuit."""
        if math.isnan(self._value):
            self._value = float(self._means([[]])[0])
        sign = -1 if self._rows.masked.declared.minimises else 1
        while len(self.chosen) < self._size and not self._ends:
            due = [n for n in self._rows.masked.active.tolist() if n not in self.chosen]
            means = self._means([[*self.chosen, n] for n in due])
            self.scores[due] = means - self._value
            best = int(np.argmax(sign * means))
            self.gain = float(sign * (means[best] - self._value))
            size = max(abs(float(means[best])), abs(self._value))
            self._ends = self.gain <= self._rows.masked.model.rounding * size
            if not self._ends:
                self.chosen.append(due[best])
                self._value = float(means[best])
            yield

    def _means(self, groups: Sequence[Sequence[int]]) -> Floats:
        """Return [group]: the means over training rows while the candidates of a group are
        written."""
        written = np.zeros((len(groups), len(self.scores)), dtype=np.bool_)
        for mask, group in zip(written, groups, strict=True):
            mask[list(group)] = True
        return self._meter.means(~written)

    def capture(self) -> dict[str, Any]:
        """Return the state as JSON."""
        numbers = [self.measured, self._value, self._ends, self.gain]
        return {"chosen": self.chosen, "scores": self.scores.tolist(), "numbers": numbers}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises KeyError and ValueError."""
        scores = np.array(state["scores"])
        if scores.shape != self.scores.shape:
            raise ValueError("a checkpoint of other candidates")
        self._meter.measured, self._value, self._ends, self.gain = state["numbers"]
        self.chosen, self.scores = list(state["chosen"]), scores


def _search_nodes(training: DeclaredTraining, rows: NodeRows, job: TrainingJob) -> FoundGroup:
    """Return the candidates that a search adds. Raises NoBasis and NoCircuit."""
    size, noun = training.trainer_of(NodeSearchTrainer).size(training.of_trainer), rows.noun
    search = NodeSearch(rows, size)
    job.search(search)
    aim = "smaller" if training.minimises else "larger"
    if not search.chosen:
        reason = f"no {noun} alone makes the measure {aim} when it is written, on training rows"
        other = "maximise" if training.minimises else "minimise"
        hint = f"write `{other}: …` in `fit`, or the negative measure with `search`; or name other "
        raise NoCircuit(reason, f"{hint}{noun}s")
    extreme = "smallest" if training.minimises else "largest"
    made = f"each step added the {noun} that makes the measure {extreme}"
    if len(search.chosen) < size:
        made += f", until none makes it {aim}"
        if search.gain > 0:
            made += f" by more than rounding errors (the best by {search.gain:.1g})"
    made += f"; {count_noun(search.measured, 'group')} measured"
    return FoundGroup(np.array(search.chosen), search.scores, True, search.measured, made)


def _report_nodes(rows: NodeRows, group: FoundGroup) -> NodeReport:
    """Compare a group with its controls.

    The main result of a group by a search is that of writing the group; of a group by scores, that
    of writing all other candidates.
    """
    chosen, scores, searches = group.chosen, group.scores, group.ranks
    masked, measured, count = rows.masked, rows.masked.measured, len(scores)
    every, none = np.ones(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_)
    mask = np.isin(np.arange(count), chosen)
    random: list[float] = []
    for drawn in masked.random_choices(chosen.tolist(), masked.declared.seed):
        left = every.copy()
        left[masked.active[drawn]] = False
        random.append(rows.mean_with(measured, ~left if searches else left))
    kept, alone = rows.mean_with(measured, ~mask), rows.mean_with(measured, mask)
    return (NodeSearchReport if searches else NodeReport)(
        *masked.outcome(TrainingState(step=group.steps)),
        chosen={label_candidates((rows.candidates[n],)): float(scores[n]) for n in chosen.tolist()},
        candidates=len(masked.active),
        made=group.made,
        trained=alone if searches else kept,
        random=float(np.mean(random)),
        draws=len(random),
        alone=kept if searches else alone,
        unpatched=rows.mean_with(measured, none),
        whole=rows.mean_with(measured, every),
        inactive=count - len(masked.active),
        noun=rows.noun,
    )


def _write_scores(path: Path, rows: NodeRows, group: FoundGroup) -> None:
    """Write the candidates with their scores, null for those that change no training row, and the
    numbers of those of the group: ascending, or `ranked` in their order if it isn't that of
    scores."""
    active = frozenset(rows.masked.active.tolist())
    content = {
        "sites": [key_of_candidate(candidate) for candidate in rows.candidates],
        "labels": [label_candidates((candidate,)) for candidate in rows.candidates],
        "scores": [score if n in active else None for n, score in enumerate(group.scores.tolist())],
        "chosen": (group.chosen if group.ranks else np.sort(group.chosen)).tolist(),
        **({"ranked": True} if group.ranks else {}),
        **rows.masked.places,
        **rows.masked.dictionaries,
        "prompts": rows.masked.prompts,
    }
    path.write_text(json.dumps(content) + "\n", "utf-8")


# --- reports of circuits --------------------------------------------------------------------------


def _report(rows: EdgeRows, circuit: FoundCircuit) -> CircuitReport:
    """Compare a circuit with its controls."""
    measured, every = rows.measured, range(len(rows.candidates))
    seed, chosen = rows.declared.seed, circuit.chosen
    random = [rows.mean_with(measured, choice) for choice in rows.random_choices(chosen, seed)]
    return CircuitReport(
        *rows.outcome(TrainingState(step=circuit.steps)),
        chosen={label_candidates((rows.candidates[n],)): float(circuit.scores[n]) for n in chosen},
        candidates=len(every),
        selected=circuit.selected,
        made=circuit.made,
        drawn=rows.describe_random(chosen, seed),
        trained=rows.mean_with(measured, chosen),
        random=float(np.mean(random)),
        draws=len(random),
        unpatched=rows.mean(measured, None, rows.batch),
        whole=rows.mean_with(measured, ()),
    )


def _write_circuit(path: Path, rows: EdgeRows, circuit: FoundCircuit) -> None:
    """Write all edges with their scores, the numbers of those of the circuit, and the dictionaries
    whose features are nodes."""
    content = {
        "sites": [key_of_candidate(candidate) for candidate in rows.candidates],
        "labels": [label_candidates((candidate,)) for candidate in rows.candidates],
        "scores": circuit.scores.tolist(),
        "chosen": list(circuit.chosen),
        **rows.dictionaries,
        "prompts": rows.prompts,
    }
    path.write_text(json.dumps(content) + "\n", "utf-8")
