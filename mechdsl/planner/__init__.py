"""The plan of a file: its intervention graph, its rows as integers, and the passes that save work.

In: resolved experiments. Out: the intervention graph, and a `Plan`: panels, rows, savings of each
planner pass, cost. Imports resolve and below; numpy and networkx, no torch.
"""
