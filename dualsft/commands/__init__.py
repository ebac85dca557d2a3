"""The command line, one module a verb.

In: arguments as typed. Out: artifacts and a printed summary, or one clear sentence.
"""
