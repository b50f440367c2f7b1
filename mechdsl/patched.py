"""Patched rows: one forward pass from their start layer, read by the gauge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mechdsl.data.types import Run
from mechdsl.fillings import Fillings
from mechdsl.gauge import Gauge, Reading
from mechdsl.hooks import Batch, SiteRead, SiteWrite, run_segment
from mechdsl.lanes import (
    Lanes,
    at_positions,
    continuation_positions,
    noise_writes,
    prompt_loss,
    spot_positions,
)
from mechdsl.plan import ExperimentPlan, Ints, Rows
from mechdsl.results.data import Floats
from mechdsl.runs import UnpatchedRuns, vectors
from mechdsl.writes import after, build_writes, unless_set


def patched_values(
    plan: ExperimentPlan,
    gauge: Gauge,
    fillings: Fillings,
    runs: UnpatchedRuns,
    rows: Rows,
    draws: Ints,
    run: Run,
    start: int,
    batch: Ints,
) -> list[Floats]:
    """One pass (and one more per text of several tokens) over patched rows.

    draws: [row] the draw of noise. run: what the rows start from. start: the first block that runs.
    batch: the prompts in work. Returns one value per row for every measure of the gauge.
    """
    model = runs.model

    def lanes_of(source: str, donors: bool) -> Lanes:
        prompts = batch
        if donors and fillings.donors is not None:
            prompts = np.unique(fillings.donors[batch])
        return runs.lanes(runs.named(source), prompts)

    writes = build_writes(plan, rows, draws, lanes_of, fillings, model.shape)
    noise: list[SiteWrite] = []
    if start == 0 and run.noise is not None:  # above, it is in the hidden state
        added = noise_writes(
            model, run.noise, rows.prompt, run.noise.samples, runs.table.row_ids, runs.seed
        )
        noise = [unless_set(write, writes) for write in added]

    def forward(
        lanes: Lanes, at: Tensor, every: bool, reads: Sequence[SiteRead]
    ) -> tuple[Batch, Tensor | None, Mapping[SiteRead, Tensor]]:
        """at: [row, n] positions that are read; every: compute the logits of all positions."""
        lane = torch.from_numpy(lanes.lane(rows.prompt, draws)).to(model.device)
        taken = lanes.batch.take(lane)
        hidden = lanes.hidden[start][lane] if start > 0 else None
        own, past = noise, None
        first = first_column(plan, rows, taken, at) if lanes.past is not None else 0
        if lanes.past is not None and first > 0:
            past = lanes.past.take(lane, first, start)
            taken = taken.suffix(first)
            own = [after(write, taken) for write in noise]  # the rest is in what is kept
            hidden = None if hidden is None else hidden[:, first:]
        found = run_segment(
            model,
            taken,
            start=start,
            hidden=hidden,
            writes=[*writes, *own],
            reads=reads,
            logits_at=None if every else at,
            past=past,
        )
        return taken, found.logits, found.reads

    logits: Tensor | None = None
    loss: Tensor | None = None
    activations: dict[int, Tensor] = {}
    plain = runs.lanes(run, batch)
    lengths = plain.lengths[plain.lane(rows.prompt, draws)]
    if gauge.needs_plain:
        columns = [spot_positions(s, run.name, rows.prompt, lengths) for s in gauge.spots]
        at = torch.from_numpy(np.stack(columns, axis=1)).to(model.device)
        full = gauge.loss is not None or any(w.site == "logits" for w in writes)
        points = {n: a for n, (_, a) in enumerate(gauge.atoms) if a.point is not None}
        wanted = [SiteRead(a.point.site, a.point.layer) for a in points.values() if a.point]
        taken, logits, reads = forward(plain, at, full, wanted)
        if full and logits is not None:
            if gauge.loss is not None:
                loss = prompt_loss(gauge.loss, logits, taken, run, rows.prompt)
            logits = at_positions(logits, taken, at)
        for number, atom in points.items():
            assert atom.point is not None
            read = reads[SiteRead(atom.point.site, atom.point.layer)]
            position = columns[gauge.atoms[number][0]]
            activations[number] = vectors(read, taken, np.arange(len(rows)), position, atom)
    continued: dict[int, Tensor] = {}
    for number in gauge.continuations:
        atom = gauge.atoms[number][1]
        lanes = runs.lanes(run, batch, atom)
        at = continuation_positions(atom, rows.prompt, lengths).to(model.device)
        written = any(w.site == "logits" for w in writes)
        taken, found, _ = forward(lanes, at, written, ())
        assert found is not None
        continued[number] = at_positions(found, taken, at) if written else found
    return gauge.read(
        Reading(
            prompts=rows.prompt,
            items=[plan.items[cell] for cell in rows.cell],
            logits=logits,
            continued=continued,
            loss=loss,
            activations=activations,
            references=runs.references(gauge, batch, rows.prompt, draws),
        )
    )


def first_column(plan: ExperimentPlan, rows: Rows, batch: Batch, at: Tensor) -> int:
    """The first column that any of the rows writes to or is read at.

    What lies before it is the base run's: it attends to nothing that is changed.
    """
    written = torch.from_numpy(plan.leftmost(rows)).to(batch.starts.device)
    first = torch.minimum(written, at.min(dim=1).values)
    return int((batch.starts + first).min())
