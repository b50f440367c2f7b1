"""Output of `mechdsl explain`: prompts as tokens, and the tokens that rules hit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechdsl.base.text import count_noun, format_size, shown_token
from mechdsl.checks.file_check import CheckedFile
from mechdsl.images.processing import PatchLayout
from mechdsl.planner.plan import plan_save_layout
from mechdsl.program.spec import NO_PROMPTS
from mechdsl.prompts.other_runs import REPLY_PLACEHOLDER
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, RunRow, describe_output
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer
from mechdsl.resolve.expansion import get_whole_spec
from mechdsl.resolve.types import (
    DRAW_AXIS,
    DirectionMember,
    OutputWeights,
    ResolvedExperiment,
    ResolvedRule,
    ResolvedSave,
)

HIT_MARK, OTHER_MARK = "■", "·"

MAX_DRAWN_POSITIONS = 4
"""Maximum number of drawn positions; further ones are only listed."""


def grid_lines(layout: PatchLayout, tokens: Iterable[int]) -> list[str]:
    """Return one line per row of patches; patches that are hit are filled."""
    hit = set(tokens)
    return [
        "".join(
            HIT_MARK if layout.token(row, col) in hit else OTHER_MARK
            for col in range(1, layout.cols + 1)
        )
        for row in range(1, layout.rows + 1)
    ]


def range_text(tokens: Iterable[int]) -> str:
    """Format token numbers as ranges: `0, 4..7`."""
    runs: list[list[int]] = []
    for token in sorted(tokens):
        if runs and token == runs[-1][-1] + 1:
            runs[-1].append(token)
        else:
            runs.append([token])
    return ", ".join(
        str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}" for numbers in runs
    )


MAX_SHOWN_ROWS = 2

MAX_SHOWN_CELLS = 24


def span_tokens(row: RunRow, start: int, end: int) -> tuple[int, ...]:
    """Return the positions of tokens that overlap characters `start` to `end`."""
    return tuple(
        position
        for position, (low, high) in enumerate(row.offsets)
        if low < end and high > start and not row.special[position]
    )


def print_prompts(checked: CheckedFile, console: Console) -> None:
    """Print every experiment's prompts, token by token, and the tokens that its rules hit."""
    _made_models(checked, console)
    seen: set[tuple[int, ...]] = set()
    saving = {each.spec.span: each for each in checked.saving}
    for experiment, places in _whole_experiments(checked):
        table = experiment.table
        without = experiment.spec.prompts == NO_PROMPTS
        rows = NO_PROMPTS if without else f"{count_noun(len(table), 'row')} of {table.name}"
        console.print(
            Text.assemble(
                ("experiment ", "bold"),
                (get_whole_spec(experiment).key, "bold cyan"),
                f" · model {experiment.model.name} · {rows}",
            )
        )
        prompts = tuple(id(run.rows) for run in table.runs.values() if run.derived is None)
        if prompts in seen:
            console.print("  the same prompts as above", style="dim")
        elif not without:
            seen.add(prompts)
            _prompts(experiment, console)
        _derived(experiment, console)
        if experiment.measures:
            _rules(experiment, console)
        if len(places) > 1:
            _print_labels("read at", places, console)
        _control(experiment, console)
        if experiment.spec.span in saving:  # once per experiment with several results
            _saves(saving.pop(experiment.spec.span), console)
        for picked, said in experiment.picks.items():
            console.print(Text(f"  {picked}: {said}", style="dim"))
        console.print()


def _made_models(checked: CheckedFile, console: Console) -> None:
    """Print the definitions of models that are made from others: edited models and sums."""
    for model in checked.program.models.values():
        if model.is_loaded:
            continue
        edits = checked.edits.get(model.name)
        made = model.source if edits is None else f"{model.base} with edited weights"
        console.print(Text.assemble(("model ", "bold"), (model.name, "bold cyan"), f" · {made}"))
        for rule in () if edits is None else edits.rules:
            _changed_sites(rule, console)
        console.print()


def _all_experiments(checked: CheckedFile) -> list[ResolvedExperiment]:
    """Return all experiments in source order, including those that only save."""
    only = [experiment for experiment in checked.saving if not experiment.measures]
    return sorted([*checked.experiments, *only], key=lambda experiment: experiment.spec.span.start)


def _whole_experiments(checked: CheckedFile) -> list[tuple[ResolvedExperiment, list[str]]]:
    """Return each experiment once, with the positions of its measures if there are several."""
    experiments: dict[str, tuple[ResolvedExperiment, list[str]]] = {}
    for experiment in _all_experiments(checked):
        places = experiments.setdefault(get_whole_spec(experiment).key, (experiment, []))[1]
        if experiment.place is not None:
            places.append(", ".join(str(label) for _, label in experiment.place.labels))
    return list(experiments.values())


def _tokens(experiment: ResolvedExperiment, row: RunRow) -> list[str]:
    shown = [experiment.model.tokenizer.token_text(i) for i in row.ids]
    if row.reply is not None and row.reply.stands_in:
        shown[row.reply.first :] = [REPLY_PLACEHOLDER] * (len(shown) - row.reply.first)
    return shown


def _prompts(experiment: ResolvedExperiment, console: Console) -> None:
    table = experiment.table
    for name, run in table.runs.items():
        if run.derived is not None:
            console.print(Text(f"  {name}: the texts of {run.derived.base}", style="bold"))
            continue
        for number, row in enumerate(run.rows[:MAX_SHOWN_ROWS]):
            console.print(Text(f"  {name}, row {number}: ", style="bold") + Text(repr(row.text)))
            if row.image is None:
                _print_grid(_numbered(experiment, row), console)
            if row.source:
                names = ("image", "text") if row.decodes_text else ("encoder", "decoder")
                own, later = range(row.source), range(row.source, len(row.ids))
                sides = dict(zip(names, (own, later), strict=True))
                said = ", ".join(f"{side} {range_text(each)}" for side, each in sides.items())
                console.print(Text(f"    tokens of the {said}", style="dim"))
            for label, positions in _named_spans(row):
                where = (
                    _token_ranges(positions)
                    if any(positions)
                    else "white space without a separate token"
                )
                if row.image is not None:
                    where = " | ".join(map(range_text, positions)) or "not in this row"
                console.print(Text("    ") + Text(label, style="green") + Text(f" → {where}"))
            for label, text in row.texts.items():
                if not text.ids:
                    scored = experiment.model.shape.side
                    words = (
                        "the text or image it is scored with" if scored else describe_output(text)
                    )
                    said = Text(f" = {text.text!r}, {words}")
                    console.print(Text("    ") + Text(label, style="magenta") + said)
                    continue
                pieces = " + ".join(
                    repr(experiment.model.tokenizer.token_text(i)) for i in text.ids
                )
                console.print(
                    Text("    ")
                    + Text(label, style="magenta")
                    + Text(f" = {text.text!r}, {_count_text(len(text.ids))}: {pieces}")
                )
    for key, said in table.conventions.items():
        console.print(Text(f"  {key}: {said}", style="dim"))


def _count_text(tokens: int) -> str:
    return count_noun(tokens, "token")


def _numbered(experiment: ResolvedExperiment, row: RunRow) -> list[tuple[str, str]]:
    """Return position and text of each token; those of an image are one entry."""
    images: dict[int, tuple[str, int]] = {}
    for picture in row.placed_pictures:
        rows, cols = picture.picture.expansion.size
        images[picture.first] = (
            f"{picture.title} ({rows} x {cols})",
            len(picture.picture.expansion.ids),
        )
    tokens, pairs = _tokens(experiment, row), list[tuple[str, str]]()
    position = 0
    while position < len(tokens):
        text, count = images.get(position, (shown_token(tokens[position]), 1))
        label = str(position) if count == 1 else f"{position}..{position + count - 1}"
        pairs.append((label, text))
        position += count
    return pairs


def _print_grid(tokens: list[tuple[str, str]], console: Console) -> None:
    """Print tokens below their positions, wrapped to the width of the console."""
    room = max(20, console.width - 6)
    line: list[tuple[str, str]] = []

    def flush() -> None:
        console.print(Text("    " + "  ".join(n for n, _ in line), style="dim"), soft_wrap=True)
        console.print(Text("    " + "  ".join(t for _, t in line)), soft_wrap=True)
        line.clear()

    used = 0
    for position, token in tokens:
        width = max(cell_len(token), len(position))
        if line and used + width + 2 > room:
            flush()
            used = 0
        line.append((position.ljust(width), token + " " * (width - cell_len(token))))
        used += width + 2
    if line:
        flush()


def _named_spans(row: RunRow) -> list[tuple[str, list[tuple[int, ...]]]]:
    """Return each span's name with the tokens of all its occurrences."""
    hits: dict[str, list[tuple[int, ...]]] = {}
    for span in row.spans:
        hits.setdefault(span.name, []).append(span_tokens(row, span.start, span.end))
    for picture in row.placed_pictures:
        names = (picture.name, picture.video, *picture.picture.regions)
        hits |= {name: row.image_places(name) for name in names if name is not None}
    return [*hits.items(), *((name, list(tokens)) for name, tokens in row.places.items())]


def _token_ranges(groups: Iterable[tuple[int, ...]]) -> str:
    """Format groups of tokens as ranges: `4..6, 9`."""
    texts = ["-" if not g else str(g[0]) if len(g) == 1 else f"{g[0]}..{g[-1]}" for g in groups]
    return ", ".join(texts)


def _derived(experiment: ResolvedExperiment, console: Console) -> None:
    """Print the derived runs of an experiment and the tokens that their rules hit."""
    for name, run in experiment.derived.items():
        for rule in run.rules:
            _rule(run, rule, console, f"run {name}, on {run.spec.base}: ")


def _saved_rows(experiment: ResolvedExperiment, save: ResolvedSave, console: Console) -> None:
    """Print whose rows a line saves, and the positions at which features are read."""
    assert save.basis is not None
    (member,) = save.basis.members
    count = len(save.basis.coordinates[()].which) or member.size
    _positions(experiment, save.run, list(save.cells), console)
    rows = f"the {save.spec.rows} rows" if save.spec.rows != 1 else "the row"
    said = f"{rows} in which each of {count_noun(count, 'feature')} of {member.name} is most active"
    console.print(Text(f"    {said}, of `{save.run}`, to {PurePath(save.spec.file)}"))


def _saves(experiment: ResolvedExperiment, console: Console) -> None:
    """Print the saved activations and directions, and their files."""
    for file in experiment.direction_files:
        console.print(Text("  " + file.spec.span.written, style="bold"))
        _members(list(file.members.values()), console)
        _print_labels("tensors", list(file.members), console)
    for save in experiment.saves:
        console.print(Text("  " + save.spec.span.written, style="bold"))
        if save.basis is not None:
            _saved_rows(experiment, save, console)
            continue
        layout, run = plan_save_layout(experiment, save), experiment.table.runs[save.run]
        _print_labels("tensors", list(layout.widths), console)
        _positions(experiment, save.run, list(save.cells), console)
        dtype = save.spec.stored_dtype(experiment.model.spec.dtype)
        sites, vectors = (
            count_noun(len(layout.widths), "site"),
            count_noun(layout.vectors, "vector"),
        )
        draws = f", {run.draws} draws of each" if run.draws > 1 else ""
        if layout.at_most and experiment.generation and experiment.generation.samples > 1:
            draws += f", {experiment.generation.samples} samples of each"
        rows = f"{count_noun(layout.rows, 'row')}{draws}"
        size, file = format_size(layout.bytes(dtype)), PurePath(save.spec.file)
        vectors = f"up to {vectors}" if layout.at_most else vectors
        if layout.means is not None:
            vectors = count_noun(layout.means, "mean")
        said = f"{vectors} of {sites} of `{save.run}` ({rows}, {size} as {dtype}) to {file}"
        rows_file = "" if save.spec.mean else f", rows to {file.with_suffix('.jsonl').name}"
        console.print(Text(f"    {said}{rows_file}"))


def _rules(experiment: ResolvedExperiment, console: Console) -> None:
    if experiment.generation is not None:
        console.print(Text(f"  generates {experiment.generation.how} after each prompt"))
    for name, made in experiment.trained_parts.items():
        console.print(Text(f"  {name}: {made}"))
    for rule in experiment.rules:
        if not rule.spec.fill_index:  # otherwise it is printed with its first fill
            _rule(experiment, rule, console)
    if experiment.spec.estimator is not None:
        said, base = experiment.spec.estimator.text, experiment.spec.base
        console.print(Text(f"  no cell is run: `{said}` computes gradients from `{base}`"))
    cells = " × ".join(f"{axis.name} {len(axis)}" for axis in experiment.axes)
    console.print(
        f"  cells: {experiment.n_there}" + (f" ({cells})" if cells else ""), highlight=False
    )


def _rule(
    experiment: ResolvedExperiment, rule: ResolvedRule, console: Console, within: str = ""
) -> None:
    """Print one rule with everything that it hits."""
    _changed_sites(rule, console, within)
    if rule.path is not None:
        _print_labels("receivers", list(rule.path.receivers.labels.values()), console)
    for title, run, cells in _hit_lists(experiment, rule):
        if title:
            console.print(f"    {title}", highlight=False)
        _positions(experiment, run, cells, console)
    if experiment.generation is not None and rule.does.changes not in ("input", "nothing"):
        console.print(Text(f"    acts {_step_text(rule, experiment.generation.tokens - 1)}"))


def _changed_sites(rule: ResolvedRule, console: Console, within: str = "") -> None:
    """Print one rule with its sites and directions."""
    console.print(Text(f"  {within}{rule.spec.span.written}", style="bold"))
    if rule.sites is not None:
        _print_labels("sites", list(dict.fromkeys(rule.sites.labels.values())), console)
    _directions(rule, console)


def _step_text(rule: ResolvedRule, last: int) -> str:
    """Describe the steps of a reply in which a rule acts; `last` is the last step."""
    if rule.after_prefill:
        return "after the prefill, on the prompt's cache"
    if rule.steps is not None and rule.steps.axes:
        assert rule.spec.during is not None
        return " ".join(rule.spec.during.span.written.split())
    first, end = (0, last) if rule.steps is None else rule.steps.values[()]
    step_texts = ["in the prefill"] if first == 0 else []
    if rule.acts_later and end:  # a single token has no later step
        positions = rule.positions
        labels = sorted({f"`{positions.written[key].label}`" for key in positions.newest})
        steps = f"step {end}" if end == max(first, 1) else f"steps {max(first, 1)} to {end}"
        step_texts.append(f"in {steps} at the newest token, which extends {' and '.join(labels)}")
    return ", then ".join(step_texts)


def _print_labels(title: str, labels: list[str], console: Console) -> None:
    shown = ", ".join(labels[:MAX_SHOWN_CELLS])
    more = f" … ({len(labels)} in all)" if len(labels) > MAX_SHOWN_CELLS else ""
    console.print(f"    {title}: {shown}{more}", highlight=False)


def _members(members: Sequence[DirectionMember], console: Console) -> None:
    for member in members[:MAX_SHOWN_CELLS]:
        console.print(Text(f"    direction {member.name}: {member.made}"))
    if len(members) > MAX_SHOWN_CELLS:
        console.print(f"    … ({len(members)} directions in all)", highlight=False)


def _directions(rule: ResolvedRule, console: Console) -> None:
    """Print the definition of a rule's directions and their rows."""
    _members([] if rule.direction is None else list(rule.direction.members.values()), console)
    bases = (
        []
        if rule.basis is None
        else [basis_member for basis_member in rule.basis.members if basis_member.made]
    )
    for member in bases[:MAX_SHOWN_CELLS]:
        kind = "" if isinstance(member.operand, OutputWeights) else "basis "
        console.print(Text(f"    {kind}{member.name}: {member.made}"))
    if len(bases) > MAX_SHOWN_CELLS:
        console.print(f"    … ({len(bases)} bases in all)", highlight=False)


def _hit_lists(
    experiment: ResolvedExperiment, rule: ResolvedRule
) -> Iterator[tuple[str, str, list[PositionCell]]]:
    """Yield (title, run, positions): written positions, and read positions if they differ."""
    base = experiment.spec.base
    written = list(rule.positions.written.values())
    if rule.edge is not None:
        yield "queries", base, written
        yield "keys", base, list(rule.edge.keys.written.values())
        return
    read = list(rule.positions.read.values())
    if rule.does.copies and [c.hits for c in read] != [c.hits for c in written]:
        yield f"read in `{rule.run}`", rule.run, read
        yield f"written in `{base}`", base, written
        return
    yield "", base, written


def _positions(
    experiment: ResolvedExperiment, run: str, cells: list[PositionCell], console: Console
) -> None:
    """Print the tokens that positions hit in the first rows of a run."""
    table = Table(box=None, padding=(0, 2), show_edge=False)
    for column in ("position", "n", "tokens hit (row 0, row 1, …)"):
        table.add_column(column, justify="right" if column == "n" else "left")
    for cell in cells[:MAX_SHOWN_CELLS]:
        hits = [
            _hit_text(experiment, run, cell, row) for row in range(min(4, len(experiment.table)))
        ]
        if cell.reply is not None:
            hits = ["found during generation"]
        n = sum(1 for row in cell.hits if row)
        table.add_row(*map(Text, (cell.label, str(n), "   ".join(hits))))
    console.print(table)
    if len(cells) > MAX_SHOWN_CELLS:
        console.print(f"    … ({len(cells)} positions in all)", highlight=False)
    reader = experiment.model.tokenizer
    if not isinstance(reader, ImageTokenizer) or len(cells) > MAX_DRAWN_POSITIONS:
        return
    for cell in cells:
        first = next((row for row in cell.hits if row), ())
        for line in grid_lines(reader.layout, (token for run in first for token in run)):
            console.print(f"    {line}", highlight=False)


def _control(experiment: ResolvedExperiment, console: Console) -> None:
    """Print the targets drawn for the first cell."""
    control, asked = experiment.control, experiment.spec.against
    if control is None:
        if experiment.without_control:
            console.print(Text(f"  no control: {experiment.without_control}", style="bold"))
        return
    drawn = control.experiment.drawn
    assert drawn is not None
    apart = ", ".join(site.span.written for site in asked.apart) if asked is not None else ""
    more = f" apart from {apart}" if apart else ""
    said = (
        f"against {asked.span.written}{more}" if asked is not None else f"{control.title} control"
    )
    console.print(Text(f"  {said}", style="bold"))
    console.print(Text(f"    {control.said}"))
    for rule in control.experiment.rules:
        if rule.sites is None or DRAW_AXIS not in rule.sites.axes or rule.spec.fill_index:
            continue
        rest = (0,) * (len(rule.sites.axes) - 1)
        first = next(iter(drawn.counts.values()))
        labels = [rule.sites.labels[draw, *rest] for draw in range(first)]
        more = f" … ({first} in all)" if first > MAX_SHOWN_CELLS else ""
        cell = " of the first cell" if rest else ""
        listed = ", ".join(labels[:MAX_SHOWN_CELLS]) or "none"
        console.print(Text(f"    draws{cell}: {listed}{more}"))


def _hit_text(experiment: ResolvedExperiment, run: str, cell: PositionCell, row: int) -> str:
    """Format hits: `4 fig`, `4 fig + 6 plum` (joined), `4 | 5` (separate runs), `9 answer 1` (after
    the prompt), `—` for a row without the position."""
    run_row = experiment.table.runs[run].rows[row]
    if run_row.image is not None:
        return " | ".join(map(range_text, cell.hits[row])) or "—"
    tokens = _tokens(experiment, run_row)
    shown = [f"{t} {shown_token(token)}" for t, token in enumerate(tokens)]

    def at(t: int) -> str:
        return shown[t] if t < len(shown) else f"{t} answer {t - len(shown) + 1}"

    joined = [" + ".join(map(at, hit)) for hit in cell.hits[row]]
    return " | ".join(joined) or "—"


def prompts_document(checked: CheckedFile) -> dict[str, Any]:
    """Return every row of every run (text, tokens, offsets, spans, answers) and all rule hits."""
    return {
        "schema": 1,
        "file": checked.source.name,
        "experiments": [
            {
                "name": e.name,
                **({"variant": dict(e.spec.variant)} if e.spec.variant else {}),
                "model": e.model.name,
                "prompts": e.table.name,
                "conventions": {**e.table.conventions, **e.picks, **e.trained_parts},
                "axes": [{"name": a.name, "values": list(a.labels)} for a in e.axes],
                "runs": {
                    name: [_row(e, e.table, row, n) for n, row in enumerate(run.rows)]
                    for name, run in e.table.runs.items()
                },
                "rules": [_as_rule(r) for r in e.rules],
                **_as_derived(e),
                **_as_saves(e, checked),
            }
            for e in _all_experiments(checked)
        ],
    }


def _as_rule(rule: ResolvedRule) -> dict[str, Any]:
    path, edge = rule.path, rule.edge
    return {
        "rule": rule.spec.span.written,
        "sites": [] if rule.sites is None else list(rule.sites.labels.values()),
        "directions": _as_directions(rule),
        **_as_bases(rule),
        "receivers": [] if path is None else list(path.receivers.labels.values()),
        "positions": _as_hits(rule.positions.written.values()),
        "reads": _as_hits(rule.positions.read.values()),
        "keys": [] if edge is None else _as_hits(edge.keys.written.values()),
    }


def _as_derived(experiment: ResolvedExperiment) -> dict[str, Any]:
    """Return the derived runs, if there are any."""
    documents = [
        {"name": name, "base": run.spec.base, "rules": [_as_rule(r) for r in run.rules]}
        for name, run in experiment.derived.items()
    ]
    return {"derived": documents} if documents else {}


def _as_saves(experiment: ResolvedExperiment, checked: CheckedFile) -> dict[str, Any]:
    """Return the `save` lines, if there are any."""
    experiments = [each for each in checked.saving if each.spec.span == experiment.spec.span]
    documents: list[dict[str, Any]] = [
        {
            "save": save.spec.span.written,
            "run": save.run,
            "file": save.spec.file,
            "positions": _as_hits(save.cells),
            "rows": save.spec.rows,
            "basis": save.basis.members[0].name,
            "features": list(save.basis.coordinates[()].which) or "all",
        }
        for each in experiments
        for save in each.saves
        if save.basis is not None
    ]
    documents += [
        {
            "save": save.spec.span.written,
            "run": save.run,
            "file": save.spec.file,
            "tensors": list(plan_save_layout(each, save).widths),
            "positions": _as_hits(save.cells),
            "vectors": plan_save_layout(each, save).vectors,
            "rows": plan_save_layout(each, save).rows,
            "dtype": save.spec.stored_dtype(each.model.spec.dtype),
        }
        for each in experiments
        for save in each.saves
        if save.basis is None
    ]
    documents += [
        {
            "save": file.spec.span.written,
            "file": file.spec.file,
            "tensors": list(file.members),
            "directions": [{"name": m.name, "made": m.made} for m in file.members.values()],
            "dtype": file.spec.stored_dtype,
        }
        for each in experiments
        for file in each.direction_files
    ]
    return {"saves": documents} if documents else {}


def _as_directions(rule: ResolvedRule) -> list[dict[str, str]]:
    members = () if rule.direction is None else rule.direction.members.values()
    return [{"name": member.name, "made": member.made} for member in members]


def _as_bases(rule: ResolvedRule) -> dict[str, Any]:
    """Return the bases and coordinates of a rule, if it has any."""
    if rule.basis is None:
        return {}
    members = rule.basis.members
    return {
        "bases": [{"name": m.name, "made": m.made, "coordinates": m.size} for m in members],
        "coordinates": [
            list(coordinate.which) or "all" for coordinate in rule.basis.coordinates.values()
        ],
    }


def _as_hits(cells: Iterable[PositionCell]) -> list[dict[str, Any]]:
    return [
        {"label": cell.label, "tokens": [[list(run) for run in row] for row in cell.hits]}
        for cell in cells
    ]


def _row(
    experiment: ResolvedExperiment, table: PromptTable, row: RunRow, number: int
) -> dict[str, Any]:
    return {
        "row": table.row_ids[number],
        "text": row.text,
        "ids": list(row.ids),
        "tokens": _tokens(experiment, row),
        "offsets": [list(o) for o in row.offsets],
        "special": list(row.special),
        **({"encoder_tokens": row.source} if row.source else {}),
        "spans": [
            {
                "name": span.name,
                "start": span.start,
                "end": span.end,
                "within": list(span.within),
                "tokens": list(span_tokens(row, span.start, span.end)),
            }
            for span in row.spans
        ],
        "texts": {name: {"text": t.text, "ids": list(t.ids)} for name, t in row.texts.items()},
    }
