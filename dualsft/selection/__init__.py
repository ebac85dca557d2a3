"""Selection: `dualsft select`, the method step by step in `run.py`.

In: a base model, a pool, validation sets and `SelectionSettings`. Out: a selection directory: scores of all examples
and weights, the chosen examples, the mask, and a manifest.
"""

from dualsft.selection.artifact import Selection, load_selection
from dualsft.selection.warmup import Warmup

__all__ = ["Selection", "Warmup", "load_selection"]
