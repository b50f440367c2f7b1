"""Experiments with every site, layer, position and text as numbers, without weights.

In: a `spec.Experiment`, the shape of its model and its prompt table. Out: a `ResolvedExperiment`.
Imports prompts, models and below.
"""
