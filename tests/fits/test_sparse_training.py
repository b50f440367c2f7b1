"""Training of sparse dictionaries: losses compared with formulas for single vectors, planted
features, and weights for vectors that are neither centred nor scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mechdsl.fits.sparse_training import IDLE_STEPS, SPARSE_KINDS, unscale_weights
from mechdsl.fits.training import Training, TrainingSettings
from mechdsl.program.activation_trainers import (
    DICTIONARY_KINDS,
    SparseAutoencoderTrainer,
    TranscoderTrainer,
)

from ..quick import some

SPARSITY: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
    "matryoshka": {"k": 3},
    "relu": {"penalty": 0.7},
    "jump_relu": {"penalty": 0.7},
    "gated": {"penalty": 0.7},
}
COMPARED = ("batch_topk", "matryoshka")
"""Kinds that compare the features of a whole batch."""
CPU = torch.device("cpu")


def start(kind: str, width: int, features: int, seed: int, *, transcodes: bool = False) -> Any:
    trainer = TranscoderTrainer() if transcodes else SparseAutoencoderTrainer()
    options = {"features": features, "kind": kind, **SPARSITY[kind]}
    assert trainer.check(options) is None
    random = torch.Generator().manual_seed(seed)
    return trainer.start((width, width), options, random, CPU)


def test_dictionary_kinds_and_sparse_kinds_are_the_same() -> None:
    assert list(DICTIONARY_KINDS) == list(SPARSE_KINDS) == list(SPARSITY)


# --- losses ---------------------------------------------------------------------------------------


def shaken(model: Any) -> dict[str, Tensor]:
    """Add random biases, and return the weights."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for own in model.tensors.values():
            own.add_(0.3 * torch.randn(own.shape, generator=random))
    return {name: own.clone().double() for name, own in model.tensors.items()}


def by_formula(kind: str, w: dict[str, Tensor], x: Tensor, y: Tensor, penalty: float) -> float:
    """The loss of a batch, one vector at a time."""
    total = 0.0
    before = [((one - w["b_dec"]) @ w["W_enc"]) for one in x]
    if kind in COMPARED:
        numbers = sorted(
            (max(0.0, float(v)) for row in before for v in row + w["b_enc"]), reverse=True
        )
        least = numbers[SPARSITY[kind]["k"] * len(x) - 1]
    for one, row in zip(y, before, strict=True):
        z = row + w.get("b_enc", torch.zeros(()).double())
        extra = 0.0
        match kind:
            case "topk":
                order = sorted(range(len(z)), key=lambda n: -float(z[n]))[: SPARSITY[kind]["k"]]
                f = torch.tensor([max(0.0, float(z[n])) * (n in order) for n in range(len(z))])
            case "batch_topk" | "matryoshka":
                f = torch.tensor([float(v) * (float(v) >= least and v > 0) for v in z])
            case "relu":
                f = torch.tensor([max(0.0, float(v)) for v in z])
                extra = penalty * float(f.sum())
            case "jump_relu":
                limits = w["log_threshold"].exp()
                f = torch.tensor([float(v) * bool(v > t) for v, t in zip(z, limits, strict=True)])
                extra = penalty * float((f > 0).sum())
            case _:
                gate = row + w["b_gate"]
                size = row * w["r_mag"].exp() + w["b_mag"]
                f = torch.tensor(
                    [max(0.0, float(s)) * bool(g > 0) for s, g in zip(size, gate, strict=True)]
                )
                gates = gate.clamp_min(0)
                alone = gates @ w["W_dec"] + w["b_dec"]
                extra = penalty * float(gates.sum()) + float((one - alone).square().sum())
        # With 10 features: a sixteenth of them, an eighth, a quarter, a half and all, rounded up.
        sizes = (1, 2, 3, 5, 10) if kind == "matryoshka" else (10,)
        made = [f.double()[:n] @ w["W_dec"][:n] + w["b_dec"] for n in sizes]
        total += sum(float((one - each).square().sum()) for each in made) / len(sizes) + extra
    return total / len(x)


@pytest.mark.parametrize("progress", [0.05, 0.5])
@pytest.mark.parametrize("kind", SPARSITY)
def test_sparse_dictionary_loss_equals_its_formula(kind: str, progress: float) -> None:
    """Penalties grow linearly to their full weight in the first tenth of the steps."""
    model = start(kind, 6, 10, 0)
    weights = shaken(model)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).double()
    penalty = SPARSITY[kind].get("penalty", 0.0) * min(1.0, progress / 0.1)
    found = float(model.loss(x.float(), x.float(), 0, progress))
    assert found == pytest.approx(by_formula(kind, weights, x, x, penalty), rel=1e-4)


def test_inactive_features_are_trained_on_the_residual() -> None:
    """After 200 steps without activity, a feature reconstructs the residual."""
    model = start("topk", 6, 10, 0)
    w = shaken(model)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        kept = torch.zeros_like(z)
        for n, row in enumerate(z):
            for feature in row.argsort(descending=True)[:3]:
                kept[n, feature] = row[feature].clamp_min(0)
    idle = torch.ones(10, dtype=torch.bool)
    idle[(kept > 0).any(0)] = False
    assert 0 < int(idle.sum()) < 10
    step = IDLE_STEPS + 1
    found = float(model.loss(x.float(), x.float(), step, 0.5))
    made = kept @ w["W_dec"] + w["b_dec"]
    rest = (z.clamp_min(0) * idle) @ w["W_dec"]
    expected = (x - made).square().sum(1).mean() + (x - made - rest).square().sum(1).mean() / 32
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in SPARSITY if kind not in COMPARED])
def test_sparse_dictionary_gradient_equals_finite_differences(kind: str) -> None:
    """Thresholds are excluded, as their gradients are estimates."""
    model = start(kind, 6, 10, 0)
    shaken(model)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    names = [name for name in model.tensors if name != "log_threshold"]
    for own in model.tensors.values():
        own.requires_grad_()
    model.loss(x, x, 0, 0.5).backward()
    for name in names:
        own = model.tensors[name]
        direction = own.grad.clone()
        if kind == "gated" and name in ("W_dec", "b_dec"):
            continue  # the gate's reconstruction uses a detached decoder
        length = float(direction.norm())
        with torch.no_grad():
            step = 1e-3 / length * direction
            own.add_(step)
            more = float(model.loss(x, x, 0, 0.5))
            own.sub_(2 * step)
            less = float(model.loss(x, x, 0, 0.5))
            own.add_(step)
        assert (more - less) / 2e-3 == pytest.approx(length, rel=0.1), name


# --- planted features -----------------------------------------------------------------------------


class Fixed:
    """All vectors in one chunk."""

    chunks = 1

    def __init__(self, inputs: Tensor, targets: Tensor | None = None) -> None:
        self.inputs, self.targets = inputs, inputs if targets is None else targets

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        assert number == 0
        return self.inputs, self.targets


def planted(seed: int) -> tuple[Tensor, Tensor]:
    """Directions [32, 20], and vectors that are sums of three of them and of a constant."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(32, 20, generator=random)
    directions /= directions.norm(dim=1, keepdim=True)
    which = torch.rand(6000, 32, generator=random).topk(3, dim=1).indices
    amounts = torch.zeros(6000, 32)
    amounts.scatter_(1, which, 0.5 + torch.rand(6000, 3, generator=random))
    return directions, amounts @ directions + torch.randn(20, generator=random)


RECOVERED = {"topk": 3, "batch_topk": 3, "relu": 0.5, "jump_relu": 1.0, "gated": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("seed", some(range(3), [0]))
@pytest.mark.parametrize("kind", some(RECOVERED, ["topk"]))
def test_sparse_dictionary_recovers_planted_features(kind: str, seed: int) -> None:
    """At least 90 % of them have a cosine of at least 0.95 with a trained one."""
    directions, vectors = planted(seed)
    option = "k" if kind.endswith("topk") else "penalty"
    options = {"features": 32, "kind": kind, option: RECOVERED[kind]}
    random = torch.Generator().manual_seed(seed)
    model = SparseAutoencoderTrainer().start((20, 20), options, random, CPU)
    center = vectors.mean(0)
    scale = float((20 / (vectors - center).square().sum(1).mean()).sqrt())
    settings = TrainingSettings(2000 if kind == "relu" else 1200, 256, 3e-3, seed)

    def scaled(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (inputs - center) * scale, (targets - center) * scale

    Training(model, Fixed(vectors), (vectors[:0], vectors[:0]), settings, scaled).run(
        lambda step: None
    )
    decoder = unscale_weights(
        model.weights(), (center, center), (scale, scale), subtracts_bias=True
    )["W_dec"]
    cosines = (directions @ decoder.T).max(1).values
    assert float((cosines >= 0.95).float().mean()) >= 0.9
    untrained = torch.randn(32, 20, generator=torch.Generator().manual_seed(seed + 9))
    untrained /= untrained.norm(dim=1, keepdim=True)
    assert float(((directions @ untrained.T).max(1).values >= 0.95).float().mean()) < 0.1


def test_first_features_of_a_matryoshka_dictionary_reconstruct_better() -> None:
    """On planted features, the first quarter of the dictionary has a smaller error than that of an
    equally large dictionary without prefixes."""
    _, vectors = planted(0)
    x = (vectors - vectors.mean(0)) / vectors.std()
    left: dict[str, float] = {}
    for kind in COMPARED:
        model = start(kind, 20, 32, 0)
        settings = TrainingSettings(150, 256, 3e-3, 0)
        Training(model, Fixed(x), (x[:0], x[:0]), settings, lambda a, b: (a, b)).run(
            lambda step: None
        )
        w = model.weights()
        z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        f = torch.where(z > w["threshold"], z, 0)[:, :8]
        error = x - f @ w["W_dec"][:8] - w["b_dec"]
        left[kind] = float(error.square().sum() / x.square().sum())
    assert left["matryoshka"] < 0.9 * left["batch_topk"], left


# --- weights for raw vectors ----------------------------------------------------------------------


@pytest.mark.parametrize("transcodes", [False, True])
@pytest.mark.parametrize("kind", SPARSITY)
def test_unscaled_weights_encode_raw_vectors(kind: str, transcodes: bool) -> None:
    """Unscaled weights encode raw vectors like the trained weights encode centred and scaled ones,
    in units of the raw vectors."""
    if transcodes and kind == "gated":
        pytest.skip("there are no gated transcoders")
    model = start(kind, 6, 10, 0, transcodes=transcodes)
    shaken(model)
    random = torch.Generator().manual_seed(1)
    x, center, other = (torch.randn(n, 6, generator=random) for n in (9, 1, 1))
    scale, made = 1.7, 1.7 if not transcodes else 0.6
    centers = center[0], center[0] if not transcodes else other[0]
    own = model.weights()
    found = unscale_weights(own, centers, (scale, made), subtracts_bias=not transcodes)
    u = (x - centers[0]) * scale
    f, w = encode(kind, own, u, not transcodes), encode(kind, found, x, not transcodes)
    assert torch.allclose(w, f / made, atol=1e-5)
    y = f @ own["W_dec"] + own["b_dec"]
    assert torch.allclose(w @ found["W_dec"] + found["b_dec"], y / made + centers[1], atol=1e-5)
    assert f.any()


@pytest.mark.parametrize("kind", ["topk", "jump_relu"])
def test_transcoder_skip_connection_adds_a_linear_map(kind: str) -> None:
    """Covers the loss and the reconstruction of raw vectors."""
    options = {"features": 10, "kind": kind, "skip": True, **SPARSITY[kind]}
    trainer, random = TranscoderTrainer(), torch.Generator().manual_seed(0)
    assert trainer.check(options) is None
    assert trainer.outline(options).skips
    model: Any = trainer.start((6, 6), options, random, CPU)
    assert not model.weights()["W_skip"].any()
    weights = shaken(model)
    x, y = torch.randn(7, 6, generator=random), torch.randn(7, 6, generator=random)
    skipped = x.double() @ weights["W_skip"].T
    plain = {**weights, "b_dec": torch.zeros(6).double()}
    rest = y.double() - skipped - weights["b_dec"]
    expected = by_formula(kind, plain, x.double(), rest, SPARSITY[kind].get("penalty", 0.0))
    assert float(model.loss(x, y, 0, 1.0)) == pytest.approx(expected, rel=1e-4)
    centers = torch.randn(6, generator=random), torch.randn(6, generator=random)
    found = unscale_weights(model.weights(), centers, (1.7, 0.6), subtracts_bias=False)
    u = (x - centers[0]) * 1.7
    own = model.weights()
    made = encode(kind, own, u, False) @ own["W_dec"] + own["b_dec"] + u @ own["W_skip"].T
    again = encode(kind, found, x, False) @ found["W_dec"] + found["b_dec"]
    again = again + x @ found["W_skip"].T
    assert torch.allclose(again, made / 0.6 + centers[1], atol=1e-5)


def encode(kind: str, w: dict[str, Tensor], x: Tensor, subtracts: bool) -> Tensor:
    """Features by the definition of the saved architecture."""
    z = (x - w["b_dec"] if subtracts else x) @ w["W_enc"]
    match kind:
        case "topk":
            top = (z + w["b_enc"]).topk(3, dim=1)
            return torch.zeros_like(z).scatter(1, top.indices, top.values.clamp_min(0))
        case "relu":
            return (z + w["b_enc"]).clamp_min(0)
        case "gated":
            size = (z * w["r_mag"].exp() + w["b_mag"]).clamp_min(0)
            return size * (z + w["b_gate"] > 0)
        case _:
            full = (z + w["b_enc"]).clamp_min(0)
            return full * (full > w["threshold"])
