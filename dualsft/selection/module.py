"""The phases of a selection, in order: warm-up, validation gradient, direction, rows and columns, budgets, artifact."""

from collections.abc import Mapping
from typing import Literal

import torch
from lightning import LightningModule
from torch import Tensor

from dualsft.allocators import (
    DataAllocator,
    GlobalTopK,
    ParameterAllocator,
    TopK,
    check_budget,
    count_of,
)
from dualsft.data import InstructionDataModule
from dualsft.errors import UserError
from dualsft.gradients import GradientPass, compute_dtype
from dualsft.interaction import check_covered
from dualsft.layout import Batch
from dualsft.models import Dtype, check_vocabulary, checkpoint_activations, load_model, parameter_shapes
from dualsft.objectives import example_losses
from dualsft.progress import PhaseLog
from dualsft.run_folder import RunFolder
from dualsft.scorers import FirstOrder, Scorer
from dualsft.selection.artifact import Selection, load_selection, publish, write_selection
from dualsft.selection.choosing import choose_examples, choose_weights
from dualsft.selection.directions import directions
from dualsft.selection.moments import second_moment_file, stored_second_moment
from dualsft.selection.phases import Phases
from dualsft.selection.prior import Prior
from dualsft.selection.report import describe_inputs, describe_outcome, sum_identity
from dualsft.selection.tables import example_table, token_table
from dualsft.selection.warmup import Warmup
from dualsft.spot_check import check_packing

Preconditioner = Literal["none", "adam"]


class SelectionModule(LightningModule):
    """Scores every example and every weight, and chooses a subset of each under two budgets.

    Args:
        model_name_or_path: The base model: a Hugging Face folder or hub id with safetensors weights.
        scorer: The rule for the direction u that scores both sides.
        preconditioner: The optimizer that the fine-tune will use: none (SGD) or adam, which needs the second moment of
            a warm-up.
        step_size: η, the length of the step whose gain is predicted; scales all scores alike.
        parameter_budget: Weights to train: a fraction in (0, 1], a count, or null for all.
        data_budget: Examples to train on: a fraction in (0, 1] of those with a response, a count, or null for all.
        parameter_allocator: The rule that spends the parameter budget.
        data_allocator: The rule that spends the data budget.
        warmup: How the scoring checkpoint is made.
        prior: The objective's second term.
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
        step_size: float = 2e-5,
        parameter_budget: int | float | None = 0.1,
        data_budget: int | float | None = 0.1,
        parameter_allocator: ParameterAllocator | None = None,
        data_allocator: DataAllocator | None = None,
        warmup: Warmup = Warmup(),  # noqa: B008 (frozen)
        prior: Prior = Prior(),  # noqa: B008 (frozen)
        dtype: Dtype = "auto",
        gradient_checkpointing: bool = False,
        token_scores: bool = False,
        save_minutes: float = 10.0,
    ) -> None:
        super().__init__()
        check_budget("model.parameter_budget", parameter_budget)
        check_budget("model.data_budget", data_budget)
        if not step_size > 0:
            raise UserError(f"model.step_size is {step_size}; give a positive number.")
        if not save_minutes > 0:
            raise UserError(f"model.save_minutes is {save_minutes}; give a positive number of minutes.")
        if preconditioner == "adam" and warmup.fraction == 0 and warmup.checkpoint is None:
            raise UserError(
                "model.preconditioner is adam, which needs the second moment of a warm-up, but model.warmup.fraction "
                "is 0; set model.preconditioner to none, or give model.warmup.fraction or model.warmup.checkpoint."
            )
        self.model_name_or_path = model_name_or_path
        self.scorer = scorer or FirstOrder()
        self.preconditioner = preconditioner
        self.step_size = step_size
        self.parameter_budget, self.data_budget = parameter_budget, data_budget
        self.parameter_allocator = parameter_allocator or GlobalTopK()
        self.data_allocator = data_allocator or TopK()
        self.warmup = warmup
        self.dtype_name: Dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.token_scores, self.save_minutes = token_scores, save_minutes

    def configure_model(self) -> None:
        """Load the base model, or the scoring checkpoint that stands for a warm-up.

        Raises:
            UserError: if it cannot be loaded, or the checkpoint has another architecture than the base model.
        """
        checkpoint = self.warmup.checkpoint
        self.model = load_model(checkpoint or self.model_name_or_path, self.dtype_name)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        if checkpoint and shapes != parameter_shapes(self.model_name_or_path):
            raise UserError(
                f"model.warmup.checkpoint {checkpoint} has other weights, by name or shape, than "
                f"{self.model_name_or_path}; give a checkpoint of that model."
            )
        self.model.eval()
        self.model.set_experts_implementation("eager")  # fused kernels for experts have no forward-mode derivative
        if self.gradient_checkpointing:
            checkpoint_activations(self.model)

    def forward(self, batch: Batch) -> Tensor:
        """l_i of each example of the batch; Lightning asks every module for a forward."""
        return example_losses(self.model, batch)

    def run_phases(self, data: InstructionDataModule, run: RunFolder, seed: int, config: str, show: bool) -> Selection:
        """Run every phase that an earlier, killed run has not finished, and write the selection.

        Args:
            data: The pool and the validation set, set up.
            run: The output folder; claimed here, once the input is known to be good.
            seed: Decides which examples the warm-up draws, and their order.
            config: YAML that replays the run, kept beside the results.
            show: Whether to draw progress bars.

        Raises:
            UserError: on input that cannot be scored or budgets that cannot be met.
        """
        pool = self._check_input(data)
        data_count, parameter_count = self._counts(len(pool))
        inputs = describe_inputs(self, data, seed)
        if run.complete:
            run.confirm(inputs)
            return load_selection(run.path)
        run.claim(inputs)
        log = PhaseLog(show, self.model.device)
        phases = Phases(self.model, data, run, log, seed, self.gradient_checkpointing, self.save_minutes)
        scored, scores = self._score(phases, pool)
        identity = sum_identity(scored.rows[0], scores, compute_dtype(self.model))
        scores = {name: score.float() for name, score in scores.items()}
        mask = choose_weights(self.parameter_allocator, scores, parameter_count)
        pool_examples = data.train_examples
        chosen = choose_examples(
            self.data_allocator,
            scored.rows[0],
            pool_examples.num_tokens,
            pool_examples.records,
            data_count,
            self.data_budget,
        )
        outcome = describe_outcome(data.train_examples, scored, chosen, mask, identity)
        cost = {"scoring_batch_tokens": phases.batch_tokens, "phases": log.as_json()}
        write_selection(
            staged := run.staging(),
            manifest={**inputs, **outcome, "coverage": self._coverage(mask), **cost},
            examples=example_table(data.train_examples, scored, chosen),
            parameter_scores=scores,
            mask=mask,
            selected_lines=[data.train_examples.records.line(i) for i in sorted(chosen)],
            config=config,
            token_scores=token_table(data.train_examples, scored) if self.token_scores else None,
        )
        publish(staged, run.path)
        run.finish()
        return load_selection(run.path)

    def _check_input(self, data: InstructionDataModule) -> list[int]:
        """The ids of the examples to score.

        Raises:
            UserError: if there is none, nothing to validate on, the gradients would be float16, or the model mixes
                packed examples.
        """
        for name, examples in (("train", data.train_examples), ("validation", data.validation_sets["validation"])):
            if not examples.ok_ids():
                counts = ", ".join(f"{count} {status}" for status, count in examples.counts().items())
                raise UserError(f"No example of data.{name} has a response to score by ({counts}).")
            check_vocabulary(self.model, examples.largest_id())
        if self.warmup.checkpoint is not None and self.preconditioner == "adam":
            second_moment_file(self.warmup.checkpoint)
        if compute_dtype(self.model) == torch.float16:
            raise UserError(
                "Scores underflow in float16; set model.dtype to float32 or bfloat16, and trainer.precision to 32-true "
                "or bf16-mixed."
            )
        if data.packing:
            few = data.pool_loader(batch_tokens=min(data.max_length, data.batch_tokens))
            check_packing(self.model, next(iter(few)), compute_dtype(self.model))
        return data.train_examples.ok_ids()

    def _counts(self, examples: int) -> tuple[int, int]:
        """How many examples and how many weights the budgets buy.

        Raises:
            UserError: if a count is above what there is.
        """
        weights = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return (
            count_of("model.data_budget", self.data_budget, examples),
            count_of("model.parameter_budget", self.parameter_budget, weights),
        )

    def _score(self, phases: Phases, pool: list[int]) -> tuple[GradientPass, dict[str, Tensor]]:
        """The example scores, and φ_j of every weight, on the host."""
        checkpoint, adam = self.warmup.checkpoint, self.preconditioner == "adam"
        if checkpoint is None:
            moments = phases.warm_up(self.warmup)
        else:
            moments = stored_second_moment(checkpoint, self.model) if adam else {}
        if not adam:
            moments.clear()
        gradient = phases.validation_gradient()
        if not self.scorer.needs_pool_gradient:
            u = directions(self.model, self.scorer, gradient, moments, self.step_size, len(pool))
            scored = phases.scores(u, pool, columns=True, by_token=self.token_scores)
        else:
            statistics = phases.pool_gradient(pool)
            finite = [i for i in pool if i not in statistics.nonfinite]
            u = directions(self.model, self.scorer, gradient, moments, self.step_size, len(finite), statistics.sums)
            scored = phases.scores(u, finite, columns=False, by_token=self.token_scores)
            scored.sums, scored.nonfinite = statistics.sums, scored.nonfinite | statistics.nonfinite
        check_covered(self.model, scored.covered, [n for n, total in scored.sums.items() if bool(total.any())])
        return scored, {name: total.mul_(u.pop(name)).cpu() for name, total in scored.sums.items()}

    def _coverage(self, scores: Mapping[str, Tensor]) -> float:
        """The share of the model's weights that have scores: all but the frozen ones."""
        return sum(score.numel() for score in scores.values()) / sum(p.numel() for p in self.model.parameters())
