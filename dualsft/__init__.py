"""Choose what to train on and what to train: exact data and parameter selection for fine-tuning language models."""

from dualsft.allocators import DataAllocator, ParameterAllocator, ScoredExamples, ScoredParameters
from dualsft.data import InstructionDataModule, load_examples
from dualsft.errors import UserError
from dualsft.finetune import MaskedFinetuneModule
from dualsft.objectives import Objective
from dualsft.scorers import ParameterStatistics, Scorer, SecondOrderScorer
from dualsft.selection import SelectionModule, load_selection

__all__ = [
    "DataAllocator",
    "InstructionDataModule",
    "MaskedFinetuneModule",
    "Objective",
    "ParameterAllocator",
    "ParameterStatistics",
    "ScoredExamples",
    "ScoredParameters",
    "Scorer",
    "SecondOrderScorer",
    "SelectionModule",
    "UserError",
    "load_examples",
    "load_selection",
]
