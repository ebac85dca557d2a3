"""The phases of a selection, in order: warm-up, validation gradient, direction, rows and columns, budgets, artifact."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from dualsft.data import InstructionDataModule
from dualsft.data.layout import Batch
from dualsft.errors import UserError
from dualsft.matrix.curvature import check_differences
from dualsft.matrix.passes import compute_dtype
from dualsft.matrix.sketches import SKETCH
from dualsft.matrix.spot_check import check_packing
from dualsft.models.loading import (
    base_weights,
    check_vocabulary,
    checkpoint_activations,
    parameter_shapes,
)
from dualsft.objectives import SelfDistillation, example_losses
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog, say
from dualsft.selection.artifact import (
    WEIGHT_SCORES,
    Selection,
    example_table,
    load_selection,
    publish,
    token_table,
    write_selection,
)
from dualsft.selection.choosing import (
    ExampleChoice,
    Pool,
    WeightChoice,
    choose_examples,
    choose_weights,
)
from dualsft.selection.manifest import describe_inputs, describe_outcome, what_scores_rest_on
from dualsft.selection.moments import Moments, second_moment_file, stored_second_moment
from dualsft.selection.objective import ValidationObjective, needs_hessian
from dualsft.selection.order import Chooser, choose
from dualsft.selection.phases import Phases
from dualsft.selection.scoring import Scoring
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.shared_choice import choose_together
from dualsft.selection.teacher import Teacher
from dualsft.selection.terms import further_terms, validation_terms
from dualsft.sharding.collectives import on_rank_zero, world_size
from dualsft.sharding.files import write_full_tensors
from dualsft.sharding.shard_model import is_sharded
from dualsft.sharding.shards import compute_device
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

    def _load(self, name_or_path: str) -> PreTrainedModel:
        model = load_for(self, name_or_path, self.settings.dtype).eval()
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
            finished = load_selection(run.path)
            on_rank_zero(lambda: run.confirm(inputs, finished.manifest))
            return finished
        states = {"ranks": world_size()} if world_size() > 1 else {}  # of which each keeps its own
        run.claim({**what_scores_rest_on(self, inputs), **states})
        log = PhaseLog(show, compute_device(self.model))
        phases = Phases(
            self.model, data, run, log, seed, self.settings.gradient_checkpointing, self.settings.save_minutes
        )
        scoring = self._scoring(phases, data, pool, seed)
        chosen = choose(self.settings.order, self.settings.rounds, scoring, chooser, pool)
        named = data.named_validation
        outcome = describe_outcome(data.train_examples, chosen, scoring, named)
        cost = {"scoring_batch_tokens": phases.batch_tokens, "phases": log.as_json()}
        tokens = token_table(data.train_examples, chosen.example_scores) if self.settings.token_scores else None
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
                token_scores=tokens,
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
        if self.settings.warmup.checkpoint is not None and self._needs_second_moment:
            second_moment_file(self.settings.warmup.checkpoint)
        if "hessian_vector_difference" in self.settings.scorer.needs:
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
        of = self.settings
        examples = ExampleChoice(of.data_allocator, of.data_budget, of.near_duplicates)
        due = examples.count([int(scored.num_tokens[i]) for i in pool])
        known = Pool(scored.records, scored.num_tokens, data.options)
        weights = WeightChoice(
            self.settings.parameter_allocator,
            self.settings.parameter_budget,
            self.settings.trainable,
            self.settings.frozen,
            self._base_weights,
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
        return base_weights(self.model_name_or_path, self.settings.dtype)

    def _scoring(self, phases: Phases, data: InstructionDataModule, pool: list[int], seed: int) -> Scoring:
        """The objective at the scoring checkpoint, its gradients taken, and what scores by it."""
        untouched = self.settings.warmup.checkpoint is None and self.settings.warmup.fraction == 0
        teacher = Teacher(self.model, lambda: self._load(self.model_name_or_path), untouched)
        if self.settings.prior.weight and untouched and not needs_hessian(self.settings.scorer):
            say(
                "the prior's gradient is zero at the untouched base model, and this scorer does not see its curvature: "
                "model.prior changes nothing without a warm-up."
            )
        further = further_terms([SelfDistillation(self.settings.prior), *self.settings.objectives], data, teacher, seed)
        objective = ValidationObjective(
            self.model,
            self.settings.scorer,
            phases,
            validation_terms(data),
            further,
            self._moments(phases),
            self.settings.preconditioner == "adam",
        )
        objective.take_gradients()
        return Scoring(
            self.model,
            self.settings.scorer,
            objective,
            phases,
            pool,
            self.settings.step_size,
            self.settings.combination,
            self.settings.token_scores,
            self.settings.data_allocator.needs,
        )

    def _moments(self, phases: Phases) -> Moments:
        """Bring the model to the scoring checkpoint; its second moment, where anything takes it."""
        if self.settings.warmup.checkpoint is None:
            return phases.warm_up(self.settings.warmup)
        return stored_second_moment(self.settings.warmup.checkpoint, self.model) if self._needs_second_moment else {}

    @property
    def _needs_second_moment(self) -> bool:
        return self.settings.preconditioner == "adam" or "second_moment" in self.settings.scorer.needs

    def _coverage(self, scores: Mapping[str, Tensor]) -> float:
        """The share of the model's weights that have scores: all but the frozen ones."""
        return sum(score.numel() for score in scores.values()) / sum(p.numel() for p in self.model.parameters())
