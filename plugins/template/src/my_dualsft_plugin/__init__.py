"""My own ways to choose the examples and the weights to train."""

from my_dualsft_plugin.examples import MyExamples
from my_dualsft_plugin.path import MyPath
from my_dualsft_plugin.scorer import MyScorer
from my_dualsft_plugin.weights import MyWeights

__all__ = ["MyExamples", "MyPath", "MyScorer", "MyWeights"]
