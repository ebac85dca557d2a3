"""The type that a run holds its model in."""

from lightning import LightningModule

from dualsft.models.dtypes import FULL_PRECISION, settled_dtype
from dualsft.models.inspection import read_config
from dualsft.models.loading import Dtype, model_folder
from dualsft.runs.progress import say
from dualsft.sharding.collectives import on_all_ranks


def settle_dtype(module: LightningModule, name_or_path: str, dtype: Dtype) -> Dtype:
    """Settle the type to hold a module's model in by `settled_dtype`, and say so if it is not the checkpoint's.

    Without a trainer nothing is known of the device, and the type stays as it is.

    Raises:
        UserError: if there is no such model.
    """
    trainer = module._trainer
    if dtype != "auto" or trainer is None or trainer.precision not in FULL_PRECISION:
        return dtype
    if trainer.strategy.root_device.type != "cpu":
        return dtype
    config = on_all_ranks(lambda: read_config(model_folder(name_or_path)))
    settled = settled_dtype(config, dtype, cpu=True)
    if settled != dtype:
        say(
            f"{name_or_path} is stored in bfloat16, in which this CPU computes several times slower than in {settled}; "
            f"{settled} is taken, as model.dtype is auto."
        )
    return settled
