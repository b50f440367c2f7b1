"""Random controls of trained groups of features or dimensions.

Masks of few coordinates have every other choice as a draw, so that no draw is read from mechdsl:
the control is the mean and the range over all of these, with plain hooks on the bare model in 64
bits, one unpadded prompt at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mechdsl
from mechdsl.resolve.matched_draws import draw_coordinates

from ..quick import in_turn
from ..reference.forward import Write, forward
from ..rules.models import bare, double
from ..rules.support import difference, edited, plain, records, rows, tokens
from .test_trained_coordinate_masks import FEATURES, SITE, TRAINED, fit, sae, weights
from .test_trained_dictionaries import experiment, models, run, train, write

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("gpt2", "llama", "gpt_neox")
RAW = "measure logit(answer) - logit(wrong) as raw"
KINDS = {"features": "features * of f", "dims": f"{SITE} dims 0..6"}
NUMBERS = {"features": range(FEATURES), "dims": range(7)}
TOKENS = 3

EVERY = tuple(range(FEATURES))


@cache
def dictionary(width: int, active: Sequence[int] = EVERY) -> dict[str, Tensor]:
    """A dictionary in which only the given features are active, and always."""
    own = {name: each.clone() for name, each in weights(width).items()}
    own["b_enc"] += 30
    own["b_enc"][[n for n in EVERY if n not in active]] = -100
    return own


def declare(folder: Path, family: str = "llama", active: Sequence[int] = EVERY) -> str:
    line = sae(folder, family)
    save_file(dictionary(bare(family).config.hidden_size, active), folder / "sae.safetensors")
    return line


def coordinates(kind: str, x: Tensor, active: Sequence[int] = EVERY) -> tuple[Tensor, Tensor]:
    """Coordinates of a vector, and the [coordinate, width] vectors that a value of 1 adds."""
    if kind == "dims":
        return x, torch.eye(len(x), dtype=x.dtype)
    own = {name: each.double() for name, each in dictionary(len(x), active).items()}
    return ((x - own["b_dec"]) @ own["W_enc"] + own["b_enc"]).clamp(min=0), own["W_dec"]


def shifted(kind: str, x: Tensor, values: Mapping[int, float]) -> Tensor:
    """A vector with some coordinates replaced."""
    old, added = coordinates(kind, x)
    change = torch.zeros_like(x)
    for n, value in values.items():
        change += (value - old[n]) * added[n]
    return x + change


def patched(family: str, kind: str, which: Sequence[int], at: str = "last token") -> list[float]:
    """[row]: values with coordinates patched from the run `turned`."""
    found: list[float] = []
    pairs = zip(rows("second"), rows("second.turned"), records("second"), strict=True)
    for here, there, record in pairs:
        writes: list[Write] = []
        for to, of in zip(tokens(here, at), tokens(there, at), strict=True):
            theirs = plain(family, there)["resid_post", 1][of].double().flatten()
            mine = plain(family, here)["resid_post", 1][to].double().flatten()
            new = coordinates(kind, theirs)[0]
            x = shifted(kind, mine, {n: float(new[n]) for n in which})
            writes.append(Write("resid_post", 1, x, to))
        found.append(difference(edited(family, here, writes).logits, record))
    return found


def twice(family: str, kind: str, which: Sequence[int]) -> list[float]:
    """[row]: values under two rules with the same coordinates, at two positions."""
    found: list[float] = []
    for text, record in zip(rows("second"), records("second"), strict=True):
        writes: list[Write] = []
        for at, change in (("last token", 0.0), ("right tokens", 2.0)):
            for place in tokens(text, at):
                x = plain(family, text)["resid_post", 1][place].double().flatten()
                old = coordinates(kind, x)[0]
                values = {n: float(old[n]) + change if change else 0.0 for n in which}
                writes.append(Write("resid_post", 1, shifted(kind, x, values), place))
        found.append(difference(edited(family, text, writes).logits, record))
    return found


def replies(family: str, kind: str, which: Sequence[int]) -> list[list[float]]:
    """[step, row] entropies of the next token; generated tokens are modified, too."""
    found: list[list[float]] = [[] for _ in range(TOKENS)]

    def act(x: Tensor) -> Tensor:
        flat = x.double().flatten()
        old = coordinates(kind, flat)[0]
        return shifted(kind, flat, {n: float(old[n]) + 2 for n in which}).reshape(x.shape)

    for text in rows("second"):
        ids = [*text.ids]
        for entropies in found:
            writes = [Write("resid_post", 1, act, place) for place in range(len(ids))]
            chances = forward(family, double(family), ids, writes).logits[-1].double()
            chances = chances.log_softmax(-1)
            entropies.append(float(-(chances.exp() * chances).sum()))
            ids.append(int(chances.argmax()))
    return found


def without(family: str, kind: str, which: Sequence[int]) -> list[float]:
    """[row]: values with all coordinates patched except the given ones."""
    return patched(family, kind, [n for n in NUMBERS[kind] if n not in which])


CASES: dict[str, tuple[tuple[str, ...], str, Callable[..., Any]]] = {
    "patch": (("from turned into clean", "patch g at last token"), RAW, patched),
    "several tokens": (
        ("from turned into clean", "patch g at right tokens"),
        RAW,
        lambda *given: patched(*given, at="right tokens"),
    ),
    "two rules": (
        ("ablate g at last token with zero", "add 2 to g at right tokens"),
        RAW,
        twice,
    ),
    "others": (
        ("from turned into clean", "patch {every} except g at last token"),
        RAW,
        without,
    ),
    "replies": (
        (f"generate {TOKENS}", "add 2 to g at tokens *"),
        "measure entropy at each step as raw",
        replies,
    ),
}


def choice(folder: Path, family: str) -> tuple[int, ...]:
    """Train the mask and return the chosen coordinates."""
    trained = train(folder / "file.mech", family)[-1]
    stored = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    return tuple(stored["sites"][n][-1] for n in stored["chosen"])


def check_band(
    found: Any,
    sets: Iterable[Sequence[int]],
    expected: Callable[..., Any],
    title: str = "random",
) -> None:
    """Compare the control with the values of all sets."""
    (band,) = found.controls
    values = np.array([np.atleast_1d(np.mean(expected(which), -1)) for which in sets])
    assert band.title == title
    assert band.draws.tolist() == [len(values)] * values.shape[1]
    assert np.ptp(values, axis=0).max() > 1e-3
    for name, reduced in (("low", np.min), ("mean", np.mean), ("high", np.max)):
        np.testing.assert_allclose(
            getattr(band, name), reduced(values, axis=0), atol=1e-4, err_msg=name
        )


@pytest.mark.parametrize(("case", "family"), in_turn([*CASES], HERE))
@pytest.mark.parametrize("kind", KINDS)
def test_control_of_one_coordinate_covers_every_other_choice(
    kind: str, case: str, family: str, tmp_path: Path
) -> None:
    """A second experiment on the same prompts has the same control."""
    lines, measure, expected = CASES[case]
    lines = [line.replace("{every}", KINDS[kind]) for line in lines]
    used = experiment(*lines, measure=measure)
    again = used.replace("experiment e", "experiment again")
    declared = declare(tmp_path, family) if kind == "features" else ""
    line = fit(mask="size: 1", at=f"{KINDS[kind]} at last token")
    write(tmp_path, declared, line, used, again)
    (chosen,) = choice(tmp_path, family)
    first, second = run(tmp_path / "file.mech", family).files[0].experiments
    noun = "features" if kind == "features" else "dimensions"
    assert first.controls[0].what == f"random {noun}"
    assert "the same number of those that `g` could choose" in first.conventions["controls"]
    others = [(n,) for n in NUMBERS[kind] if n != chosen]
    check_band(first, others, lambda which: expected(family, kind, which))
    assert np.array_equal(first.controls[0].mean, second.controls[0].mean)


@pytest.mark.parametrize("kind", KINDS)
def test_against_random_draws_coordinates_the_mask_could_choose(kind: str, tmp_path: Path) -> None:
    """The number of draws is limited by the number of other choices."""
    declared = declare(tmp_path) if kind == "features" else ""
    line = fit(mask="size: 1", at=f"{KINDS[kind]} at last token")
    lines = ("from turned into clean", "patch g at last token")
    texts = [
        experiment(*lines, f"against random({draws})", measure=RAW).replace(
            "ent e", f"ent e{draws}"
        )
        for draws in (3, 39)
    ]
    path = write(tmp_path, declared, line, *texts)
    few, every = run(path, fit=True).files[0].experiments
    (chosen,) = choice(tmp_path, "llama")
    others = [(n,) for n in NUMBERS[kind] if n != chosen]
    check_band(every, others, partial(patched, "llama", kind), "null")
    noun = "features" if kind == "features" else "dimensions"
    assert f"random {noun}, 3 draws" in few.conventions["controls"]
    assert f"random {noun}, {len(others)} draws" in every.conventions["controls"]
    assert few.controls[0].draws.tolist() == [3]
    assert every.controls[0].low <= few.controls[0].low < few.controls[0].high


def test_except_with_an_untrained_group_is_validated_after_training(tmp_path: Path) -> None:
    """The group's features aren't known before training and may not overlap the rule's."""
    declared = declare(tmp_path)
    line = fit(mask="size: 1", at="features * of f at last token")
    lines = ("from turned into clean", "patch features {} of f except g at last token")
    used = experiment(*lines, measure=RAW)
    path = write(tmp_path, declared, line, used.replace("{}", "0..8"))
    assert not mechdsl.validate(path, models=models()).errors
    train(path, "llama")
    (chosen,) = choice(tmp_path, "llama")
    others = [n for n in range(5) if n != chosen]
    for named in (others, [*others, chosen]):
        part = used.replace("{}", ", ".join(map(str, named)))
        (found,) = run(write(tmp_path, declared, line, part)).files[0].experiments
        expected = patched("llama", "features", others)
        np.testing.assert_allclose(found.measures[0].patched.ravel(), expected, atol=1e-4)
    path = write(tmp_path, declared, line, used.replace("{}", str(chosen)))
    with pytest.raises(mechdsl.MechdslError, match="leaves no coordinate"):
        run(path)


def test_control_draws_only_features_active_in_a_training_row(tmp_path: Path) -> None:
    """If there are too few other features, draws include the group's own."""
    active = (0, 3, 4, 8)
    used = experiment("ablate g at last token with zero", measure=RAW)
    write(tmp_path, declare(tmp_path, active=active), fit(), used)
    chosen = choice(tmp_path, "llama")
    (found,) = run(tmp_path / "file.mech").files[0].experiments

    def expected(which: Sequence[int]) -> list[float]:
        values: list[float] = []
        for text, record in zip(rows("second"), records("second"), strict=True):
            (at,) = tokens(text, "last token")
            x = plain("llama", text)["resid_post", 1][at].double().flatten()
            old, added = coordinates("features", x, active)
            write = Write("resid_post", 1, x - old[list(which)] @ added[list(which)], at)
            values.append(difference(edited("llama", text, [write]).logits, record))
        return values

    sets = [each for each in combinations(active, 2) if each != tuple(sorted(chosen))]
    check_band(found, sets, expected)
    assert "including the cell's own" in found.conventions["controls"]


def test_control_depends_on_seed_candidates_and_dictionary(tmp_path: Path) -> None:
    """With other candidates, stored results equal those of a run without a store."""
    used = experiment("ablate g at last token with zero", measure=RAW)
    declared = declare(tmp_path)
    texts = {
        "base": [fit(), used],
        "seed": ["seed 9", fit(), used],
        "candidates": [fit(at="features 0..7 of f at last token"), used],
    }
    means: dict[str, float] = {}
    for name, parts in texts.items():
        path = write(tmp_path, declared, *parts)
        (stored,) = run(path, fit=True).files[0].experiments
        means[name] = float(stored.controls[0].mean[0])
        if name == "candidates":
            (fresh,) = run(path, fresh=True).files[0].experiments
            assert np.allclose(stored.controls[0].mean, fresh.controls[0].mean, atol=1e-5)
    declare(tmp_path, active=EVERY[1:])
    path = write(tmp_path, declared, fit(), used)
    (changed,) = run(path, fit=True).files[0].experiments
    means["dictionary"] = float(changed.controls[0].mean[0])
    assert len({round(mean, 4) for mean in means.values()}) == len(means), means


def test_features_of_a_trained_dictionary_have_a_control(tmp_path: Path) -> None:
    line = f"basis f = {TRAINED}) at {SITE} at tokens *\n"
    path = write(tmp_path, line, fit(), experiment("scale g at last token by 0.5", measure=RAW))
    (found,) = run(path, fit=True).files[0].experiments
    assert found.controls[0].what == "random features"
    assert "added for trained `g`, `f`" in found.conventions["controls"]


def test_coordinates_that_a_mask_could_not_choose_have_no_control(tmp_path: Path) -> None:
    declared, used = declare(tmp_path), experiment("ablate g at last token with zero")
    for first in range(5):
        line = fit(mask="size: 1", at=f"features {first}, {first + 1} of f at last token")
        write(tmp_path, declared, line, used)
        if choice(tmp_path, "llama") == (first,):
            break
    used = used.replace(" g ", f" features {first}, 7..8 of f except g ")
    (found,) = run(write(tmp_path, declared, line, used)).files[0].experiments
    assert not found.controls
    said = "none: `g` could choose no others for the coordinates of this experiment"
    assert found.conventions["controls"].startswith(said)


def test_explain_shows_the_control_of_features(tmp_path: Path) -> None:
    path = write(tmp_path, sae(tmp_path), fit(), experiment("ablate g at last token with zero"))
    train(path)
    assert "random features" in str(mechdsl.explain(path, models=models()))


def test_draw_coordinates_many_choices_draws_disjoint_sets() -> None:
    choices = [*range(3, 300, 2)]
    drawn, note = draw_coordinates((5, 9, 300), choices, draws=8, seed=0)
    assert note == "none of the cell's own"
    assert len(set(drawn)) == len(drawn) == 8
    for each in drawn:
        assert 300 in each  # it isn't a choice, so it stays
        assert len(set(each)) == 3
        assert set(each) - {300} <= set(choices) - {5, 9}
    assert draw_coordinates((5, 9, 300), choices, draws=8, seed=0)[0] == drawn
    assert draw_coordinates((5, 9, 300), choices, draws=8, seed=1)[0] != drawn
    assert draw_coordinates((1, 2), choices, draws=8, seed=0) == ([], "")
    assert draw_coordinates(choices, choices, draws=8, seed=0) == ([], "")
