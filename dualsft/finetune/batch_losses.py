"""The losses of a step's batches: they stay on the device until the step is due, and are then read together."""

from typing import NamedTuple

from torch import Tensor

from dualsft.data.dealing import extent_of
from dualsft.data.layout import Batch
from dualsft.errors import UserError
from dualsft.matrix.readout import read_together


class _Loss(NamedTuple):
    """A loss: its name, what errors call it, its mean over a batch, and the batch."""

    name: str
    what: str
    mean: Tensor
    batch: Batch


class BatchLosses:
    """Keeps the losses of a step's batches.

    Attributes:
        latest: The latest loss of each name, on the device.
    """

    def __init__(self) -> None:
        self.latest: dict[str, Tensor] = {}
        self._kept: list[_Loss] = []

    def begin(self) -> None:
        """Forget the losses of the last step."""
        self._kept = []

    def keep(self, name: str, what: str, mean: Tensor, batch: Batch) -> None:
        """Keep the mean over a batch of a loss, which errors call ``what``."""
        self.latest[name] = mean
        self._kept.append(_Loss(name, what, mean, batch))

    def read(self, epoch: int) -> dict[str, Tensor]:
        """Read what was kept, with one wait for the device: of each name the last, on the host.

        Raises:
            UserError: if one is not finite: the step would ruin the weights.
        """
        values = read_together([of.mean for of in self._kept]) if self._kept else []
        for of, value in zip(self._kept, values, strict=True):
            if not bool(value.isfinite()):
                raise UserError(
                    f"The {of.what} became {value.item()} in epoch {epoch}, at the examples "
                    f"{extent_of(of.batch).ids}; remove the bad ones, or lower the learning rate."
                )
        return {of.name: value.float() for of, value in zip(self._kept, values, strict=True)}
