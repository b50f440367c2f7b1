"""`python -m tests.language [--write]`: prints the page, or writes `docs/language.md`."""

from __future__ import annotations

import sys

from .page import PAGE, page

if "--write" in sys.argv[1:]:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
else:
    print(page(), end="")
