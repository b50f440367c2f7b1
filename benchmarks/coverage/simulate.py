"""Running settings, in processes; what is drawn hangs on the setting and not on the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from zlib import crc32

import numpy as np

from benchmarks.coverage import bands, files, intervals, levels, verdicts
from benchmarks.coverage.setting import Outcome, Setting
from mechdsl.base.arrays import Ints

QUICK = 200
"""Repetitions with `--quick`."""


@cache
def all_settings(everything: bool = False) -> dict[str, Setting]:
    """By key, in the order of the table."""
    found = [
        *intervals.settings(),
        *levels.settings(everything),
        *verdicts.settings(),
        *bands.settings(),
        *files.settings(),
    ]
    keys = {f"{each.key}: {each.figures[0].name}": each for each in found}
    if len(keys) != len(found):
        raise ValueError("two settings have one name")
    return keys


def chunks(setting: Setting, repetitions: int) -> Iterator[tuple[int, int]]:
    """(number, repetitions) of each call."""
    for number, start in enumerate(range(0, repetitions, setting.chunk)):
        yield number, min(setting.chunk, repetitions - start)


def run_chunk(setting: Setting, seed: int, number: int, count: int) -> Ints:
    """[figure, 2]: how often each came true, and of how many."""
    random = np.random.default_rng([seed, crc32(setting.seed_key.encode()), number])
    return np.asarray(setting.run(random, count))


def _in_process(key: str, everything: bool, seed: int, number: int, count: int) -> Ints:
    return run_chunk(all_settings(everything)[key], seed, number, count)


def outcomes(setting: Setting, counts: Ints, repetitions: int) -> list[Outcome]:
    """counts: [figure, 2], of all chunks together."""
    pairs = zip(setting.figures, counts.tolist(), strict=True)
    return [Outcome(setting, figure, hits, of, repetitions) for figure, (hits, of) in pairs]


def here(setting: Setting, seed: int, repetitions: int) -> list[Outcome]:
    """One setting in this process."""
    found = [run_chunk(setting, seed, *each) for each in chunks(setting, repetitions)]
    return outcomes(setting, np.sum(found, axis=0), repetitions)


def simulate(
    keys: Sequence[str],
    seed: int,
    processes: int,
    say: Callable[[str], None],
    *,
    everything: bool = False,
    quick: bool = False,
) -> list[Outcome]:
    """The outcomes of settings, in the order of `keys`."""
    chosen = {key: all_settings(everything)[key] for key in keys}
    repetitions = {
        key: min(QUICK, each.repetitions) if quick else each.repetitions
        for key, each in chosen.items()
    }
    counts = {key: np.zeros((len(each.figures), 2), dtype=np.int64) for key, each in chosen.items()}
    # a fresh interpreter: the threads of a parent that has used a BLAS don't survive a fork
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = {
            pool.submit(_in_process, key, everything, seed, number, count): key
            for key, setting in chosen.items()
            for number, count in chunks(setting, repetitions[key])
        }
        left = dict.fromkeys(chosen, 0)
        for key in waiting.values():
            left[key] += 1
        for done in as_completed(waiting):
            key = waiting[done]
            counts[key] += done.result()
            left[key] -= 1
            if not left[key]:
                say(key)
    return [
        outcome
        for key, setting in chosen.items()
        for outcome in outcomes(setting, counts[key], repetitions[key])
    ]
