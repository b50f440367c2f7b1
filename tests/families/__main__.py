"""Compare the architectures of the tables: `python -m tests.families [NAME…] [--write]`.

Prints a line for each architecture; `--write` writes the results to `docs/models.md`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch

from mechdsl.images.layouts import IMAGE_LAYOUTS

from . import tables
from .parts import Architecture, Refused
from .unlisted import written_section
from .walk import DIFFERENCE, EFFECT_ERROR, KINDS, SMALLEST, Walked, layers_in_words, walk

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PROCESSES = 2

INTRO = """\
# Supported models

Use this page to look up whether mechdsl supports an architecture of the transformers library, and
which sites it offers. The name is the `model_type` in the model's `config.json`. Architectures that
aren't listed may load too: mechdsl analyses the modules of a model, and rejects the model if its
checks fail.

| column | meaning |
| --- | --- |
| sites | `all`, or the sites that mechdsl doesn't offer although the architecture has them |
| edges | whether `q_rot`, `k_rot`, `scores`, `pattern` and attention rules are available |
| planner passes | `all`, or why every row needs a full forward pass |
| checks | number of comparisons with the reference |
| largest difference | largest error of outputs and reads, relative to the largest output |
"""

IMAGE_TOKENS = """\
## Image tokens

For these model types, mechdsl knows which part of an image each image token of a prompt reads: its
row and column, its tile, and its pixels in the original image. Resizing, cropping, padding, tiles
and merged patches are included (`mechdsl/images/layouts.py`). Tests compare the layouts with arrays
worked out manually, and with models in which a changed pixel changes only the vectors that read it.

The processors of `internvl`, `llava_onevision`, `qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`, `smolvlm` and
`video_llava` also prepare videos, so transformers loads them only if torchvision is installed
(`pip install "mechdsl[video]"`). Their image processors are then other classes, whose pixels may
differ; the conventions name the class. The processor of `smolvlm` also needs num2words.

The video processors of `video_llava`, `llava_onevision`, `smolvlm`, `internvl` and the Qwen models
read the frames of a `video` line together:

- All frames are read: mechdsl turns the processor's sampling of frames off. They have one size.
- `video_llava` reads each frame as an image with a class token. `llava_onevision` pools 2 x 2
  tokens of each frame, and one token follows the last frame.
- The Qwen models merge two frames, so `frame 1` is the first two, and the last frame of an odd
  number counts twice. Frames are 0.5 s apart, as their processors sample videos: position ids of
  `qwen2_5_vl` and the times that `qwen3_vl` writes before each pair depend on it.
- `smolvlm` and `internvl` read each frame as an image without tiles, after its time ("Frame from
  00:01:") or number ("Frame2:"). These texts are tokens of the prompt, but not of the frames.
- `smolvlm` also writes the number of frames and the time of the last one before the first frame.
  The times depend on `fps` of its video processor; without it, frames are 0.5 s apart. Images and
  videos in one prompt are E0459.
- Videos of one prompt may have different numbers of frames. Only the processors of Qwen models
  prepare them together; with others, each video has the same tokens and vectors as in a prompt
  without other videos.
- In chats, a video is written where the template writes an image. Its tokens are those around a
  video without a chat: `qwen3_vl` has start and end tokens only around each pair. `smolvlm` has
  another chat template for videos, from its processor's class.

Prompts of files contain images of all of these types; those of `vision-encoder-decoder` contain
nothing else ([load-models.md](load-models.md#experiment-on-the-reader-of-an-image)). In `mllama`,
blocks of the language model attend to the image
([load-models.md](load-models.md#experiment-on-blocks-that-attend-to-an-image)). Prompts of
`whisper` contain one sound ([load-models.md](load-models.md#experiment-on-the-reader-of-a-sound)).
Some models also treat images in other ways than by reading their vectors:

- Position ids of image tokens are rows and columns in `qwen2_vl`, `qwen2_5_vl` and `qwen3_vl`.
  There, `renumber` gives a token one number for frame, row and column; other tokens keep theirs.
  mechdsl puts the start and end tokens of these models around each image, so a template contains
  only `{photo}`.
- `qwen3_vl` adds vectors of images to the stream after its first blocks, outside their outputs. At
  tokens of images, `resid_pre` of the next block contains them and `resid_post` doesn't. Rows with
  images are full forward passes.
- Tokens of an image attend to each other in both directions in `gemma3`. The line breaks that its
  processor writes around an image are part of the prompt. With pan and scan, images that it crops
  are E0459.
- Without other images in its prompt, an image has a thumbnail and tiles in `llava_onevision`. With
  others, each image is padded to a square and has neither; videos don't count. The conventions
  name the form. One image can have both forms in a file, in prompts of two blocks.
- All tokens of a prompt with an image attend to each other in `paligemma`, and tokens of answers
  and replies attend to earlier ones. Its processor puts the beginning-of-sequence token after the
  last image, and so does mechdsl. It also ends each prompt with a line break, so a template ends
  with `\\n`. Other line breaks in it are E0459. Without an image, each token attends to itself and
  earlier ones, which the conventions of a run report. In transformers, tokens of such a prompt
  attend to each other unless the model gets `token_type_ids` of 1.

Rules in the vision encoder (`patch resid_post vision layer 4 at photo row 2 col 3 token`) act on
all patches that the vector of an image token is made from:

- one patch in `llava`, `vipllava`, `paligemma`, `video_llava` (of the encoder of images or of that
  of videos), and in the tiles and thumbnails of `llava_next`.
- the patches that the model merges into a token, row by row: 2 x 2 in `internvl`, `idefics3`,
  `smolvlm` and the Qwen models (of two frames, in a video), and 4 x 4 in `gemma3`. Numbers depend
  on the config.

`patch`, `swap` and means pair the patches of two tokens in this order. `add` adds its vector to
each patch, and `observe norm` and `observe value` are means over the patches. `observe similarity`,
`cka`, `rank`, `effective_rank` and `clusters` read the means over the patches of tokens. Such means
are the vectors from which a direction, a basis or a probe is computed. `fit(sae(…))`, `transcoder`
(of `mlp_out vision`), `nmf`, `semi_nmf`, `ica` and `mixture` read each patch instead, and rules
`in basis b` or on features of `b` act on each patch. `observe features of b` encodes each patch,
and its values are means over the patches of a position; `density` is the share of patches.
Trainings on a measure also edit each patch: `das`, `vector`, `reft`, `scales`, and groups that
`fit` chooses from heads, neurons, dimensions or positions. Class tokens, row ends and tile tags
have no patch (E0310). In `qwen3_vl`, the vectors that the model adds after its first blocks change
too. A value that is read in the encoder and written in the language model
(`value(resid_post vision layer 4)`), or the reverse, needs a model with one patch for each token;
others are E0108.

`replace block vision layer 4 with identity` skips a block for all images of a row, with all of
their patches, class tokens and tiles. `with block vision layer 3` runs another block in its place.
In `qwen2_5_vl`, both blocks must attend to whole images, or both within windows.

`path z vision layer 2 head 0 -> q vision layer 4 head * at photo tokens` patches a path between two
sites of the encoder. All heads and MLPs of the encoder are held at the base run while the receivers
read the changed stream at each patch. Then the receivers are written into the base run, and the
rest of the encoder, the projector and the language model are recomputed. A path can't lead from the
encoder to the language model (E0335).

`circuit c = embed vision -> q vision layer 0 head 1, z vision layer 0 head 1 -> embed` names edges
of the encoder. `ablate all but c at photo tokens with zero` ablates all other edges of the encoder
at the patches of these tokens. `embed vision` is the stream that enters the first block. The
receiver `embed` is the projector, which reads the stream after the last block, or after the block
that `vision_feature_layer` names. In `vipllava` and `qwen3_vl`, the language model reads the
encoder after several blocks, and an edge to `embed` is an edge to each read after its sender. The
projector and the language model are then computed as usual. Edges at class tokens, and at patches
that belong to no token, are never ablated. `observe overlap` and `observe edge_auroc` compare two
circuits of the encoder; for `edge_auroc`, the first one must be read from a file with scores of all
edges. Edges at positions, and neurons and features as nodes, are E0108 there.

`circuit c = fit(eap(size: 20), prompts: ask, from: changed, maximise: logit(answer), stack: vision)
at photo tokens` chooses edges of the encoder by their scores; `eap_ig`, `eap_ig_activations`,
`relp`, `gim`, searches such as `acdc` and `mask` do so, too. In an experiment, `discover c over
vision at photo tokens using eap top 20 edges` chooses and tests them. Values are those at the
patches of these tokens, which are also where `eap_ig` moves them. Rows that measure the circuit
must have other images than the training rows, in their corruptions, too (E0345). `atp_qk` and
`atp_star` are E0608 in the encoder.

Attention in the encoder is between patches: `block attention vision layer 4 from photo tokens to
photo row 2 col 3 token`, `reweight` and `set attention vision` change it. The edges are those
between all patches of the queries and of the keys; a weight in `set … to 0.02` is that of each
patch. `observe attention vision` is the total weight on the patches of the keys, averaged over
those of the query. Patches attend to those of their tile or image, and to class tokens, which no
position names. In `qwen2_5_vl`, most blocks have windows, and in videos, each frame (or pair of
merged frames) attends to itself. Rules whose keys are all in other tiles or images than the queries
are E0332; other keys that a patch doesn't see have a weight of 0, which no rule changes. A patch
whose keys are all blocked attends to nothing. In `mllama`, patches attend to those of all tiles, to
class tokens and to padding. `by value_norm` is E0108, and estimates are E0608.

`allow attention vision layer 4 from photo tile 2 tokens to photo tile 3 tokens` lets patches attend
to those of other tiles, windows or frames of the same image or video, with the model's scores. Keys
that all queries see are E0332, and keys in another image are E0108: images are encoded separately.
In `mllama`, patches already see those of all tiles.

`scores vision` and `pattern vision` have a vector for each patch, over all tokens that the encoder
has for the image, also class tokens. `patch`, `swap` and `resample` copy such vectors between
images with equal rows and columns of patches in all tiles; other images, means and `save` are
E0108. `observe entropy` includes the weights on class tokens. `observe distance` is the mean over
the attention to patches of the same tile, in patches between their centres. `observe received` is
the mean over the other tokens of the tile as queries, without class tokens. All three are means
over the patches of a token. In `mllama`, vectors over keys and `entropy` include the padding after
each tile, and `distance` and `received` count the patches of all tiles. `q_rot vision` and `k_rot
vision` are the queries and keys after rotation; encoders that don't rotate have the values of `q`
and `k` there.

The resampler of `idefics2` reads all patches of a tile for each token. In the language model, its
tokens have no rows and columns (E0310). In the encoder, positions are patches:
`scale z vision layer 4 at photo row 2 col 3 token by 0` acts on one patch, and
`photo thumbnail tokens` and `photo tile 3 tokens` are all patches of a view. Without a view, rows
and columns count over the four tiles; if the tiles of a row or column differ in size, name a tile
(E0310). `photo tokens` are all patches of an image and of its tiles, and `each token of photo` is
one patch per cell. Positions that count tokens, such as `token 5`, are E0108. Rules that copy or
average patches pair them in this order, so both images need the same number of patches (E0307), and
whole images the same rows and columns (E0108). `observe similarity` compares patches, and bases are
computed from single patches; the row of a direction or probe is the mean over its patches. `using
gim` also changes derivatives of the resampler's attention.

`llava_onevision` interpolates the patches of each frame, and those of large images, to fewer
tokens. In the encoder, its positions are patches too, as in `idefics2`: a frame of 27 x 27 patches
has 14 x 14 tokens, and `frame 2 row 27 col 3 token` names a patch at sites of `vision`. At sites of
the language model, the same position counts rows of tokens. `photo row 2 col 3 token` is a patch of
the tiles without padding, and `photo thumbnail row 2 col 3 token` one of the thumbnail. An image
that isn't interpolated has the same rows and columns in both. `using gim` is available.

The encoder of `mllama` has local blocks, then global ones. They count as one stack: with 32 local
and 8 global blocks, `vision layer 0..31` are local and `vision layer 32..39` global. The norm and
the positions of tiles between the two are part of neither. `attn_out` and `mlp_out` of global
blocks include their gates. Tokens of all tiles attend to each other. Blocks of `cross` read the
last block and some local ones, so rules in the encoder change `k cross` and `v cross`. Padding
tiles have no tokens.

Before such a rule, mechdsl tests the patches of each new arrangement of tiles and rows: it changes
the patches of some tokens after the last block that the language model reads, and only the vectors
of these tokens may change. For the first arrangement, the sets of tokens are those with equal
binary digits of their indices, so each patch is assigned to its token. For later ones with more
than 16 tokens, they are two random halves.

The tokens of an image, by model type:
"""

METHOD = f"""\
## How architectures are tested

For each architecture, the tests build a tiny model with large random weights. A manually written
table, derived from the modeling file, gives the location of every site
(`tests/families/rows_*.py`). A reference that shares no code with mechdsl uses the table with plain
hooks, on one unpadded prompt at a time.

mechdsl receives prompts of different lengths in one padded batch, with padding on both sides if
the model allows it. The tests read every site, patch it from other prompts and ablate it, in every
layer of every stack. If the planner's passes apply, the tests also run rows that compute only what
changes. Such a pass covers all sites and layers, and returns the outputs of all tokens or of one.

Outputs and reads may differ by {DIFFERENCE:.0e} of the largest output (at least 1). Effects on a
logit difference may differ by {EFFECT_ERROR:.0e} of the effect. Every write must change the output
by at least {SMALLEST:.0e}. Architectures in which rounding is visible are compared in float64 and
marked.

Edges are available if attention, recomputed from its queries, keys, values and masks, matches the
model in every block. `tests/rules` compares rules on edges with a reference. Comments in these
tables list further sites that an architecture could have.

`make families` runs all tests and builds this page. `python -m tests.families NAME…` tests some
architectures.
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all by default")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args(arguments)
    rows = {row.name: row for row in tables.every()}
    if unknown := [name for name in given.names if name not in rows]:
        parser.error(f"not in the tables: {', '.join(unknown)}")
    if given.write and given.names:
        parser.error("the page is about all architectures; leave the names out")
    found: list[Walked] = []
    for walked in walks(given.names or list(rows)):
        found.append(walked)
        print(line(walked, rows[walked.name]), flush=True)
    if given.write:
        PAGE.write_text(page(found, rows), encoding="utf-8")
    return int(any(walked.wrong() for walked in found))


def walks(names: Sequence[str]) -> Iterator[Walked]:
    """Results in the order of `names`, computed in parallel."""
    if len(names) == 1:
        prepare()
        yield one(names[0])
        return
    with ProcessPoolExecutor(PROCESSES, initializer=prepare) as pool:
        yield from pool.map(one, names)


def prepare() -> None:
    """Use one thread per process, and silence the library's messages about kernels."""
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()


def one(name: str) -> Walked:
    return walk(next(row for row in tables.every() if row.name == name))


def line(walked: Walked, row: Architecture | Refused) -> str:
    """The printed line of one architecture."""
    if walked.refused:
        said = f"refused: {walked.refused}"
    else:
        said = (
            f"{walked.spots} sites, {walked.checks} checks, {', '.join(walked.sides)}, "
            f"{walked.precision}, off by {walked.difference:.0e}, "
            f"effects {walked.effect_error:.0e}, smallest {walked.smallest:.0e}"
        )
        if walked.whole:
            said += f"; full passes only: {walked.whole}"
    more = [f"    {text}" for text in (*sites_left(walked, row), *walked.wrong())]
    return "\n".join([f"{walked.name} ({walked.seconds:.0f} s): {said}", *more])


def sites_left(walked: Walked, row: Architecture | Refused) -> list[str]:
    """Sites that only the table has, and sites that only the package has."""
    if isinstance(row, Refused) or walked.refused:
        return []
    counts = {"": row.main.count} | {name: stack.count for name, stack in row.others.items()}
    return [
        f"{what}: {layers_in_words(spots, counts)}"
        for what, spots in (("without", walked.missing), ("not in the table", walked.extra))
        if spots
    ]


# --- the page -----------------------------------------------------------------------------------


def page(found: Sequence[Walked], rows: Mapping[str, Architecture | Refused]) -> str:
    taken = [walked for walked in found if not walked.refused]
    by_kind = {kind: [walked for walked in taken if walked.kind == kind] for kind in KINDS}
    whole = sum(bool(walked.whole) for walked in taken)
    *most, last = (f"{len(each)} {kind}" for kind, each in by_kind.items())
    refused = [walked for walked in found if walked.refused]
    opened = sum(walked.opened for walked in taken)
    parts = [
        INTRO,
        f"The page lists {', '.join(most)} and {last}. Of these {len(taken)}, {whole} need full "
        f"forward passes, and {opened} support rules on attention edges. mechdsl "
        f"rejects {len(refused)} more. A suffix after `/` marks a variant of an architecture. "
        f"Tested with torch {version('torch')} and transformers {version('transformers')}.\n",
    ]
    head = ("architecture", "sites", "edges", "planner passes", "checks", "largest difference")
    for kind, each in by_kind.items():
        body = [cells(walked, rows[walked.name]) for walked in each]
        parts.append(f"## {kind.capitalize()}\n\n{table(head, body)}")
    reasons = [(f"`{walked.name}`", reason(walked.refused)) for walked in refused]
    parts.append(image_tokens())
    parts.append(f"## Rejected architectures\n\n{table(('architecture', 'reason'), reasons)}")
    parts += [written_section(), METHOD]
    return "\n".join(parts)


def image_tokens() -> str:
    """The section about layouts of image tokens."""
    names: dict[str, list[str]] = {}
    for name, entry in IMAGE_LAYOUTS.items():
        names.setdefault(entry.documentation, []).append(f"`{name}`")
    lines = (f"- {', '.join(each)}: {said}.\n" for said, each in names.items())
    return f"{IMAGE_TOKENS}\n{''.join(lines)}"


def cells(walked: Walked, row: Architecture | Refused) -> tuple[str, ...]:
    difference = f"{walked.difference:.0e}"
    if walked.precision != "float32":
        difference += f" ({walked.precision}; {walked.single:.0e} in float32)"
    return (
        f"`{walked.name}`",
        "; ".join(sites_left(walked, row)) or "all",
        "yes" if walked.opened else "no",
        f"full passes only: {reason(walked.whole)}" if walked.whole else "all",
        str(walked.checks),
        "; ".join([difference, *walked.wrong()]),
    )


def reason(text: str) -> str:
    """A message for a cell, without the model's name."""
    return re.sub(r"^`m` (\(\w+\):? ?)?", "", text).replace("|", "\\|").replace("\n", " ")


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(each)} |\n" for each in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
