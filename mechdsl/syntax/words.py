"""The words of the language, and the words that registries add to it.

The grammar knows only shapes. Rule kinds, observations and corruptions register their first word
here, so that the parser can look it up.
"""

from __future__ import annotations

from mechdsl.base.records import Registry


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_WORDS = _words(
    "mech use param model prompts images metric direction basis group seed experiment"
)
"""First words of statements outside every brace."""

DATA_WORDS = _words(
    "template chat rows rename where split answer wrong text span corrupt image tiles region"
    " classes"
)
"""First words of lines in a `prompts` or `images` block."""

CHANGE_WORDS = set(_words("swap template add replace blur"))
"""First words of lines in a `corrupt` block: those of the grammar, and those that
`syntax.changes.register` adds, which stay free as names everywhere else."""

RULE_WORDS = _words(
    "patch ablate replace block reweight set path add scale project clamp swap freeze"
)

EXPERIMENT_WORDS = RULE_WORDS | _words(
    "model prompts images from keep for against generate using discover search observe"
    " measure stats report expect"
)
"""First words of statements in an `experiment` or `for` block."""

SOFT_WORDS = _words("allow renumber run save")
"""Those that begin a statement there only before what it holds, and may name anything elsewhere."""

BLOCK_WORDS = _words("experiment prompts images for corrupt run")
"""First words of statements whose braces hold lines."""

AXIS_WORDS = _words("layer layers head heads neuron neurons expert experts feature features")

POSITION_WORDS = _words("token tokens each first last between except top best")

CONNECTING_WORDS = _words(
    "if then else and or not in near within of at into onto from with through to by as"
)

STACKS = ("vision", "text", "encoder", "decoder")
"""Words before an axis that say which stack of a model is meant."""

RESERVED = (
    (EXPERIMENT_WORDS - {"model", "prompts", "images"})
    | AXIS_WORDS
    | POSITION_WORDS
    | CONNECTING_WORDS
)
"""Words that no value may be called. First words of other places (`text`, `group`, `image`) may
be: data sets have such columns, and no line becomes ambiguous by it."""

CLAUSE_WORDS = CONNECTING_WORDS | _words(
    "verify until top contains on citing during limit step toward per test confidence correct"
    " verdicts window align radius over up distinct apart shuffled"
)
"""Words that go on with a statement, so a line may begin with one in the middle of it."""

VERBS: Registry[str] = Registry("rule")
"""Words → the word before the rule's number, or nothing."""

LENSES: set[str] = set()
"""Words behind `observe` that give a distribution over tokens, which the measures of the experiment
read in place of the model's own."""

OBSERVATION_CONTROLS: dict[str, tuple[str, ...]] = {}
"""Word behind `observe` → the controls that come with it, each a measure of its own."""

WEIGHT_OBSERVATIONS: set[str] = set()
"""Words behind `observe` that look at weights alone, for which no prompt matters."""

OBSERVATION_AXES: dict[str, str] = {}
"""Word behind `observe` whose values are several to a cell → the axis that they lie along."""
