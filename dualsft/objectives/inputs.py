"""What a model is given of a batch; and whether it needs to be told which tokens are padding.

Padding stands behind an example's own tokens, and attention is causal: no real token sees it. So most models give the
same losses without a mask, and without one attention runs in its fast kernels: any mask rules out flash attention.
What a model makes of the mask elsewhere cannot be read off it, so that its losses decide, once.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from dualsft.data.layout import Batch
from dualsft.models import PreTrainedModel
from dualsft.models.rope import has_separate_frequencies
from dualsft.sharding.shards import compute_device

_LENGTHS = (12, 7, 3)
"""Real tokens of the rows that are compared; most of the last row is padding."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_PRECISION_TOLERANCE = 2e-2

_NEEDS_MASK: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The arguments of a causal language model for a batch, padded or packed; no mask if `settle_mask` found it idle.

    The first token of a packed example has no label, as no token before it is the example's own; without an attention
    mask the position ids keep packed examples apart.
    """
    names = ["input_ids", "position_ids"] + ["attention_mask"] * _NEEDS_MASK.get(model, True)
    return {name: batch[name] for name in names if name in batch} | {"use_cache": False}


def settle_mask(model: PreTrainedModel, like: PreTrainedModel | None = None) -> bool:
    """Find out, once, whether some loss of a padded batch depends on the mask or on what the padding is.

    All ranks of a sharded model call this together, as it runs the model, unless what was found of another model of the
    same architecture (``like``) is to hold for it.
    """
    if like is not None:
        _NEEDS_MASK[model] = _NEEDS_MASK.get(like, True)
    elif model not in _NEEDS_MASK:
        # frequencies that depend on an example's length are found from the mask, and equal for short examples
        _NEEDS_MASK[model] = has_separate_frequencies(model) or not _same_without_mask(model)
    return _NEEDS_MASK[model]


@torch.no_grad()
def _same_without_mask(model: PreTrainedModel) -> bool:
    lengths = torch.tensor(_LENGTHS)
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, inside.shape, generator=torch.Generator().manual_seed(0))
    padded, mask, ids = (x.to(compute_device(model)) for x in (ids.where(inside, 0), inside.long(), ids))
    training = [module for module in model.modules() if module.training]
    model.eval()
    with_mask, without = _losses(model, padded, mask), _losses(model, ids, None)  # other tokens in place of padding
    for module in training:
        module.training = True
    return same_but_for_rounding(model, *(losses[mask[:, 1:].bool()] for losses in (with_mask, without)))


def same_but_for_rounding(model: PreTrainedModel, one: Tensor, other: Tensor) -> bool:
    """Whether outputs of a model, such as losses, are the same sums, perhaps added in another order.

    Then they differ by a few units of the last place (of float32 in a float64 model, as norms compute in it), and else
    by about their size.
    """
    dtypes = (model.dtype, one.dtype, other.dtype)
    near = max(_TOLERANCE.get(dtype, _HALF_PRECISION_TOLERANCE) for dtype in dtypes)
    return torch.allclose(one.double(), other.double(), rtol=near, atol=near)


def _losses(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Negative log-likelihood of each token after a row's first, in the type of the logits."""
    masked = {} if mask is None else {"attention_mask": mask}
    logits = model(input_ids=ids, **masked, use_cache=False).logits
    scores = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none").to(logits.dtype)
