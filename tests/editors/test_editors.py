"""The Pygments lexer, the TextMate grammar, the pre-commit hooks and the action."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from pygments.token import Error, Keyword, Name

from mechdsl.cli.entry import COMMANDS
from mechdsl.show.highlighting import MechLexer, clause_words, registered_names, statement_words

from .textmate import EXTENSION, GRAMMAR, textmate_grammar

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.mech"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_lexer_on_an_example_yields_no_error_and_all_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tokens = list(MechLexer(stripnl=False, ensurenl=False).get_tokens(text))
    assert "".join(value for _, value in tokens) == text
    assert [value for kind, value in tokens if kind is Error] == []


def test_lexer_distinguishes_keywords_names_and_sites() -> None:
    text = "patch resid_post at mine L1H2"
    tokens = {value: kind for kind, value in MechLexer().get_tokens(text)}
    assert tokens["patch"] is Keyword
    assert tokens["at"] is Keyword.Pseudo
    assert tokens["resid_post"] is Name.Builtin
    assert tokens["mine"] is Name
    assert tokens["L1H2"] is Name.Constant


def test_lexer_character_outside_the_language_is_an_error_token() -> None:
    assert (Error, "$") in list(MechLexer().get_tokens("patch $"))


def test_word_categories_do_not_overlap() -> None:
    categories = [*statement_words(), *clause_words(), *registered_names()]
    assert len(categories) == len(set(categories))


def test_lexer_import_loads_no_torch() -> None:
    code = "import sys, mechdsl.show.highlighting; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_textmate_grammar_is_current() -> None:
    # A separate process: other tests may have registered words of plugins in this one.
    command = [sys.executable, "-m", "tests.editors"]
    printed = subprocess.run(command, check=True, cwd=ROOT, capture_output=True).stdout
    assert GRAMMAR.read_bytes() == printed, "run `make editors`"


def test_textmate_patterns_compile() -> None:
    for pattern in json.loads(textmate_grammar())["patterns"]:
        re.compile(pattern.get("match", pattern.get("begin")))


def test_extension_files_that_package_json_names_exist() -> None:
    contributes = json.loads((EXTENSION / "package.json").read_text(encoding="utf-8"))[
        "contributes"
    ]
    language, grammar = contributes["languages"][0], contributes["grammars"][0]
    assert (EXTENSION / language["configuration"]).is_file()
    assert (EXTENSION / grammar["path"]) == GRAMMAR
    assert language["id"] == grammar["language"]
    assert grammar["scopeName"] == json.loads(textmate_grammar())["scopeName"]


def test_pygments_entry_point_names_the_lexer() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["pygments.lexers"]["mech"].partition(":")
    assert getattr(import_module(module), name) is MechLexer


def test_pre_commit_hooks_run_existing_commands() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert [hook["entry"] for hook in hooks] == ["mechdsl validate", "mechdsl fmt"]
    assert all(re.search(hook["files"], "a/b.mech") for hook in hooks)
    for hook in hooks:
        assert hook["entry"].split()[1] in COMMANDS


def test_action_steps_pass_a_valid_format() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    assert action["runs"]["using"] == "composite"
    scripts = "\n".join(step.get("run", "") for step in action["runs"]["steps"])
    assert re.findall(r"--format (\w+)", scripts) == ["sarif", "github"]


def test_issue_forms_are_valid() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "feature", "wrong-number"]
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert content["name"]
        assert content["description"]
        identifiers = [item["id"] for item in content["body"]]
        assert len(identifiers) == len(set(identifiers))


def test_llms_txt_lists_every_page_and_example() -> None:
    links = set(re.findall(r"\]\((.*?)\)", (ROOT / "llms.txt").read_text(encoding="utf-8")))
    pages = {*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.mech")}
    assert links == {str(path.relative_to(ROOT)) for path in pages} | {"docs/errors"}
