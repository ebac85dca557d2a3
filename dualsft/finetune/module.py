"""`dualsft fit`: train the masked weights, with compact state, from the untouched base model."""

import hashlib
import json
from copy import deepcopy
from functools import partial
from typing import Any

from lightning import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from dualsft.data.dealing import DealtBatch
from dualsft.data.layout import Batch, on_host, to_device
from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError
from dualsft.evaluation import ValidationMetrics, check_validation_data, validation_names
from dualsft.finetune.accumulation import follow_accumulation_schedule, most_accumulated
from dualsft.finetune.adapter import Adapter
from dualsft.finetune.batch_losses import BatchLosses
from dualsft.finetune.checkpoint_files import write_whole_checkpoints
from dualsft.finetune.checkpointing import BestWeights, Ending, KeepEpochCount
from dualsft.finetune.losses import Loss, StepLoss, clip_norm
from dualsft.finetune.optimizers import check_length, make_optimizer, make_schedule
from dualsft.finetune.prior import PriorLoss, TrainingPrior
from dualsft.finetune.samples import LogSamples, Samples
from dualsft.finetune.selection_checks import check_base, check_tokenizer, chosen_weights, tell_of_reading
from dualsft.finetune.trainer_checks import (
    check_clipping,
    check_monitor,
    check_monitors,
    check_trainer,
    metric_names,
)
from dualsft.matrix.passes import compute_dtype
from dualsft.matrix.spot_check import check_packing
from dualsft.models import PreTrainedModel
from dualsft.models.inspection import check_examples
from dualsft.models.loading import Dtype, checkpoint_activations, model_fingerprint
from dualsft.objectives.inputs import settle_mask
from dualsft.runs.model_dtype import settle_dtype
from dualsft.selection import Selection, load_selection
from dualsft.selection.remedies import remedies_by_key
from dualsft.sharding.collectives import on_rank_zero
from dualsft.sharding.groups import world_size
from dualsft.sharding.local_batch import rows_to_read
from dualsft.sharding.strategy import load_for
from dualsft.training.compact import CompactParameters
from dualsft.training.compilation import check_compiler, compile_blocks


class MaskedFinetuneModule(LightningModule):
    """Fine-tunes the weights that a selection chose; without a selection, all of them.

    Args:
        model_name_or_path: The base model: a Hugging Face folder or hub id with safetensors weights.
        selection: A selection directory whose mask says which weights to train; null trains all weights.
        optimizer: Makes the optimizer from the compact parameters; AdamW at 2e-5 unless given.
        lr_scheduler: Makes the learning rate schedule from the optimizer, stepped once per optimizer step
            (ReduceLROnPlateau: once per epoch); constant unless given.
        dtype: Type that the weights are stored and computed in; the trained ones keep float32 masters. auto is the
            checkpoint's, but float32 in place of bfloat16 on a CPU that cannot multiply it, which is said.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        compile: Compile the model's layers by torch.compile, which takes a minute or more at first and can make each
            step faster on a GPU.
        loss: What the training loss is the mean over: ``example_mean``, the examples of a batch, each with its mean per
            supervised token, as selection scores them; or ``token_mean``, the supervised tokens of all batches of a
            step, however many are accumulated.
        training_prior: The term that keeps the model near the base model on the examples that it is not trained on.
        export: Which weights the fit ends with and exports: the ``last``, or the ``best`` by the metric of a
            ModelCheckpoint with a monitor in trainer.callbacks, else of an EarlyStopping there, else by the lowest
            val_loss.
        samples: Which sample generations are logged.
        save_minutes: How often the command line keeps a checkpoint beside that of each epoch, for --resume, unless
            trainer.callbacks has a ModelCheckpoint.

    Attributes:
        batch_losses: ``train_loss`` of the step's batches, and ``train_prior`` if there is one.
        adapter: An adapter to train in place of weights of the model, as experiments do; set before the model is
            loaded.

    Raises:
        UserError: if the selection cannot be read, or an option is out of range.
    """

    def __init__(
        self,
        model_name_or_path: str,
        selection: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Dtype = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        loss: Loss = "example_mean",
        training_prior: TrainingPrior = TrainingPrior(),  # noqa: B008 (frozen)
        export: Ending = "last",
        samples: Samples = Samples(),  # noqa: B008 (frozen)
        save_minutes: float = 10.0,
    ) -> None:
        super().__init__()
        if not save_minutes > 0:
            raise UserError(f"model.save_minutes is {save_minutes}; give a positive number of minutes.")
        self.model_name_or_path = model_name_or_path
        self.selection: Selection | None = load_selection(selection) if selection else None
        # by default at the paper's learning rate
        self.optimizer = optimizer or partial(AdamW, lr=2e-5, weight_decay=0.0)
        self.lr_scheduler = lr_scheduler
        self.dtype_name: Dtype = dtype
        self.gradient_checkpointing, self.compile_layers = gradient_checkpointing, compile
        self._step_loss = StepLoss(loss)
        self.training_prior, self.export, self.samples = training_prior, export, samples
        self._prior: PriorLoss | None = None
        self.adapter: Adapter | None = None
        self.best_step: int | None = None
        self._configured = self._packing_checked = False
        self._resumed_gradients: dict[int, Tensor] = {}
        self._resumed_step: dict[str, int] = {}
        self.batch_losses = BatchLosses()
        self.register_state_dict_post_hook(_keep_the_masters)
        self.register_load_state_dict_post_hook(_miss_the_masters_alone)

    def setup(self, stage: str) -> None:
        """Check the trainer and the data before anything is loaded; see `check_trainer`."""
        check_trainer(self.trainer)
        if self.compile_layers:
            with remedies_by_key():
                check_compiler(self.trainer.strategy.root_device)
        write_whole_checkpoints(self.trainer)
        check_validation_data(self.trainer)
        if isinstance(data := self.trainer.datamodule, InstructionDataModule):  # type: ignore[attr-defined]
            data.part = rows_to_read()
        sets = validation_names(self.trainer)
        self.metrics = ValidationMetrics(sets)
        self._logged = metric_names(self.trainer, sets, prior=bool(self.training_prior.weight))
        check_monitors(self.trainer, self._logged)

    def configure_model(self) -> None:
        """Load the base model, in shards if the trainer says so, and put the compact parameters on it, once."""
        if self._configured:
            return
        self.base_fingerprint = on_rank_zero(lambda: model_fingerprint(self.model_name_or_path))
        if self.selection:
            check_base(self.selection, self.model_name_or_path, self.base_fingerprint)
        self.dtype_name = settle_dtype(self, self.model_name_or_path, self.dtype_name)
        model = load_for(self, self.model_name_or_path, self.dtype_name)
        model.train()
        if self.gradient_checkpointing:
            checkpoint_activations(model)
        if self.adapter:
            model = self.adapter.put_on(model)
        if self.compile_layers:
            with remedies_by_key():
                compile_blocks(model)
        if self.selection and not self.adapter:
            self.compact = chosen_weights(self.selection, model)
        else:
            self.compact = CompactParameters(model)
        self.compact.attach()
        if self.training_prior.weight:
            self._prior = PriorLoss(self.training_prior, self.compact)
        self.model: PreTrainedModel = model  # behind the masters, which `__deepcopy__` pairs by their place
        self._origin = self._describe_origin()
        self._configured = True

    def check_data(self, data: InstructionDataModule) -> None:
        """Refuse data, once they and the model are loaded, that do not go with it.

        Raises:
            UserError: if an id or a position has no embedding, or the selection was made with another tokenizer.
        """
        if self.selection:
            check_tokenizer(self.selection, data.tokenizer)
            tell_of_reading(self.selection, data)
        for key, examples in data.encoded.items():
            check_examples(self.model, key, examples.largest_id, examples.longest())

    def on_fit_start(self) -> None:
        """Check the data, before the first batch."""
        if isinstance(data := self.trainer.datamodule, InstructionDataModule):  # type: ignore[attr-defined]
            self.check_data(data)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the compact parameters; the model's weights follow each of its steps."""
        optimizer = make_optimizer(self.optimizer, self.compact.parameters(), most_accumulated(self.trainer))
        check_clipping(self.trainer, optimizer)
        self.compact.write_back_after(optimizer)
        return make_schedule(self.lr_scheduler, optimizer) if self.lr_scheduler else optimizer

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a schedule; some refuse unusable settings only here."""
        try:
            super().lr_scheduler_step(scheduler, metric)
        except (ArithmeticError, ValueError, TypeError, IndexError) as error:
            raise UserError(
                f"{type(scheduler).__name__} fails after {self.trainer.global_step:,} optimizer steps ({error}); give "
                "lr_scheduler other settings."
            ) from error

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that the options ask for, and the one that keeps a resumed run resumable."""
        ending = [BestWeights()] if self.export == "best" else []
        samples = [LogSamples(self.samples)] if self.samples.number else []
        return [KeepEpochCount(), *samples, *ending]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The batch's share of the step's loss; its own mean is logged as ``train_loss`` when the step is taken.

        Raises:
            UserError: if the model mixes packed examples.
        """
        if not self._packing_checked:
            settle_mask(self.model)
            with remedies_by_key():
                check_packing(self.model, self._whole(batch), compute_dtype(self.model))
            self._packing_checked = True
        is_first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if is_first:
            self.batch_losses.begin()
        self._weight = self._step_loss.begin(batch, is_first)
        self._batch = self.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        mean, share = self._step_loss.of(self.model, batch)
        self.batch_losses.keep("train_loss", "training loss", mean, batch)
        return share * self._weight

    def _whole(self, batch: Batch) -> Batch:
        """All rows of a training batch, on the host, read again if it has this rank's alone."""
        own, loader = on_host(batch), self.trainer.train_dataloader
        return loader.batch(own.rows) if isinstance(own, DealtBatch) else own  # type: ignore[union-attr]

    def on_after_backward(self) -> None:
        """Add the prior's gradient to a training batch's, whose activations are gone by now."""
        if not self._prior:
            return
        precision = self.trainer.precision_plugin
        with precision.train_step_context():
            anchors = to_device(self._prior.anchors(self._batch), self.device)
            mean, share = self._prior.of(self.model, anchors)
        self.batch_losses.keep("train_prior", "prior term", mean, anchors)
        share = share * self._weight / self.trainer.accumulate_grad_batches
        precision.pre_backward(share, self).backward()  # scaled as the loss is, for float16

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the losses, and bring the accumulated gradients to that of the step's loss; Lightning clips it next.

        Raises:
            UserError: if a loss of the step is not finite.
        """
        for name, value in self.batch_losses.read(self.current_epoch).items():
            self.log(name, value, prog_bar=True)
        self.compact.add_up_gradients()
        self._step_loss.finish(self.compact.masters, self.trainer.accumulate_grad_batches)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by value, or by the norm over all ranks."""
        if world_size() > 1 and gradient_clip_val and gradient_clip_algorithm in (None, GradClipAlgorithmType.NORM):
            clip_norm(list(self.compact.masters), gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of the validation set of this index with one batch."""
        self.metrics.tokens(dataloader_idx).measure(self.model, batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Copy the masters alone, under their names: all that a callback that averages weights needs of this module.

        Lightning's StochasticWeightAveraging and WeightAveraging average a deep copy of the module with the module,
        parameter by parameter as far as the copy has any, and put the averages into the module for each validation and
        in the end. All else about the model is either constant or follows the masters (`on_validation_epoch_start`).
        """
        self.configure_model()
        copied = nn.Module()
        copied.compact = nn.Module()
        copied.compact.masters = deepcopy(self.compact.masters, memo)
        return copied

    def on_validation_epoch_start(self) -> None:
        """Copy the masters, which a callback may have exchanged, into the model; callbacks come first in each hook."""
        self.compact.write_back()

    def on_train_end(self) -> None:
        """Copy the masters, which callbacks may have exchanged, into the model."""
        self.compact.write_back()

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss``, ``val_perplexity`` and ``val_token_accuracy``.

        Of several validation sets these are the means over the sets; each set's own are ``val_loss/NAME`` and so on.
        Loggers get them by the number of optimizer steps that were taken, which checkpoints, samples and reports tell
        too; Lightning would give the index of the last batch, counted from 0.
        """
        self.compact.write_back()
        metrics = {f"val_{name}": value for name, value in self.metrics.finish().items()}
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        # the same on every rank already, of which Lightning knows nothing
        self.log_dict(metrics, sync_dist=True, logger=False if fitting else None)
        if fitting and not self.trainer.sanity_checking:
            logged: dict[str, Any] = {"epoch": self.current_epoch, **metrics}
            self.trainer._logger_connector.log_metrics(logged, step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the origin of the masters, and the gradients of an unfinished accumulation, if they are finite."""
        self.batch_losses.read(self.current_epoch)
        checkpoint["dualsft"] = {
            "origin": self._origin,
            "gradients": self.compact.pending_gradients(),
            "step": {**self._step_loss.state(), "batches": self.trainer.accumulate_grad_batches},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or selection; Lightning loads the masters, which hooks write back."""
        state = checkpoint.get("dualsft", {})
        if state.get("origin") != self._origin:
            raise UserError(
                "The checkpoint to resume from was made with another base model or another selection; give those, or "
                "start a new run in another --output_dir."
            )
        self._resumed_gradients, self._resumed_step = state["gradients"], state["step"]

    def on_train_start(self) -> None:
        """Check the schedule, draw the anchors, and continue an accumulation that the checkpoint was made in.

        A BatchSizeFinder starts training once for each size that it tries, before the fit itself has started. Lightning
        has just dropped all gradients. To ask for the run's length earlier would set up the data before a resumed run's
        position in it is known.
        """
        for config in self.trainer.lr_scheduler_configs:
            check_monitor(self.trainer, f"lr_scheduler ({type(config.scheduler).__name__})", config, self._logged)
            check_length(config.scheduler, self.trainer)
        follow_accumulation_schedule(self.trainer)
        if self._prior:
            self._prior.draw(self.trainer.datamodule)  # type: ignore[attr-defined]
        if self._resumed_gradients:
            self._check_resumed_step()
            self._step_loss.restore(self._resumed_step)
        self.compact.restore_gradients(self._resumed_gradients)
        self._resumed_gradients = {}

    def _check_resumed_step(self) -> None:
        before, now = self._resumed_step.get("batches"), self.trainer.accumulate_grad_batches
        if before != now:
            whose = "by an earlier release" if before is None else f"by a run with {before}"
            raise UserError(
                f"The checkpoint to resume from was made in the middle of a step, {whose}, and "
                f"trainer.accumulate_grad_batches is {now} now; resume as the run was started."
            )

    def _describe_origin(self) -> dict[str, str]:
        """The origin of a checkpoint: the base weights, the trained ones among them, and the chosen examples."""
        ids = self.selection.example_ids if self.selection else None
        examples = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        return {"base": self.base_fingerprint, "weights": self.compact.fingerprint, "examples": examples}


def _keep_the_masters(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Drop all but the masters from a state; the other weights are the base model's."""
    for name in [name for name in state if not name.startswith(f"{prefix}compact.")]:
        del state[name]


def _miss_the_masters_alone(module: nn.Module, differences: Any) -> None:
    missing = differences.missing_keys
    missing[:] = [name for name in missing if name.startswith("compact.")]
