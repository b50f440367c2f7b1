"""Cross-layer transcoders that a file declares with `fit(…)`: training against a plain loop, the
report, reading the folder again, graphs, and errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mechdsl
from mechdsl.execute.training import RowVectors
from mechdsl.fits.reports import CrossLayerReport
from mechdsl.pipeline.trained_files import fits_of_file, list_training_costs

from ..rules.support import plain, rows
from . import test_streamed_trainings as streamed
from .test_trained_dictionaries import (
    QUICK,
    adopted_for,
    assert_same_vectors,
    check_keys,
    checked,
    experiment,
    models,
    run,
    train,
    write,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
FAMILIES = ("gpt2", "llama", "gemma2")
FEATURES, K = 24, 4
CLT = f"cross_layer_transcoder(features: {FEATURES}, k: {K})"
KINDS = {
    "batch_topk": f"k: {K}",
    "relu": "penalty: 0.3",
    "jump_relu": "penalty: 0.3",
}
AT = "mlp_out layer * at tokens *"
GRAPH = "observe attribution_graph({}) logits at last token as explained"
USES = experiment(GRAPH.format("c"), measure="")
ALL = "steps: 1, batch: 4096, rate: 0.01, validation: 0%"


def fit(inner: str = CLT, options: str = QUICK, at: str = AT, name: str = "c") -> str:
    return f"basis {name} = fit({inner}, prompts: p, {options}) at {at}\n"


def inner_of(kind: str) -> str:
    return f'cross_layer_transcoder(features: {FEATURES}, {KINDS[kind]}, kind: "{kind}")'


# --- training -------------------------------------------------------------------------------------


def layer_vectors(family: str, texts: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of the MLP of each layer, [vector, width], one unpadded prompt at a
    time."""
    every = [plain(family, text) for text in texts]
    layers = range(adopted_for(family).shape.n_layers)

    def joined(site: str, layer: int) -> Tensor:
        return torch.cat([found[site, layer][:, 0] for found in every]).double()

    return [joined("mlp_norm", n) for n in layers], [joined("mlp_out", n) for n in layers]


class Reference:
    """A cross-layer transcoder in the units of a file, with a loop over layers and features."""

    def __init__(self, folder: Path) -> None:
        self.layers = len(list(folder.glob("W_enc_*.safetensors")))
        found = [load_file(folder / f"W_enc_{n}.safetensors") for n in range(self.layers)]

        def tensor(name: str, layer: int) -> Tensor:
            return found[layer][f"{name}_{layer}"].double()

        every = range(self.layers)
        self.encoders = [tensor("W_enc", n) for n in every]
        self.biases = [tensor("b_enc", n) for n in every]
        self.centers = [tensor("b_dec", n) for n in every]
        self.thresholds = [
            tensor("threshold", n) if f"threshold_{n}" in found[n] else torch.zeros(FEATURES)
            for n in every
        ]
        self.decoders = [
            load_file(folder / f"W_dec_{n}.safetensors")[f"W_dec_{n}"].double() for n in every
        ]

    def encode(self, inputs: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for n in range(self.layers):
            z = (inputs[n] @ self.encoders[n].T + self.biases[n]).clamp_min(0)
            found.append(z * (z > self.thresholds[n]))
        return found

    def reconstruct(self, inputs: list[Tensor]) -> list[Tensor]:
        codes, made = self.encode(inputs), list[Tensor]()
        for to in range(self.layers):
            own = self.centers[to].expand(len(inputs[0]), -1).clone()
            for of in range(to + 1):
                for feature in range(FEATURES):
                    own += codes[of][:, feature, None] * self.decoders[of][feature, to - of]
            made.append(own)
        return made


def scale_of(vectors: Tensor) -> tuple[Tensor, float]:
    """The mean, and the factor that makes the mean squared length the width."""
    mean = vectors.mean(0)
    size = (vectors - mean).square().sum(1).mean()
    return mean, float((vectors.shape[1] / size).sqrt())


def step_by_hand(
    start: Reference, inputs: list[Tensor], outputs: list[Tensor], kind: str
) -> dict[str, Tensor]:
    """One step of Adam from the weights of a folder, on all vectors in one batch, as a reference.

    Returns the weights of the file by their names. The weights at the start are those of the file,
    in units of centred and scaled vectors.
    """
    n, count = start.layers, len(inputs[0])
    read, made = [scale_of(own) for own in inputs], [scale_of(own) for own in outputs]
    x = [(own - mean) * size for own, (mean, size) in zip(inputs, read, strict=True)]
    y = [(own - mean) * size for own, (mean, size) in zip(outputs, made, strict=True)]
    encoders = [start.encoders[k] * made[k][1] / read[k][1] for k in range(n)]
    decoders = [
        torch.stack(
            [start.decoders[k][:, j] * made[k + j][1] / made[k][1] for j in range(n - k)], 1
        )
        for k in range(n)
    ]
    for own in decoders:
        assert torch.allclose(own.flatten(1).norm(dim=1), torch.ones(FEATURES).double())
    zero = [torch.zeros(FEATURES).double() for _ in range(n)]
    width = outputs[0].shape[1]
    centers = [torch.zeros(width).double() for _ in range(n)]
    limits = [torch.full((FEATURES,), 0.1).double() for _ in range(n)]
    leaves = [each.clone().requires_grad_() for each in (*encoders, *zero, *decoders, *centers)]
    e, b, d, c = (leaves[k * n : (k + 1) * n] for k in range(4))
    z = [(x[k] @ e[k].T + b[k]).clamp_min(0) for k in range(n)]
    least = 0.0
    if kind == "batch_topk":
        every = torch.cat([own.detach().flatten() for own in z]).sort(descending=True).values
        least = float(every[K * n * count - 1])
        codes = [own * (own >= least) for own in z]
    elif kind == "jump_relu":
        codes = [own * (own > limits[k]) for k, own in enumerate(z)]
    else:
        codes = z
    loss = torch.zeros(()).double()
    for to in range(n):
        total = c[to] + sum(codes[of] @ d[of][:, to - of] for of in range(to + 1))
        loss = loss + (y[to] - total).square().sum() / count
    loss.backward()  # penalties have no weight in the first step
    now = []
    for own in leaves:
        assert own.grad is not None
        # At the first step, Adam moves each number by the rate, in the direction of its gradient.
        now.append(own.detach() - 0.01 * own.grad / (own.grad.abs() + 1e-8))
    e, b, d, c = (now[k * n : (k + 1) * n] for k in range(4))
    found: dict[str, Tensor] = {}
    for k in range(n):
        rows_of = d[k] / d[k].flatten(1).norm(dim=1)[:, None, None]
        ratio = [made[k][1] / made[k + j][1] for j in range(n - k)]
        encoder = e[k] * read[k][1] / made[k][1]
        found[f"W_enc_{k}"] = encoder
        found[f"b_enc_{k}"] = b[k] / made[k][1] - encoder @ read[k][0]
        found[f"W_dec_{k}"] = rows_of * torch.tensor(ratio)[:, None]
        found[f"b_dec_{k}"] = c[k] / made[k][1] + made[k][0]
        if kind == "batch_topk":
            smallest = min(float(own[own > 0].detach().min()) for own in codes)
            found[f"threshold_{k}"] = torch.full((FEATURES,), smallest / made[k][1]).double()
    return found


@pytest.mark.parametrize(
    ("family", "kind"), [("gpt2", "batch_topk"), ("llama", "relu"), ("gemma2", "jump_relu")]
)
def test_first_step_of_a_cross_layer_transcoder_equals_a_plain_loop(
    family: str, kind: str, tmp_path: Path
) -> None:
    """The reference shares nothing but the random start; its vectors are those of plain hooks."""
    path = write(tmp_path, fit(inner_of(kind), ALL), USES)
    (found,) = train(path, family)
    table = next(iter(fits_of_file(checked(path, family)).values())).training.sample.table
    inputs, outputs = layer_vectors(family, [rows()[number] for number in table.row_ids])
    start = Reference(found.folder / "untrained")
    expected = step_by_hand(start, inputs, outputs, kind)
    close = 0
    for name, wanted in expected.items():
        file = name if name.startswith("W_dec") else f"W_enc_{name[-1]}"
        own = load_file(found.folder / f"{file}.safetensors")[name].double()
        assert own.shape == wanted.shape
        # A gradient near 0 has no certain sign, and Adam's first step is its sign.
        near = torch.isclose(own, wanted, atol=1e-5, rtol=1e-4)
        assert near.double().mean() > 0.99, name
        close += int(near.sum())
    assert close > 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_layer_vectors_equal_hooks_in_every_layer(family: str, tmp_path: Path) -> None:
    """In chunks of full rows, too; features read `mlp_norm`, and reconstruct `mlp_out`."""
    path = write(tmp_path, fit(options="steps: 1, validation: 0%"), USES)
    (declared,) = fits_of_file(checked(path, family)).values()
    whole = RowVectors(declared.training, adopted_for(family), 0, None)
    small = RowVectors(declared.training, adopted_for(family), 0, None, chunk_bytes=1)
    table = declared.training.sample.table
    texts = [rows()[number] for number in table.row_ids]
    expected = [torch.cat(own, dim=1).float() for own in layer_vectors(family, texts)]
    parts = [small.chunk(number) for number in range(small.chunks)]
    assert small.chunks == len(texts)
    for place, wanted in enumerate(expected):
        assert_same_vectors(whole.chunk(0)[place], wanted)
        assert_same_vectors(torch.cat([own[place] for own in parts]), wanted)


def test_cross_layer_report_equals_the_weights_of_the_folder(tmp_path: Path) -> None:
    """Each number of each layer, on held-out vectors from plain hooks."""
    path = write(tmp_path, fit(options=f"{QUICK}, validation: 25%"), USES)
    (found,) = train(path)
    (declared,) = fits_of_file(checked(path, "llama")).values()
    vectors = RowVectors(declared.training, adopted_for("llama"), 0, None)
    held = [rows()[vectors.declared.sample.table.row_ids[n]] for n in vectors.rows[:1]]
    inputs, outputs = layer_vectors("llama", held)
    report = found.report
    assert isinstance(report, CrossLayerReport)
    assert report.held_out_vectors == len(inputs[0])
    reference = Reference(found.folder)
    codes = reference.encode(inputs)
    for folder, shares in (
        (found.folder, report.explained),
        (found.folder / "untrained", report.untrained_explained),
    ):
        made = Reference(folder).reconstruct(inputs)
        for layer, wanted in enumerate(outputs):
            error = (wanted - made[layer]).square().sum()
            spread = (wanted - wanted.mean(0)).square().sum()
            assert shares[layer] == pytest.approx(float(1 - error / spread), abs=1e-3)
    for layer, own in enumerate(codes):
        assert report.active[layer] == pytest.approx(float((own > 0).double().sum(1).mean()))
        assert report.inactive[layer] == int((~(own > 0).any(0)).sum())
    trained_on = layer_vectors("llama", [
        rows()[vectors.declared.sample.table.row_ids[n]] for n in vectors.rows[1:]
    ])[1]  # fmt: skip
    for layer, wanted in enumerate(outputs):
        count = max(1, round(sum(report.active[: layer + 1])))
        mean = trained_on[layer].mean(0)
        axes = torch.linalg.svd(trained_on[layer] - mean, full_matrices=False)[2][:count]
        left = wanted - mean - (wanted - mean) @ axes.T @ axes
        spread = (wanted - wanted.mean(0)).square().sum()
        expected = float(1 - left.square().sum() / spread)
        assert report.components_explained[layer] == pytest.approx(expected, abs=1e-3)
    described = run(path).files[0].experiments[0].conventions["basis c[layer 1]"]
    assert f"layer 0 {report.explained[0]:.3f}, layer 1 {report.explained[1]:.3f}" in described


def test_cross_layer_transcoder_of_one_layer_equals_a_transcoder(tmp_path: Path) -> None:
    """The arithmetic of steps, in a model of one block."""
    from mechdsl.program.activation_trainers import CrossLayerTrainer, TranscoderTrainer

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    y = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    for kind, sparsity in {"batch_topk": {"k": 3}, "relu": {"penalty": 0.2}}.items():
        options = {"features": 12, "kind": kind, **sparsity}
        made: list[Any] = [
            trainer.start((8, 6), options, torch.Generator().manual_seed(0), torch.device("cpu"))
            for trainer in (TranscoderTrainer(), CrossLayerTrainer())
        ]
        for own in made:
            parameters = [each.requires_grad_() for each in own.parameters.values()]
            optimiser = torch.optim.Adam(parameters, lr=0.01)
            for step in range(3):
                optimiser.zero_grad()
                own.loss(x, y, step, 0.5).backward()
                optimiser.step()
                own.after_step()
        one, crossing = (own.weights() for own in made)
        assert torch.allclose(crossing["W_enc"][0], one["W_enc"], atol=1e-6)
        assert torch.allclose(crossing["W_dec_0"], one["W_dec"], atol=1e-6)
        for name in one.keys() - {"W_enc", "W_dec"}:
            assert torch.allclose(crossing[name], one[name], atol=1e-6), name


def test_inactive_features_of_a_cross_layer_transcoder_learn_the_residual() -> None:
    """The auxiliary loss, after 200 steps without activity, writes to the same later layers."""
    from mechdsl.program.activation_trainers import CrossLayerTrainer

    random = torch.Generator().manual_seed(0)
    options = {"features": 5, "k": 1}
    model: Any = CrossLayerTrainer().start_layers((3, 4), 2, options, random, torch.device("cpu"))
    x, y = torch.randn(6, 6, generator=random), torch.randn(6, 8, generator=random)
    w = model.tensors
    before = torch.cat([x[:, :3] @ w["W_enc"][0], x[:, 3:] @ w["W_enc"][1]], dim=1)
    least = before.clamp_min(0).flatten().sort(descending=True).values[2 * 6 - 1]
    kept = before * (before >= least)
    decoder = torch.zeros(10, 8)
    decoder[:5], decoder[5:, 4:] = w["W_dec_0"], w["W_dec_1"]
    idle = ~(kept > 0).any(0)
    assert 0 < int(idle.sum()) < 10
    rest = y - kept @ decoder
    aside = rest - (before.clamp_min(0) * idle) @ decoder
    expected = rest.square().sum(1).mean() + aside.square().sum(1).mean() / 32
    assert float(model.loss(x, y, 201, 0.5)) == pytest.approx(float(expected), rel=1e-5)


def test_streamed_cross_layer_transcoder_reads_all_layers(tmp_path: Path) -> None:
    """Each part has the vectors of all layers; the texts of a stream are those of its folder."""
    options = "steps: 12, batch: 16, rate: 0.01, validation: 25%"
    path = streamed.write_file(tmp_path, fit(options=options).replace("p,", "texts,"), USES)
    (found,) = train(path)
    report = found.report
    assert isinstance(report, CrossLayerReport)
    assert report.vectors == 12 * 16
    assert (found.folder / "texts.npy").is_file()
    assert all(0 < own <= FEATURES for own in report.active)
    (declared,) = fits_of_file(checked(path, "llama")).values()
    vectors = streamed.streamed(path, "llama", []).chunk(0)
    width = adopted_for("llama").shape.d_model
    assert [each.shape[1] for each in vectors] == [3 * width, 3 * width]
    assert len(declared.training.points) == 6


def test_cross_layer_training_in_bf16_is_near_that_in_fp32(tmp_path: Path) -> None:
    shares: list[list[float]] = []
    for precision in ("fp32", "bf16"):
        options = f'steps: 60, rate: 0.01, precision: "{precision}"'
        (found,) = train(write(tmp_path, fit(options=options), USES))
        assert isinstance(found.report, CrossLayerReport)
        shares.append(found.report.explained)
    np.testing.assert_allclose(shares[0], shares[1], atol=0.1)
    assert shares[0] != shares[1]


def test_interrupted_cross_layer_training_resumes_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechdsl.fits.training import Training

    path = write(tmp_path, fit(), USES)
    (whole,) = train(path)
    names = [each.name for each in whole.folder.glob("W_*")]
    expected = [(whole.folder / name).read_bytes() for name in names]
    real = Training._step  # pyright: ignore[reportPrivateUsage]

    def step(self: Any) -> None:
        if self.state.step == 7:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(Training, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(path, fresh=True)
    done: list[int] = []
    monkeypatch.setattr(
        Training, "_step", lambda self: (done.append(self.state.step), real(self))[1]
    )
    (found,) = train(path, fresh=True)
    assert done == [*range(7, 12)]
    assert [(found.folder / name).read_bytes() for name in names] == expected


def test_price_of_a_cross_layer_training_is_within_a_factor_of_two(tmp_path: Path) -> None:
    """FLOPs of 40 steps and of the report, counted by PyTorch, without passes of the model."""
    counts: list[tuple[float, float]] = []
    for steps in (10, 50):
        options = f"steps: {steps}, batch: 64, rate: 0.001"
        path = write(tmp_path, fit(options=options), USES)
        (price,) = list_training_costs(checked(path, "llama"))
        with FlopCounterMode(display=False) as counter:
            train(path)
        counts.append((price.cost.multiply_adds, counter.get_total_flops() / 2))
    (first, counted), (second, counted_more) = counts
    assert 0.5 < (second - first) / (counted_more - counted) < 2
    assert 0.5 < second / counted_more < 2


# --- use ------------------------------------------------------------------------------------------


def test_cross_layer_transcoder_in_graphs_equals_its_exported_folder(tmp_path: Path) -> None:
    """Scores, ablations, weights of edges, and observed features, in two experiments of a file."""
    cut = "observe graph_ablation(c) logits toward answer - wrong at last token top 3 as cut"
    text = [
        experiment(GRAPH.format("c"), name="graph", measure=""),
        experiment(cut, name="ablated", measure=""),
    ]
    path = write(tmp_path, fit(options="steps: 40, rate: 0.01"), *text)
    (found,) = train(path)
    own = run(path)
    copied = 'basis c = transcoder("copied") at mlp_out layer *\n'
    found.folder.rename(tmp_path / "copied")
    loaded = run(write(tmp_path, copied, *text), store=None)
    for one, two in zip(own.files[0].experiments, loaded.files[0].experiments, strict=True):
        for mine, theirs in zip(one.measures, two.measures, strict=True):
            np.testing.assert_array_equal(mine.patched, theirs.patched)
            assert np.isfinite(mine.patched).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_cross_layer_features_equal_hooks_in_every_layer(
    family: str, tmp_path: Path
) -> None:
    """Observed for all layers, and in groups of a graph that name the features of one layer."""
    value = "observe value mlp_out layer * feature * of c at last token as active"
    line = "observe graph_weight(c, from: {}) logits toward answer - wrong at last token as {}"
    text = [
        experiment(value, name="seen", measure=""),
        "group ranked = mlp_out layer 1 features top 3 of seen(layer: 1) of c\n",
        experiment(line.format("ranked", "found"), name="by_rank", measure=""),
    ]
    path = write(tmp_path, fit(inner_of("relu"), "steps: 30, rate: 0.01"), *text)
    (found,) = train(path, family)
    reference = Reference(found.folder)
    seen, by_rank = run(path, family).files[0].experiments
    values = seen.measures[0].patched.reshape(3, FEATURES, -1)
    for number, text_of_row in enumerate(rows("second")):
        inputs, _ = layer_vectors(family, [text_of_row])
        for layer, own in enumerate(reference.encode(inputs)):
            expected = own[text_of_row.last].numpy()
            np.testing.assert_allclose(values[layer, :, number], expected, atol=1e-4)
    assert np.ptp(values.mean(axis=2), axis=1).min() > 0.01
    best = np.argsort(-values[1].mean(axis=1))[:3]
    listed = ", ".join(map(str, best))
    text[1] = f"group ranked = mlp_out layer 1 features {listed} of c\n"
    named = run(write(tmp_path, fit(inner_of("relu"), "steps: 30, rate: 0.01"), *text), family)
    for one, two in zip(by_rank.measures, named.files[0].experiments[1].measures, strict=True):
        np.testing.assert_allclose(one.patched, two.patched, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cross_layer_transcoder_is_trained_and_read_back(
    kind: str, tmp_path: Path
) -> None:
    path = write(tmp_path, fit(inner_of(kind)), USES)
    (trained,) = train(path)
    assert trained.report.steps == 12
    assert trained.site == "L0.mlp_out + L1.mlp_out + L2.mlp_out"
    assert run(path).complete
    config = (trained.folder / "config.yaml").read_text("utf-8")
    assert 'feature_input_hook: "ln2.hook_normalized"' in config
    assert json.loads((trained.folder / "fit.json").read_text("utf-8"))["basis"] == "c"


CHANGES: dict[str, dict[str, str]] = {
    "features": {"inner": CLT.replace("24", "25")},
    "k": {"inner": CLT.replace("k: 4", "k: 5")},
    "kind": {"inner": inner_of("relu")},
    "steps": {"options": QUICK.replace("12", "13")},
    "rate": {"options": QUICK.replace("0.01", "0.02")},
    "seed": {"options": f"{QUICK}, seed: 1"},
    "validation": {"options": f"{QUICK}, validation: 50%"},
    "position": {"at": "mlp_out layer * at last token"},
}


def test_cross_layer_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    """A different argument needs another training and gives other weights."""

    def weights(found: mechdsl.TrainedFit) -> dict[str, list[float]]:
        files = sorted(found.folder.glob("W_*.safetensors"))
        return {n: t.tolist() for file in files for n, t in load_file(file).items()}

    check_keys(tmp_path, trains_all, lambda **own: fit(**own), CHANGES, USES, weights)


@pytest.mark.parametrize("lost", ["W_enc_1", "W_dec_0", "config"])
def test_damaged_cross_layer_transcoder_is_trained_again(lost: str, tmp_path: Path) -> None:
    path = write(tmp_path, fit(), USES)
    (first,) = train(path)
    (again,) = train(path)
    assert not again.seconds
    next(first.folder.glob(f"{lost}.*")).unlink()
    (found,) = train(path)
    assert found.seconds
    assert run(path).complete


def test_exported_cross_layer_transcoder_has_a_card(tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(write(tmp_path, fit(), USES), out=out)
    text = (out / "c" / "README.md").read_text("utf-8")
    assert text.startswith("# c: jumprelu cross-layer transcoder\n")
    assert '- `transcoder("FOLDER") at mlp_out layer *` reads it' in text
    assert text.count("  - layer ") == 3


# --- errors ---------------------------------------------------------------------------------------


def test_trained_cross_layer_features_in_rules_equal_their_exported_folder(tmp_path: Path) -> None:
    """Untrained, the rule is valid; its numbers depend on the decoders."""
    text = experiment("scale mlp_out layer * features * of c at tokens * by -2")
    path = write(tmp_path, fit(), text)
    errors = [e for e in mechdsl.validate(path, models()) if e.severity == "error"]
    assert not errors
    train(path, out=tmp_path)
    own = run(path, fresh=True).files[0].experiments
    path = write(tmp_path, 'basis c = transcoder("c") at mlp_out layer *\n', text)
    values = run(path).files[0].experiments[0].measures[0]
    np.testing.assert_allclose(values.patched, own[0].measures[0].patched, atol=1e-6)
    assert np.abs(values.patched - values.base).max() > 1e-3
    file = tmp_path / "c" / "W_dec_0.safetensors"
    save_file({"W_dec_0": 3 * load_file(file)["W_dec_0"]}, file)
    other = run(path).files[0].experiments[0].measures[0]
    assert np.abs(other.patched[0] - values.patched[0]).max() > 1e-3
    np.testing.assert_array_equal(other.patched[1:], values.patched[1:])


@pytest.mark.parametrize(
    ("basis", "used", "code", "said"),
    [
        (fit(at="mlp_out layer 1 at tokens *"), USES, "E0342", "has 1 layer of 3"),
        (fit(at="resid_post layer * at tokens *"), USES, "E0342", "the output of an MLP"),
        (fit(CLT.replace("k: 4", "penalty: 1")), USES, "E0342", "needs `k: …`"),
        (fit(CLT.replace(")", ', kind: "topk")')), USES, "E0342", "has no such kind"),
        (fit(CLT.replace(")", ", skip: true)")), USES, "E0207", "skip"),
        (fit(options=f"{QUICK}, accumulate: 2"), USES, "E0342", "whole batch"),
        (fit("clt(features: 24, k: 4)"), USES, "E0203", "cross_layer_transcoder"),
        (
            fit() + fit(name="d"),
            experiment(GRAPH.format("c, d"), measure=""),
            "E0342",
            "aren't of one cross-layer transcoder",
        ),
        (
            fit()
            + fit("transcoder(features: 8, k: 2)", at="mlp_out layer 1 at tokens *", name="t"),
            experiment(GRAPH.format("c, t"), measure=""),
            "E0342",
            "aren't of one cross-layer transcoder",
        ),
        (
            fit(),
            experiment("set mlp_out layer 1 at last token to reconstruction of c"),
            "E0342",
            "needs the features of all layers",
        ),
        (
            fit(),
            experiment("observe features of c at last token", measure=""),
            "E0342",
            "`observe value mlp_out layer * feature * of c at last token`",
        ),
        (
            fit(),
            experiment("observe value mlp_out layer * feature * of c at last token", measure="")
            + "group g = features top 3 of e of c\n"
            + experiment(
                "observe graph_weight(c, from: g) logits toward answer at last token as w",
                name="weighed",
                measure="",
            ),
            "E0620",
            "rank those of one, `e(layer: 0)`, and write `layer 0` before `features`",
        ),
        (
            fit() + 'group g = saved("none.json", c)\n',
            experiment("observe graph_ablation(c, features: g) logits toward answer", measure=""),
            "E0342",
            "none.json",
        ),
    ],
)
def test_wrong_use_of_a_cross_layer_transcoder_is_an_error_before_training(
    basis: str, used: str, code: str, said: str, tmp_path: Path
) -> None:
    problems = mechdsl.validate(write(tmp_path, basis, used), models())
    errors = [each for each in problems if each.severity == "error"]
    assert [each.code for each in errors] == [code], errors
    assert said in f"{errors[0].message} {errors[0].help_text}"


def test_untrained_cross_layer_transcoder_is_reported_once(tmp_path: Path) -> None:
    path = write(tmp_path, fit(), USES)
    with pytest.raises(mechdsl.MechdslError, match="`c` isn't trained"):
        run(path)
