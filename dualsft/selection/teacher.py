"""The untouched base model, for terms that compare the model with it.

A second copy of the weights is held while such a term's pass runs, and at no other time. In a gradient's pass there is
one accumulator beside the model, where scoring holds an accumulator and a direction: there the copy adds nothing to the
peak of the run, but for the teacher's probabilities of a batch's supervised tokens. At the base model itself the model
is its own teacher.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn

from dualsft.errors import advising
from dualsft.models import PreTrainedModel
from dualsft.sharding.shard_model import is_sharded

ADVICE = (
    "a prior term needs the base model beside the model: set model.dtype to bfloat16 and start anew (--overwrite), or "
    "set model.prior.weight to 0"
)


class Teacher:
    """Provides the base model for the time of a pass.

    Args:
        model: The model at the scoring checkpoint.
        load: Loads the base model onto the host.
        untouched: Whether the scoring checkpoint is the base model.
    """

    def __init__(self, model: PreTrainedModel, load: Callable[[], PreTrainedModel], untouched: bool) -> None:
        self._model, self._load, self._untouched = model, load, untouched

    @contextmanager
    def available(self, displaced: bool = False) -> Iterator[PreTrainedModel]:
        """Provide the base model in evaluation mode: a copy, unless the model is at the base model's weights itself.

        Args:
            displaced: Whether the model's weights are not at the scoring checkpoint meanwhile.

        Raises:
            UserError: if memory runs out.
        """
        if self._untouched and not displaced:
            yield self._model
            return
        with advising("at loading the base model for the prior term", ADVICE):
            copy = self._load()
            copy.eval().requires_grad_(False)
            if not is_sharded(copy):  # a sharded copy is loaded to its devices
                _match(copy, self._model)
        yield copy


def _match(copy: nn.Module, model: nn.Module) -> None:
    """Move each tensor to the device and type of the model's tensor of that name; a model may have several types."""
    there = _tensors(model)
    for name, tensor in _tensors(copy).items():
        tensor.data = tensor.data.to(there[name].device, there[name].dtype)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))
