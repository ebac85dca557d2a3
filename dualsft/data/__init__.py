"""Instruction data.

In: files, folders or hub data sets of records. Out: text with supervised spans, encoded examples, and batches of them.
"""
