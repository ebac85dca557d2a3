"""Both budgets of one run, checked before any work; rank zero chooses, and all ranks get its choice."""

import itertools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dualsft.data.module import InstructionDataModule
from dualsft.models import PreTrainedModel
from dualsft.runs.folder import RunFolder
from dualsft.selection.data_choice import ChosenExamples, Measured, Pool, check_records, choose_data, data_budget
from dualsft.selection.mask import stored_masks, write_masks
from dualsft.selection.parameter_choice import (
    Base,
    all_that_may_be_chosen,
    choose_parameters,
    chooses_together,
    parameter_budget,
)
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.weight_scores import read_weight_scores
from dualsft.sharding.collectives import on_rank_zero
from dualsft.sharding.groups import job_group, world_size
from dualsft.sharding.shard_model import is_sharded


class Budgets:
    """Chooses weights and examples by their scores, under the budgets of one run.

    Raises:
        UserError: if a count exceeds the number available, a pattern matches no parameter, or the data allocator cannot
            choose from the records.
    """

    def __init__(
        self,
        settings: SelectionSettings,
        model: PreTrainedModel,
        data: InstructionDataModule,
        run: RunFolder,
        base: Base,
    ) -> None:
        self._settings, self._model, self._run, self._base = settings, model, run, base
        self._round = itertools.count()
        pool = data.train_examples
        self._pool = Pool(pool.records, pool.num_tokens, data.options)
        self._due = data_budget(settings, pool.num_tokens[pool.is_ok()])
        check_records(settings, pool.records, pool.ok_ids())
        parameter_budget(settings, {name: p.numel() for name, p in model.named_parameters() if p.requires_grad})

    def mask(self, scores: Path | None) -> Mapping[str, Tensor]:
        """Choose weights by the φ_j in a folder: parameter name -> bool, of the full shape.

        Without scores, where no weights are to be chosen, all are that may be.

        An allocator gets all scores at once, so the host of a single process holds them in this step. Several ranks
        read each from its file when it is asked for. They choose together if the allocator can; otherwise rank zero
        chooses. It writes the masks, and all ranks read those.
        """
        if scores is None:
            weights = self._model.named_parameters()
            return all_that_may_be_chosen(self._settings, {name: p.shape for name, p in weights if p.requires_grad})
        full = read_weight_scores(scores)
        if not is_sharded(self._model) and world_size() == 1:
            return choose_parameters(self._settings, dict(full), self._base)
        path = self._run.staging(f"choice-{next(self._round)}") / "mask.safetensors"
        if chooses_together(self._settings):
            group = job_group()
            write_masks(path, choose_parameters(self._settings, full, self._base, group), group)
        else:
            on_rank_zero(lambda: write_masks(path, choose_parameters(self._settings, full, self._base)))
        return stored_masks(path)

    def examples(self, scores: Mapping[int, float], measured: Measured) -> ChosenExamples:
        """Choose examples by φ_i and by the statistics measured of each, both by example id."""
        return on_rank_zero(lambda: choose_data(self._settings, self._due, scores, self._pool, measured))
