"""A wheel gets the tables of the parser, so that no start has to make them."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ParserTables(BuildHookInterface[Any]):
    """An editable install makes them at its first use."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        sys.path.insert(0, self.root)
        from mechdsl.syntax import parser_tables

        grammar = parser_tables.grammar_file().read_text("utf-8")
        self.folder = TemporaryDirectory()
        made = Path(self.folder.name) / parser_tables.TABLES.name
        text = parser_tables.as_json(
            parser_tables.build(grammar), parser_tables.fingerprint(grammar)
        )
        made.write_text(text, encoding="utf-8")
        build_data["force_include"][str(made)] = "mechdsl/syntax/tables.json"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self.folder.cleanup()
