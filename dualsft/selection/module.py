"""The phases of a selection, in order: warm-up, validation gradient, direction, rows and columns, budgets, artifact."""

import itertools
from collections.abc import Mapping
from typing import Literal

import torch
from lightning import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from dualsft.allocators import DataAllocator, GlobalTopK, ParameterAllocator, TopK, check_budget
from dualsft.data import InstructionDataModule
from dualsft.data.layout import Batch
from dualsft.errors import UserError
from dualsft.matrix.curvature import check_differences
from dualsft.matrix.passes import compute_dtype
from dualsft.matrix.sketches import SKETCH
from dualsft.matrix.spot_check import check_packing
from dualsft.models.loading import (
    Dtype,
    base_weights,
    check_vocabulary,
    checkpoint_activations,
    parameter_shapes,
)
from dualsft.objectives import Objective, example_losses
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog, say
from dualsft.scorers import FirstOrder, Scorer
from dualsft.selection.artifact import WEIGHT_SCORES, Selection, load_selection, publish, write_selection
from dualsft.selection.choosing import (
    ExampleChoice,
    Pool,
    WeightChoice,
    check_allocators,
    choose_examples,
    choose_weights,
)
from dualsft.selection.moments import Moments, second_moment_file, stored_second_moment
from dualsft.selection.near_duplicates import NearDuplicates
from dualsft.selection.objective import ValidationObjective, check_needs, needs_hessian
from dualsft.selection.order import Chooser, Order, check_order, choose
from dualsft.selection.phases import Phases
from dualsft.selection.prior import Prior
from dualsft.selection.report import describe_inputs, describe_outcome, what_scores_rest_on
from dualsft.selection.scoring import Scoring
from dualsft.selection.shared_choice import choose_together
from dualsft.selection.step import StepSize, check_step_size
from dualsft.selection.tables import example_table, token_table
from dualsft.selection.teacher import Teacher
from dualsft.selection.terms import check_objectives, further_terms, validation_terms
from dualsft.selection.validation_sets import Combination
from dualsft.selection.warmup import Warmup
from dualsft.sharding.collectives import on_rank_zero, world_size
from dualsft.sharding.files import write_full_tensors
from dualsft.sharding.shard_model import is_sharded
from dualsft.sharding.shards import compute_device
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
        check_objectives([prior.term(), *self.objectives])
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

    def _load(self, name_or_path: str) -> PreTrainedModel:
        model = load_for(self, name_or_path, self.dtype_name).eval()
        model.set_experts_implementation("eager")  # fused kernels for experts have no forward-mode derivative
        return model

    def forward(self, batch: Batch) -> Tensor:
        """l_i of each example of the batch; Lightning asks every module for a forward."""
        return example_losses(self.model, batch)

    def run_phases(self, data: InstructionDataModule, run: RunFolder, seed: int, config: str, show: bool) -> Selection:
        """Run every phase that an earlier, killed run has not finished, and write the selection.

        Args:
            data: The pool and the validation sets, set up.
            run: The output folder; claimed here, once the input is known to be good.
            seed: Decides which examples the warm-up and the prior draw, and their order.
            config: YAML that replays the run, kept beside the results.
            show: Whether to draw progress bars.

        Raises:
            UserError: on input that cannot be scored or budgets that cannot be met.
        """
        pool = self._check_input(data)
        inputs = on_rank_zero(lambda: describe_inputs(self, data, seed))
        chooser = self._chooser(data, pool, run)
        if on_rank_zero(lambda: run.complete):
            on_rank_zero(lambda: run.confirm(inputs))
            return load_selection(run.path)
        states = {"ranks": world_size()} if world_size() > 1 else {}  # of which each keeps its own
        run.claim({**what_scores_rest_on(self, inputs), **states})
        log = PhaseLog(show, compute_device(self.model))
        phases = Phases(self.model, data, run, log, seed, self.gradient_checkpointing, self.save_minutes)
        scoring = self._scoring(phases, data, pool, seed)
        chosen = choose(self.order, self.rounds, scoring, chooser, pool)
        named = data.named_validation
        outcome = describe_outcome(data.train_examples, chosen, scoring, named)
        cost = {"scoring_batch_tokens": phases.batch_tokens, "phases": log.as_json()}
        staged = run.staging()
        if self._sharded:
            write_full_tensors(chosen.parameter_scores, dict(self.model.named_parameters()), staged, WEIGHT_SCORES)

        def write() -> None:
            write_selection(
                staged,
                manifest={**inputs, **outcome, "coverage": self._coverage(chosen.mask), **cost},
                examples=example_table(data.train_examples, chosen, scoring, named),
                parameter_scores=None if self._sharded else chosen.parameter_scores,
                mask=chosen.mask,
                selected_lines=[data.train_examples.records.line(i) for i in sorted(chosen.examples)],
                config=config,
                token_scores=token_table(data.train_examples, chosen.example_scores) if self.token_scores else None,
                sketches=scoring.measured.get(SKETCH),
            )
            publish(staged, run.path)

        on_rank_zero(write)
        run.finish()
        return load_selection(run.path)

    @property
    def _sharded(self) -> bool:
        return is_sharded(self.model)

    def _check_input(self, data: InstructionDataModule) -> list[int]:
        """The ids of the examples to score.

        Raises:
            UserError: if there is none, nothing to validate on, the gradients would be float16, or the model mixes
                packed examples.
        """
        sets = {f"validation.{n}" if data.named_validation else n: of for n, of in data.validation_sets.items()}
        for name, examples in {"train": data.train_examples, **sets}.items():
            if not examples.ok_ids():
                counts = ", ".join(f"{count} {status}" for status, count in examples.counts().items())
                raise UserError(f"No example of data.{name} has a response to score by ({counts}).")
            check_vocabulary(self.model, examples.largest_id())
        if self.warmup.checkpoint is not None and self._needs_second_moment:
            second_moment_file(self.warmup.checkpoint)
        if "hessian_vector_difference" in self.scorer.needs:
            check_differences(self.model)
        if compute_dtype(self.model) == torch.float16:
            raise UserError(
                "Scores underflow in float16; set model.dtype to float32 or bfloat16, and trainer.precision to 32-true "
                "or bf16-mixed."
            )
        if data.packing:
            few = data.pool_loader(batch_tokens=min(data.max_length, data.batch_tokens))
            check_packing(self.model, next(iter(few)), compute_dtype(self.model))
        return data.train_examples.ok_ids()

    def _chooser(self, data: InstructionDataModule, pool: list[int], run: RunFolder) -> Chooser:
        """What spends the budgets.

        Raises:
            UserError: if a count is above what there is, or a pattern is for no parameter.
        """
        scored = data.train_examples
        examples = ExampleChoice(self.data_allocator, self.data_budget, self.near_duplicates)
        due = examples.count([int(scored.num_tokens[i]) for i in pool])
        known = Pool(scored.records, scored.num_tokens, data.options)
        weights = WeightChoice(
            self.parameter_allocator, self.parameter_budget, self.trainable, self.frozen, self._base_weights
        )
        weights.count({name: p.numel() for name, p in self.model.named_parameters() if p.requires_grad})
        rounds = itertools.count()

        def choose_of_weights(scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            if self._sharded:
                return choose_together(weights, scores, self.model, run.scratch(f"choice-{next(rounds)}"))
            return choose_weights(weights, scores)

        return Chooser(
            choose_of_weights,
            lambda scores, measured: on_rank_zero(lambda: choose_examples(examples, due, scores, known, measured)),
        )

    def _base_weights(self) -> dict[str, Tensor]:
        """The weights that a fine-tune starts from, whatever the warm-up has made of the model."""
        return base_weights(self.model_name_or_path, self.dtype_name)

    def _scoring(self, phases: Phases, data: InstructionDataModule, pool: list[int], seed: int) -> Scoring:
        """The objective at the scoring checkpoint, its gradients taken, and what scores by it."""
        untouched = self.warmup.checkpoint is None and self.warmup.fraction == 0
        teacher = Teacher(self.model, lambda: self._load(self.model_name_or_path), untouched)
        if self.prior.weight and untouched and not needs_hessian(self.scorer):
            say(
                "the prior's gradient is zero at the untouched base model, and this scorer does not see its curvature: "
                "model.prior changes nothing without a warm-up."
            )
        further = further_terms([self.prior.term(), *self.objectives], data, teacher, seed)
        objective = ValidationObjective(
            self.model,
            self.scorer,
            phases,
            validation_terms(data),
            further,
            self._moments(phases),
            self.preconditioner == "adam",
        )
        objective.take_gradients()
        return Scoring(
            self.model,
            self.scorer,
            objective,
            phases,
            pool,
            self.step_size,
            self.combination,
            self.token_scores,
            self.data_allocator.needs,
        )

    def _moments(self, phases: Phases) -> Moments:
        """Bring the model to the scoring checkpoint; its second moment, where anything takes it."""
        if self.warmup.checkpoint is None:
            return phases.warm_up(self.warmup)
        return stored_second_moment(self.warmup.checkpoint, self.model) if self._needs_second_moment else {}

    @property
    def _needs_second_moment(self) -> bool:
        return self.preconditioner == "adam" or "second_moment" in self.scorer.needs

    def _coverage(self, scores: Mapping[str, Tensor]) -> float:
        """The share of the model's weights that have scores: all but the frozen ones."""
        return sum(score.numel() for score in scores.values()) / sum(p.numel() for p in self.model.parameters())
