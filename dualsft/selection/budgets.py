"""Both budgets of one run, checked before any work; rank zero chooses, and all ranks learn what was chosen."""

import itertools
from collections.abc import Callable, Mapping

from torch import Tensor

from dualsft.data.module import InstructionDataModule
from dualsft.models import PreTrainedModel
from dualsft.runs.folder import RunFolder
from dualsft.selection.data_choice import ChosenExamples, DataChoice, Measured, Pool, choose_data
from dualsft.selection.parameter_choice import ParameterChoice, choose_parameters, choose_sharded_parameters
from dualsft.selection.settings import SelectionSettings
from dualsft.sharding.collectives import on_rank_zero
from dualsft.sharding.shard_model import is_sharded


class Budgets:
    """Chooses weights and examples by their scores, under the budgets of one run.

    Args:
        settings: The budgets and their allocators.
        model: The model that is scored.
        data: The pool.
        run: Has room for the scores of a sharded model.
        base: Loads the base model's weights, if the parameter allocator needs them.

    Raises:
        UserError: if a count is above what there is, or a pattern matches no parameter.
    """

    def __init__(
        self,
        settings: SelectionSettings,
        model: PreTrainedModel,
        data: InstructionDataModule,
        run: RunFolder,
        base: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self._model, self._run, self._round = model, run, itertools.count()
        pool = data.train_examples
        self._pool = Pool(pool.records, pool.num_tokens, data.options)
        self._data = DataChoice(settings.data_allocator, settings.data_budget, settings.near_duplicates)
        self._due = self._data.count([int(pool.num_tokens[i]) for i in pool.ok_ids()])
        self._parameters = ParameterChoice(
            settings.parameter_allocator, settings.parameter_budget, settings.trainable, settings.frozen, base
        )
        self._parameters.count({name: p.numel() for name, p in model.named_parameters() if p.requires_grad})

    def mask(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Choose weights: parameter name -> bool, of the parameter's full shape.

        Args:
            scores: Parameter name -> φ_j; of a sharded model this rank's shard.
        """
        if not is_sharded(self._model):
            return choose_parameters(self._parameters, scores)
        folder = self._run.staging(f"choice-{next(self._round)}")
        return choose_sharded_parameters(self._parameters, scores, self._model, folder)

    def examples(self, scores: Mapping[int, float], measured: Measured) -> ChosenExamples:
        """Choose examples.

        Args:
            scores: Example id -> φ_i.
            measured: What else was measured of each example, for the allocator.
        """
        return on_rank_zero(lambda: choose_data(self._data, self._due, scores, self._pool, measured))
