"""Diagnostics of each mutant, with and without models, and their quality."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.checks.prompt_tables import FileContexts
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.models.config import shape_from_config
from mechdsl.program import spec
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.resolve.types import ModelContext

from .mutants import NEED_SHAPE, File, Mutant

EXAMPLES = Path(__file__).parents[2] / "examples"
SYSTEMS = EXAMPLES / "systems"
JUDGED = Path(__file__).parent / "judged.csv"
COLUMNS = ("file", "kind", "before", "after", "verdict", "reason")
NOT_HERE = 'hf("not/here"'
SOURCE = re.compile(r'\b(?:zoo|hf|local)\("[^"\n]*"')
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "vocab_size": 50257,
    "n_positions": 1024,
}
ROWS = CheckSettings(limit=20)
"""Enough rows for every rule of the examples, but fewer than the files request."""


@dataclass(frozen=True)
class Judgement:
    """A person's judgement of a mutant without diagnostics.

    verdict: `legal`, or the information needed to see the slip: `shape` or `tokenizer`.
    """

    verdict: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """The diagnostics of one mutant."""

    mutant: Mutant
    found: tuple[Diagnostic, ...]
    """Errors that the original file doesn't have, in the order of the text."""
    judgement: Judgement | None

    @property
    def caught(self) -> bool:
        return bool(self.found)

    def counts(self, *, with_models: bool) -> bool:
        """Whether the mutant needs a diagnostic."""
        verdict = "" if self.judgement is None else self.judgement.verdict
        waits = verdict in ("shape", "tokenizer") or self.mutant.kind in NEED_SHAPE
        return verdict != "legal" and (with_models or not waits)

    @property
    def on_line(self) -> bool | None:
        """Whether the first error points at the line with the slip; None if the line is gone."""
        if self.mutant.kind == "line dropped":
            return None
        span = self.found[0].span
        lines = [self.mutant.line]
        if self.mutant.kind == "line doubled":  # either of the two
            lines.append(self.mutant.line - 1)
        return span is not None and span.line in lines

    @property
    def answered(self) -> bool:
        """Whether a diagnostic suggests the right word for a misspelt one or, for a misspelt
        definition, names both the defined and the used name."""
        right, wrong = self.mutant.right, self.mutant.wrong
        for each in self.found:
            proposed = _quoted(each.help_text)
            if len(proposed) <= MOST and _names(right, proposed):
                return True
            if _names(right, _quoted(each.message)) and _names(wrong, proposed):
                return True
        return False


MOST = 2
"""Maximum quoted words of a help line that counts as a suggestion."""


def _quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]*)`", text)


def _names(word: str, quoted: Iterable[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", each) for each in quoted)


def right_files(also: Iterable[Path] = ()) -> list[File]:
    """The shipped examples, and the given files or folders."""
    found: list[File] = []
    for root in (EXAMPLES, *also):
        paths = sorted(root.rglob("*.mech")) if root.is_dir() else [root]
        paths = [
            path for path in paths if path.parent != SYSTEMS
        ]  # as many again, of the same kind
        found += [File(path, str(path.relative_to(root.parent))) for path in paths]
    return found


def judged() -> dict[tuple[str, str, str, str], Judgement]:
    if not JUDGED.exists():
        return {}
    with JUDGED.open(encoding="utf-8", newline="") as rows:
        return {
            (row["file"], row["kind"], row["before"], row["after"]): Judgement(
                row["verdict"], row["reason"]
            )
            for row in csv.DictReader(rows)
        }


class Checker:
    """Checks mutants of some files; without models, model paths don't exist but data files do."""

    def __init__(self, files: Iterable[File], folder: Path, *, models: bool) -> None:
        """folder: an empty one, for the files without models."""
        self.models = models
        self.paths: dict[str, Path] = {}
        self.contexts: Mapping[str, ModelContext] = {}
        files = list(files)
        for file in files:
            self.paths[file.name] = file.path if models else folder / file.name
            if not models:
                self.paths[file.name].parent.mkdir(parents=True, exist_ok=True)
                self.paths[file.name].write_text(self._seen(file.text), encoding="utf-8")
                data = self.paths[file.name].with_name("data")
                if (beside := file.path.with_name("data")).is_dir() and not data.exists():
                    data.symlink_to(beside)
        if models:
            self.contexts = _contexts(files)
        self.own = {file.name: self._said(file.name, file.text) for file in files}
        self.judged = judged()

    def _seen(self, text: str) -> str:
        return text if self.models else SOURCE.sub(NOT_HERE, text)

    def _said(self, name: str, text: str) -> list[Diagnostic]:
        source = Source(self._seen(text), self.paths[name])
        found = check_source(source, ROWS, self.contexts).diagnostics
        errors = [each for each in found if each.severity == "error"]
        return sorted(errors, key=lambda each: each.span.start if each.span else 0)

    def outcome(self, mutant: Mutant) -> Outcome:
        own = {(each.code, each.message) for each in self.own[mutant.file]}
        try:
            said = self._said(mutant.file, mutant.text)
        except Exception as error:  # a crash counts as a missing diagnostic
            print(f"broke off: {mutant.key}: {error!r}")
            said = []
        new = tuple(each for each in said if (each.code, each.message) not in own)
        return Outcome(mutant, new, self.judged.get(mutant.key))


def _contexts(files: Iterable[File]) -> dict[str, ModelContext]:
    """The models of the files, read once; GPT-2 from fixed sizes, downloaded or not."""
    found: dict[str, ModelContext] = {}
    for file in files:
        checked = check_source(Source(file.text, file.path), ROWS)
        contexts = FileContexts(checked.program, [], {}, None)
        for name, model in checked.program.models.items():
            here = None if model.kind == "hf" else contexts.models.context(name)
            found[name] = here or _by_its_numbers(model)
    return found


@cache
def _words() -> TextTokenizer:
    """A tokenizer with one token per word of the examples, with and without a space."""
    texts = " ".join(path.read_text(encoding="utf-8") for path in EXAMPLES.rglob("*.mech"))
    words = sorted(set(re.findall(r"\w+|[^\w\s]", texts)))
    known = dict.fromkeys(["<unk>", *words, *(f"Ġ{word}" for word in words)])
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer, problems = TextTokenizer.from_backend(backend)
    assert tokenizer is not None, problems
    return tokenizer


def _by_its_numbers(model: spec.Model) -> ModelContext:
    shape, problems = shape_from_config(GPT2, model=model.name)
    assert shape is not None, problems
    return ModelContext(model, shape, _words())
