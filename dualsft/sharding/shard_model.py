"""Sharding a model with FSDP2: each rank holds the rows [first, first + len) of dimension 0 of each parameter.

A unit is a transformer block, or everything outside the blocks. It is all-gathered for its forward and for its backward
pass. Then the ranks' gradients of its parameters are added and scattered,

    g = Σ_ranks g_rank    (a sum, not a mean; in float32 at least).
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dualsft.errors import UserError
from dualsft.sharding.unit_gather import units


def shard_model(model: nn.Module, mesh: DeviceMesh, cpu_offload: bool = False) -> None:
    """Turn every parameter into a `DTensor` of which each rank holds its rows; buffers are not sharded.

    Gradients of any backward pass are summed over the ranks. Tied weights stay tied. Modules whose weights have another
    type than the modules around them, such as routers in float32, become units of their own.

    Args:
        model: Modified in place; on the meta device too.
        mesh: The ranks that hold this copy, along one axis; the model computes on its devices.
        cpu_offload: Store shards and their gradients on the host.

    Raises:
        UserError: if one module owns weights of several types.
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
    for module, dtype in [*_units(model)]:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32))
        # explicitly, for the root unit too: by default its parameters stay gathered between forward and backward, and
        # whatever is then assigned to them, their gradients or `requires_grad` does not reach the shards
        unit = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, offload_policy=offload)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply, not even by one
    _fill_in_missing_gradients(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are sharded, even if over a single rank."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """Units and their types, inner ones first: the blocks, then the model for what is outside them."""
    blocks = transformer_blocks(model)
    for block in blocks:
        yield from _split_by_type(block, None, set())
    yield from _split_by_type(model, None, set(blocks))


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's layers: the entries of its largest module list that share no weights with the rest of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    largest = max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=())
    uses = _uses(model)
    return [block for block in largest if (own := _uses(block)) and all(uses[key] == own[key] for key in own)]


def _uses(module: nn.Module) -> Counter[int]:
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def _split_by_type(
    module: nn.Module, outer: torch.dtype | None, done: set[nn.Module]
) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """The units in a module; each has one type, as FSDP2 reduces the gradients of a unit in one type."""
    types = {parameter.dtype for parameter in module.parameters(recurse=False)}
    if len(types) > 1:
        raise UserError(
            f"{type(module).__name__} owns weights of the types {', '.join(sorted(map(str, types)))}, which cannot be "
            "sharded together; load the model in float32."
        )
    dtype = types.pop() if types else outer or _main_type(module)
    for child in module.children():
        if child not in done:
            yield from _split_by_type(child, dtype, done)
    if dtype != outer:
        yield module, dtype


def _main_type(module: nn.Module) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def _fill_in_missing_gradients(model: nn.Module) -> None:
    """Give every trainable parameter of a unit a gradient, if only zero, before the ranks reduce them.

    FSDP2 reduces the gradients that a rank has, concatenated. If another rank has more of them, such as those of an
    expert that only some ranks used, gradients of different parameters would be added.
    """
    all_names = [name for name, _ in model.named_parameters()]
    # before FSDP's own hook, which queues a callback at the end of backward for the units whose inputs got no gradient;
    # and after `_without_views`, so that FSDP's hook sees the copy of the output
    model.register_forward_hook(partial(_fill_in_at_end, model, all_names), prepend=True)
    for unit, names in units(model).items():
        # after FSDP's own hook, which marks the inputs whose gradients end the unit's backward pass
        unit.register_forward_pre_hook(partial(_fill_in_at_inputs, model, names), with_kwargs=True)
        unit.register_forward_pre_hook(partial(_unshard_if_unfrozen, model, names, []), prepend=True)
        unit.register_forward_hook(_without_views, prepend=True)


def _fill_in_at_inputs(model: nn.Module, names: list[str], _: nn.Module, args: Any, kwargs: Any) -> None:
    for tensor in _differentiable((args, kwargs)):
        tensor.register_hook(lambda _: _fill_in_gradients(model, names))


def _fill_in_at_end(model: nn.Module, names: list[str], _: nn.Module, args: Any, output: Any) -> None:
    engine: Any = torch.autograd.Variable._execution_engine
    for tensor in _differentiable(output):  # its gradient comes first in backward, too early to fill in anything
        tensor.register_hook(lambda _: engine.queue_callback(lambda: _fill_in_gradients(model, names)))


def _differentiable(tree: Any) -> list[Tensor]:
    if not torch.is_grad_enabled():
        return []
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _unshard_if_unfrozen(model: nn.Module, names: list[str], was_trainable: list[bool], unit: Any, _: Any) -> None:
    """Have FSDP look again for the reduction's type, which it takes from the trainable weights it saw last."""
    trainable = any(model.get_parameter(name).requires_grad for name in names)
    if was_trainable == [False] and trainable:  # unfrozen since its last forward
        unit.unshard()
    was_trainable[:] = [trainable]


def _without_views(_: nn.Module, args: Any, output: Any) -> Any:
    """Clone outputs that are views: FSDP's gradient hook on a view is lost once the view is modified in place."""
    if all(tensor._base is None for tensor in _differentiable(output)):
        return output
    return tree_map_only(Tensor, lambda tensor: tensor if tensor._base is None else tensor.clone(), output)


def _fill_in_gradients(model: nn.Module, names: list[str]) -> None:
    for name in names:
        parameter = model.get_parameter(name)  # another object when a unit is gathered
        gathered = not isinstance(parameter, DTensor)
        if gathered and parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
