"""Training of a declared dictionary or lens on activations: its run, files and checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from mechdsl.base.files import compute_digest, replace_file
from mechdsl.base.hashing import stable_hash
from mechdsl.base.runtime import delay_signals
from mechdsl.base.text import format_size
from mechdsl.dictionaries.features import Dictionary, load_dictionary
from mechdsl.dictionaries.folder import CONFIG_FILE, HOOK_SITES, WEIGHT_FILES, read_dictionary
from mechdsl.execute.training_vectors import RowVectors, TrainingVectors
from mechdsl.fits.factors import NotFactored, Solution
from mechdsl.fits.lenses import LensLoss, LensMaps, divergence_from_average
from mechdsl.fits.processes import own_processes
from mechdsl.fits.reports import CARD_FILE, LENS_FILE, FitReport, LensReport, TrainingReport
from mechdsl.fits.sparse_training import unscale_weights
from mechdsl.fits.training import (
    Fit,
    Training,
    TrainingSettings,
    TrainingState,
    assess,
    components_explain,
)
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.packed.unembedding import ModelUnembedding
from mechdsl.planner.training_cost import count_vector_numbers
from mechdsl.program.basis_methods import BFLOAT16
from mechdsl.program.trainers import IterativeTrainer, LensTrainer, SolvedTrainer
from mechdsl.resolve.trainings import UNTRAINED_FOLDER, write_texts
from mechdsl.resolve.types import SitePoint, TrainedDictionary, TrainedLens
from mechdsl.resolve.types import Training as DeclaredTraining

if TYPE_CHECKING:
    from mechdsl.resolve.trainings import TextDigests

STATE_FILES = ("state.json", "state.safetensors")
"""Files of a checkpoint."""


def read_settings(declared: DeclaredTraining, device: torch.device) -> TrainingSettings:
    """Return how long and how fast to train.

    Args:
        device: Where losses are computed.
    """
    options = declared.options
    return TrainingSettings(
        steps=int(options["steps"]),
        batch=int(options["batch"]),
        rate=float(options["rate"]),
        seed=declared.seed,
        patience=int(options["patience"]) if "patience" in options else None,
        accumulate=int(options["accumulate"]),
        mixed_on=device.type if options["precision"] == BFLOAT16 else None,
    )


def start_generator(declared: DeclaredTraining) -> Generator:
    """Return the source of random numbers of the parameters at the start."""
    return torch.Generator().manual_seed(stable_hash(declared.seed, "weights") % 2**63)


class Search(Protocol):
    """A search that can be continued."""

    @property
    def progress(self) -> tuple[int, int]:
        """Number of finished and of all steps."""
        ...

    def run(self) -> Iterator[None]:
        """Search, and yield after each step."""
        ...

    def capture(self) -> dict[str, Any]:
        """Return the state as JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises KeyError and ValueError."""
        ...


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """Where a training writes, and whom it tells."""

    folder: Path
    """An existing empty folder for the result."""
    facts: Mapping[str, Any]
    """What the card says besides the report, as JSON."""
    checkpoints: Path
    """Folder of the checkpoint, from which an interrupted training continues."""
    is_due: Callable[[], bool]
    """Whether a checkpoint is due after a step."""
    on_step: Callable[[int, int], None]
    """Called after a step with the finished and all steps."""

    def run(self, loop: Training) -> None:
        """Train to the end, from a checkpoint if there is one."""
        _restore(loop, self.checkpoints)

        with delay_signals() as deliver:

            def after_step(done: int) -> None:
                if own_processes().is_first and self.is_due():
                    _keep(loop, self.checkpoints)
                self.on_step(done, loop.settings.steps)
                deliver()

            try:
                loop.run(after_step)
            except KeyboardInterrupt:
                if own_processes().is_first and not loop.is_torn:
                    _keep(loop, self.checkpoints)
                raise

    def search(self, search: Search) -> None:
        """Search to the end, from a checkpoint if there is one."""
        path = self.checkpoints / STATE_FILES[0]
        with suppress(OSError, ValueError, KeyError, TypeError):
            search.restore(json.loads(path.read_text("utf-8")))

        def keep() -> None:
            with replace_file(path) as made:
                made.write_text(json.dumps(search.capture()), "utf-8")

        with delay_signals() as deliver:
            for _ in search.run():
                if self.is_due():
                    keep()
                try:
                    self.on_step(*search.progress)
                    deliver()
                except KeyboardInterrupt:
                    keep()
                    raise

    def write_tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file with tensors. Raises OSError."""
        content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(content, self.folder / file)
        (self.folder / file).chmod(0o644)

    @property
    def start_folder(self) -> Path:
        """The folder of what is trained as it is before the training, which is created."""
        folder = self.folder / UNTRAINED_FOLDER
        folder.mkdir(exist_ok=True)
        return folder

    def write_texts(self, digests: TextDigests | None) -> None:
        """Write the digests of texts that were read in parts, if there are any. Raises OSError."""
        if digests is not None:
            write_texts(self.folder, digests)

    def write_card(self, report: FitReport, file: str | None = None) -> None:
        """Write the card of a training, with the digest of a file of the folder. Raises OSError."""
        more = {} if file is None else {"sha256": compute_digest(self.folder / file)}
        card = json.dumps({**self.facts, **more, **asdict(report)}, indent=1) + "\n"
        (self.folder / CARD_FILE).write_text(card, "utf-8")


def train_dictionary(
    declared: TrainedDictionary,
    vectors: TrainingVectors,
    job: TrainingJob,
) -> TrainingReport:
    """Train a dictionary, and write it in the layout of SAELens.

    Raises:
        NotFinite: The loss or a weight became NaN or infinite.
        OSError: A file can't be written.
    """
    training = declared.training
    assert training is not None
    widths = declared.width_in, declared.width_out
    trainer = training.trainer_of(IterativeTrainer)
    first, first_targets = vectors.chunk(0)
    held_out = vectors.held_out()
    scaling = Scaling.of(first, first_targets)
    with torch.enable_grad():
        random = start_generator(training)
        model = trainer.start(widths, training.of_trainer, random, first.device)
        untrained = model.weights()
        settings = read_settings(training, first.device)
        loop = Training(model, vectors, held_out, settings, scaling.apply)
        job.run(loop)
    trained = Solution(model.weights(), loop.state.step, loop.state.stopped)
    finish = DictionaryWriter(declared, scaling, job.facts)
    weights = untrained, trained
    return _finish_dictionary(finish, vectors, held_out, weights, loop.state, job)


def solve_dictionary(
    declared: TrainedDictionary,
    vectors: RowVectors,
    job: TrainingJob,
) -> TrainingReport:
    """Compute a dictionary from all vectors together; otherwise as `train_dictionary`.

    Raises:
        NotFactored: The vectors have no such dictionary, or don't fit into memory together.
        OSError: A file can't be written.
    """
    untrained, trained = solve_twice(declared, vectors, job)
    finish = DictionaryWriter.of_solution(declared, job)
    weights, held_out = (untrained.tensors, trained), vectors.held_out()
    return _finish_dictionary(finish, vectors, held_out, weights, TrainingState(), job)


def solve_twice(
    declared: TrainedDictionary, vectors: RowVectors, job: TrainingJob
) -> tuple[Solution, Solution]:
    """Compute a dictionary from all vectors together: with no iterations, and with all of them.

    Raises NotFactored.
    """
    training = declared.training
    assert training is not None
    own, _ = read_together(vectors)
    trainer, steps = training.trainer_of(SolvedTrainer), int(training.options["steps"])
    untrained, trained = (
        trainer.solve(own, training.of_trainer, count, start_generator(training))
        for count in (0, steps)
    )
    job.on_step(steps, steps)
    return untrained, trained


def read_together(vectors: RowVectors) -> tuple[Tensor, Tensor]:
    """Return all vectors of a training, as `RowVectors.chunk` does.

    Raises NotFactored if they don't fit into memory together.
    """
    if vectors.chunks > 1:
        numbers = count_vector_numbers(vectors.declared, vectors.model.shape)
        need = int(vectors.counts[vectors.rows].sum()) * 4 * numbers
        raise NotFactored(
            f"its vectors need {format_size(need)} of memory, and "
            f"`{vectors.declared.trainer.name}` uses all of them together, at most "
            f"{format_size(vectors.chunk_bytes)}",
            "use fewer rows: `limit: 400`",
        )
    return vectors.chunk(0)


def report_amounts(
    vectors: TrainingVectors, state: TrainingState, solution: Solution, held_out: int
) -> dict[str, Any]:
    """Return the fields that all reports on the vectors of a dictionary have.

    Args:
        held_out: Number of held-out vectors.
    """
    rows, count = vectors.amounts(state)
    return {
        "rows": rows,
        "vectors": count,
        "held_out_rows": vectors.held_out_count,
        "held_out_vectors": held_out,
        "steps": solution.steps,
        "stopped_early": solution.stopped_early,
    }


def _finish_dictionary(
    finish: DictionaryWriter,
    vectors: TrainingVectors,
    held_out: tuple[Tensor, Tensor],
    weights: tuple[Mapping[str, Tensor], Solution],
    state: TrainingState,
    job: TrainingJob,
) -> TrainingReport:
    """Write a trained dictionary, and compare it with its controls.

    Args:
        held_out: Vectors that the training didn't use; the report is on training vectors if there
            are none.
        weights: At the start, and in the end.
        state: Of the loop at the end; its start without a loop.
    """
    untrained, trained = weights
    first = vectors.chunk(0)
    measured = held_out if len(held_out[0]) else first
    before = finish.assess(finish.write(job.start_folder, untrained), measured)
    found = finish.assess(finish.write(job.folder, trained.tensors), measured)
    components = components_explain(first[1], measured[1], max(1, round(found.active)))
    report = TrainingReport(
        **report_amounts(vectors, state, trained, len(held_out[0])),
        explained=found.explained,
        active=found.active,
        inactive=found.inactive,
        untrained_explained=before.explained,
        components_explained=components,
    )
    job.write_texts(vectors.texts(state))
    job.write_card(report)
    return report


@dataclass(frozen=True, eq=False)
class Scaling:
    """Centres and factors of the vectors of a training."""

    centers: tuple[Tensor, Tensor]
    """[width] means of encoded and of reconstructed vectors."""
    scales: tuple[float, float]
    """Factors that make their mean squared length, after centring, their width."""

    @classmethod
    def none(cls, width: int) -> Scaling:
        """Return the scaling of a dictionary that is computed from the vectors as they are."""
        return cls((torch.zeros(width), torch.zeros(width)), (1.0, 1.0))

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> Scaling:
        """Compute them from vectors, [vector, width] each."""
        centers = inputs.double().mean(0).float(), targets.double().mean(0).float()
        scales = [
            _scale(own - center) for own, center in zip((inputs, targets), centers, strict=True)
        ]
        return cls(centers, (scales[0], scales[1]))

    def apply(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return centred and scaled vectors."""
        (center, made), (scale, made_scale) = self.centers, self.scales
        scaled = (inputs - center) * scale
        return scaled, (scaled if targets is inputs else (targets - made) * made_scale)


def _scale(vectors: Tensor) -> float:
    length = float(vectors.double().square().sum(1).mean())
    return math.sqrt(vectors.shape[1] / length) if length > 0 else 1.0


@dataclass(frozen=True, eq=False)
class DictionaryWriter:
    """Writes the files of a dictionary."""

    declared: TrainedDictionary
    scaling: Scaling
    facts: Mapping[str, Any]

    @classmethod
    def of_solution(cls, declared: TrainedDictionary, job: TrainingJob) -> DictionaryWriter:
        """Return the writer of a dictionary that is computed from the vectors as they are."""
        return cls(declared, Scaling.none(declared.width_in), job.facts)

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """Write weights and configuration."""
        own = self.declared
        made = unscale_weights(
            weights, self.scaling.centers, self.scaling.scales, subtracts_bias=not own.transcodes
        )
        made = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
        config: dict[str, Any]
        if own.transcodes and own.architecture == "topk":
            path, config = folder / WEIGHT_FILES["sparsify"], self._sparsify_config()
            made["encoder.weight"] = made.pop("W_enc").T.contiguous()
            made["encoder.bias"] = made.pop("b_enc")
        else:
            path, config = folder / WEIGHT_FILES["SAELens"], self._sae_lens_config()
        save_file(made, path)
        path.chmod(0o644)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        return folder

    def _sparsify_config(self) -> dict[str, Any]:
        own = self.declared
        return {
            "activation": "topk",
            "k": own.k,
            "num_latents": own.features,
            "d_in": own.width_in,
            "transcode": True,
            "skip_connection": own.skips,
        }

    def _sae_lens_config(self) -> dict[str, Any]:
        own, training = self.declared, self.declared.training
        assert training is not None
        suffix = "skip_transcoder" if own.skips else "transcoder"
        names = {"standard": suffix, "jumprelu": f"jumprelu_{suffix}"}
        hooks = [hook_name(point) for point in (training.encoded, training.made)]
        metadata = {"hook_name": hooks[0], "hook_name_out": hooks[1] if own.transcodes else None}
        metadata["model_name"] = self.facts.get("model_name")
        return {
            "architecture": names[own.architecture] if own.transcodes else own.architecture,
            "d_in": own.width_in,
            "d_sae": own.features,
            **({} if own.k is None else {"k": own.k}),
            **({"d_out": own.width_out} if own.transcodes else {}),
            "dtype": "float32",
            "apply_b_dec_to_input": not own.transcodes,
            "normalize_activations": "none",
            "metadata": {name: value for name, value in metadata.items() if value is not None},
        }

    def load(self, folder: Path) -> Dictionary:
        """Return a written dictionary, as rules will read it."""
        return load_dictionary(
            read_dictionary(folder, str(folder), transcodes=self.declared.transcodes)
        )

    def assess(self, folder: Path, measured: tuple[Tensor, Tensor]) -> Fit:
        """Assess a written dictionary, as rules will read it."""
        system = self.load(folder)
        return assess(lambda own: (system.encode(own), system.reconstruct(own)), *measured)


def hook_name(point: SitePoint) -> str | None:
    """Return the name of a site in TransformerLens, without a head; None if it has none."""
    names = {site: hook for hook, site in reversed(HOOK_SITES.items())}
    if point.layer is None or point.site not in names:
        return None
    return f"blocks.{point.layer}.{names[point.site]}"


# --- checkpoints ----------------------------------------------------------------------------------


def _keep(loop: Training, folder: Path) -> None:
    """Write a checkpoint: the tensors first, then the numbers with the step of the tensors."""
    state = loop.capture()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"state-{state.step}.safetensors"
    with replace_file(folder / name) as made:
        save_file({name: own.cpu().contiguous() for name, own in state.tensors.items()}, made)
    with replace_file(folder / STATE_FILES[0]) as made:
        made.write_text(json.dumps({**state.numbers(), "tensors": name}), "utf-8")
    for other in folder.glob("state-*.safetensors"):
        if other.name != name:
            other.unlink(missing_ok=True)


def _restore(loop: Training, folder: Path) -> None:
    """Continue from a checkpoint, if there is one that can be read."""
    path = folder / STATE_FILES[0]
    if not path.is_file():
        return
    try:
        numbers = json.loads(path.read_text("utf-8"))
        tensors = load_file(folder / numbers["tensors"])
        loop.restore(TrainingState.read(numbers, tensors))
    except (OSError, ValueError, KeyError, RuntimeError):  # it begins anew
        loop.state = TrainingState()


def train_lens(
    declared: TrainedLens, vectors: TrainingVectors, model: LoadedModel, job: TrainingJob
) -> LensReport:
    """Train a lens, and write its file.

    Args:
        model: The model whose final norm and unembedding it is trained with.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NotFinite: The loss or a weight became NaN or infinite.
        OSError: A file can't be written.
    """
    training = declared.training
    layers, trainer = training.layers, training.trainer_of(LensTrainer)
    held_out = vectors.held_out()
    width, device = model.shape.d_model, model.device
    logits = ModelUnembedding(model).differentiable_logits
    with torch.enable_grad():
        maps = trainer.start(width, layers, training.of_trainer, device)
        lens = LensLoss(maps, logits)
        settings = read_settings(training, device)
        loop = Training(lens, vectors, held_out, settings, lambda own, last: (own, last))
        job.run(loop)
    job.write_tensors(LENS_FILE, lens.weights())
    first = vectors.chunk(0)
    measured = held_out if len(held_out[0]) else first
    untrained = LensLoss(LensMaps(width, layers, device), logits)
    rows, count = vectors.amounts(loop.state)
    report = LensReport(
        rows=rows,
        held_out_rows=vectors.held_out_count,
        steps=loop.state.step,
        stopped_early=loop.state.stopped,
        vectors=count,
        held_out_vectors=len(held_out[0]),
        layers=list(layers),
        trained=lens.divergences(*measured).tolist(),
        untrained=untrained.divergences(*measured).tolist(),
        average=divergence_from_average(logits, first[1], measured[1]),
    )
    job.write_texts(vectors.texts(loop.state))
    job.write_card(report, LENS_FILE)
    return report
