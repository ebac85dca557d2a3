"""Choose what to train on and what to train: exact data and parameter selection for fine-tuning language models.

1. `data` turns records into text with supervised spans, examples and batches.
2. `models` loads the base model; `sharding` splits it over processes.
3. `objectives` holds the loss l_i of one example and the terms of V(θ), the validation objective.
4. `scorers` choose a direction u, `paths` where it is taken; `matrix` sums rows and columns of M_ij = g_ij u_j.
5. `allocators` choose weights and examples by these sums, under a budget for each.
6. `selection` runs 1 to 5 and writes a selection directory; `finetune` trains the selected weights by `training`.
7. `export` turns base and change into checkpoints and adapters; `evaluation` measures any checkpoint.
8. `commands` and `cli` are the command line; `runs` keeps the state from which an interrupted run resumes.

The public names below are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualsft.allocators import DataAllocator, ParameterAllocator, ScoredExamples, ScoredParameters
    from dualsft.data.examples import load_examples
    from dualsft.data.module import InstructionDataModule
    from dualsft.errors import UserError
    from dualsft.finetune import MaskedFinetuneModule
    from dualsft.objectives import Objective
    from dualsft.paths import PathTraining, Piece, PieceRows, ScoringPath
    from dualsft.scorers import ParameterStatistics, Scorer, SecondOrderScorer
    from dualsft.selection import load_selection
    from dualsft.selection.module import SelectionModule

__all__ = [
    "DataAllocator",
    "InstructionDataModule",
    "MaskedFinetuneModule",
    "Objective",
    "ParameterAllocator",
    "ParameterStatistics",
    "PathTraining",
    "Piece",
    "PieceRows",
    "ScoredExamples",
    "ScoredParameters",
    "Scorer",
    "ScoringPath",
    "SecondOrderScorer",
    "SelectionModule",
    "UserError",
    "load_examples",
    "load_selection",
]

_MODULES = {
    "allocators": ("DataAllocator", "ParameterAllocator", "ScoredExamples", "ScoredParameters"),
    "data.examples": ("load_examples",),
    "data.module": ("InstructionDataModule",),
    "errors": ("UserError",),
    "finetune": ("MaskedFinetuneModule",),
    "objectives": ("Objective",),
    "paths": ("PathTraining", "Piece", "PieceRows", "ScoringPath"),
    "scorers": ("ParameterStatistics", "Scorer", "SecondOrderScorer"),
    "selection": ("load_selection",),
    "selection.module": ("SelectionModule",),
}
"""Module -> the public names that it defines."""


def __getattr__(name: str) -> Any:
    """Import a public name from where it is defined (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, whether they have been imported or not."""
    return sorted({*globals(), *__all__})
