"""From the typed program to experiments in which everything is concrete, without weights.

In: a `spec.Experiment`, its model's shape and its prompt table. Out: a `ResolvedExperiment` whose
sites, layers, positions and texts are numbers. Imports prompts and below.
"""
