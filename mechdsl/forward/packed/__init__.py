"""Patched rows side by side without padding: only what changes is computed.

In: rows with their writes, and the activation cache of unpatched runs. Out: what was read, and
logits. Imports hooks and below; torch.
"""
