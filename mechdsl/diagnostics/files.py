"""E0531 to E0536, W0780 and warnings about the store: files that a program reads or writes."""

from __future__ import annotations

from mechdsl.base.records import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class WriteOutsideFolder(Diagnostic):
    """A report whose file doesn't lie where a `.mech` file may write."""

    code = "E0531"
    title = "`{construct}` may not write to `{path}`"
    label = "{where}"
    help = (
        "name a file in the folder of this file, in the working directory, or below; "
        "`--allow-outside` (`allow_outside=True` from Python) allows any"
    )
    construct: str
    path: str
    where: str


@keyword_record
class SpecialFile(Diagnostic):
    """A device, a pipe or a socket in place of a file."""

    code = "E0532"
    title = "`{construct}` names `{path}`, which is {what}"
    label = "not a file"
    help = "{hint}"
    construct: str
    path: str
    what: str
    hint: str


@keyword_record
class ReportNotWritable(Diagnostic):
    """A report that couldn't be written at the end of the run."""

    code = "E0533"
    title = "`{construct}` can't write `{path}`: {reason}"
    label = "looked at before anything runs"
    help = "name a file in a folder that may be written to; folders that are missing are made"
    construct: str
    path: str
    reason: str


@keyword_record
class NotMechFile(Diagnostic):
    """A file of another kind, which is neither parsed nor quoted."""

    code = "E0534"
    title = "`{path}` is not a `.mech` file, so it isn't read as one"
    label = "its name doesn't end in `.mech`, and its first line isn't `mech 1`"
    help = "name a file that ends in `.mech`, or that begins with the line `mech 1`"
    path: str


@keyword_record
class ReadOutsideFolder(Diagnostic):
    """With `--untrusted`, a path that leads out of the folder."""

    code = "E0535"
    title = "`{construct}` names `{path}`, which `--untrusted` doesn't let it read"
    label = "{where}"
    help = (
        "put what it needs into the folder of the `.mech` file; or, where you know the file, "
        "leave `--untrusted` out"
    )
    construct: str
    path: str
    where: str


@keyword_record
class ReportNotWritten(Diagnostic):
    """A report that couldn't be written after all. It alone is missing."""

    code = "E0536"
    title = "`{construct}` wasn't written to `{path}`: {reason}"
    label = "this report alone is missing"
    help = "{hint}"
    construct: str
    path: str
    reason: str
    hint: str


@keyword_record
class NamedPath(Diagnostic):
    """With `--untrusted`, each place of a file that names a path."""

    code = "W0780"
    title = "`{construct}` {does} `{path}`"
    label = "{where}"
    help = "every path that the file names is listed; what leads out of the folder is refused"
    construct: str
    does: str
    path: str
    where: str


@keyword_record
class StoreNotUsed(Diagnostic):
    """A store that can't be opened, or not be written to: the run goes on without it."""

    code = "W0782"
    title = "the store `{folder}` {reason}"
    help = "nothing to change for this run; `--store DIR` names another folder, `--no-store` none"

    folder: str
    reason: str
