"""A data module of which a few batches' examples take part, for a run that is to tell what the whole one takes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dualsft.data.batches import BatchIds, length_batches
from dualsft.data.examples import Examples
from dualsft.data.module import InstructionDataModule
from dualsft.data.options import TRAIN
from dualsft.data.selected import selected_ids

BATCHES = 6
"""How many scoring batches are taken of a pool or a validation set."""
_LEFT_OUT, _NOT_SELECTED = "left out", "not selected"


class Tokens(NamedTuple):
    """How many tokens take part, and how many there are that would."""

    sample: int
    whole: int


class SampledDataModule(InstructionDataModule):
    """Instruction data of which the largest batch takes part, and others spread evenly over all lengths.

    Records and ids are those of all data; examples that do not take part count as if they had no labels.
    """

    def tokens(self) -> dict[str, Tokens]:
        """What has been encoded: the option that gives it -> its tokens, those of a selection's examples alone."""
        return {key: _tokens(examples) for key, examples in self.encoded.items()}

    def _encoded(self, key: str) -> Examples:
        if key not in self._examples:
            whole = super()._encoded(key)
            ids = whole.ok_ids()
            if key == TRAIN and self.selection is not None:
                ids = sorted(set(ids) & set(selected_ids(self.selection, whole.records)))
            self._examples[key] = _sample(whole, ids, length_batches(whole.lengths, self.batch_tokens, ids=ids))
        return self._examples[key]


def _sample(whole: Examples, ids: Sequence[int], batches: Sequence[BatchIds]) -> Examples:
    """The examples with those alone ``ok`` that are in a few of the batches."""
    places = np.unique(np.linspace(0, max(0, len(batches) - 1), BATCHES).round().astype(int))
    names = (*whole.status_names, _LEFT_OUT, _NOT_SELECTED)
    status = np.where(whole.is_ok(), np.int8(names.index(_NOT_SELECTED)), whole.status_codes)
    status[list(ids)] = names.index(_LEFT_OUT)
    status[[i for k in places[: len(batches)] for i in batches[k]]] = 0
    return replace(whole, status_codes=status, status_names=names)


def _tokens(examples: Examples) -> Tokens:
    left_out = examples.status_codes == examples.status_names.index(_LEFT_OUT)
    sample, others = (int(examples.lengths[these].sum()) for these in (examples.is_ok(), left_out))
    return Tokens(sample, sample + others)
