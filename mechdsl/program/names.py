"""The namespace of a file: each name is defined once and used at least once."""

from __future__ import annotations

from dataclasses import dataclass, field

from mechdsl.base.text import Span, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.syntax import DuplicateName, UnknownName, UnusedName
from mechdsl.syntax import ast
from mechdsl.syntax.tree_builder import RegisteredWords

DEFINITION_EXAMPLES = {
    "model": 'model {} = zoo("counting")',
    "prompts": "prompts {} {{ … }}",
    "param": "param {} = 12",
    "basis": "basis {} = pca(fruit, dims: 8) at resid_post layer 2 at last token",
    "lens": "lens {} = fit(tuned_lens, prompts: texts.train) at resid_post layer * at tokens *",
    "probe": "probe {} = fit(ridge, prompts: fruit.train, target: count) at resid_post layer * "
    "at last token",
    "group": "group {} = L0N3, L0N97",
    "circuit": "circuit {} = embed -> L0H1.q, L0H1 -> logits",
    "direction": "direction {} = mean_difference(A, B) at resid_post layer 2 at last token",
}


@dataclass
class DefinedName:
    kind: str
    span: Span
    imported: bool
    used: bool = False
    meant: str = ""
    """The kind that the definition should have, if it is an error that its kind is another one."""


@dataclass
class Namespace:
    """All top-level names of a file and its imports; they share one namespace."""

    words: RegisteredWords
    """Words that registered entries add to the language."""
    diagnostics: list[Diagnostic] = field(default_factory=list)
    definitions: dict[str, DefinedName] = field(default_factory=dict)
    derived: frozenset[str] = frozenset()
    """Names of runs with rules, each of which only its experiment can use."""
    joined: frozenset[str] = frozenset()
    """Names of groups whose sites are nodes of a discovered circuit, in another group."""

    def define(self, kind: str, name: ast.Name, *, imported: bool) -> bool:
        """Define a name; report E0202 and return False if it is taken."""
        first = self.definitions.get(name.id)
        if first is not None:
            self.diagnostics.append(
                DuplicateName(
                    span=name.span, name=name.id, first=line_reference(first.span, name.span)
                )
            )
            return False
        self.definitions[name.id] = DefinedName(kind, name.span, imported)
        return True

    def use(self, kind: str, name: str, span: Span) -> bool:
        """Mark a name as used; report E0201 and return False if no name of that kind exists. A name
        whose definition is an error because of its kind isn't reported again."""
        defined_name = self.definitions.get(name)
        if defined_name is not None and defined_name.kind == kind:
            defined_name.used = True
            return True
        if defined_name is not None and defined_name.meant == kind:
            defined_name.used = True
            return False  # its definition is the error
        if defined_name is not None:
            plural = defined_name.kind == "prompts"
            hint = f"`{name}` is {'a prompts block' if plural else with_article(defined_name.kind)}"
            if (defined_name.kind, kind) == ("probe", "direction"):
                hint += f": write `direction d = probe({name})` and use `d`"
        else:
            names = [n for n, d in self.definitions.items() if d.kind == kind]
            known = name_list(names)
            define = f"define it first: `{DEFINITION_EXAMPLES[kind].format(name)}`"
            hint = did_you_mean(name, names, f"defined are {known}" if known else define)
        word = "block of prompts" if kind == "prompts" else kind
        self.diagnostics.append(UnknownName(span=span, kind=word, name=name, hint=hint))
        for other in self.definitions.values():
            other.used = other.used or other.kind == kind  # each may have been meant
        return False

    def has(self, kind: str, name: str) -> bool:
        """Whether a name of this kind exists; marks it as used."""
        defined_name = self.definitions.get(name)
        if defined_name is None or defined_name.kind != kind:
            return False
        defined_name.used = True
        return True

    def names(self, kind: str) -> list[str]:
        return [n for n, d in self.definitions.items() if d.kind == kind]

    def warn_unused(self) -> None:
        """Report W0730 for every unused name of the file itself."""
        self.diagnostics.extend(
            UnusedName(span=d.span, kind=d.kind, name=name)
            for name, d in self.definitions.items()
            if not d.used and not d.imported and d.kind not in ("experiment", "observation")
        )


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def line_reference(of: Span, seen_from: Span) -> str:
    """Return `on line 3`, with the file's name if it is a different file."""
    if of.source is seen_from.source:
        return f"on line {of.line}"
    return of.source.describe_line(of.line)


def suggest_split(block: str, of: Span, seen_from: Span) -> str:
    """Return the hint for a part of a block that isn't divided into parts.

    Args:
        block: The name of the block.
        of: The block.
        seen_from: Where the part is named.
    """
    where = "" if of.source is seen_from.source else f" of {of.source.name}"
    parts = f"`{block}.train` and `{block}.test`"
    return f"add `split 50%` to `prompts {block}`{where}: it makes {parts}"
