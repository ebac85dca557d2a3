"""Runs that die at a chosen place, and models with a trap: values that are not finite, and memory that runs out."""

from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dualsft import SelectionModule
from dualsft.objectives.inputs import settle_mask
from dualsft.runs.folder import RunFolder
from dualsft.runs.phase_store import PhaseStore
from dualsft.scorers import ParameterStatistics, Scorer
from tests.world.jobs import Inputs, select
from tests.world.models import tiny_tokenizer

Kind = Literal["loss", "gradient"]

SHORTAGES: dict[str, Exception] = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of"),
    "host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError(),
}


class InfiniteGradient(torch.autograd.Function):
    """The identity, with infinite gradients where told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(where)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].masked_fill(ctx.saved_tensors[0], torch.inf), None


def poison(model: PreTrainedModel, token: int, kind: Kind) -> None:
    """Makes the loss NaN, or the gradient of a finite loss infinite, on every text with this token.

    The trap is behind the first layer: in a packed row, attention carries what it does to the text's neighbours.
    """
    where: list[Tensor] = []

    def look(_: Any, args: tuple[Tensor]) -> None:
        where[:] = [(args[0] == token).unsqueeze(-1)]

    def spring(_: Any, args: Any, output: Tensor) -> Tensor:
        if kind == "loss":
            return output.masked_fill(where[0], torch.nan)
        return InfiniteGradient.apply(output, where[0].expand_as(output))

    model.model.embed_tokens.register_forward_pre_hook(look)
    model.model.layers[0].register_forward_hook(spring)


def poisoned_by(**letters: str) -> type[SelectionModule]:
    """A selection in which the loss or the gradient is not finite on every text with a letter."""

    class Poisoned(SelectionModule):
        def configure_model(self) -> None:
            super().configure_model()
            for kind, letter in letters.items():
                poison(self.model, tiny_tokenizer().convert_tokens_to_ids(letter), kind)  # type: ignore[arg-type]

    return Poisoned


class _Failing(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Exception) -> Tensor:
        ctx.error = error
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise copy(ctx.error)  # the original would hold on to whatever its traceback does


class Shortage:
    """Raises an error when a model runs for one of these times: at its last layer, or in the backward through it.

    Attributes:
        runs: How often the model has run, the failed times included.
    """

    def __init__(self, error: Exception, *times: int, backward: bool = False) -> None:
        self._error, self._times, self._backward = error, times, backward
        self.runs = 0

    def attach(self, model: PreTrainedModel) -> None:
        """Lay the trap."""
        model.model.layers[-1].mlp.register_forward_hook(self._hook)

    def _hook(self, _: Any, args: Any, output: Tensor) -> Tensor:
        self.runs += 1
        if self.runs not in self._times:
            return output
        if self._backward:
            return _Failing.apply(output, self._error)
        raise copy(self._error)

    def module(self) -> type[SelectionModule]:
        """A selection with the trap in its model."""
        attach = self.attach

        class Trapped(SelectionModule):
            def configure_model(self) -> None:
                super().configure_model()
                settle_mask(self.model)  # whose looks are no runs
                attach(self.model)

        return Trapped


class PoolAware(Scorer):
    """U = v - ḡ, which needs the pool's gradient."""

    needs = ("pool_gradient",)

    def direction(self, statistics: ParameterStatistics) -> Tensor:
        """In proportion to η/n."""
        s = statistics
        assert s.pool_gradient is not None
        return (s.step_size / s.num_examples) * s.preconditioner * (s.validation_gradient - s.pool_gradient)


class KilledError(Exception):
    """Stands for a kill."""


def kill_at(
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    call: int = 1,
    after: bool = False,
    error: Exception | None = None,
) -> list[int]:
    """Makes the n-th call of a function die, before or after its work; the list counts the calls."""
    function, calls = getattr(place, name), []

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != call:
            return function(*args, **kwargs)
        if after:
            function(*args, **kwargs)
        raise copy(error) if error else KilledError

    monkeypatch.setattr(place, name, deadly)
    return calls


def killed_run(inputs: Inputs, folder: Path, options: dict[str, Any], *place: Any, **run: Any) -> None:
    """A run that dies at a place (see `kill_at`), and undoes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, *place)
        patch.setattr(RunFolder, "release", lambda run: run._lock.release())
        with pytest.raises(KilledError):
            select(inputs, folder, options, **run)


def kill_often(
    inputs: Inputs, folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, every: int
) -> int:
    """A selection that is killed after every so many states that it keeps, and resumed each time; how often it was."""
    save, saves, kills = PhaseStore.save, 0, 0

    class Killed(BaseException):
        pass

    def save_and_die(self: PhaseStore, *arguments: Any, **options: Any) -> None:
        nonlocal saves, kills
        save(self, *arguments, **options)
        saves += 1
        if saves % every == 0:
            kills += 1
            raise Killed

    while not (folder / "manifest.json").exists():
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(PhaseStore, "save", save_and_die)
            select(inputs, folder, options, resume=kills > 0)
    return kills
