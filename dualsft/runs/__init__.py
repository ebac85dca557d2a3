"""What a run keeps, nothing of the method.

In: an output folder, and the state of phases under way. Out: the same state after a kill, and what each
phase cost.
"""
