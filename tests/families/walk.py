"""Compare every site that the package offers on an architecture with the reference.

The package gets ragged prompts in one padded batch (`plain`), or rows that compute only what
changes (`packed`); the reference gets each prompt alone, and reads its source values itself.
"""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from mechdsl.diagnostics.models import NotRestartable
from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite, gather_vectors
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel, call_with_batch
from mechdsl.forward.packed.activation_cache import ActivationCache, record_activations
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.loading.loader import adopt_model
from mechdsl.loading.verify.checks import PACKED_IMAGE_IDENTITY
from mechdsl.models.shape import PaddingSide
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES

from ..reference import hooks
from .build import VOCABULARY, model
from .parts import Architecture, Refused
from .rows_vlm import PICTURES

DIFFERENCE = 1e-4
"""Tolerance of outputs and reads, relative to the largest output or to 1."""
EFFECT_ERROR = 1e-3
"""Tolerance of the effect of a write, relative to the effect."""
FLAT = 1e-2
"""Smaller effects count as this size, so that relative errors stay finite."""
SMALLEST = 1e-3
"""Minimum effect of writes at a site; smaller ones can't be distinguished from lost writes."""
NOISE = 1e-2
"""Maximum difference in float32, even where float64 shows that it is rounding."""
PROMPTS = 3
OWN = ("families/walk.py", "families/hooks.py")

KINDS = (
    "causal language models",
    "encoders",
    "encoder-decoders",
    "vision encoders",
    "vision-language models",
)


def kind(row: Architecture) -> str:
    """The kind of an architecture, one of `KINDS`."""
    match row.takes:
        case "text":
            return KINDS[0 if row.build == "AutoModelForCausalLM" else 1]
        case "two texts" | "audio":
            return KINDS[2]
        case "image":
            return KINDS[3]
        case "image and text":
            return KINDS[4]


@dataclass(frozen=True)
class Spot:
    """A site of one layer (0 for sites without a layer) of one stack."""

    stack: str
    site: str
    layer: int

    @property
    def read(self) -> SiteRead:
        layer = None if self.site in hooks.WITHOUT_LAYER else self.layer
        return SiteRead(self.site, layer, self.stack)

    def __str__(self) -> str:
        layer = "" if self.site in hooks.WITHOUT_LAYER else f" {self.layer}"
        return f"{self.stack} {self.site}{layer}".strip()


@dataclass
class Walked:
    """The result of comparing one architecture."""

    name: str
    kind: str
    refused: str = ""
    """Why the package rejects the model; all fields below are then empty."""
    checks: int = 0
    """Number of self-checks passed on load."""
    whole: str = ""
    """Why its rows are full passes; empty if packed passes apply."""
    opened: bool = False
    """Whether sites inside attention and edges are available."""
    missing: list[Spot] = field(default_factory=list[Spot])
    """Sites of the row that the package doesn't offer."""
    extra: list[Spot] = field(default_factory=list[Spot])
    """Sites that the package offers but the row lacks, so that they aren't compared."""
    spots: int = 0
    """Number of compared sites, in all layers and stacks."""
    sides: tuple[str, ...] = ()
    """Tested padding sides."""
    precision: str = "float32"
    """`float64` where float32 is too coarse for the tolerances."""
    difference: float = 0.0
    where: str = ""
    effect_error: float = 0.0
    effect_where: str = ""
    smallest: float = float("inf")
    smallest_where: str = ""
    single: float = 0.0
    """The largest difference in float32."""
    problems: list[str] = field(default_factory=list[str])
    """Raised errors."""
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether nothing differs by more than rounding."""
        return self.difference <= DIFFERENCE and self.effect_error <= EFFECT_ERROR

    def wrong(self) -> list[str]:
        """Descriptions of all defects, except missing and extra sites."""
        found = self.problems[:5]
        if len(self.problems) > len(found):
            found.append(f"{len(self.problems) - len(found)} more")
        if not self.refused:
            if not self.difference <= DIFFERENCE:
                found.append(f"{self.where} is off by {self.difference:.1e} ({self.precision})")
            if not self.effect_error <= EFFECT_ERROR:
                error = f"{self.effect_error:.1e} ({self.precision})"
                found.append(f"the effect of {self.effect_where} is off by {error}")
            if not self.single <= NOISE:
                found.append(f"in float32 it is off by {self.single:.1e}")
            if not self.smallest >= SMALLEST:
                found.append(f"{self.smallest_where} changes the output by {self.smallest:.1e}")
            if not self.spots:
                found.append("nothing was compared")
        return found

    def compare(self, where: str, error: float) -> None:
        if not error <= self.difference:
            self.difference, self.where = error, where

    def compare_effect(self, where: str, error: float) -> None:
        if not error <= self.effect_error:
            self.effect_error, self.effect_where = error, where


def layers_in_words(spots: Iterable[Spot], counts: Mapping[str, int]) -> str:
    """Format sites, with their layers unless all: `k, v, encoder q (layer 1)`."""
    found: dict[tuple[str, str], list[int]] = {}
    for spot in spots:
        found.setdefault((spot.stack, spot.site), []).append(spot.layer)
    words: list[str] = []
    for (stack, site), layers in found.items():
        some = site not in hooks.WITHOUT_LAYER and len(layers) < counts.get(stack, 0)
        where = f" ({', '.join(map(str, layers))})" if some else ""
        words.append(f"{stack} {site}{where}".strip())
    return ", ".join(words)


def walk(
    row: Architecture | Refused,
    change: Callable[[LoadedModel], LoadedModel] | None = None,
    *,
    finer: bool = True,
) -> Walked:
    """Compare an architecture with the reference, in float64 where float32 differs by rounding.

    change: a modification of the loaded model that the comparison must detect. finer: False
    leaves it at float32.
    """
    start = time.perf_counter()
    if isinstance(row, Refused):
        return Walked(row.name, "", refused=row.reason)
    found = _Walk(row, torch.float32, change).run()
    if finer and not (found.refused or found.problems or found.agrees):
        double = _Walk(row, torch.float64, change).run()
        if double.refused:
            found.problems.append(f"in float64: {double.refused}")
        else:
            found = replace(double, single=found.difference)
    found.seconds = time.perf_counter() - start
    return found


def restarts_images(model: LoadedModel) -> bool:
    """Whether packed rows with an image gave the logits of full passes on load."""
    return any(one.identity == PACKED_IMAGE_IDENTITY and one.passed for one in model.checks)


def tokenizer() -> Tokenizer:
    """A tokenizer with a word for every token; nothing here is tokenized."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a module; `Module.to` would make complex buffers (Llama 4's rotary) real."""

    def change(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return module._apply(change)  # pyright: ignore[reportPrivateUsage]


# --- the reference's side ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A patch of one prompt: read positions, written positions and units, of equal length."""

    read: tuple[int, ...]
    written: tuple[int, ...]
    unit: tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """The reference's results of writes at one spot."""

    cases: list[Case]
    wanted: list[Tensor]
    """Outputs of each patched prompt, then of each ablated prompt."""


class _ByHand:
    """The bare model with the reference's hooks; `texts` omits the images of prompts."""

    def __init__(self, row: Architecture, dtype: torch.dtype, *, texts: bool = False) -> None:
        self.row = row
        self.texts = texts
        self.module = _module(row, dtype)
        self.bases = _prompts(row, 0, dtype, texts=texts)
        # Their lengths differ from those of the patched prompts.
        sources = _prompts(row, 50, dtype, texts=texts)
        self.sources = [*sources[1:], sources[0]]
        self.plain = [_rows(self._run(prompt, Spot("", "", 0))[0]) for prompt in self.bases]
        with torch.no_grad():
            self.has_logits = "logits" in self.module(**self.bases[0])
        self.scale = max(1.0, *(float(one.abs().max()) for one in self.plain))
        self._seen: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
        self._based: dict[tuple[str, int], list[dict[str, Tensor]]] = {}

    def _run(self, prompt: dict[str, Tensor], spot: Spot) -> tuple[Tensor, dict[str, Tensor]]:
        return hooks.run(self.row, self.module, prompt, spot.layer, stack=spot.stack)

    def seen(self, spot: Spot) -> list[Tensor]:
        """[T, units, width] of each source."""
        return self._all(self._seen, self.sources, spot)

    def based(self, spot: Spot) -> list[Tensor]:
        """[T, units, width] of each base prompt."""
        return self._all(self._based, self.bases, spot)

    def _all(
        self,
        known: dict[tuple[str, int], list[dict[str, Tensor]]],
        prompts: list[dict[str, Tensor]],
        spot: Spot,
    ) -> list[Tensor]:
        key = spot.stack, spot.layer
        if key not in known:
            known[key] = [self._run(prompt, spot)[1] for prompt in prompts]
        return [one[spot.site] for one in known[key]]

    def count(self, stack: str) -> int:
        """Number of tokens of a stack with inputs of equal size; 0 if unknown."""
        for layer in range(self.row.others[stack].count):
            for site in hooks.sites(self.row.others[stack], layer, main=False):
                return len(self.seen(Spot(stack, site, layer))[0])
        return 0

    def expected(self, spots: Iterable[Spot]) -> dict[Spot, Expected]:
        """Results of writes at each spot; one pass has all writes of a layer."""
        layers: dict[tuple[str, int], list[Spot]] = {}
        for spot in spots:
            layers.setdefault((spot.stack, spot.layer), []).append(spot)
        found: dict[Spot, Expected] = {}
        for (stack, layer), some in layers.items():
            cases = {spot: self._cases(spot) for spot in some}
            patched: dict[Spot, list[Tensor]] = {spot: [] for spot in some}
            ablated: dict[Spot, list[Tensor]] = {spot: [] for spot in some}
            for number, prompt in enumerate(self.bases):
                each: list[hooks.Writes] = []
                for spot in some:
                    case, source = cases[spot][number], self.seen(spot)[number]
                    values = [source[p, u] for p, u in zip(case.read, case.unit, strict=True)]
                    for vectors in (values, [torch.zeros_like(value) for value in values]):
                        columns = zip(case.written, case.unit, vectors, strict=True)
                        each.append((spot.site, [hooks.Change(p, u, v) for p, u, v in columns]))
                runs = hooks.side_by_side(self.row, self.module, prompt, layer, each, stack)
                outputs = iter(_rows(output) for output, _ in runs)
                for spot in some:
                    patched[spot].append(next(outputs))
                    ablated[spot].append(next(outputs))
            found |= {spot: Expected(cases[spot], patched[spot] + ablated[spot]) for spot in some}
        return found

    def _cases(self, spot: Spot) -> list[Case]:
        """Of each prompt."""
        draw = random.Random(f"{spot}")
        both = zip(self.seen(spot), self.based(spot), strict=True)
        return [self._case(draw, spot.site, source, base) for source, base in both]

    def _case(self, draw: random.Random, site: str, source: Tensor, base: Tensor) -> Case:
        """Two positions and some units at each. The output is read at the second position: the last
        token, or the first one of an image, which may be the class token."""
        count = source.shape[1]
        few = count if site == "expert_out" else 1 if count == 1 else 2 if count < 8 else 8
        units = draw.sample(range(count), few)

        def two(tokens: int) -> tuple[int, ...]:
            end = 0 if self.row.takes == "image" else tokens - 1
            others = [p for p in range(tokens) if p != end]
            return (draw.choice(others), end) if others else (end,)

        written = two(len(base))
        read = two(len(source))[-len(written) :]
        return Case(
            tuple(p for p in read for _ in units),
            tuple(p for p in written for _ in units),
            tuple(units) * len(written),
        )


def _module(row: Architecture, dtype: torch.dtype) -> Any:
    made: Any = cast(model(row), dtype)
    if dtype == torch.float64:  # the other expert implementations have no float64 kernels
        made.set_experts_implementation("eager")
    return made


def _prompts(
    row: Architecture, seed: int, dtype: torch.dtype, *, texts: bool
) -> list[dict[str, Tensor]]:
    made = hooks.prompts(replace(row, takes="text") if texts else row, PROMPTS, seed)
    if texts and PICTURES[row.name].prefix:  # its texts are causal; by default, only padded ones
        made = [{**one, "token_type_ids": torch.ones_like(one["input_ids"])} for one in made]
    return [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in one.items()} for one in made
    ]


def _rows(output: Tensor) -> Tensor:
    """[n, width]: one row for the output of a full image."""
    return output.reshape(-1, output.shape[-1])


# --- the package's side -----------------------------------------------------------------------


class _Packaged:
    """The package's model with the same prompts, padded on one side."""

    def __init__(self, model: LoadedModel, by_hand: _ByHand, side: PaddingSide) -> None:
        self.model = model
        self.by_hand = by_hand
        self.side: PaddingSide = side
        self.base = self._batch(by_hand.bases)
        self.source = self._batch(by_hand.sources)
        self.reads: dict[SiteRead, Tensor] = {}

    def _batch(self, prompts: list[dict[str, Tensor]]) -> Batch:
        row = self.by_hand.row
        frames: dict[str, Batch] = {}
        extra: dict[str, list[Tensor]] = {}
        decodes = "decoder_input_ids" in prompts[0]
        text = "decoder_input_ids" if decodes else "input_ids"
        if self.by_hand.texts:  # the package adds the other inputs
            return self._of(prompts, text, self.side)
        for prompt in prompts:
            length = prompt[text].shape[1] if text in prompt else 0
            for name, value in prompt.items():
                if name in ("input_ids", text):
                    continue
                if value.shape == (1, length):  # one value a token
                    value = self._padded(value, max(p[text].shape[1] for p in prompts))
                extra.setdefault(name, []).append(value)
        if decodes and "input_ids" in prompts[0]:
            frames["encoder"] = self._of(prompts, "input_ids", "right")
        for stack in row.others:
            if stack != "cross" and stack not in frames:
                frames[stack] = Batch.grid(len(prompts), self.by_hand.count(stack))
        given = {name: torch.cat(values) for name, values in extra.items()}
        if text not in prompts[0]:
            spot = Spot("", "resid_pre", 0)
            batch = Batch.grid(len(prompts), len(self.by_hand.based(spot)[0]))
        else:
            batch = self._of(prompts, text, self.side)
        return batch.with_inputs(given, **frames)

    def _of(self, prompts: list[dict[str, Tensor]], name: str, side: PaddingSide) -> Batch:
        return Batch.of([p[name][0].tolist() for p in prompts], self.model.pad_id, side)

    def _padded(self, value: Tensor, length: int) -> Tensor:
        fill = value.new_zeros(1, length - value.shape[1])
        return torch.cat([fill, value] if self.side == "left" else [value, fill], dim=1)

    def outputs(self, logits: Tensor, lanes: Sequence[int]) -> list[Tensor]:
        """[n, width] of each row of a full pass."""
        made: list[Tensor] = []
        for one, lane in zip(logits, lanes, strict=True):
            if one.dim() == 2:
                start, length = int(self.base.starts[lane]), int(self.base.lengths[lane])
                one = one[start : start + length]
            made.append(_rows(one))
        return made

    def bare(self) -> list[Tensor]:
        with torch.inference_mode():
            return self.outputs(call_with_batch(self.model, self.base), range(PROMPTS))

    def read(self, spots: Sequence[Spot]) -> None:
        self.reads |= run_full(self.model, self.source, reads=[s.read for s in spots]).reads

    def of_source(self, spot: Spot, prompt: int) -> Tensor:
        """[T, units, width]"""
        tokens = self.source.of_site(spot.site, spot.stack)
        read = self.reads[spot.read][prompt]
        start, length = int(tokens.starts[prompt]), int(tokens.lengths[prompt])
        return read[start : start + length] if read.shape[0] >= start + length else read

    def write(self, spot: Spot, expected: Expected, first: int) -> SiteWrite:
        """The case's writes: patches in the rows from `first` on, then zeros in later rows."""

        def column(name: str) -> Tensor:
            return torch.tensor([p for case in expected.cases for p in getattr(case, name)])

        rows = torch.tensor([i for i, case in enumerate(expected.cases) for _ in case.unit])
        tokens = self.source.of_site(spot.site, spot.stack)
        values = gather_vectors(self.reads[spot.read], tokens, rows, column("read"), column("unit"))
        return SiteWrite(
            spot.site,
            spot.read.layer,
            first + torch.cat([rows, rows + PROMPTS]),
            column("written").repeat(2),
            column("unit").repeat(2),
            torch.cat([values, torch.zeros_like(values)]),
            stack=spot.stack,
        )

    def plain(self, wanted: Mapping[Spot, Expected]) -> dict[Spot, list[Tensor]]:
        """Outputs of full passes, for every spot: patched prompts, then ablated ones."""
        lanes, writes = self._all(wanted)
        batch = self.base.take(torch.tensor(lanes))
        logits = run_full(self.model, batch, writes=writes).logits
        assert logits is not None
        return _dealt(wanted, self.outputs(logits, lanes))

    def _all(self, wanted: Mapping[Spot, Expected]) -> tuple[list[int], list[SiteWrite]]:
        each = [*range(PROMPTS)] * 2
        writes = [
            self.write(spot, expected, number * len(each))
            for number, (spot, expected) in enumerate(wanted.items())
        ]
        return each * len(wanted), writes

    @cached_property
    def kept(self) -> ActivationCache:
        with record_activations(self.model, self.base, 0) as kept:
            run_full(self.model, self.base)
        return kept

    def packed(self, wanted: Mapping[Spot, Expected], *, last: bool) -> dict[Spot, list[Tensor]]:
        """Outputs of packed rows; `last` requests only one token's output."""
        lanes, writes = self._all(wanted)
        lengths = [int(self.base.lengths[lane]) for lane in lanes]
        if self.model.shape.takes != "image":
            read = [range(n - 1 if last else 0, n) for n in lengths]
        elif self.model.calling.reads == "every token":
            read = [range(1 if last else n) for n in lengths]
        else:  # these models have one output per row
            read = [range(1)] * len(lanes)
        rows = np.repeat(np.arange(len(lanes)), [len(one) for one in read])
        positions = np.array([p for one in read for p in one])
        logits = run_packed(
            self.model, self.kept, np.array(lanes), writes=writes, final=(rows, positions)
        ).logits
        return _dealt(wanted, list(logits.split([len(one) for one in read])))


def _dealt(wanted: Iterable[Spot], rows: list[Tensor]) -> dict[Spot, list[Tensor]]:
    each = 2 * PROMPTS
    return {spot: rows[i * each : (i + 1) * each] for i, spot in enumerate(wanted)}


# --- both -------------------------------------------------------------------------------------


class _Walk:
    def __init__(
        self,
        row: Architecture,
        dtype: torch.dtype,
        change: Callable[[LoadedModel], LoadedModel] | None,
    ) -> None:
        self.row = row
        self.dtype = dtype
        self.change = change
        self.found = Walked(row.name, kind(row), precision=str(dtype).removeprefix("torch."))

    def run(self) -> Walked:
        try:
            self._run()
        except Exception as error:
            self._problem("", error)
        self.found.single = self.found.difference
        return self.found

    def _problem(self, where: str, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/mechdsl/" in f.filename or f.filename.endswith(OWN)]
        named = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in (frames[-1], *ours[:-4:-1])]
        at = " < ".join(dict.fromkeys(named))
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        self.found.problems.append(f"{where}: {text} ({at})".removeprefix(": "))

    def _run(self) -> None:
        row = self.row
        self.by_hand = _ByHand(row, self.dtype)
        loaded, diagnostics = adopt_model("m", _module(row, self.dtype), tokenizer())
        if loaded is None:
            self.found.refused = "; ".join(f"{d.message}: {d.label_text}" for d in diagnostics)
            return
        self.found.checks = sum(check.passed for check in loaded.checks)
        self.found.opened = set(ATTENTION_INTERNAL_SITES) <= loaded.shape.sites
        self.found.whole = "; ".join(d.reason for d in diagnostics if isinstance(d, NotRestartable))
        seeing = row.takes == "image and text"
        packs = restarts_images(loaded) if seeing else loaded.restartable
        if seeing and loaded.restartable and not packs:
            self.found.whole = "for prompts with an image"
        if self.change is not None:
            loaded = self.change(loaded)
        spots = self._spots(loaded)
        self.found.spots = len(spots)
        self._sides(loaded, spots, packs=packs)
        if seeing:  # the language model on text alone
            self.by_hand = _ByHand(row, self.dtype, texts=True)
            self._sides(loaded, [s for s in spots if not s.stack], packs=loaded.restartable)

    def _sides(self, loaded: LoadedModel, spots: list[Spot], *, packs: bool) -> None:
        self.expected: dict[Spot, Expected] = {}
        sides: list[PaddingSide] = [loaded.calling.side]
        if loaded.calling.side == "left" and self.row.takes in ("text", "image and text"):
            sides.append("right")
        for side in sides:
            self._side(loaded, side, spots, packs=packs, optional=side != sides[0])

    def _spots(self, loaded: LoadedModel) -> list[Spot]:
        """The spots that can be compared; records the others."""
        stacks = {"": self.row.main, **self.row.others}
        both: list[Spot] = []
        for name in (*stacks, *(other for other in loaded.others if other not in stacks)):
            known = name == "" or name in loaded.others
            shape = loaded.stack(name).shape if known else None
            count = stacks[name].count if name in stacks else shape.n_layers if shape else 0
            if shape is not None and shape.n_layers != count:
                text = f"{name or 'main'} stack has {shape.n_layers} blocks instead of {count}"
                self.found.problems.append(text)
                continue
            for layer in range(count):
                rowed = hooks.sites(stacks[name], layer, main=not name) if name in stacks else []
                # Sites inside attention have a separate reference, in tests/rules.
                known = shape.sites - set(ATTENTION_INTERNAL_SITES) if shape else frozenset[str]()
                offered = {s for s in known if shape is not None and shape.has(s, layer)}
                for site in dict.fromkeys([*rowed, *sorted(offered)]):
                    if layer and site in hooks.WITHOUT_LAYER:
                        continue
                    spot = Spot(name, site, layer)
                    if site == "logits" and site not in offered and not self.by_hand.has_logits:
                        continue  # the reference calls every output `logits`
                    if site not in offered:
                        self.found.missing.append(spot)
                    elif site not in rowed:
                        self.found.extra.append(spot)
                    else:
                        both.append(spot)
        return both

    def _side(
        self,
        loaded: LoadedModel,
        side: PaddingSide,
        spots: list[Spot],
        *,
        packs: bool,
        optional: bool,
    ) -> None:
        package = _Packaged(loaded, self.by_hand, side)
        try:
            error = max(map(self._off, package.bare(), self.by_hand.plain))
        except RuntimeError:
            if not optional:
                raise
            return
        if optional and not error <= NOISE:
            return
        way = f"{side}, text alone" if self.by_hand.texts else side
        self.found.sides += (way,)
        self.found.compare(f"the output without writes ({way})", error)
        spots = self._read(package, spots, way)
        self.expected |= self.by_hand.expected(s for s in spots if s not in self.expected)
        wanted = {spot: self.expected[spot] for spot in spots}
        for site in dict.fromkeys((spot.stack, spot.site) for spot in spots):
            some = {s: e for s, e in wanted.items() if (s.stack, s.site) == site}
            self._attempt(f"{site[0]} {site[1]} ({way})".strip(), lambda s=some: package.plain(s))
        if packs:
            main = {spot: expected for spot, expected in wanted.items() if not spot.stack}
            self._packed(package, main, f"{way}, packed")

    def _packed(self, package: _Packaged, wanted: dict[Spot, Expected], way: str) -> None:
        """Run all rows in one pass; if that raises, run site by site to find the cause."""
        for last in (False, True):
            named = f"({way}, last token)" if last else f"({way})"
            before = len(self.found.problems)
            self._attempt(f"all {named}", lambda n=last: package.packed(wanted, last=n))
            if len(self.found.problems) == before:
                continue
            for spot, expected in wanted.items():
                one = {spot: expected}
                self._attempt(f"{spot} {named}", lambda w=one, n=last: package.packed(w, last=n))

    def _read(self, package: _Packaged, spots: list[Spot], way: str) -> list[Spot]:
        """Compare reads with the reference; return the readable spots."""
        try:
            package.read(spots)
        except Exception:
            for spot in spots:
                try:
                    package.read([spot])
                except Exception as error:
                    self._problem(f"reading {spot} ({way})", error)
        read = [spot for spot in spots if spot.read in package.reads]
        for spot in read:
            for prompt, want in enumerate(self.by_hand.seen(spot)):
                got = package.of_source(spot, prompt)
                size = max(1.0, float(want.abs().max()))
                self.found.compare(f"{spot} read ({way})", _furthest(got, want) / size)
        return read

    def _attempt(self, way: str, run: Callable[[], dict[Spot, list[Tensor]]]) -> None:
        try:
            rows = run()
        except Exception as error:
            self._problem(way, error)
            return
        for spot, found in rows.items():
            self._judge(spot, found, way)

    def _judge(self, spot: Spot, rows: list[Tensor], way: str) -> None:
        expected = self.expected[spot]
        detail = way[way.index("(") :]
        sizes: dict[str, float] = {"patch": 0.0, "ablate": 0.0}
        for i, (got, want) in enumerate(zip(rows, expected.wanted, strict=True)):
            verb = "patch" if i < PROMPTS else "ablate"
            name = f"{verb} {spot} {detail}"
            plain = self.by_hand.plain[i % PROMPTS]
            at = 0 if self.row.takes == "image" else len(want) - 1
            if len(got) < len(want):  # of one token
                got_at, error = 0, self._off(got, want[at : at + 1])
            else:
                got_at, error = at, self._off(got, want)
            self.found.compare(name, error)
            if error == float("inf"):
                continue
            effect = _difference(want[at]) - _difference(plain[at])
            found = _difference(got[got_at]) - _difference(plain[at])
            self.found.compare_effect(name, abs(found - effect) / max(abs(effect), FLAT))
            change = want - plain
            if not spot.stack and self.row.takes != "image":
                change = change[at]
            sizes[verb] = max(sizes[verb], float(change.abs().max()) / self.by_hand.scale)
        for verb, size in sizes.items():
            if size < self.found.smallest:
                self.found.smallest = size
                self.found.smallest_where = f"{verb} {spot} {detail}"

    def _off(self, got: Tensor, want: Tensor) -> float:
        return _furthest(got, want) / self.by_hand.scale


def _furthest(got: Tensor, want: Tensor) -> float:
    """The largest difference; infinite where shapes differ or one isn't a number."""
    if got.shape != want.shape:
        return float("inf")
    return float((got - want).abs().nan_to_num(nan=float("inf")).max())


def _difference(output: Tensor) -> float:
    """The difference of two fixed features of [width]."""
    width = len(output)
    first, second = 7 % width, 41 % width
    assert first != second
    return float(output[first] - output[second])
