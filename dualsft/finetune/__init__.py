"""Masked fine-tuning: `dualsft fit`.

In: a base model, a selection (or none, to train everything) and its data. Out: ``model/``, ``delta.safetensors``, and
the report of the fit.
"""

from dualsft.finetune.checkpointing import EndOfTraining, RecentCheckpoint, best_checkpoint
from dualsft.finetune.export_callback import ExportModel
from dualsft.finetune.fit_report import FitReport, report
from dualsft.finetune.module import MaskedFinetuneModule
from dualsft.finetune.prior import TrainingPrior
from dualsft.finetune.trainer_checks import check_trainer

__all__ = [
    "EndOfTraining",
    "ExportModel",
    "FitReport",
    "MaskedFinetuneModule",
    "RecentCheckpoint",
    "TrainingPrior",
    "best_checkpoint",
    "check_trainer",
    "report",
]
