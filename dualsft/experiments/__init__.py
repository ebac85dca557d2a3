"""Experiments: many small selections and fits, kept and reused, and what they say about a selection.

In: jobs, made from the ordinary configuration. Out: their results, each done once; statistics of them.
"""
