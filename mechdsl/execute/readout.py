"""Metrics read off a run: from logits at the measured places to one number per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.execute.unpatched_batch import Spot, continuation_ids, spots_of
from mechdsl.resolve.measures import evaluate
from mechdsl.resolve.resolved import Atom, Env, ResolvedMeasure


@dataclass(frozen=True, eq=False)
class Reading:
    """What a run gives a readout. Rows are lanes of an unpatched run or patched rows."""

    prompts: Ints
    """[row] index into the table."""
    items: Sequence[Env]
    """[row] the occurrence that `{item.index}` stands for."""
    logits: Tensor | None
    """[row, spot, vocab] of the plain prompts."""
    continued: Mapping[int, Tensor]
    """Atom number → [row, token, vocab] of the prompts with that text behind them."""
    loss: Tensor | None
    activations: Mapping[int, Tensor]
    """Atom number → [row, 1, width] at the measured place."""
    references: Mapping[int, Tensor]
    """Atom number → [row, vocab] logits, or [row, 1, width], of the reference run."""
    observed: Tensor | None = None
    """[row] what `observe attention` sees; None on runs without rows."""
    tokens: Tensor | None = None
    """[K] ascending: the tokens whose logits there are; None for the whole vocabulary."""
    has_loss: Bools | None = None
    """[row] whether the prompt has a loss; None where none is read."""

    def columns(self, ids: Tensor) -> Tensor:
        """Where the logits of these tokens lie."""
        return ids if self.tokens is None else torch.searchsorted(self.tokens, ids)


@dataclass(frozen=True, eq=False)
class Found:
    """What a readout finds in rows."""

    values: list[Floats]
    """Per measure, [row]."""
    broken: Bools
    """[row] whether it can't be used, as a number that is read is none; such a row has no value in
    any measure."""
    rounding: list[Floats]
    """Per measure, [row]: how far rounding may move the value; 0 where that wasn't asked for."""

    def over_draws(self, draws: int) -> Found:
        """Averaged over draws of noise, which lie side by side."""

        def mean(values: Floats) -> Floats:
            return values.reshape(-1, draws).mean(axis=1)

        broken = np.count_nonzero(self.broken.reshape(-1, draws), axis=1) > 0
        return Found(list(map(mean, self.values)), broken, list(map(mean, self.rounding)))


@dataclass(frozen=True, eq=False)
class Readout:
    """The measures of one experiment, with their atoms numbered."""

    measures: tuple[ResolvedMeasure, ...]
    atoms: tuple[tuple[int, Atom], ...]
    """(number of its spot, atom)."""
    spots: tuple[Spot, ...]

    @staticmethod
    def of(measures: Sequence[ResolvedMeasure]) -> Readout:
        spots = spots_of(measures)
        atoms = [(spots.index(m.at), atom) for m in measures for atom in m.atoms]
        return Readout(tuple(measures), tuple(atoms), spots)

    @property
    def continuations(self) -> tuple[int, ...]:
        """Numbers of the atoms that need a pass of their own, with their text behind the prompt."""
        return tuple(
            n
            for n, (_, atom) in enumerate(self.atoms)
            if atom.form.takes == "continuation" and _longest(atom) > 1
        )

    @property
    def needs_plain(self) -> bool:
        """Whether some atom is read off the prompts as they are."""
        own = [n for n, (_, atom) in enumerate(self.atoms) if atom.form.takes != "attention"]
        return len(self.continuations) < len(own)

    @property
    def narrow(self) -> bool:
        """Whether no atom needs the logits of the whole vocabulary."""
        return all(atom.form.narrow for _, atom in self.atoms)

    def tokens(self, prompts: Ints) -> set[int]:
        """The tokens whose logits a narrow readout reads on these prompts."""
        found: set[int] = set()
        for _, atom in self.atoms:
            found.update(token for token, _ in atom.numerals)
            for texts in atom.texts.values():
                found.update(texts[prompt][0] for prompt in prompts.tolist())
        return found

    @property
    def loss(self) -> Atom | None:
        return next((a for _, a in self.atoms if a.form.takes == "prompt"), None)

    def read(self, reading: Reading, relative: float = 0.0) -> Found:
        """One value per row for every measure.

        relative: how far rounding may move a logit, relative to the largest that a metric reads;
        0 doesn't ask what that does to the values
        """
        broken = self._broken(reading)
        if broken.any() and reading.logits is not None:  # no function of the user's meets them
            rows = torch.from_numpy(broken).to(reading.logits.device)
            reading = replace(reading, logits=reading.logits.masked_fill(rows[:, None, None], 0.0))
        found: list[Floats] = []
        rounding: list[Floats] = []
        number = 0
        for measure in self.measures:
            values: dict[Any, Floats] = {}
            errors: dict[Any, Floats] = {}
            for atom in measure.atoms:
                spot = self.atoms[number][0]
                value = _value(atom, number, spot, reading)
                values[atom.node] = value.detach().double().cpu().numpy()
                if relative:
                    size = _size(atom, number, spot, reading, values[atom.node])
                    errors[atom.node] = relative * size
                number += 1
            with np.errstate(divide="ignore", invalid="ignore"):
                result = evaluate(measure.expression, values.__getitem__)
                moved = np.zeros(len(reading.prompts))
                for node, error in errors.items():  # to first order, all in the worst direction
                    other = {**values, node: values[node] + error}
                    moved += np.abs(evaluate(measure.expression, other.__getitem__) - result)
            rounding.append(np.nan_to_num(moved, nan=0.0, posinf=0.0))
            found.append(np.broadcast_to(result, len(reading.prompts)).astype(np.float64))
            for value in values.values():  # −∞ − −∞ is no number, though each has its meaning
                broken |= np.isinf(value) & np.isnan(found[-1])
        for values_of_measure in found:
            values_of_measure[broken] = np.nan
        return Found(found, broken, rounding)

    def _broken(self, reading: Reading) -> Bools:
        """[row] whether NaN is among what is read, or an infinity that metrics can't use. −∞ is
        what a model says of a token that it excludes; that of all tokens is none."""
        found = [torch.zeros(len(reading.prompts), dtype=torch.bool)]
        if reading.logits is not None:
            found.append(_senseless(reading.logits, whole=reading.tokens is None).any(-1))
        found += [_senseless(logits, whole=True).any(-1) for logits in reading.continued.values()]
        if reading.loss is not None and reading.has_loss is not None:
            due = torch.from_numpy(reading.has_loss).to(reading.loss.device)
            found.append(reading.loss.isnan() & due)
        if reading.observed is not None:
            found.append(~reading.observed.isfinite())
        for number, (spot, atom) in enumerate(self.atoms):
            takes = atom.form.takes
            if takes == "activations":
                for each in (reading.activations[number], reading.references[number]):
                    found.append(~each.isfinite().flatten(1).all(-1))
            elif takes == "reference":
                found.append(_senseless(reading.references[number], whole=True))
            elif takes == "numerals" and atom.form.narrow and reading.logits is not None:
                ids = torch.tensor([token for token, _ in atom.numerals])
                columns = reading.columns(ids.to(reading.logits.device))
                own = reading.logits[:, spot].index_select(-1, columns)
                found.append(_senseless(own, whole=True))
        return torch.stack([one.cpu() for one in found]).any(0).numpy()


def _size(atom: Atom, number: int, spot: int, reading: Reading, value: Floats) -> Floats:
    """[row]: what the rounding of an atom is relative to. Metrics in logits and nats move by as
    much as the largest logit that they read, shares of it by that part of themselves; what only
    counts, such as a rank, doesn't round."""
    takes, unit = atom.form.takes, atom.form.unit
    if takes in ("attention", "activations"):
        return np.ones(len(value))
    if unit in ("rank", "share") or atom.form.kind == "category":
        return np.zeros(len(value))
    logits = reading.continued.get(number)
    if logits is None:
        assert reading.logits is not None
        logits = reading.logits[:, spot]
    if atom.form.narrow and takes == "numerals":
        ids = torch.tensor([token for token, _ in atom.numerals], device=logits.device)
        logits = logits.index_select(-1, reading.columns(ids))
    if atom.form.narrow and takes == "target":
        return np.abs(value)
    finite = logits.abs().nan_to_num(nan=0.0, posinf=0.0).flatten(1)
    largest = finite.amax(-1).double().cpu().numpy()
    return largest if unit in ("logit", "nat") else largest * np.abs(value)


def _senseless(logits: Tensor, *, whole: bool) -> Tensor:
    """[...] of [..., vocab]: NaN or +∞ among the logits, or, where they are the whole choice that
    there is, nothing but −∞. One reduction, without a second tensor of that size."""
    top = logits.amax(-1)
    return ~top.isfinite() if whole else top.isnan() | top.isposinf()


def _longest(atom: Atom) -> int:
    return max((len(ids) for rows in atom.texts.values() for ids in rows), default=0)


def _value(atom: Atom, number: int, spot: int, reading: Reading) -> Tensor:
    """[row]: the atom's metric."""
    takes, function = atom.form.takes, atom.form.function
    if takes == "prompt":
        assert reading.loss is not None
        return reading.loss
    if takes == "attention":
        nothing = torch.full((len(reading.prompts),), torch.nan)
        return nothing if reading.observed is None else reading.observed
    if takes == "activations":
        return function(reading.activations[number], reading.references[number])
    if number in reading.continued:
        return _continued(atom, reading.continued[number], reading.prompts)
    assert reading.logits is not None
    logits = reading.logits[:, spot]
    match takes:
        case "target" | "continuation":
            target = torch.tensor(
                [
                    atom.texts[item if atom.by_item else None][prompt][0]
                    for prompt, item in zip(reading.prompts, reading.items, strict=True)
                ],
                device=logits.device,
            )
            if takes == "target":
                return function(logits, reading.columns(target))
            one = torch.ones_like(target, dtype=torch.bool)
            return function(logits[:, None], target[:, None], one[:, None])
        case "numerals":
            ids, numbers = zip(*atom.numerals, strict=True)
            device = logits.device
            columns = reading.columns(torch.tensor(ids, device=device))
            return function(logits, columns, torch.tensor(numbers, device=device))
        case "reference":
            return function(logits, reading.references[number])
        case "nothing":
            return function(logits)
        case "rows":
            return _of_python(atom, logits, reading.prompts)


def _of_python(atom: Atom, logits: Tensor, prompts: Ints) -> Tensor:
    """[row]: what the user's function makes of them. E0223 as PythonFailure."""
    function = atom.python
    assert function is not None
    # A copy, so that a function that writes into it changes nothing that others read.
    own = logits.detach().to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    rows = [dict(atom.rows[prompt]) for prompt in prompts]
    with torch.no_grad():
        given = function.call(own, rows)
    hint = "it takes `logits`, [n, vocab], and `rows`, n of them, and gives n numbers"
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise function.failure(f"it gave {_kind(given)}, not numbers", hint) from None
    if found.shape != (len(prompts),):
        shape = list(found.shape)
        raise function.failure(f"it gave the shape {shape}, not [{len(prompts)}]", hint)
    if found.is_complex():
        raise function.failure("it gave complex numbers", hint)
    found = found.detach().double().cpu()
    if found.isnan().any():
        row = atom.rows[prompts[int(found.isnan().nonzero()[0])]]
        told = ", ".join(f"{name} = {value!r}" for name, value in row.items() if "." not in name)
        raise function.failure(f"it gave NaN, in the row with {_short(told)}", hint)
    return found


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a `{type(value).__name__}`"


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _continued(atom: Atom, logits: Tensor, prompts: Ints) -> Tensor:
    """A text of several tokens: [row, token, vocab], ragged over rows."""
    texts = [continuation_ids(atom, int(p)) for p in prompts]
    width = logits.shape[1]
    ids = torch.tensor([t + (0,) * (width - len(t)) for t in texts], device=logits.device)
    lengths = torch.tensor([len(t) for t in texts], device=logits.device)
    mask = torch.arange(width, device=logits.device)[None, :] < lengths[:, None]
    return atom.form.function(logits, ids, mask)
