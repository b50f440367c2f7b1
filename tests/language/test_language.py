"""The language page is current and complete, and its examples are valid."""

from __future__ import annotations

import json
import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.rendering import render_full
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

from ..parsing import parse
from .page import PAGE, Line, page, sections

ROOT = Path(__file__).parents[2]
LINES = [(section.title, line) for section in sections() for line in section.lines]
IDS = [f"{title}: {line.example}" for title, line in LINES]
FROM_OUTSIDE: set[type[ast.Node]] = {ast.RegisteredRule}
"""Rules registered outside the package."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples use."""
    folder = tmp_path_factory.mktemp("language")
    shutil.copy(ROOT / "tests" / "python_files" / "functions.py", folder)
    records = [
        {"prompt": "Part 1: apple Count 1:", "object": "apple", "n": 3},
        {"prompt": "Part 1: pear Count 1:", "object": "pear", "n": 4},
    ]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    save_file({"d": torch.ones(128)}, folder / "directions.safetensors")
    save_file({"rotation": torch.eye(128)[:4]}, folder / "rotation.safetensors")
    edges = ("embed -> L0H1.q", "L0H1 -> logits")
    circuit = {"edges": {name: {"score": 0.5, "in_graph": True} for name in edges}}
    feature = {"node_id": "1_3_4", "feature_type": "cross layer transcoder", "layer": "1"}
    supernodes = {"supernodes": [["capital", "1_3_4"]]}
    graph = {"nodes": [{**feature, "ctx_idx": 4}], "links": [], "qParams": supernodes}
    (folder / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
    (folder / "circuit.json").write_text(json.dumps(circuit), encoding="utf-8")
    features = {"edges": ["embed -> feature 3 of b", "feature 3 of b -> logits"]}
    (folder / "feature-circuit.json").write_text(json.dumps(features), encoding="utf-8")
    lens = {f"layer.{n}.weight": torch.eye(128) for n in range(3)}
    lens |= {f"layer.{n}.bias": torch.ones(128) for n in range(3)}
    save_file(lens, folder / "lens.safetensors")
    (folder / "facts").mkdir()
    shutil.copy(folder / "facts.jsonl", folder / "facts" / "train.jsonl")
    (folder / "common").mkdir()
    (folder / "common" / "fruit.mech").write_text(
        'mech 1\nmodel toy = zoo("counting")\n'
        'prompts apples { x in ["apple", "pear"] template "Part 1: {x} Count 1:" }\n',
        encoding="utf-8",
    )
    (folder / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    data = ROOT / "docs" / "errors" / "data"
    for name, source in (
        *(("classifier",) * 2, ("regression",) * 2, ("chat",) * 2),
        *(("many", "classifier"), ("vit", "vit")),
    ):
        shutil.copytree(data / source, folder / name)
    with (folder / "chat" / "chat_template.jinja").open("a", encoding="utf-8") as template:
        template.write("{% if enable_thinking is defined %}{% endif %}")
    shutil.copytree(data / "sae", folder / "sae")
    for kind in ("circle", "square"):
        Image.new("RGB", (30, 20), "red").save(folder / f"{kind}.png")
    config = json.loads((folder / "many" / "config.json").read_text(encoding="utf-8"))
    config["problem_type"] = "multi_label_classification"
    (folder / "many" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for step in (1, 2):
        model = Path(str(files("mechdsl"))) / "zoo" / "counting"
        (folder / "runs").mkdir(exist_ok=True)
        (folder / "runs" / f"step-{step}").symlink_to(model, target_is_directory=True)
    return folder


def test_language_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make language`"


@cache
def parsed(text: str) -> tuple[ast.File, list[Diagnostic]]:
    """The tree of a file and its syntax errors."""
    return parse(Source(text))


@pytest.mark.parametrize(("title", "line"), LINES, ids=IDS)
def test_language_page_example_is_valid(title: str, line: Line, folder: Path) -> None:
    source = Source(line.checked, folder / "example.mech")
    tree, problems = parsed(line.checked)
    assert not problems, render_full(problems)
    assert tree.statements
    found = check_source(source, CheckSettings(python="look")).diagnostics
    if line.absent:
        assert {d.code for d in found if d.severity == "error"} <= {"E0402", "E0413", "E0414"}
    else:
        assert not has_errors(found), f"{source.text}\n{render_full(found)}"


@pytest.mark.parametrize(("title", "line"), LINES, ids=IDS)
def test_language_page_row_is_complete(title: str, line: Line) -> None:
    assert (ROOT / line.test).is_file(), line.test
    assert line.source
    assert line.meaning.endswith(".")
    assert line.example in line.checked


def test_each_statement_has_a_row_or_is_unsupported() -> None:
    shown = {type(node) for _, line in LINES for node in _inside(line)}
    wanted: set[type[ast.Node]] = {
        *get_args(ast.RuleBody),
        *get_args(ast.Statement),
        *get_args(ast.TopLevel),
        *get_args(ast.DataLine),
        *get_args(ast.CorruptLine),
    }
    assert wanted - shown - {*FROM_OUTSIDE} == set()
    assert shown & {*FROM_OUTSIDE} == set()


def _inside(line: Line) -> list[ast.Node]:
    """The nodes within the example."""
    tree, _ = parsed(line.checked)
    begin, end = line.at, line.at + len(line.example)
    return [
        node
        for node in walk(tree)
        if isinstance(node, ast.Node) and begin <= node.span.start and node.span.end <= end
    ]
