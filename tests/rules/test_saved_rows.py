"""`save top … rows of` features, against features computed from the bare model's activations.

One unpadded prompt at a time; the dictionary is computed from its formulas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.observation.features import ActiveRows
from mechdsl.execute.run import saves
from mechdsl.execute.run_record import SavedFile
from mechdsl.forward.hooks.coordinates import StandardBasis
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import save_costs
from mechdsl.resolve.observations import TokenVectors

from ..execute.support import adopted, context, run_on, shared
from ..reference.forward import Write
from .basis_reference import pca
from .models import bare
from .support import BLOCKS, MANY, Text, codes, edited, experiment, plain, rows, tokens, try_file
from .test_dictionaries import FEATURES, LAYER, make
from .test_inactive_features import width_of
from .test_transcoders import BASIS as TRANSCODER
from .test_transcoders import make as make_transcoder

HERE = ("gpt2", "llama", "gpt_neox")
BASIS = f'basis f = sae("sae") at resid_post layer {LAYER}\n'
STREAMED = """
prompts s {
  rows "texts.jsonl" streamed
  template "{text}"
}
"""

Line = dict[str, Any]
Read = Callable[[Text, list[int]], Tensor]
"""[token, feature] at some tokens of a text."""


def save(line: str, block: str = "p") -> str:
    return experiment("e", line, block=block, measure="", stats="")


def run(
    text: str, folder: Path, family: str, mode: str = "planned", blocks: str = BLOCKS
) -> list[SavedFile]:
    result, found = try_file(text, folder, family, mode, blocks=blocks)
    assert result is not None, found
    assert not [each for each in found if each.severity == "error"], found
    return list(result.saved)


def lines_of(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def expected_lines(
    texts: Sequence[Text], read: Read, at: str, features: Sequence[int], most: int
) -> list[Line]:
    """The expected content of the file, row by row; `rows` has every row by its number."""
    found = [read(text, tokens(text, at)).double().numpy() for text in texts]
    every = np.concatenate(found)
    lines: list[Line] = []
    for feature in features:
        highest = [own[:, feature].max() for own in found]
        rows_of: dict[int, Line] = {}
        for n, (text, own) in enumerate(zip(texts, found, strict=True)):
            there = np.flatnonzero(own[:, feature])
            rows_of[n] = {
                "activation": highest[n],
                "text": " ".join(text.words),
                "at": [sorted(tokens(text, at))[each] for each in there],
                "activations": own[there, feature],
            }
        lines.append(
            {
                "index": feature,
                "density": (every[:, feature] != 0).mean(),
                "mean": every[:, feature].mean(),
                "highest": sorted((each for each in highest if each > 0), reverse=True)[:most],
                "rows": rows_of,
            }
        )
    return lines


def check(found: Sequence[Line], expected: Sequence[Line]) -> None:
    for own, other in zip(found, expected, strict=True):
        assert own["index"] == other["index"]
        assert own["density"] == pytest.approx(other["density"], abs=1e-9)
        assert own["mean"] == pytest.approx(other["mean"], abs=1e-4)
        highest = [row["activation"] for row in own["rows"]]
        assert highest == pytest.approx(other["highest"], abs=1e-4)
        assert len({row["row"] for row in own["rows"]}) == len(highest)
        for row in own["rows"]:  # any of the rows with equal values is correct
            right = other["rows"][row["row"]]
            assert (row["text"], row["at"]) == (right["text"], right["at"])
            assert row["activation"] == pytest.approx(right["activation"], abs=1e-4)
            assert row["activations"] == pytest.approx(right["activations"], abs=1e-4)
            assert len(row["tokens"]) == len(row["text"].split()) + 1
    assert max(len(each["highest"]) for each in expected) > 1
    assert max(each["mean"] for each in expected) > 0.05


def explained(family: str, of: Any, texts: Sequence[Text], at: str) -> float:
    """The share of the variance over all tokens that the dictionary explains."""
    found = [plain(family, text)["resid_post", LAYER][tokens(text, at), 0] for text in texts]
    x = np.concatenate([each.numpy() for each in found])
    lost = np.concatenate([(each - of.decode(of.encode(each), each)).numpy() for each in found])
    return 1 - (lost**2).sum() / ((x - x.mean(0)) ** 2).sum()


def read_sae(family: str, of: Any) -> Read:
    return lambda text, at: of.encode(plain(family, text)["resid_post", LAYER][at, 0])


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", HERE)
@pytest.mark.parametrize("architecture", ["standard", "topk"])
@pytest.mark.parametrize("at", ["last token", "tokens except token 0", "subject tokens", "token 3"])
def test_saved_rows_of_all_features_equal_the_reference(
    architecture: str, family: str, at: str, mode: str, data: Path
) -> None:
    of = make(data, architecture, width_of(family))
    line = f'save top 3 rows of features * of f at {at} to "rows.jsonl"'
    (saved,) = run(BASIS + save(line), data, family, mode)
    found = lines_of(data / "rows.jsonl")
    check(found, expected_lines(rows(), read_sae(family, of), at, range(FEATURES), 3))
    active = sum(each["density"] > 0 for each in found)
    assert f"{active} of {FEATURES} features are active" in saved.line
    assert (saved.kind, saved.tensors, saved.rows) == ("rows", FEATURES, len(rows()))
    assert f"explains {explained(family, of, rows(), at):.3f} of" in saved.line


@pytest.mark.parametrize("family", HERE)
def test_saved_rows_of_named_features_of_a_run_equal_the_reference(family: str, data: Path) -> None:
    of = make(data, "standard", width_of(family))
    at = "tokens except token 0, cue token"
    line = f'save top 2 rows of features 5, 0..2 of f of longer at {at} to "r.jsonl"'
    run(BASIS + save(line), data, family)
    read = read_sae(family, of)
    expected = expected_lines(rows("longer"), read, "tokens except token 0", [0, 1, 2, 5], 2)
    check(lines_of(data / "r.jsonl"), expected)


def test_saved_rows_of_a_derived_run_equal_the_reference(data: Path) -> None:
    of = make(data, "standard", width_of("llama"))
    lines = (
        "run less { scale attn_out layer 0 at tokens * by 0.5 }",
        'save top 2 rows of features * of f of less at tokens except token 0 to "less.jsonl"',
    )
    run(BASIS + experiment("e", *lines, measure="", stats=""), data, "llama")

    def read(text: Text, at: list[int]) -> Tensor:
        half = plain("llama", text)["attn_out", 0][:, 0] * 0.5
        writes = [Write("attn_out", 0, half[token], token) for token in range(len(half))]
        return of.encode(edited("llama", text, writes)["resid_post", LAYER][at, 0])

    expected = expected_lines(rows(), read, "tokens except token 0", range(FEATURES), 2)
    check(lines_of(data / "less.jsonl"), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_saved_rows_of_transcoder_features_equal_the_reference(family: str, data: Path) -> None:
    """The features are those of the MLP's input, and no explained variance is reported."""
    of = make_transcoder(data, "transcoder", width_of(family))
    line = 'save top 2 rows of features * of t at tokens except token 0 to "t.jsonl"'
    (saved,) = run(TRANSCODER + save(line), data, family)

    def read(text: Text, at: list[int]) -> Tensor:
        return of.encode(plain(family, text)["mlp_norm", LAYER][at, 0])

    found = lines_of(data / "t.jsonl")
    check(found, expected_lines(rows(), read, "tokens except token 0", range(len(found)), 2))
    assert "explains" not in saved.line


def test_saved_rows_of_dims_and_fitted_bases_equal_the_reference(data: Path) -> None:
    """Neurons, and directions of a basis that is fitted on rows."""
    lines = (
        'save top 2 rows of mlp_hidden layer 0 dims 0..9 at tokens except token 0 to "n.jsonl"',
        'save top 2 rows of features * of g at tokens except token 0 to "g.jsonl"',
    )
    basis = "basis g = pca(p, dims: 3) at resid_post layer 1 at last token\n"
    run(basis + experiment("e", *lines, measure="", stats=""), data, "llama")

    def neurons(text: Text, at: list[int]) -> Tensor:
        return plain("llama", text)["mlp_hidden", 0][at].flatten(1)

    expected = expected_lines(rows(), neurons, "tokens except token 0", range(10), 2)
    check(lines_of(data / "n.jsonl"), expected)
    of = pca("llama", "clean", "resid_post", 1, "last token", 3)

    def components(text: Text, at: list[int]) -> Tensor:
        return of.coordinates(plain("llama", text)["resid_post", 1][at, 0])

    expected = expected_lines(rows(), components, "tokens except token 0", range(3), 2)
    check(lines_of(data / "g.jsonl"), expected)


def test_saved_rows_of_a_basis_family_use_the_basis_of_the_named_layer(data: Path) -> None:
    """The basis of the layer that the line names."""
    basis = "basis g = pca(p, dims: 3) at resid_post layer * at last token\n"
    at = "tokens except token 0"
    line = f'save top 2 rows of resid_post layer 1 features 0, 2 of g at {at} to "one.jsonl"'
    run(basis + save(line), data, "llama")
    of = pca("llama", "clean", "resid_post", 1, "last token", 3)

    def components(text: Text, at: list[int]) -> Tensor:
        return of.coordinates(plain("llama", text)["resid_post", 1][at, 0])

    check(lines_of(data / "one.jsonl"), expected_lines(rows(), components, at, [0, 2], 2))


def test_saved_rows_of_top_features_have_their_labels(data: Path) -> None:
    """Features selected by an observation, in order of their numbers, with their labels."""
    of = make(data, "standard", width_of("llama"))
    labels = [json.dumps({"index": n, "description": f"about {n}"}) for n in range(FEATURES)]
    (data / "labels.jsonl").write_text("\n".join(labels), encoding="utf-8")
    labelled = BASIS.replace('("sae")', '("sae", labels: "labels.jsonl")')
    look = experiment(
        "o", "observe features of f at tokens except token 0 top 2", measure="", stats=""
    )
    line = 'save top 2 rows of features top 2 of o of f at tokens except token 0 to "picked.jsonl"'
    run(labelled + look + save(line), data, "llama")
    found = lines_of(data / "picked.jsonl")
    every = expected_lines(
        rows(), read_sae("llama", of), "tokens except token 0", range(FEATURES), 2
    )
    check(found, [every[each["index"]] for each in found])
    by_row = [
        read_sae("llama", of)(t, tokens(t, "tokens except token 0")).mean(0).numpy() for t in rows()
    ]
    strongest = sorted(np.argsort(-np.mean(by_row, axis=0))[:2].tolist())
    assert [each["index"] for each in found] == strongest
    assert [each["description"] for each in found] == [f"about {n}" for n in strongest]


# --- streamed rows --------------------------------------------------------------------------------


def write_texts(folder: Path, *more: str, first: Sequence[str] = ()) -> None:
    """Write the texts of the rows between others, with an empty line between two."""
    texts = [*first, *(" ".join(text.words) for text in rows()), *more]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "texts.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def text_of(words: str) -> Text:
    return Text(tuple(words.split()), {})


MORE = [f"w{n} w{(n * 7) % 48} w{(n * 11) % 48}" for n in range(12)]
LONG = " ".join(["w3"] * 500)


@pytest.mark.parametrize("part", [2, 5, 1024])
@pytest.mark.parametrize("family", HERE)
def test_saved_rows_of_streamed_data_equal_the_reference(
    family: str, part: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = make(data, "topk", width_of(family))
    write_texts(data, *MORE)
    monkeypatch.setattr(saves, "PART_ROWS", part)
    line = 'save top 3 rows of features * of f at tokens except token 0 to "streamed.jsonl"'
    (saved,) = run(BASIS + save(line, "s"), data, family, blocks=STREAMED)
    texts = [*rows(), *map(text_of, MORE)]
    expected = expected_lines(
        texts, read_sae(family, of), "tokens except token 0", range(FEATURES), 3
    )
    check(lines_of(data / "streamed.jsonl"), expected)
    assert saved.rows == len(texts)
    share = explained(family, of, texts, "tokens except token 0")
    assert f"explains {share:.3f} of" in saved.line


@pytest.mark.parametrize("group", [1, 5, 100])
def test_saved_rows_of_streamed_parquet_equal_the_reference(group: int, data: Path) -> None:
    """Groups of any size, with a renamed column."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    of = make(data, "topk", width_of("gpt2"))
    texts = [*rows(), *map(text_of, MORE)]
    records = [{"said": " ".join(text.words), "n": n} for n, text in enumerate(texts)]
    table = arrow.Table.from_pylist(records)
    parquet.write_table(table, str(data / "texts.parquet"), row_group_size=group)
    blocks = STREAMED.replace("texts.jsonl", "texts.parquet")
    blocks = blocks.replace("  template", "  rename { text = said }\n  template")
    line = 'save top 3 rows of features * of f at tokens except token 0 to "parquet.jsonl"'
    run(BASIS + save(line, "s"), data, "gpt2", blocks=blocks)
    read, features = read_sae("gpt2", of), range(FEATURES)
    found = lines_of(data / "parquet.jsonl")
    check(found, expected_lines(texts, read, "tokens except token 0", features, 3))
    assert all(row["values"]["n"] == row["row"] for each in found for row in each["rows"])


def arrow_files(folder: Path, records: Sequence[Line]) -> str:
    """Write a split as `Dataset.save_to_disk` does, in two files; return its `rows` line."""
    arrow: Any = pytest.importorskip("pyarrow")
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (records[:9], records[9:]), strict=True):
        table = arrow.Table.from_pylist(part)
        file = arrow.OSFile(str(folder / name), "wb")
        with file, arrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state), "utf-8")
    (folder / "dataset_info.json").write_text("{}", "utf-8")
    return f'rows hf_dataset("{folder.name}", split: "train") streamed'


def mixed_files(folder: Path, records: Sequence[Line]) -> str:
    """Write files of two types, in natural order of their names; return their `rows` line."""
    arrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    for name, part in (("part9.jsonl", records[:5]), ("part11.jsonl", records[12:])):
        lines = "".join(json.dumps(record) + "\n" for record in part)
        (folder / name).write_text(lines, "utf-8")
    table = arrow.Table.from_pylist(records[5:12])
    parquet.write_table(table, str(folder / "part10.parquet"), row_group_size=3)
    return f'rows "{folder.name}/part*" streamed'


@pytest.mark.parametrize("family", HERE)
@pytest.mark.parametrize("write", [mixed_files, arrow_files])
def test_saved_rows_number_streamed_rows_across_files(
    write: Callable[[Path, Sequence[Line]], str],
    family: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows are numbered through all files."""
    monkeypatch.setattr(saves, "PART_ROWS", 5)
    of = make(data, "topk", width_of(family))
    texts = [*rows(), *map(text_of, MORE)]
    records = [{"text": " ".join(text.words), "n": n} for n, text in enumerate(texts)]
    blocks = STREAMED.replace(
        'rows "texts.jsonl" streamed', write(data / f"{write.__name__}-{family}", records)
    )
    line = 'save top 3 rows of features * of f at tokens except token 0 to "several.jsonl"'
    (saved,) = run(BASIS + save(line, "s"), data, family, blocks=blocks)
    read, features = read_sae(family, of), range(FEATURES)
    found = lines_of(data / "several.jsonl")
    check(found, expected_lines(texts, read, "tokens except token 0", features, 3))
    assert saved.rows == len(texts)
    assert all(row["values"]["n"] == row["row"] for each in found for row in each["rows"])


def test_streamed_rows_longer_than_the_context_are_left_out(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = make(data, "topk", width_of("gpt2"))
    most: int = bare("gpt2").config.max_position_embeddings  # with one special token
    fitting = " ".join(["w7 w9"] * most).split()[: most - 1]
    write_texts(data, MORE[0], LONG, MORE[1], LONG, " ".join(fitting))
    monkeypatch.setattr(saves, "PART_ROWS", 3)
    blocks = STREAMED.replace("  template", '  where text != "w0 w0 w0"\n  template')
    line = 'save top 3 rows of features * of f at tokens except token 0 to "fit.jsonl"'
    (saved,) = run(BASIS + save(line, "s"), data, "gpt2", blocks=blocks)
    texts = [*rows(), text_of(MORE[1]), text_of(" ".join(fitting))]
    expected = expected_lines(
        texts, read_sae("gpt2", of), "tokens except token 0", range(FEATURES), 3
    )
    for each in expected:
        each["rows"][len(rows()) + 4] = each["rows"].pop(len(rows()) + 1)
        each["rows"][len(rows()) + 2] = each["rows"].pop(len(rows()))
    check(lines_of(data / "fit.jsonl"), expected)
    assert "2 rows longer than the model's context left out" in saved.line


def interrupted(
    data: Path, monkeypatch: pytest.MonkeyPatch, after: int, text: str, blocks: str = STREAMED
) -> None:
    """Run a file that is interrupted after some parts."""
    parts = 0
    add = ActiveRows.add

    def adding(self: ActiveRows, *given: Any) -> None:
        nonlocal parts
        parts += 1
        if parts > after:
            raise KeyboardInterrupt
        add(self, *given)

    with monkeypatch.context() as only:
        only.setattr(ActiveRows, "add", adding)
        with pytest.raises(KeyboardInterrupt):
            try_file(text, data, "llama", blocks=blocks)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_interrupted_streamed_save_resumes(
    after: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(data, "topk", width_of("llama"))
    write_texts(data, *MORE, first=(MORE[0], LONG))
    monkeypatch.setattr(saves, "PART_ROWS", 3)
    monkeypatch.setattr(saves, "SECONDS_BETWEEN_SAVES", 0.0)
    text = BASIS + save(
        'save top 3 rows of features * of f at tokens except token 0 to "on.jsonl"', "s"
    )
    (before,) = run(text, data, "llama", blocks=STREAMED)
    whole = (data / "on.jsonl").read_bytes()
    (data / "on.jsonl").unlink()
    interrupted(data, monkeypatch, after, text)
    assert not (data / "on.jsonl").exists()
    read: list[int] = []
    add = ActiveRows.add

    def adding(self: ActiveRows, own: Any, numbers: Any, *given: Any) -> None:
        read.extend(numbers.tolist())
        add(self, own, numbers, *given)

    monkeypatch.setattr(ActiveRows, "add", adding)
    (saved,) = run(text, data, "llama", blocks=STREAMED)
    assert (data / "on.jsonl").read_bytes() == whole
    assert sorted(read) == [*range(3 * after, 2 + len(rows()) + len(MORE))]
    assert saved.line == f"{before.line}; continued after {3 * after} records"
    assert "1 row longer than the model's context left out" in saved.line
    assert (saved.rows, saved.vectors) == (before.rows, before.vectors)
    assert not list(data.glob(".on.jsonl*"))


@pytest.mark.parametrize("change", ["rows", "features", "positions", "dictionary", "template"])
def test_interrupted_streamed_save_restarts_after_a_change(
    change: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = make(data, "topk", width_of("llama"))
    write_texts(data, *MORE)
    monkeypatch.setattr(saves, "PART_ROWS", 3)
    monkeypatch.setattr(saves, "SECONDS_BETWEEN_SAVES", 0.0)
    line, blocks = (
        'save top 3 rows of features * of f at tokens except token 0 to "anew.jsonl"',
        STREAMED,
    )
    interrupted(data, monkeypatch, 2, BASIS + save(line, "s"))
    texts, at, features = [*rows(), *map(text_of, MORE)], "tokens except token 0", range(FEATURES)
    match change:
        case "rows":
            write_texts(data, *MORE[:-1], "w5 w6")
            texts[-1] = text_of("w5 w6")
        case "features":
            line, features = line.replace("*", "0..4", 1), range(5)
        case "positions":
            line, at = line.replace("tokens except token 0", "last token"), "last token"
        case "dictionary":
            of = make(data, "jumprelu", width_of("llama"))
        case _:
            blocks = blocks.replace("{text}", "w9 {text}")
            texts = [text_of(" ".join(("w9", *text.words))) for text in texts]
    (saved,) = run(BASIS + save(line, "s"), data, "llama", blocks=blocks)
    assert "continued" not in saved.line
    check(
        lines_of(data / "anew.jsonl"),
        expected_lines(texts, read_sae("llama", of), at, features, 3),
    )


def test_interrupted_streamed_save_restarts_with_another_model(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(data, "topk", width_of("llama"))
    of = make(data, "topk", width_of("mistral"))
    write_texts(data, *MORE)
    monkeypatch.setattr(saves, "PART_ROWS", 3)
    monkeypatch.setattr(saves, "SECONDS_BETWEEN_SAVES", 0.0)
    at = "tokens except token 0"
    line = f'save top 3 rows of features * of f at {at} to "other.jsonl"'
    interrupted(data, monkeypatch, 2, BASIS + save(line, "s"))
    (saved,) = run(BASIS + save(line, "s"), data, "mistral", blocks=STREAMED)
    assert "continued" not in saved.line
    texts = [*rows(), *map(text_of, MORE)]
    expected = expected_lines(texts, read_sae("mistral", of), at, range(FEATURES), 3)
    check(lines_of(data / "other.jsonl"), expected)


def test_interrupted_streamed_save_restarts_with_another_parameter(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = make(data, "topk", width_of("llama"))
    texts = [*rows(), *map(text_of, MORE)]
    lines = [json.dumps({"text": " ".join(own.words), "n": n}) for n, own in enumerate(texts)]
    (data / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(saves, "PART_ROWS", 3)
    monkeypatch.setattr(saves, "SECONDS_BETWEEN_SAVES", 0.0)
    blocks = "param most = 9\n" + STREAMED.replace("  template", "  where n < most\n  template")
    at = "tokens except token 0"
    text = BASIS + save(f'save top 3 rows of features * of f at {at} to "param.jsonl"', "s")
    interrupted(data, monkeypatch, 2, text, blocks)
    source = Source(f'mech 1\nmodel m = local("handed over")\n{blocks}\n{text}', data / "file.mech")
    options = RunOptions(settings=CheckSettings(parameters={"most": "7"}))
    result, _ = run_on(source, {"m": shared(bare("llama"))}, options)
    assert result is not None
    assert "continued" not in result.saved[0].line
    expected = expected_lines(texts[:7], read_sae("llama", of), at, range(FEATURES), 3)
    check(lines_of(data / "param.jsonl"), expected)


OTHER_ROWS = {
    "a fitted basis": (
        "basis f = pca(q, dims: 2) at resid_post layer 1 at last token\n",
        "features * of f",
    ),
    "picked features": (
        BASIS + experiment("o", "observe features of f at last token top 2", block="q", measure="",
                           stats=""),
        "features top 2 of o of f",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER_ROWS)
def test_interrupted_streamed_save_restarts_if_other_rows_change(
    what: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that a basis is fitted on, or that select features, change; streamed rows don't."""
    make(data, "topk", width_of("llama"))
    write_texts(data, *MORE)
    monkeypatch.setattr(saves, "PART_ROWS", 3)
    monkeypatch.setattr(saves, "SECONDS_BETWEEN_SAVES", 0.0)
    blocks = STREAMED.replace("prompts s", "prompts q").replace("texts.jsonl", "few.jsonl")
    blocks = STREAMED + blocks.replace(" streamed", "")
    definition, features = OTHER_ROWS[what]
    line = f'save top 3 rows of {features} at tokens except token 0 to "d.jsonl"'

    def found(few: Sequence[str]) -> tuple[str, SavedFile]:
        (data / "few.jsonl").write_text(
            "\n".join(json.dumps({"text": each}) for each in few), encoding="utf-8"
        )
        (saved,) = run(definition + save(line, "s"), data, "llama", blocks=blocks)
        return (data / "d.jsonl").read_text("utf-8"), saved

    one, other = MORE[:5], ["w3 w4", "w5 w5", "w1 w2", "w40 w41"]
    before, whole = found(one)
    assert whole.rows == len(rows()) + len(MORE)
    interrupted(data, monkeypatch, 2, definition + save(line, "s"), blocks)
    changed, saved = found(other)
    assert "continued" not in saved.line
    assert changed != before
    assert found(other)[0] == changed


def test_limit_of_streamed_rows_reads_the_first_rows(data: Path) -> None:
    of = make(data, "topk", width_of("llama"))
    write_texts(data, *MORE)
    at = "tokens except token 0"
    text = BASIS + save(f'save top 3 rows of features * of f at {at} to "limit.jsonl"', "s")
    source = Source(
        f'mech 1\nmodel m = local("handed over")\n{STREAMED}\n{text}', data / "file.mech"
    )
    options = RunOptions(settings=CheckSettings(limit=6))
    result, _ = run_on(source, {"m": shared(bare("llama"))}, options)
    assert result is not None
    assert result.saved[0].rows == 6
    texts = [*rows(), *map(text_of, MORE)][:6]
    expected = expected_lines(texts, read_sae("llama", of), at, range(FEATURES), 3)
    check(lines_of(data / "limit.jsonl"), expected)


def test_plan_counts_all_streamed_rows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(data, "topk", width_of("llama"))
    write_texts(data, *MORE)
    monkeypatch.setattr("mechdsl.checks.prompt_tables._FIRST_ROWS", 4)
    line = 'save top 3 rows of features * of f at tokens * to "price.jsonl"'
    source = Source(
        f'mech 1\nmodel m = local("handed over")\n{STREAMED}{BASIS}{save(line, "s")}',
        data / "file.mech",
    )
    checked = check_source(source, CheckSettings(), {"m": context(source, "m", adopted("llama"))})
    (cost,) = save_costs(checked.saving)
    tokens_of_all = sum(own.last + 1 for own in (*rows(), *map(text_of, MORE)))
    assert cost.vectors == pytest.approx(tokens_of_all, rel=1)
    assert cost.vectors > sum(own.last + 1 for own in rows())
    assert (cost.sites, cost.bytes) == (FEATURES, None)
    assert cost.streamed == len(rows()) + len(MORE)


@pytest.mark.slow
def test_saved_rows_do_not_change_when_memory_runs_out(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that exceed memory are read in halves."""
    of = make(data, "topk", width_of("llama"))
    write_texts(data, *MORE)
    read, sizes = saves.read_token_vectors, list[int]()

    def failing(*given: Any, **named: Any) -> Any:
        sizes.append(len(given[5]))
        if len(given[5]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(*given, **named)

    monkeypatch.setattr(saves, "read_token_vectors", failing)
    at = "tokens except token 0"
    line = f'save top 3 rows of features * of f at {at} to "halves.jsonl"'
    run(BASIS + save(line, "s"), data, "llama", blocks=STREAMED)
    texts = [*rows(), *map(text_of, MORE)]
    expected = expected_lines(texts, read_sae("llama", of), at, range(FEATURES), 3)
    check(lines_of(data / "halves.jsonl"), expected)
    assert max(sizes) > 3


def test_broken_resume_state_is_ignored(data: Path) -> None:
    of = make(data, "topk", width_of("llama"))
    write_texts(data)
    (data / ".broken.jsonl.state.npz").write_bytes(b"no archive")
    line = 'save top 3 rows of features * of f at tokens except token 0 to "broken.jsonl"'
    run(BASIS + save(line, "s"), data, "llama", blocks=STREAMED)
    expected = expected_lines(
        rows(), read_sae("llama", of), "tokens except token 0", range(FEATURES), 3
    )
    check(lines_of(data / "broken.jsonl"), expected)


# --- selecting rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_active_rows_in_small_batches_equal_a_full_sort(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The selected rows, against a sort of all; many replace others, and some are equal."""
    random = np.random.default_rng(seed)
    size, most, count = 7, 3, 400
    lengths, numbers = random.integers(1, 6, count), random.permutation(count)
    parts = [random.integers(-3, 20, (n, size)) * (random.random((n, size)) > 0.5) for n in lengths]
    monkeypatch.setattr("mechdsl.execute.observation.features.MAX_NUMBERS", 100)
    found = ActiveRows(range(size), most, explains=True)
    for begin in range(0, count, 9):
        here = range(begin, min(begin + 9, count))
        row = np.repeat(np.arange(len(here)), lengths[here])
        own_tokens = np.concatenate([10 + np.arange(n) for n in lengths[here]])
        vectors = np.concatenate([parts[n] for n in here]).astype(np.float64)
        own = TokenVectors(vectors, row, own_tokens, np.arange(len(here)), [b""] * len(here))
        found.add(own, numbers[here], StandardBasis(size), torch.empty(0))
        # Rows that others have replaced are dropped.
        assert len(found.state()["_ends"]) <= (2 * most + 9) * size + 1
    every = np.concatenate(parts)
    for feature, about in found.summaries():
        highest = {int(numbers[n]): own[:, feature].max() for n, own in enumerate(parts)}
        order = sorted(highest, key=lambda n: (-highest[n], n))
        assert [each.row for each in about.rows] == order[:most]
        for each in about.rows:
            own = parts[int(np.flatnonzero(numbers == each.row)[0])][:, feature]
            assert each.tokens == tuple(10 + np.flatnonzero(own))
            assert each.values == tuple(own[own != 0])
        assert about.density == pytest.approx((every[:, feature] != 0).mean())
        assert about.mean == pytest.approx(every[:, feature].mean())
    assert found.explained == 1
    assert (found.rows, found.tokens) == (count, lengths.sum())


# --- errors ---------------------------------------------------------------------------------------

WRONG = [
    ('save top 0 rows of features * of f at last token to "x.jsonl"', ["E0207"]),
    ('save top 2 rows of resid_post layer 1 at last token to "x.jsonl"', ["E0207"]),
    ('save features 3 of f at last token to "x.safetensors"', ["E0207"]),
    ('save resid_post layer 1 in basis f at last token to "x.safetensors"', ["E0207"]),
    ('save top 2 rows of features * of f at last token to "x.csv"', ["E0207"]),
    ('save top 2 rows of features * of f at last token to "x.jsonl" as float16', ["E0207"]),
    ('save top 2 rows of features * of nothing at last token to "x.jsonl"', ["E0201"]),
    ('save top 2 rows of features * of many at last token to "x.jsonl"', ["E0342"]),
    ('save top 2 rows of features 99 of f at last token to "x.jsonl"', ["E0301"]),
    ('save top 2 rows of features * of f at nothing token to "x.jsonl"', ["E0308"]),
]


@pytest.mark.parametrize(("line", "expected"), WRONG)
def test_invalid_row_saves_are_errors(line: str, expected: list[str], data: Path) -> None:
    make(data, "standard", width_of("llama"))
    many = "basis many = pca(p, dims: 3) at resid_post layer * at last token\n"
    found = codes(BASIS + many + save(line), data)
    assert [each for each in found if each.startswith("E")] == expected
    assert not (data / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("at", "written"),
    [
        ("resid_post layer 1..2", "resid_post layer 1 features 2 of many"),
        ("z layer 1 head *", "z layer 1 head 0 features 2 of many"),
    ],
)
def test_row_saves_of_a_basis_of_several_sites_name_one(at: str, written: str, data: Path) -> None:
    many = f"basis many = pca(p, dims: 3) at {at} at last token\n"

    def try_save(features: str) -> list[Diagnostic]:
        line = f'save top 2 rows of {features} at last token to "x.jsonl"'
        return try_file(many + save(line), data, "llama")[1]

    (problem,) = [each for each in try_save("features 2 of many") if each.severity == "error"]
    assert problem.code == "E0342"
    assert f"write `{written}`" in problem.help_text
    assert not [each for each in try_save(written) if each.severity == "error"]


UNSTREAMED = [
    ("  template", "  x in [1, 2]\n  template", ""),
    ("  template", '  answer " w1"\n  template', ""),
    ("  template", "  split 50%\n  template", ""),
    ("  template", '  corrupt other { text = "w1" }\n  template', ""),
    ("  template", '  x = list(item, 2, from: ["w1", "w2"])\n  template', ""),
    ("texts.jsonl", "texts.csv", ""),
    ("prompts s", "prompts s", "measure loss as raw"),
    ("prompts s", "prompts s", "observe features of f at last token"),
    ("prompts s", "prompts s", 'save resid_post layer 1 at last token to "y.safetensors"'),
]


@pytest.mark.parametrize(("old", "new", "line"), UNSTREAMED)
def test_streamed_blocks_with_lines_that_need_all_rows_are_errors(
    old: str, new: str, line: str, data: Path
) -> None:
    make(data, "standard", width_of("llama"))
    write_texts(data)
    (data / "texts.csv").write_text("text\nw1\n", encoding="utf-8")
    rule = 'save top 2 rows of features * of f at last token to "x.jsonl"'
    text = BASIS + experiment("e", rule, line, block="s", measure="", stats="")
    result, found = try_file(text, data, "llama", blocks=STREAMED.replace(old, new))
    assert result is None
    assert {each.code for each in found if each.severity == "error"} <= {"E0207", "E0505"}


def test_streamed_block_in_other_statements_is_an_error(data: Path) -> None:
    make(data, "standard", width_of("llama"))
    write_texts(data)
    blocks = BLOCKS + STREAMED
    for more, lines in (
        ("direction d = mean(s) at resid_post layer 1\n", ("add d to resid_post layer 1",)),
        ("", ("from s into clean", "patch resid_post layer 1 at last token")),
        ("basis g = pca(s, dims: 2) at resid_post layer 1\n", ("ablate dim 0",)),
    ):
        rule = lines[-1] + (" at last token" if lines[-1].startswith("add") else "")
        rule = "ablate feature 0 of g at last token with zero" if "dim 0" in rule else rule
        text = more + experiment("e", *lines[:-1], rule)
        result, found = try_file(text, data, "llama", blocks=blocks)
        assert result is None
        assert "streamed" in " ".join(each.message for each in found)


def test_malformed_streamed_line_is_an_error_before_the_run(data: Path) -> None:
    make(data, "standard", width_of("llama"))
    lines = [json.dumps({"text": "w1 w2"})] * 2000
    lines[1500] = '{"text": "w1'
    (data / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    line = 'save top 2 rows of features * of f at last token to "x.jsonl"'
    result, found = try_file(BASIS + save(line, "s"), data, "llama", blocks=STREAMED)
    assert result is None
    assert [each.code for each in found] == ["E0505"]
    assert "line 1501" in found[0].message + str(found[0])


@pytest.mark.parametrize("at", [0, 1, 1500])
def test_streamed_record_without_a_value_is_an_error_before_the_run(at: int, data: Path) -> None:
    """Columns that the block doesn't use may be missing."""
    make(data, "standard", width_of("llama"))
    records: list[Line] = [{"text": "w1 w2", "url": "x"}] * 2000
    records[7] = {"text": "w1 w3"}
    records[at] = {"url": "y", "said": 3}
    lines = "\n\n" + "\n".join(map(json.dumps, records))
    (data / "texts.jsonl").write_text(lines, encoding="utf-8")
    line = 'save top 2 rows of features * of f at last token to "x.jsonl"'
    result, found = try_file(BASIS + save(line, "s"), data, "llama", blocks=STREAMED)
    assert result is None
    assert [each.code for each in found] == ["E0505"]
    assert f"line {at + 3} has no `text`" in found[0].message + str(found[0])
