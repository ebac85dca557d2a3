"""Which examples the data budget buys."""

from torch import Tensor

from dualsft import DataAllocator, ScoredExamples


class MyExamples(DataAllocator):
    """The examples with the highest scores; ties go to the earlier row."""

    def allocate(self, examples: ScoredExamples, budget: int) -> Tensor:
        """The chosen ids, (budget), ascending."""
        best = examples.score.argsort(descending=True, stable=True)[:budget]
        return examples.example_id[best].sort().values
