"""The state in which a model is scored."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dualsft.models import checkpoint_activations


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
        return _training(layers, False, then=True), _training(layers, False, then=True)

    checkpoint_activations(model, context_fn=contexts)
    try:
        with _training(layers, True, then=False):
            yield
    finally:
        checkpoint_activations(model)


@contextmanager
def _training(layers: Sequence[nn.Module], flag: bool, then: bool) -> Iterator[None]:
    for layer in layers:
        layer.training = flag
    try:
        yield
    finally:
        for layer in layers:
            layer.training = then
