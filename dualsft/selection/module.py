"""``model.*`` of `dualsft select` as a Lightning module: options, loading, and the check of the input."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError
from dualsft.matrix.curvature import check_differences
from dualsft.matrix.passes import compute_dtype
from dualsft.matrix.spot_check import check_packing
from dualsft.models import PreTrainedModel
from dualsft.models.experts import group_experts
from dualsft.models.inspection import check_examples
from dualsft.models.loading import Dtype, checkpoint_activations, parameter_shapes
from dualsft.objectives import example_losses
from dualsft.objectives.inputs import settle_mask
from dualsft.runs.model_dtype import settle_dtype
from dualsft.selection.remedies import remedies_by_key
from dualsft.selection.scoring_checkpoint import second_moment_file
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.terms import validation_halves
from dualsft.sharding.shards import compute_device
from dualsft.sharding.strategy import load_for
from dualsft.training.compilation import check_compiler, compile_blocks


class SelectionModule(LightningModule):
    """Scores every example and every weight, and chooses a subset of each under two budgets.

    Args:
        model_name_or_path: The base model: a Hugging Face folder or hub id with safetensors weights.
        settings: The options, fields of `SelectionSettings`.

    Raises:
        UserError: if an option is out of range, or two contradict each other.
    """

    def __init__(self, model_name_or_path: str, **settings: Any) -> None:
        super().__init__()
        self.model_name_or_path = model_name_or_path
        self.settings = SelectionSettings(**settings)
        self.dtype_name: Dtype = self.settings.dtype

    def configure_model(self) -> None:
        """Load the base model, or the scoring checkpoint given in place of a warm-up.

        Raises:
            UserError: if it cannot be loaded, or the checkpoint has another architecture than the base model.
        """
        checkpoint = self.settings.warmup.checkpoint
        self.dtype_name = settle_dtype(self, checkpoint or self.model_name_or_path, self.dtype_name)
        self.model = self._load(checkpoint or self.model_name_or_path)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        if checkpoint and shapes != parameter_shapes(self.model_name_or_path):
            raise UserError(
                f"model.warmup.checkpoint {checkpoint} has other weights, by name or shape, than "
                f"{self.model_name_or_path}; give a checkpoint of that model."
            )
        if self.settings.gradient_checkpointing:
            checkpoint_activations(self.model)
        if self.settings.compile:
            with remedies_by_key():
                compile_blocks(self.model)

    def check_input(self, data: InstructionDataModule) -> None:
        """Refuse data that cannot be scored, once model and data are loaded and before anything is written.

        Raises:
            UserError: if there is no example to score or to validate on, the scorer's statistics cannot be computed,
                the gradients would be float16, the model mixes packed examples, or torch cannot compile here.
        """
        warmup = self.settings.warmup
        sets = {f"validation.{n}" if data.named_validation else n: of for n, of in data.validation_sets.items()}
        for name, examples in {"train": data.train_examples, **sets}.items():
            if not examples.ok_ids():
                counts = ", ".join(f"{count} {status}" for status, count in examples.counts().items())
                raise UserError(f"No example of data.{name} has a response to score by ({counts}).")
            check_examples(self.model, f"data.{name}", examples.largest_id, examples.longest())
        if self.settings.stability:
            validation_halves(data, 0)
        if warmup.checkpoint is not None and self.settings.needs_second_moment_of_warmup:
            second_moment_file(warmup.checkpoint)
        if "hessian_vector_difference" in self.settings.scorer.needs:
            check_differences(self.model)
        if compute_dtype(self.model) == torch.float16:
            raise UserError(
                "Scores underflow in float16; set model.dtype to float32 or bfloat16, and trainer.precision to 32-true "
                "or bf16-mixed."
            )
        if self.settings.compile:
            with remedies_by_key():
                check_compiler(compute_device(self.model))
        settle_mask(self.model)
        if data.packing:
            few = data.pool_loader(batch_tokens=min(data.max_length, data.batch_tokens))
            check_packing(self.model, next(iter(few)), compute_dtype(self.model))

    def load_base(self) -> PreTrainedModel:
        """Load another copy of the base model."""
        base = self._load(self.model_name_or_path)
        settle_mask(base, like=self.model)
        return base

    def _load(self, name_or_path: str) -> PreTrainedModel:
        model = load_for(self, name_or_path, self.dtype_name).eval()
        group_experts(model)
        return model

    def forward(self, batch: Batch) -> Tensor:
        """l_i of each example of the batch; Lightning asks every module for a forward."""
        return example_losses(self.model, batch)
