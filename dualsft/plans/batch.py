"""The largest batch of a phase: as many examples as fit, each as long as allowed."""

from dataclasses import dataclass, replace

import torch

from dualsft.data.layout import Batch, Layout, PlacedBatch


@dataclass(frozen=True)
class BatchShape:
    """Rows and tokens of a batch without padding, and the share of its tokens that are supervised."""

    rows: int
    tokens: int
    supervised: float = 1.0

    @property
    def size(self) -> int:
        """Its tokens."""
        return self.rows * self.tokens

    @property
    def num_supervised(self) -> int:
        """Its supervised tokens; the first of a row has none before it to be predicted from."""
        return max(1, round(self.supervised * self.rows * (self.tokens - 1)))

    def alone(self) -> "BatchShape":
        """A batch of one example."""
        return replace(self, rows=1)

    def make(self) -> Batch:
        """The batch itself; which tokens are supervised would be a matter of values, of which there may be none."""
        ids = torch.zeros(self.rows, self.tokens, dtype=torch.int64)
        batch = PlacedBatch({"input_ids": ids, "labels": torch.zeros_like(ids)}, ids.device)
        batch.predicting = torch.zeros(self.num_supervised, dtype=torch.int64)
        return batch

    def layout(self) -> "ByProduct":
        """Its layout."""
        return ByProduct(self.rows, self.tokens, [(row, 0, self.tokens) for row in range(self.rows)])


class ByProduct(Layout):
    """A layout for which linear layers never form one example's gradient after the other (`LinearTap`).

    That way takes thousands of small operations on blocks, and no more memory than the other.
    """

    @property
    def mean_length(self) -> float:
        """Too short to pay."""
        return 0.0


def scoring_batch(batch_tokens: int, max_length: int, supervised: float) -> BatchShape:
    """The largest batch of a scoring pass: the longest examples come first."""
    return training_batch(batch_tokens, max_length, batch_tokens, 1, supervised)


def training_batch(batch_tokens: int, max_length: int, batch_size: int, ranks: int, supervised: float) -> BatchShape:
    """A rank's part of the largest training batch; the ranks share the rows of a batch."""
    tokens = min(max_length, batch_tokens)
    rows = max(1, min(batch_tokens // tokens, batch_size))
    return BatchShape(-(-rows // ranks), tokens, supervised)
