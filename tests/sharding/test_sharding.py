import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dualsft.errors import UserError
from dualsft.models.loading import checkpoint_activations
from dualsft.sharding.groups import shard_mesh
from dualsft.sharding.shard_model import shard_model
from dualsft.sharding.shards import local_shard, shard_offset
from tests.cases import ARCHITECTURES, make
from tests.world.ranks import run_on_ranks

pytestmark = pytest.mark.heavy

Loss = Callable[[nn.Module, int], Tensor]
"""A rank's loss, given the model and the rank."""


def token_loss(model: Any, rank: int) -> Tensor:
    """Other tokens on each rank."""
    ids = (torch.arange(24).view(2, 12) * (rank + 3)) % 50 + 3
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits.double().flatten(0, 1), ids.roll(-1, 1).flatten())


def summed_gradients(model: nn.Module, loss: Loss) -> dict[str, Tensor]:
    """The slow reference: the whole model, the ranks' losses one after the other, a sum in float64 at the end."""
    total: dict[str, Tensor] = {}
    for rank in range(distributed.get_world_size()):
        model.zero_grad()
        loss(model, rank).backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + gradient
    model.zero_grad()
    return {name: gradient.to(model.get_parameter(name).dtype) for name, gradient in total.items()}


def assert_summed(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Gathered gradients are these, to the last bit; frozen parameters have none."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        gradient = parameter.grad
        assert isinstance(gradient, DTensor), name
        torch.testing.assert_close(gradient.full_tensor(), expected[name], rtol=0, atol=0, msg=name)


def check_sum(model: nn.Module, loss: Loss = token_loss, cpu_offload: bool = False) -> nn.Module:
    """Shards a model whose gradients, of two passes in turn, are the sum of the whole model's; gives it back."""
    expected = summed_gradients(copy.deepcopy(model), loss)
    shard_model(model, shard_mesh("cpu"), cpu_offload)
    for _ in range(2):
        loss(model, distributed.get_rank()).backward()
        assert_summed(model, expected)
        model.zero_grad()
    return model


def _offsets(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    mesh, held = shard_mesh("cpu"), []
    for shape in shapes:
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        shards = distribute_tensor(whole, mesh, [Shard(0)])
        mine, start = local_shard(shards), shard_offset(shards)
        assert torch.equal(mine.flatten(), whole.flatten()[start : start + mine.numel()])
        assert torch.equal(shards.full_tensor(), whole)
        mine.fill_(7.0)
        assert torch.equal(local_shard(shards), torch.full_like(mine, 7.0))
        held.append(mine.numel())
    return held


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_shard_is_where_its_offset_says(ranks: int) -> None:
    """Entries from the offset on are the rank's own, for sizes that divide, do not divide, and leave ranks empty."""
    shapes = [(8, 3), (5, 3), (7,), (2, 3), (1,), (3, 1, 2), (9, 2, 2), (ranks + 1, 2)]
    held = run_on_ranks(ranks, _offsets, shapes)
    assert [sum(sizes) for sizes in zip(*held, strict=True)] == [torch.Size(shape).numel() for shape in shapes]
    assert min(map(min, held)) == 0


def test_a_plain_tensor_is_its_own_shard() -> None:
    """It starts at zero and is itself."""
    tensor = torch.randn(3, 2)
    assert local_shard(tensor) is tensor
    assert shard_offset(tensor) == 0


def _other_layouts() -> None:
    shards = distribute_tensor(torch.randn(4, 4), shard_mesh("cpu"), [Shard(1)])
    with pytest.raises(ValueError, match="only shards along dimension 0"):
        shard_offset(shards)


def _units(architectures: Sequence[str]) -> None:
    for name in architectures:
        model = make(name, torch.float32)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        count = sum(parameter.numel() for parameter in model.parameters())
        layers = {type(layer) for layer in max(_lists(model), key=lambda m: sum(p.numel() for p in m.parameters()))}
        shard_model(model, shard_mesh("cpu"))
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        assert len(units) == model.config.num_hidden_layers + 1, name
        assert all(any(isinstance(unit, layer) for layer in layers) for unit in units[1:]), name
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied, name
        assert sum(parameter.numel() for parameter in model.parameters()) == count, name


def _lists(model: nn.Module) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList)]


def _all_architectures(names: Sequence[str]) -> None:
    _other_layouts()
    _units(names)
    for name in names:
        check_sum(make(name, torch.float32))


def test_gradients_of_every_architecture_are_the_sum_over_the_ranks() -> None:
    """Each block is a unit and ties last; on two ranks every gradient is the sum of the two to the last bit."""
    run_on_ranks(2, _all_architectures, list(ARCHITECTURES))


class Scale(nn.Module):
    """Weights in bfloat16, times the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(9, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """The derivative is x."""
        return (self.weight * x).sum()


def _sum_of_scales(frozen_at_first: bool) -> None:
    large = torch.arange(9) % 3 == distributed.get_rank()  # on each rank for a weight of each shard: any order shows
    model, x = Scale(), torch.where(large, 256.0, 1.0).bfloat16()
    shard_model(model, shard_mesh("cpu"))
    if frozen_at_first:
        model.weight.requires_grad_(False)
        model(x)
        model.weight.requires_grad_(True)
    model(x).backward()
    assert isinstance(model.weight.grad, DTensor)
    assert model.weight.grad.full_tensor().tolist() == [258.0] * 9


def _sums_of_scales() -> None:
    _sum_of_scales(False)
    _sum_of_scales(True)


def test_bfloat16_gradients_are_added_in_float32() -> None:
    """256 + 1 + 1 is 258 and not 256, also for a weight that was frozen in the first pass."""
    run_on_ranks(3, _sums_of_scales)


class Block(nn.Module):
    """Three experts with weights of their own; a token's first channel says which of two it goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Through one expert, beside which the others stay idle."""
        return x + self.experts[expert](x).tanh()


class Mixture(nn.Module):
    """An embedding, blocks and two heads of which only one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.heads = nn.ParameterList(nn.Parameter(torch.randn(3, 4)) for _ in range(2))

    def forward(self, ids: Tensor, expert: int) -> Tensor:
        """Expert k of every block, and head k."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, expert=expert)
        return x @ self.heads[expert].T


def mixture_loss(model: nn.Module, rank: int) -> Tensor:
    """Each rank uses another expert, and another head."""
    logits: Tensor = model(torch.arange(5), expert=rank)
    return logits.square().sum()


def _mixtures() -> None:
    torch.manual_seed(0)
    whole = Mixture()
    check_sum(copy.deepcopy(whole), mixture_loss)
    frozen = copy.deepcopy(whole)
    frozen.embed.requires_grad_(False)  # so no gradient flows into the first block's inputs
    check_sum(frozen, mixture_loss)
    partly: Any = copy.deepcopy(whole)
    partly.layers[1].requires_grad_(False)
    partly.layers[0].experts[0].weight.requires_grad_(False)
    check_sum(partly, mixture_loss, cpu_offload=True)
    tied: Any = copy.deepcopy(whole)
    for mine, other in zip(tied.layers[0].experts, tied.layers[1].experts, strict=True):
        other.weight = mine.weight
    assert sum(isinstance(module, FSDPModule) for module in check_sum(tied, mixture_loss).modules()) == 1


def test_ranks_that_use_different_experts_add_up_the_right_gradients() -> None:
    """What one rank has no gradient of counts as zero: experts, heads, and the first block above frozen embeddings.

    Blocks that share weights share a unit.
    """
    run_on_ranks(2, _mixtures)


class View(nn.Module):
    """Gives its output as a view of another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        return self.linear(x).view(5, 4)


class Impatient(nn.Module):
    """Modifies what its blocks give in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(View() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Both blocks, doubled."""
        for layer in self.layers:
            x = layer(x)
            x *= 2
        return x


def _views_modified_in_place() -> None:
    check_sum(Impatient(), lambda model, rank: model(torch.full((5, 4), 1.0 + rank)).square().sum())


def _recomputed_and_in_float64() -> None:
    model = make("llama", torch.float32)
    checkpoint_activations(model)
    check_sum(model.train())
    check_sum(make("llama", torch.float64))


def _router_in_float32() -> None:
    model = make("deepseek v3", torch.bfloat16)
    for module in model.modules():
        if type(module).__name__ == "DeepseekV3TopkRouter":
            module.weight.data = module.weight.data.float()
    sharded = check_sum(model)
    assert sum(isinstance(module, FSDPModule) for module in sharded.modules()) == 2 + 1 + 1
    assert {parameter.dtype for parameter in sharded.parameters()} == {torch.bfloat16, torch.float32}


def _several_types() -> None:
    model = make("llama with biases", torch.bfloat16)
    bias = model.model.layers[0].self_attn.q_proj.bias
    bias.data = bias.data.float()
    with pytest.raises(UserError, match=r"^Linear owns weights of the types torch\.bfloat16, torch\.float32, which"):
        shard_model(model, shard_mesh("cpu"))


def _between_passes() -> None:
    model = make("llama tied", torch.float32)
    shard_model(model, shard_mesh("cpu"))
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            token_loss(model, 0)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def _special_cases() -> None:
    _between_passes()
    _views_modified_in_place()
    _recomputed_and_in_float64()
    _router_in_float32()
    _several_types()


def test_recomputed_activations_and_weights_of_two_types() -> None:
    """Sums stay exact; a router in float32 is a unit of its own, and a layer that owns two types is refused.

    After any forward pass all parameters are in shards again; what blocks give may be modified in place.
    """
    run_on_ranks(2, _special_cases)
