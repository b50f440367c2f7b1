"""What people write by habit about images and their maps, and what the language has for it."""

from __future__ import annotations

from mechdsl.syntax.mistakes.hint import Hint

IMAGES: tuple[Hint, ...] = (
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
