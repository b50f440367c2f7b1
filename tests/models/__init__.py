"""Tests of models: anatomy, hooks, loading."""
