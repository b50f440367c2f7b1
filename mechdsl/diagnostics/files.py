"""E0531 to E0536, W0780 and warnings about the store: files that a program reads or writes."""

from __future__ import annotations

from mechdsl.diagnostics.core import Diagnostic, HintedDiagnostic


class PathDiagnostic(Diagnostic):
    """A diagnostic about a path that a part of a file names."""

    construct: str
    path: str


class PlaceDiagnostic(PathDiagnostic):
    """A diagnostic about a path, with a label that depends on the case."""

    label = "{where}"

    where: str


class WriteOutsideFolder(PlaceDiagnostic):
    """A report whose file doesn't lie where a `.mech` file may write."""

    code = "E0531"
    title = "`{construct}` may not write to `{path}`"
    help = (
        "choose a path in or below this file's folder or the working directory; "
        "`--allow-outside` (`allow_outside=True` from Python) allows any path"
    )


class SpecialFile(HintedDiagnostic, PathDiagnostic):
    """A device, a pipe or a socket in place of a file."""

    code = "E0532"
    title = "`{construct}` names `{path}`, which is {what}"
    label = "not a file"
    what: str


class ReportNotWritable(PathDiagnostic):
    """A report that couldn't be written at the end of the run."""

    code = "E0533"
    title = "`{construct}` can't write `{path}`: {reason}"
    label = "checked before anything runs"
    help = "choose a path in a writable folder; missing folders are created"
    reason: str


class NotMechFile(Diagnostic):
    """A file of another kind, which is neither parsed nor quoted."""

    code = "E0534"
    title = "`{path}` is not a `.mech` file, so it was not read"
    label = "its name doesn't end in `.mech`, and its first line isn't `mech 1`"
    help = "name a file that ends in `.mech` or begins with the line `mech 1`"
    path: str


class ReadOutsideFolder(PlaceDiagnostic):
    """With `--untrusted`, a path that leads out of the folder."""

    code = "E0535"
    title = "`{construct}` names `{path}`, which `--untrusted` doesn't let it read"
    help = (
        "move the file into the folder of the `.mech` file, or omit `--untrusted` if you trust "
        "the `.mech` file"
    )


class ReportNotWritten(HintedDiagnostic, PathDiagnostic):
    """A report that couldn't be written after all. It alone is missing."""

    code = "E0536"
    title = "`{construct}` could not be written to `{path}`: {reason}"
    label = "only this report is missing"
    reason: str


class FormulaCells(Diagnostic):
    """Cells of a CSV that a spreadsheet would evaluate."""

    code = "W0745"
    title = "{file} has {count} that a spreadsheet reads as a formula, such as {example}"
    label = "written as CSV"
    help = "use `--safe-csv` (`safe_csv=True` from Python), which writes `'` before such cells"
    file: str
    count: str
    example: str


class NamedPath(PlaceDiagnostic):
    """With `--untrusted`, each place of a file that names a path."""

    code = "W0780"
    title = "`{construct}` {does} `{path}`"
    help = "every path that the file names is listed; paths outside its folder are rejected"
    does: str


class StoreNotUsed(Diagnostic):
    """A store that can't be opened, or not be written to: the run goes on without it."""

    code = "W0782"
    title = "the store `{folder}` {reason}"
    help = (
        "this run needs no change; use `--store DIR` to choose another folder, or "
        "`--no-store` to run without a store"
    )

    folder: str
    reason: str
