"""From the graph to rows of integers, and what of them need not be computed.

In: the graph. Out: a `Plan`: panels, rows, what each planner pass leaves out, what the rest costs.
Imports graph and below; numpy, no torch.
"""
