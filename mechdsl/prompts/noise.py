"""Noise that a corruption adds to an activation: where, and how much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import UnknownWord, did_you_mean
from mechdsl.diagnostics.e05_data import BadCall
from mechdsl.prompts.block import Block
from mechdsl.prompts.positions import resolve_positions
from mechdsl.prompts.table import Noise, PromptTable
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.vocab.corruptions import NOISES, NoiseKind

MAX_SAMPLES = 10_000


def add_noise(
    table: PromptTable,
    block: Block,
    tokenizer: TextTokenizer,
    before_limit: Callable[[str], PromptTable],
) -> tuple[PromptTable, list[Diagnostic]]:
    """The table with the noise of its corruptions.

    before_limit: gives the table of all rows of a run, over whose tokens one `sd` is taken.
    """
    diagnostics: list[Diagnostic] = []
    runs = dict(table.runs)
    for corruption in block.spec.corruptions:
        changes = [c for c in corruption.changes if isinstance(c, ast.AddNoise)]
        for second in changes[1:]:
            what = "more than one noise in a corruption"
            diagnostics.append(NotSupported(span=second.span, what=what))
        for change in changes[:1]:
            reader = _Reader(change, diagnostics)
            noise = reader.read(block)
            if noise is None:
                continue
            run = corruption.name
            noise = replace(noise, positions=_joined(change.at, table, run, tokenizer, diagnostics))
            if noise.sds is not None and not has_errors(diagnostics):
                tokens = _sd_tokens(reader, before_limit(run), run, tokenizer, diagnostics)
                noise = replace(noise, sd_tokens=tokens)
            runs[run] = replace(runs[run], noise=noise)
    return replace(table, runs=runs), diagnostics


class _Reader:
    """Reads `gaussian(std: 3 sd of subject, samples: 10)`."""

    def __init__(self, change: ast.AddNoise, diagnostics: list[Diagnostic]) -> None:
        self.change = change
        self.diagnostics = diagnostics
        self.sd_of: ast.Quantity | None = None
        """`3 sd of subject`, where it names a span."""

    def read(self, block: Block) -> Noise | None:
        call = self.change.noise
        kind = NOISES.get(call.name)
        if kind is None:
            known = ", ".join(f"`{name}`" for name in NOISES)
            hint = did_you_mean(NOISES.suggest(call.name), f"there is {known}")
            self.diagnostics.append(
                UnknownWord(span=call.span, kind="noise", word=call.name, hint=hint)
            )
            return None
        site = self._site()
        std: float | None = None
        sds: float | None = None
        samples = 1
        for argument in call.arguments:
            value = argument.value
            match argument.name:
                case "std":
                    if isinstance(value, ast.Quantity) and value.unit == "sd":
                        sds = value.value
                        self.sd_of = value if value.of is not None else None
                    else:
                        number = self._number(value, block)
                        std = number if number is not None and number > 0 else None
                case "samples":
                    number = self._number(value, block)
                    if number is None or number != int(number) or not 1 <= number <= MAX_SAMPLES:
                        return self._wrong(kind, f"takes 1 to {MAX_SAMPLES:,} samples", argument)
                    samples = int(number)
                case name:
                    return self._wrong(kind, f"has no argument `{name or '…'}`", argument)
        if (std is None and sds is None) or (sds is not None and sds <= 0):
            return self._wrong(kind, "needs a standard deviation above 0", call)
        if site is None:
            return None
        if sds is not None and site != "embed":
            return self._wrong(kind, "knows one sd of `embed` only, others need a number", call)
        return Noise(site, (), std, sds, samples=samples, kind=kind.name)

    def _site(self) -> str | None:
        site = self.change.site
        plain = not site.axes and site.basis is None
        if plain and [name.id for name in site.names] == ["embed"]:
            return "embed"
        what = "noise on another site than `embed`"
        self.diagnostics.append(NotSupported(span=site.span, what=what))
        return None

    def _number(self, node: object, block: Block) -> int | float | None:
        value = node.value if isinstance(node, ast.Number) else None
        if isinstance(node, ast.Name):
            found = block.parameters.get(node.id)
            value = found if isinstance(found, int | float) else None
        return value

    def _wrong(self, kind: NoiseKind, reason: str, node: ast.Node) -> None:
        self.diagnostics.append(
            BadCall(span=node.span, name=kind.name, reason=reason, usage=kind.usage)
        )


def _joined(
    at: ast.Positions,
    table: PromptTable,
    run: str,
    tokenizer: TextTokenizer,
    diagnostics: list[Diagnostic],
) -> tuple[tuple[int, ...], ...]:
    """Per row, all positions that are meant."""
    cells, found = resolve_positions(at, table, run, tokenizer=tokenizer)
    diagnostics += found
    return tuple(
        tuple(sorted({p for cell in cells for tokens in cell.hits[n] for p in tokens}))
        for n in range(len(table))
    )


def _sd_tokens(
    reader: _Reader,
    everything: PromptTable,
    run: str,
    tokenizer: TextTokenizer,
    diagnostics: list[Diagnostic],
) -> tuple[int, ...]:
    """The ids of the span's tokens in all rows, with repetition."""
    at = reader.change.at
    if reader.sd_of is not None:
        ref = ast.SpanRef(name=reader.sd_of.of, span=reader.sd_of.span)
        tokens = ast.SpanTokens(ref, plural=True, span=ref.span)
        point = ast.Point(tokens, span=ref.span)
        at = ast.Positions((ast.Position(point, span=ref.span),), span=ref.span)
    positions = _joined(at, everything, run, tokenizer, diagnostics)
    rows = everything.runs[run].rows
    return tuple(row.ids[p] for row, hits in zip(rows, positions, strict=True) for p in hits)
