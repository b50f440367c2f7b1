"""Hints for syntax of other languages: the mechdsl syntax with the same purpose."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Hint:
    """A hint that applies if `before` matches up to the position where the parser stopped and
    `after` from there on; `{0}`, `{1}`, … in `text` are their groups, in order."""

    before: str
    after: str
    text: str
    accepts: str = ""
    """A terminal that must be accepted at the position."""
    exclusive: bool = False
    """Whether the last group is the end of a range that excludes it, as in Python."""


IMAGE_HINTS: tuple[Hint, ...] = (
    Hint(
        r"^expect\b.*\(\s*(?:image\s+)?row\s*$",
        r"([0-9]+)\s+col\s+([0-9]+)",
        'a patch is a value of its axis: `position: "image row {0} col {1}"`',
    ),
    Hint(
        r"^expect\b.*=\s*image\s+$",
        r"row\b",
        'a patch is named by its axis: `expect delta(position: "image row 3 col 4") > 0.1`',
    ),
    Hint(
        r"\bimage\s+row\s+(\S+)\s+col\s+(\S+)\s*$",
        r"",
        "write `image row {0} col {1} token` for one patch or one run each, `tokens` for several "
        "together",
        "TOKEN",
    ),
    Hint(
        r"\bimage\s+row\s+(\S+?)\s*$",
        r",",
        "row and column stand side by side: `image row {0} col 4 token`",
        "COL",
    ),
    Hint(
        r"\bimage\s+row\s+(\S+?)\s*$",
        r"",
        "write `image row {0} col * tokens` for a whole row",
        "COL",
    ),
    Hint(
        r"\bimage\s+col\s*$",
        r"([\w.*]+)\s+row\s+([\w.*]+)",
        "the row comes first: `image row {1} col {0} token`",
    ),
    Hint(
        r"\bimage\s+col\s*$",
        r"([\w.*]+)",
        "the row comes first: `image row * col {0} tokens` is a whole column",
    ),
    Hint(r"\b(?:row|col)\s*$", r"-\s*[0-9]", "rows and columns count from 1, at the top left"),
    Hint(
        r"\b(?:at|onto|from|to)\s+(?:each\s+)?row\s+(\S+)\s*$",
        r"col\s+(\S+)",
        "say what it is a row of: `image row {0} col {1} token`",
    ),
    Hint(
        r"\beach\s+(?:patch|pixel)?\s*$",
        r"",
        "write `each token of image`, or `each item token` for a span that occurs several times",
        "TOKEN",
    ),
    Hint(
        r"^region\s+(\w+)\s*=\s*$",
        r"\[",
        "name the box: `box = [0, 0, 16, 16]`, `region {0} = box`",
    ),
    Hint(
        r"^tiles\s+(\w+)\s*,?\s*$",
        r"(?:x|X|×|\*|,)?\s*(\w+)",
        "rows and columns stand with `by`: `tiles {0} by {1}`",
    ),
    Hint(
        r"^tiles\s+(\w+)\s*$",
        r"",
        "say how many rows and how many columns: `tiles 2 by 3`",
    ),
    Hint(
        r"^tiles\s+(\w+)\s+by\s+(\w+)\b",
        r"",
        "the uncut image as one more row is written `tiles {0} by {1} and whole`",
    ),
    Hint(r"^patch\s*$", r"", "write `each token of image`: each patch is a token", "ROW"),
    Hint(r"^blur\s+image\s+([0-9.]+)\s*$", r"", "write `blur image radius {0}`"),
    Hint(r"^image$", r":", "leave the colon out: `image gray`"),
    Hint(
        r"^image\s+\w+\s+$",
        r"\w",
        "an image is one word, or a word with numbers: `image gray(100)`",
        "$END",
    ),
    Hint(
        r"^observe\s+(pointing|mass|iou)\b(?!.*\bof\b)",
        r"",
        "name the map and the region: `observe {0} of caap in object`",
    ),
    Hint(
        r"^observe\s+(pointing|mass|iou)\s+of\s+(\w+)(?!.*\bin\b)",
        r"(?!.*\bin\b)",
        "name the region: `observe {0} of {1} in object`",
    ),
    Hint(
        r"^observe\s+iou\b.*\bas\s+(\w+)\s*$",
        r"(top\s+\S+)",
        "the name comes last: `{1} as {0}`",
    ),
    Hint(
        r"^observe\s+sum\b.*?\b([A-Za-z_]\w*(?:\([^()]*\))?)\s*\*\s*([\w.]+)\s*$",
        r"",
        "the number stands in front: `{1} * {0}`",
        "STAR",
    ),
    Hint(
        r"^observe\s+sum\b.*-\s*([A-Za-z_]\w*(?:\([^()]*\))?)\s*$",
        r"",
        "the number is written out: `-1 * {0}`",
        "STAR",
    ),
    Hint(
        r"^observe\s+sum\s+of\b",
        r"[-+]",
        "maps are listed with commas: `fine, coarse` adds them, `fine, -1 * coarse` takes one away",
        "COMMA",
    ),
    Hint(
        r"^replace\s+at\s+(?=\S)",
        r"",
        "leave `at` out: `replace object tokens with gray`",
    ),
    Hint(
        r"^(?:add)\b.*\bto\s+\w+\s*$",
        r"\s*$",
        "name a site and tokens: `add gaussian(std: 3 sd) to embed at image tokens`",
        "AT",
    ),
)

_AXIS = r"\b(layers?|heads?|neurons?|experts?|features?)"

HABIT_HINTS: tuple[Hint, ...] = (
    Hint(_AXIS + r"\s*[0-9]+\s*$", r"\.(\w+)", "a range has two dots: `..{1}`"),
    Hint(_AXIS + r"\s+([A-Za-z_]\w*)\s*$", r"\.(\w+)", "a range has two dots: `{1}..{2}`"),
    Hint(r"\bin\s+([A-Za-z_]\w*)\.$", r"([0-9]+)", "a range has two dots: `{0}..{1}`"),
    Hint(
        _AXIS + r"\s*$",
        r"([0-9]+)\.([0-9]+)(?![0-9%])",
        "a range has two dots: `{1}..{2}`; a share has a percent sign, such as `25%`",
    ),
    Hint(
        _AXIS + r"\s+range\s*$",
        r"\(\s*([0-9]+)\s*,\s*([0-9]+)\s*\)",
        "a range includes both ends: write `{0} {1}..{2}`",
        exclusive=True,
    ),
    Hint(
        _AXIS + r"\s+range\s*$",
        r"\(\s*([0-9]+)\s*\)",
        "a range includes both ends: write `{0} 0..{1}`",
        exclusive=True,
    ),
    Hint(
        _AXIS + r"\s*([0-9]+)\s*$",
        r": *([0-9]+)",
        "a range includes both ends: write `{0} {1}..{2}`",
        exclusive=True,
    ),
    Hint(
        _AXIS + r"\s*$",
        r"\[\s*([0-9]+(?:\s*,\s*[0-9]+)*)\s*\]",
        "leave the brackets out: `{0} {1}`",
    ),
    Hint(
        r"^(\w+)\s+at\s+([\w-]+)\s+$",
        r"(tokens?)\s+(\S.*?)\s*$",
        "the site comes first: `{0} {3} at {1} {2}`",
    ),
    Hint(r"\bat\s+position\s*$", r"(-?[0-9]+)", "write `token {0}`"),
    Hint(r"", r"positions?\s+(-?[0-9]+)", "write `at token {0}`"),
    Hint(
        r"^$",
        r"(zero|mean|resample)_?ablat(?:e|ion)\s+(\S.*?)\s*$",
        "write `ablate {1} with {0}`",
    ),
    Hint(r"", r"(limit|seed|temperature)\s*=\s*([\w.]+)", "write `{0} {1}` without a sign between"),
    Hint(r"^model\s*$", r'=?\s*("[^"]*")', "name the model and its source: `model m = hf({0})`"),
    Hint(r"^model\s+(\w+)\s*=\s*$", r'("[^"]*")', "name the source: `model {0} = hf({1})`"),
    Hint(
        r"^(template|answer|wrong)\s*$",
        r'[fr](?=")',
        'leave the letter before the quote out: `{0} "…"` fills in `{{name}}` by itself',
    ),
    Hint(r"\[\s*$", r"\]", 'list at least one value: `["anna", "ben"]`'),
    Hint(
        r"^(experiment|prompts|images|corrupt)\s+(\w+)\s*$",
        r":",
        "write `{0} {1} {{` and close the block with `}}`",
    ),
    Hint(r"^generate\s+([0-9]+)\s*$", r"tokens?\b", "leave the unit out: `generate {0}`"),
)
"""Habits from Python, TransformerLens and other experiment libraries."""

HINTS: tuple[Hint, ...] = (
    *IMAGE_HINTS,
    *HABIT_HINTS,
    # Words of a rule in the wrong order, or words of another rule.
    Hint(
        r"^patch\b.*\bat\b.*\binto\s*$",
        r"(?!layer|[0-9])",
        "write `onto`: it says at which tokens the activation is written; "
        "`into layer 2` names a layer",
        "LAYER",
    ),
    Hint(r"^patch\b.*\bonto\b.*$", r"onto\s+layers?\b", "write `into`: `onto` names tokens"),
    Hint(
        r"^patch\b.*\b(?:into\s+layer|with)\b.*$",
        r"onto\b",
        "`onto` comes first: `at P onto Q into layer L with RUN`",
    ),
    Hint(
        r"^patch\b(?!.*\bat\b).*$",
        r"(onto|into|with)\b",
        "`at` comes first: `at last token {0} …`",
        "AT",
    ),
    Hint(r"^patch\b", r"->", "write `path`: it patches what goes from a sender to a receiver"),
    Hint(
        r"^path\b(?!.*\bat\b).*->.*$",
        r"through\b",
        "`at` comes first: `at last token through mlps`",
        "AT",
    ),
    Hint(
        r"^path\b(?!.*\bat\b).*->.*through\s*$",
        r"mlps\b",
        "`at` comes first: `at last token through mlps`",
        "AT",
    ),
    Hint(r"^path\b.*->.*$", r"->", "a path has one sender and one receiver"),
    Hint(
        r"^path\b(?!.*->).*$",
        r"(?:to|into|at)\b|=|,",
        "write `->` between sender and receiver: `path layer 0 head * -> logits at last token`",
    ),
    Hint(
        r"^path\b.*->.*$",
        r"onto\b",
        "sender and receiver are at the same position: leave `onto …` out",
    ),
    Hint(
        r"^path\b.*->.*\bwith\s*$",
        r"frozen\b",
        "only norms can be frozen: `with frozen norms`",
    ),
    Hint(
        r"^path\b.*->.*\bwith\s*$",
        r"\w",
        "a path reads the source run: name it in `from … into …`; `with frozen norms` holds what "
        "norms divide by",
    ),
    Hint(
        r"^path\b.*->.*\bwith\b.*$",
        r"through\b",
        "`through mlps` comes first: `through mlps with frozen norms`",
    ),
    Hint(
        r"^(?:ablate|freeze|set|replace)\b",
        r"onto\b",
        "only `patch` reads at one position and writes at another",
    ),
    Hint(
        r"^(?:ablate|freeze)\s+(?:pattern|scores)\b",
        r"to\b",
        "edges of attention are edited by `block attention layer * from Q to K`",
    ),
    Hint(
        r"^freeze\b",
        r"with\b",
        "`freeze` holds the base run's own value; `ablate … with mean` writes another one",
    ),
    Hint(
        r"^swap\s+\w+\s*$",
        r",",
        "`swap` exchanges two positions here: `swap resid_post layer 3 at A with B`; "
        "values are swapped in a `corrupt` block",
    ),
    Hint(r"^swap\b.*\bat\b.*\band\s*$", r"", "write `with`: `swap SITE at A with B`", "ANSWER"),
    Hint(
        r"\band\s*$",
        r"",
        "positions are listed with commas, or joined in braces; only `tokens *` goes on with "
        "`and answer`",
        "ANSWER",
    ),
    Hint(
        r"^swap\b.*\bat\b.*$", r"(?:and|onto|to)\b", "write `with`: `swap SITE at A with B`", "WITH"
    ),
    Hint(
        r"^swap\b.*\bwith\s+\w+\s*$",
        r"\s*$",
        "`swap` exchanges two positions of one run: write a position, such as `with first token`",
        "TOKEN",
    ),
    Hint(r"^set\b(?!\s+attention)", r"(?:with|by)\b|=", "write `to`: `set SITE at P to 0`", "TO"),
    Hint(
        r"^set\s+attention\b",
        r"(?:with|by)\b|=",
        "write `to`: `to 0.2` or `to uniform`; `reweight attention … by 0.5` multiplies",
        "TO",
    ),
    Hint(
        r"^set\s+attention\b.*\bto\b",
        r"\s*$",
        "say what the weight becomes: `to 0.2` or `to uniform`",
        "TO",
    ),
    Hint(
        r"^reweight\b",
        r"(?:with|to)\b|=",
        "write `by`, which multiplies; `set attention … to 0.2` says what the weight becomes",
        "BY",
    ),
    Hint(
        r"^reweight\b",
        r"\s*$",
        "say by how much: `by 0` takes the edge out, `by 2` doubles it",
        "BY",
    ),
    Hint(
        r"\battention\b.*\bfrom\b(?!.*\bto\b).*$",
        r"onto\b",
        "write `to`: attention goes `from` a query `to` a key",
        "TO",
    ),
    Hint(
        r"\battention\b.*\bfrom\b(?!.*\bto\b).*$",
        r"\s*$",
        "say which tokens are attended to: `from last token to subject token`",
        "TO",
    ),
    Hint(
        r"\battention\b",
        r"(?:to|at|onto)\b",
        "attention goes from a query to a key: `from last token to subject token`",
        "FROM",
    ),
    Hint(r"^(block|reweight)\s+$", r"", "write `{0} attention layer * from Q to K`", "ATTENTION"),
    Hint(
        r"\bfrom\s+\w+\s*$",
        r"tokens?\b",
        "`from` is read as `from SOURCE into BASE` here; which tokens attend to which is said by "
        "`attention layer * from Q to K`",
        "INTO",
    ),
    Hint(
        r"^from\s+([\w.]+)\s*$",
        r"\s*$",
        "write `from {0} into BASE`; a single rule names its source by `with {0}`",
        "INTO",
    ),
    Hint(r"^(?:from|model)\b", r"and\b", "names are listed with commas", "COMMA"),
    Hint(r"\b(?:from|into|model)\s*$", r"\[", "lists of names stand without brackets"),
    Hint(r"^patch\b.*\bwith\s*$", r"\s*$", "name the run that is read, such as `with fewer`"),
    Hint(
        r"^patch\b.*\bwith\s+random\s*$",
        r"\(",
        "random targets are a line of their own: `against random(39)`",
    ),
    Hint(
        r"^patch\b.*\bwith\s+python\s*$",
        r"\(",
        "`with` names a run; `set SITE at POSITION to python(…)` writes what a function makes",
    ),
    Hint(r"^against\s+(\w+)\s*$", r"([0-9]+)", "write `against {0}({1})`"),
    Hint(
        r"^against\b.*\bapart\s*$", r"", "name what is never drawn: `apart from top 5 of X`", "FROM"
    ),
    Hint(
        r"^against\b.*\)\s*$",
        r"(?:without|except|excluding|but)\b",
        "what is never drawn stands behind `apart from`",
    ),
    Hint(r"\b(at|onto|from|to|with)\s*$", r"\s*$", "name tokens: `{0} last token`", "TOKEN"),
    Hint(
        r"\battention\s+\w.*\s$",
        r"([A-Za-z_]\w*)\s+from\b",
        "a group stands in place of layers and heads: `attention {0} from …`",
    ),
    # Selections by another experiment.
    Hint(r"\btop\s+of\s+$", r"(\w+)", "say how many: `top 3 of {0}`"),
    Hint(r"\btop\s+([\w%]+)\s+$", r"(?:in|from)\s+(\w+)", "write `top {0} of {1}`"),
    Hint(r"\btop\s+([0-9]+)\s+$", r"percent\b", "write `{0}%`"),
    Hint(
        r"\btop\s+([A-Za-z_]\w*)\s*$",
        r"%",
        "leave the percent sign out: `{0}` has its own where it is defined",
    ),
    Hint(
        r"\btop\s+(\S+)\s+of\s+(\w+)\s*$",
        r"",
        "say that tokens are meant: `top {0} of {1} tokens`",
        "TOKENS",
    ),
    Hint(r"\bbest\s+$", r"([0-9]+)\s+of\s+(\w+)", "write `top {0} of {1}`"),
    Hint(r"\bbest\s+(?!of\b)(\w+)\s+(?:at\s+)?$", r"", "write `best of {0}`"),
    Hint(
        r"^\w+\s+\w.*$",
        r"((?:top\s+\S+|best)\s+of\s+\w+)",
        "`{0}` is a whole site: leave out what stands before it",
    ),
    # Numbers and tokens.
    Hint(
        r"[^.\s]\s*$",
        r"[0-9]+\.[0-9]+",
        "a share is written with a percent sign, such as `25%`",
        "PERCENT",
    ),
    Hint(
        r"\btokens?\s+$",
        r"[0-9.]+%",
        "only layers have a relative depth: write `token 5`, or a name such as `last token`",
    ),
    Hint(r"^split\s+$", r"([0-9]+)(?![0-9%.])", "write the percent sign: `split {0}%`", "PERCENT"),
    Hint(r"\b([0-9]+(?:\.[0-9]+)?)$", r"[x×](?!\w)", "write the number alone: `{0}`"),
    Hint(
        r"\btoken\s+except\s*$",
        r"",
        "write `tokens except …`, or `each token except …` for one run each",
    ),
    Hint(r"\bbetween\b", r"to\b", "write `and`: `tokens between A and B`", "AND"),
    # Targets and values of `replace`.
    Hint(
        r"^replace\b(?!\s+block\b)",
        r"\s*$",
        'say what stands there instead: `with gray` in images, `with "…"` in texts',
        "WITH",
    ),
    Hint(r"^replace\b(?!\s+block\b)", r"(?:by|to|into)\b", "write `with`", "WITH"),
    # Cells in expectations.
    Hint(
        r"^expect\b.*[(,]\s*([A-Za-z][\w-]*(?:\s+\w+)*?\s+tokens?)\s*$",
        r"[),]",
        'a position is a value of its axis, in quotes: `position: "{0}"`',
    ),
    Hint(
        r"^expect\b.*[(,:]\s*([A-Za-z][\w-]*(?:\s+\w+)*?)\s*$",
        r"(tokens?)\b",
        'a position is a value of its axis, in quotes: `position: "{0} {1}"`',
    ),
    Hint(
        r"^expect\b.*[(,]\s*token\s+(\w+)\s*$",
        r"[),]",
        'a position is a value of its axis, in quotes: `position: "{0} token"`',
    ),
    Hint(
        r"^expect\b",
        r"at\s+(\w[^()\"]*?\btokens?)\b",
        'a position is a value of its axis: `delta(position: "{0}")`',
    ),
    # Loops, reports, Python.
    Hint(
        r"^for\b.*\[[^\]]*$",
        r"step\b",
        "leave the brackets out: `for k in 0%..100% step 5%`",
    ),
    Hint(r"^for\b", r"by\b", "write `step`: `for k in 0%..100% step 5%`", "STEP"),
    Hint(
        r"^report\s+(\w+)\s+(\w+)\s+$",
        r"(?:over\s+|per\s+|on\s+)?(?!top\b|to\b|by\b|x\b|vs\b|against\b|and\b)([a-z_]\w*)",
        "write `report {0} {1} by {2}`",
        "BY",
    ),
    Hint(r"^report\b.*\bto\s+$", r"([0-9]+)", "write `top {0}`; `to` names a file in quotes"),
    Hint(r"^report\b(?!.*\bto\s)", r'("[^"]*")', "write `to` in front of the file: `to {0}`"),
    Hint(r"^report\b.*\b(?:best|first|largest|limit)\s+$", r"([0-9]+)", "write `top {0}`"),
    Hint(r"^for\s+(\w+)\s*$", r"of\b|=", "write `in`: `for {0} in [0, 1, 2]`", "IN"),
    Hint(r"^template\s*$", r"\[", "several templates are values: `template in [ … ]`"),
    Hint(
        r"^(answer|wrong|template)\s+$",
        r"(\{\w+\})",
        'a text stands in quotes: `{0} " {1}"`',
    ),
    Hint(
        r"^(?:experiment|prompts|model|corrupt|group|metric|param)\s+\w+\s*$",
        r"-",
        "a name has letters, digits and `_`, but no `-`",
    ),
    Hint(
        r"^(?:experiment|prompts|images|corrupt)\s+(\w+)\s+$",
        r"(\w+)",
        "a name is one word: `{0}_{1}`",
        "LBRACE",
    ),
    Hint(r"\b(kl|js)\($", r"\)", "name the run that it is compared with: `{0}(clean)`"),
    Hint(
        r"^corrupt\s*\w*\s*$",
        r"=|\s*$",
        "write `corrupt NAME {{ … }}`, with its changes between the braces",
    ),
    Hint(r"\bpython\([^\")]*$", r"", 'the file stands in quotes: `python("file.py:name")`'),
    Hint(
        r'"[^"]*\{[^"}]*"\s*$',
        r"\w",
        "the text ends at this quote: name the value on a line of its own, `x = …`, and write "
        "that name in the text",
    ),
    Hint(r"", r"allow\s", "write `allow attention layers * from QUERIES to KEYS`"),
    Hint(r"", r"renumber\s", "write `renumber subject tokens from 5`"),
    Hint(r"^$", r"in\s+(\w+)", "the name comes first: `{0} in …`"),
    Hint(r"^$", r"python\b", "say which value it makes: `count = python(…)`"),
    Hint(r"^$", r"apply\b", "write `set SITE at POSITION to python(…)`"),
    # Signs and words of other languages.
    Hint(r"\b([0-9]+)\s*$", r"- *([0-9]+)", "a range is written `{0}..{1}`"),
    Hint(r"\b([0-9]+)\s*$", r": *([0-9]+)", "a range is written `{0}..{1}`"),
    Hint(r"\b([0-9]+)\s+$", r"to +([0-9]+)\b", "a range is written `{0}..{1}`"),
    Hint(r"\.\.\s*$", r"\. *([0-9]+)", "a range has two dots: `..{0}`"),
    Hint(r"\b(last|first)\s+$", r"(\w+) +(tokens?)\b", "write `{0}-{1} {2}`"),
    Hint(
        r"\bwindow\s+$",
        r"([0-9]+)\s+(layers?\s+\S+)",
        "a window stands behind its axis: `{1} window {0}`",
    ),
    Hint(r"\b(\w+)\s+$", r"([0-9]+|\*)", "say which axis: `{0} layer {1}`", "LAYER"),
    Hint(r"(?:at|onto|to|from|with|,)\s*$", r"(-?[0-9]+)", "write `token {0}`", "TOKEN"),
    Hint(r"", r"to\b", "write `onto`: it says where the activation is written", "ONTO"),
    Hint(r"", r"to\b", "write `into`: `from SOURCE into BASE`", "INTO"),
    Hint(r"", r"(?:x|×|vs|against|and|,)(?!\w)", "write `by`: `heatmap layer by head`", "BY"),
    Hint(
        r"",
        r"((?:layer|head|neuron|expert|token)s?) *= *([\w.*%]+)",
        "write `{0} {1}` without a sign between",
    ),
    Hint(
        r"\b((?:layer|head|neuron|expert|token)s?)\s*$",
        r"[=:] *(\S+)",
        "write `{0} {1}` without a sign between",
    ),
    Hint(r"\([^()]*\b([a-z_]+)\s*$", r"=(?!=)", "an option has a colon: `{0}: …`"),
    Hint(
        r"\{[^}]*\btokens?\s+$",
        r"\w",
        "positions are listed with commas: `{{first token, last token}}`",
        "COMMA",
    ),
    Hint(
        r"\b(?:at|to|from|onto|with)\s+\{\s*[\w-]+\s*$",
        r",",
        "each has its own `token`: `{{first token, last token}}`",
        "TOKEN",
    ),
    Hint(r"^prompts\b.*\bwith\s", r"", "write `prompts p with replies of NAME`", "REPLIES"),
    Hint(r"^prompts\b.*\breplies\s", r"", "write `prompts p with replies of NAME`", "OF"),
    Hint(
        r"^prompts\b.*\breplies\b.*$",
        r"limit\b",
        "`limit` comes first: `prompts p limit 8 with replies of NAME`",
    ),
    Hint(
        r"^report\s+(\w+).*\b(top\s+[0-9]+)\s*$",
        r"of\s+([\w.]+)",
        "`of` comes first: `report {0} of {2} {1}`",
    ),
    Hint(
        r'^report\b.*\bto\s+".*"\s*$',
        r"(?:width|columns?)\b",
        "write `width 1 column` or `width 2 columns`",
    ),
    Hint(r"\beach\s+token\s*$", r"", "each of all tokens is `token *`", "BETWEEN"),
    Hint(
        r"^$",
        r"run\s+(\w+)\s*\{",
        "a changed text is a `corrupt {0} {{ … }}`; a `run` with rules stands in an experiment",
    ),
    Hint(
        r"\b(?:mean_difference|mean|pca|probe)\([^()]*$",
        r"(?:at|layers?|heads?|token)\b",
        "rows stand between the parentheses, the place behind: "
        "`mean_difference(A, B) at resid_post layer 2 at last token`",
    ),
    Hint(r"^measure\b", r"", "say what is compared: `as recovery`, `as delta` or `as raw`", "AS"),
    Hint(
        r"^(?:patch|ablate|freeze|scale|clamp|path|set|swap)\b",
        r"",
        "a rule says where it acts, such as `at last token`",
        "AT",
    ),
    Hint(r"^ablate\b", r"", "say what replaces it: `with mean`, `with zero`", "WITH"),
    Hint(r"\b(?:last|first)\s*$", r"", "write `last token` or `last-item token`", "TOKEN"),
)


def find_hint(before: str, after: str, accepts: frozenset[str]) -> str | None:
    """Return the hint for a position with this text before and after it."""
    for known in HINTS:
        if known.accepts and known.accepts not in accepts:
            continue
        left = re.search(known.before, before)
        right = re.match(known.after, after)
        if left and right:
            groups = [*left.groups(), *right.groups()]
            if known.exclusive:
                groups[-1] = str(max(0, int(groups[-1]) - 1))
            return known.text.format(*groups)
    return None
