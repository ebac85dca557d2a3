"""The jobs of an audit: the base model's losses, the scores that predict, and the fits of all variants."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Trainer

from dualsft.commands.audit_checks import check_belongs, check_scores
from dualsft.commands.audit_scores import ScoreJobs, is_along_a_path, is_first_order, own_scorer
from dualsft.commands.experiment_jobs import MODEL, TRAIN, VALIDATION, Jobs
from dualsft.commands.resolved import at
from dualsft.data.module import InstructionDataModule
from dualsft.data.options import validation_sources
from dualsft.errors import UserError
from dualsft.experiments.audit_plan import AuditOptions, Sizes, Variation, variations
from dualsft.experiments.bank import Bank, Result
from dualsft.experiments.jobs import Job
from dualsft.experiments.judgement import AuditRun
from dualsft.experiments.predictions import predicted_gains
from dualsft.finetune import MaskedFinetuneModule
from dualsft.selection import Selection
from dualsft.selection.parameter_choice import trainable_names

_REPEATED = 3
"""How often the chosen and the lowest are trained at least, as the spread of their own gains is needed."""
_LOSS, _HELD_OUT = "example_loss", "held_out"
_RATE = "optimizer.init_args.lr"


class Setting(NamedTuple):
    """A setting of the fit; the learning rate is None where the configuration's holds."""

    steps: int
    learning_rate: float | None


class AuditJobs:
    """What an audit needs to have done.

    Args:
        config: The configuration of the fits.
        module: Made by it, with the selection to audit.
        data: Made by it.
        trainer: Made by it.
        options: The audit's.

    Attributes:
        first: What comes before the fits.
        fits: The fits, by number of the variation, setting and seed.
        calibrated: Whether predictions are in nats of the validation objective.
    """

    def __init__(
        self,
        config: Path,
        module: MaskedFinetuneModule,
        data: InstructionDataModule,
        trainer: Trainer,
        options: AuditOptions,
    ) -> None:
        assert module.selection is not None
        self._audited, self._module, self._options = module.selection, module, options
        self._jobs = Jobs(["--config", str(config)])
        self._own = self._jobs.settings("fit", {})
        check_belongs(self._audited, module, data, str(at(self._own, "data.validation_split")))
        check_scores(self._audited, options.sides)
        self._drawn = variations(_sizes(self._audited), options)
        ordinary, self._examples_a_step = _steps(data, trainer)
        steps = options.steps or [ordinary]
        rates: Sequence[float | None] = options.learning_rates or [None]
        self.settings = [Setting(count, rate) for count in steps for rate in rates]
        self._evaluations = self._jobs.evaluations(self._measured_on(data))
        self.base = self._jobs.evaluate("base model", self._evaluations)
        scorers: Sequence[str | None] = options.scorers or [None]
        self._scores = {scorer or own_scorer(self._audited): self._scores_of(scorer) for scorer in scorers}
        every = (scores for of in self._scores.values() for scores in of.values())
        self.first = [self.base, *(job for scores in every for job in scores.jobs.values())]
        self.fits = {
            (number, setting, seed): self._fit(one, setting, seed)
            for setting in self.settings
            for number, one in enumerate(self._drawn)
            for seed in range(self._seeds(one))
        }
        chosen = self._audited.about.settings
        in_nats = chosen["normalize"] == "none" and chosen["combination"] == "mean"
        self.calibrated = in_nats and not is_along_a_path(self._audited)

    def runs(self, bank: Bank) -> list[AuditRun]:
        """The runs that did not fail, for each scorer, once all jobs are done.

        Raises:
            UserError: if the base model could not be evaluated, or the scores could not be made.
        """
        base, found = self._base_result(bank), []
        for scorer, scores in self._scores.items():
            gains = {of: predicted_gains(self._audited, of.scored(bank), self._drawn) for of in set(scores.values())}
            for setting in self.settings:
                predicted = gains[scores[setting]]
                for number, one in enumerate(self._drawn):
                    run = self._run(bank, base, number, one, setting, scorer, predicted[number])
                    found += [run] if run.gains else []
        return found

    def check(self, bank: Bank) -> None:
        """Refuse to go on where the base model could not be evaluated, or the scores could not be made."""
        self._base_result(bank)
        for of in self._scores.values():
            for scores in of.values():
                scores.scored(bank)

    def failures(self, bank: Bank) -> list[dict[str, str]]:
        """The fits that failed, by name, with why."""
        results = ((job, bank.result(job)) for job in self.fits.values())
        return [{"name": job.name, "error": found.error} for job, found in results if found and found.error]

    def _scores_of(self, scorer: str | None) -> dict[Setting, ScoreJobs]:
        """A scorer's jobs for each setting: the same ones where its scores are in proportion to the step's length."""
        read = {key: at(self._own, key) for key in (MODEL, TRAIN, VALIDATION)}  # which `check_belongs` compared

        def at_setting(of: Setting) -> ScoreJobs:
            return ScoreJobs(self._audited, scorer, self._drawn, self._total_rate(of), read)

        if scorer is None or is_first_order(scorer):
            return dict.fromkeys(self.settings, at_setting(self.settings[0]))
        return {of: at_setting(of) for of in self.settings}

    def _run(
        self, bank: Bank, base: Result, number: int, one: Variation, setting: Setting, scorer: str, predicted: float
    ) -> AuditRun:
        done = {seed: bank.result(self.fits[number, setting, seed]) for seed in range(self._seeds(one))}
        sound = {seed: found for seed, found in done.items() if found is not None and found.error is None}
        gains = {seed: _objective(base) - _objective(found) for seed, found in sound.items()}
        held = {seed: found.metrics.get(_HELD_OUT) for seed, found in sound.items()}
        before = base.metrics.get(_HELD_OUT, {}).get(_LOSS, math.nan)
        return AuditRun(
            one.side,
            one.family,
            one.label,
            scorer,
            setting.steps,
            self._rate(setting),
            predicted * self._total_rate(setting),
            gains,
            {seed: before - metrics[_LOSS] for seed, metrics in held.items() if metrics},
        )

    def _base_result(self, bank: Bank) -> Result:
        found = bank.result(self.base)
        if found is None or found.error is not None:
            raise UserError(f"The base model could not be evaluated: {found.error if found else 'not done'}")
        return found

    def _seeds(self, one: Variation) -> int:
        compared = one.family == "chosen" or one.label == f"band {self._options.bands - 1}"
        return max(self._options.seeds, _REPEATED) if compared else self._options.seeds

    def _fit(self, one: Variation, setting: Setting, seed: int) -> Job:
        """A variant's fit; all take as many steps, however many examples there are."""
        overrides: dict[str, Any] = {
            "model.selection": None,
            "model.samples.number": 0,
            "trainer.max_steps": setting.steps,
            "trainer.max_epochs": -1,
            "trainer.num_sanity_val_steps": 0,
            "seed_everything": seed,
        }
        if setting.learning_rate is not None:
            overrides[_RATE] = setting.learning_rate
        return self._jobs.fit(
            f"{one.side} {one.label}, {setting.steps} steps at {self._rate(setting):g}, seed {seed}",
            overrides,
            self._evaluations,
            selection=str(self._audited.folder),
            selection_fingerprint=_identity(self._audited),
            variant=one.variant,
            examples=round(setting.steps * self._examples_a_step),
        )

    def _measured_on(self, data: InstructionDataModule) -> dict[str, dict[str, Any]]:
        """The evaluations: each validation set, and the held-out set."""
        sources = validation_sources(data.validation)
        if not sources:
            raise UserError("data.validation is not given; name the validation set that the selection was made for.")
        sets = {f"validation-{name}": path for name, path in sources.items()}
        if self._options.held_out is not None:
            sets[_HELD_OUT] = self._options.held_out
        common = {"model.generation.max_new_tokens": 0, "model.example_loss": True}
        return {name: {"data.validation": path, **common} for name, path in sets.items()}

    def _rate(self, setting: Setting) -> float:
        return setting.learning_rate if setting.learning_rate is not None else float(at(self._own, _RATE) or 2e-5)

    def _total_rate(self, setting: Setting) -> float:
        """Σ_t lr_t over the steps of a fit, its schedule included."""
        optimizer = self._module.optimizer([torch.nn.Parameter(torch.zeros(1))])
        scale = self._rate(setting) / float(optimizer.param_groups[0]["lr"])
        schedule = self._module.lr_scheduler(optimizer) if self._module.lr_scheduler else None
        total = 0.0
        for _ in range(setting.steps):
            total += float(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if isinstance(schedule, torch.optim.lr_scheduler.LRScheduler):
                schedule.step()
        return total * scale


def _objective(result: Result) -> float:
    """The mean over the validation sets of the examples' mean losses: V without its other terms."""
    losses = [metrics[_LOSS] for name, metrics in result.metrics.items() if name != _HELD_OUT]
    return math.fsum(losses) / len(losses)


def _identity(selection: Selection) -> str:
    """What identifies the choice and the scores of a selection."""
    return "|".join(f"{name}:{value}" for name, value in sorted((selection.about.checksums or {}).items()))


def _sizes(selection: Selection) -> Sizes:
    counts, settings = selection.about.counts, selection.about.settings
    masks = selection.stored_masks()
    names = trainable_names(settings["trainable"], settings["frozen"], masks)
    return Sizes(
        pool=selection.examples["status"].to_pylist().count("ok"),
        examples=counts.examples.selected,
        weights=sum(masks[name].numel() for name in names),
        chosen_weights=counts.parameters.selected,
    )


def _steps(data: InstructionDataModule, trainer: Trainer) -> tuple[int, float]:
    """The optimizer steps of the ordinary fit, and the examples of each."""
    data.setup("fit")
    batches, limit = len(data.train_dataloader()), trainer.limit_train_batches or 0
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    a_step = trainer.accumulate_grad_batches
    an_epoch = max(math.ceil(batches / a_step), 1)
    steps = an_epoch * trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else -1
    if trainer.max_steps >= 0:
        steps = min(steps, trainer.max_steps) if steps >= 0 else trainer.max_steps
    if steps < 1:
        raise UserError("The fit takes no steps, or endlessly many; give trainer.max_epochs, or audit.steps.")
    return steps, len(data.training_ids()) / an_epoch
