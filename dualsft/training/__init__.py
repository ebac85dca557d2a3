"""Training of chosen weights with compact state.

In: a model and a mask. Out: parameters that any torch optimizer takes.
"""
