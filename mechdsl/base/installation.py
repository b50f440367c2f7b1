"""The libraries that running experiments needs; an installation that only checks files has none."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec

DISTRIBUTION = "mechdsl-core"
"""The distribution with this package. Its extra `run` has the libraries of the distribution
`mechdsl`."""
_MODULES = {"vl-convert-python": "vl_convert"}
"""Modules of distributions that have another name."""


def missing_requirements() -> dict[str, str]:
    """Return the absent modules of the extra `run` → the requirements that pip installs."""
    from importlib.metadata import PackageNotFoundError, requires  # slow to import

    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # a checkout that isn't installed
        return {}
    missing: dict[str, str] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        if re.search(r"extra == .run.$", marker.strip()):
            name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
            module = _MODULES.get(name, name)
            if find_spec(module) is None:
                missing[module] = requirement.strip()
    return missing


def install_command() -> str:
    """Return the command that installs what running experiments needs and this Python lacks."""
    requirements = " ".join(f'"{each}"' for each in missing_requirements().values())
    return f"{sys.executable} -m pip install {requirements}"
