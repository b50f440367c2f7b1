"""Models and prompt tables of a file, each read once, however many experiments use them.

What can't be had is stood in for, so that all else of a file is checked by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from mechdsl.diagnostics.core import Diagnostic, Unknown, certain, has_errors
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.program.corruptions_named import corruptions_named
from mechdsl.program.lower_directions import Rows
from mechdsl.program.lower_images import averaged_block
from mechdsl.program.python_files import Mode, of_prompts
from mechdsl.prompts.answers import Labels
from mechdsl.prompts.build_table import build_table, compiled_as
from mechdsl.prompts.names_used import counts_tokens
from mechdsl.prompts.other_blocks import Paired, paired_run
from mechdsl.prompts.prompt_conventions import Split
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.prompts_block import PromptsBlock
from mechdsl.prompts.rows import BlockRows
from mechdsl.prompts.stand_ins import as_images, stand_in_table, with_stand_ins
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.resolve.findings import Finding
from mechdsl.resolve.model_runs import joined_table, model_run, outputs_read, refused_pair
from mechdsl.resolve.resolved import ModelContext
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk
from mechdsl.validate.images_read import cannot_read
from mechdsl.validate.model_contexts import Build, ModelContexts
from mechdsl.validate.prompts_enough import enough
from mechdsl.validate.replies_named import replies_behind
from mechdsl.validate.towers import Towers
from mechdsl.validate.vocabulary import prompts_fit


class Contexts:
    """Models and prompt tables of a file, each read once."""

    def __init__(
        self,
        program: spec.Program,
        diagnostics: list[Diagnostic],
        given: Mapping[str, ModelContext],
        limit: int | None,
        *,
        python: Mode = "refuse",
        build: Build | None = None,
        require: bool = False,
        prompts_enough: int | None = None,
    ) -> None:
        """given: models that are handed over, by name. limit: rows per table at most. python: what
        becomes of functions of Python files. build: what makes models by them, where that may be.
        require: whether a model that isn't there is an error. prompts_enough: how many of each
        table are looked at. What is found goes to `diagnostics`.
        """
        self.program = program
        self.diagnostics = diagnostics
        self.limit = limit
        self.python = python == "run"
        self.prompts_enough = prompts_enough
        self.models = ModelContexts(
            program, diagnostics, given, python=python, build=build, require=require
        )
        self._rows: dict[str, BlockRows] = {}
        self._used: dict[tuple[str, str], frozenset[str]] = {}
        """By experiment, without its variants, and prompts block: the corruptions that it names."""
        self._tables: dict[tuple[object, ...], dict[frozenset[str], PromptTable]] = {}
        """By what their rows are of, and the corruptions that are used."""
        self._runs: dict[tuple[object, ...], Paired | None] = {}
        self._joined: dict[tuple[object, ...], PromptTable] = {}
        self._replied: dict[tuple[object, ...], PromptTable] = {}
        self.towers = Towers(
            program,
            diagnostics,
            self.models.context,
            self._compiled,
            self._build,
            self._say,
            self.models.stand_in,
        )

    def table(
        self,
        name: str,
        model: ModelContext,
        limit: int | None,
        part: str | None,
        labels: Labels | None = None,
        used: frozenset[str] | None = None,
    ) -> PromptTable:
        """The rows of a prompts block for one model; where they can't be made, one that stands in
        for them.

        labels: what answers are, where that is for another model to say. used: the corruptions
        that are used, of which each changes all of the rows; None: every one.
        """
        runs = frozenset(each.name for each in self.program.prompts[name].corruptions)
        used = runs if used is None else used & runs
        if self.limit is not None:
            limit = self.limit if limit is None else min(limit, self.limit)
        labels = labels or self._labels(name, model.shape)
        key = (name, id(model.tokenizer), model.shape.max_positions, labels, limit, part)
        tables = self._tables.setdefault(key, {})
        # Experiments share a table, and passes with it, where their runs leave out the same rows.
        equal = (t for t in tables.values() if frozenset(t.changed_by) == used & t.unchanged)
        if used not in tables:
            tables[used] = next(equal, None) or self._table(name, model, limit, part, labels, used)
        return tables[used]

    def _table(
        self,
        name: str,
        model: ModelContext,
        limit: int | None,
        part: str | None,
        labels: Labels,
        used: frozenset[str],
    ) -> PromptTable:
        assert part is None or part == "train" or part == "test"
        table = None
        model = self.models.reading(name, model)
        problem = cannot_read(self.program.prompts[name], model)
        if problem is not None:
            self.diagnostics.append(problem)
        elif not self.needs_python(name):
            table, found = self._build(
                name, model, limit=limit, part=part, labels=labels, used=used
            )
            if table is not None:
                found = [*found, *prompts_fit(table, model)]
            self._say(found, model, name)
        if table is None:
            table = stand_in_table(self._compiled(name).block, self.models.stand_in)
            if self.program.prompts[name].kind == "images":
                table = as_images(table, self.models.stand_in_reader)
        elif self._guessed(name, model):
            table = replace(table, stands_in=True)
        return table

    def of_experiment(
        self, experiment: spec.Experiment, model: ModelContext, labels: Labels | None = None
    ) -> PromptTable:
        """The rows of an experiment for a model: those that each run that the experiment names, in
        one of its variants, changes. labels: as `table` takes them."""
        name = experiment.prompts
        key = (experiment.within or experiment.name, name)
        if key not in self._used:
            self._used[key] = corruptions_named(experiment, self.program)
        return self.table(name, model, experiment.limit, experiment.part, labels, self._used[key])

    def read_by(self, rows: Rows, experiment: spec.Experiment, model: ModelContext) -> PromptTable:
        """The rows that a direction is fitted on: those of a block or a part, all without `limit:`,
        or those of the experiment; for the model that runs them."""
        if rows.model is not None:
            model = self.models.context(rows.model)
        if rows.block is None:
            return self.of_experiment(experiment, model)
        return self.table(rows.block, model, rows.limit, rows.part, used=rows.used)

    def with_replies(
        self,
        experiment: spec.Experiment,
        model: ModelContext,
        table: PromptTable,
        finding: Finding | None,
    ) -> PromptTable:
        """The table with what stands in for the replies behind its prompts; variants of an
        experiment that share a table share these too."""
        assert experiment.replies is not None
        key = (id(table), experiment.replies.span, model.name)
        if key not in self._replied:
            others = [self.models.context(run.model) for run in experiment.elsewhere if run.model]
            found, problems = replies_behind(
                table, experiment, self.program, finding, model, others
            )
            self._replied[key] = found
            self.diagnostics.extend(problems)
        return self._replied[key]

    def _say(self, found: Sequence[Diagnostic], model: ModelContext, *blocks: str) -> None:
        """Keep what is true whatever stands in."""
        unknown: set[Unknown] = set()
        if model.shape.stands_in:
            unknown.add("shape")
        if model.tokenizer.stands_in:
            unknown.add("tokens")
        if any(self._guessed(name, model) for name in blocks):
            unknown.update(("rows", "tokens"))  # of words that stand in for others
        self.diagnostics.extend(certain(found, unknown))

    def _guessed(self, name: str, model: ModelContext) -> bool:
        """Whether a block has words of a tokenizer that isn't at hand, or asks it for tokens."""
        where = (node for condition in self.program.prompts[name].where for node in walk(condition))
        counted = any(map(counts_tokens, where))
        if model.tokenizer.stands_in and (counted or self.program.prompts[name].chat):
            return True
        domains = (value.domain for value in self.program.prompts[name].values)
        calls = (node for domain in domains for node in walk(domain))
        return any(
            self.models.of_words(argument.value.id).tokenizer.stands_in
            for node in calls
            if isinstance(node, ast.Call) and node.name == "words"
            for argument in node.arguments
            if isinstance(argument.value, ast.Name)
        )

    def _compiled(self, name: str, tokenizer: TextTokenizer | None = None) -> BlockRows:
        key = compiled_as(self.program.prompts[name], tokenizer)
        if key not in self._rows:
            self._rows[key] = BlockRows(self._block(name, tokenizer))
        return self._rows[key]

    def _build(
        self,
        name: str,
        model: ModelContext,
        *,
        limit: int | None = None,
        part: Split | None = None,
        ids: Sequence[int] | None = None,
        labels: Labels | None = None,
        used: frozenset[str] | None = None,
    ) -> tuple[PromptTable | None, list[Diagnostic]]:
        return build_table(
            self.program.prompts[name],
            tokenizer=model.tokenizer,
            seed=self.program.seed,
            limit=limit,
            part=part,
            words=self.models.words,
            max_length=model.shape.max_positions,
            parameters=self.program.parameters,
            blocks=self.program.prompts,
            compiled=self._rows,
            ids=ids,
            python=self.python,
            prompts_enough=self._enough,
            labels=labels or self._labels(name, model.shape),
            writes=name in self._written_behind,
            used=used,
        )

    @cached_property
    def _written_behind(self) -> frozenset[str]:
        """The blocks behind whose prompts a model writes."""
        every = self.program.experiments
        return frozenset(each.prompts for each in every if each.generation is not None)

    @cached_property
    def _enough(self) -> int | None:
        """How many prompts of a table are looked at: fewer where the file says more of each."""
        return None if self.prompts_enough is None else enough(self.program, self.prompts_enough)

    def _labels(self, name: str, shape: ModelShape) -> Labels:
        """What answers of a block are to a model: of images never texts."""
        if self.program.prompts[name].kind == "images" and shape.task == "tokens":
            return "named"
        return _labels(shape)

    def needs_python(self, name: str) -> bool:
        """Whether only Python, which isn't run here, can make the rows of a block."""
        averaged = averaged_block(self.program.prompts[name].image)
        blocks = (name,) if averaged is None else (name, averaged.name)
        known = [self.program.prompts[each] for each in blocks if each in self.program.prompts]
        return not self.python and any(map(of_prompts, known))

    def _block(self, name: str, tokenizer: TextTokenizer | None) -> PromptsBlock:
        return PromptsBlock(
            self.program.prompts[name],
            seed=self.program.seed,
            words=self.models.words,
            parameters=self.program.parameters,
            blocks=self.program.prompts,
            python=self.python,
            chat=None if tokenizer is None else tokenizer.chat,
        )

    def table_alone(self, name: str) -> None:
        """Check a block that no experiment has used, with the file's only model."""
        if any(key[0] == name for key in self._tables) or len(self.program.models) != 1:
            return
        model = self.models.context(next(iter(self.program.models)))
        if cannot_read(self.program.prompts[name], model) is None:
            self.table(name, model, 1, None)

    def with_elsewhere(
        self, experiment: spec.Experiment, model: ModelContext, table: PromptTable
    ) -> PromptTable:
        """The table with the experiment's runs of other blocks and models; experiments that share
        a table share these too."""
        names = tuple(run.name for run in experiment.elsewhere)
        read = tuple(outputs_read(experiment, name) for name in names)
        key = (id(table), model.name, *names, *read)
        if names and key not in self._joined:
            joined = None
            if not table.stands_in:
                runs = [self._elsewhere(r, experiment, model, table) for r in experiment.elsewhere]
                joined = joined_table(table, runs)
            self._joined[key] = joined or with_stand_ins(table, names)
        return self._joined[key] if names else table

    def _elsewhere(
        self,
        run: spec.Elsewhere,
        experiment: spec.Experiment,
        model: ModelContext,
        table: PromptTable,
    ) -> Paired | None:
        read = outputs_read(experiment, run.name)
        key = (id(table), model.name, run.name, experiment.broken, read)
        if key not in self._runs:
            if run.prompts is not None:
                found, problems = self._of_block(run, run.prompts, model, table)
            else:
                found, problems = self._of_model(run, experiment, model, table)
            if not experiment.broken:  # which may be why they don't fit
                self._say(problems, model, *(name for name in (run.prompts,) if name))
            self._runs[key] = found
        return self._runs[key]

    def _of_block(
        self, run: spec.Elsewhere, prompts: str, model: ModelContext, table: PromptTable
    ) -> tuple[Paired | None, list[Diagnostic]]:
        if self.needs_python(prompts):
            return None, []
        model, other = self.models.reading(prompts, model), self.program.prompts[prompts]
        if (problem := cannot_read(other, model)) is not None:
            return None, [problem]
        if other.kind != self.program.prompts[table.name].kind:
            return None, []  # of a model that isn't at hand, which reads one of them
        rows = self._compiled(prompts, model.tokenizer)
        if has_errors(rows.block.diagnostics) or rows.block.columns_unknown:
            return None, rows.block.diagnostics
        return paired_run(
            table,
            self._compiled(table.name, model.tokenizer).block,
            rows,
            run.run,
            name=run.name,
            tokenizer=model.tokenizer,
            build=lambda ids: self._build(prompts, model, ids=ids),
            span=run.span,
            shuffled=run.shuffled,
        )

    def _of_model(
        self,
        run: spec.Elsewhere,
        experiment: spec.Experiment,
        model: ModelContext,
        table: PromptTable,
    ) -> tuple[Paired | None, list[Diagnostic]]:
        assert run.model is not None
        other = self.models.context(run.model)
        problem = refused_pair(run, other, model, outputs=outputs_read(experiment, run.name))
        if problem is not None:
            return None, [problem]
        # Answers are this model's, whose outputs are measured.
        labels = self._labels(experiment.prompts, model.shape)
        theirs = self.of_experiment(experiment, other, labels)
        if theirs.stands_in:
            return None, []
        return model_run(table, theirs, other, model, run)


def _labels(shape: ModelShape) -> Labels:
    """What answers are to the model."""
    if shape.task == "tokens":
        return "none"
    if shape.side:
        return "named"
    return "named" if shape.names_labels else "numbered"
