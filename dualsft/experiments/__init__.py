"""Experiments: many restricted fine-tunes, kept and reused, and what they say of a selection.

In: a selection, and variants of it. Out: their measured gains, beside the predicted ones, with intervals.
"""
