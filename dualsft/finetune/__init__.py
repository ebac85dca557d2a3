"""Masked fine-tuning of the selected weights on the selected examples, and what it leaves behind."""

from dualsft.finetune.ending import EndOfTraining, best_checkpoint
from dualsft.finetune.export_callback import ExportModel
from dualsft.finetune.module import MaskedFinetuneModule
from dualsft.finetune.recent import RecentCheckpoint
from dualsft.finetune.report import FitReport, report
from dualsft.finetune.trainer_checks import check_trainer

__all__ = [
    "EndOfTraining",
    "ExportModel",
    "FitReport",
    "MaskedFinetuneModule",
    "RecentCheckpoint",
    "best_checkpoint",
    "check_trainer",
    "report",
]
