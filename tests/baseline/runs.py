"""What is run for the baseline, and what is kept of it."""

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
"""Of a model that nobody may have downloaded."""
NEEDS_TRAINING = {"edits", "fit", "lens", "prices"}
"""With `fit(…)` declarations, which are trained first."""
NAMES = [p.stem for p in sorted(EXAMPLES.glob("*.mech")) if p.stem not in NEEDS_WEIGHTS]
FROZEN_NAMES = [name for name in NAMES if name not in NEEDS_TRAINING]
"""Without trained weights, in which rounding of other processors grows."""
EXAMPLE_TOKENS = 512
RANDOM_TOKENS = 128
"""Tokens of a pass: small enough for several passes."""


def example(name: str, device: str = "cpu") -> Document:
    """What is kept of a shipped example."""
    found = run_example(name, **given(EXAMPLE_TOKENS, device))
    return {"example": name, "found": kept(found)}


def run_example(name: str, **options: Any) -> Results:
    """Run a shipped example; what it declares is trained in a store that isn't kept."""
    path = EXAMPLES / f"{name}.mech"
    if name not in NEEDS_TRAINING:
        return mechdsl.run(path, **options)
    with tempfile.TemporaryDirectory() as store:
        return mechdsl.run(path, fit=True, store=store, **options)


def given(tokens: int = EXAMPLE_TOKENS, device: str = "cpu") -> dict[str, Any]:
    """Sizes that are the same everywhere, and the device."""
    return {"pass_tokens": tokens, "prompt_tokens": 2 * tokens, "device": device}


def kept(results: Results) -> Document:
    """The JSON document and the bits of every prompt's value, without versions and folders."""
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
    """Files that run, as many as wanted, with what is kept of them; the same ones every time."""
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
    """A case run, whatever its file was made by: what is kept of it, or the errors."""
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
    """Different files from the strategies of the property test; each tenth in whole passes."""
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
