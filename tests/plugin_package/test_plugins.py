"""A plugin installed from a wheel and loaded with `--plugin` or `plugins=`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mechdsl.checks.file_check import check_source
from mechdsl.syntax.frontend import read_source

from ..quick import some

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BROKEN = {
    "unset": ("x = 1\ny = undefined\n", "NameError: name 'undefined' is not defined", "line 2"),
    "absent": ("import nothing_of_that_name\n", "ModuleNotFoundError", "line 1"),
    "syntax": ("def f(:\n", "SyntaxError: invalid syntax", "line 1"),
    "twice": (
        "from mechdsl.rules.kinds import SiteRule, rule_kind\n"
        "@rule_kind('scale')\nclass Scale(SiteRule): pass\n",
        "ValueError",
        "line 2",
    ),
    "incomplete": (
        "from mechdsl.program.direction_methods import FittedMethod, direction_method\n"
        "@direction_method('median')\nclass Median(FittedMethod):\n    takes = 'block'\n",
        "TypeError: direction method `median`: `example` must be a call",
        "line 2",
    ),
    "unfinished": (
        "from mechdsl.program.estimators import GradientEstimator, estimator\n"
        "@estimator('power')\nclass Power(GradientEstimator):\n    example = 'using power'\n",
        "TypeError: estimator `power`: `documentation` must be a text",
        "line 2",
    ),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel of the plugin is installed into."""
    folder = tmp_path_factory.mktemp("plugin")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "mechdsl_example_plugin.py"):
        (source / name).write_bytes((HERE / name).read_bytes())
    target = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    pip += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(target)]
    subprocess.run([*pip, str(source)], check=True)
    return target


@pytest.fixture
def installed(built: Path, tmp_path: Path) -> Path:
    """A folder with the installed plugin and `example.mech`."""
    for path in built.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copied = tmp_path / "lib" / path.relative_to(built)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())
    (tmp_path / "example.mech").write_bytes((HERE / "example.mech").read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def unchanged(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unchanged plugin and the files that are run with it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "lib").symlink_to(built, target_is_directory=True)
    (folder / "example.mech").write_bytes((HERE / "example.mech").read_bytes())
    (folder / "tied.mech").write_text(TRAINED, encoding="utf-8")
    (folder / "bands.mech").write_text(IMAGES, encoding="utf-8")
    return folder


FIT_AND_RUN = """
import sys
from mechdsl.cli.entry import main
files = "example.mech", "tied.mech", "bands.mech"
for command in (["fit", "tied.mech"], ["run", *files]):
    sys.argv[1:] = [*command, "--plugin", "example", "--format", "json"]
    try:
        main()
    except SystemExit as error:
        assert error.code == 0
"""
"""Two commands in one process, which imports torch once."""


@pytest.fixture(scope="module")
def documents(unchanged: Path) -> list[Any]:
    """JSON of the command line with the unchanged plugin: of `fit` and of `run`."""
    done = python(unchanged, "-c", FIT_AND_RUN)
    assert done.returncode == 0, done.stderr
    trained, end = json.JSONDecoder().raw_decode(done.stdout)
    return [trained, json.loads(done.stdout[end:])]


@pytest.fixture(scope="module")
def training(documents: list[Any]) -> dict[str, Any]:
    """The training of `tied.mech`."""
    (found,) = documents[0]["fits"]
    return found


@pytest.fixture(scope="module")
def document(documents: list[Any]) -> dict[str, Any]:
    """The results of the files."""
    return documents[1]


MISTAKES: dict[str, list[tuple[str, str, str]]] = {
    "gradient_power(power: 3)": [
        ("gradient_powr", "estimator called `gradient_powr`", "did you mean `gradient_power`?"),
        ("gradient_power(power: 0)", "`power` must be at least 1", "write `power: 1`"),
        ("gradient_power(power: 1.5)", "`power` must be a whole number", "write `power: 1`"),
        ("gradient_power(steps: 4)", "takes no such argument", "write `gradient_power(power: 1)`"),
    ],
    "tied(features: 64)": [
        ("tide(features: 64)", "no trainer called `tide`", "did you mean `tied`?"),
        ("tied(features: 0)", "`features` must be a whole number", "write `features: 64`"),
        ("tied", "needs `features: …`", "write `tied(features: 64)`"),
    ],
    "bands(8)": [
        ("band", "there is no image called `band`", "did you mean `bands`?"),
        ("bands(0)", "takes a height in pixels from 1 to 64, not 0", "write one from 1 to 64"),
        ("bands(2, 3)", "takes one number", "write `bands(8)`, a height in pixels from 1 to 64"),
    ],
}
"""Call in a file → invalid replacements, each with its message and hint."""


def test_invalid_calls_of_plugin_entries_report_message_and_hint(
    unchanged: Path, tmp_path: Path
) -> None:
    """All mistakes in one process."""
    (tmp_path / "lib").symlink_to(unchanged / "lib", target_is_directory=True)
    files = ("example.mech", "tied.mech", "bands.mech")
    expected: dict[str, tuple[str, str]] = {}
    for file, (call, mistakes) in zip(files, MISTAKES.items(), strict=True):
        text = (unchanged / file).read_text("utf-8")
        assert call in text
        for written, message, hint in mistakes:
            name = f"{len(expected)}.mech"
            (tmp_path / name).write_text(text.replace(call, written), encoding="utf-8")
            expected[name] = message, hint
    done = mechdsl(tmp_path, "validate", "--plugin", "example", "--format", "json", *expected)
    assert done.returncode == 2
    errors = [each for each in json.loads(done.stdout) if each["severity"] == "error"]
    assert {each["file"] for each in errors} == {*expected}
    for name, (message, hint) in expected.items():
        own = [each for each in errors if each["file"] == name]
        said = "\n".join(f"{each['message']} {each['label']} {each['help']}" for each in own)
        assert message in said
        assert hint in said


def experiment_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    every = [each for file in document["files"] for each in file["experiments"]]
    return next(each for each in every if each["name"] == name)


def environment(folder: Path) -> Mapping[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder / 'lib'}",
        "PYDANTIC_DISABLE_PLUGINS": "1",  # as the command line
        "MECHDSL_STORE": str(folder / "store"),
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )


def mechdsl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "mechdsl", *arguments)


def expected_delta(folder: Path) -> list[float]:
    """Mean delta of `steered`, by hooks on the bare model and numpy's median."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(ROOT / "mechdsl" / "zoo" / "counting")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = (folder / "example.mech").read_text("utf-8").split("experiment stretched")[0]
    text = text.replace("median(", "mean(").replace("reverse said", 'said = "fig"')
    (folder / "plain.mech").write_text(text, encoding="utf-8")
    source, _ = read_source(folder / "plain.mech")
    assert source is not None
    (experiment,) = check_source(source).experiments
    rows = experiment.table.runs["clean"].rows
    added: list[torch.Tensor] = []
    seen: list[np.ndarray] = []

    def hook(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        found = output.clone()
        seen.append(found[0, -1].double().numpy())
        for vector in added:
            found[0, -1] += vector
        return found

    handle = model.model.layers[2].register_forward_hook(hook)
    answers = [tokenizer.encode(f" {row.values['count']}", add_special_tokens=False)[0]
               for row in rows]  # fmt: skip

    def logits() -> list[float]:
        with torch.no_grad():
            outputs = [model(torch.tensor([list(row.ids)])).logits[0, -1] for row in rows]
        return [float(each[answer]) for each, answer in zip(outputs, answers, strict=True)]

    before = logits()
    added.append(torch.from_numpy(np.median(np.stack(seen), axis=0)).float())
    after = logits()
    handle.remove()
    return [b - a for a, b in zip(before, after, strict=True)]


def test_validate_accepts_the_file_only_with_the_plugin(
    installed: Path,
) -> None:
    done = mechdsl(installed, "validate", "--plugin", "example", "example.mech")
    assert (done.returncode, done.stdout) == (0, "1 file checked: no errors\n"), done.stderr
    (installed / "tied.mech").write_text(TRAINED, encoding="utf-8")
    done = mechdsl(installed, "validate", "example.mech", "tied.mech")
    assert done.returncode == 2
    for word in ("reverse", "median", "stretch", "centered_logit", "gradient_power", "rms"):
        assert f"`{word}`" in done.stderr
    assert "there is no trainer called `tied`" in done.stderr


def test_median_of_the_plugin_agrees_with_hooks(document: dict[str, Any], installed: Path) -> None:
    assert document["versions"]["mechdsl-example-plugin"] == "0.1"
    check_median(document, installed)


@pytest.mark.slow
def test_median_of_the_plugin_agrees_with_hooks_in_python(installed: Path) -> None:
    script = (
        "import json, mechdsl\n"
        "found = mechdsl.run('example.mech', plugins=('example',), store=False)\n"
        "print(found.to_json())\n"
    )
    done = python(installed, "-W", "ignore", "-c", script)
    assert done.returncode == 0, done.stderr
    check_median(json.loads(done.stdout), installed)


def check_median(document: dict[str, Any], folder: Path) -> None:
    steered = document["files"][0]["experiments"][0]
    assert "median of 8 rows of fruit" in steered["conventions"]["direction middle"]
    assert mean_delta(steered) == pytest.approx(np.mean(expected_delta(folder)), abs=1e-4)


def mean_delta(experiment: dict[str, object]) -> float:
    return experiment["cells"][0]["measures"][0]["mean"]  # type: ignore[index]


def expected_power(folder: Path, power: int) -> float:
    """Mean over prompts of Σ |gradient|^power of `sensitive`, by autograd on the bare model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(ROOT / "mechdsl" / "zoo" / "counting")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = (folder / "example.mech").read_text("utf-8").split("direction middle")[0]
    text = text.replace("reverse said", 'said = "fig"')
    text += "experiment e {\n  model toy\n  prompts fruit\n  measure logit(answer) as raw\n}\n"
    (folder / "plain.mech").write_text(text, encoding="utf-8")
    source, _ = read_source(folder / "plain.mech")
    assert source is not None
    (experiment,) = check_source(source).experiments
    found: list[float] = []
    for row in experiment.table.runs["clean"].rows:
        leaf = torch.zeros(model.config.hidden_size, requires_grad=True)

        def hook(_: object, __: object, output: torch.Tensor, leaf: torch.Tensor = leaf) -> object:
            at_last = torch.zeros(output.shape[1], 1)
            at_last[-1] = 1
            return output + at_last * leaf

        handle = model.model.layers[2].register_forward_hook(hook)
        answer = tokenizer.encode(f" {row.values['count']}", add_special_tokens=False)[0]
        logit = model(torch.tensor([list(row.ids)])).logits[0, -1, answer]
        (gradient,) = torch.autograd.grad(logit, leaf)
        handle.remove()
        found.append(float(gradient.double().abs().pow(power).sum()))
    return float(np.mean(found))


def sensitive(folder: Path) -> dict[str, Any]:
    """The experiment `sensitive` of a stored run with the plugin."""
    done = mechdsl(folder, "run", "--plugin", "example", "--format", "json", "example.mech")
    assert done.returncode == 0, done.stderr
    every = json.loads(done.stdout)["files"][0]["experiments"]
    return next(each for each in every if each["name"] == "sensitive")


def test_estimator_of_the_plugin_agrees_with_autograd(
    document: dict[str, Any], installed: Path
) -> None:
    found = experiment_of(document, "sensitive")
    assert mean_delta(found) == pytest.approx(expected_power(installed, 3), rel=1e-4)
    said = found["conventions"]
    assert said["estimates"].startswith("`gradient_power(power: 3)`: no effect: powers of the")
    assert said["effect"] == "gradient power = Σ |∂m/∂site|^power"
    assert "fill" in said


@pytest.mark.slow
def test_estimator_of_the_plugin_has_a_default_option(installed: Path) -> None:
    file = installed / "example.mech"
    file.write_text(file.read_text("utf-8").replace("(power: 3)", ""), encoding="utf-8")
    found = sensitive(installed)
    assert mean_delta(found) == pytest.approx(expected_power(installed, 1), rel=1e-4)


@pytest.mark.slow
def test_edited_estimator_of_the_plugin_is_recomputed(installed: Path) -> None:
    first = sensitive(installed)
    module = installed / "lib" / "mechdsl_example_plugin.py"
    text = module.read_text("utf-8")
    changed = text.replace('pow(options["power"]).sum(-1)', 'pow(options["power"]).sum(-1) * 2')
    assert changed != text
    module.write_text(changed, encoding="utf-8")
    double = sensitive(installed)
    assert mean_delta(double) == pytest.approx(2 * mean_delta(first), rel=1e-6)


def restored(folder: Path) -> dict[str, Any]:
    """The experiment `restored` of a run with the plugin, whether or not its expectation holds."""
    done = mechdsl(folder, "run", "--plugin", "example", "--format", "json", "example.mech")
    assert done.returncode in (0, 1), done.stderr
    every = json.loads(done.stdout)["files"][0]["experiments"]
    return next(each for each in every if each["name"] == "restored")


def test_aggregate_of_the_plugin_is_computed_from_the_cells(document: dict[str, Any]) -> None:
    found = experiment_of(document, "restored")
    effects = [cell["measures"][0]["mean"] for cell in found["cells"]]
    (verdict,) = found["expect"]
    assert verdict["value"] == pytest.approx(np.sqrt(np.mean(np.square(effects))), rel=1e-6)
    assert verdict["low"] < verdict["value"] < verdict["high"]


@pytest.mark.slow
def test_edited_aggregate_of_the_plugin_is_recomputed(installed: Path) -> None:
    first = restored(installed)["expect"][0]
    module = installed / "lib" / "mechdsl_example_plugin.py"
    text = module.read_text("utf-8")
    module.write_text(text.replace("mean(1) ** 0.5", "mean(1) ** 0.5 * 2"), encoding="utf-8")
    assert restored(installed)["expect"][0]["value"] == pytest.approx(2 * first["value"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("values / undefined", "`combine` of `rms` failed: NameError: name 'undefined'"),
        ("values", "`combine` of `rms` returned the shape [1, 4] instead of [1]"),
    ],
)
def test_failing_aggregate_of_the_plugin_fails_only_its_expectation(
    returned: str, reason: str, installed: Path
) -> None:
    module = installed / "lib" / "mechdsl_example_plugin.py"
    text = module.read_text("utf-8")
    module.write_text(text.replace("(values**2).mean(1) ** 0.5", returned), encoding="utf-8")
    found = restored(installed)
    assert len(found["cells"]) == 4
    (verdict,) = found["expect"]
    assert not verdict["holds"]
    assert reason in verdict["reason"]


def test_statistic_of_the_plugin_is_computed_from_the_rows(
    document: dict[str, Any], installed: Path
) -> None:
    """`spread` of the effects of one added vector, from hooks on the bare model."""
    expected = expected_delta(installed)
    steered = document["files"][0]["experiments"][0]
    low, high = np.quantile(expected, [0.25, 0.75])
    (measure,) = steered["cells"][0]["measures"]
    assert measure["statistics"]["spread"] == pytest.approx(high - low, abs=1e-4)
    assert steered["conventions"]["spread"] == "interquartile range of the effects of the rows"


@pytest.mark.slow
def test_plugin_statistic_is_a_column_only_with_the_plugin(installed: Path) -> None:
    done = mechdsl(installed, "run", "--plugin", "example", "example.mech")
    header = next(line for line in done.stdout.splitlines() if "95 % interval" in line)
    assert "spread" in header.split()
    without = mechdsl(installed, "run", str(ROOT / "examples" / "counting.mech"))
    assert "spread" not in without.stdout


@pytest.mark.slow
def test_exception_in_a_plugin_statistic_keeps_other_values(installed: Path) -> None:
    module = installed / "lib" / "mechdsl_example_plugin.py"
    text = module.read_text("utf-8")
    module.write_text(text.replace("return high - low", "return undefined"), encoding="utf-8")
    steered = restored(installed)
    measure = steered["cells"][0]["measures"][0]
    assert measure["statistics"] == {"spread": None}
    assert measure["mean"] is not None
    assert "`compute` failed: NameError: name 'undefined'" in steered["conventions"]["spread"]


TRAINED = """mech 1

model toy = zoo("induction")

prompts repeats {
  word in words(toy)
  half = list(word, 4, sep: " ", distinct: true)
  template "{half} {again = half} {cue = half[1]}"
  answer " {half[2]}"
  split 80%
}

basis f = fit(tied(features: 64), prompts: repeats.train, limit: 60, steps: 50) at STREAM

experiment features {
  model toy
  prompts repeats.test limit 16
  ablate feature 0..3 of f at last token with zero
  measure logit(answer) as delta
}
""".replace("STREAM", "resid_post layer 0 at tokens 1..-1")


def test_trainer_of_the_plugin_trains_a_dictionary_that_rules_use(
    training: dict[str, Any], document: dict[str, Any]
) -> None:
    report = training["report"]
    assert report["explained"] > report["untrained_explained"]
    weights = load_file(Path(training["folder"]) / "sae_weights.safetensors")
    cosines = torch.nn.functional.cosine_similarity(weights["W_enc"].T, weights["W_dec"])
    assert torch.allclose(cosines, torch.ones(64), atol=1e-5)
    said = experiment_of(document, "features")["conventions"]["basis f"]
    assert said.startswith("standard SAE trained on 60 rows of repeats.train")


IMAGES = """mech 1

model vit = zoo("shapes")

images neutral {
  image bands(8)
  answer "circle"
}

experiment image {
  images neutral
  scale resid_post layer 0 at tokens * by 1
  measure logit(answer) as raw
}
"""


@pytest.mark.parametrize(
    ("call", "height"), [pytest.param("bands", 4, marks=pytest.mark.slow), ("bands(8)", 8)]
)
def test_baseline_image_of_the_plugin_agrees_with_the_bare_model(
    call: str, height: int, document: dict[str, Any], installed: Path
) -> None:
    from transformers import AutoModelForImageClassification

    if f"image {call}\n" not in IMAGES:
        (installed / "bands.mech").write_text(IMAGES.replace("bands(8)", call), encoding="utf-8")
        done = mechdsl(installed, "run", "--plugin", "example", "--format", "json", "bands.mech")
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
    experiment = experiment_of(document, "image")
    path = str(ROOT / "mechdsl" / "zoo" / "shapes")
    model = AutoModelForImageClassification.from_pretrained(path).float().eval()
    image = np.zeros((32, 32, 3), np.uint8)
    for row in range(32):
        image[row] = 255 * (row // height % 2)
    with torch.no_grad():
        pixels = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
        expected = model(pixels).logits[0, model.config.label2id["circle"]]
    assert mean_delta(experiment) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.slow
def test_exception_in_a_baseline_image_is_an_error_with_its_cause(installed: Path) -> None:
    (installed / "bands.mech").write_text(IMAGES, encoding="utf-8")
    module = installed / "lib" / "mechdsl_example_plugin.py"
    text = module.read_text("utf-8")
    module.write_text(text.replace("np.arange(size[0])", "undefined"), encoding="utf-8")
    done = mechdsl(installed, "run", "--plugin", "example", "bands.mech")
    assert "`pixels` of `bands` failed: NameError: name 'undefined' is not defined" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode != 0


@pytest.mark.slow
def test_explain_plan_graph_and_fmt_load_the_plugin(installed: Path) -> None:
    for command in ("explain", "plan", "graph"):
        done = mechdsl(installed, command, "--plugin", "example", "example.mech")
        assert done.returncode == 0, done.stderr
        assert "median of 8 rows of fruit" in done.stdout
    done = mechdsl(installed, "fmt", "--check", "--plugin", "example", "example.mech")
    assert done.returncode == 0, done.stderr
    assert mechdsl(installed, "sites", "--plugin", "example", "counting").returncode == 0
    script = (
        "import mechdsl\n"
        "given = dict(plugins='example')\n"
        "assert not mechdsl.validate('example.mech', **given).errors\n"
        "for view in (mechdsl.explain, mechdsl.plan, mechdsl.graph):\n"
        "    assert 'median of 8 rows' in view('example.mech', **given)\n"
    )
    done = python(installed, "-W", "ignore", "-c", script)
    assert done.returncode == 0, done.stderr


def norm(table: str) -> float:
    """The norm of the direction, as the conventions print it."""
    return float(table.partition("; norm ")[2].split()[0])


@pytest.mark.slow
def test_run_key_depends_on_code_and_version_of_the_plugin(installed: Path) -> None:
    run = ("run", "--plugin", "example", "example.mech")
    first = mechdsl(installed, *run)
    assert "from the store" not in first.stderr
    assert "from the store" in mechdsl(installed, *run).stderr
    module = installed / "lib" / "mechdsl_example_plugin.py"
    text = module.read_text("utf-8")
    module.write_text(text.replace("axis=0)", "axis=0) * 2"), encoding="utf-8")
    changed = mechdsl(installed, *run)
    assert "from the store" not in changed.stderr
    assert norm(changed.stdout) == pytest.approx(2 * norm(first.stdout), rel=1e-3)
    assert "from the store" in mechdsl(installed, *run).stderr
    (info,) = (installed / "lib").glob("*.dist-info")
    metadata = info / "METADATA"
    written = metadata.read_text("utf-8").replace("Version: 0.1", "Version: 0.2")
    metadata.write_text(written, encoding="utf-8")
    # The version is only part of the run key: cached values depend on the code, which is equal.
    assert "unchanged since" not in mechdsl(installed, *run).stderr


def test_code_of_a_plugin_in_site_packages_is_hashed(installed: Path) -> None:
    script = (
        "import sys\n"
        "sys.path.insert(0, 'site-packages')\n"
        "from mechdsl.program.plugins import hash_plugin_code, load_plugins\n"
        "assert not load_plugins(['example'])\n"
        "print(hash_plugin_code()['mechdsl_example_plugin'])\n"
    )
    (installed / "lib").rename(installed / "site-packages")
    first = python(installed, "-c", script)
    assert first.returncode == 0, first.stderr
    module = installed / "site-packages" / "mechdsl_example_plugin.py"
    module.write_text(module.read_text("utf-8") + "# changed\n", encoding="utf-8")
    assert python(installed, "-c", script).stdout not in ("", first.stdout)


@pytest.mark.parametrize(
    "command", some(["validate", "run", "plan", "explain", "graph", "fmt"], ["validate", "run"])
)
def test_unknown_plugin_lists_installed_plugins_and_suggests_one(
    command: str, installed: Path
) -> None:
    done = mechdsl(installed, command, "--plugin", "exmaple", "example.mech")
    assert done.returncode == 2
    assert "error[E0211]: plugin `exmaple` is not installed" in done.stderr
    assert "did you mean `example`? Installed plugin: `example`" in done.stderr
    assert "1 error" in done.stderr


@pytest.mark.parametrize("name", some(BROKEN, [*BROKEN][:2]))
def test_exception_during_import_is_an_error_with_its_cause(name: str, tmp_path: Path) -> None:
    text, message, line = BROKEN[name]
    info = tmp_path / "lib" / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: broken\nVersion: 1.0\n", encoding="utf-8")
    points = f"[mechdsl.plugins]\n{name} = broken_{name}\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    (tmp_path / "lib" / f"broken_{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "example.mech").write_bytes((HERE / "example.mech").read_bytes())
    done = mechdsl(tmp_path, "validate", "--plugin", name, "example.mech")
    assert done.returncode == 2
    assert f"error[E0211]: plugin `{name}` can't be imported: {message}" in done.stderr
    assert f"correct `broken_{name}.py`, {line}" in done.stderr
    script = (
        "import mechdsl\n"
        f"(found,) = mechdsl.validate('example.mech', plugins=['{name}'])\n"
        "assert found.code == 'E0211'\n"
        "try:\n"
        f"    mechdsl.run('example.mech', plugins=['missing'])\n"
        "except mechdsl.MechdslError as error:\n"
        f"    assert 'Installed plugin' in str(error) or '`{name}`' in str(error)\n"
    )
    done = python(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr


def test_validate_imports_plugins_and_reads_metadata_only_if_asked(installed: Path) -> None:
    script = (
        "import sys\n"
        "from importlib import metadata\n"
        "def entry_points(**_): raise AssertionError('metadata is read')\n"
        "metadata.entry_points = entry_points\n"
        "from mechdsl.cli.entry import app\n"
        "app(['validate', 'example.mech'], standalone_mode=False)\n"
        "assert 'mechdsl_example_plugin' not in sys.modules\n"
    )
    done = python(installed, "-c", script)
    assert done.returncode == 0, done.stderr
    script = (
        "import sys\n"
        "from mechdsl.cli.entry import app\n"
        "app(['validate', '--plugin', 'example', 'example.mech'], standalone_mode=False)\n"
        "assert 'mechdsl_example_plugin' in sys.modules\n"
        "assert 'numpy' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = python(installed, "-c", script)
    assert done.returncode == 0, done.stderr


def test_page_shows_the_files_of_the_package() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text("utf-8")
    for name in ("pyproject.toml", "mechdsl_example_plugin.py"):
        assert (HERE / name).read_text("utf-8") in page
