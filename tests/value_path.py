"""Find the files that change the value of one rule between the text and the printed table.

python -m tests.value_path [--json]

The program runs an experiment on the first model and prompts of `examples/counting.mech`, without
a store, and records each function of `mechdsl` that it calls. A file **changes the value** if one
of its functions is the first to return an object of `CHAIN`, or a floating-point array or tensor.
A function that returns an object that another function made only passes it on. Code that runs
while a module is imported or while a model is loaded isn't counted.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = Path(__file__).parent.parent / "mechdsl"
EXAMPLE = PACKAGE.parent / "examples" / "counting.mech"
RULE = "patch layer 0..2 head * at last-item of part1 token"
ARGUMENTS = sys.argv[1:]
MAX_LINES = 60
"""Lines of a function, with its signature and docstring."""

CHAIN = {
    "syntax.ast": None,
    "program.spec": None,
    "prompts.rows": {"PromptTable"},
    "prompts.runs": {"PromptRun", "PositionCell"},
    "resolve.types": {
        "ExperimentOutline",
        "ResolvedExperiment",
        "ResolvedRule",
        "ResolvedMeasure",
        "SiteTargets",
        "SitePoint",
        "PositionTargets",
    },
    "planner.plan": {"Plan", "Panel", "ExperimentPlan"},
    "planner.rows": {"RulePlan", "RowTable"},
    "planner.cost": {"SharedRows"},
    "forward.hooks.batch": {"RuleWrites", "SiteWrite"},
    "forward.hooks.full_pass": {"FullPassResult"},
    "forward.packed.activation_cache": {"ActivationCache"},
    "forward.packed.packed_pass": {"PackedResult"},
    "execute.patching.writes": {"RuleWrite"},
    "execute.measurement.readout": {"ReadoutInput", "ReadoutResult"},
    "execute.measurement.values": {"MeasuredValues"},
    "statistics.measurements": {"MeasureData", "EffectSums", "CellStatistics"},
    "results.experiment_result": {"ExperimentResult", "FileResult"},
    "results.results": {"Results"},
    "rich.table": {"Table"},
}
"""Module → names of its classes on the path; None: all of them."""


def write_experiment(folder: Path) -> Path:
    """Write a file with the rule, and the model and prompts of the example."""
    definitions = EXAMPLE.read_text(encoding="utf-8").split("prompts barred")[0]
    path = folder / "rule.mech"
    experiment = f"""experiment heads {{
  model toy
  prompts parts limit 64
  from clean into fewer
  {RULE}
  measure logit(answer) - logit(answer of fewer) as recovery
  report table
}}
"""
    path.write_text(definitions + experiment, encoding="utf-8")
    return path


def list_values(value: Any, depth: int = 3) -> list[Any]:
    """Return the value, or the values in a container, that are on the path."""
    kind = type(value)
    if kind in (tuple, list, dict) and depth:
        items = value.values() if kind is dict else value
        return [each for item in items for each in list_values(item, depth - 1)]
    module = kind.__module__.removeprefix("mechdsl.")
    if module in CHAIN:
        names = CHAIN[module]
        return [value] if names is None or kind.__name__ in names else []
    if kind.__name__ == "Tensor" and module == "torch":
        return [value] if value.is_floating_point() else []
    if kind.__name__ == "ndarray" and module == "numpy":
        return [value] if value.dtype.kind == "f" else []
    return []


class PathRecorder:
    """The functions that a run calls, and those that are first to return a value of the path."""

    def __init__(self) -> None:
        self.paths: dict[CodeType, str] = {}  # "" for code of other packages
        self.called: set[CodeType] = set()
        self.makes: dict[str, set[str]] = defaultdict(set)
        self.seen: dict[int, Any] = {}  # the values stay alive, so that no id is used twice
        self.importing = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Record one call or return, as `sys.setprofile` reports it."""
        code = frame.f_code
        if event not in ("call", "return"):
            return
        if code.co_name == "<module>":
            self.importing += 1 if event == "call" else -1
        path = self._find_path(code)
        if not path or self.importing:
            return
        self.called.add(code)
        if event == "return":
            for value in list_values(argument):
                if id(value) not in self.seen:
                    self._add(value)
                    if not self._is_loading(frame):
                        self.makes[path].add(type(value).__name__)

    def _add(self, value: Any) -> None:
        """Add a value and the values in its fields, made by this function or an earlier one."""
        if id(value) not in self.seen:
            self.seen[id(value)] = value
            for each in list_values(list(getattr(value, "__dict__", {}).values())):
                self._add(each)

    def _find_path(self, code: CodeType) -> str:
        """Return the path of a file of the package, or nothing."""
        found = self.paths.get(code)
        if found is None:
            root = f"{PACKAGE}/"
            name = code.co_filename
            found = self.paths[code] = name.removeprefix(root) if name.startswith(root) else ""
        return found

    def _is_loading(self, frame: FrameType | None) -> bool:
        """Return whether a function of `loading` called this one."""
        while frame is not None:
            if self._find_path(frame.f_code).startswith("loading/"):
                return True
            frame = frame.f_back
        return False


def long_functions() -> dict[tuple[str, int], tuple[str, int]]:
    """Return the functions above the limit: file and first line → name and number of lines."""
    found: dict[tuple[str, int], tuple[str, int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                if lines > MAX_LINES:
                    place = path.relative_to(PACKAGE).as_posix(), first
                    found[place] = f"{place[0]}:{node.name}", lines
    return found


def record_run() -> dict[str, Any]:
    """Run the experiment and return the files and functions of its path."""
    from mechdsl.cli.entry import main

    recorder = PathRecorder()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MECHDSL_CACHE"] = f"{folder}/cache"  # so that the model is checked again
        path = write_experiment(Path(folder))
        sys.argv = ["mechdsl", "run", str(path), "--no-store", "--format", "table"]
        status: object = None
        sys.setprofile(recorder)
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        finally:
            sys.setprofile(None)
    if status:
        raise RuntimeError(f"the run ended with status {status}")
    long = long_functions()
    called = {(recorder.paths[code], code.co_firstlineno) for code in recorder.called}
    return {
        "called": sorted({path for path, _ in called}),
        "functions": len(called),
        "changing": {path: sorted(kinds) for path, kinds in sorted(recorder.makes.items())},
        "long": sorted(name for place, (name, _) in long.items() if place in called),
    }


if __name__ == "__main__":
    found = record_run()
    if "--json" in ARGUMENTS:
        print(json.dumps(found))
    else:
        for path, kinds in found["changing"].items():
            print(f"{path}: {', '.join(kinds)}")
        print(f"{len(found['changing'])} files change the value")
        print(f"{len(found['called'])} files, {found['functions']} functions are called")
        print(f"functions above {MAX_LINES} lines: {', '.join(found['long'])}")
