"""`python -m mechdsl.syntax.build_tables` saves the tables of the grammar."""

from __future__ import annotations

import pickle

from mechdsl.syntax.grammar import TABLES, build, grammar_file


def main() -> None:
    """Rebuild the tables that the package ships."""
    tables = build(grammar_file().read_text("utf-8"))
    TABLES.write_bytes(pickle.dumps(tables, protocol=4))
    print(f"{TABLES.name}: {TABLES.stat().st_size} bytes")


if __name__ == "__main__":
    main()
