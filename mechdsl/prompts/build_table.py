"""From a prompts block to a table of tokenised rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e04_model import NoTokenFor
from mechdsl.diagnostics.e05_chat import BadChatTemplate, NoChatTemplate
from mechdsl.diagnostics.w07_data import NotAllRows, UnknownWords
from mechdsl.program import spec
from mechdsl.prompts.answers import (
    Labels,
    move,
    moved_characters,
    output_text,
    shared_beginning,
    tokenise,
)
from mechdsl.prompts.averaged_images import take_mean
from mechdsl.prompts.changed_patches import change_patches
from mechdsl.prompts.class_texts import class_texts
from mechdsl.prompts.dealt_evenly import dealt_evenly, exhausted
from mechdsl.prompts.domains import Constants, Words
from mechdsl.prompts.image_reader import of_image
from mechdsl.prompts.prompt_checks import empty_prompts, too_long, unknown_words
from mechdsl.prompts.prompt_conventions import (
    Split,
    image_conventions,
    noise_conventions,
    rows_convention,
    token_conventions,
)
from mechdsl.prompts.prompt_table import PromptTable, Run, RunRow, TextTokens
from mechdsl.prompts.prompts_block import Blocks, PromptsBlock
from mechdsl.prompts.replaced_text import extended, marks_turns, replace_in_rows
from mechdsl.prompts.row_scope import Key, Refusal
from mechdsl.prompts.row_selection import (
    Collection,
    Content,
    Made,
    collect,
    collect_rows,
    equal_records,
    rows_before_limit,
    templates_unchanged,
    without_effect,
)
from mechdsl.prompts.rows import CLEAN, BlockRows
from mechdsl.prompts.tokenizer import Encoded, TextTokenizer
from mechdsl.prompts.values import TokenId
from mechdsl.syntax import ast
from mechdsl.vocab.corruptions import ActivationChange, TokenChange, of_kind, of_patches

_FEWEST_ROWS = 5
"""That a check looks at, however many runs they have."""


def build_table(
    prompts: spec.Prompts,
    *,
    tokenizer: TextTokenizer,
    seed: int = 0,
    limit: int | None = None,
    part: Split | None = None,
    words: Words | None = None,
    max_length: int | None = None,
    parameters: Constants | None = None,
    blocks: Blocks | None = None,
    compiled: dict[str, BlockRows] | None = None,
    ids: Sequence[int] | None = None,
    python: bool = False,
    prompts_enough: int | None = None,
    labels: Labels = "none",
    writes: bool = False,
    used: Container[str] | None = None,
) -> tuple[PromptTable | None, list[Diagnostic]]:
    """The rows of a block with all its runs, tokenised.

    words: the plain words of a model's tokenizer, by its name, for `words(MODEL)`.
    max_length: tokens that the model reads. parameters: the file's, as set.
    blocks: all prompts of the file, for `from: pairs`.
    ids: numbers of the only rows that are wanted; those that are left out are missing.
    python: whether functions of Python files may be run.
    prompts_enough: how many prompts, of all runs, are enough to look at (W0790).
    labels: whether answers and the like are of a classifier's outputs, and no tokens.
    writes: whether models write behind its prompts, which hold no word of an answer then.
    used: the corruptions that are used: rows that one of them leaves unchanged are left out; None
        where all are.
    compiled: blocks that were compiled before, as `compiled_as` calls them, with the rows they
        have worked out; a new one is added. All that the rows hang on (seed, words, parameters,
        blocks) must be the same.
    Codes: E0202, E0305 to E0315 (positions of a corruption), E0501 to E0526, E0550 to E0553, W0701
    to W0703, W0781, W0790, W0791.
    """
    tokenizer = tokenizer.reading(written=bool(prompts.chat))
    key = compiled_as(prompts, tokenizer)
    rows = (compiled or {}).get(key) or BlockRows(
        PromptsBlock(
            prompts,
            seed=seed,
            words=words,
            parameters=parameters or {},
            blocks=blocks or {},
            python=python,
            chat=tokenizer.chat,
        )
    )
    if compiled is not None:
        compiled[key] = rows
    block = rows.block
    diagnostics = [*block.diagnostics, *_no_chat(prompts, tokenizer)]
    diagnostics += take_mean(block, tokenizer, prompts_enough)
    if has_errors(diagnostics) or block.columns_unknown:
        return None, diagnostics
    most = None
    if prompts_enough is not None:
        most = max(_FEWEST_ROWS, prompts_enough // (1 + len(block.spec.corruptions)))
    if ids is None:
        found = collect(rows, tokenizer, limit=limit, part=part, most=most, used=used)
    else:
        found = collect_rows(rows, tokenizer, ids)
    if found.cut:
        found.diagnostics.append(
            NotAllRows(
                span=block.spec.span,
                prompts=block.name,
                rows=len(found.rows),
                unit=block.spec.unit,
            )
        )
    if found.repeated:
        found.diagnostics.append(equal_records(block, found))
    for corruption in block.spec.corruptions:
        if used is None or corruption.name in used:
            same = found.unchanged.get(corruption.name, Counter[int]())
            found.diagnostics += templates_unchanged(block, corruption, same, found.compared)
    diagnostics = list(dict.fromkeys([*block.diagnostics, *found.diagnostics]))
    if has_errors(diagnostics) or not found.rows:
        return None, diagnostics
    builder = _Builder(
        rows, tokenizer, max_length, labels=labels, whole=most is None, writes=writes, used=used
    )
    table = builder.table(found, limit, part)
    return (None if has_errors(builder.diagnostics) else table), [
        *diagnostics,
        *dict.fromkeys(builder.diagnostics),
    ]


def compiled_as(prompts: spec.Prompts, tokenizer: TextTokenizer | None) -> str:
    """What the rows of a block are called that a tokenizer's template writes; those of all other
    blocks are the same for every tokenizer."""
    chat = tokenizer.chat if tokenizer is not None and prompts.chat else None
    return prompts.name if chat is None else f"{prompts.name} {chat.digest}"


def _no_chat(prompts: spec.Prompts, tokenizer: TextTokenizer) -> list[Diagnostic]:
    """E0550, E0551: nothing writes the turns of a chat."""
    if not prompts.chat or tokenizer.stands_in:
        return []
    span = prompts.chat[0].span
    if tokenizer.chat is None:
        return [NoChatTemplate(span=span)]
    problem = tokenizer.chat.problem
    if problem is None:
        return []
    return [BadChatTemplate(span=span, reason=problem.reason, hint=problem.hint)]


@dataclass
class _Builder:
    """Tokenises the rows of one block."""

    rows: BlockRows
    tokenizer: TextTokenizer
    max_length: int | None
    texts: bool = True
    """Whether there are answers and the like."""
    labels: Labels = "none"
    """Whether they are of a classifier's outputs, which aren't tokenised."""
    writes: bool = False
    used: Container[str] | None = None
    """The corruptions whose unchanged rows are left out; None: all."""
    whole: bool = True
    """Whether deviations are of all rows before `limit`, as in a run, or of those of the table."""

    def __post_init__(self) -> None:
        self.block = self.rows.block
        self.diagnostics: list[Diagnostic] = []

    def table(self, found: Collection, limit: int | None, part: Split | None) -> PromptTable:
        table, equal = self.runs(found.rows)
        equal = {name: rows.total() for name, rows in found.unchanged.items()} | equal
        left_out = {name: count for name, count in equal.items() if self._uses(name)}
        conventions = rows_convention(self.block, found, len(table), limit, part, left_out)
        conventions |= token_conventions(self.block, table, self.tokenizer)
        if not has_errors(self.diagnostics):
            if self.max_length is not None:
                self.diagnostics += too_long(self.block, table, self.max_length)
            table = self._with_noise(table, found)
        conventions |= noise_conventions(table) | image_conventions(table)
        classes, problems = class_texts(self.block, self.rows[found.rows[0].id])
        self.diagnostics += problems
        python = self.block.calls.functions
        rounds = found.tried >= self.block.combinations and part is None
        return replace(
            table,
            conventions=conventions,
            python=python,
            cut=found.cut,
            dealt=dealt_evenly(self.block, table.sources) if rounds else (),
            exhausted=exhausted(self.block, table.sources),
            whole=rounds and not self.block.draws,
            unchanged=frozenset(equal),
            changed_by=tuple(sorted(left_out)),
            classes=classes,
        )

    def _uses(self, corruption: str) -> bool:
        return self.used is None or corruption in self.used

    # --- tokenisation -----------------------------------------------------------------------------

    def runs(self, made: Sequence[Made]) -> tuple[PromptTable, dict[str, int]]:
        """The table without noise, and per corruption the rows whose text it left as it was."""
        prompts = self.tokenizer.encode_unique(m.clean.prompt.text for m in made)
        texts = {CLEAN: self._texts(CLEAN, [m.clean for m in made], made, prompts)}
        for place, corruption in enumerate(self.block.spec.corruptions):
            rows = [m.corrupted[place] for m in made]
            texts[corruption.name] = self._texts(corruption.name, rows, made, prompts)
        every = [
            tokens
            for run in texts.values()
            for row in run
            for name, tokens in row.items()
            if not self.block.is_token_id(name)
        ]
        words = not self.writes
        moved = shared_beginning(every, self.tokenizer, words=words) if every else ()
        runs = {CLEAN: self._run(CLEAN, [m.clean for m in made], texts[CLEAN], moved, prompts)}
        for place, corruption in enumerate(self.block.spec.corruptions):
            rows = [m.corrupted[place] for m in made]
            changed = self.tokenizer.encode_unique(row.prompt.text for row in rows)
            run = self._run(corruption.name, rows, texts[corruption.name], moved, changed)
            runs[corruption.name] = run
        table = PromptTable(
            name=self.block.name,
            row_ids=tuple(m.id for m in made),
            row_keys=tuple(m.key for m in made),
            runs=runs,
            data_hash=self.block.data.digest if self.block.data else "",
            moved=moved,
            moved_text=self._moved_text(made, moved),
            block_rows=self.rows,
        )
        table = replace(
            table,
            runs={
                name: replace(
                    run, rows=tuple(extended(r, table.moved, table.moved_text) for r in run.rows)
                )
                for name, run in runs.items()
            },
        )
        return self._replaced(table, made)

    def _texts(
        self,
        run: str,
        rows: Sequence[Content],
        made: Sequence[Made],
        encoded: Mapping[str, Encoded],
    ) -> list[dict[str, TextTokens]]:
        """The named texts of a run's rows, behind the clean prompts."""
        prompts = [m.clean.prompt.text for m in made]
        out: list[dict[str, TextTokens]] = [{} for _ in rows]
        for definition in self.block.spec.texts if self.texts else ():
            name = definition.name
            place = list(self.block.texts).index(name)
            texts: list[str | TokenId] = [row.texts[place] for row in rows]
            if self.labels != "none":
                for row, text in zip(out, texts, strict=True):
                    row[name] = output_text(text, self.labels)
                continue
            tokens, diagnostics = tokenise(
                prompts,
                texts,
                self.tokenizer,
                name=name,
                span=definition.value.span,
                encoded=encoded,
            )
            # What is wrong with the clean text need not be said again of the corrupted one.
            reported = {(d.code, d.span) for d in self.diagnostics}
            self.diagnostics += [d for d in diagnostics if (d.code, d.span) not in reported]
            for row, found in zip(out, tokens, strict=True):
                row[name] = found
        return out

    def _moved_text(self, made: Sequence[Made], moved: tuple[int, ...]) -> str:
        """The characters of the moved token, white space before it included."""
        if not moved:
            return ""
        ids = map(self.block.is_token_id, self.block.texts)
        prompt = made[0].clean.prompt.text
        text = next(str(text) for text, id in zip(made[0].clean.texts, ids, strict=True) if not id)
        return moved_characters(prompt, text, moved, self.tokenizer)

    def _run(
        self,
        name: str,
        rows: Sequence[Content],
        texts: Sequence[Mapping[str, TextTokens]],
        moved: tuple[int, ...],
        prompts: Mapping[str, Encoded],
    ) -> Run:
        riches = [row.prompt for row in rows]
        encoded = [prompts[rich.text] for rich in riches]
        self.diagnostics += empty_prompts(self.block, name, riches)
        if not any(isinstance(d, UnknownWords | NoTokenFor) for d in self.diagnostics):
            # Else they were told of another run.
            self.diagnostics += unknown_words(self.block, self.tokenizer, name, riches, encoded)
        out: list[RunRow] = []
        for row, rich, tokens, own in zip(rows, riches, encoded, texts, strict=True):
            kept = own
            if moved:
                kept = {
                    key: text if self.block.is_token_id(key) else move(text, moved) or text
                    for key, text in own.items()
                }
            out.append(
                RunRow(
                    text=rich.text,
                    ids=tokens.ids,
                    offsets=tokens.offsets,
                    special=tokens.special,
                    spans=rich.spans,
                    values=row.values,
                    texts=kept,
                    **of_image(row.image, row.regions, self.tokenizer),
                )
            )
        return Run(name, tuple(out), chat=bool(self.block.spec.chat))

    # --- what corruptions do to tokens ---------------------------------------------------------

    def _replaced(
        self, table: PromptTable, made: Sequence[Made]
    ) -> tuple[PromptTable, dict[str, int]]:
        """`replace item tokens with "thing"` in corruptions; rows it doesn't change are dropped if
        it is used."""
        equal: dict[str, int] = {}
        keep = [True] * len(table)
        runs = dict(table.runs)
        for corruption in self.block.spec.corruptions:
            changes = of_kind(TokenChange, corruption.changes)
            for kind, change in changes:
                texts = self._new_texts(corruption, change, kind.text(change), made)
                current = replace(table, runs=runs)
                assert change.tokens is not None
                run, diagnostics = replace_in_rows(
                    current, corruption.name, change.tokens, texts, self.tokenizer
                )
                self.diagnostics += diagnostics
                runs[corruption.name] = run
            patches = of_patches(corruption.changes)
            for number, (_, change) in enumerate(patches, len(corruption.changes)):
                current = replace(table, runs=runs)
                own = [self.rows.corrupted(self.rows[m.id], corruption) for m in made]
                runs[corruption.name], diagnostics = change_patches(
                    current, corruption.name, change, number, own, self.tokenizer
                )
                self.diagnostics += diagnostics
            if (changes or patches) and not of_kind(ActivationChange, corruption.changes):
                pairs = zip(runs[corruption.name].rows, runs[CLEAN].rows, strict=True)
                same = [corrupted.text == clean.text for corrupted, clean in pairs]
                if all(same) and not has_errors(self.diagnostics):
                    images = self.block.spec.kind == "images"
                    self.diagnostics.append(without_effect(corruption, of_images=images))
                elif any(same):
                    equal[corruption.name] = sum(same)
                    if not self._uses(corruption.name):
                        continue
                    keep = [k and not s for k, s in zip(keep, same, strict=True)]
                    templates = [m.template for m in made]
                    unchanged = Counter(compress(templates, same))
                    self.diagnostics += templates_unchanged(
                        self.block, corruption, unchanged, Counter(templates)
                    )
        runs = {
            name: replace(run, rows=tuple(compress(run.rows, keep))) for name, run in runs.items()
        }
        table = replace(
            table,
            row_ids=tuple(compress(table.row_ids, keep)),
            row_keys=tuple(compress(table.row_keys, keep)),
            runs=runs,
        )
        return table, equal

    def _new_texts(
        self, corruption: spec.Corruption, change: ast.Change, text: ast.Expr, made: Sequence[Made]
    ) -> list[str]:
        """The text that a row's tokens are replaced by, for each row."""
        texts: list[str] = []
        for m in made:
            row = self.rows.corrupted(self.rows[m.id], corruption)
            try:
                new = row.as_text(text, Key(f"{corruption.name}:{change.word}"))
            except Refusal as refusal:
                self.diagnostics.append(refusal.diagnostic(row.describe()))
                return [""] * len(made)
            texts.append(new if isinstance(new, str) else self.tokenizer.token_text(new.id))
        if self.block.spec.chat:
            found = (marks_turns(new, text.span, self.tokenizer) for new in dict.fromkeys(texts))
            self.diagnostics += [each for each in found if each is not None][:1]
        return texts

    def _with_noise(self, table: PromptTable, found: Collection) -> PromptTable:
        corruptions = self.block.spec.corruptions
        if not any(of_kind(ActivationChange, c.changes) for c in corruptions):
            return table
        from mechdsl.prompts.noise import add_noise

        table, diagnostics = add_noise(
            table, self.block, self.tokenizer, lambda run: self._before_limit(found, table, run)
        )
        self.diagnostics += diagnostics
        return table

    def _before_limit(self, found: Collection, table: PromptTable, run: str) -> PromptTable:
        """The rows of a run that there are without `limit` and `split`, without their texts."""
        if not self.whole or (found.complete and self.block.spec.split is None):
            return table
        corruption = next(c for c in self.block.spec.corruptions if c.name == run)
        rows = self.rows.only(corruption)
        block = rows.block
        more = collect(rows, self.tokenizer, limit=rows_before_limit(block))
        if not more.rows:
            return table
        return _Builder(rows, self.tokenizer, None, texts=False).runs(more.rows)[0]
