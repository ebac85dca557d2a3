"""Plans: what a selection or a fit will hold in memory, keep on disk and compute, before anything is loaded.

In: a model's configuration and the settings of `select` or `fit`. Out: bytes and operations of each phase.
"""
