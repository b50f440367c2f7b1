"""The intervention graph: small frozen nodes, edges are data dependencies.

In: resolved experiments. Out: one graph for a file, and an equal one with less work. Imports
resolve and below; networkx.
"""
