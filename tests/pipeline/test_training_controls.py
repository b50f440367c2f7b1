"""Automatic controls of experiments with trained objects, and reports of measured training rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.resolve import controls

from ..quick import in_turn
from . import test_trained_dictionaries as dictionaries
from . import test_trained_lenses as lenses
from . import test_trained_masks as masks
from . import test_trained_position_masks as positions
from . import test_trained_rotations as rotations
from . import test_trained_scales as scales
from . import test_trained_seeds as seeds
from . import test_trained_vectors as vectors
from .test_trained_dictionaries import models, run, train, write
from .test_trained_rotations import OTHER
from .test_trainings_on_a_measure import DECLARED, declare

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

RANDOM = {
    "rotation": "random subspaces",
    "vector": "random directions",
    "soft prompt": "random directions",
    "scales": "random scales",
    "mask": "random heads",
}
REPLACES = "set resid_post layer 1 at tokens * to reconstruction of f"


def with_line(experiment: str, line: str) -> str:
    """Return an experiment with a further line."""
    head, body = experiment.split("\n", 1)
    return f"{head}\n  {line}\n{body}"


def only(path: Path, family: str = "llama", **options: Any) -> Any:
    (found,) = run(path, family, fit=True, **options).files[0].experiments
    return found


@pytest.mark.parametrize(("kind", "family"), in_turn(list(RANDOM), ("llama", "gpt2", "gpt_neox")))
def test_automatic_random_control_equals_against_random(
    kind: str, family: str, tmp_path: Path
) -> None:
    used = DECLARED[kind][1]
    own = only(write(tmp_path, declare(kind), used), family)
    asked = only(write(tmp_path, declare(kind), with_line(used, "against random(8)")), family)
    (band,), (other,) = own.controls, asked.controls
    assert (band.title, other.title) == ("random", "null")
    assert band.what == other.what == RANDOM[kind]
    for name in ("low", "mean", "high", "draws"):
        assert np.array_equal(getattr(band, name), getattr(other, name)), name
    assert np.array_equal(own.statistics[0].p, asked.statistics[0].p, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_automatic_control_of_a_position_mask_equals_against_random(
    family: str, tmp_path: Path
) -> None:
    used = rotations.experiment("from turned into clean", "patch resid_post layer 1 at g tokens")
    line = positions.fit()
    own = only(write(tmp_path, line, used), family)
    asked = only(write(tmp_path, line, with_line(used, "against random(8, positions)")), family)
    assert own.controls[0].what == "random positions"
    assert np.array_equal(own.controls[0].mean, asked.controls[0].mean)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_untrained_dictionary_control_equals_a_training_without_steps(
    family: str, tmp_path: Path
) -> None:
    """In a loop, only trained bases have a control."""
    start = dictionaries.fit(options="steps: 0, seed: 0, validation: 25%").replace("f =", "g =")
    whole = f"basis b = pca(p, dims: 2) at resid_post layer {dictionaries.LAYER} at last token\n"
    each = dictionaries.experiment(
        "for c in [f, g, b] {", f"  {REPLACES.replace('of f', 'of c')}", "}"
    )
    line = dictionaries.fit(options="steps: 9, rate: 0.05, seed: 0, validation: 25%")
    (found,) = (
        run(dictionaries.write(tmp_path, line, start, whole, each), family, fit=True)
        .files[0]
        .experiments
    )
    (band,), (own,) = found.controls, found.statistics
    assert band.title == "untrained"
    assert band.draws.tolist() == [1, 1, 0]
    assert band.mean[0] == band.mean[1] == own.mean[1] != own.mean[0]
    assert np.isnan(band.mean[2])
    assert np.isnan(band.p).all()


def test_untrained_lens_control_equals_the_logit_lens(tmp_path: Path) -> None:
    used = lenses.experiment(lenses.SEEN, measure="measure logprob(answer) as raw")
    plain = used.replace("tuned_lens(l)", "logit_lens").replace("experiment e", "experiment plain")
    own, other = run(write(tmp_path, lenses.fit(), used, plain), fit=True).files[0].experiments
    (band,) = own.controls
    assert (band.title, band.what) == ("untrained", "logit lens")
    assert np.array_equal(band.mean, other.statistics[0].mean)
    assert not other.controls


def test_against_none_omits_the_automatic_control(tmp_path: Path) -> None:
    used = with_line(vectors.ADD, "against none")
    path = write(tmp_path, vectors.fit(), used)
    found = only(path)
    assert not found.controls
    assert found.conventions["controls"] == "none: the file says `against none`"
    assert "no control: the file says `against none`" in str(mechdsl.explain(path, models=models()))
    for line, code in (("against none", "E0207"), ("against nothing", "E0203")):
        with pytest.raises(mechdsl.MechdslError) as refused:
            run(write(tmp_path, with_line(OTHER, line)))
        assert [each.code for each in refused.value.diagnostics] == [code]


def test_error_in_a_training_is_reported_without_against_none(tmp_path: Path) -> None:
    used = with_line(vectors.ADD, "against none")
    wrong = vectors.fit().replace("prompts:", "promptz:", 1)
    with pytest.raises(mechdsl.MechdslError) as refused:
        run(write(tmp_path, wrong, used))
    found = [each for each in refused.value.diagnostics if each.severity == "error"]
    assert found
    assert "against none" not in " ".join(each.message for each in found)


def test_experiment_without_trained_objects_has_no_automatic_control(tmp_path: Path) -> None:
    path = write(tmp_path, vectors.fit(), vectors.ADD, OTHER)
    first, second = run(path, fit=True).files[0].experiments
    assert (bool(first.controls), bool(second.controls)) == (True, False)
    assert second.conventions["controls"].startswith("none (`against random(39)`")


def test_automatic_control_keeps_rules_without_trained_objects(tmp_path: Path) -> None:
    other = "direction w = mean(p) at resid_post layer 1 at last token\n"
    used = vectors.ADD.replace(
        "  measure", "  add 3 * w to resid_post layer 1 at last token\n  measure"
    )
    found = only(write(tmp_path, vectors.fit(), other, used))
    assert (
        "`add 3 * w to resid_post layer 1 at last token` unchanged" in found.conventions["controls"]
    )


MORE = {
    "excluded sites": (
        masks.fit(),
        ("from turned into clean", f"patch {masks.HEADS} except g at last token"),
        "random heads",
    ),
    "mask in a loop of shares": (
        masks.fit(),
        (
            "from turned into clean",
            "for l in 0..1 { patch g at last token",
            "  ablate mlp_out layer l at last token with zero }",
        ),
        "random heads",
    ),
    "seeds": (seeds.fit(seeds.SEEDS), seeds.PATCH, "random subspaces"),
    "generation": (
        vectors.fit(),
        ("generate 2", f"add 2 * v to {rotations.SITE} at last token"),
        "random directions",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), in_turn(list(MORE), ("llama", "gpt2", "gpt_neox")))
def test_automatic_control_in_loops_and_generation_equals_against_random(
    name: str, family: str, tmp_path: Path
) -> None:
    """The draws equal those of `against random`, in every cell."""
    line, lines, what = MORE[name]
    measure = "measure length as raw" if name == "generation" else rotations.MEASURE
    used = rotations.experiment(*lines, measure=measure)
    own = only(write(tmp_path, line, used), family)
    (band,) = own.controls
    assert (band.title, band.what) == ("random", what)
    assert (band.draws == 8).all() or "heads" in what
    if "loop" in name:
        assert (
            "`ablate mlp_out layer l at last token with zero` unchanged"
            in (own.conventions["controls"])
        )
        return
    asked = only(write(tmp_path, line, with_line(used, "against random(8)")), family)
    assert np.array_equal(band.mean, asked.controls[0].mean, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_untrained_transcoder_control_equals_a_training_without_steps(
    family: str, tmp_path: Path
) -> None:
    inner = "transcoder(features: 12, k: 3)"
    at = "mlp_out layer 1 at tokens *"
    used = dictionaries.experiment("set mlp_out layer 1 at tokens * to reconstruction of f")
    steps = "rate: 0.05, seed: 0, validation: 25%"
    own = only(
        dictionaries.write(tmp_path, dictionaries.fit(inner, f"steps: 9, {steps}", at), used),
        family,
    )
    start = dictionaries.write(tmp_path, dictionaries.fit(inner, f"steps: 0, {steps}", at), used)
    assert own.controls[0].mean == only(start, family).statistics[0].mean != own.statistics[0].mean


def test_each_experiment_has_the_control_of_its_trained_object(tmp_path: Path) -> None:
    """Three experiments on the same rows use two trainings."""
    second = vectors.ADD.replace("experiment e", "experiment o").replace("2 * v", "4 * v")
    path = write(tmp_path, vectors.fit(), rotations.fit(), vectors.ADD, second,
                 rotations.PATCHES.replace("experiment e", "experiment r"))  # fmt: skip
    found = run(path, fit=True)
    whats = [each.controls[0].what for each in found.files[0].experiments]
    assert whats == ["random directions", "random directions", "random subspaces"]
    alone = only(write(tmp_path, rotations.fit(), rotations.PATCHES))
    assert np.array_equal(alone.controls[0].mean, found["r"].controls[0].mean)


UNCONTROLLED = {
    "single features": (
        dictionaries.fit(),
        dictionaries.ABLATES,
        "features of dictionaries are drawn by their frequencies",
    ),
    "observed features": (
        dictionaries.fit(),
        rotations.experiment("observe features of f at last token as seen", measure=""),
        "what is observed of a trained part has no random or untrained counterpart",
    ),
    "run with rules": (
        vectors.fit(),
        rotations.experiment(
            f"run filled {{ add 2 * v to {rotations.SITE} at last token }}",
            "from filled into clean",
            "patch resid_post layer 1 at last token",
        ),
        "trained `v` in a run with rules, whose targets aren't drawn",
    ),
}


@pytest.mark.parametrize("name", UNCONTROLLED)
def test_missing_automatic_control_states_the_reason(name: str, tmp_path: Path) -> None:
    line, used, reason = UNCONTROLLED[name]
    path = write(tmp_path, line, used)
    found = only(path)
    assert not found.controls
    assert found.conventions["controls"].startswith(f"none: {reason}")


def test_graph_ablation_has_its_random_measure_instead_of_a_control(tmp_path: Path) -> None:
    line = "observe graph_ablation(f) logits toward answer at last token top 1 as cut"
    at = "mlp_out layer 1 at tokens *"
    path = dictionaries.write(
        tmp_path,
        dictionaries.fit("transcoder(features: 12, k: 3)", "steps: 2, validation: 25%", at),
        rotations.experiment(line, measure=""),
    )
    found = only(path)
    assert [each.label for each in found.measures] == ["cut", "cut predicted", "cut random"]
    assert "controls" not in found.conventions


def test_copied_dictionary_has_no_untrained_weights(tmp_path: Path) -> None:
    path = dictionaries.write(tmp_path, dictionaries.fit(), dictionaries.experiment(REPLACES))
    train(path, out=tmp_path / "copies")
    assert not (tmp_path / "copies" / "f" / "untrained").exists()


@pytest.mark.slow
def test_automatic_control_draws_less_for_many_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, vectors.fit(), vectors.ADD)
    for cells, draws in ((16, 8), (5, 5), (0, 1)):
        monkeypatch.setattr(controls, "TRAINING_CELLS", cells)
        assert only(path, fresh=True).controls[0].draws.tolist() == [draws]


def test_plan_lists_the_automatic_control_unless_omitted(tmp_path: Path) -> None:
    rows: list[int] = []
    for used in (vectors.ADD, with_line(vectors.ADD, "against none")):
        path = write(tmp_path, vectors.fit(), used)
        rows.append(str(mechdsl.plan(path, models=models())).count("against random"))
    assert rows[0] > 0
    assert rows[1] == 0


def test_automatic_control_is_named_in_json_text_html_and_records(tmp_path: Path) -> None:
    path = write(tmp_path, vectors.fit(), vectors.ADD)
    results = run(path, fit=True)
    (found,) = results.files[0].experiments
    document = json.loads(results.to_json())
    null = document["files"][0]["experiments"][0]["cells"][0]["measures"][0]["null"]
    assert (null["kind"], null["draws"]) == ("random", 8)
    assert " random " in results.to_text()
    assert "random: range of 8 draws of random directions" in results.to_text()
    assert "random: range of 8 draws" in found._repr_html_()
    (row,) = found.records()
    assert row["null_kind"] == "random"


# --- measured training rows -----------------------------------------------------------------------

TRAINED: dict[str, tuple[ModuleType, str, str]] = {
    "rotation": (rotations, rotations.PATCHES, "basis d"),
    "vector": (vectors, vectors.ADD, "direction v"),
    "scales": (scales, scales.SCALED, "direction s"),
    "mask": (masks, masks.PATCHES, "group g"),
    "dictionary": (dictionaries, dictionaries.ABLATES, "basis f"),
    "lens": (
        lenses,
        lenses.experiment(lenses.SEEN, measure="measure logprob(answer) as raw"),
        "lens l",
    ),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_measured_training_rows_are_reported_in_json_text_and_html(
    kind: str, tmp_path: Path
) -> None:
    module, used, name = TRAINED[kind]
    used = used.replace("prompts second", "prompts p").replace("from turned", "from other")
    line = module.fit(options=f"{module.QUICK}, measure_on_training_rows: true")
    results = run(write(tmp_path, line, used), fit=True)
    (found,) = results.files[0].experiments
    said = "4 of the 4 rows measured here are training rows"
    (document,) = json.loads(results.to_json())["files"][0]["experiments"]
    assert said in found.conventions[name]
    assert said in document["conventions"][name]
    for text in (results.to_text(), found._repr_html_()):
        assert said in " ".join(text.replace("&#x27;", "'").split())
