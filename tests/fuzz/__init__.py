"""Fuzzers: broken input ends in success or in one sentence, whatever it is.

In: sound input of one kind, and changes to it that know its structure. Out: the first case, made as small as possible,
that ends in anything but success or a `UserError` of one short line. ``python -m tests.fuzz NAME --cases N`` runs one.
"""
