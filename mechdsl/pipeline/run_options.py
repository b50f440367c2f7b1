"""How a file is run, as the command line and Python say it; without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.execute.options import Options
from mechdsl.validate.check_file import Settings

if TYPE_CHECKING:
    from mechdsl.execute.profile import Profile
    from mechdsl.plan.plan import Plan
    from mechdsl.results.against import Ends


@dataclass(frozen=True)
class RunOptions:
    """How a file is run; nothing here changes what it means."""

    settings: Settings = field(default_factory=Settings)
    device: str = "auto"
    dtype: str | None = None
    offload: Path | None = None
    """Folder for weights that fit into no device and not into memory, with accelerate."""
    out: Path | None = None
    without: frozenset[str] = frozenset()
    """Graph and plan passes that are switched off."""
    execution: Options = field(default_factory=Options)
    ends: Ends | None = None
    """With `fail_fast`; experiments run one by one then."""
    on_profile: Callable[[Plan, Profile], None] | None = None
    """Takes what was planned and what was done, after the run."""
    store: Path | None = None
    """Folder of the store, None for a run without one."""
    hashes: bool = True
    """Whether the results need the hashes of weights. With a store they are computed regardless, as
    its keys need them."""
    fresh: bool = False
    """Compute all anew, and replace what the store has."""
