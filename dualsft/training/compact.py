"""Training a subset of a model's weights with compact state.

For a weight tensor w (stored in any type) with selected flat indices I, |I| = k:

    master  x ∈ R^k, float32, an ordinary `torch.nn.Parameter`:   x = w[I]
    after each backward                                           x.grad += (∂L/∂w)[I];  ∂L/∂w is dropped
    after each optimizer step                                     w[I] = x, rounded to w's type;  x.grad is dropped

Where the selected weights of a linear layer form few rectangles, no other part of its gradient is computed
(`chosen_gradient.py`), unless the layer is compiled (`compilation.py`).

So any torch optimizer, gradient clipping, scheduler and weight decay acts on x as on w under a masked gradient; the
other weights are never written. The cost is w itself plus, per selected weight, an index (4 bytes), x (4), its
gradient (4, from backward to step) and the optimizer's state (8 for Adam), and one layer's dense gradient at a time.
With the masters on the host that is the host's memory; the device holds w, the index and the dense gradient alone.
Masters are float32 (float64 for float64 weights) because bfloat16 keeps 8 bits: 1,000 steps of 1e-5 on 0.02 are lost.

In a sharded model each rank has the masters of its own shards; concatenated in the order of ranks they are the masters
of one process (`dualsft.sharding.vectors`). A state dict holds the full masters, on rank zero, and each rank loads its
own part of them, so a state can be loaded on another number of ranks. Replicas of a model each have all masters; before
a step the gradients of their selected entries, and no others, are added up (`add_up_gradients`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dualsft.models.dtypes import accumulator_dtype
from dualsft.models.entries import set_entries
from dualsft.models.linear import is_linear
from dualsft.sharding.collectives import add_up_replicas
from dualsft.sharding.groups import replica, replicate_group
from dualsft.sharding.shard_model import is_sharded
from dualsft.sharding.shards import is_shard, local_shard, shard_offset
from dualsft.sharding.vectors import gather_vectors, split_vectors
from dualsft.training.chosen_gradient import ChosenGradientHook, rectangles
from dualsft.training.compilation import compiled_modules
from dualsft.training.host_copies import copied_to_host, rounded_for, wait_for_copies

Mask = Mapping[str, Bool[Tensor, "..."]]
"""Parameter name -> which entries are trained, of the parameter's shape."""


class CompactParameters(nn.Module):
    """The selected weights of a model as compact trainable parameters, the masters.

    Tensors without a selected entry get ``requires_grad=False``, so that autograd does not compute their gradients. The
    masters are copied to the model's weights after each optimizer step (`write_back_after`) and when a state dict is
    loaded.

    Args:
        model: The model whose weights are trained; its values are changed in place, by `write_back` alone. If it is
            sharded, every rank constructs this, and every rank calls `state_dict`, `load_state_dict`,
            `pending_gradients` and `restore_gradients`; of replicas `add_up_gradients` and `pending_gradients`.
        mask: Which entries to train; None trains every entry of every trainable parameter.
        on_host: Whether the masters are held on the host, whatever device the weights are on. Gradients are complete
            after `receive`.

    Attributes:
        names: Names of the parameters with a selected entry, in the model's order.
        masters: Their selected entries, each of shape (selected,); this rank's only if the model is sharded.
        num_selected: How many weights are trained, on all ranks together.
        fingerprint: SHA-256 of which entries of which tensors are selected, on all ranks together.

    Raises:
        KeyError, ValueError: if the mask does not fit the model's parameters, or nothing is selected.
    """

    def __init__(self, model: nn.Module, mask: Mask | None = None, on_host: bool = False) -> None:
        super().__init__()
        self._on_host = on_host
        self._arriving: list[tuple[int, Tensor]] = []
        parameters = dict(model.named_parameters())
        if mask is not None and (unknown := [name for name in mask if name not in parameters]):
            raise KeyError(f"the mask names parameters that the model lacks: {', '.join(unknown[:5])}")
        self.names: list[str] = []
        self.masters = nn.ParameterList()
        self._weights: list[nn.Parameter] = []
        self.num_selected, digest = 0, hashlib.sha256()
        for name, weight in parameters.items():
            index = _selected_index(name, weight, mask)
            weight.requires_grad_(index is None or len(index) > 0)
            if weight.requires_grad:
                count = self._add(name, weight, index)
                digest.update(f"{name}|{count}|".encode())
                digest.update(b"all" if index is None else index.numpy().tobytes())
        if not self.names:
            raise ValueError("no weight is selected")
        self.fingerprint = digest.hexdigest()
        self._sharded = is_sharded(model)
        if self._sharded:
            self.masters.register_state_dict_post_hook(_gather_state)
            self.masters.register_load_state_dict_pre_hook(_split_state)
        self._chosen = self._chosen_gradients(model)
        self._handles: list[RemovableHandle] = []
        self.register_load_state_dict_post_hook(lambda module, _: module.write_back())

    def _add(self, name: str, weight: nn.Parameter, index: Int[Tensor, " selected"] | None) -> int:
        """Add the master of a tensor, of all entries if the index is None; the number of entries on all ranks."""
        count = weight.numel() if index is None else len(index)
        self.num_selected += count
        shard = local_shard(weight.detach())
        if index is not None:
            index = _shard_index(index, weight).to(shard.device)
        self.register_buffer(f"index_{len(self.names)}", index, persistent=False)
        self.names.append(name)
        self._weights.append(weight)
        values = _gather(shard, index)
        values = values.cpu() if self._on_host else values
        self.masters.append(nn.Parameter(values.to(accumulator_dtype(weight), copy=True)))
        return count

    def index(self, k: int) -> Int[Tensor, " selected"] | None:
        """Flat indices into the k-th (local) tensor of its selected entries, ascending; None if all are selected."""
        return self.get_buffer(f"index_{k}")

    def attach(self) -> None:
        """Add every gradient to its master's as soon as it is complete, and drop it; idempotent."""
        if not self._handles:
            self._handles = [
                weight.register_post_accumulate_grad_hook(partial(self._add_gradient, k))
                for k, weight in enumerate(self._weights)
            ]
            self._handles += [module.register_forward_hook(hook, with_kwargs=True) for module, hook in self._chosen]

    def _chosen_gradients(self, model: nn.Module) -> list[tuple[nn.Module, ChosenGradientHook]]:
        """The linear layers whose backward computes the chosen weights' gradient alone."""
        # none in a sharded model: a rank's backward sees the full weight, most of whose chosen entries are other ranks'
        numbers = {weight: k for k, weight in enumerate(self._weights) if not is_shard(weight)}
        compiled = compiled_modules(model)  # none there either: no two blocks would be alike, each compiled by itself
        hooks = []
        for module in filter(is_linear, model.modules()):
            weight = module.weight
            if not isinstance(weight, nn.Parameter) or weight not in numbers or module in compiled:
                continue
            if (index := self.index(k := numbers[weight])) is None:
                continue
            mask = torch.zeros(weight.numel(), dtype=torch.bool, device=index.device)
            mask[index.long()] = True
            if parts := rectangles(mask.view(weight.shape)):
                hooks.append((module, ChosenGradientHook(module, self.masters[k], parts)))
        return hooks

    def detach(self) -> None:
        """Undo `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _add_gradient(self, k: int, weight: Tensor) -> None:
        if weight.grad is None:  # as of a compiled module that computes the chosen weights' gradient alone
            return
        shard = local_shard(weight.grad)
        if shard.is_pinned():  # offloaded: its copy must be complete, for which earlier releases of torch do not wait
            torch.accelerator.current_stream().synchronize()
        gradient = _gather(shard, self.index(k))
        if self._on_host:
            self._arriving.append((k, copied_to_host(gradient)))
        else:
            self._accumulate(k, gradient)
        weight.grad = None

    def _accumulate(self, k: int, gradient: Tensor) -> None:
        master = self.masters[k]
        gradient = gradient.to(master.dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def receive(self) -> None:
        """Wait for the gradients that are on their way to the host, and add them to their masters'."""
        if not self._arriving:
            return
        wait_for_copies()
        for k, gradient in self._arriving:
            self._accumulate(k, gradient)
        self._arriving.clear()

    def add_up_gradients(self) -> None:
        """Replace the masters' gradients by their sums over replicas; every rank calls this before a step.

        A gradient that only other replicas have, as of an expert that no token of this one's used, counts as zero here.
        """
        for k, gradient in self._with_those_of_others().items():
            self.masters[k].grad = gradient
        add_up_replicas(master.grad for master in self.masters if master.grad is not None)

    def _with_those_of_others(self) -> dict[int, Tensor]:
        """Number of a master -> its gradient, zero where only other replicas have one."""
        own = {k: master.grad for k, master in enumerate(self.masters) if master.grad is not None}
        if len(replicate_group()) == 1:
            return own
        anywhere = torch.tensor([int(k in own) for k in range(len(self.masters))])
        add_up_replicas([anywhere])
        masters = enumerate(self.masters)
        return {k: own[k] if k in own else torch.zeros_like(master) for k, master in masters if anywhere[k]}

    def drop_gradients(self) -> None:
        """Forget the masters' gradients, those on their way to the host too: a backward that failed leaves some."""
        self._arriving.clear()
        for master in self.masters:
            master.grad = None

    def write_back(self) -> None:
        """Round the masters to the weights' type and store them in the model."""
        self._store(self.masters)

    @torch.no_grad()
    def _store(self, values: Iterable[Tensor]) -> None:
        """Round values of the selected entries to the weights' type and store them in the model."""
        for k, (weight, value) in enumerate(zip(self._weights, values, strict=True)):
            index, shard = self.index(k), local_shard(weight.detach())
            rounded = rounded_for(shard.device, value, weight.dtype)
            if index is None:
                shard.copy_(rounded.view_as(shard), non_blocking=True)
            else:
                set_entries(shard, index, rounded.to(shard.device, non_blocking=True))

    def stored(self) -> list[Tensor]:
        """A copy of what the model holds in the selected entries, in the weights' type, one vector for each master."""
        shards = [local_shard(weight.detach()) for weight in self._weights]
        return [_gather(shard, self.index(k)).clone() for k, shard in enumerate(shards)]

    @contextmanager
    def holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Hold these values, such as earlier `stored` ones, in place of the masters' in the model meanwhile."""
        self._store(values)
        try:
            yield
        finally:
            self.write_back()

    def write_back_after(self, optimizer: Optimizer) -> None:
        """Store the masters in the model after every step of this optimizer, and drop the gradients it has used.

        For an optimizer that evaluates the loss several times in a step (LBFGS) they are stored before each evaluation.
        """
        optimizer.register_step_pre_hook(self._wrap_closure)
        optimizer.register_step_post_hook(self._finish_step)

    def _wrap_closure(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The step's arguments, with a closure that stores the masters before all evaluations but the first."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return args, kwargs
        evaluated = False  # at the first evaluation the model holds the masters' values already

        def write_back_and_evaluate() -> Any:
            nonlocal evaluated
            if evaluated:
                self.write_back()
            evaluated = True
            return closure()

        return args[:1], {**kwargs, "closure": write_back_and_evaluate}

    def _finish_step(self, *_: Any) -> None:
        self.write_back()
        self.drop_gradients()

    def pending_gradients(self) -> dict[int, Tensor]:
        """Number of a master -> its (full) gradient that no step has used yet; on rank zero alone."""
        pending = self._with_those_of_others()
        if len(replicate_group()) > 1:
            pending = {k: gradient.clone() for k, gradient in pending.items()}
            add_up_replicas(pending.values())
        if self._sharded:
            return dict(zip(pending, gather_vectors([*pending.values()]), strict=True))
        return pending

    def restore_gradients(self, gradients: Mapping[int, Tensor]) -> None:
        """Set the masters' gradients to earlier `pending_gradients`, to continue that accumulation."""
        if replica():  # they count once when the replicas' gradients are added up
            return
        values = [*gradients.values()]
        if self._sharded:
            values = split_vectors(values, [len(self.masters[k]) for k in gradients])
        for k, gradient in zip(gradients, values, strict=True):
            self.masters[k].grad = gradient.to(self.masters[k])


def _gather_state(masters: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Replace this rank's masters in a state dict by the full ones, on rank zero."""
    names = [f"{prefix}{k}" for k, _ in masters.named_parameters()]
    state.update(zip(names, gather_vectors([state[name] for name in names]), strict=True))


def _split_state(masters: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace the full masters in a state dict by this rank's."""
    lengths = {f"{prefix}{k}": len(master) for k, master in masters.named_parameters()}
    if lengths.keys() <= state.keys():
        state.update(zip(lengths, split_vectors([state[name] for name in lengths], [*lengths.values()]), strict=True))


def _selected_index(name: str, weight: Tensor, mask: Mask | None) -> Tensor | None:
    """Flat indices (int32 if they fit) of a full tensor's selected entries, on the host; None means all of them."""
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


def _shard_index(index: Int[Tensor, " selected"], weight: Tensor) -> Int[Tensor, " selected_here"]:
    """The flat indices into a full tensor that fall into this rank's shard, counted from the shard's start."""
    if not is_shard(weight):
        return index
    first = shard_offset(weight)
    ends = torch.tensor([first, first + local_shard(weight.detach()).numel()], dtype=index.dtype)
    start, end = torch.searchsorted(index, ends).tolist()
    return index[start:end] - first


def _gather(dense: Tensor, index: Int[Tensor, " selected"] | None) -> Float[Tensor, " selected"]:
    return dense.flatten() if index is None else dense.flatten().index_select(0, index)
