"""argtop_i <v, P ⊙ g_i> / (‖v‖ ‖P ⊙ g_i‖), the cosine of the validation gradient and the example's Adam step.

Source: Xia, Malladi, Gururangan, Arora, Chen, "LESS: Selecting Influential Data for Targeted Instruction Tuning", arXiv
2402.04333 (2024). With the scorer first_order, φ_i = (η/n) <v, P ⊙ g_i>, so that φ_i / ‖P ⊙ g_i‖ has the same order.

What differs from LESS: exact gradients of all weights, where it has random projections of LoRA gradients; one
checkpoint, where it adds up those of several epochs; no momentum in the Adam step, only P = 1/(sqrt(ĉ)+eps); one
validation set, where it takes the best of several subtasks.
"""

import torch
from torch import Tensor

from dualsft import DataAllocator, ScoredExamples
from dualsft_baselines.ranking import largest_examples


class Less(DataAllocator):
    """The examples whose Adam steps point most nearly along the validation gradient (LESS, arXiv 2402.04333).

    Goes with the scorer first_order and the preconditioner adam. An example without any gradient has cosine 0; ties go
    to the earlier row.
    """

    needs = ("preconditioned_gradient_norm",)

    def allocate(self, examples: ScoredExamples, budget: int) -> Tensor:
        """Exactly ``budget`` ids, ascending."""
        norm = examples.preconditioned_gradient_norm
        assert norm is not None
        cosine = torch.where(norm > 0, examples.score / norm, 0.0)  # but for a factor that all have in common
        return largest_examples(examples, cosine, budget)
