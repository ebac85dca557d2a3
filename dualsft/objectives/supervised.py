"""The supervised tokens of a batch: their labels, what stands at the tokens before them, and values brought to them.

They are found on the host where that still has the batch, as an accelerator would make it wait to be told how many.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualsft.data.layout import Batch, predicting


@dataclass(frozen=True)
class Supervised:
    """The supervised tokens, row by row; a row's first token is none of them, as nothing predicts it.

    Attributes:
        before: Where the token before each is, among the tokens of all rows: its logits predict it.
        labels: Of the batch.
    """

    before: Int[Tensor, " supervised"]
    labels: Int[Tensor, "row token"]

    @classmethod
    def of(cls, batch: Batch) -> "Supervised":
        """Those of a padded or packed batch."""
        return cls(predicting(batch), batch["labels"])

    def __len__(self) -> int:
        return len(self.before)

    @property
    def targets(self) -> Int[Tensor, " supervised"]:
        """The label of each."""
        return self.labels.flatten()[self.before + 1]

    def pick(self, values: Float[Tensor, "row token channel"]) -> Float[Tensor, "supervised channel"]:
        """What stands at the token before each."""
        return values.flatten(0, 1).index_select(0, self.before)

    def spread(self, values: Float[Tensor, " supervised"]) -> Float[Tensor, "row token"]:
        """Values of each at its place; 0 elsewhere."""
        flat = torch.zeros(self.labels.numel(), dtype=values.dtype, device=values.device)
        return flat.scatter(0, self.before + 1, values).view(self.labels.shape)
