"""The optimizer and the learning rate schedule of a masked fine-tune, from the user's factories.

An optimizer sees the selected entries of each tensor as one vector. Most of torch's work entry by entry, and LBFGS on
inner products, to which omitted entries add nothing: they train as on dense tensors with masked gradients. An optimizer
that needs the tensor's shape is refused, or the log says what it does instead.
"""

from collections.abc import Iterable

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import LBFGS, Adafactor, Optimizer, SparseAdam
from torch.optim.lr_scheduler import OneCycleLR

from dualsft.errors import UserError
from dualsft.runs.progress import say
from dualsft.sharding.groups import calls_alone, world_size


def make_optimizer(factory: OptimizerCallable, parameters: Iterable[nn.Parameter], accumulated: int) -> Optimizer:
    """The optimizer over the compact parameters, whose gradients are accumulated over ``accumulated`` batches.

    Raises:
        UserError: if the optimizer refuses its settings, or cannot work on these parameters.
    """
    try:
        optimizer = factory(parameters)
    except (TypeError, ValueError) as error:
        shape = ", but sees each tensor's selected weights as one vector" if "2D" in str(error) else ""
        raise UserError(f"The optimizer cannot be made: {error}{shape}.") from error
    if isinstance(optimizer, SparseAdam):
        raise UserError("SparseAdam takes sparse gradients alone, and those of a language model are dense; give Adam.")
    if isinstance(optimizer, LBFGS if calls_alone() else (LBFGS, Adafactor)) and world_size() > 1:
        raise UserError(
            f"{type(optimizer).__name__} works with norms and products of whole tensors, of which each rank has a "
            "part; give an optimizer that works entry by entry, such as AdamW, or set trainer.devices to 1."
        )
    if isinstance(optimizer, LBFGS) and accumulated > 1:
        raise UserError(
            "LBFGS evaluates the loss several times in a step, for which "
            f"trainer.accumulate_grad_batches={accumulated} has no meaning; set it to 1 and raise data.batch_size and "
            "data.batch_tokens instead."
        )
    if isinstance(optimizer, Adafactor):
        say(
            "Adafactor takes each tensor's selected weights as one vector: their second moment is kept whole, not "
            "factored, and its norms are over them alone."
        )
    return optimizer


def make_schedule(factory: LRSchedulerCallable, optimizer: Optimizer) -> OptimizerLRSchedulerConfig:
    """The learning rate schedule, stepped once per optimizer step; one on a metric once per epoch."""
    try:
        schedule = factory(optimizer)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"The learning rate schedule cannot be made: {error}.") from error
    if isinstance(schedule, ReduceLROnPlateau):
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": schedule.monitor}}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_length(schedule: object, trainer: Trainer) -> None:
    """Refuse a OneCycleLR that ends before the run: it would raise an error then, and the last steps would be lost."""
    if not isinstance(schedule, OneCycleLR):
        return
    try:
        needed = trainer.estimated_stepping_batches
    except MisconfigurationException:  # unknown where the accumulation changes between epochs
        return
    if schedule.total_steps < needed:
        raise UserError(
            f"lr_scheduler.total_steps is {schedule.total_steps:,}, but the run has {needed:,.0f} optimizer steps; "
            "give OneCycleLR at least as many."
        )
