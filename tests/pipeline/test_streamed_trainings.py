"""Dictionaries trained on streamed records of a file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.execute import training
from mechdsl.execute.training import PART_ROWS, StreamedVectors
from mechdsl.pipeline import trainings
from mechdsl.pipeline.trained_files import fits_of_file
from mechdsl.prompts import data_files
from mechdsl.resolve.trainings import TEXTS_FILE
from mechdsl.resolve.types import FitSample

from ..execute.support import word_tokenizer
from ..quick import in_turn
from ..rules.models import bare
from .test_trained_dictionaries import (
    ABLATES,
    FEATURES,
    HERE,
    LAYER,
    OTHER,
    QUICK,
    K,
    adopted_for,
    assert_same_vectors,
    checked,
    models,
    run,
    train,
    write,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
COUNT = 70
BLOCK = 'prompts texts { rows "texts.jsonl" streamed  template "{text}" }\n'


def fit(
    options: str = QUICK,
    inner: str = f"sae(features: {FEATURES}, k: {K})",
    at: str = f"resid_post layer {LAYER} at tokens *",
    prompts: str = "texts",
) -> str:
    return f"basis f = fit({inner}, prompts: {prompts}, {options}) at {at}\n"


def texts(count: int = COUNT) -> list[str]:
    draw = random.Random(5)
    return [
        " ".join(f"w{draw.randrange(40)}" for _ in range(draw.randint(2, 12))) for _ in range(count)
    ]


def write_texts(folder: Path, lines: list[str], name: str = "texts.jsonl") -> None:
    numbered = enumerate(lines)
    records = "".join(f"{json.dumps({'text': text, 'n': n})}\n" for n, text in numbered)
    (folder / name).write_text(records, "utf-8")


def write_file(
    folder: Path, *parts: str, block: str = BLOCK, lines: list[str] | None = None
) -> Path:
    write_texts(folder, texts() if lines is None else lines)
    return write(folder, block, *parts)


def streamed(path: Path, family: str, parts: list[int], side: Any = None, **more: Any) -> Any:
    """Training vectors of the file; appends the number of records of each part to `parts`."""
    file = checked(path, family)
    (declared,) = fits_of_file(file).values()

    def part(ids: Any) -> FitSample | None:
        parts.append(len(ids))
        return trainings._read_part(file, declared, ids)

    return StreamedVectors(declared.training, adopted_for(family), part, side, **more)


def vectors_by_hand(family: str, text: str) -> Tensor:
    """[token, width] of one unpadded prompt."""
    ids = torch.tensor([word_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        states = bare(family)(input_ids=ids, output_hidden_states=True).hidden_states
    return states[LAYER + 1][0].float()


# --- training vectors -----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "side"), in_turn(HERE, ["left", "right", None]))
def test_streamed_records_are_in_one_chunk_or_held_out(
    family: str, side: Any, tmp_path: Path
) -> None:
    path = write_file(tmp_path, fit(f"{QUICK}, validation: 20%"), ABLATES)
    parts: list[int] = []
    found = streamed(path, family, parts, side, chunk_bytes=4 * 8 * 2 * 60 * 8)
    expected = [vectors_by_hand(family, text) for text in texts()]
    assert found.chunks > 2
    assert found.held_out_count == 14
    chunks = [found.chunk(number)[0] for number in range(found.chunks)]
    held_out = found.held_out()[0]
    assert_same_vectors(torch.cat([*chunks, held_out]), torch.cat(expected))
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes[:-1]) < 2 * min(sizes[:-1])
    assert max(parts) <= PART_ROWS
    again = streamed(path, family, [], side, chunk_bytes=4 * 8 * 2 * 60 * 8)
    assert torch.equal(again.chunk(1)[0], chunks[1])


def test_streamed_records_are_read_in_parts(tmp_path: Path) -> None:
    path = write_file(tmp_path, fit(), ABLATES, lines=texts(700))
    parts: list[int] = []
    found = streamed(path, "llama", parts)
    assert found.chunks == 1
    found.chunk(0)
    assert max(parts) == PART_ROWS
    assert sum(parts) == 700 - found.held_out_count


def test_limit_takes_the_first_streamed_records(tmp_path: Path) -> None:
    path = write_file(tmp_path, fit(f"{QUICK}, limit: 40, validation: 0%"), ABLATES)
    found = streamed(path, "gpt2", [])
    own = found.chunk(0)[0]
    expected = torch.cat([vectors_by_hand("gpt2", text) for text in texts()[:40]])
    assert_same_vectors(own, expected)
    assert len(found.held_out()[0]) == 0


def test_filtered_streamed_rows_are_omitted_and_missing_positions_rejected(tmp_path: Path) -> None:
    block = BLOCK.replace("}\n", "  where tokens(text) > 6 }\n")
    path = write_file(
        tmp_path, fit(at=f"resid_post layer {LAYER} at token 8"), ABLATES, block=block
    )
    with pytest.raises(mechdsl.MechdslError, match="lies outside"):
        train(path)
    path = write_file(tmp_path, fit(f"{QUICK}, validation: 0%"), ABLATES, block=block)
    own = streamed(path, "llama", []).chunk(0)[0]
    long = [text for text in texts() if len(text.split()) > 6]
    assert_same_vectors(own, torch.cat([vectors_by_hand("llama", text) for text in long]))


def test_streamed_dictionary_in_rules_equals_its_folder(tmp_path: Path) -> None:
    path = write_file(tmp_path, fit(), ABLATES, OTHER)
    (found,) = train(path, out=tmp_path / "out")
    data = json.loads((found.folder / "fit.json").read_text("utf-8"))["data"]
    card = (tmp_path / "out" / "f" / "README.md").read_text("utf-8")
    assert len(data) == 64
    assert f"\n- Data: SHA-256 {data}\n" in card
    report = found.report
    assert (report.rows, report.held_out_rows, report.steps) == (62, 8, 12)
    assert report.vectors == 12 * 16
    own = run(path, fresh=True).files[0].experiments
    said = own[0].conventions["basis f"]
    assert "trained on 70 streamed rows of texts at tokens *, 8 of them held out, explains" in said
    folder = f'basis f = sae("{found.folder}") at resid_post layer {LAYER}\n'
    other = run(write(tmp_path, folder, ABLATES, OTHER), store=False).files[0].experiments
    for one, two in zip(own, other, strict=True):
        assert (one.measures[0].patched == two.measures[0].patched).all()


def test_streamed_transcoder_explains_more_than_untrained(tmp_path: Path) -> None:
    inner = f"transcoder(features: {FEATURES}, k: {K})"
    path = write_file(tmp_path, fit(inner=inner, at="mlp_out layer 1 at tokens *"), ABLATES)
    found = streamed(path, "gpt2", [])
    own, made = found.chunk(0)
    assert own.shape == made.shape
    assert own is not made
    (trained,) = train(path, "gpt2")
    assert trained.report.explained > trained.report.untrained_explained


def test_streamed_parquet_records_give_the_training_vectors(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"text": texts()})
    parquet.write_table(table, tmp_path / "texts.parquet", row_group_size=20)
    block = BLOCK.replace("jsonl", "parquet")
    path = write_file(tmp_path, fit(f"{QUICK}, validation: 0%"), ABLATES, block=block)
    own = streamed(path, "llama", []).chunk(0)[0]
    assert_same_vectors(own, torch.cat([vectors_by_hand("llama", text) for text in texts()]))


def test_streamed_pattern_reads_all_files_and_a_new_file_retrains(tmp_path: Path) -> None:
    """The pattern matches JSON Lines and Parquet files; a new file needs another training."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    every = texts()
    (tmp_path / "text").mkdir()
    write_texts(tmp_path / "text", every[:20], "a.jsonl")
    parquet.write_table(arrow.table({"text": every[20:60]}), tmp_path / "text" / "b.parquet")
    block = BLOCK.replace("texts.jsonl", "text/*")
    path = write_file(tmp_path, fit(f"{QUICK}, validation: 0%"), ABLATES, block=block)
    own = streamed(path, "llama", []).chunk(0)[0]
    expected = torch.cat([vectors_by_hand("llama", text) for text in every[:60]])
    assert_same_vectors(own, expected)
    (found,) = train(path)
    write_texts(tmp_path / "text", every[60:], "c.jsonl")
    (more,) = train(path)
    assert (found.folder != more.folder, found.report.rows, more.report.rows) == (True, 60, 70)


@pytest.mark.parametrize("group", [7, 20])
def test_parquet_row_groups_are_read_once_per_pass(
    group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several chunks, and memory for two groups."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": texts(200)})
    parquet.write_table(table, tmp_path / "texts.parquet", row_group_size=group)
    metadata = parquet.read_metadata(tmp_path / "texts.parquet")
    sizes = [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)]
    for module in (data_files, training):
        monkeypatch.setattr(module, "GROUP_BYTES", 2 * max(sizes))
    monkeypatch.setattr("mechdsl.prompts.rows.CACHED_ROWS", 0)
    block = BLOCK.replace("jsonl", "parquet")
    path = write_file(tmp_path, fit(f"{QUICK}, validation: 10%"), ABLATES, block=block)
    found = streamed(path, "llama", [], chunk_bytes=4 * 8 * 2 * 60 * 8)
    held_out = found.held_out()[0]
    read: list[int] = []
    real = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read_row_group",
        lambda self, number: (read.append(number), real(self, number))[1],
    )
    chunks = [found.chunk(number)[0] for number in range(found.chunks)]
    assert len(chunks) > len(sizes) / 3
    groups = list(dict.fromkeys(read))
    assert len(groups) >= len(sizes) - 2  # some stayed in memory
    assert read == groups  # each once
    expected = torch.cat([vectors_by_hand("llama", text) for text in texts(200)])
    assert_same_vectors(torch.cat([*chunks, held_out]), expected)


# --- keys -----------------------------------------------------------------------------------------


def test_streamed_training_key_depends_on_records_template_and_options(tmp_path: Path) -> None:
    """The key has all records, the template, conditions, parameters and the record count."""
    changed = [*texts()[:-1], "w1 w2 w3 w4"]
    condition = BLOCK.replace("}\n", "  where tokens(text) > depth }\n")
    cases: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        ((fit(),), {}),
        ((fit(),), {"lines": changed}),
        ((fit(),), {"block": BLOCK.replace("{text}", "w1 {text}")}),
        ((fit(f"{QUICK}, limit: 60"),), {}),
        (("param depth = 3\n", fit()), {"block": condition}),
        (("param depth = 4\n", fit()), {"block": condition}),
        ((fit(f"{QUICK}, seed: 1"),), {}),
        ((fit(f"{QUICK}, validation: 20%"),), {}),
    ]
    folders: set[Path] = set()
    weights: list[Tensor] = []
    for parts, more in cases:
        (found,) = train(write_file(tmp_path, *parts, ABLATES, **more))
        assert found.seconds > 0
        folders.add(found.folder)
        own = load_file(found.folder / "sae_weights.safetensors")["W_enc"]
        assert not any(torch.equal(own, each) for each in weights)
        weights.append(own)
    assert len(folders) == len(cases)
    (same,) = train(write_file(tmp_path, "# A comment.\n", OTHER, fit(), ABLATES))
    assert same.seconds == 0
    (same,) = train(write_file(tmp_path, "param unused = 3\n", OTHER, fit(), ABLATES))
    assert same.seconds == 0


def test_streamed_training_key_depends_on_records_after_the_check(tmp_path: Path) -> None:
    """The check reads the first 256 records; a training also depends on the others."""
    every = texts(300)
    numbered = 'prompts texts { rows "texts.jsonl" streamed  template "{text}"  where WHERE }\n'
    function = (
        'prompts texts { rows "texts.jsonl" streamed  w = python("w.py:w")  template "{w}" }\n'
    )
    code = "def w(row):\n    return row['text'] if row['n'] < 290 else 'w1 w2 w3'\n"
    cases: list[tuple[str, str, list[str], str]] = [
        ("", BLOCK, every, ""),
        ("", BLOCK, [*every[:-1], "w1 w2 w3"], ""),
        ("", numbered.replace("WHERE", "n != 290"), every, ""),
        ("", numbered.replace("WHERE", "n != 291"), every, ""),
        ("param out = 290\n", numbered.replace("WHERE", "n != out"), every, ""),
        ("param out = 291\n", numbered.replace("WHERE", "n != out"), every, ""),
        ("", function, every, code),
        ("", function, every, code.replace("w3", "w4")),
    ]
    folders: set[Path] = set()
    for parameter, block, lines, written in cases:
        (tmp_path / "w.py").write_text(written, "utf-8")
        path = write_file(tmp_path, parameter, fit(), ABLATES, block=block, lines=lines)
        (found,) = train(path, allow_python=bool(written))
        assert found.seconds > 0
        folders.add(found.folder)
    assert len(folders) == len(cases)


def test_streamed_training_key_depends_on_positions_of_later_records(tmp_path: Path) -> None:
    """Both positions are the same token in the first 256 records."""
    lines = [*(f"{text} w45 w1" for text in texts(256)), "w45 w1 w2", "w45 w3 w4 w5"]
    found: dict[Path, Tensor] = {}
    for at in ("token -2", '"w45" token'):
        options = f"{QUICK}, validation: 0%"
        declared = fit(options, at=f"resid_post layer {LAYER} at {at}")
        path = write_file(tmp_path, declared, ABLATES, lines=lines)
        (trained,) = train(path)
        found[trained.folder] = streamed(path, "llama", []).chunk(0)[0]
    (before_last, named) = found.values()
    assert len(before_last) == len(named) == len(lines)
    assert torch.equal(before_last[:256], named[:256])
    assert not torch.isclose(before_last[256:], named[256:]).all(1).any()


def test_interrupted_streamed_training_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training of several chunks ends with the weights of an uninterrupted one."""
    from mechdsl.fits.training import Training

    monkeypatch.setattr(training, "most_vectors", lambda *_: 60)
    path = write_file(tmp_path, fit(QUICK.replace("12", "40")), ABLATES)
    (whole,) = train(path)
    expected = (whole.folder / "sae_weights.safetensors").read_bytes()
    assert whole.report.rows == 62  # every chunk was read
    read_texts = (whole.folder / TEXTS_FILE).read_bytes()
    real, steps = Training._step, []

    def step(self: Any) -> None:
        if len(steps) == 23:
            raise KeyboardInterrupt
        steps.append(self.state.step)
        real(self)

    monkeypatch.setattr(Training, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(path, fresh=True)
    steps.append(0)  # so that the counter passes the interruption
    (found,) = train(path, fresh=True)
    assert steps[24:] == [*range(23, 40)]
    assert (found.folder / "sae_weights.safetensors").read_bytes() == expected
    assert found.report == whole.report
    assert (found.folder / TEXTS_FILE).read_bytes() == read_texts


# --- mistakes -------------------------------------------------------------------------------------


def test_measuring_streamed_training_records_is_rejected(tmp_path: Path) -> None:
    """Another block reads the same file, so its rows are training rows."""
    block = BLOCK + 'prompts same { rows "texts.jsonl"  template "{text}" }\n'
    measured = (
        "experiment e { model m prompts same limit 5 ablate feature 0 of f at last token with zero "
        'measure logit("w3") as delta stats bootstrap(100) correct none }\n'
    )
    path = write_file(tmp_path, fit(), measured, block=block)
    with pytest.raises(mechdsl.MechdslError, match="measures rows that `f` is trained on") as found:
        train(path)
    assert found.value.diagnostics[0].code == "E0345"


def test_training_texts_in_another_file_are_rejected_after_training(tmp_path: Path) -> None:
    """Includes held-out rows; texts that the training didn't read are allowed."""
    block = BLOCK + 'prompts same { rows "same.jsonl"  template "{text}" }\n'
    measured = (
        "experiment e { model m prompts same ablate feature 0 of f at last token with zero "
        'measure logit("w3") as delta stats bootstrap(100) correct none }\n'
    )
    path = write_file(tmp_path, fit(), measured, block=block)
    new = ["w39 w38 w37 w36", "w1 w39 w2 w38"]
    write_texts(tmp_path, new, "same.jsonl")
    train(path)
    found = run(path).files[0].experiments[0]
    assert "are training rows" not in found.conventions["basis f"]
    write_texts(tmp_path, [texts()[7], *new, *texts()[30:33]], "same.jsonl")
    with pytest.raises(mechdsl.MechdslError, match="measures rows that `f` is trained on") as bad:
        run(path)
    assert bad.value.diagnostics[0].code == "E0345"
    assert "4 of its 6 rows" in str(bad.value)
    allowed = fit(f"{QUICK}, measure_on_training_rows: true")
    found = run(write_file(tmp_path, allowed, measured, block=block)).files[0].experiments[0]
    assert "4 of the 6 rows measured here are training rows" in found.conventions["basis f"]


def test_only_files_of_the_training_count_as_training_rows(tmp_path: Path) -> None:
    """The experiment reads a pattern of files; the training reads one of them."""
    (tmp_path / "text").mkdir()
    write_texts(tmp_path / "text", texts()[:40], "a.jsonl")
    write_texts(tmp_path / "text", ["w39 w38 w37"] * 3, "b.jsonl")
    block = BLOCK.replace("texts.jsonl", "text/a.jsonl")
    block += 'prompts same { rows "text/*.jsonl"  template "{text}" }\n'
    measured = (
        "experiment e { model m prompts same ablate feature 0 of f at last token with zero "
        'measure logit("w3") as delta stats bootstrap(100) correct none }\n'
    )
    path = write_file(tmp_path, fit(), measured, block=block)
    with pytest.raises(mechdsl.MechdslError, match="40 of its 43 rows are training rows"):
        train(path)


def test_error_in_a_later_streamed_row_fails_only_its_training(tmp_path: Path) -> None:
    """The check reads the first rows; the training reads the others."""
    path = write_file(tmp_path, fit(at=f"resid_post layer {LAYER} at token 2"), ABLATES, OTHER)
    write_texts(tmp_path, [*texts(300), "w1"])
    with pytest.warns(mechdsl.MechdslWarning, match="lies outside"):
        found = mechdsl.run(path, models("llama"), store=tmp_path / "store", fit=True).files[0]
    assert [each.name for each in found.experiments] == ["other"]


MISTAKES = {
    "rotation": (
        fit('from: other, maximise: logit("w1")', "das(dims: 2)", f"resid_post layer {LAYER}"),
        "E0201",
    ),
    "direction": (f"direction f = mean(texts) at resid_post layer {LAYER}\n", "E0207"),
    "pca": (f"basis f = pca(texts, dims: 4) at resid_post layer {LAYER}\n", "E0207"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_streamed_block_in_other_estimators_is_rejected(name: str, tmp_path: Path) -> None:
    line, code = MISTAKES[name]
    rule = "add f to resid_post layer 1 at last token" if name == "direction" else ""
    text = (
        ABLATES
        if not rule
        else ABLATES.replace("ablate feature 0..3 of f at last token with zero", rule)
    )
    with pytest.raises(mechdsl.MechdslError) as found:
        mechdsl.run(write_file(tmp_path, line, text), models("llama"), store=tmp_path / "store")
    errors = [each for each in found.value.diagnostics if each.severity == "error"]
    assert errors[0].code == code, found.value
