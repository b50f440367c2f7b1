"""`python -m tests.python_api [--write]`: prints docs/python.md, or writes it."""

from __future__ import annotations

import sys

from .page import PAGE, page

if "--write" in sys.argv[1:]:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
else:
    print(page(), end="")
