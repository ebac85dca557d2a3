"""Models and their files.

In: a Hugging Face folder or hub id. Out: a loaded model, its fingerprint, its stored weights.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel
else:  # annotations need no more: importing the class takes as long as all of this package
    from torch.nn import Module as PreTrainedModel

__all__ = ["PreTrainedModel"]
