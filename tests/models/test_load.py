"""Loading models from folders and adopting them from Python."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechdsl import zoo
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model, load_model
from mechdsl.models.folder import check_weights, weight_files
from mechdsl.zoo import zoo_models

from ..quick import some
from . import families
from .conftest import statement


def test_loaded_model_has_tokenizer_dtype_and_provenance(loaded: dict[str, LoadedModel]) -> None:
    model = loaded["llama"]
    assert model.tokenizer is not None
    assert model.tokenizer.encode("w3 w4").ids == (1, 6, 7)
    assert not model.module.training
    assert model.dtype == torch.float32
    assert model.pad_id == 0
    facts = model.provenance
    assert facts["architecture"] == "LlamaForCausalLM"
    assert len(facts["weights"]) == 64
    assert facts["attention"] == "sdpa"
    assert facts["torch"] == torch.__version__


def test_weight_hashes_distinguish_models(folders: dict[str, Path], tmp_path: Path) -> None:
    other = families.build("gpt2", tmp_path / "other", seed=1)
    hashes = set()
    for folder in (folders["gpt2"], other, folders["gpt2"]):
        model, _ = load_model(statement(str(folder)))
        assert model is not None
        hashes.add(model.provenance["weights"])
    assert len(hashes) == 2


def test_dtype_of_the_caller_overrides_the_statement(folders: dict[str, Path]) -> None:
    path = str(folders["gpt2"])
    wide, _ = load_model(statement(path, dtype="float64"))
    narrow, _ = load_model(statement(path, dtype="float64"), dtype="bfloat16")
    assert wide is not None
    assert wide.dtype == torch.float64
    assert narrow is not None
    assert narrow.dtype == torch.bfloat16
    assert narrow.provenance["dtype"] == "bfloat16"


def test_loading_a_model_prints_nothing(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(statement(str(folders["qwen2"])))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_loading_with_checks_takes_under_2_seconds(folders: dict[str, Path]) -> None:
    start = time.process_time()
    load_model(statement(str(folders["llama"])))
    assert time.process_time() - start < 2


def configured(folder: Path, to: Path, **changes: object) -> Path:
    """A copy with other values in its `config.json`."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


LAYERS = {"gpt2": "n_layer", "llama": "num_hidden_layers", "gpt_neox": "num_hidden_layers"}


@pytest.mark.parametrize("family", list(LAYERS))
def test_config_with_another_layer_count_than_the_weights_is_rejected(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    fewer = configured(folders[family], tmp_path / "fewer", **{LAYERS[family]: 2})
    model, found = load_model(statement(str(fewer)))
    assert model is None
    assert [d.code for d in found] == ["E0422"]
    assert found[0].message == "the `config.json` of `m` has 2 layers, its weights 3"
    more = configured(folders[family], tmp_path / "more", **{LAYERS[family]: 4})
    model, found = load_model(statement(str(more)))
    assert model is None
    assert [d.code for d in found] == ["E0411"]


def test_unused_weights_and_files_warn(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "more")
    assert load_model(statement(str(folder)))[1] == []
    own = load_file(folder / "model.safetensors")
    save_file(
        {**own, "gizmo.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"}
    )
    save_file({"other": torch.ones(2)}, folder / "consolidated.safetensors")
    model, found = load_model(statement(str(folder)))
    assert model is not None
    assert [(d.code, d.label_text) for d in found] == [
        ("W0761", "nothing takes `gizmo.weight`"),
        ("W0761", "nothing reads the file `consolidated.safetensors`"),
    ]


def test_all_shards_of_an_index_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "shards")
    own = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(own)}
    for file in set(where.values()):
        part = {name: own[name] for name in own if where[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model, found = load_model(statement(str(folder)))
    assert model is not None
    assert found == []


def _without(name: str):
    def change(folder: Path) -> None:
        (folder / name).unlink()

    return change


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _deeper(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "n_layer": 4}))


def _unheard_of(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "unheard_of", "architectures": None}))


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (_without("model.safetensors"), "E0406", "no weights"),
        (_without("config.json"), "E0404", "config.json"),
        (_without("tokenizer.json"), "E0508", "tokenizer"),
        (_truncated, "E0411", "can't be loaded"),
        (_deeper, "E0411", "can't be loaded"),
        (_unheard_of, "E0411", "can't be loaded"),
    ],
)
def test_folder_that_cannot_load_is_rejected(
    folders: dict[str, Path],
    tmp_path: Path,
    change: object,
    code: str,
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "copy"))
    change(folder)  # type: ignore[operator]
    model, problems = load_model(statement(str(folder)))
    assert model is None
    assert [d.code for d in problems] == [code]
    assert words in problems[0].message
    assert problems[0].span is not None
    assert capfd.readouterr() == ("", "")


def test_missing_weights_are_reported_instead_of_drawn_at_random(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "copy"))
    _deeper(folder)
    _, problems = load_model(statement(str(folder)))
    assert "the weights lack `transformer.h.3" in problems[0].label_text


def test_loading_never_runs_remote_code_or_prompts_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 9}
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": own, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    shutil.copy(Path(zoo.__path__[0]) / "counting" / "tokenizer.json", tmp_path)
    _, problems = load_model(statement(str(tmp_path)))
    assert [d.code for d in problems] == ["E0411"]
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_hf_model_missing_from_the_cache_names_the_download_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model, problems = load_model(statement("org/name", "hf"))
    assert model is None
    assert [d.code for d in problems] == ["E0401"]
    assert problems[0].help_text.startswith("`hf download org/name` fetches it; without it nothing")


@pytest.mark.parametrize("path", ["./missing", "../missing", "/missing", "a/b/missing"])
def test_missing_folder_of_hf_names_no_download(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    _, problems = load_model(statement(path, "hf"))
    assert [d.code for d in problems] == ["E0401"]
    assert "the folder of the file" in problems[0].label_text
    assert problems[0].help_text.startswith("write the path from the `.mech` file")


def test_weights_missing_from_a_folder_of_hf_are_not_downloaded(tmp_path: Path) -> None:
    source = Path(zoo.__path__[0]) / "counting"
    shutil.copytree(source, tmp_path / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    problem = check_weights(tmp_path / "hollow", statement(str(tmp_path / "hollow"), "hf"))
    assert problem is not None
    assert problem.help_text == "copy them there"


def test_weights_missing_from_the_cache_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    source = Path(zoo.__path__[0]) / "counting"
    shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
    _, problems = load_model(statement("org/name", "hf"))
    assert [d.help_text for d in problems] == ["`hf download org/name` fetches them"]


@pytest.mark.parametrize("family", families.VERIFIED)
def test_model_from_python_is_adopted_in_eval_mode(family: str) -> None:
    module = families.module(family)
    module.train()
    model, problems = adopt_model("mine", module, families.tokenizer())
    assert not problems
    assert model is not None
    assert model.module is module
    assert not module.training
    assert model.provenance["source"] == "passed from Python"


def test_fast_tokenizer_of_transformers_is_adopted(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["gpt2"])
    model, _ = adopt_model("mine", families.module("gpt2"), tokenizer)
    assert model is not None
    assert model.tokenizer is not None
    assert model.tokenizer.encode("w3").ids == (1, 6)


def test_module_that_is_no_transformers_model_is_rejected() -> None:
    model, problems = adopt_model("mine", torch.nn.Linear(2, 2), families.tokenizer())
    assert model is None
    assert [d.code for d in problems] == ["E0411"]


@pytest.mark.slow
def test_importing_and_loading_print_nothing(folders: dict[str, Path]) -> None:
    code = (
        "import sys\nfrom mechdsl.loading.loader import inspect_model\n"
        "assert inspect_model(sys.argv[1])[0]"
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", code, str(folders["gpt2"])],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    assert (ran.stdout, ran.stderr) == ("", "")


OF_TEXTS = [
    name
    for name in zoo_models()
    if not (Path(zoo.__path__[0]) / name / "preprocessor_config.json").exists()
]


@pytest.mark.parametrize("name", some(OF_TEXTS, [name for name in OF_TEXTS if "/" not in name]))
def test_zoo_models_load_restartable_in_under_3_seconds(name: str) -> None:
    if not weight_files(Path(zoo.__path__[0]) / name):
        pytest.skip("not trained yet")
    start = time.process_time()
    model, problems = load_model(statement(name, "zoo"))
    assert not problems
    assert model is not None
    assert model.restartable
    assert time.process_time() - start < 3


def test_slow_tokenizer_is_rejected() -> None:
    model, problems = adopt_model("mine", families.module("gpt2"), object())
    assert model is None
    assert [d.code for d in problems] == ["E0412"]


def test_speech_model_is_rejected(tmp_path: Path) -> None:
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    config = Speech2TextConfig(
        vocab_size=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        input_feat_per_channel=4,
        conv_channels=8,
    )
    module = Speech2TextForConditionalGeneration(config)
    module.save_pretrained(tmp_path)
    model, problems = load_model(statement(str(tmp_path)))
    assert model is None
    assert [d.code for d in problems] == ["E0407"]
    assert "Speech2TextForConditionalGeneration" in problems[0].message
