"""Models whose weights accelerate keeps on disk while they aren't needed.

Between the calls of a module its weights are `meta` tensors then. Everything is compared with the
same model in memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import accelerate
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import mechdsl
from mechdsl import zoo
from mechdsl.cli.entry import main
from mechdsl.execute.unpatched_batch import compute_noise_scale
from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite
from mechdsl.forward.hooks.full_pass import FullPassResult, run_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.module_exchange import load_weights
from mechdsl.forward.packed.activation_cache import record_activations
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.loading import devices, loader
from mechdsl.loading.loader import adopt_model
from mechdsl.prompts.runs import RunNoise
from mechdsl.vocab.sites import SITES

from ..quick import in_turn, some
from . import families
from .clean import clean_model_check

ROWS = ((1, 5, 9, 12, 7, 3), (1, 8, 4, 11), (1, 20, 6, 30, 2))
CLOSE = 1e-5
SPREAD: Mapping[str, Callable[[str], str]] = {
    "blocks on disk": lambda path: "disk" if path.endswith((".0", ".2")) else "cpu",
    "all but a block": lambda path: "cpu" if path.endswith(".1") else "disk",
    "all": lambda path: "disk",
}
IN_TURN = in_turn(list(SPREAD), ["gpt2", "llama"], SPREAD)
COUNTING = Path(zoo.__path__[0]) / "counting"
EXAMPLE = Path(__file__).parents[2] / "examples" / "counting.mech"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def parts(module: nn.Module) -> list[str]:
    """Paths of blocks, and of all leaf modules outside them."""
    paths = {path: [*part.named_children()] for path, part in module.named_modules()}
    blocks = min((p for p in paths if paths[p] and f"{p}.0" in paths), key=len)
    leaves = [path for path, children in paths.items() if not children]
    return [
        *(f"{blocks}.{name}" for name, _ in paths[blocks]),
        *(path for path in leaves if not path.startswith(f"{blocks}.")),
    ]


def spread(folder: Path, where: Callable[[str], str], to: Path) -> Any:
    """The model of a folder, with some of its weights on disk."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    places = {path: where(path) for path in parts(whole)}
    module: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=places, offload_folder=to
    )
    assert any(weight.is_meta for weight in module.parameters())
    if Version(transformers.__version__) < Version("5.3"):
        try:
            found = module(torch.tensor(ROWS[:1])).logits
            assert not found.is_meta, "its weights aren't fetched"
        except Exception as error:
            pytest.skip(f"transformers {transformers.__version__} can't run it itself: {error}")
    return module


def both(folder: Path, where: str, to: Path) -> tuple[LoadedModel, LoadedModel]:
    """The model in memory, and with weights offloaded."""
    made: list[LoadedModel] = []
    for module in (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        spread(folder, SPREAD[where], to),
    ):
        model, found = adopt_model("m", module, families.tokenizer())
        assert model is not None, [d.message for d in found]
        assert not found
        made.append(model)
    return made[0], made[1]


def furthest(one: Tensor, other: Tensor) -> float:
    assert one.device == other.device
    return float((one - other).abs().max() / other.abs().max())


def points(model: LoadedModel) -> list[SiteRead]:
    """Every site of every layer."""
    return [
        SiteRead(site, layer)
        for site in SITES
        if site in model.shape.sites
        for layer in (range(model.shape.n_layers) if SITES[site].has_layer else (None,))
    ]


def writes_of(model: LoadedModel, sources: Mapping[SiteRead, Tensor]) -> list[SiteWrite]:
    """Row i patches the i-th point at two tokens with one unit of the next prompt."""
    made: list[SiteWrite] = []
    for number, (where, read) in enumerate(sources.items()):
        lane, unit = number % len(ROWS), number % read.shape[2]
        values = read[(lane + 1) % len(ROWS), -2:, unit]
        two = torch.tensor([1, len(ROWS[lane]) - 1])
        rows, units = torch.full_like(two, number), torch.full_like(two, unit)
        made.append(SiteWrite(where.site, where.layer, rows, two, units, values))
    return made


@pytest.mark.parametrize(("where", "family"), IN_TURN)
def test_every_site_of_an_offloaded_model_equals_the_model_in_memory(
    family: str, where: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    here, away = both(folders[family], where, tmp_path)
    wanted = points(here)
    assert wanted == points(away)
    base = Batch.of(ROWS, here.pad_id, "left")
    reads = [run_full(model, base, reads=wanted).reads for model in (here, away)]
    assert max(furthest(reads[1][one], reads[0][one]) for one in wanted) <= CLOSE
    writes = writes_of(here, reads[0])
    lanes = np.arange(len(wanted)) % len(ROWS)
    rows = base.take(torch.from_numpy(lanes))
    lengths = base.lengths.numpy()[lanes]
    final = np.arange(len(lanes)), lengths - 1
    some = torch.tensor([3, 4, 17, 40])
    found: list[list[Tensor]] = []
    for model in (here, away):
        whole = run_full(model, rows, writes=writes).logits
        with record_activations(model, base, 0) as kept:
            run_full(model, base)
        packed = run_packed(model, kept, lanes, writes=writes, final=final)
        inside = [write for write in writes if write.site != "logits"]
        few = run_packed(model, kept, lanes, writes=inside, final=final, tokens=some)
        narrow = run_full(model, base, tokens=some).logits
        assert whole is not None
        assert narrow is not None
        found.append([whole, packed.logits, few.logits, narrow])
    assert max(furthest(*pair) for pair in zip(*found, strict=True)) <= CLOSE


@pytest.mark.parametrize(("where", "family"), IN_TURN)
def test_run_restores_an_offloaded_model(
    family: str, where: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    module = spread(folders[family], SPREAD[where], tmp_path)
    ids = torch.tensor([ROWS[0]])

    def state() -> list[tuple[str, bool, object, object]]:
        return [
            (path, weight.is_meta, part.__dict__.get("forward"), part.__dict__.get("_hf_hook"))
            for path, part in module.named_modules()
            for weight in (*part.parameters(recurse=False), torch.zeros(()))
        ]

    with torch.no_grad():
        before, stood = module(ids).logits, state()
    model, _ = adopt_model("m", module, families.tokenizer())
    assert model is not None
    batch = Batch.of(ROWS, model.pad_id, "left")
    run_full(model, batch, reads=[SiteRead("head_out", 0)], tokens=torch.tensor([1, 2]))
    assert clean_model_check(module) == []
    assert state() == stood
    with torch.no_grad():
        assert torch.equal(module(ids).logits, before)


@pytest.mark.parametrize("family", some(["gpt2", "llama"], ["gpt2"]))
def test_model_after_cpu_offload_equals_the_model_in_memory(
    family: str, folders: dict[str, Path]
) -> None:
    """Its root has no execution device, and every weight is offloaded."""
    found: list[FullPassResult] = []
    for is_offloaded in (False, True):
        module = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
        if is_offloaded:
            accelerate.cpu_offload(module)
            assert all(weight.is_meta for weight in module.parameters())
        model, problems = adopt_model("m", module, families.tokenizer())
        assert model is not None, [d.message for d in problems]
        batch = Batch.of(ROWS, model.pad_id, "left")
        found.append(run_full(model, batch, reads=[SiteRead("head_out", 0)]))
    here, away = found
    assert here.logits is not None
    assert away.logits is not None
    assert furthest(away.logits, here.logits) <= CLOSE
    where = SiteRead("head_out", 0)
    assert furthest(away.reads[where], here.reads[where]) <= CLOSE


@pytest.mark.slow
def test_weight_hash_of_an_offloaded_model_is_the_same(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    here, away = both(folders["gpt2"], "all", tmp_path / "all")
    assert away.provenance["weights"] == here.provenance["weights"]
    for where in ("blocks on disk", "all but a block"):
        module = spread(folders["gpt2"], SPREAD[where], tmp_path / where)
        (away, _) = adopt_model("m", module, families.tokenizer())
        assert away is not None
        assert away.provenance["weights"] == here.provenance["weights"]


def test_model_on_the_meta_device_is_rejected(folders: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(folders["gpt2"])
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    model, (problem,) = adopt_model("m", module, families.tokenizer())
    assert model is None
    assert problem.code == "E0411"
    assert "meta device" in problem.label_text


@pytest.mark.slow
def test_offloaded_model_reports_device_and_dtype(folders: dict[str, Path], tmp_path: Path) -> None:
    _, away = both(folders["llama"], "all", tmp_path)
    assert away.device == torch.device("cpu")
    assert away.dtype == torch.float32
    assert away.provenance["dtype"] == "float32"


def test_noise_scale_of_offloaded_embeddings_is_the_same(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """`3 sd` is measured on the embeddings."""
    here, away = both(folders["gpt2"], "all", tmp_path)
    noise = RunNoise("embed", ((1,),), None, 3.0, (5, 6, 9))
    assert compute_noise_scale(away, noise) == compute_noise_scale(here, noise) > 0


# --- files ----------------------------------------------------------------------------------------


def cells(results: Any) -> list[Any]:
    """The table of every experiment."""
    document = json.loads(results.to_json())
    return [experiment["cells"] for experiment in document["files"][0]["experiments"]]


@pytest.fixture(scope="module")
def in_memory() -> list[Any]:
    return cells(mechdsl.run(EXAMPLE, limit=40))


@pytest.mark.slow
def test_file_on_an_offloaded_model_gives_the_same_table(
    in_memory: list[Any], tmp_path: Path
) -> None:
    """Half of the blocks of the model are on disk."""
    module = spread(COUNTING, SPREAD["blocks on disk"], tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(COUNTING)
    found = mechdsl.run(EXAMPLE, limit=40, models={"toy": (module, tokenizer)})
    assert cells(found) == in_memory
    assert clean_model_check(module) == []


def test_offload_option_of_the_command_line_gives_the_same_table(
    in_memory: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With memory for two thirds of the model, the rest is on disk."""
    seen: list[bool] = []
    load = loader.load_model

    def look(*args: Any, **more: Any) -> Any:
        model, found = load(*args, **more)
        assert model is not None
        seen.append(any(weight.is_meta for weight in model.module.parameters()))
        return model, found

    monkeypatch.setattr(loader, "load_model", look)
    size = (COUNTING / "model.safetensors").stat().st_size
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": size * 2 // 3})
    arguments = ("--limit", "40", "--format", "json", "--device", "cpu", "--offload", tmp_path)
    monkeypatch.setattr(sys, "argv", ["mechdsl", "run", str(EXAMPLE), *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out)["files"][0]["experiments"]
    assert [experiment["cells"] for experiment in found] == in_memory
    assert seen == [True]


@pytest.mark.slow
def test_offload_option_writes_nothing_if_the_model_fits(
    in_memory: list[Any], tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    assert cells(mechdsl.run(EXAMPLE, limit=40, offload=folder)) == in_memory
    assert [*folder.iterdir()] == []


def test_offloaded_weight_in_a_module_with_a_buffer_is_loaded() -> None:
    """For a module with both, accelerate leaves the buffer in memory."""
    part = nn.Linear(2, 3)
    part.register_buffer("factor", torch.ones(1))
    weight = part.weight.detach().clone()
    accelerate.cpu_offload(nn.Sequential(part), torch.device("cpu"))
    assert part.weight.is_meta
    assert not part.get_buffer("factor").is_meta
    with load_weights(part):
        assert torch.equal(part.weight, weight)
    assert part.weight.is_meta


def test_offload_without_accelerate_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(mechdsl.MechdslError) as found:
        mechdsl.run(EXAMPLE, offload=tmp_path)
    (problem,) = found.value.diagnostics
    assert problem.code == "E0208"
    assert "`--offload` needs accelerate" in problem.message
    assert "mechdsl[offload]" in str(found.value)


def test_offload_to_an_unwritable_folder_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(mechdsl.MechdslError) as found:
        mechdsl.run(EXAMPLE, offload=file)
    (problem,) = found.value.diagnostics
    assert problem.code == "E0208"
    assert f"`--offload {file}`" in problem.message


@pytest.mark.parametrize(
    ("device", "kept"),
    [
        ("cpu", {"cpu"}),
        ("cuda", {0, "cpu"}),
        ("cuda:1", {1, "cpu"}),
        ("mps", {"mps", "cpu"}),
    ],
)
def test_offload_uses_only_the_named_device_and_the_cpu(
    device: str, kept: set[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "get_device", torch.device)
    room = dict.fromkeys((0, 1, "mps", "cpu"), 1 << 30)
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: room)
    spread = devices.plan_device_map(device, tmp_path)
    assert spread is not None
    assert set(cast("dict[object, int]", spread["max_memory"])) == kept


def test_device_map_without_the_offload_option_is_empty() -> None:
    assert devices.plan_device_map("auto", None) is None
