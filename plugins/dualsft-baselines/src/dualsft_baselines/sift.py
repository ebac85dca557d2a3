"""u = sign(ḡ) / n, so that φ_j = u_j Σ_i g_ij = |ḡ_j|: the size of the accumulated gradient.

Source: Song, Li, Zhang, Zhao, Du, "Sparse is Enough in Fine-tuning Pre-trained Large Language Models" (SIFT), arXiv
2312.11875 (2023), which trains the weights with the largest gradients. What differs: the gradient is that of the whole
pool, where the paper's release takes the first batch's, and the allocator spends the budget, where the release trains
the same share of each matrix.
"""

from torch import Tensor

from dualsft import ParameterStatistics, Scorer


class Sift(Scorer):
    """The size of the pool's mean gradient, |ḡ|, whatever the validation set (SIFT, arXiv 2312.11875).

    It scores weights. An example's score is then <sign ḡ, g_i> / n, which the paper has no use for: choose examples by
    an allocator that does without, or all of them.
    """

    needs = ("pool_gradient",)

    def direction(self, statistics: ParameterStatistics) -> Tensor:
        """Sign(ḡ) / n, of the parameter's shape."""
        assert statistics.pool_gradient is not None
        return statistics.pool_gradient.sign() / statistics.num_examples
