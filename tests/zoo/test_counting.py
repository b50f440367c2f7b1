"""The shipped counting model has the accuracy of its card, on held-out lists."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import pytest
import torch

from mechdsl import zoo
from zoo.commands import Tally
from zoo.counting.data import draw, is_held_out, stream, vocabulary
from zoo.counting.evaluate import SEED, evaluate

FOLDER = Path(zoo.__path__[0]) / "counting"


@pytest.mark.slow
def test_counting_accuracy_on_held_out_lists() -> None:
    torch.set_num_threads(1)
    tallies = evaluate(FOLDER, 600, SEED)
    low, _ = tallies["every question"].interval()
    assert tallies["every question"].n > 1000
    assert low > 0.97
    assert tallies["first count asked"].share == 1.0


def test_counting_training_and_held_out_lists_are_disjoint() -> None:
    trained = {e.text for e in islice(stream(0, held_out=False), 2000)}
    kept = list(islice(stream(0, held_out=True), 300))
    assert all(is_held_out(example.parts) for example in kept)
    assert not trained & {example.text for example in kept}


def test_counting_texts_depend_only_on_the_seed() -> None:
    assert draw(random.Random(3)) == draw(random.Random(3))


def test_counting_targets_equal_the_list_lengths() -> None:
    for example in islice(stream(1, held_out=False, numbered_share=0.0), 300):
        counts = [len(part) for part in example.parts]
        for target in example.targets:
            if target.kind != "count":
                assert int(example.text[target.start : target.end]) == sum(counts)
            else:
                assert int(example.text[target.start : target.end]) in counts


def test_counting_vocabulary_has_the_words_of_the_examples() -> None:
    needed = {*["Part", "Count", "Total", "apple", "pear", "plum", "fig", "kiwi", "thing"], *":,.|"}
    assert needed | {str(n) for n in range(28)} <= set(vocabulary())


@pytest.mark.parametrize(("right", "n", "low"), [(10, 10, 0.7225), (0, 10, 0.0), (50, 100, 0.4038)])
def test_tally_interval_equals_wilson(right: int, n: int, low: float) -> None:
    assert Tally(right, n).interval()[0] == pytest.approx(low, abs=1e-4)
