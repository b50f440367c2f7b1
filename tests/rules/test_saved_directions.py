"""`save direction`: files against reference directions, and statements that read the files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.results.experiment_result import FileResult

from ..execute.support import MODES, run_on, shared
from ..quick import in_turn
from ..reference.forward import Changes, Write, forward
from .models import bare
from .support import (
    BLOCKS,
    agree,
    codes,
    experiment,
    plain,
    records,
    rows,
    run_file,
    try_file,
    unpatched,
    worked_out,
)
from .test_steering import EACH, mean, plus, writes

FAMILIES = ("gpt2", "llama", "gpt_neox")
FAMILY = "direction d = mean_difference(p.other, second) at resid_post layer * at last token\n"


def write(*lines: str, before: str = FAMILY, name: str = "w") -> str:
    body = "\n".join(f"  {line}" for line in ("model m", *lines))
    return f"{before}experiment {name} {{\n{body}\n}}\n"


def saved(text: str, folder: Path, family: str, mode: str = "planned") -> FileResult:
    result, found = try_file(text, folder, family, mode)
    assert result is not None, found
    assert not [each for each in found if each.severity == "error"]
    return result


def by_layer(family: str, site: str = "resid_post") -> list[Tensor]:
    at = "last token"
    return [mean(family, "other", site, n, at) - mean(family, "second", site, n, at)
            for n in range(3)]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "family"), in_turn(["plain", "planned", "padded on the right"], FAMILIES)
)
def test_saved_directions_equal_the_reference(mode: str, family: str, data: Path) -> None:
    """Every member, one member, one in half precision, and a combined direction."""
    before = FAMILY + (
        "direction e = unit(d[layer 2])\n"
        "direction s = mean(p) at z layer 1 head * at cue token, last token\n"
        'direction u = unembedding(" w3", " w9")\n'
    )
    text = write(
        'save direction d to "d.safetensors"',
        'save direction d[layer 1] to "one.safetensors" as float16',
        'save direction e to "new/e.safetensors"',
        'save direction s to "s.safetensors" as bfloat16',
        'save direction u to "u.safetensors"',
        before=before,
    )
    result = saved(text, data, family, mode)
    layers = by_layer(family)
    expected = {f"d.layer{n}": vector for n, vector in enumerate(layers)}
    found = load_file(data / "d.safetensors")
    assert found.keys() == expected.keys()
    for name, vector in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), vector, atol=1e-4, rtol=1e-3)
    one = load_file(data / "one.safetensors")["d"]
    torch.testing.assert_close(one, found["d.layer1"].to(torch.float16))
    length = load_file(data / "new" / "e.safetensors")["e"].double()
    torch.testing.assert_close(length, layers[2] / layers[2].norm(), atol=1e-4, rtol=1e-3)
    heads = load_file(data / "s.safetensors")
    assert heads.keys() == {f"s.head{h}.position{n}" for h in range(4) for n in range(2)}
    for head in range(4):
        for number, at in enumerate(("cue token", "last token")):
            vector = heads[f"s.head{head}.position{number}"]
            own = mean(family, "clean", "z", 1, at, head)
            assert vector.dtype == torch.bfloat16
            torch.testing.assert_close(vector.double(), own, atol=1e-2, rtol=1e-2)
    assert load_file(data / "u.safetensors")["u"].shape == layers[0].shape
    said = result.saved[0]
    assert (said.kind, said.direction, said.tensors, said.rows) == ("direction", "d", 3, None)
    assert said.bytes == (data / "d.safetensors").stat().st_size
    with safe_open(data / "d.safetensors", "pt") as file:
        about = file.metadata()
    assert about["direction"] == "d"
    assert json.loads(about["made"])["d.layer2"].startswith("mean over")


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_directions_and_means_are_read_by_rules(family: str, data: Path) -> None:
    """A family, a member, and a mean of activations, in rules of another file."""
    saved(
        write(
            'save direction d to "d.safetensors"',
            'save direction d[layer 1] to "one.safetensors"',
            "prompts p",
            'save mean of resid_post layer 2 at last token to "m.safetensors"',
        ),
        data,
        family,
    )
    read = (
        'direction e = saved("d.safetensors", "d") at resid_post layer *\n'
        'direction f = saved("one.safetensors", "d")\n'
        'direction g = saved("one.safetensors", "d") at resid_post layer *\n'
        'direction v = saved("m.safetensors", "resid_post.layer2")\n'
    )
    text = read + FAMILY
    for name in ("d", "e"):
        text += experiment(f"a{name}", f"add 2 * {name} to resid_post layer * at last token")
    for name in ("d[layer 1]", "f", "g"):
        text += experiment(f"b{name[0]}", f"add 2 * {name} to resid_post layer * at cue token")
    text += experiment("set", "set resid_post layer 2 at last token to v")
    found = run_file(text, data, family, "planned")
    for first, second in (("ad", "ae"), ("bd", "bf"), ("bd", "bg")):
        own, other = (found[name].measures[0].patched for name in (first, second))
        assert abs(own - other).max() < 1e-4
        assert abs(own - found[first].measures[0].base).max() > 0.1
    vector = mean(family, "clean", "resid_post", 2, "last token")

    def changes(n: int) -> list[Changes]:
        return [([Write("resid_post", 2, vector, rows()[n].last)], ())]

    values = worked_out(family, [()], changes, rows(), records())
    agree(found["set"], (), values, unpatched(family), most=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_set_to_saved_means_equals_mean_ablation(family: str, data: Path) -> None:
    """The means of a family of sites, each at its own site: a mean ablation with saved means."""
    lines = [
        'save mean of resid_post layer * of other at last token to "r.safetensors"',
        'save mean of z layer * head * of other at last token to "z.safetensors"',
    ]
    saved(write("prompts p", *lines, before=""), data, family)
    text = (
        'direction r = saved("r.safetensors", "resid_post") at resid_post layer *\n'
        'direction z = saved("z.safetensors", "z") at z layer * head *\n'
        + experiment("er", "set resid_post layer * at last token to r")
        + experiment("ez", "set z layer * head * at last token to z")
    )
    found = run_file(text, data, family, "planned")

    def stream(n: int, layer: int) -> list[Changes]:
        vector = mean(family, "other", "resid_post", layer, "last token")
        return [([Write("resid_post", layer, vector, rows()[n].last)], ())]

    def head(n: int, layer: int, unit: int) -> list[Changes]:
        vector = mean(family, "other", "z", layer, "last token", unit)
        return [([Write("z", layer, vector, rows()[n].last, unit)], ())]

    values = worked_out(family, EACH, stream, rows(), records())
    agree(found["er"], ("layer",), values, unpatched(family), most=False)
    cells = [(layer, unit) for layer in range(3) for unit in range(4)]
    values = worked_out(family, cells, head, rows(), records())
    agree(found["ez"], ("layer", "head"), values, unpatched(family), most=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_control_vector_equals_the_rule(family: str, data: Path) -> None:
    """Its tensors, added after the same blocks as in llama.cpp, give the values of a rule on these
    layers."""
    result = saved(write('save direction d to "d.gguf"'), data, family)
    reader = GGUFReader(data / "d.gguf")
    tensors = {each.name: torch.tensor(each.data) for each in reader.tensors}
    assert {each.tensor_type for each in reader.tensors} == {GGMLQuantizationType.F32}
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == family
    assert reader.fields["controlvector.layer_count"].contents() == 2
    assert tensors.keys() == {"direction.1", "direction.2"}
    assert result.saved[0].kind == "control vector"
    assert "without layer 0" in result.saved[0].line
    for layer, vector in enumerate(by_layer(family)[1:], start=1):
        own = tensors[f"direction.{layer}"].double()
        torch.testing.assert_close(own, vector, atol=1e-4, rtol=1e-3)
    rule = "for j in 1..2 { add 1.5 * d[layer j] to resid_post layer j at tokens * }"
    found = run_file(FAMILY + experiment("e", rule), data, family, "planned")["e"]

    def changes(n: int, layer: int) -> list[Changes]:
        vector = 1.5 * tensors[f"direction.{layer}"].double()
        return [(writes("resid_post", [layer], "tokens *", plus(vector))(n), ())]

    values = worked_out(family, EACH[1:], changes, rows(), records())
    agree(found, ("j",), values, unpatched(family), most=False)


def test_saved_best_direction_is_selected_after_the_run(data: Path) -> None:
    """It is known only after the other experiment; the file and the printed line name it."""
    sweep = experiment("sweep", "add 2 * d to resid_post layer * at last token")
    text = FAMILY + sweep + write('save direction d[best of sweep] to "b.safetensors"', before="")
    result = saved(text, data, "llama")
    measure = result.experiments[0].measures[0]
    best = int((measure.patched - measure.base).mean(axis=1).argmax())
    assert best != 0, "the placeholder is layer 0"
    found = load_file(data / "b.safetensors")["d"].double()
    torch.testing.assert_close(found, by_layer("llama")[best], atol=1e-4, rtol=1e-3)
    assert f"selected d[layer {best}] (" in result.saved[0].line


def test_control_vector_of_best_layer_zero_is_an_error(data: Path) -> None:
    """Of two layers, one is the best of each experiment; layer 0 can't be written."""
    rule = "add 2 * e to resid_post layer 0..1 at last token"
    text = FAMILY.replace("direction d", "direction e").replace("layer *", "layer 0..1")
    for name, sign in (("up", ""), ("down", "-1 * ")):
        measure = f"measure {sign}(logit(answer) - logit(wrong)) as delta"
        text += experiment(name, rule, measure=measure)
        line = f'save direction e[best of {name}] to "{name}.gguf"'
        text += write(line, before="", name=f"write_{name}")
    result, found = try_file(text, data, "llama")
    assert result is not None, found
    measure = result.experiments[0].measures[0]
    layers = (measure.patched - measure.base).mean(axis=1)
    written = "up" if layers[1] > layers[0] else "down"
    assert [each.path.name for each in result.saved] == [f"{written}.gguf"]
    assert [each.name for each in GGUFReader(data / f"{written}.gguf").tensors] == ["direction.1"]
    errors = [each for each in found if each.severity == "error"]
    assert [each.code for each in errors] == ["E0341"]
    assert "its only layer is 0" in errors[0].message


def test_saved_direction_between_two_models_equals_the_reference(data: Path) -> None:
    """A shift between two models, on rows of the experiment, which then needs prompts."""
    changed = copy.deepcopy(bare("llama"))
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.3)
    models = {"m": shared(bare("llama")), "other": shared(changed)}
    head = (
        'mech 1\nmodel m = local("handed over")\nmodel other = local("handed over too")\n'
        f"{BLOCKS}\ndirection a = mean_difference(other, m) at resid_post layer 1\n"
    )
    line = 'save direction a to "a.safetensors"'
    source = Source(head + write("prompts second", line, before=""), data / "file.mech")
    result, found = run_on(source, models, MODES["planned"])
    assert result is not None, found
    wide, texts = copy.deepcopy(changed).double(), rows("second")
    there = [forward("llama", wide, text.ids)["resid_post", 1][text.last, 0] for text in texts]
    here = [plain("llama", text)["resid_post", 1][text.last, 0] for text in texts]
    expected = torch.stack([a - b for a, b in zip(there, here, strict=True)]).mean(0)
    vector = load_file(data / "a.safetensors")["a"].double()
    torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-3)
    source = Source(head + write(line, before=""), data / "file.mech")
    result, found = run_on(source, models, MODES["planned"])
    assert result is None
    assert [each.code for each in found if each.severity == "error"] == ["E0206"]


def test_saved_direction_does_not_depend_on_rules_or_other_experiments(data: Path) -> None:
    """The direction depends neither on rules nor on other experiments that save it."""
    rule = "add d to resid_post layer 1 at last token"
    text = (
        FAMILY
        + experiment("e", rule, 'save direction d[layer 1] to "a.safetensors"')
        + write('save direction d[layer 1] to "b.safetensors"', before="")
    )
    result = saved(text, data, "llama")
    assert [each.name for each in result.experiments] == ["e"]
    first, second = (load_file(data / f"{name}.safetensors")["d"] for name in "ab")
    assert torch.equal(first, second)
    torch.testing.assert_close(first.double(), by_layer("llama")[1], atol=1e-4, rtol=1e-3)


def test_direction_is_saved_once_for_several_observations(data: Path) -> None:
    lines = ["observe norm resid_post layer * at last token as lengths",
             "observe norm mlp_out layer * at last token as sizes",
             'save direction d to "d.safetensors"']  # fmt: skip
    result = saved(FAMILY + experiment("e", *lines, measure=""), data, "llama")
    assert [each.name for each in result.experiments] == ["e.lengths", "e.sizes"]
    assert [each.path.name for each in result.saved] == ["d.safetensors"]


def test_zero_direction_is_an_error_of_its_save_alone(data: Path) -> None:
    before = FAMILY + "direction o = mean_difference(p, p) at resid_post layer 1 at last token\n"
    text = write(
        'save direction o to "o.safetensors"', 'save direction d to "d.safetensors"', before=before
    )
    result, found = try_file(text, data, "llama")
    assert result is not None
    assert [each.code for each in found if each.severity == "error"] == ["E0641"]
    assert [each.path.name for each in result.saved] == ["d.safetensors"]
    assert not (data / "o.safetensors").exists()


def test_zero_member_of_a_family_is_saved(data: Path) -> None:
    """All rows end in the same token, so that nothing differs before the first block."""
    before = "direction d = mean_difference(p.other, p) at resid_pre layer * at last token\n"
    saved(write('save direction d to "d.safetensors"', before=before), data, "llama")
    found = load_file(data / "d.safetensors")
    assert not found["d.layer0"].any()
    assert found["d.layer1"].any()


def test_failed_write_leaves_existing_files_unchanged(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mechdsl.execute.run.saves.sync_file", full)
    for name in ("d.safetensors", "d.gguf"):
        (data / name).write_bytes(b"before")
    text = write('save direction d to "d.safetensors"', 'save direction d to "d.gguf"')
    result, found = try_file(text, data, "llama")
    assert [each.code for each in found if each.severity == "error"] == ["E0533", "E0533"]
    assert result is None or not result.saved
    assert {(data / name).read_bytes() for name in ("d.safetensors", "d.gguf")} == {b"before"}
    assert not list(data.glob(".*part"))


REFUSED = {
    'save direction nothing to "a.safetensors"': "E0201",
    'save direction d to "a.pt"': "E0207",
    'save direction d to "a.gguf" as float16': "E0207",
    'save direction d to "a.safetensors" as float8': "E0203",
    'save direction d[layer 9] to "a.safetensors"': "E0341",
    'save direction d[layer 0] to "a.gguf"': "E0341",
    'save direction spots to "a.gguf"': "E0341",
    'save direction heads_1 to "a.gguf"': "E0341",
    'save direction word to "a.gguf"': "E0341",
    'save direction twice to "a.gguf"': "E0341",
    'save direction mlp to "a.gguf"': "E0341",
    'save direction put to "a.gguf"': "E0341",
    'save direction read to "a.safetensors"': "E0341",
    'save direction unit(d) to "a.safetensors"': "E0101",
    'save direction d to "rows.jsonl"': "E0207",
    'save direction d to "kept.safetensors"': "E0207",
    'save direction d to "../../a.safetensors"': "E0531",
    'save direction d to "a.gguf"\n  save direction d to "./a.gguf"': "E0207",
    'for k in 1..2 { save direction d to "a.safetensors" }': "E0108",
}


@pytest.mark.parametrize("lines", list(REFUSED))
def test_invalid_direction_saves_are_errors(lines: str, data: Path) -> None:
    """The errors are reported before anything runs."""
    save_file({"k.layer0": torch.ones(3), "k.layer1": torch.ones(4)}, data / "kept.safetensors")
    width = len(by_layer("llama")[0])
    put = {f"k.layer{n}": torch.ones(width) for n in range(3)}
    save_file(put, data / "put.safetensors")
    before = FAMILY + (
        "direction spots = mean(p) at resid_post layer 1 at cue token, last token\n"
        "direction heads_1 = mean(p) at z layer 1 head * at last token\n"
        'direction word = unembedding(" w3")\n'
        "direction twice = d[layer 1] + d[layer 2]\n"
        "direction mlp = mean(p) at mlp_out layer 1 at last token\n"
        'direction read = saved("kept.safetensors", "k") at resid_post layer 0..1\n'
        'direction put = saved("put.safetensors", "k") at mlp_out layer *\n'
    )
    use = experiment("x", "add 2 * read to resid_post layer 0..1 at last token")
    text = write(*lines.split("\n"), before=before)
    text += use if "kept" in lines else ""
    assert REFUSED[lines] in codes(text, data)


def test_missing_members_of_a_saved_direction_are_named(data: Path) -> None:
    save_file({"k.layer0": torch.ones(3)}, data / "k.safetensors")
    for at, said in (
        ("", "reads one vector for each layer"),
        (" at resid_post layer *", "k.layer"),
    ):
        text = f'direction k = saved("k.safetensors", "k"){at}\n'
        _, found = try_file(
            write('save direction k to "a.safetensors"', before=text), data, "llama"
        )
        (error,) = [each for each in found if each.severity == "error"]
        assert error.code == "E0341"
        assert said in f"{error.message} {error.hint}"
