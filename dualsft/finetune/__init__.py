"""Masked fine-tuning of the selected weights on the selected examples, and what it leaves behind."""

from dualsft.finetune.export import ExportModel
from dualsft.finetune.module import MaskedFinetuneModule, check_trainer

__all__ = ["ExportModel", "MaskedFinetuneModule", "check_trainer"]
