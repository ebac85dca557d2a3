"""The quick start: an embedded base model and data, controls of the same sizes, and the table.

In: the embedded assets. Out: selections, fits and a table of what each model has learnt.
"""
