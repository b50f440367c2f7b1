"""Paths that a file may read and write, equal for all commands and Python."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from scipy.io import wavfile

import mechdsl
from mechdsl.base.files import find_snapshot
from mechdsl.diagnostics.rendering import MechdslError
from mechdsl.program.paths import PATH_CONSTRUCTS
from mechdsl.syntax.parser_tables import grammar_file

from .conftest import HEADS, Command

PACKAGE = Path(mechdsl.__file__).parent
COMMANDS = ("validate", "run", "plan", "graph", "explain")
CSV = HEADS.replace("report table", 'report csv to "PLACE"')


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the file; the working directory is its sibling."""
    for name in ("here", "working", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "working")
    return tmp_path / "here"


def written(folder: Path, text: str) -> Path:
    path = folder / "file.mech"
    path.write_text(text, encoding="utf-8")
    return path


# --- writing ---

OUTSIDE = (
    "../cells.csv",
    "{top}/elsewhere/cells.csv",
    "link.csv",
    "linked/cells.csv",
    "a/../../x.csv",
)


@pytest.mark.parametrize("place", OUTSIDE)
def test_report_outside_the_folder_is_rejected(place: str, here: Path, command: Command) -> None:
    (here / "link.csv").symlink_to(here.parent / "elsewhere" / "cells.csv")
    (here / "linked").symlink_to(here.parent / "elsewhere")
    path = written(here, CSV.replace("PLACE", place.format(top=here.parent)))
    for name in COMMANDS:
        done = command(name, path)
        assert (done.status, done.out) == (2, ""), name
        assert "error[E0531]: `report csv` may not write to" in done.err
        assert "= help: " in done.err
    assert [d.code for d in mechdsl.validate(path)] == ["E0531"]
    with pytest.raises(MechdslError) as refused:
        mechdsl.run(path)
    assert [d.code for d in refused.value.diagnostics] == ["E0531"]
    assert mechdsl.validate(path, allow_outside=True) == []
    assert command("validate", "--allow-outside", path).status == 0
    assert not list((here.parent / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "place", ["cells.csv", "new/er/cells.csv", "{working}/cells.csv", "a/../b.csv"]
)
def test_report_in_the_folder_or_working_directory_is_accepted(
    place: str, here: Path, command: Command
) -> None:
    place = place.format(working=Path.cwd())
    path = written(here, CSV.replace("PLACE", place))
    assert command("validate", path).status == 0


def test_report_through_a_link_keeps_the_link(here: Path, command: Command) -> None:
    (here / "kept").mkdir()
    (here / "link.csv").symlink_to(here / "kept" / "cells.csv")
    done = command("run", written(here, CSV.replace("PLACE", "link.csv")))
    assert done.status == 0, done.err
    assert (here / "link.csv").is_symlink()
    assert (here / "kept" / "cells.csv").read_text(encoding="utf-8").count("\n") == 9


def test_report_to_a_special_file_is_rejected(here: Path, command: Command) -> None:
    os.mkfifo(here / "pipe.csv")
    (here / "null.csv").symlink_to("/dev/null")
    (here / "out.csv").symlink_to("/dev/stdout")
    for name in ("pipe.csv", "null.csv", "out.csv"):
        path = written(here, CSV.replace("PLACE", name))
        for flags in ([], ["--allow-outside"]):
            done = command("validate", path, *flags)
            assert done.status == 2
            assert f"[E0532]: `report csv` names `{name}`, which is " in done.err


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file.mech/cells.csv", "`file.mech` is not a folder"),
        ("taken.csv", "it is a folder"),
        ("x" * 300 + ".csv", "file name too long"),
    ],
)
def test_unwritable_report_path_is_rejected_before_running(
    place: str, said: str, here: Path, command: Command
) -> None:
    (here / "taken.csv").mkdir()
    path = written(here, CSV.replace("PLACE", place))
    for name in ("validate", "run"):
        done = command(name, path)
        assert (done.status, done.out) == (2, "")
        assert "[E0533]" in done.err
        assert said in done.err


def test_report_in_a_read_only_folder_is_rejected(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # root may do anything
    monkeypatch.setattr("mechdsl.base.files.os.access", lambda path, how: not how & os.W_OK)
    done = command("validate", written(here, CSV.replace("PLACE", "new/cells.csv")))
    assert done.status == 2
    assert "may not be written to" in done.err


def test_link_created_during_the_run_is_not_followed(here: Path, command: Command) -> None:
    from mechdsl.show.output import write_reports

    (result,) = mechdsl.run(written(here, CSV.replace("PLACE", "cells.csv")))
    (here / "cells.csv").unlink(missing_ok=True)
    (here / "cells.csv").symlink_to(here.parent / "elsewhere" / "cells.csv")
    (done,) = write_reports([result])
    assert done.path is None
    assert [d.code for d in done.diagnostics] == ["E0531"]
    assert not list((here.parent / "elsewhere").iterdir())


@pytest.mark.parametrize(("place", "said"), [("~/x.csv", ""), ("~nobody-here/x.csv", "no user")])
def test_tilde_in_an_output_path_is_the_home_folder(
    place: str, said: str, here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here.parent / "elsewhere"))
    path = written(here, CSV.replace("PLACE", place))
    done = command("run", path, "--no-store", *([] if said else ["--allow-outside"]))
    assert not [*here.glob("~*"), *(here.parent / "working").glob("~*")]
    assert (here.parent / "elsewhere" / "x.csv").exists() != bool(said)
    assert done.status == (2 if said else 0)
    assert (
        not said or f"error[E0533]: `report csv` can't write `{place}`: there is {said}" in done.err
    )
    assert "E0531" in command("validate", written(here, CSV.replace("PLACE", "~/x.csv"))).err


# --- reading ---

ROOT = Path(__file__).parents[2]
PROMPTS = 'prompts p {\n  rows "PLACE"\n  template "{a}"\n}\n'
PATCH = "patch layer 0..1 head * at last-item token"
EXAMPLES = {
    "use": ("common.mech", 'mech 1\nuse "PLACE"\n'),
    "rows": ("data.csv", 'mech 1\nmodel toy = zoo("counting")\n' + PROMPTS),
    "local": ("model", HEADS.replace('zoo("counting")', 'local("PLACE")')),
    "hf": ("model", HEADS.replace('zoo("counting")', 'hf("PLACE")')),
    "hf_dataset": (
        "set",
        'mech 1\nmodel toy = zoo("counting")\n'
        + PROMPTS.replace('"PLACE"', 'hf_dataset("PLACE", split: "train")'),
    ),
    "python": (
        "metrics.py",
        HEADS.replace(
            "prompts fruit {", 'metric own = python("PLACE:own")\nprompts fruit {'
        ).replace("logit(answer) - logit(answer of fewer) as recovery", "own as raw"),
    ),
    "saved": (
        "vectors.safetensors",
        HEADS.replace("experiment ", 'direction d = saved("PLACE", "d")\nexperiment ', 1).replace(
            "  measure", "  add d to resid_post layer 1 at last token\n  measure", 1
        ),
    ),
    "sae": (
        "dictionary",
        HEADS.replace(
            "experiment ", 'basis b = sae("PLACE") at resid_post layer 1\nexperiment ', 1
        ).replace(PATCH, "patch feature 0..1 of b at last-item token"),
    ),
    "transcoder": (
        "mlp",
        HEADS.replace(
            "experiment ", 'basis b = transcoder("PLACE") at mlp_out layer 1\nexperiment ', 1
        ).replace(PATCH, "ablate feature 0..1 of b at last-item token with zero"),
    ),
    "labels": (
        "labels.jsonl",
        HEADS.replace(
            "experiment ",
            'basis b = sae("dictionary", labels: "PLACE") at resid_post layer 1\nexperiment ',
            1,
        ).replace(PATCH, "patch feature 0..1 of b at last-item token"),
    ),
    "tuned_lens": (
        "vectors.safetensors",
        HEADS.replace(PATCH, 'observe tuned_lens("PLACE") resid_post layer 0 at last token')
        .replace("  from clean into fewer\n", "")
        .replace(" as recovery", " as raw"),
    ),
    "image": (
        "picture.png",
        'mech 1\nmodel vit = local("nowhere")\nimages i { image "PLACE" answer "a" }\n'
        "experiment e { model vit images i measure logit(answer) as raw }\n",
    ),
    "video": (
        "frames",
        'mech 1\nmodel m = local("nowhere")\nprompts p {\n  video v = "PLACE"\n'
        '  template "{v} a"\n}\nexperiment e { model m prompts p measure logit(" a") as raw }\n',
    ),
    "audio": (
        "sound.wav",
        'mech 1\nmodel m = local("nowhere")\nprompts p {\n  audio v = "PLACE"\n'
        '  template "{v} a"\n}\nexperiment e { model m prompts p measure logit(" a") as raw }\n',
    ),
    "report": ("cells.csv", CSV),
    "save": (
        "streams.safetensors",
        HEADS.replace(
            "  measure", '  save resid_post layer 1 of clean at last token to "PLACE"\n  measure', 1
        ),
    ),
}
"""Each construct that takes a path, with an example path and program."""


def filled(folder: Path) -> None:
    """Create every file that the examples name."""
    (folder / "common.mech").write_text("mech 1\n", encoding="utf-8")
    (folder / "data.csv").write_text("a\nfig\n", encoding="utf-8")
    (folder / "labels.jsonl").write_text('{"index": 0, "label": "a"}\n', encoding="utf-8")
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    (folder / "frames").mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8)).save(folder / "frames" / f"{number}.png")
    wavfile.write(folder / "sound.wav", 16_000, np.zeros(16_000, np.int16))
    (folder / "set").mkdir()
    (folder / "set" / "train.csv").write_text("a\nfig\n", encoding="utf-8")
    (folder / "metrics.py").write_text("def own(logits, rows):\n    return logits[:, 0]\n")
    square, vector = np.zeros((128, 128), np.float32), np.ones(128, np.float32)
    lens = {"d": vector, "layer.0.weight": square, "layer.0.bias": vector}
    save_file(lens, folder / "vectors.safetensors")
    shutil.copytree(ROOT / "docs" / "errors" / "data" / "sae", folder / "dictionary")
    (folder / "mlp").mkdir()
    (folder / "mlp" / "cfg.json").write_text('{"architecture": "transcoder"}', encoding="utf-8")
    parts = {"W_enc": square, "b_enc": vector, "W_dec": square, "b_dec": vector}
    save_file(parts, folder / "mlp" / "sae_weights.safetensors")
    zoo = Path(str(files("mechdsl") / "zoo" / "counting"))
    shutil.copytree(zoo, folder / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__"))


@pytest.mark.parametrize("name", [each.name for each in PATH_CONSTRUCTS])
def test_untrusted_lists_and_confines_every_construct(
    name: str, here: Path, command: Command
) -> None:
    target, text = EXAMPLES[name]
    filled(here.parent / "elsewhere")
    filled(here)
    inside = command("validate", "--untrusted", written(here, text.replace("PLACE", target)))
    assert re.search(rf"warning\[W0780\]: `{name}` (reads|runs|writes) `{target}", inside.err)
    assert "inside of the folder" in inside.err
    outside = f"../elsewhere/{target}"
    path = written(here, text.replace("PLACE", outside))
    done = command("validate", "--untrusted", path)
    assert done.status == 2
    assert re.search(rf"warning\[W0780\]: `{name}` \w+ `{re.escape(outside)}", done.err)
    assert f"leads to `{here.parent / 'elsewhere' / target}`" in done.err
    code = "E0531" if name in ("report", "save") else "E0535"
    assert f"error[{code}]" in done.err
    assert command("run", "--untrusted", path).status == 2
    if name in ("report", "save"):
        return
    assert inside.status == (2 if name == "python" else 0), inside.err  # E0221: it runs none
    assert "E0535" not in command("validate", path).err, "reading is free"


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_saved_directions_are_listed_and_confined(
    suffix: str, here: Path, command: Command
) -> None:
    head = 'direction d = unembedding(" fig")\nexperiment '
    text = EXAMPLES["save"][1].replace("experiment ", head, 1)
    line = 'save resid_post layer 1 of clean at last token to "PLACE"'
    assert line in text
    if suffix == "gguf":
        head = "direction d = mean(fruit) at resid_post layer 1\nexperiment "
        text = EXAMPLES["save"][1].replace("experiment ", head, 1)
    text = text.replace(line, 'save direction d to "PLACE"')
    target = f"d.{suffix}"
    inside = command("validate", "--untrusted", written(here, text.replace("PLACE", target)))
    assert f"warning[W0780]: `save` writes `{target}`" in inside.err
    done = command("validate", written(here, text.replace("PLACE", f"../elsewhere/{target}")))
    assert "error[E0531]" in done.err


def test_saved_circuits_are_listed_and_confined(here: Path, command: Command) -> None:
    for folder in (here, here.parent / "elsewhere"):
        (folder / "c.json").write_text('{"edges": ["embed -> logits"]}', encoding="utf-8")
    rule = "ablate c at tokens * with zero"
    text = HEADS.replace("experiment ", 'circuit c = saved("PLACE")\nexperiment ', 1)
    text = text.replace(PATCH, rule).replace("  from clean into fewer\n", "")
    text = text.replace(" as recovery", " as raw")
    inside = command("validate", "--untrusted", written(here, text.replace("PLACE", "c.json")))
    assert "warning[W0780]: `saved` reads `c.json`" in inside.err
    assert inside.status == 0, inside.err
    outside = written(here, text.replace("PLACE", "../elsewhere/c.json"))
    assert "error[E0535]" in command("validate", "--untrusted", outside).err


@pytest.mark.parametrize("target", ["common.mech", "data.csv", "metrics.py", "model"])
def test_untrusted_link_to_another_folder_is_rejected(
    target: str, here: Path, command: Command
) -> None:
    filled(here.parent / "elsewhere")
    (here / target).symlink_to(here.parent / "elsewhere" / target)
    (text,) = [text for name, (t, text) in EXAMPLES.items() if t == target and name != "hf"]
    done = command("validate", "--untrusted", written(here, text.replace("PLACE", target)))
    assert "[E0535]" in done.err
    assert f"a link to `{here.parent / 'elsewhere' / target}`" in done.err


def test_untrusted_link_in_a_model_folder_is_rejected(here: Path, command: Command) -> None:
    filled(here)
    shutil.move(here / "model" / "config.json", here.parent / "elsewhere" / "config.json")
    (here / "model" / "config.json").symlink_to(here.parent / "elsewhere" / "config.json")
    path = written(here, EXAMPLES["local"][1].replace("PLACE", "model"))
    assert (
        "[E0535]: `local` names `model/config.json`" in command("validate", "--untrusted", path).err
    )
    assert command("validate", path).status == 0


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_untrusted_link_in_a_dictionary_folder_is_rejected(
    name: str, here: Path, command: Command
) -> None:
    filled(here)
    shutil.move(here / "dictionary" / name, here.parent / "elsewhere" / name)
    (here / "dictionary" / name).symlink_to(here.parent / "elsewhere" / name)
    path = written(here, EXAMPLES["sae"][1].replace("PLACE", "dictionary"))
    done = command("validate", "--untrusted", path)
    assert f"[E0535]: `sae` names `dictionary/{name}`" in done.err
    assert command("validate", path).status == 0


def index(folder: Path, *names: str) -> None:
    """Create a model whose index names these weight files."""
    filled(folder)
    (folder / "model" / "model.safetensors").unlink()
    shards = {f"weight.{n}": name for n, name in enumerate(names)}
    text = json.dumps({"metadata": {}, "weight_map": shards})
    (folder / "model" / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("name", ["../../elsewhere/a.safetensors", "{top}/a.safetensors", "a/../b"])
def test_weights_outside_the_model_folder_are_rejected(
    name: str, here: Path, command: Command
) -> None:
    name = name.format(top=here.parent)
    index(here, "model-1.safetensors", name)
    path = written(here, EXAMPLES["local"][1].replace("PLACE", "model"))
    done = command("validate", path)
    assert done.status == 2
    assert f"its `model.safetensors.index.json` names `{name}`" in done.err
    assert "[E0431]" in done.err
    done = command("validate", "--untrusted", path)
    assert ("[E0431]" if name == "a/../b" else f"[E0535]: `local` names `model/{name}`") in done.err


def test_weights_named_by_the_config_outside_the_folder_are_rejected(
    here: Path, command: Command
) -> None:
    filled(here)
    config = json.loads((here / "model" / "config.json").read_text())
    (here / "model" / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "../other.safetensors"})
    )
    path = written(here, EXAMPLES["local"][1].replace("PLACE", "model"))
    assert "its `config.json` names `../other.safetensors`" in command("validate", path).err


def test_sharded_weights_may_be_links_in_trusted_files(here: Path, command: Command) -> None:
    """The hub's cache has links; for untrusted files they must stay in the folder."""
    index(here, "1.safetensors", "more/2.safetensors")
    (here / "model" / "more").mkdir()
    (here / "model" / "1.safetensors").symlink_to(here.parent / "elsewhere" / "blob")
    (here / "model" / "more" / "2.safetensors").symlink_to(here / "model" / "blob")
    path = written(here, EXAMPLES["local"][1].replace("PLACE", "model"))
    assert command("validate", path).status == 0
    assert (
        "[E0535]: `local` names `model/1.safetensors`"
        in command("validate", "--untrusted", path).err
    )
    (here / "model" / "1.safetensors").unlink()
    assert command("validate", "--untrusted", path).status == 0
    (here / "model" / "more" / "2.safetensors").unlink()
    (here / "model" / "more" / "2.safetensors").symlink_to(here.parent / "elsewhere" / "blob")
    done = command("validate", "--untrusted", path)
    assert "[E0535]: `local` names `model/more/2.safetensors`" in done.err
    assert "`model.safetensors.index.json` refers to it" in done.err


def test_cached_model_of_links_is_accepted(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(here, "1.safetensors")
    (here / "model" / "1.safetensors").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(here.parent / "cache"))
    model = here.parent / "cache" / "models--a--b"
    shutil.move(here / "model", model / "blobs")
    (model / "snapshots" / "main").mkdir(parents=True)
    for path in (model / "blobs").iterdir():
        (model / "snapshots" / "main" / path.name).symlink_to(path)
    text = EXAMPLES["hf"][1].replace("PLACE", "a/b")
    done = command("validate", "--untrusted", "--require-models", written(here, text))
    assert done.status == 0, done.err


def test_model_folder_with_kernels_or_pipes_is_rejected(here: Path, command: Command) -> None:
    filled(here)
    path = written(here, EXAMPLES["local"][1].replace("PLACE", "model"))
    config = json.loads((here / "model" / "config.json").read_text())
    kernels = ({"": "eager", "text_config": "a/b"}, "a/b@main", "a/b:c")
    for kernel in (*({"attn_implementation": each} for each in kernels),
                   {"text_config": {"_attn_implementation_internal": "a/b"}}):  # fmt: skip
        (here / "model" / "config.json").write_text(json.dumps(config | kernel))
        assert "[E0433]" in command("validate", path).err, kernel
    (here / "model" / "config.json").write_text(json.dumps(config))
    (here / "model" / "tokenizer.json").unlink()
    os.mkfifo(here / "model" / "tokenizer.json")  # which would wait for a writer
    assert "`local` names `model/tokenizer.json`, which is a pipe" in command("validate", path).err


def test_untrusted_checkpoint_pattern_lists_no_other_folder(here: Path, command: Command) -> None:
    (here.parent / "elsewhere" / "step-secret").mkdir()
    text = HEADS.replace('zoo("counting")', 'local("../elsewhere/step-*")')
    done = command("validate", "--untrusted", written(here, text))
    assert "[E0535]" in done.err
    assert "secret" not in done.err


def test_imported_file_has_the_restrictions_of_the_importing_file(
    here: Path, command: Command
) -> None:
    (here / "below").mkdir()
    (here / "below" / "common.mech").write_text(
        "mech 1\n" + PROMPTS.replace("PLACE", "../../elsewhere/data.csv"), encoding="utf-8"
    )
    filled(here.parent / "elsewhere")
    text = """mech 1
use "below/common.mech"
model toy = zoo("counting")
experiment e {
  prompts p
  ablate layer 0 head * at last token with zero
  measure entropy as delta
}
"""
    assert "[E0535]: `rows`" in command("validate", "--untrusted", written(here, text)).err


def test_untrusted_file_runs_no_python(here: Path, command: Command) -> None:
    (here / "metrics.py").write_text("def own(logits, rows):\n    return logits[:, 0]\n")
    path = written(here, EXAMPLES["python"][1].replace("PLACE", "metrics.py"))
    assert command("validate", path).status == 0
    done = command("validate", "--untrusted", path)
    assert "error[E0221]" in done.err
    assert "`own` is Python code, which runs only if you allow it" in done.err
    assert "--allow-python" in done.err
    assert "--untrusted" in done.err
    done = command("run", "--untrusted", "--allow-python", path)
    assert "[E0208]: `--untrusted` and `--allow-python` contradict each other" in done.err
    assert "error[E0221]" in done.err
    assert "E0208" in command("validate", "--untrusted", "--allow-outside", path).err


def test_data_from_a_pipe_is_rejected(here: Path, command: Command) -> None:
    os.mkfifo(here / "data.csv")  # which would wait for a writer
    done = command("validate", written(here, EXAMPLES["rows"][1].replace("PLACE", "data.csv")))
    assert "[E0532]: `rows` names `data.csv`, which is a pipe" in done.err


def test_revision_with_a_path_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    assert find_snapshot("a/b", "../../secret") is None
    assert find_snapshot("a/b", str(tmp_path / "secret")) is None


# --- completeness ---


def test_every_construct_has_an_example() -> None:
    assert set(EXAMPLES) == {each.name for each in PATH_CONSTRUCTS}


def test_only_the_paths_module_resolves_paths_of_a_file() -> None:
    """Only `mechdsl/program/paths.py` resolves paths of a file, each with a listed construct."""
    uses = {
        (path.relative_to(PACKAGE).as_posix(), line.strip())
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\bsource\.folder\b|\.path\.parent\b", line)
    }
    # `resolve/controls.py` names the folder of a training in the store; the modules of dictionaries
    # ask for the folder of weights whose path is resolved.
    allowed = {
        "base/text.py",
        "dictionaries/folder.py",
        "program/paths.py",
        "resolve/bases.py",
        "resolve/controls.py",
    }
    # These modules find models in a folder that they pass to `path_to_read`.
    bases = {
        "checks/file_check.py",
        "checks/models.py",
        "loading/loader.py",
        "models/folder.py",
        "pipeline/identities.py",
        "pipeline/loaded_models.py",
    }
    others = {use for use in uses if use[0] not in allowed}
    assert {name for name, _ in others} == bases
    assert all("locate_model(model, model.span.source.folder" in line for _, line in others)


STRINGS = {
    "use": True,
    "to_file": True,
    "save": True,
    "turn": False,
    "template": False,
    "classes": False,
    "renamed": False,
    "span_def": False,
    "span_text": False,
    "_change_value": False,
    "citing": False,
    "stopped": False,
    "atom": False,
    "chat_argument": False,
}
"""Grammar rules that contain a string → whether the string is a path."""


def test_every_string_of_the_grammar_is_classified() -> None:
    rules = re.split(r"(?m)^(?=[?!]?\w+\s*:)", grammar_file().read_text(encoding="utf-8"))
    found = {
        re.match(r"[?!]?(\w+)", rule)[1]  # type: ignore[index]
        for rule in rules
        if re.search(r"\bstring\b", rule.partition(":")[2].partition("//")[0])
    }
    assert found == set(STRINGS)


# --- other files are not quoted ---


def test_file_of_another_type_is_not_quoted(here: Path, command: Command) -> None:
    secret = here / "secret.txt"
    secret.write_text("password: hunter2\n", encoding="utf-8")
    (here / "link.mech").symlink_to(secret)
    for name in ("secret.txt", "link.mech"):
        for each in (*COMMANDS, "fmt"):
            done = command(each, here / name)
            assert done.status == 2
            assert "[E0534]" in done.err
            assert "hunter2" not in done.err + done.out
        done = command("validate", written(here, f'mech 1\nuse "{name}"\n'))
        assert f"`{name}` cannot be imported: it is not a `.mech` file" in done.err
        assert "hunter2" not in done.err


def test_file_without_extension_is_accepted_if_it_begins_with_mech(
    here: Path, command: Command
) -> None:
    path = here / "piped"
    path.write_text("# by another program\n" + HEADS, encoding="utf-8")
    assert command("validate", path).status == 0
