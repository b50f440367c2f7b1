"""MkDocs hooks: pages generated at build time, and Markdown as GitHub reads it.

The site has pages for files outside `docs/` that the documentation links to: each example, the
changelog, the benchmarks. Links between Markdown files stay relative to the repository, so that
they work on GitHub and on the site.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
PROJECT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "docs/errors": "errors/index.md",
    "examples": "examples/index.md",
}
"""Repository path → page."""
ERROR_GROUPS = {
    "E01": "Syntax",
    "E02": "Names, imports and options",
    "E03": "Sites, positions and rules",
    "E04": "Models",
    "E05": "Prompts, answers and files",
    "E06": "Experiments and statistics",
    "W07": "Warnings",
}
LANGUAGES = {
    ".mech": "mech",
    ".py": "python",
    ".json": "json",
    ".jsonl": "json",
    ".toml": "toml",
    ".yml": "yaml",
}
_LINK = re.compile(r"\]\((?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^ *(`{3,}|~{3,})")
_FILE_FENCE = re.compile(r"^( *`{3,})(\w+) (?:(add) )?(\S+)$")
_BARE_FENCE = re.compile(r"^ *`{3,}$")
_MECH = re.compile(r"(?:mech \d|(?:experiment|prompts|images|direction|group|model|metric) \S)")
_CODE = re.compile(r"`[^`]+`")
_ITEM = re.compile(r"^(?:[-*+]|\d+\.) ")


def outside_fences(text: str) -> Iterator[tuple[bool, str]]:
    """Yield each line, and whether it is outside fenced code."""
    fence = ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if mark is None or (fence and not line.strip().startswith(fence)):
            yield not fence, line
            continue
        fence = "" if fence else mark[1]
        yield False, line


def linked_paths(text: str, path: str) -> set[str]:
    """Return the repository paths that the Markdown file at `path` links to."""
    folder = posixpath.dirname(path)
    prose = "\n".join(line for is_prose, line in outside_fences(text) if is_prose)
    return {posixpath.normpath(posixpath.join(folder, link[1])) for link in _LINK.finditer(prose)}


def page_of(path: str) -> str:
    """Return the page of a repository path outside `docs/`."""
    if path in PROJECT_PAGES:
        return PROJECT_PAGES[path]
    prefix = "" if path.startswith("examples/") else "source/"
    return f"{prefix}{path}" if path.endswith(".md") else f"{prefix}{path}.md"


def is_generated(path: str) -> bool:
    """Return whether the site needs a generated page for a repository path."""
    return path in PROJECT_PAGES or not (path == "docs" or path.startswith("docs/"))


def code_block(path: Path) -> str:
    """Return a file as a fenced block."""
    text = path.read_text(encoding="utf-8").rstrip("\n")
    longest = max((len(mark) for mark in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"


def source_page(path: str) -> str:
    """Return the Markdown of the page that shows a file or a folder of the repository."""
    target = ROOT / path
    if target.suffix == ".md":
        return target.read_text(encoding="utf-8")
    if target.is_file():
        return f"# {target.name}\n\n`{path}`\n\n{code_block(target)}"
    files = [
        file
        for file in sorted(target.rglob("*"))
        if file.suffix in LANGUAGES and file.stat().st_size and "__pycache__" not in file.parts
    ]
    parts = [f"## `{file.relative_to(target)}`\n\n{code_block(file)}" for file in files]
    return "\n".join([f"# {target.name}\n\n`{path}`\n", *parts])


def heading(path: Path) -> str:
    """Return the first heading of a Markdown file."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").strip()


def error_index() -> str:
    """Return the page that lists every error and warning."""
    lines = [
        "# Errors and warnings",
        "",
        "Every message has a code. `mechdsl explain E0301` prints the page of a code, with a file",
        "that fails, its message and a corrected file.",
    ]
    pages = sorted((ROOT / "docs" / "errors").glob("[EW]*.md"))
    for prefix, name in ERROR_GROUPS.items():
        lines += ["", f"## {name}", "", "| code | problem |", "| --- | --- |"]
        for page in pages:
            if page.stem.startswith(prefix):
                title = heading(page).removeprefix(f"{page.stem}:").strip()
                lines.append(f"| [{page.stem}]({page.name}) | {title} |")
    return "\n".join(lines) + "\n"


def first_comment(path: Path) -> str:
    """Return the first sentence of the comments in a `.mech` file, or nothing."""
    comments: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            comments.append(line.removeprefix("#").strip())
        elif comments:
            break
    text = " ".join(comments).partition("  ")[0]
    return re.split(r"(?<=[.?!])(?<! al\.)\s", text, maxsplit=1)[0].replace("|", "\\|")


def example_index() -> str:
    """Return the page that lists the examples of the package."""
    lines = [
        "# Examples",
        "",
        "The package contains these files. `mechdsl examples` copies them into a folder with their",
        "data. [Published experiments](../systems.md) lists the files of `systems`, each with its",
        "claim and result.",
        "",
        "| file | about |",
        "| --- | --- |",
    ]
    for path in sorted((ROOT / "examples").glob("*.mech")):
        lines.append(f"| [{path.name}]({path.name}.md) | {first_comment(path)} |")
    return "\n".join(lines) + "\n"


def generated_pages() -> dict[str, tuple[str, str]]:
    """Return page → (repository path, Markdown) of every page outside `docs/`."""
    pages = {
        "errors/index.md": ("docs/errors/index.md", error_index()),
        "examples/index.md": ("docs/examples/index.md", example_index()),
    }
    waiting: set[str] = set(PROJECT_PAGES) - {"README.md", "docs/errors", "examples"}
    waiting |= {str(p.relative_to(ROOT)) for p in sorted((ROOT / "examples").rglob("*.mech"))}
    for path in sorted((ROOT / "docs").rglob("*.md")):
        waiting |= linked_paths(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    seen: set[str] = set()
    while waiting:
        path = min(waiting)
        waiting.remove(path)
        seen.add(path)
        page = page_of(path)
        target = ROOT / path
        if not is_generated(path) or page in pages or page == "index.md" or not target.exists():
            continue
        text = source_page(path)
        pages[page] = (path, text)
        if target.suffix == ".md":
            waiting |= linked_paths(text, path) - seen
    return pages


def rewrite_links(line: str, path: str, page: str) -> str:
    """Return a line of the file at `path` with links that hold on the site at `page`."""

    def rewritten(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        if not (ROOT / target).exists():
            return link[0]  # MkDocs reports it, or it is a generated page
        there = page_of(target) if is_generated(target) else target.removeprefix("docs/")
        relative = os.path.relpath(there, posixpath.dirname(page) or ".")
        return f"]({relative}{link[2] or ''})"

    return _LINK.sub(rewritten, line)


def convert(text: str, path: str, page: str) -> str:
    """Return Markdown that Python-Markdown reads as GitHub reads `text`.

    The name of a file after a fence's language becomes the title of the block, a list may follow
    its paragraph without a blank line, and code in a table may have an escaped `|`. An unlabelled
    block that begins with a statement of the language is highlighted as such.
    """
    lines: list[str] = []
    in_list = False
    for is_prose, line in outside_fences(text):
        above = lines[-1] if lines else ""
        if _ITEM.match(line) and is_prose:
            if above.strip() and not in_list:
                lines.append("")
            in_list = True
        elif line and not line.startswith(" ") and (not is_prose or not above.strip()):
            in_list = False
        if is_prose:
            line = rewrite_links(line, path, page)
            if line.startswith("|"):
                line = _CODE.sub(lambda code: code[0].replace(r"\|", "|"), line)
        elif found := _FILE_FENCE.match(line):
            title = f"{found[4]}, appended" if found[3] else found[4]
            line = f'{found[1]}{found[2]} title="{title}"'
        elif _MECH.match(line) and _BARE_FENCE.match(above):
            lines[-1] = f"{above}mech"
        lines.append(line)
    return "\n".join(lines) + "\n"


_generated: dict[str, tuple[str, str]] = {}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    _generated.clear()
    _generated.update(generated_pages())
    for page, (_, text) in _generated.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Convert the Markdown of a page."""
    uri = page.file.src_uri
    path = _generated[uri][0] if uri in _generated else f"docs/{uri}"
    text = convert(markdown, path, uri)
    if uri.startswith(("examples/", "source/")):
        page.meta["search"] = {"boost": 0.1}  # guides come first in search results
    for folder, name in (("errors", "Errors and warnings"), ("examples", "Examples")):
        index = f"{folder}/index.md"
        if uri.startswith(f"{folder}/") and uri != index:
            up = os.path.relpath(index, posixpath.dirname(uri))
            text = f"{text}\nBack to [{name}]({up}).\n"
    return text
