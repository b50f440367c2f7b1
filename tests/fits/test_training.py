"""The training loop: interruptions, early stopping, chunks, and infinite losses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mechdsl.fits import training as fits_training
from mechdsl.fits.sparse_training import IDLE_STEPS
from mechdsl.fits.training import (
    Diverged,
    NotFinite,
    Training,
    TrainingSettings,
    TrainingState,
    assess,
    components_explain,
)
from mechdsl.program.activation_trainers import SparseAutoencoderTrainer

from ..memory import LiveTensors
from .test_sparse_training import CPU, SPARSITY, Fixed

STEPS = 60


class Chunks:
    """Vectors in several chunks."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts
        self.read: list[int] = []

    @property
    def chunks(self) -> int:
        return len(self.parts)

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        self.read.append(number)
        return self.parts[number], self.parts[number]


def vectors(seed: int, count: int = 100) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def training(
    kind: str, source: Any, patience: int | None = None, held_out: Tensor | None = None, **more: Any
) -> Training:
    options = {"features": 12, "kind": kind, **SPARSITY[kind]}
    model = SparseAutoencoderTrainer().start((8, 8), options, torch.Generator().manual_seed(0), CPU)
    usual: dict[str, Any] = {"steps": STEPS, "batch": 16, "rate": 0.01, "seed": 4}
    settings = TrainingSettings(**{**usual, **more}, patience=patience)
    held_out = vectors(9)[:0] if held_out is None else held_out
    return Training(model, source, (held_out, held_out), settings, lambda x, y: (x, y))


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", SPARSITY)
def test_interrupted_training_ends_with_the_same_weights(kind: str) -> None:
    """Bit for bit, after ten interruptions, with chunks and early stopping."""
    parts = vectors(1), vectors(2, 70), vectors(3, 20)
    whole = training(kind, Chunks(*parts), patience=30, held_out=vectors(7))
    whole.run(lambda step: None)
    random = torch.Generator().manual_seed(8)
    stops = sorted(torch.randperm(STEPS - 1, generator=random)[:10].add(1).tolist())
    kept: tuple[dict[str, float], dict[str, Tensor]] | None = None
    for stop in [*stops, STEPS + 1]:
        one = training(kind, Chunks(*parts), patience=30, held_out=vectors(7))
        if kept is not None:
            one.restore(TrainingState.read(*copy.deepcopy(kept)))

        def after(step: int, one: Training = one, stop: int = stop) -> None:
            if step == stop:
                state = one.capture()
                nonlocal kept
                kept = state.numbers(), state.tensors
                raise Stop

        if stop <= STEPS:
            with pytest.raises(Stop):
                one.run(after)
        else:
            one.run(after)
            for name, own in whole.model.weights().items():
                assert torch.equal(one.model.weights()[name], own), name
            assert one.state.step == whole.state.step == STEPS


def test_batches_have_every_vector_once_per_pass() -> None:
    """Each pass has a different order; chunks alternate."""
    seen: list[list[float]] = []
    numbered = [torch.arange(n, n + 32.0)[:, None].expand(32, 8).clone() for n in (0, 100)]

    class Recorded:
        def __init__(self) -> None:
            self.parameters = {"w": torch.zeros(1)}
            self.memory: dict[str, Tensor] = {}

        def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
            assert torch.equal(inputs, targets)
            if step == 8:  # the loss before or after the training, not of a step
                return self.parameters["w"].sum()
            assert progress == step / 8
            seen.append(inputs[:, 0].tolist())
            return self.parameters["w"].sum()

        def after_step(self) -> None:
            pass

        def weights(self) -> dict[str, Tensor]:
            return {}

    empty = torch.zeros(0, 8)
    settings = TrainingSettings(8, 16, 0.1, 0)
    one = Training(Recorded(), Chunks(*numbered), (empty, empty), settings, lambda x, y: (x, y))
    one.run(lambda step: None)
    passes = [sorted(seen[n] + seen[n + 1]) for n in range(0, 8, 2)]
    first, second = (sorted(part[:, 0].tolist()) for part in numbered)
    assert passes == [first, second, first, second]
    assert seen[0] + seen[1] not in (first, seen[4] + seen[5])


def test_fewer_vectors_than_a_batch_are_one_batch() -> None:
    one = training("topk", Fixed(vectors(1, 5)), steps=3)
    one.run(lambda step: None)
    assert one.state.step == 3


def test_early_stopping_keeps_the_best_weights() -> None:
    """On unrelated held-out vectors, training only increases the loss."""
    held_out = 100 + vectors(5)
    one = training("topk", Fixed(vectors(1)), patience=2, held_out=held_out, steps=400, rate=0.05)
    losses: dict[int, tuple[float, dict[str, Tensor]]] = {}

    def after(step: int) -> None:
        if step % 20 == 0:
            with torch.no_grad():
                memory = {name: own.clone() for name, own in one.model.memory.items()}
                loss = float(one.model.loss(held_out, held_out, step, 1.0))
                for name, own in one.model.memory.items():
                    own.copy_(memory[name])
            losses[step] = loss, one.model.weights()

    one.run(after)
    best = min(losses, key=lambda step: losses[step][0])
    assert one.state.stopped
    assert one.state.step == best + 40 < 400
    for name, own in one.model.weights().items():
        assert torch.equal(own, losses[best][1][name]), name


def test_infinite_loss_fails_the_training() -> None:
    broken = vectors(1)
    broken[50] = torch.nan
    one = training("relu", Fixed(broken))
    with pytest.raises(NotFinite, match="the loss isn't finite after"):
        one.run(lambda step: None)


def sample_loss(model: Any, own: Tensor, steps: int) -> float:
    with torch.no_grad():
        return float(model.loss(own, own, steps, 1 - 1 / steps))


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_training_with_a_rising_loss_reports_both_losses(kind: str) -> None:
    """Losses of the first vectors with the full penalty, before and after the training."""
    own = vectors(1)
    one = training(kind, Fixed(own), rate=30.0)
    before = sample_loss(training(kind, Fixed(own)).model, own[:16], STEPS)
    with pytest.raises(Diverged) as raised:
        one.run(lambda step: None)
    after = sample_loss(one.model, own[:16], STEPS)
    assert str(raised.value) == f"the loss rose from {before:.4g} to {after:.4g} in {STEPS} steps"
    assert after > before


@pytest.mark.parametrize(("end", "fails"), [(1.009, False), (1.011, True), (0.5, False)])
def test_loss_that_rises_by_up_to_one_percent_is_accepted(end: float, fails: bool) -> None:
    class Drifts:
        def __init__(self) -> None:
            self.parameters = {"w": torch.zeros(1)}
            self.memory: dict[str, Tensor] = {}
            self.steps = 0

        def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
            return self.parameters["w"].sum() * 0 + (end if self.steps else 1.0)

        def after_step(self) -> None:
            self.steps += 1

        def weights(self) -> dict[str, Tensor]:
            return {}

    empty = torch.zeros(0, 8)
    settings = TrainingSettings(1, 16, 0.1, 0)
    one = Training(Drifts(), Fixed(vectors(1)), (empty, empty), settings, lambda x, y: (x, y))
    if fails:
        with pytest.raises(Diverged, match=r"from 1 to 1\.011 in 1 step"):
            one.run(lambda step: None)
    else:
        one.run(lambda step: None)


def test_learning_rate_decays_in_the_last_fifth_of_the_steps() -> None:
    """The rate decays linearly to 0."""
    one = training("topk", Fixed(vectors(1)), steps=50)
    rates: list[float] = []
    optimiser = one._optimiser
    one.run(lambda step: rates.append(optimiser.param_groups[0]["lr"]))
    assert rates[:40] == [0.01] * 40
    assert rates[40:] == pytest.approx([0.01 * (50 - n) / 10 for n in range(40, 50)])


@pytest.mark.parametrize("most", [1024, 7])
def test_assessment_in_chunks_equals_its_definition(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or in chunks with different means and active features."""
    monkeypatch.setattr(fits_training, "MOST_ASSESSED", most)
    targets = vectors(2, 50).double()
    made = targets + 0.1 * vectors(3, 50)
    features = torch.zeros(50, 4)
    features[:25, 0], features[:, 2] = 1, 2
    sizes: list[int] = []

    def compute(rows: Tensor) -> tuple[Tensor, Tensor]:
        which = rows[:, 0].long()
        sizes.append(len(which))
        return features[which], made[which]

    found = assess(compute, torch.arange(50.0)[:, None], targets)
    assert max(sizes) == min(most, 50)
    assert sum(sizes) == 50
    spread = sum(float(((row - targets.mean(0)) ** 2).sum()) for row in targets)
    error = sum(float(((a - b) ** 2).sum()) for a, b in zip(targets, made, strict=True))
    assert found.explained == pytest.approx(1 - error / spread)
    assert (found.active, found.inactive) == (1.5, 2)


@pytest.mark.parametrize("most", [1024, 7])
def test_components_explain_equals_principal_components(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The explained share of new vectors, by principal components of other vectors."""
    monkeypatch.setattr(fits_training, "MOST_ASSESSED", most)
    mixed = vectors(1, 200) * torch.tensor([5, 3, 1, 1, 0.1, 0.1, 0.1, 0.1]) + 7
    new = vectors(2, 60) * torch.tensor([5, 3, 1, 1, 0.1, 0.1, 0.1, 0.1]) + 7
    values, axes = torch.linalg.eigh(torch.cov(mixed.double().T))
    assert values[-1] > values[-2]
    shifted = new.double() - mixed.double().mean(0)
    made = sum((shifted @ axes[:, n])[:, None] * axes[:, n] for n in (-1, -2))
    spread = (new.double() - new.double().mean(0)).square().sum()
    expected = 1 - (shifted - made).square().sum() / spread
    assert components_explain(mixed, new, 2) == pytest.approx(float(expected), abs=1e-6)
    few = mixed[:6]  # fewer vectors than dimensions: only their span counts
    centred = few.double() - few.double().mean(0)
    rows = torch.linalg.svd(centred, full_matrices=False)[2][:5]
    shifted = new.double() - few.double().mean(0)
    rest = (shifted - shifted @ rows.T @ rows).square().sum()
    assert components_explain(few, new, 5) == pytest.approx(float(1 - rest / spread), abs=1e-6)


def test_components_of_many_vectors_need_no_float64_copy() -> None:
    """For 200,000 vectors it needs a few megabytes; a copy would have 12.8."""
    many = vectors(1, 200_000)
    with LiveTensors() as live:
        components_explain(many, many, 2)
    assert live.largest < many.nbytes / 2


def test_evaluation_computes_features_batch_by_batch() -> None:
    """Also for the loss of all held-out vectors, which early stopping uses."""
    held_out = vectors(5, 70)
    one = training("relu", Fixed(vectors(1)), patience=9, held_out=held_out, steps=20)
    sizes: list[int] = []
    real = one.model.loss

    def loss(inputs: Tensor, *given: Any) -> Tensor:
        sizes.append(len(inputs))
        return real(inputs, *given)

    one.model.loss = loss  # pyright: ignore[reportAttributeAccessIssue]
    one.run(lambda step: None)
    assert max(sizes) == 16
    one.restore(one.capture())
    with torch.no_grad():
        expected = float(real(held_out, held_out, 20, 1.0))
    assert one._loss(held_out, held_out, 20, 1.0) == pytest.approx(expected, rel=1e-6)


# --- accumulated and bfloat16 batches -------------------------------------------------------------

SPLIT = ("topk", "relu", "jump_relu", "gated")
"""Kinds whose loss is a mean over vectors."""


def idle_from_the_start(one: Training, features: int) -> None:
    """Mark some features as never active, although they are active."""
    memory = one.model.memory["last_active"]
    memory[:features] = -IDLE_STEPS - STEPS


@pytest.mark.parametrize("kind", SPLIT)
def test_accumulated_batches_equal_one_large_batch(kind: str) -> None:
    """Includes features that are active in only one batch; the last batch is smaller."""
    steps = {}
    for batch, accumulate in ((64, 1), (16, 4), (24, 3)):
        one = training(
            kind, Chunks(vectors(1), vectors(2, 70)), batch=batch, accumulate=accumulate, steps=20
        )
        with torch.no_grad():
            one.model.parameters["W_enc"][:, 6:].mul_(0.01)  # seldom active
        idle_from_the_start(one, 12)
        one.run(lambda step: None)
        steps[batch] = one
    whole = steps[64]
    for name, own in whole.model.weights().items():
        assert torch.allclose(steps[16].model.weights()[name], own, atol=2e-5), name
    for name, own in whole.model.memory.items():
        assert torch.equal(steps[16].model.memory[name], own), name
    assert not torch.allclose(steps[24].model.weights()["W_dec"], whole.model.weights()["W_dec"])


def test_accumulation_over_few_vectors_uses_all_in_each_step() -> None:
    """If a step needs more vectors than there are, each step uses all."""
    own = Fixed(vectors(1, 40))
    parts, whole = (
        training("topk", own, accumulate=9, steps=5),
        training("topk", own, batch=40, steps=5),
    )
    for one in (parts, whole):
        one.run(lambda step: None)
    for name, expected in whole.model.weights().items():
        assert torch.allclose(parts.model.weights()[name], expected, atol=2e-5), name


@pytest.mark.parametrize("kind", SPARSITY)
def test_bfloat16_steps_keep_weights_in_float32(kind: str) -> None:
    """Gradients of the first step are close to float32, up to rounding of matrix products."""
    mixed = training(kind, Fixed(vectors(1)), mixed_on="cpu", steps=1)
    plain = training(kind, Fixed(vectors(1)), steps=1)
    seen: list[torch.dtype] = []
    real = mixed.model.loss

    def loss(*given: Any) -> Tensor:
        seen.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
        return real(*given)

    mixed.model.loss = loss  # pyright: ignore[reportAttributeAccessIssue]
    for one in (mixed, plain):
        one.run(lambda step: None)
    assert seen == [torch.float32, torch.bfloat16, torch.float32]  # before, a step, after
    moments = mixed.capture().tensors
    for name, own in mixed.model.parameters.items():
        moment = moments[f"exp_avg {name}"]
        expected = plain.capture().tensors[f"exp_avg {name}"]
        assert own.dtype == moment.dtype == torch.float32
        assert not torch.equal(moment, expected) or not expected.any(), name
        is_compared = kind in ("batch_topk", "matryoshka")  # other features may be active
        apart = 0.3 if is_compared else 0.03
        assert (moment - expected).norm() <= apart * expected.norm(), name
