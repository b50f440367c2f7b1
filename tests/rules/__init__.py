"""Tests of transplants, attention edits and path patching against reference implementations."""
