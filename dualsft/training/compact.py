"""Training a subset of a model's weights with compact state.

For a weight tensor w (stored in any type) with selected flat indices I, |I| = k:

    master  x ∈ R^k, float32, an ordinary `torch.nn.Parameter`:   x = w[I]
    after each backward                                           x.grad += (∂L/∂w)[I];  ∂L/∂w is dropped
    after each optimizer step                                     w[I] = x, rounded to w's type;  x.grad is dropped

Where those of a linear layer make few rectangles, no other part of its gradient is computed (`chosen_gradient.py`).

So any torch optimizer, gradient clipping, scheduler and weight decay acts on x as on w under a masked gradient; the
other weights are never written. The cost is w itself plus, per selected weight, an index (4 bytes), x (4), its
gradient (4, from backward to step) and the optimizer's state (8 for Adam), and one layer's dense gradient at a time.
Masters are float32 (float64 for float64 weights) because bfloat16 keeps 8 bits: 1,000 steps of 1e-5 on 0.02 are lost.

Of a sharded model each rank has the masters of its own shards: pieces, which one behind another in the order of ranks
are the masters of one process (`dualsft.sharding.vectors`). A state dict holds the whole ones, on the first rank, and
each rank takes its piece of what is loaded; so a state moves between any numbers of ranks.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dualsft.models.dtypes import accumulator_dtype
from dualsft.sharding.shard_model import is_sharded
from dualsft.sharding.shards import is_shard, local_shard, shard_offset
from dualsft.sharding.vectors import gather_vectors, split_vectors
from dualsft.training.chosen_gradient import ChosenGradientHook, linear_layers, rectangles

Mask = Mapping[str, Bool[Tensor, "..."]]
"""Parameter name -> which entries are trained, of the parameter's shape."""


class CompactParameters(nn.Module):
    """The selected weights of a model, as compact trainable parameters that stand for them.

    Tensors without a selected entry get ``requires_grad=False``: autograd then spends nothing on them. The model's
    weights follow the masters after each optimizer step (`write_back_after`) and when a state dict is loaded.

    Args:
        model: The model whose weights are trained; its values are changed in place, by `write_back` alone. If it is
            sharded, every rank calls this, and later `state_dict`, `load_state_dict` and all that has to do with
            gradients that no step has used.
        mask: Which entries to train; None trains every entry of every trainable parameter.

    Attributes:
        names: The parameters with a selected entry, in the model's order.
        masters: Their selected entries, each of shape (selected,); of a sharded model those on this rank, if any.

    Raises:
        KeyError: if the mask names a parameter that the model lacks.
        ValueError: if a mask's shape is not its parameter's, or nothing is selected.
    """

    def __init__(self, model: nn.Module, mask: Mask | None = None) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        if mask is not None and (unknown := [name for name in mask if name not in parameters]):
            raise KeyError(f"the mask names parameters that the model lacks: {', '.join(unknown[:5])}")
        self.names: list[str] = []
        self.masters = nn.ParameterList()
        self._weights: list[nn.Parameter] = []
        self._num_selected, digest = 0, hashlib.sha256()
        for name, weight in parameters.items():
            index = _selected_index(name, weight, mask)
            weight.requires_grad_(index is None or len(index) > 0)
            if weight.requires_grad:
                count = self._add(name, weight, index)
                digest.update(f"{name}|{count}|".encode())
                digest.update(b"all" if index is None else index.numpy().tobytes())
        if not self.names:
            raise ValueError("no weight is selected")
        self._fingerprint = digest.hexdigest()
        self._sharded = is_sharded(model)
        if self._sharded:
            self.masters.register_state_dict_post_hook(_join)
            self.masters.register_load_state_dict_pre_hook(_take_pieces)
        self._chosen = self._chosen_gradients(model)
        self._handles: list[RemovableHandle] = []
        self.register_load_state_dict_post_hook(lambda module, _: module.write_back())

    def _add(self, name: str, weight: nn.Parameter, index: Int[Tensor, " selected"] | None) -> int:
        """Take in a tensor, of whose entries these are selected, all of them if None; tells how many."""
        count = weight.numel() if index is None else len(index)
        self._num_selected += count
        here = local_shard(weight.detach())
        if index is not None:
            index = _of_shard(index, weight).to(here.device)
        self.register_buffer(f"index_{len(self.names)}", index, persistent=False)
        self.names.append(name)
        self._weights.append(weight)
        self.masters.append(nn.Parameter(_gather(here, index).to(accumulator_dtype(weight), copy=True)))
        return count

    def index(self, k: int) -> Int[Tensor, " selected"] | None:
        """Flat indices of the k-th tensor's selected entries, ascending; None where every entry is selected.

        Of a sharded model these are indices into this rank's shard.
        """
        return self.get_buffer(f"index_{k}")

    def num_selected(self) -> int:
        """How many weights are trained, on all ranks together."""
        return self._num_selected

    def attach(self) -> None:
        """Fold every gradient into the masters as soon as it is complete; idempotent."""
        if not self._handles:
            self._handles = [
                weight.register_post_accumulate_grad_hook(self._folder(k)) for k, weight in enumerate(self._weights)
            ]
            self._handles += [module.register_forward_hook(hook, with_kwargs=True) for module, hook in self._chosen]

    def _chosen_gradients(self, model: nn.Module) -> list[tuple[nn.Module, ChosenGradientHook]]:
        """The linear layers that need not form all of their weight's gradient.

        None of a sharded model: while such a layer is at work its weight is whole, and the gradients of its chosen
        entries would belong to other ranks.
        """
        number = {weight: k for k, weight in enumerate(self._weights) if not is_shard(weight)}
        found = []
        for module, weight in linear_layers(model):
            index = self.index(number[weight]) if weight in number else None
            parts = rectangles(_mask_of(index, weight)) if index is not None else None
            if parts:
                found.append((module, ChosenGradientHook(module, self.masters[number[weight]], parts)))
        return found

    def detach(self) -> None:
        """Undo `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _folder(self, k: int) -> Callable[[Tensor], None]:
        def fold(weight: Tensor) -> None:
            assert weight.grad is not None
            master = self.masters[k]
            gradient = _gather(_arrived(local_shard(weight.grad)), self.index(k)).to(master.dtype)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

        return fold

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters to the weights' type and store them in the model."""
        for k, (weight, master) in enumerate(zip(self._weights, self.masters, strict=True)):
            index, values, here = self.index(k), master.to(weight.dtype), local_shard(weight.detach())
            if index is None:
                here.copy_(values.view_as(here))
            else:
                here.put_(index.long(), values)

    def write_back_after(self, optimizer: Optimizer) -> None:
        """Store the masters in the model after every step of this optimizer, and drop the gradients it has used.

        An optimizer that asks for the loss several times within a step (LBFGS) finds each of its trials in the model.
        """
        optimizer.register_step_pre_hook(self._follow_trials)
        optimizer.register_step_post_hook(self._finish_step)

    def _follow_trials(self, _: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The step's arguments, with a closure that stores the masters before all evaluations but the first."""
        closure = named.get("closure", given[1] if len(given) > 1 else None)
        if closure is None:
            return given, named
        evaluated = False

        def follow() -> Any:
            nonlocal evaluated
            if evaluated:
                self.write_back()
            evaluated = True
            return closure()

        return given[:1], {**named, "closure": follow}

    def _finish_step(self, *_: Any) -> None:
        self.write_back()
        for master in self.masters:
            master.grad = None

    def pending_gradients(self) -> dict[int, Tensor]:
        """Gradients that no step has used yet, by tensor: those of an accumulation under way.

        Of a sharded model the whole ones, on the first rank alone.
        """
        pending = {k: master.grad for k, master in enumerate(self.masters) if master.grad is not None}
        return dict(zip(pending, gather_vectors([*pending.values()]), strict=True)) if self._sharded else pending

    def restore_gradients(self, gradients: Mapping[int, Tensor]) -> None:
        """Go on with an accumulation from earlier `pending_gradients`."""
        given = [*gradients.values()]
        if self._sharded:
            given = split_vectors(given, [len(self.masters[k]) for k in gradients])
        for k, gradient in zip(gradients, given, strict=True):
            self.masters[k].grad = gradient.to(self.masters[k])

    def fingerprint(self) -> str:
        """SHA-256 over which entries of which tensors are selected, on whatever ranks they are."""
        return self._fingerprint


def _join(masters: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state holds the whole masters, on the first rank."""
    names = [f"{prefix}{k}" for k, _ in masters.named_parameters()]
    state.update(zip(names, gather_vectors([state[name] for name in names]), strict=True))


def _take_pieces(masters: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Each rank loads its own."""
    lengths = {f"{prefix}{k}": len(master) for k, master in masters.named_parameters()}
    if lengths.keys() <= state.keys():
        wholes: Sequence[Tensor] = [state[name] for name in lengths]
        state.update(zip(lengths, split_vectors(wholes, [*lengths.values()]), strict=True))


def _selected_index(name: str, weight: Tensor, mask: Mask | None) -> Tensor | None:
    """Flat indices (int32 while they fit) of a whole tensor's selected entries, on the host; None means all of them."""
    if mask is None:
        return None if weight.requires_grad else torch.empty(0, dtype=torch.int32)
    if name not in mask:
        return torch.empty(0, dtype=torch.int32)
    chosen = mask[name]
    if chosen.shape != weight.shape:
        raise ValueError(f"the mask of {name} has shape {tuple(chosen.shape)}, the weight {tuple(weight.shape)}")
    if bool(chosen.all()):
        return None
    narrow = weight.numel() < 2**31
    return chosen.flatten().nonzero().squeeze(1).to("cpu", torch.int32 if narrow else torch.int64)


def _of_shard(index: Int[Tensor, " selected"], weight: Tensor) -> Int[Tensor, " here"]:
    """Of flat indices into a whole tensor those into this rank's shard of it, counted from the shard's start."""
    if not is_shard(weight):
        return index
    first = shard_offset(weight)
    ends = torch.tensor([first, first + local_shard(weight.detach()).numel()], dtype=index.dtype)
    start, end = torch.searchsorted(index, ends).tolist()
    return index[start:end] - first


def _mask_of(index: Int[Tensor, " selected"], weight: Tensor) -> Bool[Tensor, "m n"]:
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=index.device)
    mask[index.long()] = True
    return mask.view(weight.shape)


def _arrived(gradient: Tensor) -> Tensor:
    """A gradient; earlier releases of torch do not wait until one that is kept on the host has come there."""
    if gradient.is_pinned():
        torch.accelerator.current_stream().synchronize()
    return gradient


def _gather(dense: Tensor, index: Int[Tensor, " selected"] | None) -> Float[Tensor, " selected"]:
    return dense.flatten() if index is None else dense.flatten().index_select(0, index)
