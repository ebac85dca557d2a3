"""The phases of a selection, in order: warm-up, validation gradient, direction, rows and columns, budgets, artifact."""

from types import SimpleNamespace
from typing import Any, Literal

from lightning import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from dualsft.allocators import DataAllocator, GlobalTopK, ParameterAllocator, TopK, check_budget
from dualsft.data.layout import Batch
from dualsft.errors import UserError
from dualsft.models.loading import (
    Dtype,
    checkpoint_activations,
    parameter_shapes,
)
from dualsft.objectives import Objective, Prior, SelfDistillation, example_losses
from dualsft.scorers import FirstOrder, Scorer
from dualsft.selection.budgets import check_allocators
from dualsft.selection.directions import Combination
from dualsft.selection.near_duplicates import NearDuplicates
from dualsft.selection.objective import check_needs
from dualsft.selection.order import Order, check_order
from dualsft.selection.step import StepSize, check_step_size
from dualsft.selection.terms import check_objectives
from dualsft.selection.warmup import Warmup
from dualsft.sharding.strategy import load_for

Preconditioner = Literal["none", "adam"]


def check_preconditioner(preconditioner: Preconditioner, warmup: Warmup) -> None:
    """Refuse a preconditioner whose second moment cannot be had.

    Raises:
        UserError: naming the way out.
    """
    if preconditioner == "adam" and not warmup.gives_second_moment:
        raise UserError(
            "model.preconditioner is adam, which needs the second moment of a warm-up, but model.warmup.fraction is 0; "
            "set model.preconditioner to none, or give model.warmup.fraction or model.warmup.checkpoint."
        )


class SelectionModule(LightningModule):
    """Scores every example and every weight, and chooses a subset of each under two budgets.

    Args:
        model_name_or_path: The base model: a Hugging Face folder or hub id with safetensors weights.
        scorer: The rule for the direction u that scores both sides.
        preconditioner: The optimizer that the fine-tune will use: none (SGD) or adam, which needs the second moment of
            a warm-up.
        step_size: η, the length of the step whose gain is predicted: a number, or auto for the step at which a
            second-order scorer predicts the largest gain. At first order it scales all scores alike.
        parameter_budget: Weights to train: a fraction in (0, 1], a count, or null for all.
        data_budget: Examples to train on: a fraction in (0, 1] of those with a response, a count, or null for all.
        parameter_allocator: The rule that spends the parameter budget.
        data_allocator: The rule that spends the data budget.
        near_duplicates: Which texts count as the same; of those only the one with the highest score may be chosen.
        trainable: Patterns for the parameters that may be chosen, such as q_proj and layers.[0-3]. for all names that
            contain one; null for all. The parameter budget is a share of these; all others are scored all the same.
        frozen: Patterns for the parameters that may not be chosen even so, such as embed and norm.
        warmup: How the scoring checkpoint is made.
        prior: The objective's second term, which keeps what the base model knew.
        objectives: Further terms of one's own, by class path.
        combination: How an example's, or a weight's, scores for several validation sets become one.
        order: both chooses each side by one scoring of everything; parameters, or data, chooses that side and takes the
            other whole; parameters_then_data re-scores the examples by the chosen weights alone, data_then_parameters
            the weights by the chosen examples alone.
        rounds: How often the two sides are re-scored by each other in the last two orders.
        dtype: Type that the weights are stored and computed in while scoring; sums are float32 regardless.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        token_scores: Keep the contribution of each token to its example's score too; takes longer.
        save_minutes: How often to keep the state of the phase under way, for --resume.
    """

    def __init__(
        self,
        model_name_or_path: str,
        scorer: Scorer | None = None,
        preconditioner: Preconditioner = "adam",
        step_size: StepSize = 2e-5,
        parameter_budget: int | float | None = 0.1,
        data_budget: int | float | None = 0.1,
        parameter_allocator: ParameterAllocator | None = None,
        data_allocator: DataAllocator | None = None,
        near_duplicates: NearDuplicates = NearDuplicates(),  # noqa: B008 (frozen)
        trainable: list[str] | None = None,
        frozen: list[str] | None = None,
        warmup: Warmup = Warmup(),  # noqa: B008 (frozen)
        prior: Prior = Prior(),  # noqa: B008 (frozen)
        objectives: list[Objective] | None = None,
        combination: Combination = "mean",
        order: Order = "both",
        rounds: int = 1,
        dtype: Dtype = "auto",
        gradient_checkpointing: bool = False,
        token_scores: bool = False,
        save_minutes: float = 10.0,
    ) -> None:
        super().__init__()
        check_budget("model.parameter_budget", parameter_budget)
        check_budget("model.data_budget", data_budget)
        if not save_minutes > 0:
            raise UserError(f"model.save_minutes is {save_minutes}; give a positive number of minutes.")
        check_preconditioner(preconditioner, warmup)
        self.model_name_or_path = model_name_or_path
        self.scorer = scorer or FirstOrder()
        check_needs(self.scorer, warmup.gives_second_moment)
        check_step_size(step_size, self.scorer)
        check_order(order, rounds)
        self.preconditioner = preconditioner
        self.step_size = step_size
        self.trainable, self.frozen = trainable or [], frozen or []
        self.parameter_budget = None if order == "data" else parameter_budget
        self.data_budget = None if order == "parameters" else data_budget
        self.parameter_allocator = (parameter_allocator if order != "data" else None) or GlobalTopK()
        self.data_allocator = (data_allocator if order != "parameters" else None) or TopK()
        check_allocators(self.parameter_allocator, self.data_allocator)
        self.near_duplicates = near_duplicates
        self.warmup, self.prior, self.objectives = warmup, prior, objectives or []
        check_objectives([SelfDistillation(prior), *self.objectives])
        self.combination, self.order, self.rounds = combination, order, rounds
        self.dtype_name: Dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.token_scores, self.save_minutes = token_scores, save_minutes

    def configure_model(self) -> None:
        """Load the base model, or the scoring checkpoint that stands for a warm-up.

        Raises:
            UserError: if it cannot be loaded, or the checkpoint has another architecture than the base model.
        """
        checkpoint = self.warmup.checkpoint
        self.model = self._load(checkpoint or self.model_name_or_path)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        if checkpoint and shapes != parameter_shapes(self.model_name_or_path):
            raise UserError(
                f"model.warmup.checkpoint {checkpoint} has other weights, by name or shape, than "
                f"{self.model_name_or_path}; give a checkpoint of that model."
            )
        if self.gradient_checkpointing:
            checkpoint_activations(self.model)

    def load_base(self) -> PreTrainedModel:
        """Load another copy of the base model."""
        return self._load(self.model_name_or_path)

    def _load(self, name_or_path: str) -> PreTrainedModel:
        model = load_for(self, name_or_path, self.dtype_name).eval()
        model.set_experts_implementation("eager")  # fused kernels for experts have no forward-mode derivative
        return model

    def forward(self, batch: Batch) -> Tensor:
        """l_i of each example of the batch; Lightning asks every module for a forward."""
        return example_losses(self.model, batch)

    @property
    def settings(self) -> Any:
        """Interim."""
        names = "scorer preconditioner step_size trainable frozen parameter_budget data_budget parameter_allocator data_allocator near_duplicates warmup prior objectives combination order rounds gradient_checkpointing token_scores save_minutes needs_second_moment"
        return SimpleNamespace(dtype=self.dtype_name, **{n: getattr(self, n) for n in names.split()})

    @property
    def needs_second_moment(self) -> bool:
        """Whether anything uses the second moment of the warm-up's Adam."""
        return self.preconditioner == "adam" or "second_moment" in self.scorer.needs
