"""Tokens as they are shown."""

from __future__ import annotations

from mechdsl.base.visible import visible


def shown_token(token: str) -> str:
    """A token without the white space around it, or that white space by name: `␣`, `\\n`."""
    return visible(token.strip() or repr(token)[1:-1].replace(" ", "␣") or "∅")
