"""`python -m tests.editors --write`: writes the TextMate grammar of `editors/vscode`."""

from __future__ import annotations

import sys

from .textmate import GRAMMAR, textmate_grammar

if "--write" in sys.argv[1:]:
    GRAMMAR.parent.mkdir(parents=True, exist_ok=True)
    GRAMMAR.write_text(textmate_grammar(), encoding="utf-8")
    print(f"wrote {GRAMMAR}")
else:
    print(textmate_grammar(), end="")
