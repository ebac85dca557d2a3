"""Lightning's Trainer with one more verb: select."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer as LightningTrainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.prediction_loop import _PredictionLoop
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from dualsft.data.module import InstructionDataModule
from dualsft.data.options import validation_sources
from dualsft.data.sources import paths_of
from dualsft.errors import UserError
from dualsft.runs.folder import RunFolder
from dualsft.runs.loggers import make_loggers
from dualsft.selection import Selection
from dualsft.selection.example_tokens import TokenScores, score_tokens
from dualsft.selection.module import SelectionModule
from dualsft.selection.remedies import remedies_by_key
from dualsft.selection.run import run_selection
from dualsft.sharding.strategy import DDP, RANKS


class Trainer(LightningTrainer):
    """Lightning's Trainer, which can also select; it takes the arguments of `lightning.Trainer`.

    Args:
        strategy: As Lightning's; ``ddp`` is `dualsft.sharding.strategy.DDP`, ``fsdp2`` and ``hsdp`` are `FSDP2` there.
        logger: A logger of Lightning's, or a short name of one that writes under the output folder: csv, tensorboard or
            wandb; several of either in a list; false for none.
    """

    def __init__(
        self,
        *args: Any,
        strategy: str | Strategy = "auto",
        logger: Logger | Iterable[Logger | str] | bool | str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(logger, bool | None):
            place = kwargs.get("default_root_dir")
            logger = make_loggers(logger, Path(place) if place else None)
        super().__init__(*args, strategy=DDP() if strategy == "ddp" else strategy, logger=logger, **kwargs)

    def select(
        self,
        model: SelectionModule,
        datamodule: InstructionDataModule,
        output_dir: str | RunFolder,
        resume: bool = False,
        overwrite: bool = False,
        seed: int = 0,
        config: str = "",
    ) -> Selection:
        """Score every example and every weight, choose a subset of each, and write a selection directory.

        Args:
            model: What to score, how, and the budgets.
            datamodule: The pool (``train``) and the target's validation set.
            output_dir: Where the selection goes; a folder that has been looked at has its own ``resume`` and
                ``overwrite``.
            resume: Resume the killed run in ``output_dir``.
            overwrite: Replace what an earlier run left in ``output_dir``.
            seed: Decides which examples the warm-up draws, and their order.
            config: YAML that replays the run, kept beside the results.

        Raises:
            UserError: on a mistake in the input or the settings. One that shows before work starts leaves no trace;
                after one that shows later, ``resume`` continues from the last finished phase.
        """
        run = output_dir
        if not isinstance(run, RunFolder):
            read = (datamodule.train, *validation_sources(datamodule.validation).values())
            paths = (path for given in read for path in paths_of(given))
            inputs = (model.model_name_or_path, model.settings.warmup.checkpoint, *paths)
            run = RunFolder(run, resume=resume, overwrite=overwrite, inputs=inputs)
        work = partial(run_selection, model, datamodule, run, seed, config)
        with self._in_place_of_prediction(model, datamodule, run, work):
            return call._call_and_handle_interrupt(self, self._run, model)

    def score_tokens(
        self, model: SelectionModule, datamodule: InstructionDataModule, run: RunFolder, ids: Sequence[int], seed: int
    ) -> TokenScores:
        """Score the tokens of some examples as `select` would; see `dualsft.selection.example_tokens`."""
        work = partial(score_tokens, model, datamodule, run, seed, ids)
        with self._in_place_of_prediction(model, datamodule, run, work):
            return call._call_and_handle_interrupt(self, self._run, model)

    @contextmanager
    def _in_place_of_prediction(
        self, model: SelectionModule, datamodule: InstructionDataModule, run: RunFolder, work: Callable[[bool], Any]
    ) -> Iterator[None]:
        """Have this trainer run a work of scoring in its devices, precision and strategy."""
        if not isinstance(self.strategy, (SingleDeviceStrategy, *RANKS)):
            raise UserError(
                f"select cannot run under {type(self.strategy).__name__} on {self.world_size} processes; set "
                "trainer.strategy to ddp, which holds the whole model on each, to fsdp2 or hsdp, which shard it, or "
                "trainer.devices to 1 and leave trainer.strategy at auto."
            )
        loop = _SelectionLoop(self, work)
        # Lightning sets up devices, precision and strategy per verb; selection borrows predict's place, which comes
        # without optimizers, and puts its own loop there.
        usual, self.predict_loop = self.predict_loop, loop
        self.strategy._lightning_module = model
        self.state.fn, self.state.status = TrainerFn.PREDICTING, TrainerStatus.RUNNING
        self.predicting = True
        try:
            self._data_connector.attach_data(model, datamodule=datamodule)
            yield
        except BaseException:
            run.release()  # what is worth resuming stays
            raise
        finally:
            self.predict_loop = usual


class _SelectionLoop(_PredictionLoop):
    def __init__(self, trainer: LightningTrainer, work: Callable[[bool], Any]) -> None:
        super().__init__(trainer)
        self._work = work

    def run(self) -> Any:
        """Run the phases under the trainer's precision."""
        _obey_sigterm(self.trainer)
        show = self.trainer.progress_bar_callback is not None
        precision = self.trainer.precision_plugin.forward_context()
        with remedies_by_key(), torch.enable_grad(), precision, _fresh_casts(self.trainer.lightning_module.device):
            return self._work(show)


def _obey_sigterm(trainer: LightningTrainer) -> None:
    """Restore the earlier SIGTERM handler, as Lightning's relies on loops that check for the signal."""
    handlers: dict[Any, Any] = trainer._signal_connector._original_handlers
    before = handlers.get(signal.SIGTERM)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _fresh_casts(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast, where it is on, without its cache, which would keep casts of weights from before the warm-up.

    Lightning's newest releases leave the cache out by themselves; not all that we run under do.
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)
