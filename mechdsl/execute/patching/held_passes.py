"""Full passes in which heads and MLPs are held, for path rules, and gradients along the edges of a
path (`using eap`)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.execute.vectors import list_later_decoders
from mechdsl.forward.hooks.backward_rules import catch_autograd_errors, compute_gradients
from mechdsl.forward.hooks.batch import Batch, RuleWrites, SiteRead, SiteWrite, indices_to_device
from mechdsl.forward.hooks.coordinates import CoordinateSystem
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel, has_single_output
from mechdsl.forward.hooks.weight_maps import FrozenNorms
from mechdsl.models.restart import HeldSublayers
from mechdsl.models.shape import ModelShape, vector_width
from mechdsl.planner.plan import ExperimentPlan
from mechdsl.planner.rows import RowTable, RulePlan
from mechdsl.program.estimators import BackwardRules
from mechdsl.resolve.types import BasisMember, SiteLayer, SitePoint, is_neuron
from mechdsl.vocab.sites import SITES, is_query_or_key


def hold_rows(plan: RulePlan, count: int, cells: Ints | None = None) -> HeldSublayers:
    """Hold `count` rows of a path rule.

    Args:
        plan: The plan of the rule.
        count: Number of rows.
        cells: [row] cell of each row; None for rows in which the senders of all cells send that
            have a path.
    """
    assert plan.paths is not None
    paths = plan.paths
    every = np.ones(count, dtype=np.bool_)
    with_path = np.flatnonzero(paths.points.counts(paths.pair_of_cell))
    _, sending = plan.points.expand(np.unique(plan.site_of_cell[with_path]))
    neurons: dict[tuple[str, int | None], Bools] = {}
    heads: dict[tuple[str, int | None], Bools] = {}
    for number, point in enumerate(plan.point_table):
        own = neurons if is_neuron(point) else heads if SITES[point.site].unit == "head" else None
        if own is not None:
            sends = every & (number in sending)
            if cells is not None:
                row, sender = plan.points.expand(plan.site_of_cell[cells])
                sends = np.isin(np.arange(count), row[sender == number])
            place = SITES[point.site].stack, point.layer
            own[place] = sends | own.get(place, False)
    read = [("", point.layer) for point in paths.reads if point.site == "attn_out"]
    return HeldSublayers(
        every,
        np.full(count, not paths.through_mlps, dtype=np.bool_),
        np.full(count, paths.frozen_norms, dtype=np.bool_),
        neurons,
        {place: every & ~heads.get(place, ~every) for place in read},
    )


@contextmanager
def hold_sublayers(
    model: LoadedModel,
    norms: FrozenNorms,
    batch: Batch,
    held: HeldSublayers,
    acting: RuleWrites,
    noise: Sequence[SiteWrite],
    others: RuleWrites,
) -> Generator[list[SiteWrite]]:
    """Hold heads and MLPs of held rows at the base run in a full pass, and norms if requested.

    Held values precede the writes of rules, which act on them again in their order.

    Args:
        norms: Its norms, which are frozen for held rows while the context is open.
        held: Which rows, MLPs and norms are held.
        acting: Writes of all rules.
        noise: Writes of the base run's noise.
        others: Writes of rules outside the path, which also act on the base run.

    Yields:
        Writes that hold the sublayers.
    """
    shape = model.shape
    wanted = _list_held_sites(shape, held, acting)
    frozen = bool(held.norms.any())
    # Norms may follow the last one of the stream, and circuits end at the logits: then the pass
    # can't stop early.
    stop = None if frozen or others.circuits else shape.n_layers
    others = others.below(shape.n_layers + int(frozen), shape.n_layers)
    if all(read.stack == "vision" for read, _ in wanted):
        edges = [edge for edge in others.edges if edge.stack == "vision"]
        stop, others = 0, RuleWrites(_list_patches(others), edges, blocks=others.blocks)
    last = None if has_single_output(model) else (batch.lengths - 1)[:, None]
    with norms.recorded(held.norms) as scales:
        reads = run_full(
            model,
            batch,
            writes=[*noise, *others.writes],
            reads=[read for read, _ in wanted],
            stop=stop,
            logits_at=last,
            edges=others.edges,
            circuits=others.circuits,
        ).reads
    with norms.kept(held.norms, scales):
        yield [_write_tokens(reads[read], read, numbers, batch, acting) for read, numbers in wanted]


def _list_held_sites(
    shape: ModelShape, held: HeldSublayers, acting: RuleWrites
) -> list[tuple[SiteRead, Ints]]:
    """List the sites that are held, each with its rows; those of all stacks of a model, or of the
    vision encoder of prompts if the senders are in it."""
    rows, without_mlps = np.flatnonzero(held.rows), np.flatnonzero(held.rows & held.mlps)
    removed = {to for to, of in acting.blocks if of is None}
    stacks = {"": shape} | {
        name: model_shape for name, model_shape in shape.others.items() if name != "vision"
    }
    if _list_patches(acting):
        stacks = {"vision": shape.others["vision"]}
    wanted: list[tuple[SiteRead, Ints]] = []
    for stack, model_shape in stacks.items():
        for layer in range(model_shape.n_layers):
            of_block = "" if stack == "cross" else stack
            if (of_block, layer) in removed:
                continue
            heads = [
                site for site in ("z", "mixer_out", "attn_out") if model_shape.has(site, layer)
            ]
            whole = held.attention.get((stack, layer), np.zeros_like(held.rows))[rows]
            for site, here in ((heads[0], ~whole), ("attn_out", whole)) if heads else ():
                wanted.append((SiteRead(site, layer, stack, before=True), rows[here]))
            sends = held.neurons.get((stack, layer), np.zeros_like(held.rows))[without_mlps]
            for mlp, here in (("mlp_hidden", sends), ("mlp_out", ~sends)):
                if model_shape.has(mlp, layer):
                    read = SiteRead(mlp, layer, stack, before=True)
                    wanted.append((read, without_mlps[here]))
    return [(read, numbers) for read, numbers in wanted if len(numbers)]


def _list_patches(acting: RuleWrites) -> list[SiteWrite]:
    """List the writes in the vision encoder of prompts, at patches of images."""
    return [write for write in acting.writes if write.stack == "vision"]


def _write_tokens(
    values: Tensor, read: SiteRead, rows: Ints, batch: Batch, acting: RuleWrites
) -> SiteWrite:
    """Return a write of the values of these rows at all tokens and units; in a vision encoder, at
    all patches that rules write, because receivers read no other patches."""
    count, own = values.shape[2], batch.of_read(read)
    row, token = own.tokens()
    if read.stack == "vision":
        places = [torch.stack([patch.rows, patch.positions]) for patch in _list_patches(acting)]
        row, token = torch.cat(places, dim=1).unique(dim=1)
    is_held = torch.zeros(len(batch), dtype=torch.bool)
    is_held[torch.from_numpy(rows)] = True
    row, token = (each[is_held[row]].repeat_interleave(count) for each in (row, token))
    unit = torch.arange(count).repeat(len(row) // count)
    index = row, own.columns(row, token), unit
    held = values[indices_to_device(index, values.device)]
    holds = bool(is_held.all()) and read.stack != "vision"
    return SiteWrite(read.site, read.layer, row, token, unit, held, stack=read.stack, holds=holds)


@dataclass(frozen=True)
class EdgeReceivers:
    """The receivers of a cell."""

    points: tuple[SitePoint, ...]
    """Their sites; the end of the model is the last stream."""
    features: tuple[int, ...] | None
    """The features that receive there, () for all; None for whole vectors."""


@dataclass(frozen=True, eq=False)
class PathEdges:
    """The edges of some rows of a path rule."""

    rule: RulePlan
    first: Ints
    """[sender] index of the first row with each value of its senders."""
    sender: Ints
    """[row] index into `first`."""
    receivers: tuple[EdgeReceivers, ...]
    """The receivers of cells, each set once."""
    receivers_of_row: Ints
    """[row] index into `receivers`."""
    tokens: tuple[Tensor, Tensor]
    """Lane and position of each token that a row writes."""
    fixes_attention: bool = False
    """Whether queries and keys receive exactly: no gradient by them is taken."""

    @staticmethod
    def of(
        plan: ExperimentPlan,
        rows: RowTable,
        draws: Ints,
        lane_of_row: Ints,
        shape: ModelShape,
        *,
        fixes_attention: bool,
    ) -> PathEdges:
        """Number the senders and the receivers of rows."""
        rule = plan.path
        assert rule is not None
        assert rule.paths is not None
        paths, at = rule.paths, rule.written_runs(rows)
        same = np.stack([plan.senders[rows.cell], at, rows.alternative, rows.prompt, draws])
        _, first, sender = np.unique(same, axis=1, return_index=True, return_inverse=True)
        end = SitePoint("resid_post", shape.n_layers - 1, None)
        table = [end if SITES[point.site].when == "output" else point for point in paths.table]
        of_pair: list[tuple[SitePoint, ...]] = []
        for pair in range(len(paths.points.offsets) - 1):
            _, points = paths.points.expand(np.array([pair]))
            of_pair.append(tuple(dict.fromkeys(table[point] for point in points.tolist())))
        pairs = paths.pair_of_cell[rows.cell]
        named = np.full(len(rows), -1)
        if paths.coordinates_of_cell is not None:
            named = paths.coordinates_of_cell[rows.cell]
        kinds, of_row = np.unique(np.stack([pairs, named]), axis=1, return_inverse=True)
        number: dict[EdgeReceivers, int] = {}
        of_kind: list[int] = []
        for pair, which in kinds.T.tolist():
            features = None if which < 0 else paths.coordinates[which].which
            receivers = EdgeReceivers(of_pair[pair], features)
            of_kind.append(number.setdefault(receivers, len(number)))
        row, token = rule.written.tokens.expand(at)
        places = np.unique(np.stack([lane_of_row[row], token]), axis=1)
        return PathEdges(
            rule,
            first,
            sender.reshape(-1),
            tuple(number),
            np.array(of_kind, dtype=np.int64)[of_row.reshape(-1)],
            (torch.from_numpy(places[0]), torch.from_numpy(places[1])),
            fixes_attention,
        )

    def list_attended(self, number: int) -> list[SitePoint]:
        """List the receivers with a number whose change of attention weights is exact."""
        points = self.receivers[number].points
        return [point for point in points if self.fixes_attention and is_query_or_key(point.site)]

    def has_gradient(self, number: int) -> bool:
        """Return whether some receivers with a number have a gradient."""
        return len(self.list_attended(number)) < len(self.receivers[number].points)

    @property
    def attended(self) -> list[SiteLayer]:
        """The sites and layers of all receivers whose change of attention weights is exact."""
        points = (
            point for number in range(len(self.receivers)) for point in self.list_attended(number)
        )
        return list(dict.fromkeys((point.site, point.layer) for point in points))

    @property
    def sites(self) -> list[SiteLayer]:
        """The sites and layers of all other receivers."""
        points = (point for receiver in self.receivers for point in receiver.points)
        every = dict.fromkeys((point.site, point.layer) for point in points)
        attended = self.attended
        return [each for each in every if each not in attended]

    @property
    def reads(self) -> dict[SiteLayer, SiteRead]:
        """What receivers at each site read: a transcoder's features read another site."""
        path = self.rule.rule.path
        assert path is not None
        site_reads: dict[SiteLayer, SiteRead] = {}
        for site, layer in self.sites:
            of = path.reads(SitePoint(site, layer, None))
            site_reads[site, layer] = SiteRead(of.site, of.layer, before=of.site != "resid_post")
        return site_reads

    def list_written(self, systems: Mapping[str, CoordinateSystem]) -> list[SiteLayer]:
        """List the sites that receivers change: features of a cross-layer transcoder change the
        outputs of later MLPs, too."""
        sites = [*self.sites]
        for (site, layer), member in self.list_members().items():
            assert layer is not None
            later = list_later_decoders(systems[member.name], layer)
            sites += [(site, number) for number in later]
        return list(dict.fromkeys(sites))

    def list_members(self) -> dict[SiteLayer, BasisMember]:
        """Return the dictionary of each receivers' site at which features receive."""
        basis = self.rule.rule.receiving_basis
        if basis is None:
            return {}
        return {(site, layer): basis.at(SitePoint(site, layer, None)) for site, layer in self.sites}


@dataclass(frozen=True, eq=False)
class SentRows:
    """Rows with distinct values of senders."""

    rows: RowTable
    writes: Sequence[SiteWrite]
    """What the senders change; rows of the writes are numbers of these rows."""
    lane: Ints
    """[sender]"""
    tokens: tuple[Ints, Ints]
    """Number of the row and position of each token that a row writes."""

    @staticmethod
    def of(
        edges: PathEdges, rows: RowTable, writes: Sequence[SiteWrite], lane_of_row: Ints
    ) -> SentRows:
        """Add the tokens of the path to the rows of the senders."""
        row, token = edges.rule.written.tokens.expand(edges.rule.written_runs(rows))
        return SentRows(rows, writes, lane_of_row, (row, token))

    def take(self, own: Ints) -> SentRows:
        """Select some rows, in ascending order."""
        place = np.full(len(self.lane), -1)
        place[own] = np.arange(len(own))
        row, token = self.tokens
        here = place[row] >= 0
        return SentRows(
            self.rows.take(own),
            select_writes(self.writes, place),
            self.lane[own],
            (place[row][here], token[here]),
        )


def select_writes(writes: Sequence[SiteWrite], place: Ints) -> list[SiteWrite]:
    """Select the writes of some rows.

    Args:
        place: [row] their new numbers; -1 for other rows.
    """
    rows = torch.from_numpy(place)
    site_writes = [write.some(rows[write.rows] >= 0, rows) for write in writes]
    return [site_write for site_write in site_writes if len(site_write.rows)]


@dataclass(frozen=True, eq=False)
class ReceivingFeatures:
    """Features at the receivers of a path, as functions of the senders."""

    system: CoordinateSystem
    read: Tensor
    """[token, width] vectors that are encoded, in at least 32 bits."""
    written: Tensor
    """[token, width] vectors of the base run that the features change."""
    decoders: Mapping[SiteLayer, CoordinateSystem]
    """The sites that the features change, with the bases that decode them there."""

    def changes(self, which: tuple[int, ...]) -> dict[SiteLayer, Tensor]:
        """Return [token, width] by site: the change of its vectors by the change of features.

        It is 0, with the gradients of the features.

        Args:
            which: The features; empty for all.
        """
        named = torch.tensor(which, device=self.read.device).expand(len(self.read), -1)
        index = named if which else None
        activations = self.system.encode(self.read, index)
        change = activations - activations.detach()
        return {
            place: decoder.shift(self.written, change, index) - self.written
            for place, decoder in self.decoders.items()
        }


@dataclass(frozen=True, eq=False)
class HeldPass:
    """What receivers read in a pass in which all heads and MLPs but the senders are held.

    It has the values of the base run, and its autograd graph leads to the senders alone.
    """

    edges: PathEdges
    senders: Mapping[SiteRead, Tensor]
    """[lane, column, unit, width] values at the senders' sites."""
    inputs: Mapping[SiteLayer, Tensor]
    """[token, unit, width] values at the receivers' sites."""
    features: Mapping[SiteLayer, ReceivingFeatures]
    """Features at these sites, if features receive."""

    @staticmethod
    def run(
        edges: PathEdges,
        model: LoadedModel,
        norms: FrozenNorms,
        batch: Batch,
        noise: Sequence[SiteWrite],
        adds: Sequence[SiteWrite],
        wheres: Sequence[SiteRead],
        systems: Mapping[str, CoordinateSystem],
        backward: BackwardRules | None,
    ) -> HeldPass:
        """Run the pass. Raises AutogradFailed.

        Args:
            edges: The edges of all rows.
            model: The model.
            norms: Its norms.
            batch: The lanes of all rows.
            noise: Writes of the base run's noise.
            adds: Zeros at the senders.
            wheres: Sites whose values the changes of the senders depend on.
            systems: The bases of the experiment.
            backward: Changes of the derivatives.
        """
        of_site = edges.reads
        held = hold_rows(edges.rule, len(batch.lengths))
        if backward is not None and backward.fixed_norms:  # norms have the values of the base run
            held = replace(held, norms=np.zeros_like(held.norms))
        given = (held, RuleWrites(adds), noise, RuleWrites())
        with (
            hold_sublayers(model, norms, batch, *given) as writes,
            catch_autograd_errors(),
        ):
            reads = run_full(
                model,
                batch,
                stop=model.shape.n_layers,
                writes=[*noise, *writes, *adds],
                reads=[*of_site.values(), *wheres],
                gradients=True,
                backward=backward,
            ).reads
        inputs: dict[SiteLayer, Tensor] = {}
        for place, read in of_site.items():
            index = edges.tokens[0], batch.of_read(read).columns(*edges.tokens)
            inputs[place] = reads[read][indices_to_device(index, reads[read].device)]
        features: dict[SiteLayer, ReceivingFeatures] = {}
        for place, member in edges.list_members().items():
            vectors = inputs[place][:, 0]
            vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
            written = vectors.detach()
            if member.reads:  # the change of a transcoder's output doesn't depend on the output
                written = vectors.new_zeros(len(vectors), vector_width(model.shape, *place))
            (site, layer), system = place, systems[member.name]
            assert layer is not None
            decoders = {place: system}
            for later, decoder in list_later_decoders(system, layer).items():
                decoders[site, later] = decoder
            features[place] = ReceivingFeatures(system, vectors, written, decoders)
        return HeldPass(edges, {where: reads[where] for where in wheres}, inputs, features)

    def gradients(
        self, number: int, slopes: Mapping[SiteLayer, Tensor], leaves: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the gradient of a metric by each leaf along edges. Raises AutogradFailed.

        Args:
            number: Index into the receivers of the edges.
            slopes: [token, unit, width] gradients of the metric by the receivers' sites.
            leaves: The zeros that were added at the senders.
        """
        total = torch.zeros((), dtype=torch.float64)
        receiver = self.edges.receivers[number]
        attended = self.edges.list_attended(number)
        for point in (site_point for site_point in receiver.points if site_point not in attended):
            place = point.site, point.layer
            units = slice(None) if point.unit is None else point.unit
            parts = {place: self.inputs[place][:, units]}
            if receiver.features is not None:
                changes = self.features[place].changes(receiver.features)
                parts = {to: change[:, None] for to, change in changes.items()}
            for to, values in parts.items():
                slope = slopes[to][:, units]
                total = total.to(values.device) + (values.to(slope) * slope).sum().double()
        return compute_gradients(total, leaves, keep=True)
