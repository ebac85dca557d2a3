"""By l_i, the mean loss per supervised token, which is the logarithm of the response's perplexity.

Source: Marion, Üstün, Pozzobon, Wang, Fadaee, Hooker, "When Less is More: Investigating Data Pruning for Pretraining
LLMs at Scale", arXiv 2309.04564 (2023), where the middle of the perplexities trains best. What differs: there a
reference model reads whole texts for pre-training; here the scoring checkpoint reads responses.
"""

from typing import Literal

import torch
from torch import Tensor

from dualsft import DataAllocator, ScoredExamples, UserError
from dualsft_baselines.ranking import largest_examples

_KEEP = ("highest", "lowest", "middle")


class Loss(DataAllocator):
    """The examples of highest, lowest or middle loss per token (pruning by perplexity, arXiv 2309.04564).

    Ties go to the earlier row.

    Args:
        keep: highest, lowest, or middle: as many examples are left out above as below (or one more above).
    """

    needs = ("loss",)

    def __init__(self, keep: Literal["highest", "lowest", "middle"] = "middle") -> None:
        if keep not in _KEEP:
            raise UserError(f"loss keeps the 'highest', the 'lowest' or the 'middle', not {keep!r}.")
        self.keep = keep

    def allocate(self, examples: ScoredExamples, budget: int) -> Tensor:
        """Exactly ``budget`` ids, ascending."""
        loss = examples.loss
        assert loss is not None
        if self.keep != "middle":
            return largest_examples(examples, loss, budget, reverse=self.keep == "lowest")
        below = (len(loss) - budget) // 2
        ascending = torch.sort(loss, stable=True).indices
        return examples.example_id[ascending[below : below + budget]].sort().values
