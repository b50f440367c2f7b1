"""Makes the works W1 to W5: prompts, tokenizers and `.mech` files in a folder."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.work import Batch, Joined, Shape, Site, Work

SMALL = Shape(layers=12, heads=12, width=768)
MEDIUM = Shape(layers=24, heads=16, width=1024)
TINY = Shape(layers=2, heads=4, width=64, vocabulary=8192)
TINY_DEEP = Shape(layers=12, heads=4, width=64, vocabulary=8192)
"""For windows of 10 layers."""
MINIMAL_PAIRS = 16
"""Rows of W5."""

HEAD = """\
mech 1

model gpt2 = local("model")

prompts pairs {{
  rows "prompts.jsonl"
  template "{{text}}"
  answer "{{right}}"
  wrong "{{rival}}"
  corrupt corrupted {{ text = other }}
}}
"""
MECH = (
    HEAD
    + """
experiment sweep {{
  model gpt2
  prompts pairs
  from clean into corrupted
  {rule}
  measure logit(answer) - logit(wrong) as raw
}}
"""
)


@dataclass(frozen=True)
class Pair:
    """A minimal pair as text; answers begin with their space."""

    clean: str
    corrupted: str
    answer: str
    wrong: str


@dataclass(frozen=True)
class Sweep:
    """What is swept, and over which random prompts (rows, tokens); None are real ones."""

    title: str
    rule: str
    shape: Shape
    site: Site
    random: tuple[int, int] | None
    window: int | None = None
    positions: Joined | Literal["each"] = "each"
    default: bool = True
    """Whether it is run when nothing is named."""


_EACH = "at token *"
SWEEPS = {
    "W1a": Sweep(
        "residual stream, every layer and position",
        f"patch resid_pre layer * {_EACH}",
        SMALL,
        "resid_pre",
        (4, 16),
    ),
    "W1b": Sweep(
        "residual stream, every layer and position",
        f"patch resid_pre layer * {_EACH}",
        SMALL,
        "resid_pre",
        (8, 24),
    ),
    "W2": Sweep(
        "z of every head at the last token",
        "patch layer * head * at last token",
        SMALL,
        "z",
        (4, 16),
        positions="last",
    ),
    "W3": Sweep(
        "z of every head at all positions together",
        "patch layer * head * at tokens *",
        SMALL,
        "z",
        (4, 16),
        positions="all",
    ),
    "W4": Sweep(
        "mlp_out in windows of 10 layers, every position",
        f"patch mlp_out layer * window 10 {_EACH}",
        MEDIUM,
        "mlp_out",
        (4, 16),
        window=10,
    ),
    "W5": Sweep(
        "residual stream at every position of minimal pairs (IOI)",
        f"patch resid_pre layer * {_EACH} align left",
        SMALL,
        "resid_pre",
        None,
    ),
    "W6": Sweep(
        "z of every head at each position",
        f"patch layer * head * {_EACH}",
        SMALL,
        "z",
        (4, 16),
        default=False,
    ),
}


NO_IOI = "MECHDSL_DATA names no folder with ioi.csv, nor is there ../shared/data."


def ioi_file() -> Path | None:
    """The CSV file of W5, if it is there."""
    shared = Path(__file__).parent.parent.parent / "shared" / "data"
    path = Path(os.environ.get("MECHDSL_DATA", shared)) / "ioi.csv"
    return path if path.exists() else None


def named(names: Sequence[str]) -> list[str]:
    """The works that these names mean: `W1` is W1a and W1b."""
    unknown = [name for name in names if not any(work.startswith(name) for work in SWEEPS)]
    if unknown:
        raise SystemExit(f"there is no work {unknown[0]}; there are {', '.join(SWEEPS)}")
    return [work for work in SWEEPS if any(work.startswith(name) for name in names)]


def make(name: str, folder: Path, *, ioi: Path | None, small: bool = False) -> Work:
    """Write one work into a new folder: `work.json`, `sweep.mech`, its prompts and tokenizer.

    ioi: the CSV file of W5, with the columns clean, corrupted_abc, io and s.
    small: the same cells on a tiny model.
    """
    sweep = SWEEPS[name]
    shape = sweep.shape
    if small:
        shape = TINY_DEEP if sweep.window else TINY
    if sweep.random is not None:
        rows, tokens = sweep.random
        tokenizer = words(shape.vocabulary)
        pairs = random_pairs(rows, tokens, shape.vocabulary)
    else:
        assert ioi is not None
        everything = _read(ioi)
        tokenizer = byte_pairs(
            [each for pair in everything for each in (pair.clean, pair.corrupted)]
        )
        pairs = usable(everything, tokenizer)[: 4 if small else MINIMAL_PAIRS]
    batches = by_length(pairs, tokenizer)
    title = f"{sweep.title}, {describe(batches)}"
    work = Work(
        name,
        title,
        sweep.rule,
        shape,
        sweep.site,
        sweep.window,
        sweep.positions,
        batches,
    )
    folder.mkdir(parents=True)
    work.write(folder / "work.json")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "sweep.mech").write_text(MECH.format(rule=sweep.rule))
    write_pairs(folder, pairs)
    return work


def write_pairs(folder: Path, pairs: Sequence[Pair]) -> None:
    """The data file of the `.mech` files."""
    with (folder / "prompts.jsonl").open("w") as file:
        for pair in pairs:
            record = {
                "text": pair.clean,
                "other": pair.corrupted,
                "right": pair.answer,
                "rival": pair.wrong,
            }
            file.write(json.dumps(record) + "\n")


def words(vocabulary: int) -> Tokenizer:
    """A tokenizer whose words are w0, w1, …, each one token of that id."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def random_pairs(rows: int, tokens: int, vocabulary: int) -> list[Pair]:
    """Pairs of random words that differ at every position."""
    draw = random.Random(0)
    pairs: list[Pair] = []
    for _ in range(rows):
        clean = [draw.randrange(1, vocabulary) for _ in range(tokens)]
        corrupted = [(w + draw.randrange(1, vocabulary - 1)) % vocabulary for w in clean]
        answer, wrong = draw.sample(range(1, vocabulary), 2)
        pairs.append(Pair(_spell(clean), _spell(corrupted), f" w{answer}", f" w{wrong}"))
    return pairs


def _spell(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def byte_pairs(texts: Sequence[str], size: int = 8000) -> Tokenizer:
    """A byte-level BPE trained on these texts, as GPT-2's with fewer merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    return tokenizer


def _read(path: Path) -> list[Pair]:
    with path.open(newline="") as file:
        return [
            Pair(record["clean"], record["corrupted_abc"], record["io"], record["s"])
            for record in csv.DictReader(file)
        ]


def usable(pairs: Sequence[Pair], tokenizer: Tokenizer) -> list[Pair]:
    """Pairs of equally many tokens whose answers are one token each, evenly over the file."""
    found = [
        pair
        for pair in dict.fromkeys(pairs)
        if len(tokenizer.encode(pair.clean).ids) == len(tokenizer.encode(pair.corrupted).ids)
        and all(len(tokenizer.encode(text).ids) == 1 for text in (pair.answer, pair.wrong))
    ]
    step = max(1, len(found) // MINIMAL_PAIRS)
    return found[::step]


def by_length(pairs: Sequence[Pair], tokenizer: Tokenizer) -> list[Batch]:
    """One batch per prompt length, in order of length."""
    batches: dict[int, Batch] = {}
    for row, pair in enumerate(pairs):
        clean: list[int] = tokenizer.encode(pair.clean).ids
        corrupted: list[int] = tokenizer.encode(pair.corrupted).ids
        batch = batches.setdefault(len(clean), Batch([], [], [], [], []))
        batch.rows.append(row)
        batch.clean.append(clean)
        batch.corrupted.append(corrupted)
        batch.answer.append(tokenizer.encode(pair.answer).ids[0])
        batch.wrong.append(tokenizer.encode(pair.wrong).ids[0])
    return [batches[length] for length in sorted(batches)]


def describe(batches: Sequence[Batch]) -> str:
    """How many prompts of which length."""
    if len(batches) == 1:
        return f"B={len(batches[0].rows)} T={batches[0].length}"
    rows = sum(len(batch.rows) for batch in batches)
    lengths = f"{batches[0].length} to {batches[-1].length}"
    return f"B={rows} in {len(batches)} groups of one length, T={lengths}"
