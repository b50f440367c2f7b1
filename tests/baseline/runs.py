"""Runs of the baseline, and the parts of their results that it keeps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import mechdsl
from mechdsl import MechdslError, Results

Document = dict[str, Any]

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS_WEIGHTS = {"gpt2_ioi"}
"""Examples of models that may not be downloaded."""
NEEDS_TRAINING = {"edits", "fit", "lens", "prices"}
"""Examples with `fit(…)` declarations, which are trained first."""
NAMES = [p.stem for p in sorted(EXAMPLES.glob("*.mech")) if p.stem not in NEEDS_WEIGHTS]
FROZEN_NAMES = [name for name in NAMES if name not in NEEDS_TRAINING]
"""Examples without training, which would amplify rounding differences between processors."""
EXAMPLE_TOKENS = 512
RANDOM_TOKENS = 128
"""Tokens of a pass: small enough for several passes."""


def example(name: str, device: str = "cpu") -> Document:
    """Run a shipped example and return the kept results."""
    found = run_example(name, **given(EXAMPLE_TOKENS, device))
    return {"example": name, "found": kept(found)}


def run_example(name: str, **options: Any) -> Results:
    """Run a shipped example; its fits are trained in a temporary store."""
    path = EXAMPLES / f"{name}.mech"
    if name not in NEEDS_TRAINING:
        return mechdsl.run(path, **options)
    with tempfile.TemporaryDirectory() as store:
        return mechdsl.run(path, fit=True, store=store, **options)


def given(tokens: int = EXAMPLE_TOKENS, device: str = "cpu") -> dict[str, Any]:
    """Fixed sizes of passes, and the device."""
    return {"pass_tokens": tokens, "prompt_tokens": 2 * tokens, "device": device}


def kept(results: Results) -> Document:
    """The JSON document and hashes of every prompt's values, without versions and folders."""
    document = results.to_dict()
    for name in ("versions", "mechdsl"):
        del document[name]
    for file in document["files"]:
        file["file"] = Path(file["file"]).name
        for saved in file.get("saved", ()):
            for key in ("file", "rows_file"):  # random files save into temporary folders
                saved[key] = saved[key] and Path(saved[key]).name
    document["values"] = {
        each.name: {
            f"{number} {measure.label}": {
                "patched": sha256(measure.patched.tobytes()).hexdigest(),
                "base": sha256(measure.base.tobytes()).hexdigest(),
            }
            for number, measure in enumerate(each.measures)
        }
        for each in results
    }
    return document


# --- random files ---------------------------------------------------------------------------------


def random_files(count: int) -> Iterator[Document]:
    """A number of valid random files with their kept results; the files are always the same."""
    done = 0
    for case in _cases(20 * count + 20):
        found = again(case)["found"]
        if "errors" not in found:
            yield {**case, "found": found}
            done += 1
            if done == count:
                return
    raise RuntimeError(f"only {done} of {count} random files ran")


def again(case: Mapping[str, Any], device: str = "cpu") -> Document:
    """Run the case of an example or random file; return its kept results or errors."""
    if "example" in case:
        return example(case["example"], device)
    from ..execute import support

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.mech"
        path.write_text(case["file"], encoding="utf-8")
        (Path(folder) / "data.jsonl").write_text(case["data"], encoding="utf-8")
        model = support.bare(case["family"]).to(device), support.word_tokenizer()
        try:
            results = mechdsl.run(
                path, {"m": model}, no_pass=case["no_pass"], **given(RANDOM_TOKENS)
            )
            found = kept(results)
        except MechdslError as error:
            found = {"errors": [[d.code, d.message] for d in error.diagnostics]}
    return {**case, "found": found}


def _cases(count: int) -> Iterable[Document]:
    """Distinct files from the property test's strategies; each tenth uses full forward passes."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from ..execute import support, test_random_files

    made: dict[str, Document] = {}

    @seed(0)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(test_random_files.cases())
    def take(case: tuple[str, str, frozenset[str]]) -> None:
        family, text, off = case
        made.setdefault(
            text,
            {
                "family": family,
                "file": f'mech 1\nmodel m = local("handed over")\n'
                f"{test_random_files.PROMPTS}\n{text}",
                "data": "\n".join(json.dumps(row) for row in support.ROWS) + "\n",
                "no_pass": sorted(support.EVERY_PASS if len(made) % 10 == 9 else off),
            },
        )

    take()
    return made.values()
