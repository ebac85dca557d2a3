"""Selection: the phases from a base model and a pool to a selection directory."""

from dualsft.selection.artifact import Selection, load_selection
from dualsft.selection.module import SelectionModule
from dualsft.selection.warmup import Warmup

__all__ = ["Selection", "SelectionModule", "Warmup", "load_selection"]
