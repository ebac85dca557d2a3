"""The command line, one module per verb.

In: arguments as typed. Out: artifacts and a printed summary, or one clear sentence.
"""
