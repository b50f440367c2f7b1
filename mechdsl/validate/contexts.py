"""Models and prompt tables of a file, each read once, however many experiments use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.models.locate import locate
from mechdsl.models.shape import read_shape
from mechdsl.program import spec
from mechdsl.program.python_files import of_prompts
from mechdsl.prompts.build_table import build_table
from mechdsl.prompts.other_blocks import Paired, paired_run
from mechdsl.prompts.prompt_conventions import Split
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.prompts_block import PromptsBlock
from mechdsl.prompts.rows import BlockRows
from mechdsl.prompts.tokenizer import TOKENIZER_FILES, TextTokenizer
from mechdsl.resolve.model_runs import joined_table, model_run, refused_pair
from mechdsl.resolve.resolved import ModelContext


class Contexts:
    """Models and prompt tables of a file, each read once."""

    def __init__(
        self,
        program: spec.Program,
        diagnostics: list[Diagnostic],
        given: Mapping[str, ModelContext],
        limit: int | None,
        *,
        python: bool = False,
        prompts_enough: int | None = None,
    ) -> None:
        """given: models that are handed over, by name. limit: rows per table at most. python:
        whether functions of Python files are run. prompts_enough: how many of each table are
        looked at. What is found goes to `diagnostics`.
        """
        self.program = program
        self.diagnostics = diagnostics
        self.given = given
        self.limit = limit
        self.python = python
        self.prompts_enough = prompts_enough
        self._models: dict[str, ModelContext | None] = {}
        self._rows: dict[str, BlockRows] = {}
        self._tables: dict[tuple[object, ...], PromptTable | None] = {}
        self._runs: dict[tuple[object, ...], Paired | None] = {}
        self._joined: dict[tuple[object, ...], PromptTable | None] = {}
        self._tokenizers: dict[tuple[object, ...], TextTokenizer | None] = {}

    def model(self, name: str) -> ModelContext | None:
        """What is known of a model; None where it isn't here or is refused."""
        if name in self.given:
            return self.given[name]
        if name not in self._models:
            self._models[name] = self._read(self.program.models[name])
        return self._models[name]

    def _read(self, model: spec.Model) -> ModelContext | None:
        folder, found = locate(model, model.span.source.folder)
        self.diagnostics.extend(found)
        if folder is None:
            return None
        shape, found = read_shape(folder, model=model.name, span=model.span)
        self.diagnostics.extend(found)
        tokenizer = self._tokenizer(folder, model)
        if shape is None or tokenizer is None:
            return None
        return ModelContext(model, shape, tokenizer)

    def _tokenizer(self, folder: Path, model: spec.Model) -> TextTokenizer | None:
        """Checkpoints with the same files share one, which takes a while to read, and so their
        prompts."""
        key: tuple[object, ...] = (model.name,)
        if model.matched is not None:
            files = [folder / name for name in TOKENIZER_FILES]
            key = (model.bos, *(file.read_bytes() for file in files if file.is_file()))
        if key not in self._tokenizers:
            found, problems = TextTokenizer.from_folder(folder, model.bos, span=model.span)
            self.diagnostics.extend(problems)
            self._tokenizers[key] = found
        return self._tokenizers[key]

    def _words(self, name: str) -> list[str] | None:
        names = self.program.checkpoints.get(name, (name,))
        if not self.program.models.keys() >= set(names):
            return None
        found = self.model(names[0]) if names else None  # checkpoints have one tokenizer
        return [] if found is None else found.tokenizer.plain_words()

    def table(
        self, name: str, model: ModelContext, limit: int | None, part: str | None
    ) -> PromptTable | None:
        """The rows of a prompts block for one model."""
        if self.limit is not None:
            limit = self.limit if limit is None else min(limit, self.limit)
        key = (name, id(model.tokenizer), model.shape.max_positions, limit, part)
        if key not in self._tables and self.needs_python(name):
            self._tables[key] = None
        if key not in self._tables:
            assert part is None or part == "train" or part == "test"
            table, found = self._build(name, model, limit=limit, part=part)
            self.diagnostics.extend(found)
            self._tables[key] = table
        return self._tables[key]

    def _build(
        self,
        name: str,
        model: ModelContext,
        *,
        limit: int | None = None,
        part: Split | None = None,
        ids: Sequence[int] | None = None,
    ) -> tuple[PromptTable | None, list[Diagnostic]]:
        return build_table(
            self.program.prompts[name],
            tokenizer=model.tokenizer,
            seed=self.program.seed,
            limit=limit,
            part=part,
            words=self._words,
            max_length=model.shape.max_positions,
            parameters=self.program.parameters,
            blocks=self.program.prompts,
            compiled=self._rows,
            ids=ids,
            python=self.python,
            prompts_enough=self.prompts_enough,
        )

    def needs_python(self, name: str) -> bool:
        """Whether only Python, which isn't run here, can make the rows of a block."""
        return not self.python and bool(of_prompts(self.program.prompts[name]))

    def _block(self, name: str) -> PromptsBlock:
        return PromptsBlock(
            self.program.prompts[name],
            seed=self.program.seed,
            words=self._words,
            parameters=self.program.parameters,
            blocks=self.program.prompts,
            python=self.python,
        )

    def table_alone(self, name: str) -> None:
        """Check a block that no experiment has used, with the file's only model."""
        if any(key[0] == name for key in self._tables) or len(self.program.models) != 1:
            return
        model = self.model(next(iter(self.program.models)))
        if model is not None:
            self.table(name, model, 1, None)

    def with_elsewhere(
        self, experiment: spec.Experiment, model: ModelContext, table: PromptTable
    ) -> PromptTable | None:
        """The table with the experiment's runs of other blocks and models; experiments that share
        a table share these too."""
        names = tuple(run.name for run in experiment.elsewhere)
        key = (id(table), model.name, *names)
        if names and key not in self._joined:
            runs = [self._elsewhere(run, experiment, model, table) for run in experiment.elsewhere]
            self._joined[key] = joined_table(table, runs) if None not in runs else None
        return self._joined[key] if names else table

    def _elsewhere(
        self,
        run: spec.Elsewhere,
        experiment: spec.Experiment,
        model: ModelContext,
        table: PromptTable,
    ) -> Paired | None:
        key = (id(table), model.name, run.name)
        if key not in self._runs:
            if run.prompts is not None:
                found, problems = self._of_block(run, run.prompts, model, table)
            else:
                found, problems = self._of_model(run, experiment, model, table)
            self.diagnostics.extend(problems)
            self._runs[key] = found
        return self._runs[key]

    def _of_block(
        self, run: spec.Elsewhere, prompts: str, model: ModelContext, table: PromptTable
    ) -> tuple[Paired | None, list[Diagnostic]]:
        if self.needs_python(prompts):
            return None, []
        rows = self._rows.get(prompts)
        if rows is None:
            rows = self._rows[prompts] = BlockRows(self._block(prompts))
        if has_errors(rows.block.diagnostics):
            return None, rows.block.diagnostics
        return paired_run(
            table,
            self._rows[table.name].block,
            rows,
            run.run,
            name=run.name,
            build=lambda ids: self._build(prompts, model, ids=ids),
            span=run.span,
        )

    def _of_model(
        self,
        run: spec.Elsewhere,
        experiment: spec.Experiment,
        model: ModelContext,
        table: PromptTable,
    ) -> tuple[Paired | None, list[Diagnostic]]:
        assert run.model is not None
        other = self.model(run.model)
        if other is None:  # it isn't on this machine, or was refused
            return None, []
        problem = refused_pair(run, other, model)
        if problem is not None:
            return None, [problem]
        theirs = self.table(experiment.prompts, other, experiment.limit, experiment.part)
        return (None, []) if theirs is None else model_run(table, theirs, other, model, run)
