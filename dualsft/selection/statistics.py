"""What is known at the scoring checkpoint, one parameter at a time; see `ParameterStatistics` for the symbols."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dualsft.errors import UserError
from dualsft.models.dtypes import accumulator_dtype
from dualsft.scorers import ParameterStatistics
from dualsft.selection.warmup import EPS
from dualsft.sharding.shards import full_tensor, local_shard


@dataclass(frozen=True)
class Statistics:
    """What is known for one validation set; every mapping is by parameter name, and may make its tensors when asked.

    Of a sharded model they are this rank's shards.

    Attributes:
        model: The model at the scoring checkpoint.
        validation_gradient: v.
        preconditioner: P.
        num_examples: n.
        pool_gradient: ḡ, if it is known.
        second_moment: ĉ, if the scorer needs it.
        empirical_fisher: The mean squared gradient of the validation examples, if the scorer needs it.
        hessian_vector: H (P ⊙ ḡ), if the scorer needs it.
    """

    model: nn.Module
    validation_gradient: Mapping[str, Tensor]
    preconditioner: "Preconditioner"
    num_examples: int
    pool_gradient: Mapping[str, Tensor] | None = None
    second_moment: Mapping[str, Tensor] | None = None
    empirical_fisher: Mapping[str, Tensor] | None = None
    hessian_vector: Mapping[str, Tensor] | None = None

    def by_parameter(self, step_size: float) -> Iterator[ParameterStatistics]:
        """What a scorer is given, for one trainable parameter after another; of a sharded model too it is whole.

        Raises:
            UserError: if it modifies the weights; all else is a copy of its own.
        """
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                version = weight._version
                yield ParameterStatistics(
                    name,
                    full_tensor(local_shard(weight.detach()), weight),
                    full_tensor(self.validation_gradient[name], weight),
                    full_tensor(self.preconditioner[name], weight),
                    step_size,
                    self.num_examples,
                    *(
                        None
                        if known is None
                        else full_tensor(known[name].to(weight.device, accumulator_dtype(weight), copy=True), weight)
                        for known in (
                            self.pool_gradient,
                            self.second_moment,
                            self.empirical_fisher,
                            self.hessian_vector,
                        )
                    ),
                )
                if weight._version != version:
                    raise UserError(f"The scorer modified the weight {name} in place; mend it to work on a copy.")


class Preconditioner(Mapping[str, Tensor]):
    """P by parameter name, on the model's device, made when it is asked for.

    Args:
        model: The model; its sums' type is P's.
        moments: ĉ for P = 1/(sqrt(ĉ)+eps), anywhere; None for P = 1.
    """

    def __init__(self, model: nn.Module, moments: Mapping[str, Tensor] | None) -> None:
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._moments = moments

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        dtype = accumulator_dtype(weight)
        if self._moments is None:
            return torch.ones_like(local_shard(weight.detach()), dtype=dtype)
        return self._moments[name].to(weight.device, dtype).sqrt().add_(EPS).reciprocal_()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
