"""Random features of the same dictionary and of similar frequency, as controls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mechdsl.base.text import Source
from mechdsl.resolve.matched_draws import draw_features
from mechdsl.results.experiment_result import FileResult

from ..execute.support import bare, run_on, shared
from .support import BLOCKS, experiment, rows, run_file, try_file
from .test_dictionaries import FEATURES, LAYER, features_of, make
from .test_inactive_features import width_of

FAMILY = "llama"
BASIS = f'basis f = sae("sae") at resid_post layer {LAYER}\n'
SEEN = experiment("seen", "observe features of f at last token", measure="", stats="")
RULE = "ablate feature 0..11 of f at last token with zero"
AGAINST = "against random(19, features, frequency: seen)"


@pytest.mark.parametrize("mode", ["plain", "planned"])
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_random_feature_band_covers_features_of_similar_frequency(
    architecture: str, mode: str, data: Path
) -> None:
    """With more draws than there are other features, the band covers all of them and no others."""
    of = make(data, architecture, width_of(FAMILY))
    found = run_file(BASIS + SEEN + experiment("e", RULE, AGAINST), data, FAMILY, mode)["e"]
    effects = (found.measures[0].patched - found.measures[0].base).mean(1)
    band = found.controls[0]
    assert band is not None
    count = len(rows())
    every = [features_of(FAMILY, of, "clean", n)[0].numpy() != 0 for n in range(count)]
    shares = np.mean(every, axis=0)
    alike = 0
    for feature in range(FEATURES):
        others = [
            other
            for other in range(FEATURES)
            if other != feature
            and shares[feature] > 0
            and shares[other] > 0
            and 0.5 <= shares[feature] / shares[other] <= 2
        ]
        assert band.draws[feature] == len(others)
        if others:
            alike += 1
            own = effects[others]
            assert band.low[feature] == pytest.approx(own.min(), abs=1e-5)
            assert band.high[feature] == pytest.approx(own.max(), abs=1e-5)
    assert alike > 3
    assert "each active in half to twice as many rows of `seen`" in found.conventions["controls"]


def test_random_feature_control_of_a_loop_over_sets_is_reproducible(data: Path) -> None:
    """Sets of features are replaced by sets of equal size, separately for each value of a loop."""
    make(data, "standard", width_of(FAMILY))
    rule = "for k in [1, 2] { ablate features top k of seen of f at last token with zero }"
    text = BASIS + SEEN + experiment("e", rule, "against random(3, features, frequency: seen)")
    found = run_file(text, data, FAMILY, "planned")["e"]
    assert len(found.cells) == 2
    again = run_file(text, data, FAMILY, "planned")["e"]
    first, second = found.controls[0], again.controls[0]
    assert first is not None
    assert second is not None
    assert first.low.tolist() == second.low.tolist()
    assert (first.draws > 0).any()


def test_random_feature_band_depends_on_the_seed(data: Path) -> None:
    make(data, "standard", width_of(FAMILY))
    bands: set[tuple[float, ...]] = set()
    for seed in range(6):
        text = f"seed {seed}\n{BASIS}{SEEN}"
        text += experiment("e", RULE, "against random(1, features, frequency: seen)")
        band = run_file(text, data, FAMILY, "planned")["e"].controls[0]
        assert band is not None
        bands.add(tuple(np.nan_to_num(band.low).round(6).tolist()))
    assert len(bands) == 6


@pytest.mark.parametrize(
    ("against", "code", "said"),
    [
        ("against random(5)", "E0630", "random(5, features, frequency: seen)"),
        ("against random(5, features)", "E0630", "frequency: seen"),
        ("against random(5, frequency: seen)", "E0630", "only features"),
        ("against random(5, positions, frequency: seen)", "E0630", "only features"),
        ("against random(5, features, frequency: 3)", "E0630", "is an experiment"),
        ("against random(5, features, frequency: other)", "E0201", "other"),
        ("against random(5, features, frequency: swept)", "E0630", "doesn't have the activations"),
        ("against random(5, features, frequency: changed)", "E0630", "doesn't have the activ"),
    ],
)
def test_invalid_random_feature_controls_are_errors(
    against: str, code: str, said: str, data: Path
) -> None:
    make(data, "standard", width_of(FAMILY))
    others = experiment("swept", RULE) + experiment(
        "changed",
        "observe features of f at last token by difference(other)",
        measure="",
        stats="",
    )
    text = BASIS + SEEN + others + experiment("e", RULE, against)
    result, diagnostics = try_file(text, data, FAMILY)
    errors = [each for each in diagnostics if each.code == code]
    lost = [] if result is None else [reason for each in result.lost for reason in each.reasons]
    texts = [f"{each.message} {each.help_text}" for each in errors]
    texts += [f"{each.reason} {each}" for each in lost if each.code == code]
    assert any(said in each for each in texts), (texts, diagnostics)


def test_random_feature_control_of_a_rule_without_features_is_an_error(data: Path) -> None:
    make(data, "standard", width_of(FAMILY))
    rule = "ablate layer 0 head * at last token with zero"
    result, diagnostics = try_file(BASIS + SEEN + experiment("e", rule, AGAINST), data, FAMILY)
    assert "E0630" in [each.code for each in diagnostics]
    assert result is None or all(each.name != "e" for each in result.experiments)


FREQUENT = dict(enumerate([0.5, 0.3, 0.9, 0.26, 0.24, 0.01, 0.0, 1.0]))


def test_random_features_have_similar_frequency() -> None:
    drawn = draw_features([0], FREQUENT, 50, key=3)
    assert sorted(drawn) == [(1,), (2,), (3,), (7,)]
    assert draw_features([0], FREQUENT, 2, key=3) == drawn[:2]
    assert draw_features([6], FREQUENT, 5, key=3) == []
    assert draw_features([5], FREQUENT, 5, key=3) == []
    assert draw_features([40], FREQUENT, 5, key=3) == []


def test_random_sets_of_features_are_distinct() -> None:
    drawn = draw_features([0, 1], FREQUENT, 100, key=3)
    assert len(set(drawn)) == len(drawn)
    for own in drawn:
        assert len(set(own)) == 2
        assert not set(own) & {0, 1}
    # one of 2, 3 and 7 for feature 0; one of 3 and 4 for feature 1
    assert set(drawn) == {(2, 3), (3, 7), (2, 4), (3, 4), (4, 7)}


def test_random_features_depend_on_the_seed_and_are_uniform() -> None:
    frequencies = dict.fromkeys(range(200), 0.5)
    one, other = (draw_features([0], frequencies, 20, key) for key in (1, 2))
    assert one != other
    assert one == draw_features([0], frequencies, 20, 1)
    counts = np.bincount(
        [draw_features([0], frequencies, 1, key)[0][0] for key in range(4000)], minlength=200
    )
    assert counts[0] == 0
    assert counts[1:].min() > 3  # about 20 each
    assert counts.max() < 45


def on_models(data: Path, seen: str, models: str = "m, k") -> tuple[FileResult | None, str]:
    """An experiment on several models, whose features `seen` observes on these."""
    make(data, "standard", width_of(FAMILY))
    names = 'model m = local("handed over")\nmodel k = local("handed over")\n'
    text = f"mech 1\n{names}{BLOCKS}\n{BASIS}"
    text += SEEN.replace("model m", f"model {seen}")
    text += experiment("e", RULE, AGAINST).replace("model m", f"model {models}")
    given = {"m": bare(FAMILY), "k": bare(FAMILY, 1)}
    result, found = run_on(
        Source(text, data / "file.mech"), {name: shared(each, name) for name, each in given.items()}
    )
    lost = [] if result is None else [reason for each in result.lost for reason in each.reasons]
    return result, " ".join([*(each.message for each in found), *(each.reason for each in lost)])


def test_random_feature_control_uses_the_frequencies_of_each_model(data: Path) -> None:
    both, said = on_models(data, "m, k")
    assert both is not None, said
    found = both.experiments[1]
    band = found.controls[0]
    assert band is not None
    draws: list[list[int]] = []
    for name in ("m", "k"):
        alone, said = on_models(data, name, name)
        assert alone is not None, said
        own = alone.experiments[1].controls[0]
        assert own is not None
        cells = [n for n, cell in enumerate(found.cells) if cell.coords["model"] == name]
        assert band.draws[cells].tolist() == own.draws.tolist()
        np.testing.assert_allclose(band.low[cells], own.low, atol=1e-6)
        draws.append(own.draws.tolist())
    assert draws[0] != draws[1]


def test_model_without_observed_frequencies_is_an_error(data: Path) -> None:
    _, said = on_models(data, "m")
    assert "`seen` doesn't observe features of `k`" in said


def test_frequencies_from_several_prompt_blocks_are_an_error(data: Path) -> None:
    make(data, "standard", width_of(FAMILY))
    seen = SEEN.replace("prompts p", "prompts second, single")
    _, found = try_file(BASIS + seen + experiment("e", RULE, AGAINST), data, FAMILY)
    assert any("on several prompts" in f"{each.message} {each.help_text}" for each in found), found
