"""The files, phases and costs of a run, independent of the method.

In: an output folder, and the state of phases in progress. Out: the same state after a kill, and each phase's cost.
"""
