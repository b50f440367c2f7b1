"""Registering an entry changes its registry, and no other object of the package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.rules.kinds import RULES, SiteRule, registered_words, rule_kind
from mechdsl.syntax.frontend import parse
from mechdsl.syntax.tree_builder import RegisteredWords

ROOT = Path(__file__).parent.parent

PLUGIN = "tests/plugin_package/mechdsl_example_plugin.py"

REGISTERED = f"""
import ast, importlib, sys
from mechdsl.base.records import Registry
from mechdsl.checks import file_check
from mechdsl.rules.observations.registry import SiteObservation, observation

for node in ast.parse(open("{PLUGIN}").read()).body:
    if isinstance(node, ast.ImportFrom) and node.module.startswith("mechdsl."):
        importlib.import_module(node.module)
modules = [each for name, each in sys.modules.items() if name.startswith("mechdsl.")]

def contents():
    found = {{}}
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, (dict, list, set, Registry)) and name[:2] != "__":
                label = value.kind if isinstance(value, Registry) else module.__name__ + "." + name
                found.setdefault(id(value), (label, list(value)))
    return found

before = contents()
importlib.import_module("{PLUGIN[:-3].replace("/", ".")}")

@observation("largest", unit="activation")
class Largest(SiteObservation):
    "The largest number of the vector."

changed = [label for key, (label, items) in contents().items() if before[key][1] != items]
print(*sorted(changed), sep=", ")
"""

KINDS = (
    "aggregate, baseline image, change, direction method, estimator, metric, observation, rule, "
    "statistic, trainer"
)


def test_registering_entries_changes_only_their_registries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REGISTERED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == KINDS


FILE = """mech 1
model toy = zoo("counting")
prompts parts {
  a in 3..5
  item in ["apple", "pear"]
  template "{item} {a}:"
  answer " {a}"
  corrupt c { mask item }
}
experiment e {
  model toy
  prompts parts
  stretch resid_post layer 0 at last token by 2
  measure prob(answer) as delta
}
"""


@pytest.fixture
def _stretch() -> Iterator[None]:
    @rule_kind("stretch")
    class Stretch(SiteRule):
        """`stretch SITE at POSITIONS by NUMBER`."""

        takes = "by"

    assert Stretch
    yield
    RULES._entries.pop("stretch")  # pyright: ignore[reportPrivateUsage]


@pytest.mark.usefixtures("_stretch")
def test_parser_knows_only_words_that_it_is_given() -> None:
    words = registered_words()
    assert words.verbs["stretch"] == "by"
    assert not parse(Source(FILE), words)[1]
    unknown = [each.span.text for each in parse(Source(FILE), RegisteredWords())[1] if each.span]
    assert unknown == ["mask", "stretch"]
    assert not [each for each in check_source(Source(FILE)).diagnostics if each.code == "E0101"]


def test_words_are_forgotten_with_their_entry() -> None:
    assert "stretch" not in registered_words().verbs
    found = check_source(Source(FILE)).diagnostics
    assert ("E0101", "stretch") in [(each.code, each.span.text) for each in found if each.span]
