"""A model in shards: every rank holds the rows [first, first + len) of dimension 0 of each parameter (FSDP2).

A unit is gathered for its forward and its backward pass. Then the ranks' gradients of its parameters are added,

    g = Σ_ranks g_rank    (a sum, not a mean; in float32 at least),

and each rank keeps the rows that are its own. A unit is a transformer block, or all that is in no block.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dualsft.errors import UserError


def shard_model(model: nn.Module, mesh: DeviceMesh, cpu_offload: bool = False) -> None:
    """Leave each rank its rows of every parameter, which become DTensors; buffers stay whole.

    Gradients of any backward pass are summed over the ranks. Tied weights stay tied. Weights of another type than
    those around them, as routers in float32 are, make units of their own.

    Args:
        model: Modified in place; on the meta device too.
        mesh: All ranks along one axis; the model computes on its devices.
        cpu_offload: Keep shards and their gradients on the host.

    Raises:
        UserError: if one module owns weights of several types.
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
    for module, dtype in [*_units(model)]:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32))
        # asked for by name, the outermost unit too: else its parameters are whole between forward and backward passes,
        # and what then sets them, their gradients or what is frozen reaches no shard
        unit = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, offload_policy=offload)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply, not even by one
    _agree_on_gradients(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are in shards, be it a single one."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """Units and their types, inner ones first: blocks, and the whole for what is left."""
    blocks = _blocks(model)
    for block in blocks:
        yield from _split_by_type(block, None, set())
    yield from _split_by_type(model, None, set(blocks))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated layers: its largest list of modules, but for those that share weights with others."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    largest = max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=())
    uses = _uses(model)
    return [block for block in largest if (own := _uses(block)) and all(uses[key] == own[key] for key in own)]


def _uses(module: nn.Module) -> Counter[int]:
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def _split_by_type(
    module: nn.Module, around: torch.dtype | None, done: set[nn.Module]
) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """The units in a module: FSDP2 adds gradients of one type at a time."""
    types = {parameter.dtype for parameter in module.parameters(recurse=False)}
    if len(types) > 1:
        raise UserError(
            f"{type(module).__name__} owns weights of the types {', '.join(sorted(map(str, types)))}, which cannot be "
            "sharded together; load the model in float32."
        )
    dtype = types.pop() if types else around or _main_type(module)
    for child in module.children():
        if child not in done:
            yield from _split_by_type(child, dtype, done)
    if dtype != around:
        yield module, dtype


def _main_type(module: nn.Module) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


Owned = list[tuple[nn.Module, str]]
"""Modules and the names of parameters of theirs, which change objects as they are gathered and let go."""


def _agree_on_gradients(model: nn.Module) -> None:
    """Have a unit's trainable parameters all have a gradient, if only zero, before ranks add them up.

    A rank sends only the gradients that it has: where another has more, as from an expert that only some ranks used,
    they would add up what does not belong together.
    """
    units = {module: [*_owned(module)] for module in model.modules() if isinstance(module, FSDPModule)}
    everything = [pair for owned in units.values() for pair in owned]
    # before FSDP's own, which asks autograd to call it back in the end, for the units that no input's gradient ended;
    # and behind `_without_views`, whose copy of the output is what FSDP's own then looks at
    model.register_forward_hook(partial(_complete_in_the_end, everything), prepend=True)
    for unit, owned in units.items():
        # behind FSDP's own, which marks the inputs whose gradient ends the unit's backward pass
        unit.register_forward_pre_hook(partial(_complete_at_the_inputs, owned), with_kwargs=True)
        unit.register_forward_pre_hook(partial(_notice_thawing, owned, []), prepend=True)
        unit.register_forward_hook(_without_views, prepend=True)


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for name, _ in module.named_parameters(recurse=False):
        yield module, name
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _owned(child)


def _complete_at_the_inputs(owned: Owned, _: nn.Module, args: Any, kwargs: Any) -> None:
    for tensor in _differentiable((args, kwargs)):
        tensor.register_hook(lambda _: _complete(owned))


def _complete_in_the_end(owned: Owned, _: nn.Module, args: Any, output: Any) -> None:
    for tensor in _differentiable(output):
        tensor.register_hook(lambda _: _call_back(partial(_complete, owned)))


def _differentiable(tree: Any) -> list[Tensor]:
    if not torch.is_grad_enabled():
        return []
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _notice_thawing(owned: Owned, was_trainable: list[bool], unit: Any, _: Any) -> None:
    """FSDP takes the type of the sum from what is trainable, which it looks at in the first pass or when told to."""
    trainable = any(module.get_parameter(name).requires_grad for module, name in owned)
    if was_trainable == [False] and trainable:
        unit.unshard()
    was_trainable[:] = [trainable]


def _without_views(_: nn.Module, args: Any, output: Any) -> Any:
    """Outputs that are no views of others: FSDP has no notice of a gradient once such a view is modified in place."""
    if all(tensor._base is None for tensor in _differentiable(output)):
        return output
    return tree_map_only(Tensor, lambda tensor: tensor if tensor._base is None else tensor.clone(), output)


def _call_back(function: Any) -> None:
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)


def _complete(owned: Owned) -> None:
    for module, name in owned:
        parameter = module.get_parameter(name)
        gathered = not isinstance(parameter, DTensor)
        if gathered and parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
