"""Choose what to train on and what to train: exact data and parameter selection for fine-tuning language models."""

from dualsft.allocators import DataAllocator, ParameterAllocator
from dualsft.data import InstructionDataModule, load_examples
from dualsft.finetune import MaskedFinetuneModule
from dualsft.scorers import Scorer
from dualsft.selection import SelectionModule, load_selection

__all__ = [
    "DataAllocator",
    "InstructionDataModule",
    "MaskedFinetuneModule",
    "ParameterAllocator",
    "Scorer",
    "SelectionModule",
    "load_examples",
    "load_selection",
]
