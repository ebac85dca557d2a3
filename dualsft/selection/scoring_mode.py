"""The state in which a model is scored."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dualsft.models.loading import checkpoint_activations


@contextmanager
def scoring_mode(model: PreTrainedModel, checkpointing: bool) -> Iterator[None]:
    """Evaluation mode, in which activation checkpointing works all the same.

    A layer asks its ``training`` flag whether to checkpoint, and may ask the same flag whether to drop out: the flag is
    up for the first question alone.
    """
    model.eval()
    if not checkpointing:
        yield
        return
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return _Training(layers, False, then=True), _Training(layers, False, then=True)

    checkpoint_activations(model, context_fn=contexts)
    try:
        with _Training(layers, True, then=False):
            yield
    finally:
        checkpoint_activations(model)


class _Training(AbstractContextManager[None]):
    """The layers' flag up or down while the context is open; it may be opened again, as differentiating twice does."""

    def __init__(self, layers: Sequence[nn.Module], flag: bool, then: bool) -> None:
        self._layers, self._flag, self._then = layers, flag, then

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.training = self._flag

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.training = self._then
