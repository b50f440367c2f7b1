"""Everything drawn or printed: reports, the graph, the plan, prompts, anatomy.

In: results, plans, graphs, prompt tables. Out: text for the terminal, or files. Imports results and
below.
"""
