"""What stores have: `runs` and `diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.base.random_numbers import keeps_random_numbers

if TYPE_CHECKING:
    from mechdsl.results.found_differences import Differences
    from mechdsl.results.kept_runs import Run, Runs
    from mechdsl.results.results import Results


def runs(store: str | Path | None = None) -> Runs:
    """The runs that a store keeps, the newest first, as `mechdsl runs` lists them.

    store: its folder; None: what `MECHDSL_STORE` names, or `.mechdsl` in the working folder, and an
        empty list where that isn't there.
    Returns a list; each run has `id`, `state`, `file`, `began`, `about`, its `results`, which are
    read when they are asked for, `export(folder)` and `remove()`.
    Raises MechdslError (E0208) where a folder that is named is no store, or can't be read.
    """
    from mechdsl.results.kept_runs import Runs, runs_in
    from mechdsl.results.named_runs import folder_of, has_store

    folder = folder_of(None, None if store is None else Path(store))
    return Runs() if store is None and not has_store(folder) else runs_in(folder)


@keeps_random_numbers
def diff(
    old: Results | Run | str | Path,
    new: Results | Run | str | Path,
    *,
    store: str | Path | None = None,
) -> Differences:
    """What changed from one run to another, as `mechdsl diff` prints it: inputs, verdicts, effects
    beyond noise, what is new and gone.

    old, new: `Results`, a run of `mechdsl.runs()`, or what a run is called by: its id or the
        beginning of one, `last`, a `.mech` file (its latest finished run), a folder of `out`.
    store: the folder that runs are in; None: beside the `.mech` file, or of the working folder.
    Returns `Differences`: `changed` is whether the command's exit status is 1.
    Raises MechdslError (E0208) where a run can't be found or read.
    """
    from mechdsl.results.diff_sides import differences_of

    return differences_of(old, new, None if store is None else Path(store))
