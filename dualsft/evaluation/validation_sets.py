"""The validation sets of a run: checked before anything is loaded, and measured one by one and together."""

from collections.abc import Sequence
from typing import cast

import torch
from lightning import Trainer
from torch import Tensor

from dualsft.data.module import InstructionDataModule
from dualsft.data.options import validation_key
from dualsft.errors import UserError
from dualsft.evaluation.metrics import ExactMatch, LanguageModelMetrics


def validation_names(trainer: Trainer) -> list[str | None]:
    """The names of a run's validation sets, in the order of their loaders; a single source has none: [None].

    Raises:
        UserError: if a source cannot be used.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, InstructionDataModule) and data.named_validation:
        return list(data.validation_sets)
    return [None]


def check_validation_data(trainer: Trainer) -> None:
    """Refuse an empty validation set, which Lightning would skip without a word.

    Raises:
        UserError: if none of the examples of a validation set has labels, naming the set.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, InstructionDataModule):
        return
    for name, examples in zip(validation_names(trainer), data.validation_sets.values(), strict=False):
        if not examples.ok_ids():
            counts = ", ".join(f"{count} {status}" for status, count in examples.counts().items())
            raise UserError(
                f"No example of {validation_key(name)} has a response within data.max_length={data.max_length} tokens "
                f"({counts})."
            )


class ValidationMetrics(torch.nn.Module):
    """The metrics of each validation set, and their means over the sets.

    Args:
        names: The sets' names, in the order of their loaders; None for a single source, which has none.
        exact_match: Whether answers are compared, too.
    """

    def __init__(self, names: Sequence[str | None], exact_match: bool = False) -> None:
        super().__init__()
        self._names = tuple(names)
        self._tokens = torch.nn.ModuleList(LanguageModelMetrics() for _ in names)
        self._answers = torch.nn.ModuleList(ExactMatch() for _ in names if exact_match)

    def tokens(self, index: int) -> LanguageModelMetrics:
        """The metrics over tokens of the set whose loader has this index."""
        return cast(LanguageModelMetrics, self._tokens[index])

    def answers(self, index: int) -> ExactMatch:
        """The metric over answers of the set whose loader has this index."""
        return cast(ExactMatch, self._answers[index])

    def finish(self) -> dict[str, Tensor]:
        """Compute the metrics of all batches since the last call, and reset them.

        Returns:
            ``loss`` in nats per token, ``perplexity``, ``token_accuracy`` and, if answers are compared,
            ``exact_match``. With named sets these are means in which every set weighs the same, whatever its size, and
            each set's own are beside them: ``loss/NAME``.
        """
        results = [self._finish_set(index) for index in range(len(self._names))]
        metrics: dict[str, Tensor] = {}
        for metric in results[0]:
            values = [of_set[metric] for of_set in results]
            metrics[metric] = torch.stack(values).mean()
            metrics |= {f"{metric}/{n}": v for n, v in zip(self._names, values, strict=True) if n is not None}
        return metrics

    def _finish_set(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens(index)
        metrics = tokens.compute()
        tokens.reset()
        if self._answers:
            metrics["exact_match"] = self.answers(index).compute()
            self.answers(index).reset()
        return metrics
