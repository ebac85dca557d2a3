"""A mask of padding is given to a model only if it makes a difference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.models.rope import separate_frequencies
from dualsft.objectives import example_losses
from dualsft.objectives.inputs import settle_mask
from tests.cases import ARCHITECTURES, collate, llama, make, make_examples

BATCH = collate(make_examples())


def masks_given(model: Any) -> list[bool]:
    """Whether each call of the model from now on has a mask."""
    given: list[bool] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: given.append("attention_mask" in kwargs), with_kwargs=True)
    return given


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_architecture_needs_a_mask_behind_its_tokens(architecture: str) -> None:
    """Losses and gradients of a padded batch are those of one with a mask, which the model is not given."""
    model, found = make(architecture), {}
    assert not settle_mask(model)
    masks = masks_given(model)
    for mask in (False, True):
        losses = example_losses(model, BATCH) if not mask else masked_losses(model)
        found[mask] = (losses.detach(), torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True))
    assert masks == [False, True]
    torch.testing.assert_close(found[False], found[True], rtol=1e-9, atol=1e-9)  # float32 norms within


def masked_losses(model: Any) -> Tensor:
    """The losses of the batch from a model that is given the mask."""
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": BATCH["attention_mask"]}),
        with_kwargs=True,
        prepend=True,
    )
    try:
        return example_losses(model, BATCH)
    finally:
        handle.remove()


@pytest.mark.parametrize("reads", ["its mask", "its padding"])
def test_a_model_that_reads_padding_is_given_the_mask(reads: str) -> None:
    """Found by its losses, once; a model of the same class that does not is not given one."""

    def read(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        mask = kwargs.get("attention_mask")
        last = kwargs["input_ids"][:, -1] if reads == "its padding" else torch.zeros(1)
        last = mask.sum(1) if mask is not None and reads == "its mask" else last
        output.logits = output.logits * (1 + last[:, None, None] / 100)
        return output

    model, other = make("llama"), make("llama")
    model.register_forward_hook(read, with_kwargs=True)
    masks, of_other, unknown = masks_given(model), masks_given(other), make("llama")
    for _ in range(2):
        assert settle_mask(model.train())
        assert not settle_mask(other.train())
        example_losses(model, BATCH)
        example_losses(other, BATCH)
    assert masks == [True, False, True, True]
    assert of_other == [True, False, False, False]
    assert all(module.training for module in model.modules())
    unsettled = masks_given(unknown)
    example_losses(unknown, BATCH)
    assert settle_mask(unknown, like=model)
    assert unsettled == [True]


def test_frequencies_of_an_examples_own_length_are_found_from_the_mask() -> None:
    """They are the same for short examples, with a mask and without."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    torch.manual_seed(0)
    model = llama(rope_parameters=scaling).eval()
    separate_frequencies(model)
    assert settle_mask(model)
