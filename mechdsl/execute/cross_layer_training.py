"""Training of a cross-layer transcoder: its run, files and report.

It is written in the layout of circuit-tracer: the encoder, the biases and the thresholds of each
layer, the decoders of the features of each layer, and a configuration with the site that they read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.dictionaries.features import Dictionary, load_cross_decoder, load_dictionary
from mechdsl.dictionaries.folder import (
    CROSS_LAYER_CONFIG,
    read_cross_decoder,
    read_dictionary,
)
from mechdsl.execute.training import (
    Scaling,
    TrainingJob,
    hook_name,
    read_settings,
    report_amounts,
    start_generator,
)
from mechdsl.execute.training_vectors import TrainingVectors
from mechdsl.fits.factors import Solution
from mechdsl.fits.reports import CrossLayerReport
from mechdsl.fits.sparse_training import name_decoder, unscale_weights
from mechdsl.fits.training import Fit, Training, assess, components_explain
from mechdsl.program.activation_trainers import CrossLayerTrainer
from mechdsl.resolve.types import SitePoint, TrainedDictionary


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
    found = WrittenTranscoder.read(job.folder, len(layers)).assess(*measured)
    solution = Solution(model.weights(), loop.state.step, loop.state.stopped)
    report = CrossLayerReport(
        **report_amounts(vectors, loop.state, solution, len(held_out[0])),
        layers=list(layers),
        explained=[each.explained for each in found],
        active=[each.active for each in found],
        inactive=[each.inactive for each in found],
        untrained_explained=[each.explained for each in before],
        components_explained=_components_explain(vectors.chunk(0)[1], measured[1], found),
    )
    job.write_texts(vectors.texts(loop.state))
    job.write_card(report)
    return report


def _components_explain(trained_on: Tensor, targets: Tensor, found: Sequence[Fit]) -> list[float]:
    """Return, for each layer, the share of the variance that principal components explain, as many
    as features of this and earlier layers are active."""
    shares: list[float] = []
    active = 0.0
    parts = (own.chunk(len(found), dim=1) for own in (trained_on, targets))
    for own, wanted, fit in zip(*parts, found, strict=True):
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
        parts = (own.chunk(layers, dim=1) for own in (inputs, targets))
        return cls(tuple(Scaling.of(*own) for own in zip(*parts, strict=True)))

    def apply(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return centred and scaled vectors."""
        parts = (own.chunk(len(self.layers), dim=1) for own in (inputs, targets))
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
        found: list[dict[str, Tensor]] = []
        for layer, own in enumerate(self.layers):
            decoder = weights[name_decoder(layer)].unflatten(1, (count - layer, -1))
            given = {name: each[layer] for name, each in parts.items()}
            given |= {"W_enc": weights["W_enc"][layer], "W_dec": decoder[:, 0]}
            made = unscale_weights(given, own.centers, own.scales, subtracts_bias=False)
            factors = [own.scales[1] / later.scales[1] for later in self.layers[layer:]]
            made["W_dec"] = decoder * torch.tensor(factors).to(decoder)[:, None]
            found.append(made)
        return found


def write_cross_layer(
    folder: Path, layers: Sequence[Mapping[str, Tensor]], encoded: SitePoint, model: str
) -> None:
    """Write the tensors of `LayerScaling.unscale` and the configuration. Raises OSError.

    Args:
        encoded: The site that features of the first layer read.
        model: Name of the model.
    """
    for layer, tensors in enumerate(layers):
        own = {name: each for name, each in tensors.items() if name != "W_dec"}
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
                lambda own: self.reconstruct(own.chunk(count, dim=1), layer), inputs, wanted
            )

        return [of_layer(layer, own) for layer, own in enumerate(targets.chunk(count, dim=1))]
