"""Models and prompt tables of a file, each read once for all experiments.

Placeholders replace missing data, so that the same code checks everything else in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol, cast

from mechdsl.base import limits
from mechdsl.base.records import Record
from mechdsl.base.text import count_noun, name_list
from mechdsl.checks.conditions import CellReader, KnownNames, RefusedCondition
from mechdsl.checks.models import ModelBuilder, ModelContexts, check_input_kind, check_prompt_tokens
from mechdsl.diagnostics.core import Diagnostic, UnknownFact, filter_certain, has_errors
from mechdsl.diagnostics.experiments import UnreadableExpectation
from mechdsl.diagnostics.prompts import NoRows
from mechdsl.diagnostics.rules import RepliesNotUsable
from mechdsl.diagnostics.syntax import BadArgument, NotSupported
from mechdsl.images.processing import UnsupportedProcessor
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.program.directions import FitRows, fit_rows_of_experiment
from mechdsl.program.images import IMAGE_SPAN, averaged_blocks
from mechdsl.program.prompts import used_corruptions
from mechdsl.program.python_functions import PythonMode, prompt_functions
from mechdsl.program.saves import report_streamed_use
from mechdsl.program.spec import CLEAN, RepliesOf
from mechdsl.prompts.answers import LabelNaming
from mechdsl.prompts.expressions import counts_tokens
from mechdsl.prompts.other_runs import PairedRun, add_replies, add_stand_in_replies, pair_run
from mechdsl.prompts.rows import BlockRows, PromptTable
from mechdsl.prompts.selection import SplitPart
from mechdsl.prompts.table import (
    BlockCompiler,
    RowSelection,
    add_stand_in_runs,
    build_table,
    stand_in_images,
    stand_in_table,
)
from mechdsl.prompts.tokens.image_prompts import report_unprepared
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer, TextTokenizer
from mechdsl.resolve.cells import CellKey, find_open_axes, join_axes, join_cells
from mechdsl.resolve.expansion import get_whole_spec, name_cells
from mechdsl.resolve.findings import Finding, PickError, VariantFinding
from mechdsl.resolve.model_pairs import (
    attach_images,
    attach_placeholder_images,
    build_model_run,
    check_model_pair,
    join_runs,
    measures_choice,
    reads_outputs,
)
from mechdsl.resolve.types import ModelContext
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk
from mechdsl.vocab.metrics import Reply


class TableBuilder(Protocol):
    """Builds the table of a block for a model; `ids` restricts it to these row numbers."""

    def __call__(
        self, name: str, model: ModelContext, *, ids: Sequence[int] | None = None
    ) -> tuple[PromptTable | None, list[Diagnostic]]: ...


class StreamedPart(Record):
    """Some rows of a block whose rows are read in parts."""

    table: PromptTable | None
    """None if no rows are left, or after an error."""
    diagnostics: list[Diagnostic]
    too_long: int = 0
    """Number of rows that are left out because they are longer than the model's context."""


DiagnosticSink = Callable[..., None]
"""Receives diagnostics with the model and the blocks that they refer to."""


class TowerModels:
    """The models with two towers in a file's experiments."""

    def __init__(
        self,
        program: spec.Program,
        diagnostics: list[Diagnostic],
        model: Callable[[str], ModelContext],
        compiled: Callable[[str, TextTokenizer | None], BlockRows],
        build: TableBuilder,
        say: DiagnosticSink,
        stand_in: TextTokenizer,
    ) -> None:
        """Store the callbacks.

        Args:
            model: Returns what is known about a model, by name.
            stand_in: Placeholder for a missing tokenizer.
        """
        self.program = program
        self.diagnostics = diagnostics
        self._model = model
        self._compiled = compiled
        self._build = build
        self._say = say
        self._stand_in = stand_in
        self._texts: dict[str, ModelContext] = {}
        self._whole: dict[str, PromptTable | None] = {}

    def reading(self, name: str, model: ModelContext) -> ModelContext:
        """Return the tower that reads the rows of a block; other models unchanged.

        Codes: E0108 and E0207 for texts that can't be scored.
        """
        block = self.program.prompts[name]
        texts = model.shape.texts
        if block.kind == "images":
            return model
        if model.shape.stands_in:
            if block.scored_with is None:
                return model
            return replace(model, shape=replace(model.shape, side="text", task="one label"))
        if texts is None:
            if block.scored_with is not None:
                what = f"`image` in prompts for `{model.name}`, which has no image tower,"
                self.diagnostics.append(NotSupported(span=block.scored_with.span, what=what))
            return model
        if block.scored_with is None and not block.from_images and name != spec.NO_PROMPTS:
            reason = f"has no images for `{model.name}` to score its texts with"
            hint = "add an images block to it: `image from scenes`"
            bad = BadArgument(span=block.span, name=name, reason=reason, hint=hint)
            self.diagnostics.append(bad)
        if model.name not in self._texts:
            reader = model.tokenizer.texts if isinstance(model.tokenizer, ImageTokenizer) else None
            tower = replace(
                model, shape=texts, tokenizer=reader or self._stand_in, image_tower=model
            )
            self._texts[model.name] = tower
        return self._texts[model.name]

    def facing_images(
        self, experiment: spec.Experiment, model: ModelContext, table: PromptTable
    ) -> tuple[ModelContext, PromptTable]:
        """Add the images that texts are scored with, row by row or one for all, to the table of a
        text tower; other models and tables are returned unchanged."""
        if model.shape.side != "text":
            return model, table
        ref = self.program.prompts[experiment.prompts].scored_with
        images = None if ref is None else self.program.prompts.get(ref.name)
        unknown = table.stands_in or model.shape.stands_in
        if ref is None or images is None or images.kind != "images" or unknown:
            return attach_placeholder_images(model, table)
        reader = self._model(model.name)
        run, problems = pair_run(
            table,
            self._compiled(experiment.prompts, model.tokenizer).block,
            self._compiled(ref.name, reader.tokenizer),
            CLEAN,
            name=IMAGE_SPAN,
            tokenizer=reader.tokenizer,
            build=lambda ids: self._build(ref.name, reader, ids=ids),
            span=ref.span,
        )
        self._say(problems, reader, ref.name)
        if run is None:
            return attach_placeholder_images(model, table)
        pictures = [row.image for row in run.run.rows if row.image is not None]
        every = None
        if measures_choice(experiment):
            whole = self._every(ref.name, reader)
            rows = () if whole is None else whole.runs[CLEAN].rows
            every = [row.image for row in rows if row.image is not None]
        return attach_images(model, table, ref.name, pictures, every)

    def _every(self, name: str, model: ModelContext) -> PromptTable | None:
        """Return all rows of a block, without limits."""
        if name not in self._whole:
            self._whole[name], problems = self._build(name, model)
            self._say(problems, model, name)
        return self._whole[name]


_ROW_TO_TABLE = 4
"""Time to create a row, relative to adding it to a table or finding a position in it."""

_ANY_PROMPT = 10
"""Fixed cost of a prompt, in units of one expression."""


def rows_to_check(program: spec.Program, prompts: int) -> int:
    """Return how many prompts of each table to check: `prompts`, or fewer to limit the time."""
    work = list(_work(program))
    while prompts > 1 and sum(min(n, prompts) * each for n, each in work) > limits.CHECKED_WORK:
        prompts = prompts * 9 // 10
    return prompts


def _work(program: spec.Program) -> Iterator[tuple[int, int]]:
    """Yield, per table and per block, the maximum number of prompts and the cost of each."""
    longest: dict[str, int] = {}
    tables: dict[tuple[str, str, int | None, str | None, int], int] = {}
    for each in program.experiments:
        block = program.prompts.get(each.prompts)
        if block is None:
            continue
        count = (each.limit or limits.ROWS) * (1 + len(block.corruptions))
        longest[block.name] = max(count, longest.get(block.name, 0))
        key = (block.name, each.model, each.limit, each.part, count)
        said = _expressions((each.every_rule, each.measures, each.keep, each.expects))
        draws = 2 * limits.CHECKED_DRAWS * _ANY_PROMPT if each.against is not None else 0
        tables[key] = tables.get(key, _expressions(block)) + said + draws
    for (*_, count), parts in tables.items():
        yield count, _ANY_PROMPT + parts // _ROW_TO_TABLE
    for name, count in longest.items():
        yield count, _ANY_PROMPT + _expressions(program.prompts[name])


def _expressions(part: object) -> int:
    """Count a part's expressions, without domains of values, which are evaluated once."""
    match part:
        case ast.Node():
            nodes = list(walk(part))
            slow = sum(isinstance(node, ast.Except) or _draws(node) for node in nodes)
            return len(nodes) + slow * _ANY_PROMPT // 2 + part.span.text.count("{")
        case tuple():
            return sum(map(_expressions, cast("tuple[object, ...]", part)))
        case spec.Spec():
            names = set(spec.spec_fields(type(part))) - {"domain"}
            own = _ANY_PROMPT if isinstance(part, spec.TextDef) else 1  # texts are tokenised
            return own + sum(_expressions(getattr(part, name)) for name in names)
        case _:
            return 0


def _draws(node: ast.Node) -> bool:
    return isinstance(node, ast.Call) and node.name == "list"


_FIRST_ROWS = 256
"""Number of rows that are checked together of a block whose rows are read in parts."""

_ANY = 64
"""Number of tokens of an unknown reply."""


def attach_replies(
    table: PromptTable,
    experiment: spec.Experiment,
    program: spec.Program,
    finding: Finding | None,
    model: ModelContext,
    others: Iterable[ModelContext] = (),
) -> tuple[PromptTable, list[Diagnostic]]:
    """Append another experiment's replies to the prompts; before it has run, placeholders of the
    maximum length.

    Codes: E0203, E0546, and those of texts after prompts.

    Args:
        finding: Result of that experiment; None if it was rejected.
        others: Other models that its rows run on.
    """
    named = experiment.replies
    assert named is not None
    if finding is None:
        return add_stand_in_replies(table, named.text, _ANY), []
    try:
        every = _parts(finding.on(model.name, table.name, None))
        _check(named, every[0], table, [model, *others])
        _check_fits(experiment, program)
        part, cell = _cell(named, every, program)
        if part.means is None:
            tokens = _room(named, every[0], table, model)
            return add_stand_in_replies(table, named.text, tokens), []
        prompt_table, problems = add_replies(table, _only(part, cell), model.tokenizer, named.text)
        _check_lengths(prompt_table, model, named)
    except PickError as refusal:
        problem = _bad(named, refusal.reason, refusal.hint)
    except RefusedCondition as refusal:
        problem = _reworded(named, refusal.diagnostic)
    else:
        return prompt_table, problems
    return add_stand_in_replies(table, named.text, _ANY), [problem]


def _parts(finding: Finding) -> list[VariantFinding]:
    """Return one part per variant, because measures at several positions share their replies."""
    parts: dict[object, VariantFinding] = {}
    for part in finding.parts:
        parts.setdefault(get_whole_spec(part.experiment).variant, part)
    return list(parts.values())


def _check(
    named: RepliesOf,
    part: VariantFinding,
    table: PromptTable,
    models: Sequence[ModelContext],
) -> None:
    """Check that it generates one reply after each of these prompts, in these models' tokens."""
    own, of = part.experiment, f"`{named.of}`"
    if own.generation is None:
        raise PickError(f"{of} generates no replies", f"add a line such as `generate 40` to {of}")
    if own.table.name != table.name:
        raise PickError(
            f"{of} generates replies for prompts of `{own.table.name}`, but this experiment "
            f"runs on `{table.name}`",
            "use the same prompts block in both",
        )
    if own.generation.samples > 1:
        raise PickError(
            f"{of} generates {own.generation.samples} replies per prompt", "set it to one sample"
        )
    draws = own.table.runs[own.spec.base].draws
    if draws > 1:
        raise PickError(
            f"{of} generates one reply for each of {draws} noise draws", "run it with one draw"
        )
    known = [model for model in models if not model.tokenizer.stands_in]
    other = next((m for m in known if m.tokenizer.hash != own.model.tokenizer.hash), None)
    if other is not None and not own.model.tokenizer.stands_in:
        raise PickError(
            f"{of} generates tokens of `{own.model.name}`, but `{other.name}` has a different "
            "tokenizer",
            "use a model with the same tokenizer",
        )


def _check_fits(experiment: spec.Experiment, program: spec.Program) -> None:
    """Check that everything read is of these prompts with these replies, or names its own."""
    if any(
        rows.block is None and rows.model for rows in fit_rows_of_experiment(experiment, program)
    ):
        raise PickError(
            "a direction is fitted on another model's runs of these rows without the replies",
            "name the rows to fit it on",
        )
    if any(rule.verb == "replace" and rule.source_block is None for rule in experiment.every_rule):
        raise PickError(
            "a rule replaces text of the prompts, which are then tokenised again",
            "replace it in a corruption of the block and run that: `into CORRUPTION`",
        )


def _cell(
    named: RepliesOf, parts: Sequence[VariantFinding], program: spec.Program
) -> tuple[VariantFinding, int]:
    """Return (variant, index of its cell) of the named cell."""
    undecided = find_open_axes(parts[0].experiment.spec, program.groups, ("shape", "tokens"))
    if not any(p.experiment.model.tokenizer.stands_in for p in parts):
        undecided = frozenset()
    own = [(get_whole_spec(part.experiment).variant, _cells(part)) for part in parts]
    axes = join_axes([(v, list(cells[0].coords) if cells else []) for v, cells in own])
    every = [
        (part, n) for part, (_, cells) in zip(parts, own, strict=True) for n in range(len(cells))
    ]
    cells = join_cells(axes, own)
    known = KnownNames((), axes, cells=cells, open_axes=undecided, name=named.of)
    finder = CellReader(known, of_other=True)
    cell_numbers = finder.find(finder.wheres(named.cell))
    if len(cell_numbers) != 1 and not (undecided and cell_numbers):
        raise _not_one(named, axes, cells, len(cell_numbers))
    return every[cell_numbers[0]]


def _not_one(
    named: RepliesOf, axes: Sequence[str], cells: Sequence[CellKey], count: int
) -> PickError:
    if count:
        said = ", ".join(
            f'{axis}: "{value}"' if isinstance(value, str) else f"{axis}: {value}"
            for axis, value in cells[0].coords.items()
        )
        return PickError(
            f"{count} cells of `{named.of}` generate replies"
            + (" there" if named.cell else ", each different"),
            f"select one cell: `replies of {named.of}({said})`",
        )
    return PickError(
        f"no cell of `{named.of}` matches",
        f"its axes are {name_list(axes)}" if axes else f"it has one cell: `replies of {named.of}`",
    )


def _cells(part: VariantFinding) -> list[CellKey]:
    """Return an experiment's cells, without the positions of its measures."""
    swept = [axis.name for axis in part.experiment.axes]
    cells = part.cells if part.means is not None else name_cells(part.experiment, texts=False)
    return [
        CellKey({k: v for k, v in cell.coords.items() if k in swept}, cell.site, cell.position)
        for cell in cells
    ]


def _room(named: RepliesOf, part: VariantFinding, table: PromptTable, model: ModelContext) -> int:
    """Return the number of tokens available for replies."""
    assert part.experiment.generation is not None
    tokens, most = part.experiment.generation.tokens, model.shape.max_positions
    if most is None or model.shape.stands_in or table.stands_in:
        return tokens
    longest = max(len(row.ids) for run in table.runs.values() for row in run.rows)
    if longest >= most:
        raise PickError(
            f"the longest prompt has {count_noun(longest, 'token')}, but `{model.name}` reads "
            f"at most {most:,}",
            "shorten the prompts",
        )
    return min(tokens, most - longest)


def _only(part: VariantFinding, cell: int) -> Mapping[int, Reply]:
    """Return the reply of each row."""
    return {row: replies[0] for row, replies in part.replies[cell].items()}


def _check_lengths(table: PromptTable, model: ModelContext, named: RepliesOf) -> None:
    """Check that there are rows and that none is too long."""
    if not len(table):
        raise PickError(
            f"`{named.of}` shares no rows with this experiment",
            "use the same part and limit of the prompts in both",
        )
    most = model.shape.max_positions
    longest = max(len(row.ids) for run in table.runs.values() for row in run.rows)
    if most is not None and longest > most:
        raise PickError(
            f"the longest prompt with its reply has {longest:,} tokens, but `{model.name}` "
            f"reads at most {most:,}",
            f"generate fewer tokens in `{named.of}`, or shorten the prompts",
        )


def _bad(named: RepliesOf, reason: str, hint: str) -> Diagnostic:
    return RepliesNotUsable(span=named.span, text=named.text, reason=reason, hint=hint)


def _reworded(named: RepliesOf, problem: Diagnostic) -> Diagnostic:
    """Reword an error about a named cell, because the context isn't an expectation."""
    if not isinstance(problem, UnreadableExpectation):
        return problem
    return RepliesNotUsable(
        span=problem.span or named.span, text=named.text, reason=problem.reason, hint=problem.hint
    )


class FileContexts:
    """Models and prompt tables of a file, each read once."""

    def __init__(
        self,
        program: spec.Program,
        diagnostics: list[Diagnostic],
        given: Mapping[str, ModelContext],
        limit: int | None,
        *,
        python: PythonMode = "refuse",
        build: ModelBuilder | None = None,
        require: bool = False,
        prompts_enough: int | None = None,
    ) -> None:
        """Store the settings; problems are added to `diagnostics`.

        Args:
            given: Models passed by the caller, by name.
            limit: Maximum number of rows per table.
            python: Treatment of functions of Python files.
            build: Builds models with these functions, if allowed.
            require: Whether a missing model is an error.
            prompts_enough: Number of prompts to check per table.
        """
        self.program = program
        self.diagnostics = diagnostics
        self.limit = limit
        self.python = python == "run"
        self.prompts_enough = prompts_enough
        self.models = ModelContexts(
            program, diagnostics, given, python=python, build=build, require=require
        )
        self._blocks = BlockCompiler(
            program.prompts,
            seed=program.seed,
            words=self.models.words,
            parameters=program.parameters,
            python=self.python,
        )
        self._used: dict[tuple[str, str], frozenset[str]] = {}
        """(Experiment without variant, prompt block) → the corruptions that it names."""
        self._tables: dict[tuple[object, ...], dict[frozenset[str], PromptTable]] = {}
        """Key of the rows → used corruptions → table."""
        self._runs: dict[tuple[object, ...], PairedRun | None] = {}
        self._joined: dict[tuple[object, ...], PromptTable] = {}
        self._replied: dict[tuple[object, ...], PromptTable] = {}
        self.towers = TowerModels(
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
        labels: LabelNaming | None = None,
        used: frozenset[str] | None = None,
        *,
        streamed: bool = False,
        trains: bool = False,
    ) -> PromptTable:
        """Return the rows of a prompt block for one model; a placeholder if they can't be created.

        Args:
            trains: Whether a training reads the rows; `--limit` doesn't apply to them, because it
                would ask for another training.
            streamed: Whether the first rows suffice of a block whose rows are read in parts. E0207
                for other uses of such a block.
            labels: Naming of answers, if a different model defines it.
            used: Used corruptions, each of which must change every row; None for all.
        """
        runs = frozenset(corruption.name for corruption in self.program.prompts[name].corruptions)
        used = runs if used is None else used & runs
        if self.limit is not None and not trains:
            limit = self.limit if limit is None else min(limit, self.limit)
        if streamed:
            limit = None
        elif self.program.prompts[name].streamed:
            block = self.program.prompts[name]
            self.diagnostics.append(report_streamed_use(block, block.span))
        labels = labels or self._labels(name, model.shape)
        key = (name, id(model.tokenizer), model.shape.max_positions, labels, limit, part)
        tables = self._tables.setdefault(key, {})
        # Experiments whose runs exclude the same rows share a table and its passes.
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
        labels: LabelNaming,
        used: frozenset[str],
    ) -> PromptTable:
        assert part is None or part == "train" or part == "test"
        table = None
        model = self.models.reading(name, model)
        problem = check_input_kind(self.program.prompts[name], model)
        if problem is not None:
            self.diagnostics.append(problem)
        elif not self.needs_python(name):
            if self.program.prompts[name].streamed:
                table, problems = self._first_part(name, model)
            else:
                table, problems = self._build(
                    name, model, limit=limit, part=part, labels=labels, used=used
                )
            if table is not None:
                problems = [*problems, *check_prompt_tokens(table, model)]
            self._say(problems, model, name)
        if table is None:
            table = stand_in_table(self._compiled(name).block, self.models.stand_in)
            if self.program.prompts[name].kind == "images":
                table = stand_in_images(table, self.models.stand_in_reader)
        elif self._guessed(name, model):
            table = replace(table, stands_in=True)
        return table

    def _first_part(
        self, name: str, model: ModelContext
    ) -> tuple[PromptTable | None, list[Diagnostic]]:
        """Return the first rows of a block whose rows are read in parts. E0509 if none are left."""
        count = self._compiled(name, model.tokenizer).block.data_size
        for begin in range(0, count, _FIRST_ROWS):
            part = self.part(name, model, range(begin, min(begin + _FIRST_ROWS, count)))
            if part.table is not None or part.diagnostics:
                return part.table, part.diagnostics
        block = self.program.prompts[name]
        reason = "`where` drops all of them, or they are longer than the model's context"
        hint = "change the `where` lines, or split long texts"
        return None, [NoRows(span=block.span, prompts=name, reason=reason, hint=hint)]

    def part(self, name: str, model: ModelContext, ids: Sequence[int]) -> StreamedPart:
        """Return these rows of a block whose rows are read in parts."""
        table, problems = self._build(name, model, ids=ids, any_length=True)
        most = model.shape.max_positions
        if table is None or most is None:
            return StreamedPart(table, problems)
        rows = zip(table.row_ids, table.runs[CLEAN].rows, strict=True)
        fitting = [number for number, row in rows if len(row.ids) <= most]
        too_long = len(table) - len(fitting)
        if not fitting:
            return StreamedPart(None, [], too_long)
        if too_long:
            table, problems = self._build(name, model, ids=fitting)
        return StreamedPart(table, problems, too_long)

    def of_experiment(
        self, experiment: spec.Experiment, model: ModelContext, labels: LabelNaming | None = None
    ) -> PromptTable:
        """Return the rows of an experiment for a model: those that every run named in any of its
        variants changes. `labels`: as for `table`."""
        name = experiment.prompts
        key = (experiment.within or experiment.name, name)
        if key not in self._used:
            self._used[key] = used_corruptions(experiment, self.program)
        trains = bool(experiment.trains)
        return self.table(
            name,
            model,
            experiment.limit,
            experiment.part,
            labels,
            self._used[key],
            streamed=self.program.prompts[name].streamed and not trains,
            trains=trains,
        )

    def read_by(
        self, rows: FitRows, experiment: spec.Experiment, model: ModelContext
    ) -> PromptTable:
        """Return the rows that a direction is fitted on: those of a block or part (all without
        `limit:`) or of the experiment, for the model that runs them."""
        if rows.model is not None:
            model = self.models.context(rows.model)
        if rows.block is None:
            return self.of_experiment(experiment, model)
        table = self.table(
            rows.block,
            model,
            rows.limit,
            rows.part,
            used=rows.used,
            streamed=rows.trains and self.program.prompts[rows.block].streamed,
            trains=rows.trains,
        )
        return table if rows.partner is None else self._with_partner(rows.partner, model, table)

    def _with_partner(
        self, run: spec.ExternalRunSpec, model: ModelContext, table: PromptTable
    ) -> PromptTable:
        """Return training rows with the run whose vectors theirs are correlated with, which is of
        another block, maybe in the opposite tower of the model, or of another model."""
        key = (id(table), model.key, "partner", run.name)
        if run.name not in table.runs and key not in self._joined:
            partner, problems = None, []
            if table.stands_in:
                pass
            elif run.prompts is not None:
                context = self.models.context(model.name)
                reader = self.towers.reading(run.prompts, context) if context.shape.texts else model
                partner, problems = self._of_block(run, run.prompts, model, table, reader)
            else:
                assert run.model is not None
                other = self.models.context(run.model)
                problem = check_model_pair(run, other, model, outputs=False)
                problems = [] if problem is None else [problem]
                if problem is None:
                    theirs = self.table(
                        table.name, other, None, None, used=frozenset(), trains=True
                    )
                    partner, problems = build_model_run(table, theirs, other, model, run)
            self._say(problems, model, *(name for name in (run.prompts,) if name))
            joined = None if partner is None else join_runs(table, [partner])
            self._joined[key] = joined or add_stand_in_runs(table, [run.name])
        return self._joined.get(key, table)

    def with_replies(
        self,
        experiment: spec.Experiment,
        model: ModelContext,
        table: PromptTable,
        finding: Finding | None,
    ) -> PromptTable:
        """Return the table with placeholders for the replies after its prompts, shared by variants
        of an experiment that share the table."""
        assert experiment.replies is not None
        key = (id(table), experiment.replies.span, model.name)
        if key not in self._replied:
            others = [self.models.context(run.model) for run in experiment.elsewhere if run.model]
            prompt_table, problems = attach_replies(
                table, experiment, self.program, finding, model, others
            )
            self._replied[key] = prompt_table
            self.diagnostics.extend(problems)
        return self._replied[key]

    def _say(self, found: Sequence[Diagnostic], model: ModelContext, *blocks: str) -> None:
        """Record the diagnostics that hold whatever the placeholders represent."""
        unknown: set[UnknownFact] = set()
        if model.shape.stands_in:
            unknown.add("shape")
        if model.tokenizer.stands_in:
            unknown.add("tokens")
        if any(self._guessed(name, model) for name in blocks):
            unknown.update(("rows", "tokens"))  # placeholder words
        self.diagnostics.extend(filter_certain(found, unknown))

    def _guessed(self, name: str, model: ModelContext) -> bool:
        """Whether a block has words of a missing tokenizer, or asks it for tokens."""
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
        return self._blocks.rows(self.program.prompts[name], tokenizer)

    def _build(
        self,
        name: str,
        model: ModelContext,
        *,
        limit: int | None = None,
        part: SplitPart | None = None,
        ids: Sequence[int] | None = None,
        labels: LabelNaming | None = None,
        used: frozenset[str] | None = None,
        any_length: bool = False,
    ) -> tuple[PromptTable | None, list[Diagnostic]]:
        try:
            return build_table(
                self.program.prompts[name],
                model.tokenizer,
                self._blocks,
                RowSelection(limit, part, ids, self._enough, used),
                max_length=None if any_length else model.shape.max_positions,
                labels=labels or self._labels(name, model.shape),
                writes=name in self._continued_blocks,
            )
        except UnsupportedProcessor as unfit:  # may depend on the sizes of the rows' images
            first = self.program.prompts[name].pictures[0]
            problem = report_unprepared(unfit, model.name, first.span, sounds=first.is_sound)
            return None, [problem]

    @cached_property
    def _continued_blocks(self) -> frozenset[str]:
        """The blocks after whose prompts a model generates text."""
        every = self.program.experiments
        return frozenset(each.prompts for each in every if each.generation is not None)

    @cached_property
    def _enough(self) -> int | None:
        """Number of prompts of a table to check; fewer with more expressions per prompt."""
        return (
            None
            if self.prompts_enough is None
            else rows_to_check(self.program, self.prompts_enough)
        )

    def _labels(self, name: str, shape: ModelShape) -> LabelNaming:
        """Return the naming of a block's answers for a model; never texts for images."""
        if self.program.prompts[name].kind == "images" and shape.task == "tokens":
            return "named"
        return _labels(shape)

    def needs_python(self, name: str) -> bool:
        """Whether the rows of a block require Python that isn't run here."""
        prompt = self.program.prompts[name]
        averaged = averaged_blocks(node for _, node in prompt.named_images)
        blocks = (name, *(ref.name for ref in averaged))
        known = [self.program.prompts[block] for block in blocks if block in self.program.prompts]
        return not self.python and any(map(prompt_functions, known))

    def table_alone(self, name: str) -> None:
        """Check a block that no experiment uses, with the file's only model."""
        if any(key[0] == name for key in self._tables) or len(self.program.models) != 1:
            return
        model = self.models.context(next(iter(self.program.models)))
        if check_input_kind(self.program.prompts[name], model) is None:
            streamed = self.program.prompts[name].streamed
            self.table(name, model, 1, None, streamed=streamed)

    def with_elsewhere(
        self, experiment: spec.Experiment, model: ModelContext, table: PromptTable
    ) -> PromptTable:
        """Return the table with the experiment's runs of other blocks and models, shared by
        experiments that share the table."""
        names = tuple(run.name for run in experiment.elsewhere)
        read = tuple(reads_outputs(experiment, name) for name in names)
        key = (id(table), model.name, *names, *read)
        if names and key not in self._joined:
            joined = None
            if not table.stands_in:
                runs = [self._elsewhere(r, experiment, model, table) for r in experiment.elsewhere]
                joined = join_runs(table, runs)
            self._joined[key] = joined or add_stand_in_runs(table, names)
        return self._joined[key] if names else table

    def _elsewhere(
        self,
        run: spec.ExternalRunSpec,
        experiment: spec.Experiment,
        model: ModelContext,
        table: PromptTable,
    ) -> PairedRun | None:
        read = reads_outputs(experiment, run.name)
        key = (id(table), model.name, run.name, experiment.broken, read)
        if key not in self._runs:
            if run.prompts is not None:
                partner, problems = self._of_block(run, run.prompts, model, table)
            else:
                partner, problems = self._of_model(run, experiment, model, table)
            if not experiment.broken:  # the error may be why they don't fit
                self._say(problems, model, *(name for name in (run.prompts,) if name))
            self._runs[key] = partner
        return self._runs[key]

    def _of_block(
        self,
        run: spec.ExternalRunSpec,
        prompts: str,
        model: ModelContext,
        table: PromptTable,
        reader: ModelContext | None = None,
    ) -> tuple[PairedRun | None, list[Diagnostic]]:
        """Return a run of another block.

        Args:
            reader: The model that reads it, if it isn't the one that reads the table: the opposite
                tower.
        """
        if self.needs_python(prompts):
            return None, []
        context, other = self.models.reading(prompts, model), self.program.prompts[prompts]
        reader = reader or context
        if other.streamed:
            return None, [report_streamed_use(other, run.span)]
        if (problem := check_input_kind(other, reader)) is not None:
            return None, [problem]
        if other.kind != self.program.prompts[table.name].kind and not reader.shape.side:
            return None, []  # the model of one of them is missing
        rows = self._compiled(prompts, reader.tokenizer)
        if has_errors(rows.block.diagnostics) or rows.block.columns_unknown:
            return None, rows.block.diagnostics
        return pair_run(
            table,
            self._compiled(table.name, context.tokenizer).block,
            rows,
            run.run,
            name=run.name,
            tokenizer=reader.tokenizer,
            build=lambda ids: self._build(prompts, reader, ids=ids),
            span=run.span,
            shuffled=run.shuffled,
        )

    def _of_model(
        self,
        run: spec.ExternalRunSpec,
        experiment: spec.Experiment,
        model: ModelContext,
        table: PromptTable,
    ) -> tuple[PairedRun | None, list[Diagnostic]]:
        assert run.model is not None
        other = self.models.context(run.model)
        problem = check_model_pair(run, other, model, outputs=reads_outputs(experiment, run.name))
        if problem is not None:
            return None, [problem]
        # Answers are named for this model, whose outputs are measured.
        labels = self._labels(experiment.prompts, model.shape)
        theirs = self.of_experiment(experiment, other, labels)
        if theirs.stands_in:
            return None, []
        return build_model_run(table, theirs, other, model, run)


def _labels(shape: ModelShape) -> LabelNaming:
    """Return the naming of answers for the model."""
    if shape.task == "tokens":
        return "none"
    if shape.side:
        return "named"
    return "named" if shape.names_labels else "numbered"
