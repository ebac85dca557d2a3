"""The untouched base model, for terms that compare the model with it.

A second copy of the weights is held while such a term's pass runs, and at no other time: then there is one accumulator
beside the model, where scoring holds an accumulator and a direction, so the copy is not the peak of the run. At the
base model itself the model is its own teacher.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


class Teacher:
    """Lends the base model.

    Args:
        model: The model at the scoring checkpoint.
        load: Loads the base model onto the host.
        untouched: Whether the scoring checkpoint is the base model.
    """

    def __init__(self, model: PreTrainedModel, load: Callable[[], PreTrainedModel], untouched: bool) -> None:
        self._model, self._load, self._untouched = model, load, untouched

    @contextmanager
    def lent(self, displaced: bool = False) -> Iterator[PreTrainedModel]:
        """The base model in evaluation mode; a copy of its own, but where the model is the base model.

        Args:
            displaced: Whether the model's weights are not at the scoring checkpoint while it is lent.
        """
        if self._untouched and not displaced:
            yield self._model
            return
        copy = self._load()
        copy.to(self._model.device, self._model.dtype)  # type: ignore[arg-type]  # transformers wraps it without a type
        copy.eval().requires_grad_(False)
        try:
            yield copy
        finally:
            del copy
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()
