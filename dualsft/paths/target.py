"""The path of a training on the target: how each example's loss moves while the model learns the validation set.

It starts at the scoring checkpoint, after the warm-up on the pool, so that what any training teaches is not taken for
what the target teaches.
At a checkpoint before the skill is there the validation gradient has no component along it; this path goes there.
On the data side it is Train on Validation: Jain, Montanari, Sasoglu (ICLR 2026).
"""

from dualsft.paths.base import ScoringPath


class TargetPath(ScoringPath):
    """Training on the validation set, u_k = θ_k − θ_{k+1}: what learning the target does to each example's loss."""

    trains_on = "target"
