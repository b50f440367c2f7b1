"""Reference implementations, on one unpadded prompt at a time; nothing here uses the package.

A batch may have copies of the prompt, each with separate changes: with equal lengths they need no
padding, and nothing passes between them.

There are two references with different coverage; `test_reference.py` compares them:

- `forward`: forward passes of a few families written out, attention included. Any vectors of any
  sites may be written at once, also inside attention (rotated queries, scores, pattern), and edges
  of attention edited. A family needs one class.
- `hooks`: plain hooks on the bare model, put where a table says (`tests/families`). Every
  architecture of the model library costs a row, and attention stays the library's own; one site of
  one layer is written in a pass.
"""
