"""Metrics read off a run: from logits at the measured places to one number per row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.reply import Reply
from mechdsl.execute.found import Failed, Found, Gap
from mechdsl.execute.observed import Observed
from mechdsl.execute.python_metric import python_metric
from mechdsl.execute.reply_values import SearchFailed, reply_values
from mechdsl.execute.unpatched_batch import Spot, TextBehind, continuation_ids, spots_of
from mechdsl.hooks.batch import on_device, to_device, together_on_host
from mechdsl.program.python_files import PythonFailure, PythonNotLoaded
from mechdsl.resolve.measures import divisors, evaluate
from mechdsl.resolve.resolved import Atom, Env, ResolvedMeasure


@dataclass(frozen=True, eq=False)
class Reading:
    """What a run gives a readout. Rows are lanes of an unpatched run or patched rows."""

    run: str
    """The run that rows are lanes of, or start from."""
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
    observed: Observed | None = None
    """What an `observe` line sees; None on runs without rows."""
    tokens: Tensor | None = None
    """[K] ascending: the tokens whose logits there are; None for the whole vocabulary."""
    largest: Tensor | None = None
    """[row, spot] the size of the largest logit of the whole vocabulary, where `tokens` are fewer;
    None where nothing is asked of rounding."""
    has_loss: Bools | None = None
    """[row] whether the prompt has a loss; None where none is read."""
    replies: Sequence[Reply] = ()
    """[row] what it wrote, where that is measured."""
    standing: Ints | None = None
    """[row] the token that stands where its loss is read, in a reply."""

    def columns(self, ids: Tensor) -> Tensor:
        """Where the logits of these tokens lie."""
        return ids if self.tokens is None else torch.searchsorted(self.tokens, ids)


@dataclass(frozen=True, eq=False)
class Readout:
    """The measures of one experiment, with their atoms numbered."""

    measures: tuple[ResolvedMeasure, ...]
    atoms: tuple[tuple[int, Atom], ...]
    """(number of its spot, atom)."""
    spots: tuple[Spot, ...]
    looking: tuple[bool, ...]
    """Per atom, whether it reads what is observed, and not the model's output."""
    behind: tuple[bool, ...]
    """Per atom, whether it is read behind the prompt, in a reply: see `BehindPrompts`."""

    @staticmethod
    def of(measures: Sequence[ResolvedMeasure]) -> Readout:
        spots = spots_of(measures)
        atoms = [(spots.index(m.at), atom) for m in measures for atom in m.atoms]
        looking = [
            m.observed or atom.form.takes == "observation" for m in measures for atom in m.atoms
        ]
        behind = tuple(m.in_reply is not None for m in measures for _ in m.atoms)
        return Readout(tuple(measures), tuple(atoms), spots, tuple(looking), behind)

    def _of(self, looking: bool) -> tuple[Atom, ...]:
        """The atoms that read what is observed, or the others; none that is read in replies."""
        every = zip(self.atoms, self.looking, self.behind, strict=True)
        return tuple(atom for (_, atom), own, behind in every if own == looking and not behind)

    @property
    def continuations(self) -> tuple[int, ...]:
        """Numbers of the atoms that need a pass of their own, with their text behind the prompt."""
        every = enumerate(zip(self.atoms, self.looking, self.behind, strict=True))
        return tuple(
            n
            for n, ((_, atom), looking, behind) in every
            if not looking and not behind and any(atom.behind)
        )

    @property
    def texts_behind(self) -> tuple[TextBehind, ...]:
        """Their texts."""
        return tuple(TextBehind(number, self.atoms[number][1]) for number in self.continuations)

    @property
    def passes(self) -> tuple[TextBehind | None, ...]:
        """The text behind the prompts in each pass over them; None behind the prompts alone."""
        return (None, *self.texts_behind) if self.needs_plain else self.texts_behind

    @property
    def needs_plain(self) -> bool:
        """Whether some atom is read off the prompts as they are."""
        return len(self.continuations) < len(self._of(looking=False)) - self._of_replies

    @property
    def _of_replies(self) -> int:
        """How many atoms read what a row writes."""
        return sum(atom.form.takes == "reply" for atom in self._of(looking=False))

    @property
    def reads_replies(self) -> bool:
        """Whether some atom reads what a row writes."""
        return self._of_replies > 0

    @property
    def only_replies(self) -> bool:
        """Whether nothing but what a row writes is read of it, or there."""
        behind = sum(self.behind)
        return self._of_replies + behind == len(self.atoms) and len(self.atoms) > 0

    @property
    def in_replies(self) -> tuple[int, ...]:
        """Numbers of the measures that are read in replies."""
        return tuple(n for n, each in enumerate(self.measures) if each.in_reply is not None)

    @property
    def narrow(self) -> bool:
        """Whether no atom needs the logits of the whole vocabulary: of another run, one that is
        read off what is observed may need them too."""
        compared = any(atom.form.takes == "reference" for atom in self._of(looking=True))
        own = (atom.form for atom in self._of(looking=False))
        return not compared and all(form.narrow or form.takes == "reply" for form in own)

    def observed_tokens(self, prompts: Ints) -> list[int] | None:
        """The tokens whose logits measures read off what is observed; None for all."""
        if not all(atom.form.narrow for atom in self._of(looking=True)):
            return None
        return sorted(self.tokens(prompts, looking=True))

    def tokens(self, prompts: Ints, *, looking: bool = False) -> set[int]:
        """The tokens whose logits a narrow readout reads on these prompts."""
        found: set[int] = set()
        for atom in self._of(looking):
            for sets in atom.sets.values():
                of_row = {sets.of_row[prompt] for prompt in prompts.tolist()}
                found.update(token for number in of_row for token in sets.tokens[number])
            for texts in atom.texts.values():
                found.update(texts[prompt][0] for prompt in prompts.tolist())
        return found

    @property
    def loss(self) -> Atom | None:
        return next((a for a in self._of(looking=False) if a.form.takes == "prompt"), None)

    def read(self, reading: Reading, relative: float = 0.0, *, skip: Collection[int] = ()) -> Found:
        """One value per row for every measure.

        relative: how far rounding may move a logit, relative to the largest one where a metric
        reads; 0 doesn't ask what that does to the values. skip: numbers of measures that aren't
        read.
        """
        broken = self._broken(reading)
        found = [np.full(len(reading.prompts), np.nan) for _ in self.measures]
        rounding = [np.zeros(len(reading.prompts)) for _ in self.measures]
        failed: dict[int, Failed] = {}
        gaps: dict[int, Gap] = {}
        first = 0
        for n, measure in enumerate(self.measures):
            numbers = range(first, first + len(measure.atoms))
            first = numbers.stop
            if n in skip or measure.in_reply is not None:
                continue
            try:
                values = self._values(numbers, reading, ~broken)
            except (PythonFailure, SearchFailed) as failure:
                count = 0 if isinstance(failure, PythonNotLoaded) else len(reading.prompts)
                failed[n] = Failed(failure.diagnostic, failure.row, count)
                continue
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                result = evaluate(measure.expression, values.__getitem__)
                found[n][:] = result
                gap = _lacking(measure, values, found[n], ~broken)
                if relative:
                    rounding[n] = self._moved(measure, numbers, values, reading, relative)
            unknown = np.isnan(found[n])
            if gap is not None:
                gaps[n] = gap
                found[n][gap.rows], unknown[gap.rows] = np.nan, False
            for value in values.values():  # −∞ − −∞ is no number, though each has its meaning
                broken |= np.isinf(value) & unknown
        for values_of_measure in found:
            values_of_measure[broken] = np.nan
        return Found(found, broken, rounding, failed, gaps)

    def tensors(self, reading: Reading) -> list[Tensor]:
        """Per measure, [row] float64, as autograd sees it made: what `read` gives, without a word
        of what can't be used."""
        usable = np.ones(len(reading.prompts), dtype=np.bool_)
        numbers = iter(range(len(self.atoms)))
        found: list[Tensor] = []
        for measure in self.measures:
            values: dict[Any, Tensor] = {}
            for atom in measure.atoms:
                number = next(numbers)
                value = _value(atom, number, self.atoms[number][0], reading, usable)
                values[atom.node] = value.double()
            found.append(evaluate(measure.expression, values.__getitem__))
        return found

    def _values(self, numbers: range, reading: Reading, usable: Bools) -> dict[Any, Floats]:
        """The atoms of a measure, by what is written: [row]. E0223 as PythonFailure."""
        found: list[Tensor] = []
        for number in numbers:
            spot, atom = self.atoms[number]
            if self.looking[number]:
                value = _looked_at(atom, number, reading, usable)
            else:
                value = _value(atom, number, spot, reading, usable)
            found.append(value.detach().double())
        nodes = (self.atoms[number][1].node for number in numbers)
        on_host = (value.numpy() for value in together_on_host(found))
        return dict(zip(nodes, on_host, strict=True))

    def _moved(
        self,
        measure: ResolvedMeasure,
        numbers: range,
        values: Mapping[Any, Floats],
        reading: Reading,
        relative: float,
    ) -> Floats:
        """[row]: how far rounding may move a measure, to first order, all of its atoms in the worst
        direction."""
        result = evaluate(measure.expression, values.__getitem__)
        moved = np.zeros(len(reading.prompts))
        # Nothing is observed of runs without rows; texts change or don't.
        due = [n for n in numbers if not self.looking[n] and self.atoms[n][1].form.takes != "reply"]
        of_outputs = [n for n in due if self.atoms[n][1].form.of_outputs]
        sizes = [_largest(self.atoms[n][1], n, self.atoms[n][0], reading) for n in of_outputs]
        largest = dict(zip(of_outputs, together_on_host(sizes), strict=True))
        for number in due:
            spot, atom = self.atoms[number]
            value = values[atom.node]
            if number in largest:
                own = relative * largest[number].numpy()
                error = _rounding(atom, number, spot, reading, value, own)
            else:
                error = np.full(len(value), relative)
            least, most = _ENDS.get(atom.form.unit, (-np.inf, np.inf))
            ways: list[Floats] = []
            for other in (np.maximum(value - error, least), np.minimum(value + error, most)):
                changed = evaluate(measure.expression, {**values, atom.node: other}.__getitem__)
                ways.append(np.nan_to_num(np.abs(changed - result), nan=0.0, posinf=0.0))
            moved += np.maximum(*ways)
        return moved

    def _broken(self, reading: Reading) -> Bools:
        """[row] whether NaN is among what is read, or an infinity that metrics can't use. −∞ is
        what a model says of a token that it excludes; that of all tokens is none."""
        found = [torch.zeros(len(reading.prompts), dtype=torch.bool)]
        if reading.logits is not None:
            found.append(_senseless(reading.logits, whole=reading.tokens is None).any(-1))
        found += [_senseless(logits, whole=True).any(-1) for logits in reading.continued.values()]
        if reading.loss is not None and reading.has_loss is not None:
            due = on_device(reading.has_loss, reading.loss.device)
            found.append(reading.loss.isnan() & due)
        if reading.replies:
            found.append(torch.tensor([reply.ended == "broken" for reply in reading.replies]))
        seen = reading.observed
        if seen is not None and seen.numbers is not None:
            found.append(~seen.numbers.isfinite())
        if seen is not None and seen.logits is not None:
            found.append(_senseless(seen.logits, whole=seen.tokens is None))
        for number, (spot, atom) in enumerate(self.atoms):
            takes = atom.form.takes
            if self.behind[number]:
                continue
            if takes == "activations":
                for each in (reading.activations[number], reading.references[number]):
                    found.append(~each.isfinite().flatten(1).all(-1))
            elif takes == "reference":
                found.append(_senseless(reading.references[number], whole=True))
            elif self.looking[number] or reading.logits is None:
                continue
            elif takes == "numerals" and atom.form.narrow:
                found.append(_senseless(_own_logits(atom, reading, spot), whole=True))
        return torch.stack(together_on_host(found)).any(0).numpy()


def _logits(atom: Atom, number: int, spot: int, reading: Reading) -> Tensor:
    """[row, ..., vocab]: what an atom of the model's outputs is read off."""
    logits = reading.continued.get(number)
    if logits is not None:
        return logits
    assert reading.logits is not None
    return _chosen_from(atom, reading.logits[:, spot])


def _largest(atom: Atom, number: int, spot: int, reading: Reading) -> Tensor:
    """[row] float64, the size of the largest logit where an atom is read."""
    if reading.largest is not None:
        size = reading.largest[:, spot]
    else:
        logits = _logits(atom, number, spot, reading)
        size = logits.abs().nan_to_num(nan=0.0, posinf=0.0).flatten(1).amax(-1)
    return size.nan_to_num(nan=0.0, posinf=0.0).double()


def _rounding(
    atom: Atom, number: int, spot: int, reading: Reading, value: Floats, moved: Floats
) -> Floats:
    """[row]: how far rounding may move an atom of the model's outputs, whose logits it moves by
    `moved`. An output is a sum over the model's width, rounded as its parts are and not as what is
    left of them: a small logit moves as far as the largest one of all tokens. Metrics in logits and
    nats, and the numbers of a regression, move by as much, shares by that part of themselves; a
    rank moves over the tokens that come as close as that. `correct` and categories change, which
    counts as 1, where the two best tokens do."""
    takes, unit = atom.form.takes, atom.form.unit
    logits = _logits(atom, number, spot, reading)
    if atom.form.narrow and takes == "numerals":
        logits = _own_logits(atom, reading, spot)
    if takes == "label" and unit == "share":  # by the sign of its own logit
        target = to_device(_targets(atom, reading), logits.device)
        own = logits.gather(-1, target[:, None])[:, 0].abs().double().cpu().numpy()
        return (own <= moved).astype(np.float64)
    if atom.form.kind == "category":
        return _two_best_exchanged(logits, 2 * moved)
    if unit in ("rank", "share"):
        if atom.sets:
            ids, mask = sets_of(atom, reading)[:2]
        else:
            ids = _targets(atom, reading)[:, None]
            mask = torch.ones_like(ids, dtype=torch.bool)
        ids, mask = to_device(ids, logits.device), to_device(mask, logits.device)
        return _exchanged(logits, ids, mask, 2 * moved, best=unit == "share")
    return moved * atom.form.logits if unit in _AS_LOGITS else moved * np.abs(value)


_AS_LOGITS = ("logit", "nat", "number")
"""Units of metrics that move as logits do."""


def _exchanged(logits: Tensor, ids: Tensor, mask: Tensor, within: Floats, *, best: bool) -> Floats:
    """[row]: how many tokens may change places with the best of those that are meant, as their
    logits are not further apart than `within`; best: 1 where which of all is the best may change.

    ids: [row, token]. mask: [row, token], true where there is one
    """
    own = logits.gather(-1, ids).masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    apart = logits.double() - own.double()
    apart = apart.scatter(-1, ids, -torch.inf)
    close = on_device(within, logits.device)[:, None]
    if best:
        apart = apart.amax(-1, keepdim=True)
    return (apart.abs() <= close).sum(-1).double().cpu().numpy()


def _two_best_exchanged(logits: Tensor, within: Floats) -> Floats:
    """[row]: 1 where the logits of the two best are not further apart than `within`."""
    if logits.shape[-1] < 2:
        return np.zeros(len(logits))
    best, second = logits.double().topk(2).values.unbind(-1)
    return ((best - second).cpu().numpy() <= within).astype(np.float64)


_ENDS = {"rank": (1.0, np.inf), "share": (0.0, 1.0)}
"""By unit, what a metric can't go beyond, however far rounding moves it."""


def _lacking(
    measure: ResolvedMeasure, values: Mapping[Any, Floats], result: Floats, usable: Bools
) -> Gap | None:
    """The rows in which the measure is no number, though all that it reads can be used."""
    causes: list[tuple[Bools, str]] = []
    for divisor in divisors(measure.expression):
        zero = evaluate(divisor, values.__getitem__) == 0
        causes.append((zero, f"`{divisor.span.written}`, which it divides by, is 0"))
    whole = np.ones_like(usable)
    for atom in measure.atoms:
        value = values[atom.node]
        whole &= np.isfinite(value)
        if atom.form.takes == "activations":
            said = f"a vector of `{atom.node.span.written}` is 0"
            causes.append((np.isnan(value), said))
    causes.append((whole & ~np.isfinite(result), "it is too large for a number"))
    masks = [np.broadcast_to(mask, usable.shape) & usable for mask, _ in causes]
    rows = np.flatnonzero(np.any(masks, axis=0))
    if not len(rows):
        return None
    reason = next(said for mask, (_, said) in zip(masks, causes, strict=True) if mask[rows[0]])
    return Gap(rows, reason)


def _targets(atom: Atom, reading: Reading) -> Tensor:
    """[row]: the token of the atom's text, the first one of several."""
    if atom.own and reading.standing is not None:
        return torch.from_numpy(reading.standing)
    if atom.own:
        own = np.array(atom.own[reading.run], dtype=np.int64)
        return torch.from_numpy(own[reading.prompts])
    return torch.tensor(
        [
            atom.texts[item if atom.by_item else None][prompt][0]
            for prompt, item in zip(reading.prompts, reading.items, strict=True)
        ]
    )


def sets_of(atom: Atom, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """[row, token] of the atom's sets: token ids, where there is one, and, of numerals, the numbers
    that they stand for. Behind the end of a set its first token stands again."""
    by_item = atom.by_item
    pairs = zip(reading.prompts.tolist(), reading.items, strict=True)
    envs = [(item if by_item else None, prompt) for prompt, item in pairs]
    found = [(env, atom.sets[env].of_row[prompt]) for env, prompt in envs]
    places = {place: n for n, place in enumerate(dict.fromkeys(found))}
    tokens = [atom.sets[env].tokens[number] for env, number in places]
    numbers = [atom.sets[env].numbers[number] for env, number in places if atom.sets[env].numbers]
    width = max(map(len, tokens))
    mask = torch.arange(width)[None, :] < torch.tensor([len(each) for each in tokens])[:, None]
    index = torch.tensor([places[place] for place in found])
    return _padded(tokens, width)[index], mask[index], _padded(numbers or tokens, width)[index]


def _padded(sets: Sequence[tuple[int, ...]], width: int) -> Tensor:
    """[set, width]: the first of each again behind its end."""
    return torch.tensor([each + each[:1] * (width - len(each)) for each in sets])


def _own_logits(atom: Atom, reading: Reading, spot: int) -> Tensor:
    """[row, token] the logits of the atom's sets, -inf where a set has fewer."""
    assert reading.logits is not None
    logits = reading.logits[:, spot]
    ids, mask, _ = sets_of(atom, reading)
    own = logits.gather(-1, reading.columns(to_device(ids, logits.device)))
    return own.masked_fill(~to_device(mask, logits.device), -torch.inf)


def _senseless(logits: Tensor, *, whole: bool) -> Tensor:
    """[...] of [..., vocab]: NaN or +∞ among the logits, or, where they are the whole choice that
    there is, nothing but −∞. One reduction, without a second tensor of that size."""
    top = logits.amax(-1)
    return ~top.isfinite() if whole else top.isnan() | top.isposinf()


def _looked_at(atom: Atom, number: int, reading: Reading, usable: Bools) -> Tensor:
    """[row]: the atom's metric of what is observed; NaN where nothing is."""
    seen = reading.observed
    if seen is None:
        return torch.full((len(reading.prompts),), torch.nan)
    if atom.form.takes == "observation":
        assert seen.numbers is not None
        return seen.numbers
    assert seen.logits is not None
    own = replace(reading, logits=seen.logits[:, None], tokens=seen.tokens, continued={})
    return _value(atom, number, 0, own, usable)


def _value(atom: Atom, number: int, spot: int, reading: Reading, usable: Bools) -> Tensor:
    """[row]: the atom's metric. E0223 as PythonFailure."""
    takes, function = atom.form.takes, atom.form.function
    if takes == "prompt":
        assert reading.loss is not None
        return reading.loss
    if takes == "reply":
        found = reply_values(atom, reading.replies, reading.prompts, reading.items)
        return torch.from_numpy(found)
    if takes == "activations":
        return function(reading.activations[number], reading.references[number])
    if number in reading.continued:
        return _continued(atom, reading.continued[number], reading.prompts)
    assert reading.logits is not None
    logits = _chosen_from(atom, reading.logits[:, spot])
    match takes:
        case "target" | "own" | "class" | "label" | "continuation":
            target = to_device(_targets(atom, reading), logits.device)
            if takes != "continuation":
                return function(logits, reading.columns(target))
            one = torch.ones_like(target, dtype=torch.bool)
            return function(logits[:, None], target[:, None], one[:, None])
        case "any" | "numerals":
            ids, mask, numbers = (to_device(part, logits.device) for part in sets_of(atom, reading))
            columns = reading.columns(ids)
            if takes == "any":
                return function(logits, columns, mask)
            return function(logits, columns, mask, numbers)
        case "reference":
            return function(logits, _chosen_from(atom, reading.references[number]))
        case "nothing" | "observation":
            return function(logits)
        case "rows":
            return python_metric(atom, logits, reading.prompts, usable)


def _chosen_from(atom: Atom, logits: Tensor) -> Tensor:
    """[row, class], where texts are scored that are none of the classes too."""
    return logits[..., : atom.classes] if atom.classes else logits


def _continued(atom: Atom, logits: Tensor, prompts: Ints) -> Tensor:
    """A text of several tokens: [row, token, vocab], ragged over rows."""
    texts = [continuation_ids(atom, int(p)) for p in prompts]
    width = logits.shape[1]
    ids = torch.tensor([t + (0,) * (width - len(t)) for t in texts])
    lengths = torch.tensor([len(t) for t in texts])
    mask = torch.arange(width)[None, :] < lengths[:, None]
    device = logits.device
    return atom.form.function(logits, to_device(ids, device), to_device(mask, device))
