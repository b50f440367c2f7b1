"""Trainings of dictionaries that read more than the vectors of one site: their runs and files.

Cross-layer transcoders read all layers. They are written in the layout of circuit-tracer: the
encoder, the biases and the thresholds of each layer, the decoders of the features of each layer,
and a configuration with the site that they read. Meta-SAEs read decoder directions of another
dictionary (Leask et al. 2025, arXiv 2502.04878). Factorizations, components and mixtures are
computed from all vectors together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from mechdsl.base.hashing import stable_hash
from mechdsl.dictionaries.features import (
    Dictionary,
    load_cross_decoder,
    load_dictionary,
    log_densities,
    mean_log_likelihood,
)
from mechdsl.dictionaries.folder import (
    CROSS_LAYER_CONFIG,
    DictionaryFile,
    read_cross_decoder,
    read_dictionary,
)
from mechdsl.execute.training import (
    DictionaryWriter,
    RowVectors,
    Scaling,
    TrainingJob,
    TrainingVectors,
    hook_name,
    read_settings,
    read_together,
    report_amounts,
    solve_twice,
    start_generator,
    train_dictionary,
)
from mechdsl.fits.correlations import pair_components
from mechdsl.fits.factors import NotFactored, Solution, fit_mixture, median_kurtosis, shuffle_axes
from mechdsl.fits.reports import (
    CorrelationReport,
    CrossLayerReport,
    DecoderReport,
    IndependenceReport,
    MixtureReport,
)
from mechdsl.fits.sparse_training import name_decoder, unscale_weights
from mechdsl.fits.training import (
    Fit,
    Training,
    TrainingState,
    assess,
    components_explain,
    principal_axes,
)
from mechdsl.program.activation_trainers import CrossLayerTrainer
from mechdsl.program.trainers import PairedTrainer
from mechdsl.resolve.trainings import FEWEST_ROWS, count_held_out
from mechdsl.resolve.types import SitePoint, TrainedDictionary
from mechdsl.resolve.types import Training as DeclaredTraining


def train_cross_layer(
    declared: TrainedDictionary, vectors: TrainingVectors, job: TrainingJob
) -> CrossLayerReport:
    """Train a cross-layer transcoder, and write it.

    Raises:
        NotFinite: The loss or a weight became NaN or infinite.
        Diverged: The loss rose.
        OSError: A file can't be written.
    """
    training = declared.training
    assert training is not None
    trainer, layers = training.trainer_of(CrossLayerTrainer), training.layers
    first = vectors.chunk(0)
    held_out = vectors.held_out()
    scaling = LayerScaling.of(*first, len(layers))
    with torch.enable_grad():
        widths, device = (declared.width_in, declared.width_out), first[0].device
        random = start_generator(training)
        model = trainer.start_layers(widths, len(layers), training.of_trainer, random, device)
        untrained = model.weights()
        settings = read_settings(training, device)
        loop = Training(model, vectors, held_out, settings, scaling.apply)
        job.run(loop)
    facts = training.encoded, str(job.facts.get("model_name", ""))
    write_cross_layer(job.start_folder, scaling.unscale(untrained), *facts)
    write_cross_layer(job.folder, scaling.unscale(model.weights()), *facts)
    measured = held_out if len(held_out[0]) else vectors.chunk(0)
    before = WrittenTranscoder.read(job.start_folder, len(layers)).assess(*measured)
    fits = WrittenTranscoder.read(job.folder, len(layers)).assess(*measured)
    solution = Solution(model.weights(), loop.state.step, loop.state.stopped)
    report = CrossLayerReport(
        **report_amounts(vectors, loop.state, solution, len(held_out[0])),
        layers=list(layers),
        explained=[fit.explained for fit in fits],
        active=[fit.active for fit in fits],
        inactive=[fit.inactive for fit in fits],
        untrained_explained=[fit.explained for fit in before],
        components_explained=_components_explain(vectors.chunk(0)[1], measured[1], fits),
    )
    job.write_texts(vectors.texts(loop.state))
    job.write_card(report)
    return report


def _components_explain(trained_on: Tensor, targets: Tensor, fits: Sequence[Fit]) -> list[float]:
    """Return, for each layer, the share of the variance that principal components explain, as many
    as features of this and earlier layers are active."""
    shares: list[float] = []
    active = 0.0
    parts = (tensor.chunk(len(fits), dim=1) for tensor in (trained_on, targets))
    for own, wanted, fit in zip(*parts, fits, strict=True):
        active += fit.active
        count = min(max(1, round(active)), own.shape[1])
        shares.append(components_explain(own.contiguous(), wanted.contiguous(), count))
    return shares


@dataclass(frozen=True, eq=False)
class LayerScaling:
    """Centres and factors of the vectors of each layer; the vectors of all layers are one after
    another."""

    layers: tuple[Scaling, ...]

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor, layers: int) -> LayerScaling:
        """Compute them from vectors, [vector, layers * width] each."""
        parts = (vectors.chunk(layers, dim=1) for vectors in (inputs, targets))
        return cls(tuple(Scaling.of(*own) for own in zip(*parts, strict=True)))

    def apply(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return centred and scaled vectors."""
        parts = (vectors.chunk(len(self.layers), dim=1) for vectors in (inputs, targets))
        scaled = [
            scaling.apply(own, wanted)
            for scaling, own, wanted in zip(self.layers, *parts, strict=True)
        ]
        read, written = zip(*scaled, strict=True)
        return torch.cat(read, dim=1), torch.cat(written, dim=1)

    def unscale(self, weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the tensors of each layer for vectors that are neither centred nor scaled, from
        those of `mechdsl.fits.sparse_training.start_layers`.

        Features are in units of the vectors of the first layer that they write to. `W_dec` is
        [feature, later layer, width], and `W_enc` is [width, feature].
        """
        count = len(self.layers)
        flat = ("b_enc", "b_dec", "threshold")
        parts = {name: weights[name].chunk(count) for name in flat if name in weights}
        tensors: list[dict[str, Tensor]] = []
        for layer, scaling in enumerate(self.layers):
            decoder = weights[name_decoder(layer)].unflatten(1, (count - layer, -1))
            given = {name: part[layer] for name, part in parts.items()}
            given |= {"W_enc": weights["W_enc"][layer], "W_dec": decoder[:, 0]}
            made = unscale_weights(given, scaling.centers, scaling.scales, subtracts_bias=False)
            factors = [scaling.scales[1] / later.scales[1] for later in self.layers[layer:]]
            made["W_dec"] = decoder * torch.tensor(factors).to(decoder)[:, None]
            tensors.append(made)
        return tensors


def write_cross_layer(
    folder: Path, layers: Sequence[Mapping[str, Tensor]], encoded: SitePoint, model: str
) -> None:
    """Write the tensors of `LayerScaling.unscale` and the configuration. Raises OSError.

    Args:
        encoded: The site that features of the first layer read.
        model: Name of the model.
    """
    for layer, tensors in enumerate(layers):
        own = {name: tensor for name, tensor in tensors.items() if name != "W_dec"}
        own["W_enc"] = own["W_enc"].T
        for file, content in (("W_enc", own), ("W_dec", {"W_dec": tensors["W_dec"]})):
            path = folder / f"{file}_{layer}.safetensors"
            save_file({f"{n}_{layer}": t.cpu().contiguous() for n, t in content.items()}, path)
            path.chmod(0o644)
    hook = hook_name(encoded)
    assert hook is not None
    config: dict[str, Any] = {
        "model_name": model,
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": hook.split(".", 2)[2],
        "feature_output_hook": "hook_mlp_out",
    }
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in config.items()]
    (folder / CROSS_LAYER_CONFIG).write_text("".join(lines), "utf-8")


@dataclass(frozen=True, eq=False)
class WrittenTranscoder:
    """A cross-layer transcoder in a folder, as observations read it."""

    encoders: Sequence[Dictionary]
    decoders: Sequence[Tensor]
    """[feature, later layer, width] of each layer."""

    @classmethod
    def read(cls, folder: Path, layers: int) -> WrittenTranscoder:
        """Read it. Raises UnreadableFile, ValueError."""
        files = [
            read_dictionary(folder, str(folder), transcodes=True, layer=layer)
            for layer in range(layers)
        ]
        return cls(
            [load_dictionary(file) for file in files],
            [
                load_cross_decoder(read_cross_decoder(file, layer, layers))
                for layer, file in enumerate(files)
            ],
        )

    def reconstruct(self, inputs: Sequence[Tensor], layer: int) -> tuple[Tensor, Tensor]:
        """Return the features of a layer, [vector, feature], and the reconstruction of the output
        of its MLP, [vector, width].

        Args:
            inputs: [vector, width] the vectors that each layer encodes.
        """
        bias = self.encoders[layer].tensor("b_dec")
        assert bias is not None
        made = bias.to(inputs[0]).expand(len(inputs[0]), -1)
        features = inputs[0]
        for earlier in range(layer + 1):
            features = self.encoders[earlier].encode(inputs[earlier])
            made = made + features @ self.decoders[earlier][:, layer - earlier].to(features)
        return features, made

    def assess(self, inputs: Tensor, targets: Tensor) -> list[Fit]:
        """Assess the reconstruction of each layer.

        Args:
            inputs: [vector, layers * width] vectors that are encoded.
            targets: [vector, layers * width] outputs of MLPs.
        """
        count = len(self.encoders)

        def of_layer(layer: int, wanted: Tensor) -> Fit:
            return assess(
                lambda tensor: self.reconstruct(tensor.chunk(count, dim=1), layer), inputs, wanted
            )

        return [of_layer(layer, tensor) for layer, tensor in enumerate(targets.chunk(count, dim=1))]


def train_components(
    declared: TrainedDictionary, vectors: RowVectors, job: TrainingJob
) -> IndependenceReport:
    """Compute independent components of all vectors, write them, and compare them with controls.

    Raises:
        NotFactored: The vectors have fewer components, or don't fit into memory together.
        OSError: A file can't be written.
    """
    untrained, trained = solve_twice(declared, vectors, job)
    writer = DictionaryWriter.of_solution(declared, job)
    tensors, _ = vectors.chunk(0)
    held_out, _ = vectors.held_out()
    measured = held_out if len(held_out) else tensors
    with torch.no_grad():
        random = writer.load(writer.write(job.start_folder, untrained.tensors)).encode(measured)
        system = writer.load(writer.write(job.folder, trained.tensors))
        coordinates = system.encode(measured)
        explained = writer.assess(job.folder, (measured, measured)).explained
        center, axes = principal_axes(tensors, declared.features)
        principal = (measured.double() - center) @ axes.T
    report = IndependenceReport(
        **report_amounts(vectors, TrainingState(), trained, len(held_out)),
        explained=explained,
        kurtosis=median_kurtosis(coordinates),
        untrained_kurtosis=median_kurtosis(random),
        components_kurtosis=median_kurtosis(principal),
    )
    job.write_card(report)
    return report


def train_mixture(
    declared: TrainedDictionary, vectors: RowVectors, job: TrainingJob
) -> MixtureReport:
    """Fit a mixture of Gaussians to all vectors, write it, and compare it with controls.

    Raises:
        NotFactored: There are too few different vectors, or they don't fit into memory together.
        OSError: A file can't be written.
    """
    untrained, trained = solve_twice(declared, vectors, job)
    writer = DictionaryWriter.of_solution(declared, job)
    writer.write(job.start_folder, untrained.tensors)
    writer.write(job.folder, trained.tensors)
    tensors, _ = vectors.chunk(0)
    held_out, _ = vectors.held_out()
    measured = held_out if len(held_out) else tensors
    found = trained.tensors
    weights = found["W_dec"], found["precision"], found["log_weights"]
    likely = log_densities(measured - found["b_dec"].to(measured), *weights).argmax(1)
    assert declared.training is not None
    random, steps = start_generator(declared.training), int(declared.training.options["steps"])
    single = fit_mixture(tensors, 1, declared.covariance, 1, random)
    report = MixtureReport(
        **report_amounts(vectors, TrainingState(), trained, len(held_out)),
        log_likelihood=mean_log_likelihood(measured, trained.tensors),
        untrained=mean_log_likelihood(measured, untrained.tensors),
        single=mean_log_likelihood(measured, single.tensors),
        shuffled=_shuffled_likelihood(declared, (tensors, held_out), steps, random),
        components=declared.features,
        empty=declared.features - len(likely.unique()),
    )
    job.write_card(report)
    return report


def _shuffled_likelihood(
    declared: TrainedDictionary, vectors: tuple[Tensor, Tensor], steps: int, random: Generator
) -> float:
    """Return the mean log likelihood of shuffled vectors under a mixture of shuffled vectors.

    Args:
        vectors: [vector, width] those of the training, and those that are held out; none of these:
            it is computed on the training vectors.
        steps: As in the training.
    """
    tensors, held_out = vectors
    _, axes = principal_axes(tensors, tensors.shape[1])
    tensors = shuffle_axes(tensors, axes, random)
    solution = fit_mixture(tensors, declared.features, declared.covariance, steps, random)
    measured = shuffle_axes(held_out, axes, random) if len(held_out) else tensors
    return mean_log_likelihood(measured, solution.tensors)


FEWEST_PAIRS = 3
"""Pairs of vectors from which a correlation can be computed."""


def train_correlated(
    declared: TrainedDictionary, vectors: RowVectors, job: TrainingJob
) -> CorrelationReport:
    """Compute correlated coordinates of two sets of vectors, write those of the first set, and
    compare them with controls.

    Raises:
        NotFactored: The vectors have fewer components, or don't fit into memory together.
        OSError: A file can't be written.
    """
    training = declared.training
    assert training is not None
    trainer, steps = training.trainer_of(PairedTrainer), int(training.options["steps"])
    tensors, other = read_together(vectors)
    held_out = vectors.held_out()
    measured = held_out if len(held_out[0]) else (tensors, other)
    if min(len(measured[0]), len(tensors)) < FEWEST_PAIRS:
        raise NotFactored(
            f"correlations need {FEWEST_PAIRS} held-out vectors, and there are {len(measured[0])}",
            "name more rows or tokens, or hold out more rows: `validation: 50%`",
        )
    given = training.of_trainer
    pair = trainer.solve(tensors, other, given, steps, start_generator(training))
    random = trainer.solve(tensors, other, given, 0, start_generator(training)).align(
        tensors, other
    )
    order = torch.randperm(len(other), generator=start_generator(training)).to(other.device)
    shuffled = trainer.solve(tensors, other[order], given, steps, start_generator(training))
    components = pair_components(tensors, other, declared.features)
    job.on_step(steps, steps)
    writer, solution = DictionaryWriter.of_solution(declared, job), pair.solution(tensors)
    writer.write(job.start_folder, random.solution(tensors).tensors)
    folder = writer.write(job.folder, solution.tensors)
    report = CorrelationReport(
        **report_amounts(vectors, TrainingState(), solution, len(held_out[0])),
        explained=writer.assess(folder, (measured[0], measured[0])).explained,
        correlations=tuple(pair.correlate(*measured).tolist()),
        training=float(pair.correlate(tensors, other).mean()),
        shuffled=float(shuffled.correlate(*measured).mean()),
        untrained=float(random.correlate(*measured).mean()),
        components=float(components.correlate(*measured).mean()),
        numbers=float((pair.own.encoder != 0).sum(0).double().mean()),
    )
    job.write_card(report)
    return report


NORMAL_FOLDER = "normal"
"""Folder of the control, next to that of the result."""


@dataclass(frozen=True, eq=False)
class DirectionVectors:
    """Directions as the vectors of a training; the first ones in a random order are held out."""

    declared: DeclaredTraining
    directions: Tensor
    """[vector, width] float32."""

    @cached_property
    def _order(self) -> Tensor:
        seed = stable_hash(self.declared.seed, "decoder directions") % 2**63
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.directions), generator=random)
        return order.to(self.directions.device)

    @property
    def held_out_count(self) -> int:
        """Number of directions that the training doesn't use."""
        return count_held_out(self.declared, len(self.directions))

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return 1

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the training directions, [vector, width] float32, twice."""
        direction = self.directions[self._order[self.held_out_count :]]
        return direction, direction

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return the other directions, as `chunk` does."""
        direction = self.directions[self._order[: self.held_out_count]]
        return direction, direction

    def amounts(self, state: TrainingState) -> tuple[int, int]:
        """Return the number of training directions, twice."""
        count = len(self.directions) - self.held_out_count
        return count, count

    def texts(self, state: TrainingState) -> None:
        """Return None: directions aren't texts."""
        return


def decoder_directions(file: DictionaryFile) -> Tensor:
    """Return [feature, width] float32 the decoder directions of a dictionary, of length 1 each;
    features whose decoder is 0 have none.

    Raises ValueError if the file has changed since it was read.
    """
    rows = load_dictionary(file).rows().float()
    lengths = rows.norm(dim=1, keepdim=True)
    active = lengths[:, 0] > 0
    return rows[active] / lengths[active]


def draw_normal(trained_on: Tensor, count: int, seed: int) -> Tensor:
    """Return [count, width]: normal vectors with the mean and the covariance of others, each scaled
    to length 1, as directions are.

    Args:
        trained_on: [vector, width].
        seed: Determines the vectors.
    """
    random = torch.Generator().manual_seed(stable_hash(seed, "normal directions") % 2**63)
    tensor = trained_on.double().cpu()
    center = tensor.mean(0)
    variances, axes = torch.linalg.eigh((tensor - center).T @ (tensor - center) / len(tensor))
    root = axes * variances.clamp_min(0).sqrt() @ axes.T  # unique, unlike the axes
    drawn = torch.randn(count, tensor.shape[1], generator=random, dtype=torch.float64)
    directions = center + drawn @ root
    return (directions / directions.norm(dim=1, keepdim=True)).to(trained_on)


def train_on_decoder(
    declared: TrainedDictionary, file: DictionaryFile, device: torch.device, job: TrainingJob
) -> DecoderReport:
    """Train a dictionary on decoder directions, and another one on normal vectors, its control.

    Raises:
        NotFinite: The loss or a weight became NaN or infinite.
        Diverged: The loss rose.
        NotFactored: There are fewer than two directions.
        OSError: A file can't be written.
        ValueError: The file of the dictionary has changed.
    """
    training = declared.training
    assert training is not None
    directions = decoder_directions(file).to(device)
    if len(directions) < FEWEST_ROWS:
        raise NotFactored(
            f"{len(directions)} of {file.features:,} features have a decoder that isn't 0",
            "name another dictionary",
        )
    direction_vectors = DirectionVectors(training, directions)
    normal = draw_normal(
        direction_vectors.chunk(0)[0], len(direction_vectors.directions), training.seed
    )
    first = replace(job, on_step=lambda done, steps: job.on_step(done, 2 * steps))
    control = replace(
        job,
        folder=job.checkpoints / NORMAL_FOLDER,
        checkpoints=job.checkpoints / f"{NORMAL_FOLDER}-checkpoint",
        on_step=lambda done, steps: job.on_step(steps + done, 2 * steps),
    )
    control.folder.mkdir(exist_ok=True)
    report = train_dictionary(declared, direction_vectors, first)
    chance = train_dictionary(declared, DirectionVectors(training, normal), control)
    decoder_report = DecoderReport(**asdict(report), normal_explained=chance.explained)
    job.write_card(decoder_report)
    return decoder_report
