"""What the package is held to, on one unpadded prompt at a time; nothing in here comes from it.

Copies of the prompt may stand side by side, each with changes of its own: of equal length they need
no padding, and nothing passes from one to another.

Two references, since each can what the other can't; `test_reference.py` holds them to each other:

- `forward`: forward passes of a few families written out, attention included. Any vectors of any
  sites may be written at once, also inside attention (rotated queries, scores, pattern), and edges
  of attention edited. A family costs a class.
- `hooks`: plain hooks on the bare model, put where a table says (`tests/families`). Every
  architecture of the model library costs a row, and attention stays the library's own; one site of
  one layer is written in a pass.
"""
