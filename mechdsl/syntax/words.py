"""Words of the grammar, and the facts of a word that names an observation."""

from __future__ import annotations

from mechdsl.base.records import Record


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_WORDS = _words(
    "mech use param model prompts images metric direction basis lens probe group circuit seed"
    " experiment"
)
"""First words of top-level statements."""

DATA_WORDS = _words(
    "template chat rows rename where split answer wrong text span corrupt image tiles video audio"
    " region classes"
)
"""First words of lines in a `prompts` or `images` block."""

CHANGE_WORDS = _words("swap template add replace blur")
"""First words of lines in a `corrupt` block that are words of the grammar."""

RULE_WORDS = _words(
    "patch ablate replace block reweight set path add scale project clamp swap freeze"
)

EXPERIMENT_WORDS = RULE_WORDS | _words(
    "model prompts images from keep for against generate using discover search observe"
    " measure stats report expect"
)
"""First words of statements in an `experiment` or `for` block."""

SOFT_WORDS = _words("allow renumber run save")
"""Words that begin such a statement only if its continuation follows; otherwise they are names."""

BLOCK_WORDS = _words("experiment prompts images for corrupt run model")
"""First words of statements whose braces hold lines."""

EDIT_WORDS = _words("scale set add project")
"""First words of lines in the block of an edited model."""

AXIS_WORDS = _words("layer layers head heads neuron neurons expert experts feature features")

POSITION_WORDS = _words("token tokens each first last between except top best")

CONNECTING_WORDS = _words(
    "if then else and or not in near within of at into onto from with through to by as"
)

STACKS = ("vision", "text", "encoder", "decoder", "cross")
"""Words before an axis that select a stack of a model."""

RESERVED = (
    (EXPERIMENT_WORDS - {"model", "prompts", "images"})
    | AXIS_WORDS
    | POSITION_WORDS
    | CONNECTING_WORDS
)
"""Words that can't be names of values. First words of lines elsewhere (`text`, `group`, `image`)
can: data sets have such columns, and no line becomes ambiguous."""


def name_problem(name: object) -> str | None:
    """Return the reason that a plugin can't register an entry under a name."""
    if not (isinstance(name, str) and name.isidentifier()):
        return "its name must be a word of letters, digits and `_`"
    if name in RESERVED:
        return "its name is a keyword of the language"
    return None


CLAUSE_WORDS = CONNECTING_WORDS | _words(
    "verify until top contains on citing during limit step toward per test confidence correct"
    " verdicts window without align radius over up distinct streamed shuffled"
)
"""Words that continue a statement, so that a line within it may begin with one of them."""


class ObservationWord(Record):
    """Facts of a word after `observe`, for stages before the one that defines it."""

    is_lens: bool = False
    """It gives a distribution over tokens, which the experiment's measures read instead of the
    model's own."""
    of_weights: bool = False
    """It reads only weights, so that prompts have no effect."""
    of_bases: bool = False
    """Its arguments are bases."""
    of_probes: bool = False
    """Its argument may be the name of a `probe`: `observe probe(told)`."""
    of_coordinates: bool = False
    """It reads named coordinates: `observe value feature 3 of b`."""
    has_graph: bool = False
    """It has a graph, which `report graph` draws."""
    axes: tuple[str, ...] = ()
    """Axes of its values, if a cell has several."""
    controls: tuple[str, ...] = ()
    """Its controls, each a separate measure."""
