"""Baselines from the literature: other ways to choose the examples and the weights to train."""

from dualsft_baselines.gradient_norm import GradientNorm
from dualsft_baselines.hft import HalfFineTuning
from dualsft_baselines.less import Less
from dualsft_baselines.less_checkpoints import LessCheckpoints
from dualsft_baselines.lift import Lift
from dualsft_baselines.longest_response import LongestResponse
from dualsft_baselines.loss import Loss
from dualsft_baselines.magnitude import Magnitude
from dualsft_baselines.sift import Sift
from dualsft_baselines.train_on_validation import TrainOnValidation

__all__ = [
    "GradientNorm",
    "HalfFineTuning",
    "Less",
    "LessCheckpoints",
    "Lift",
    "LongestResponse",
    "Loss",
    "Magnitude",
    "Sift",
    "TrainOnValidation",
]
