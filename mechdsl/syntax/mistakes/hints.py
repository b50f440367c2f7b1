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


IMAGE_HINTS: tuple[Hint, ...] = (
    Hint(
        r"^expect\b.*\(\s*(?:image\s+)?row\s*$",
        r"([0-9]+)\s+col\s+([0-9]+)",
        'write a patch as a value of its axis: `position: "image row {0} col {1}"`',
    ),
    Hint(
        r"^expect\b.*=\s*image\s+$",
        r"row\b",
        'write a patch as a value of its axis: `expect delta(position: "image row 3 col 4") > 0.1`',
    ),
    Hint(
        r"\b(?!at\b|each\b)(\w+)\s+row\s+(\S+)\s+col\s+(\S+)\s*$",
        r"",
        "write `{0} row {1} col {2} token` for separate patches, or `tokens` to patch several "
        "together",
        "TOKEN",
    ),
    Hint(
        r"\b(?!at\b|each\b)(\w+)\s+row\s+(\S+?)\s*$",
        r"(?:,\s*col|,?\s*column)\s+([\w.*]+)",
        "write the row and the column together: `{0} row {1} col {2} token`",
        "COL",
    ),
    Hint(
        r"\b(?!at\b|each\b)(\w+)\s+row\s+(\S+?)\s*$",
        r"",
        "write `{0} row {1} col * tokens` for a whole row",
        "COL",
    ),
    Hint(
        r"\b(\w+)\s+col\s*$",
        r"([\w.*]+)\s+row\s+([\w.*]+)",
        "write the row first: `{0} row {2} col {1} token`",
    ),
    Hint(
        r"\b(?!row\b)(\w+)\s+col\s*$",
        r"([\w.*]+)",
        "write the row first; a whole column is `{0} row * col {1} tokens`",
    ),
    Hint(
        r"\b(?:at|onto|from|to)\s+(?:each\s+)?(\w+)\s*$",
        r"\(\s*(\w+)\s*,\s*(\w+)\s*\)",
        "write the row and the column: `{0} row {1} col {2} token`",
        "ROW",
    ),
    Hint(
        r"\b(?:row|col)\s*$",
        r"-\s*[0-9]",
        "rows and columns are counted from 1, starting at the top left",
    ),
    Hint(
        r"(?:[{,]|\b(?:at|onto|from|to))\s*(?:each\s+)?row\s+(\S+)\s*$",
        r"col\s+([\w.*]+)",
        "name the image: `image row {0} col {1} token`, or `photo row {0} col {1} token` for an "
        "image `photo` of a prompt",
    ),
    Hint(
        r"\beach\s+(?:patch|pixel)?\s*$",
        r"",
        "write `each token of image`, or `each item token` for a span that occurs several times",
        "TOKEN",
    ),
    Hint(
        r"^region\s+(\w+(?:\s+of\s+\w+)?)\s*=\s*\w+\s*$",
        r"\(",
        "name the box: `box = [0, 0, 16, 16]`, `region {0} = box`",
    ),
    Hint(
        r"^region\s+(\w+(?:\s+of\s+\w+)?)\s*=\s*$",
        r"\[",
        "name the box: `box = [0, 0, 16, 16]`, `region {0} = box`",
    ),
    Hint(
        r"^tiles\s+(\w+)\s*,?\s*$",
        r"(?:x|X|×|\*|,)?\s*(\w+)",
        "separate rows and columns with `by`: `tiles {0} by {1}`",
    ),
    Hint(
        r"^tiles\s+(\w+)\s*$",
        r"",
        "give the numbers of rows and columns: `tiles 2 by 3`",
    ),
    Hint(
        r"^tiles\s+(\w+)\s+by\s+(\w+)\b",
        r"",
        "to add the uncut image as another row, write `tiles {0} by {1} and whole`",
    ),
    Hint(r"^patch\s*$", r"", "write `each token of image`: each patch is a token", "ROW"),
    Hint(r"^blur\s+image\s+([0-9.]+)\s*$", r"", "write `blur image radius {0}`"),
    Hint(
        r"\b(?:at|onto|from|to)\s+(?!each\b)(\w+)\s+$",
        r"patch\s+[0-9]+",
        "name a patch by its row and column: `{0} row 1 col 3 token`",
    ),
    Hint(
        r"\b(?:at|onto|from|to)\s+$",
        r"patch\s+[0-9]+\s+of\s+(\w+)",
        "name a patch by its row and column: `{0} row 1 col 3 token`",
    ),
    Hint(r"^image$", r":", "remove the colon: `image gray`"),
    Hint(
        r"^image\s+$",
        r"(\w+)\s*=\s*(\{\w+\})",
        'write a placeholder in quotes: `image {0} = "{1}"`',
    ),
    Hint(
        r"^(image|video|audio)\s+(\w+)\s*$",
        r":",
        'write `=` in place of the colon: `{0} {1} = "{{file}}"`',
    ),
    Hint(
        r"^$",
        r"(?:img|picture|pic)\s",
        'write `image`, as in `image photo = "{{file}}"`',
        "IMAGE",
    ),
    Hint(
        r"(?:^|\s)(\w+)\s*=\s*$",
        r"(\{\w+\})",
        'write a placeholder in quotes: `{0} = "{1}"`',
    ),
    Hint(
        r"(?:^|\{)\s*$",
        r"(?:blank|gray|grey|black|hide|remove|occlude)\s+(\w+)",
        "write `mask {0}` for gray",
        "CHANGE",
    ),
    Hint(
        r"^image\s+\w+\s+$",
        r"\w",
        "write an image as one word, optionally with numbers: `image gray(100)`",
    ),
    Hint(
        r"^observe\s+(pointing|mass|iou|f1|auroc)\b(?!.*\bof\b)",
        r"",
        "name the map and the region: `observe {0} of caap in object`",
    ),
    Hint(
        r"^observe\s+(pointing|mass|iou|f1|auroc)\s+of\s+(\w+)(?!.*\bin\b)",
        r"(?!.*\bin\b)",
        "name the region: `observe {0} of {1} in object`",
    ),
    Hint(
        r"^observe\s+iou\b.*\bas\s+(\w+)\s*$",
        r"(top\s+\S+)",
        "write the name last: `{1} as {0}`",
    ),
    Hint(
        r"^observe\s+sum\b.*?\b([A-Za-z_]\w*(?:\([^()]*\))?)\s*\*\s*([\w.]+)\s*$",
        r"",
        "write the number first: `{1} * {0}`",
        "STAR",
    ),
    Hint(
        r"^observe\s+sum\b.*-\s*([A-Za-z_]\w*(?:\([^()]*\))?)\s*$",
        r"",
        "write the factor: `-1 * {0}`",
        "STAR",
    ),
    Hint(
        r"^observe\s+sum\s+of\b",
        r"[-+]",
        "separate maps with commas: `fine, coarse` adds them and `fine, -1 * coarse` subtracts one",
        "COMMA",
    ),
    Hint(
        r"^replace\s+at\s+(?=\S)",
        r"",
        "remove `at`: `replace object tokens with gray`",
    ),
    Hint(
        r"^(?:add)\b.*\bto\s+\w+\s*$",
        r"\s*$",
        "name a site and tokens: `add gaussian(std: 3 sd) to embed at image tokens`",
        "AT",
    ),
)

HABIT_HINTS: tuple[Hint, ...] = (
    Hint(
        r"^(template|answer|wrong)\s*$",
        r'[fr](?=")',
        'remove the letter before the quote: `{0} "…"` substitutes `{{name}}` automatically',
    ),
    Hint(r"\[\s*$", r"\]", 'list at least one value: `["anna", "ben"]`'),
    Hint(
        r"^(experiment|prompts|images|corrupt)\s+(\w+)\s*$",
        r":",
        "write `{0} {1} {{` and close the block with `}}`",
    ),
)
"""Habits from Python, TransformerLens and other experiment libraries."""

BASIS_HINTS: tuple[Hint, ...] = (
    Hint(
        r"\bfit\(\s*(\w+)\(\s*$",
        r"\)",
        "write a trainer without options as its name alone: `fit({0}, …)`",
    ),
    Hint(
        r"\b(features?)\s+([\w.,* ]*[\w*])\s*$",
        r"in\s+(?:basis\s+)?(\w+)",
        "write `{0} {1} of {2}`",
    ),
    Hint(
        r"\b(features?)\s+([\w.,* ]*[\w*])\s*$",
        r"(?:at|with|by|to)\b",
        "name the basis: `{0} {1} of b`",
        "OF",
    ),
    Hint(
        r"\b(?:latents?|sae_features?|sae)\s*$",
        r"\[?\s*([0-9]+|\*)\s*\]?(?:\s+of\s+(\w+))?",
        "features are coordinates of a basis: `feature {0} of b`",
    ),
    Hint(
        r"^project\s+out\s+(features?\s+[\w.,* ]*[\w*]\s+of\s+\w+)\s*$",
        r"from\s+(.*?)\s+at\b",
        "name the site before the feature: `project out {1} {0} at …`",
    ),
)
"""Hints for rules on coordinates of a basis."""

_QUOTE = "put a column with spaces or signs in quotes"

WEIGHT_HINTS: tuple[Hint, ...] = (
    Hint(
        r"\bweights\s+of\s+\S.*$",
        r"at\b",
        "remove the position: rules on weights act at all tokens",
    ),
    Hint(r"\bweights\s+$", r"(?!of\b)(\S.*?)\s*$", "write `of`: `weights of {0}`", "OF"),
    Hint(
        r"^(?:scale|set|add\b.*\bto)\s+w[eihg]+ts\s*$",
        r"of\b",
        "did you mean `weights`?",
    ),
    Hint(
        r"^scale\s+weights\s+of\s+(\S.*?)\s*$",
        r"\s*$",
        "add a factor: `scale weights of {0} by 0`",
        "BY",
    ),
    Hint(
        r"^model\s+(\w+)\s*=\s*(\w+)\s*$",
        r"\{",
        "write `with` before the edits: `model {0} = {1} with`",
    ),
)

RENAME_HINTS: tuple[Hint, ...] = tuple(
    Hint(rf"^rename\b{before}", after, f"{text}: `rename {{{{ {fix} }}}}`", accepts)
    for before, after, text, fix, accepts in (
        (
            r"\s*$",
            r'"([^"]*)"\s*(?:to\b|as\b|->|=>|[=:])\s*"?(\w+)',
            "the new name comes first",
            '{1} = "{0}"',
            "",
        ),
        (
            r"\s*$",
            r"\s*([\w.-][\w .-]*?)\s*(?:\bto\b|\bas\b|->|=>)\s*\"?(\w+)",
            "the new name comes first",
            '{1} = "{0}"',
            "",
        ),
        (
            r".*[{,]\s*$",
            r'"([^"]*)"\s*[=:]\s*"?(\w+)',
            "the new name comes first",
            '{1} = "{0}"',
            "",
        ),
        (
            r".*[{,]\s*(\w+)\s+$",
            r"(\w+)\s*[=:]\s*(\w+)",
            "the new name comes first",
            '{2} = "{0} {1}"',
            "",
        ),
        (
            r".*[{,]\s*(\w+)\s*$",
            r':\s*"?([^",}]*[^",}\s])"?',
            "write `=` before the column",
            '{0} = "{1}"',
            "",
        ),
        (r".*[{,]\s*(\w+)\s*=\s*(\w+)$", r"([.-][\w.-]*)", _QUOTE, '{0} = "{1}{2}"', ""),
        (r".*[{,]\s*(\w+)\s*=\s*$", r"([0-9][\w.-]*)", _QUOTE, '{0} = "{1}"', ""),
        (
            r".*[{,]\s*(\w+)\s*=\s*(\w+)\s+(\w+)\s*$",
            r"",
            _QUOTE,
            '{0} = "{1} {2}"',
            "EQUAL",
        ),
        (r"\s*$", r"", "put the names in braces, the new one first", "name = column", "LBRACE"),
    )
)
"""Names of columns with spaces, signs or digits, and the two names in another order."""

HINTS: tuple[Hint, ...] = (
    *RENAME_HINTS,
    *IMAGE_HINTS,
    *BASIS_HINTS,
    *WEIGHT_HINTS,
    *HABIT_HINTS,
    # Words of a rule in the wrong order, or words of another rule.
    Hint(
        r"^patch\b.*\bat\b.*\binto\s*$",
        r"(?!layer|[0-9])",
        "write `onto` to name the tokens that the activation is written to; `into layer 2` "
        "names a layer",
        "LAYER",
    ),
    Hint(
        r"^patch\b.*\bonto\b.*$",
        r"onto\s+layers?\b",
        "write `into` to name a layer; `onto` names tokens",
    ),
    Hint(
        r"^patch\b.*\b(?:into\s+layer|with)\b.*$",
        r"onto\b",
        "write `onto` first: `at P onto Q into layer L with RUN`",
    ),
    Hint(
        r"^patch\b(?!.*\bat\b).*$",
        r"(onto|into|with)\b",
        "write `at` first: `at last token {0} …`",
        "AT",
    ),
    Hint(r"^patch\b", r"->", "write `path`, which patches the path from a sender to a receiver"),
    Hint(
        r"^path\b(?!.*\bat\b).*->.*$",
        r"through\b",
        "write `at` first: `at last token through mlps`",
        "AT",
    ),
    Hint(
        r"^path\b(?!.*\bat\b).*->.*through\s*$",
        r"mlps\b",
        "write `at` first: `at last token through mlps`",
        "AT",
    ),
    Hint(r"^path\b.*->.*$", r"->", "a path has one sender and one receiver"),
    Hint(
        r"^path\b.*->\s*(\w+)\s*$",
        r",\s*(\w+)\b",
        "a path has one receiver; several are a group that repeats layer and heads, "
        "`group ends = {0} layer 1 heads *, {1} layer 1 heads *`, and `-> ends`",
    ),
    Hint(
        r"^path\b(?!.*->).*$",
        r"(?:to|into|at)\b|=|,",
        "write `->` between sender and receiver: `path layer 0 head * -> logits at last token`",
    ),
    Hint(
        r"^path\b.*->.*$",
        r"onto\b",
        "remove `onto …`: sender and receiver are at the same position",
    ),
    Hint(
        r"^path\b.*->.*\bwith\s*$",
        r"frozen\b",
        "only norms can be frozen: `with frozen norms`",
    ),
    Hint(
        r"^path\b.*->.*\bwith\s*$",
        r"\w",
        "name the source run of a path in `from … into …`; `with frozen norms` holds the scales "
        "of norms",
    ),
    Hint(
        r"^path\b.*->.*\bwith\b.*$",
        r"through\b",
        "write `through mlps` first: `through mlps with frozen norms`",
    ),
    Hint(
        r"^(?:ablate|freeze|set|replace)\b",
        r"onto\b",
        "only `patch` reads at one position and writes at another",
    ),
    Hint(
        r"^(?:ablate|freeze)\s+(?:pattern|scores)\b",
        r"to\b",
        "edit attention edges with `block attention layer * from Q to K`",
    ),
    Hint(
        r"^freeze\b",
        r"with\b",
        "`freeze` keeps the base run's value; to write another one, use `ablate … with mean`",
    ),
    Hint(
        r"^swap\s+\w+\s*$",
        r",",
        "here, `swap` exchanges two positions: `swap resid_post layer 3 at A with B`; swap "
        "values in a `corrupt` block",
    ),
    Hint(r"^swap\b.*\bat\b.*\band\s*$", r"", "write `with`: `swap SITE at A with B`", "ANSWER"),
    Hint(
        r"\band\s*$",
        r"",
        "separate positions with commas, or join them in braces; only `tokens *` can be "
        "followed by `and answer`",
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
        "give the new weight: `to 0.2` or `to uniform`",
        "TO",
    ),
    Hint(
        r"^reweight\b",
        r"(?:with|to)\b|=",
        "write `by` to multiply the weight, or `set attention … to 0.2` to replace it",
        "BY",
    ),
    Hint(
        r"^reweight\b",
        r"\s*$",
        "give a factor: `by 0` removes the edge, `by 2` doubles it",
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
        "name the keys: `from last token to subject token`",
        "TO",
    ),
    Hint(
        r"\battention\b",
        r"(?:to|at|onto)\b",
        "name a query and a key: `from last token to subject token`",
        "FROM",
    ),
    Hint(r"^(block|reweight)\s+$", r"", "write `{0} attention layer * from Q to K`", "ATTENTION"),
    Hint(
        r"\bfrom\s+\w+\s*$",
        r"tokens?\b",
        "here, `from` starts `from SOURCE into BASE`; to select attention edges, write "
        "`attention layer * from Q to K`",
        "INTO",
    ),
    Hint(
        r"^from\s+([\w.]+)\s*$",
        r"\s*$",
        "write `from {0} into BASE`; to set the source of a single rule, write `with {0}`",
        "INTO",
    ),
    Hint(r"^(?:from|model)\b", r"and\b", "separate names with commas", "COMMA"),
    Hint(r"\b(?:from|into|model)\s*$", r"\[", "remove the brackets around the names"),
    Hint(r"^patch\b.*\bwith\s*$", r"\s*$", "name the run that is read, such as `with fewer`"),
    Hint(
        r"^patch\b.*\bwith\s+random\s*$",
        r"\(",
        "write random targets on a separate line: `against random(39)`",
    ),
    Hint(
        r"^patch\b.*\bwith\s+python\s*$",
        r"\(",
        "`with` needs a run; to write the result of a function, use `set SITE at POSITION to "
        "python(…)`",
    ),
    Hint(r"^against\s+(\w+)\s*$", r"([0-9]+)", "write `against {0}({1})`"),
    Hint(
        r"^against\b.*\bexcept\s*$",
        r"",
        "name the targets to exclude: `except top 5 of X`",
    ),
    Hint(
        r"^against\b.*\)\s*$",
        r"(?:apart(?:\s+from)?|without|excluding|but)\b",
        "name the targets to exclude after `except`",
    ),
    Hint(
        r"^(?:patch|ablate|set|add|scale|clamp|project|freeze)\b.*[\w*]\s*$",
        r"(?:apart\s+from|without|excluding|but(?:\s+not)?)\s+(?!error)(\S.*?)\s+at\b",
        "leave sites out with `except`: `except {0}`",
    ),
    Hint(r"\b(at|onto|from|to|with)\s*$", r"\s*$", "name tokens: `{0} last token`", "TOKEN"),
    Hint(
        r"\battention\s+\w.*\s$",
        r"([A-Za-z_]\w*)\s+from\b",
        "write the group instead of layers and heads: `attention {0} from …`",
    ),
    # Selections by another experiment.
    Hint(r"\btop\s+of\s+$", r"(\w+)", "give a number: `top 3 of {0}`"),
    Hint(r"\btop\s+([\w%]+)\s+$", r"(?:in|from)\s+(\w+)", "write `top {0} of {1}`"),
    Hint(r"\btop\s+([0-9]+)\s+$", r"percent\b", "write `{0}%`"),
    Hint(
        r"\btop\s+([A-Za-z_]\w*)\s*$",
        r"%",
        "remove the percent sign: if `{0}` is a share, its values have one, as in `0%..100%`",
    ),
    Hint(
        r"\btop\s+(\S+)\s+of\s+(\w+)\s*$",
        r"",
        "add `tokens`: `top {0} of {1} tokens`",
        "TOKENS",
    ),
    Hint(r"\bbest\s+$", r"([0-9]+)\s+of\s+(\w+)", "write `top {0} of {1}`"),
    Hint(r"\bbest\s+(?!of\b)(\w+)\s+(?:at\s+)?$", r"", "write `best of {0}`"),
    Hint(
        r"^\w+\s+\w.*$",
        r"((?:top\s+\S+|best)\s+of\s+\w+)",
        "`{0}` is a complete site: remove the words before it",
    ),
    # Numbers and tokens.
    Hint(
        r"[^.\s]\s*$",
        r"[0-9]+\.[0-9]+",
        "write a share with a percent sign, such as `25%`",
        "PERCENT",
    ),
    Hint(
        r"\btokens?\s+$",
        r"[0-9.]+%",
        "only layers have a relative depth: write `token 5`, or a name such as `last token`",
    ),
    Hint(r"^split\s+$", r"([0-9]+)(?![0-9%.])", "write the percent sign: `split {0}%`", "PERCENT"),
    Hint(r"\b([0-9]+(?:\.[0-9]+)?)$", r"[x×](?!\w)", "write the number alone: `{0}`"),
    Hint(r"\b([0-9]+)$", r"_([0-9]+)(?![_0-9])", "write the number without `_`: `{0}{1}`"),
    Hint(r"\b[0-9]+$", r"_[0-9]", "write the number without `_`"),
    Hint(
        r"\btoken\s+except\s*$",
        r"",
        "write `tokens except …`, or `each token except …` for one run each",
    ),
    Hint(r"\bbetween\b", r"to\b", "write `and`: `tokens between A and B`", "AND"),
    # Numbers and places of `insert`.
    Hint(
        r"^insert\s+\w+\s+tokens?\s*$",
        r"",
        'name a place and a token: `insert 4 tokens before last token with " apple"`',
        "BEFORE",
    ),
    Hint(r"^insert\s+\w+\s*$", r"", "write `tokens` after the number", "TOKENS"),
    # Targets and values of `replace`.
    Hint(
        r"^replace\b(?!\s+block\b)",
        r"\s*$",
        'name the replacement: `with gray` in images, `with "…"` in texts',
        "WITH",
    ),
    Hint(r"^replace\b(?!\s+block\b)", r"(?:by|to|into)\b", "write `with`", "WITH"),
    # Cells in expectations.
    Hint(
        r"^expect\b.*[(,:]\s*([A-Za-z][\w-]*(?:\s+\w+)*?\s+tokens?)\s*$",
        r"[),]",
        'write a position as a quoted value of its axis: `position: "{0}"`',
    ),
    Hint(
        r"^expect\b.*[(,:]\s*([A-Za-z][\w-]*(?:\s+\w+)*?)\s*$",
        r"(tokens?)\b",
        'write a position as a quoted value of its axis: `position: "{0} {1}"`',
    ),
    Hint(
        r"^expect\b.*[(,]\s*token\s+(\w+)\s*$",
        r"[),]",
        'write a position as a quoted value of its axis: `position: "{0} token"`',
    ),
    Hint(
        r"^expect\b",
        r"at\s+(\w[^()\"]*?\btokens?)\b",
        'write a position as a value of its axis: `delta(position: "{0}")`',
    ),
    Hint(
        r"\bstep\(\s*(\w+)\s*$",
        r"(?:encoder|cross|vision|layers?|heads?)\b",
        "name only the component: `step({0})` is the step of the site after `to`",
    ),
    # Loops, reports, Python.
    Hint(
        r"^for\b.*\[[^\]]*$",
        r"step\b",
        "remove the brackets: `for k in 0%..100% step 5%`",
    ),
    Hint(r"^for\b", r"by\b", "write `step`: `for k in 0%..100% step 5%`", "STEP"),
    Hint(
        r"^report\s+(\w+)\s+of\s+(\w+)\s*$",
        r"(?:by\s+)?(\w+)\b(?!\s+by\b)",
        "write the axis first: `report {0} {2} of {1}`",
        "TO",
    ),
    Hint(
        r"^report\s+(\w+)\s+(?:of\s+)?(\w+)\s*$",
        r"(\w+)\s+by\s+(\w+)",
        "write the axes first: `report {0} {2} by {3} of {1}`",
        "TO",
    ),
    Hint(
        r"^report\s+(\w+)\s+(\w+)\s+$",
        r"(?:over\s+|per\s+|on\s+)?(?!top\b|to\b|by\b|x\b|vs\b|against\b|and\b)([a-z_]\w*)",
        "write `report {0} {1} by {2}`",
        "BY",
    ),
    Hint(r"^report\b.*\bto\s+$", r"([0-9]+)", "write `top {0}`; `to` names a file in quotes"),
    Hint(r"^report\b(?!.*\bto\s)", r'("[^"]*")', "write `to` before the file: `to {0}`"),
    Hint(r"^report\b.*\b(?:best|first|largest|limit)\s+$", r"([0-9]+)", "write `top {0}`"),
    Hint(r"^for\s+(\w+)\s*$", r"of\b|=", "write `in`: `for {0} in [0, 1, 2]`", "IN"),
    Hint(r"^template\s*$", r"\[", "to use several templates, write `template in [ … ]`"),
    Hint(
        r"^(answer|wrong|template)\s+$",
        r"(\{\w+\})",
        'put the text in quotes: `{0} " {1}"`',
    ),
    Hint(
        r"^(?:experiment|prompts|model|corrupt|group|metric|param)\s+\w+\s*$",
        r"-",
        "use only letters, digits and `_` in a name",
    ),
    Hint(
        r"^(?:experiment|prompts|images|corrupt)\s+(\w+)\s+$",
        r"(\w+)",
        "write the name as one word: `{0}_{1}`",
        "LBRACE",
    ),
    Hint(r"\b(kl|js)\($", r"\)", "name the run to compare with: `{0}(clean)`"),
    Hint(
        r"^corrupt\s*\w*\s*$",
        r"=|\s*$",
        "write `corrupt NAME {{ … }}`, with the changes between the braces",
    ),
    Hint(r"\bpython\([^\")]*$", r"", 'put the file in quotes: `python("file.py:name")`'),
    Hint(
        r'"[^"]*\{[^"}]*"\s*$',
        r"\w",
        "the text ends at this quote: define the value on a separate line, `x = …`, and use "
        "that name in the text",
    ),
    Hint(r"", r"allow\s", "write `allow attention layers * from QUERIES to KEYS`"),
    Hint(r"", r"renumber\s", "write `renumber subject tokens from 5`"),
    Hint(r"^$", r"in\s+(\w+)", "write the name first: `{0} in …`"),
    Hint(r"^$", r"python\b", "name the value: `count = python(…)`"),
    Hint(r"^$", r"apply\b", "write `set SITE at POSITION to python(…)`"),
    # Signs and words of other languages.
    Hint(r"\b([0-9]+)\s*$", r"[-:] *([0-9]+)", "a range is written `{0}..{1}`"),
    Hint(r"\b([0-9]+)\s+$", r"to +([0-9]+)\b", "a range is written `{0}..{1}`"),
    Hint(
        r"\bwindow\s+$",
        r"([0-9]+)\s+(layers?\s+\S+)",
        "write the window after its axis: `{1} window {0}`",
    ),
    Hint(
        r"\b(arg(?:max|min))\((\w+)[^=]*\)\s*!?=\s*(\w+)\s+$",
        r"([0-9]+)",
        "write a value of `for` as a cell: `{0}({1}) = {1}({2}: {3})`",
    ),
    Hint(
        r"\bexpect\b.*\((?:[^()]*,\s*)?(\w+)\s+$",
        r"([0-9]+)",
        "write the value after a colon: `{0}: {1}`",
    ),
    Hint(
        r"\b(contains)\s+$",
        r"([0-9]+)",
        "write a site, such as `{0} layer {1}`; values of `for` are cells: write "
        "`argmax(delta) = delta(NAME: {1})`, or `delta(NAME: {1}) > …`",
    ),
    Hint(
        r"\bcontains\s+(?:.*,\s*)?(\w+)\s+$",
        r"([0-9]+)",
        "write a site, such as `L{1}.{0}`; values of `for` are cells: write "
        "`argmax(delta) = delta({0}: {1})`, or `delta({0}: {1}) > …`",
    ),
    Hint(
        r"\bfit\((?:[^()]|\([^()]*\))*,\s*(\w+)\s+$",
        r"([0-9.]+%?)",
        "write a colon after an option: `{0}: {1}`",
    ),
    Hint(
        r"^measure\b.*\bas\s+\w+\s+$",
        r"[Cc][Pp][Rr]\s+over\s+(\w+)",
        "the CPR of MIB is the area under the curve: write `auc over {0}`",
    ),
    Hint(
        r"^measure\b.*\bas\s+\w+\s+$",
        r"[Cc][Mm][Dd]\s+over\s+(\w+)",
        "write the CMD of MIB as `expect cmd(faithfulness, {0}) < 0.5`",
    ),
    Hint(r"^discover\s+over\b", r"", "name the circuit: `discover c over heads, mlps using …`"),
    Hint(
        r"^discover\b.*\bover\s+(\w+)\s+$",
        r"(?:and|\+|&)\s*(\w+)",
        "write a comma: `over {0}, {1}`",
    ),
    Hint(
        r"^observe\s+\w*lens\b.*\bat\b.*$",
        r"to(?:ward)?\b",
        "a lens is read by measures: leave out the target, and add `measure logit(answer) as raw`",
    ),
    Hint(
        r"^discover\b(?:(?!\bat\b).)*$",
        r"at\b",
        "write positions after the nodes: `over heads, mlps at last token using …`",
    ),
    Hint(r"^discover\b.*\btop\s+(\w+)\s*$", r"$", "write `top {0} edges`"),
    Hint(r"^(?:circuit|path)\b", r"(?:=+>|→|⇒)", "write `->` between sender and receiver"),
    Hint(
        r"^circuit\s+(\w+)\s*=\s*fit\(.*\)\s*at\b.*$",
        r"heads?\b",
        "a circuit chooses edges at positions; to choose sites, write `group {0} = fit(…) at …`",
    ),
    Hint(
        r"\b(?!(?:layer|head|neuron|expert)s?\b)([a-z]\w*)\s+$",
        r"([0-9]+|\*)",
        "name the axis: `{0} layer {1}`",
        "LAYER",
    ),
    Hint(r"^circuit\s+\w+\s*=\s*saved\s*$", r"", 'write `saved("circuit.json")`'),
    Hint(
        r"^circuit\s+\w+\s*=\s*fit\s*$",
        r"",
        "write `fit(eap(size: 12), prompts: fruit, with: mean, maximise: logprob(answer))`",
    ),
    Hint(r"", r"to\b", "write `onto` to name where the activation is written", "ONTO"),
    Hint(r"", r"to\b", "write `into`: `from SOURCE into BASE`", "INTO"),
    Hint(r"", r"(?:x|×|vs|against|and|,)(?!\w)", "write `by`: `heatmap layer by head`", "BY"),
    Hint(r"\([^()]*\b([a-z_]+)\s*$", r"=(?!=)", "write a colon after an option: `{0}: …`"),
    Hint(
        r"\{[^}]*\btokens?\s+$",
        r"\w",
        "separate positions with commas: `{{first token, last token}}`",
        "COMMA",
    ),
    Hint(
        r"\b(?:at|to|from|onto|with)\s+\{\s*[\w-]+\s*$",
        r",",
        "repeat `token` for each position: `{{first token, last token}}`",
        "TOKEN",
    ),
    Hint(r"^prompts\b.*\bwith\s", r"", "write `prompts p with replies of NAME`", "REPLIES"),
    Hint(r"^prompts\b.*\breplies\s", r"", "write `prompts p with replies of NAME`", "OF"),
    Hint(
        r"^prompts\b.*\breplies\b.*$",
        r"limit\b",
        "write `limit` first: `prompts p limit 8 with replies of NAME`",
    ),
    Hint(
        r"^report\s+(\w+).*\b(top\s+[0-9]+)\s*$",
        r"of\s+([\w.]+)",
        "write `of` first: `report {0} of {2} {1}`",
    ),
    Hint(
        r'^report\b.*\bto\s+".*"\s*$',
        r"(?:width|columns?)\b",
        "write `width 1 column` or `width 2 columns`",
    ),
    Hint(
        r"^$",
        r"run\s+(\w+)\s*\{",
        "write `corrupt {0} {{ … }}` to change the text; a `run` with rules belongs in an "
        "experiment",
    ),
    Hint(
        r"\b(?:mean_difference|mean|pca|probe)\([^()]*$",
        r"(?:at|layers?|heads?|token)\b",
        "write the rows in parentheses, then the site and position: `mean_difference(A, B) at "
        "resid_post layer 2 at last token`",
    ),
    Hint(
        r"",
        r"(?:dimensions?|coord(?:inate)?s?|indices|index)\s+([0-9]\S*)",
        "write `dim {0}`, or `dims {0}` to change several numbers together",
        "DIM",
    ),
    Hint(
        r"\bdims?\s+(\S+)\s*$",
        r"((?:layer|head)s?)\s+(\S+)",
        "write `dims` after the layer and the head: `resid_post {1} {2} dims {0}`",
    ),
    Hint(
        r"^project\s+(\w+)\s*$",
        r"from\b",
        "write `project out {0} from SITE at POSITIONS` to remove a direction, or `project SITE at "
        "POSITIONS onto {0}` to keep only it",
    ),
    Hint(r"^project\b.*\bonto\s*$", r"", "name a direction of the file: `onto d`"),
    Hint(
        r"^save\s+direction\s+(\w+)\s*$",
        r"\(([^()]*)\)?",
        "name the direction first: `direction e = {0}({1})`, then `save direction e to …`",
    ),
    Hint(
        r"^save\s+(\w+)\s*$",
        r"to\b",
        "write `save direction {0} to …` for a direction, and a site and position for activations: "
        "`save resid_post layer 3 at last token to …`",
    ),
    Hint(
        r"^(?:using\s+verify\s*$|$)",
        r"(?:verify\s+)?((?:top|random)\s+[0-9]+(?:,\s*(?:top|random)\s+[0-9]+)*)",
        "name the estimator first: `using gradient_input verify {0}`",
    ),
    Hint(
        r"^circuit\b[\s\S]*[=,]\s*([^=,>]+?)\s*->[^,>]*,\s*([^=,>]+?)\s*$",
        r"\s*(?:,|$)",
        "write both ends of each edge: `{0} -> {1}`",
    ),
    Hint(r"^measure\b", r"", "name the effect: `as recovery`, `as delta` or `as raw`", "AS"),
    Hint(
        r"^discover\b[\s\S]*\bover\b[^=]*$",
        r"(?:vision|text|encoder|decoder|cross)\b",
        "name the nodes alone, of all stacks of the circuit: `over heads, mlps`",
    ),
    Hint(
        r"\b(?:ablate|patch|freeze|scale|clamp|project)\s+(neurons?\s+[\w.*]+)\s+$",
        r"(vision|text|encoder|decoder)\b",
        "name the site before its stack: `mlp_hidden {1} layer 1 {0}`",
    ),
    Hint(
        r"\b([a-z]\w*)\s+(vision|encoder|cross)$",
        r"\.\s*(?:layers?\b)?",
        "separate words with spaces: `{0} {1} layer 1`",
    ),
    Hint(
        r"\b([a-z]\w*)\s+((?:layers?|heads?|neurons?)\s[^=,]*?)\s*$",
        r"(vision|text|encoder|decoder|cross)\b",
        "write the stack before the axes: `{0} {2} {1}`",
    ),
    Hint(
        r"\b(embed|final_norm)\s+\w+\s*$",
        r"at\b",
        "write `{0}` alone, or a stack after it: `{0} vision`, `{0} encoder`",
    ),
    Hint(
        r"^circuit\b.*=\s*fit\(.*\)\s+at\s+vision\s*$",
        r"",
        "list the edges of the vision encoder; `fit` chooses edges of the language model only",
    ),
    Hint(
        r"\bL([0-9]+)H([0-9]+)\s+$",
        r"(vision|encoder|decoder)\b",
        "write the site of the head: `z {2} layer {0} head {1}`",
    ),
    Hint(
        r"(?:^|\{)\s*\w+\s*=\s*[\w.]+\s*$",
        r",\s*\w+\s*=",
        "write one assignment per line",
    ),
    Hint(
        r"\b(?:at|onto|from|to)\s+(?!last\b|first\b|each\b|token)(\w+)\s*$",
        r"(?:with\b|by\b|to\b|onto\b|from\b|$)",
        "name its tokens: `{0} tokens`, or `each token of {0}` for one cell per token",
        "TOKENS",
    ),
    Hint(
        r"^(?:patch|ablate|freeze|scale|clamp|path|set|swap)\b",
        r"",
        "give the rule a position, such as `at last token`",
        "AT",
    ),
    Hint(r"^ablate\b", r"", "name the replacement: `with mean` or `with zero`", "WITH"),
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
            return known.text.format(*groups)
    return None
