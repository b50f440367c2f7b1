"""Tuned lenses that a file declares with `lens l = fit(tuned_lens, …)`.

Loss, gradient and trainings are compared with autograd on the bare model in float64, one unpadded
prompt at a time. Further tests: use in observations, equal to a lens in a file; keys; errors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.execute.training import RowVectors
from mechdsl.fits.lenses import LensLoss, LensMaps
from mechdsl.fits.reports import LensReport
from mechdsl.forward.packed.unembedding import ModelUnembedding
from mechdsl.pipeline.trained_files import fits_of_file

from ..execute.support import shared
from ..quick import in_turn, some
from ..rules.models import double
from ..rules.support import plain, rows, tokens
from ..rules.test_observations import end_of
from .test_streamed_trainings import COUNT, write_file
from .test_trained_dictionaries import assert_same_results, check_keys, models, run, train, write
from .test_trained_rotations import OTHER, checked, interrupt_training, training_errors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("gpt2", "llama", "gpt_neox", "gemma2")
WHOLE = 1000
"""A batch size that covers all vectors, so that their order doesn't matter."""
QUICK = f"steps: 6, batch: {WHOLE}, rate: 0.02, validation: 25%"
EVERY = "resid_post layer * at tokens *"
SEEN = "observe tuned_lens(l) resid_post layer * at last token"


def fit(
    options: str = QUICK, *, at: str = EVERY, prompts: str = "p", inner: str = "tuned_lens"
) -> str:
    return f"lens l = fit({inner}, prompts: {prompts}, {options}) at {at}\n"


def experiment(*lines: str, name: str = "e", block: str = "second", measure: str = "") -> str:
    given = ("model m", f"prompts {block}", *lines, measure)
    body = "".join(f"  {line}\n" for line in given if line)
    return f"experiment {name} {{\n{body}  stats bootstrap(100) correct none\n}}\n"


SEES = experiment(SEEN)


def maps(found: mechdsl.TrainedFit) -> dict[str, Tensor]:
    return load_file(found.folder / "lens.safetensors")


def report(found: mechdsl.TrainedFit) -> LensReport:
    assert isinstance(found.report, LensReport)
    return found.report


# --- the loss -------------------------------------------------------------------------------------


def log_probabilities(family: str, vectors: Tensor) -> Tensor:
    """[vector, vocab] from the modules of the bare model, with gradients."""
    norm, head = end_of(family)
    logits = head(norm(vectors[None]))[0]
    cap = double(family).config.to_dict().get("final_logit_softcapping")
    return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)


def reference_vectors(family: str, ids: list[int], layer: int, at: str, name: str) -> Tensor:
    """[vector, width] of unpadded prompts."""
    texts = [rows(name)[row] for row in ids]
    return torch.cat(
        [plain(family, text)["resid_post", layer][tokens(text, at)].flatten(1) for text in texts]
    ).double()


def distributions(family: str, ids: list[int], at: str, name: str) -> Tensor:
    """[vector, vocab] log probabilities of the bare model's output."""
    texts = [rows(name)[row] for row in ids]
    return torch.cat(
        [plain(family, text).logits[tokens(text, at)] for text in texts]
    ).double().log_softmax(-1)  # fmt: skip


def reference_kl(family: str, wanted: Tensor, vectors: Tensor, weight: Any, bias: Any) -> Tensor:
    made = log_probabilities(family, vectors + vectors @ weight.T + bias)
    return (wanted.exp() * (wanted - made)).sum(1).mean()


@pytest.mark.parametrize("family", HERE)
@pytest.mark.parametrize("restarts", [True, False])
def test_lens_loss_and_gradient_equal_autograd(family: str, restarts: bool) -> None:
    model = replace(shared(double(family)), restartable=restarts)
    ids, layers = [0, 1, 2, 3], (0, 1)
    own = [reference_vectors(family, ids, layer, "tokens *", "clean") for layer in layers]
    last = reference_vectors(family, ids, 2, "tokens *", "clean")
    wanted, width = distributions(family, ids, "tokens *", "clean"), last.shape[1]
    random = torch.Generator().manual_seed(1)
    lens = LensMaps(width, layers, torch.device("cpu"))
    for name, value in lens.parameters.items():
        drawn = torch.randn(value.shape, generator=random, dtype=torch.float64) * 0.3
        lens.parameters[name] = drawn.requires_grad_()
    mine = LensLoss(lens, ModelUnembedding(model).differentiable_logits)
    found = mine.loss(torch.cat(own, 1), last, 0, 0.0)
    leaves = list(lens.parameters.values())
    each = [
        reference_kl(family, wanted, vectors, *lens.of(layer))
        for layer, vectors in zip(layers, own, strict=True)
    ]
    expected = torch.stack(each).sum()
    assert torch.allclose(found, expected, atol=1e-6)
    slopes = torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)
    for theirs, ours in zip(*slopes, strict=True):
        assert torch.allclose(theirs, ours, atol=1e-6)
        assert ours.abs().max() > 1e-3
    held = mine.divergences(torch.cat(own, 1), last)
    assert torch.allclose(held, torch.stack(each).double(), atol=1e-6)


# --- trainings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "at"), in_turn(HERE, ("tokens *", "last token", "subject tokens", "cue token"))
)
def test_lens_training_equals_a_reference_loop(family: str, at: str, tmp_path: Path) -> None:
    """Six steps of Adam over all vectors of a corrupted run, with one row held out."""
    line = fit(f"{QUICK}, seed: 3", at=f"resid_post layer * at {at}", prompts="other of p")
    path = write(tmp_path, line, SEES)
    (found,) = train(path, family)
    (declared,) = fits_of_file(checked(path, double(family))).values()
    table = declared.training.sample.table
    order = sorted(range(4), key=lambda n: stable_hash(3, "training row", table.row_keys[n]))
    held, *used = [table.row_ids[row] for row in order]
    own, said = maps(found), report(found)
    assert sorted(own) == [f"layer.{n}.{part}" for n in (0, 1) for part in ("bias", "weight")]
    assert (said.rows, said.held_out_rows, said.steps, said.layers) == (3, 1, 6, [0, 1])
    wanted = distributions(family, used, at, "other")
    held_out = distributions(family, [held], at, "other")
    assert (said.vectors, said.held_out_vectors) == (len(wanted), len(held_out))
    for number, layer in enumerate(said.layers):
        vectors = reference_vectors(family, used, layer, at, "other")
        expected = reference_training(family, wanted, vectors)
        for part, value in zip(("weight", "bias"), expected, strict=True):
            mine = own[f"layer.{layer}.{part}"].double()
            assert (mine - value).norm() < 0.05 * value.norm()
        vectors = reference_vectors(family, [held], layer, at, "other")
        after = reference_kl(family, held_out, vectors, *expected)
        before = reference_kl(family, held_out, vectors, 0 * expected[0], 0)
        assert said.untrained[number] == pytest.approx(before.item(), abs=1e-4)
        assert said.trained[number] == pytest.approx(after.item(), abs=5e-3)
    average = wanted.exp().mean(0).log()
    away = (held_out.exp() * (held_out - average)).sum(1).mean()
    assert said.average == pytest.approx(float(away), abs=1e-4)


def reference_training(family: str, wanted: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    width = vectors.shape[1]
    given = [torch.zeros(width, width).double(), torch.zeros(width).double()]
    moments = [(torch.zeros_like(own), torch.zeros_like(own)) for own in given]
    for step in range(6):
        leaves = [own.clone().requires_grad_() for own in given]
        slopes = torch.autograd.grad(reference_kl(family, wanted, vectors, *leaves), leaves)
        rate = 0.02 * min(1.0, (1 - step / 6) / 0.2)
        for number, slope in enumerate(slopes):
            first, second = moments[number]
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            size = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            given[number] = given[number] - rate * first / (1 - 0.9 ** (step + 1)) / size
            moments[number] = first, second
    return given[0], given[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_lens_training_vectors_of_all_layers_equal_hooks(side: Any, tmp_path: Path) -> None:
    """In ragged batches, padded on either side, in chunks of one row."""
    path = write(tmp_path, fit(), SEES)
    model = shared(double("gpt2"))
    (declared,) = fits_of_file(checked(path, double("gpt2"))).values()
    whole = RowVectors(declared.training, model, 0, side, chunk_bytes=1)
    table = declared.training.sample.table
    for number, row in enumerate(whole.rows[1:].tolist()):
        inputs, targets = whole.chunk(number)
        every = [
            reference_vectors("gpt2", [table.row_ids[row]], layer, "tokens *", "clean").float()
            for layer in range(3)
        ]
        assert torch.allclose(inputs, torch.cat(every[:2], 1), atol=1e-4)
        assert torch.allclose(targets, every[2], atol=1e-4)


@pytest.mark.slow
def test_lens_training_lowers_the_divergence(tmp_path: Path) -> None:
    options = "steps: 100, batch: 8, rate: 0.01, validation: 0%"
    (found,) = train(write(tmp_path, fit(options), SEES))
    said = report(found)
    assert (said.held_out_rows, said.held_out_vectors) == (0, 0)
    for before, after in zip(said.untrained, said.trained, strict=True):
        assert after < 0.4 * min(before, said.average)


def test_tuned_lens_without_steps_equals_the_logit_lens(tmp_path: Path) -> None:
    line = fit("steps: 0")
    text = SEES + experiment(SEEN.replace("tuned_lens(l)", "logit_lens"), name="plain")
    path = write(tmp_path, line, text)
    (found,) = train(path)
    assert report(found).trained == report(found).untrained
    tuned, plainly = run(path).files[0].experiments
    assert (tuned.measures[0].patched == plainly.measures[0].patched).all()


# --- use in observations --------------------------------------------------------------------------

MEASURE = "measure prob(answer) as raw"
USES = {
    "sweep": ("", [SEEN.replace("last token", "right token, last token")], MEASURE),
    "alone": ("", [f"{SEEN} top 2 as seen"], ""),
    "last layer": ("", [SEEN.replace("*", "2")], MEASURE),
    "other run": ("", [SEEN.replace("layer *", "layer * of turned")], MEASURE),
    "after rules": (
        "",
        ["for c in [0, 2] { add c * u to resid_post layer 0 at last token }", f"{SEEN} as seen"],
        "measure logit(answer) as delta",
    ),
    "derived": (
        "",
        [
            "run changed { ablate mlp_out layer 0 at tokens * with zero }",
            "from changed into clean",
            "patch layer 1 head * at last token",
            SEEN.replace("layer *", "layer 1"),
        ],
        "measure logit(answer) as delta",
    ),
}
DIRECTION = "direction u = mean(p) at resid_post layer 0 at last token\n"


@pytest.mark.parametrize("name", some(USES, [*USES][::2]))
def test_trained_lens_in_observations_equals_its_saved_file(name: str, tmp_path: Path) -> None:
    """Up to rounding, with a second experiment on the same block."""
    _, lines, measure = USES[name]
    text = DIRECTION + experiment(*lines, measure=measure) + OTHER
    path = write(tmp_path, fit(), text)
    (trained,) = train(path, out=tmp_path)
    card = (tmp_path / "l" / "README.md").read_text("utf-8")
    assert card.startswith("# l: tuned lens of 2 layers")
    assert f"layer 1: {report(trained).untrained[1]:.4f} →" in card
    own = run(path, fresh=True).files[0].experiments
    file = text.replace("tuned_lens(l)", 'tuned_lens("l/lens.safetensors")')
    loaded = run(write(tmp_path, file), store=False).files[0].experiments
    assert len(own) == len(loaded) >= 2
    assert_same_results(own, loaded)
    if name == "sweep":
        said = own[0].conventions["lens l"]
        assert "4 rows of p at tokens *, 1 of them held out" in said
        assert f"layer 0 {report(trained).untrained[0]:.4g} → " in said


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "steps": {"options": QUICK.replace("6", "7")},
    "batch": {"options": QUICK.replace(f"{WHOLE}", "4")},
    "rate": {"options": QUICK.replace("0.02", "0.03")},
    "seed": {"options": f"{QUICK}, seed: 1"},
    "limit": {"options": f"{QUICK}, limit: 3"},
    "validation": {"options": QUICK.replace("25%", "0%")},
    "layers": {"at": "resid_post layer 1 at tokens *"},
    "position": {"at": "resid_post layer * at last token"},
    "run": {"prompts": "other of p"},
}


def test_lens_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    """A different argument needs another training and gives other maps."""
    used = experiment(SEEN.replace("*", "1"))
    _, folders = check_keys(
        tmp_path,
        trains_all,
        fit,
        CHANGES,
        used,
        lambda own: {name: each.tolist() for name, each in maps(own).items()},
    )
    (family,) = train(write(tmp_path, fit(), used), "gpt2")
    assert family.folder.name not in {each.name for each in folders}


@pytest.mark.slow
def test_lens_key_ignores_names_and_observed_layers(tmp_path: Path) -> None:
    (before,) = train(write(tmp_path, fit(), SEES))
    for parts in (
        (fit().replace("lens l", "lens k"), SEES.replace("(l)", "(k)")),
        (fit(), OTHER, SEES.replace("layer *", "layer 0")),
        (fit(f"{QUICK}, measure_on_training_rows: true"), SEES),
    ):
        path = write(tmp_path, *parts)
        (found,) = train(path)
        assert (found.folder, found.seconds) == (before.folder, 0.0)
        assert run(path).complete


def test_lens_observations_depend_on_the_training(tmp_path: Path) -> None:
    """Two trainings in one store, used by consecutive runs."""
    seen: list[Any] = []
    for options in (QUICK, QUICK.replace("0.02", "0.05"), QUICK):
        path = write(tmp_path, fit(options), experiment(SEEN, measure=MEASURE))
        train(path)
        seen.append(run(path).files[0].experiments[0].measures[0].patched)
    assert abs(seen[0] - seen[1]).max() > 1e-6
    assert (seen[0] == seen[2]).all()


# --- missing trainings, and errors ----------------------------------------------------------------


def test_missing_lens_training_affects_only_dependent_experiments(tmp_path: Path) -> None:
    path = write(tmp_path, fit(), SEES, OTHER)
    with pytest.warns(mechdsl.MechdslWarning, match="isn't trained"):
        found = run(path).files[0]
    assert [each.name for each in found.experiments] == ["control"]
    assert {each.name for each in run(path, fit=True).files[0].experiments} == {"e", "control"}


def test_plan_and_explain_work_before_a_lens_training(tmp_path: Path) -> None:
    path = write(tmp_path, fit(), SEES)
    assert mechdsl.plan(path, models=models()) is not None
    text = str(mechdsl.explain(path, models=models()))
    assert "lens l: tuned lens of 2 layers trained on 4 rows of p at tokens *" in text


def test_damaged_lens_file_is_trained_again(tmp_path: Path) -> None:
    path = write(tmp_path, fit(), SEES)
    (found,) = train(path)
    weights = found.folder / "lens.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-8])
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path)
    train(path)
    assert weights.read_bytes() == before


def test_interrupted_lens_training_resumes_with_the_same_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next training resumes from the checkpoint and ends with the same maps."""
    path = write(tmp_path, fit(f"{QUICK}, patience: 9"), SEES)
    (whole,) = train(path)
    expected = (whole.folder / "lens.safetensors").read_bytes()
    interrupt_training(path, whole.folder, monkeypatch)
    (found,) = train(path, fresh=True)
    assert (found.folder / "lens.safetensors").read_bytes() == expected


def test_measuring_training_rows_of_a_lens_is_rejected(tmp_path: Path) -> None:
    used = experiment(SEEN, block="p")
    with pytest.raises(mechdsl.MechdslError, match="measures rows that `l` is trained on") as found:
        train(write(tmp_path, fit(), used))
    assert found.value.diagnostics[0].code == "E0345"
    allowed = write(tmp_path, fit(f"{QUICK}, measure_on_training_rows: true"), used)
    train(allowed)
    (done,) = run(allowed).files[0].experiments
    assert "4 of the 4 rows measured here are training rows" in done.conventions["lens l"]


LINE = fit("steps: 6")
MISTAKES: dict[str, tuple[str, str, str]] = {
    "no rows": ("prompts: p, ", "", "E0207"),
    "unknown rows": ("prompts: p", "prompts: q", "E0201"),
    "measure": ("steps: 6", "maximise: logit(answer)", "E0207"),
    "steps": ("steps: 6", "steps: -1", "E0342"),
    "option": ("tuned_lens,", "tuned_lens(layers: 2),", "E0207"),
    "other name": ("tuned_lens,", "logit_lens,", "E0203"),
    "empty call": ("tuned_lens,", "tuned_lens(),", "E0101"),
    "dictionary": ("tuned_lens,", "sae(features: 9, k: 2),", "E0342"),
    "basis": ("lens l", "basis l", "E0342"),
    "file": ("fit(tuned_lens, prompts: p, steps: 6)", 'saved("a", "b")', "E0342"),
    "no site": (f" at {EVERY}", "", "E0342"),
    "site": ("resid_post", "mlp_out", "E0342"),
    "last layer": ("layer *", "layer 2", "E0342"),
    "missing layer": ("layer *", "layer 9", "E0302"),
    "several positions": ("tokens *", "token -2..-1", "E0342"),
    "same name": ("lens l", "metric l = logit(answer)\nlens l", "E0202"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_lens_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code = MISTAKES[name]
    assert old in LINE
    path = write(tmp_path, LINE.replace(old, new), SEES)
    errors = training_errors(path)
    assert errors[0].code == code, errors


OBSERVED: dict[str, tuple[str, str]] = {
    "layer without a map": ("layer *", "E0207"),
    "unknown": ("tuned_lens(k)", "E0201"),
    "as a basis": ("ablate", "E0201"),
}


@pytest.mark.parametrize("name", OBSERVED)
def test_invalid_lens_observation_is_rejected(name: str, tmp_path: Path) -> None:
    text, code = OBSERVED[name]
    line = {"layer *": SEEN, "tuned_lens(k)": SEEN.replace("(l)", "(k)")}.get(text)
    used = experiment(line or "ablate resid_post layer 1 in basis l at last token with zero")
    path = write(tmp_path, fit(at="resid_post layer 1 at tokens *"), used)
    errors = training_errors(path)
    assert errors[0].code == code, errors


def test_lens_is_trained_on_streamed_rows(tmp_path: Path) -> None:
    """A lens trained on streamed records measures other rows."""
    path = write_file(tmp_path, fit("steps: 20, rate: 0.02", prompts="texts"), SEES)
    (found,) = train(path)
    said = report(found)
    assert said.rows + said.held_out_rows == COUNT
    assert all(after < before for before, after in zip(said.untrained, said.trained, strict=True))
    (done,) = run(path).files[0].experiments
    assert f"{COUNT} streamed rows of texts at tokens *" in done.conventions["lens l"]
    same = experiment(SEEN, block="texts")
    with pytest.raises(mechdsl.MechdslError) as refused:
        train(write_file(tmp_path, fit(prompts="texts"), same))
    assert {each.code for each in refused.value.diagnostics} == {"E0207"}
