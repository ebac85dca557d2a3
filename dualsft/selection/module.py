"""``model.*`` of `dualsft select` as a Lightning module: the options, and how the model is loaded."""

from typing import Any

from lightning import LightningModule
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.models.loading import checkpoint_activations, parameter_shapes
from dualsft.objectives import example_losses
from dualsft.selection.settings import SelectionSettings
from dualsft.sharding.strategy import load_for


class SelectionModule(LightningModule):
    """Scores every example and every weight, and chooses a subset of each under two budgets.

    Args:
        model_name_or_path: The base model: a Hugging Face folder or hub id with safetensors weights.
        settings: The options; see `SelectionSettings`.

    Attributes:
        settings: The options, as a `SelectionSettings`.

    Raises:
        UserError: if an option is out of range, or two contradict each other.
    """

    def __init__(self, model_name_or_path: str, **settings: Any) -> None:
        super().__init__()
        self.model_name_or_path = model_name_or_path
        self.settings = SelectionSettings(**settings)

    def configure_model(self) -> None:
        """Load the base model, or the scoring checkpoint that stands for a warm-up.

        Raises:
            UserError: if it cannot be loaded, or the checkpoint has another architecture than the base model.
        """
        checkpoint = self.settings.warmup.checkpoint
        self.model = self._load(checkpoint or self.model_name_or_path)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        if checkpoint and shapes != parameter_shapes(self.model_name_or_path):
            raise UserError(
                f"model.warmup.checkpoint {checkpoint} has other weights, by name or shape, than "
                f"{self.model_name_or_path}; give a checkpoint of that model."
            )
        if self.settings.gradient_checkpointing:
            checkpoint_activations(self.model)

    def load_base(self) -> PreTrainedModel:
        """Load another copy of the base model."""
        return self._load(self.model_name_or_path)

    def _load(self, name_or_path: str) -> PreTrainedModel:
        model = load_for(self, name_or_path, self.settings.dtype).eval()
        model.set_experts_implementation("eager")  # fused kernels for experts have no forward-mode derivative
        return model

    def forward(self, batch: Batch) -> Tensor:
        """l_i of each example of the batch; Lightning asks every module for a forward."""
        return example_losses(self.model, batch)
