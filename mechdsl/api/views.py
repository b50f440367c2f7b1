"""What a file is, without running it: `check`, `plan_of`, `graph_of`, `explain`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mechdsl.api.shared import (
    Models,
    Values,
    borrowed_models,
    check_with,
    checked_alone,
    checked_file,
    mode_of,
    read_file,
    refuse,
    settings_of,
    source_of,
)
from mechdsl.base.files import write_whole
from mechdsl.base.random_numbers import keeps_random_numbers
from mechdsl.base.visible import json_text
from mechdsl.diagnostics.raised import Diagnostics, MechdslError, warn
from mechdsl.pipeline.arguments import (
    names,
    size_problems,
    word_problem,
)

if TYPE_CHECKING:
    from mechdsl.show.terminal import Printed


@keeps_random_numbers
def check(
    file: str | Path,
    models: Models | None = None,
    *,
    set: Values | None = None,
    allow_outside: bool = False,
    untrusted: bool = False,
    require_models: bool = False,
) -> Diagnostics:
    """All errors and warnings of a file, as `mechdsl validate` finds them: without weights, and
    without torch but for models that are handed over.

    file: its path, or its text (what has a line break or begins with `mech `).
    models, set, allow_outside, untrusted: as for `run`.
    require_models: whether a model that isn't on this machine, or has no weights, is an error; all
        that doesn't depend on it is checked either way.
    Returns a list of diagnostics, empty where nothing is wrong; raises nothing about the file.
    """
    from mechdsl.models.locate import without_weights

    source, found = source_of(file)
    if source is None:
        return Diagnostics(found)
    try:
        settings = settings_of(
            set,
            python="look",
            require_models=require_models,
            allow_outside=allow_outside,
            untrusted=untrusted,
        )
        checked, _ = check_with(source, models, settings)
    except MechdslError as error:
        return error.diagnostics
    given = () if models is None else models
    own = [each for name, each in checked.program.models.items() if name not in given]
    return Diagnostics(checked.diagnostics + (without_weights(own) if require_models else []))


@keeps_random_numbers
def plan_of(
    file: str | Path,
    models: Models | None = None,
    *,
    set: Values | None = None,
    limit: int | None = None,
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
    no_pass: Sequence[str] = (),
    pass_tokens: int | None = None,
    prompt_tokens: int | None = None,
    measure: bool = False,
) -> Printed:
    """What `mechdsl plan` prints: the intervention graph, the cells, rows and forward passes of a
    file, what effects its rows can show, what each planner pass saves, and how long the rest takes.
    Nothing is run.

    measure: load the models, run base and source runs (no rule), and say in the metric's units what
        can be shown.
    The other arguments are those of `run`. Raises MechdslError where something is wrong.
    """
    from mechdsl.plan.make_plan import make_plan
    from mechdsl.plan.passes import unknown_passes
    from mechdsl.plan.plan import PASS_TOKENS, PROMPT_TOKENS
    from mechdsl.show.plan import print_plan
    from mechdsl.show.terminal import printed

    refuse(size_problems(limit, pass_tokens, prompt_tokens))
    without = names(no_pass)
    how = settings_of(
        set,
        limit,
        python=mode_of(allow_python),
        allow_outside=allow_outside,
        untrusted=untrusted,
    )
    sizes = pass_tokens or PASS_TOKENS, prompt_tokens or PROMPT_TOKENS
    if not measure:
        checked, measured = checked_alone(file, models, how), None
        refuse(unknown_passes(sorted(without)))
    else:
        with borrowed_models(models):
            from mechdsl.execute.options import Options
            from mechdsl.pipeline.compute import measure_unpatched
            from mechdsl.pipeline.run_options import RunOptions

            checked, loaded = checked_file(read_file(file), models, how)
            refuse(unknown_passes(sorted(without)))
            execution = Options(pass_tokens=pass_tokens, prompt_tokens=prompt_tokens)
            measured, found = measure_unpatched(checked, RunOptions(execution=execution), loaded)
        refuse([each for each in found if each.severity == "error"])
        warn(found)
    made = make_plan(checked.experiments, without=without)
    return printed(
        lambda console: print_plan(made, console, *sizes, measured, saving=checked.saving)
    )


@keeps_random_numbers
def graph_of(
    file: str | Path,
    models: Models | None = None,
    *,
    set: Values | None = None,
    format: Literal["dot", "mermaid", "svg", "text"] = "mermaid",
    to: str | Path | None = None,
    before: bool = False,
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
) -> Printed:
    """What `mechdsl graph` prints: the intervention graph of a file, drawn.

    format: as DOT, Mermaid, SVG or text. to: also write it to this file. before: without the
        planner's passes. The other arguments are those of `run`.
    Raises MechdslError where something is wrong, OSError where `to` can't be written.
    """
    from mechdsl.show.graph import DRAWINGS, draw
    from mechdsl.show.terminal import Drawing, Printed

    refuse(word_problem("format", format, DRAWINGS))
    checked = checked_alone(
        file,
        models,
        settings_of(
            set, python=mode_of(allow_python), allow_outside=allow_outside, untrusted=untrusted
        ),
    )
    text = draw(checked.experiments, checked.saving, format, before=before)
    if to is not None:
        write_whole(Path(to), text)
    return Drawing(text) if format == "svg" else Printed(text)


@keeps_random_numbers
def explain(
    what: str | Path,
    models: Models | None = None,
    *,
    set: Values | None = None,
    limit: int | None = None,
    format: Literal["text", "json"] = "text",
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
) -> Printed:
    """What `mechdsl explain` prints: the prompts of a file, token by token, with the positions that
    rules hit; or the page of a code (`explain("E0301")`) or of the language
    (`explain("language")`).

    format: `json` is every row of every run. The other arguments are those of `run`.
    Raises MechdslError where something is wrong.
    """
    from mechdsl.diagnostics.pages import names_page, page_of
    from mechdsl.show.terminal import Printed, printed

    refuse(word_problem("format", format, ("text", "json")), size_problems(limit))
    if names_page(str(what)):
        text, problems = page_of(str(what))
        refuse(problems)
        return Printed(text)
    checked = checked_alone(
        what,
        models,
        settings_of(
            set,
            limit,
            python=mode_of(allow_python),
            allow_outside=allow_outside,
            untrusted=untrusted,
        ),
    )
    from mechdsl.show import prompts

    if format == "json":
        return Printed(json_text(prompts.as_json(checked), indent=1) + "\n")
    return printed(lambda console: prompts.explain(checked, console))
