"""Weight gradients for chosen entries alone, against the dense ones that autograd makes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dualsft.training.chosen_gradient import MOST_RECTANGLES, Columns, chosen_products, rectangles
from dualsft.training.compact import CompactParameters

M, N = 12, 20


def empty() -> Tensor:
    """A matrix without chosen entries."""
    return torch.zeros(M, N, dtype=torch.bool)


def some_rows() -> Tensor:
    """Whole rows, and a part of one between them, as a budget of whole rows leaves."""
    mask = empty()
    mask[[1, 2, 7, 9]] = True
    mask[5, :13] = True
    return mask


def some_columns() -> Tensor:
    """Whole columns, and a part of one."""
    mask = empty()
    mask[:, [0, 3, 4, 19]] = True
    mask[:5, 11] = True
    return mask


def some_blocks() -> Tensor:
    """Square blocks anywhere."""
    mask = empty()
    for i, j in ((0, 4), (0, 12), (4, 0), (8, 16), (8, 4)):
        mask[i : i + 4, j : j + 4] = True
    return mask


def one_entry() -> Tensor:
    """The smallest rectangle."""
    mask = empty()
    mask[3, 7] = True
    return mask


MASKS: dict[str, Callable[[], Tensor]] = {
    "rows": some_rows,
    "columns": some_columns,
    "blocks": some_blocks,
    "an entry": one_entry,
}


@pytest.mark.parametrize("kind", MASKS)
def test_rectangles_are_the_mask(kind: str) -> None:
    """Each chosen entry is in exactly one, and they follow one another in row-major order."""
    mask = MASKS[kind]()
    parts = rectangles(mask)
    assert parts is not None
    place = (mask.flatten().cumsum(0) - 1).view(M, N)
    covered = torch.zeros(M, N, dtype=torch.long)
    for part in parts:
        here = (part.rows.index[:, None], part.columns.index[None, :])
        covered[here] += 1
        assert place[here].flatten().tolist() == list(range(part.entries.start, part.entries.stop))
    assert torch.equal(covered, mask.long())


@pytest.mark.parametrize("kind", MASKS)
def test_products_are_the_dense_ones(kind: str) -> None:
    """The entries of xᵀ y that are chosen, in the order in which indexing by the mask gives them."""
    mask = MASKS[kind]()
    x, y = torch.randn(7, M, dtype=torch.float64), torch.randn(7, N, dtype=torch.float64)
    parts = rectangles(mask)
    assert parts is not None
    torch.testing.assert_close(chosen_products(x, y, parts), (x.t() @ y)[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "runs", [[(0, 20)], [(3, 4)], [(0, 1), (5, 6)], [(0, 16), (30, 48)], [(1, 40), (41, 60), (70, 71)]]
)
def test_columns_are_taken_as_indexing_takes_them(runs: list[tuple[int, int]]) -> None:
    """As a view, in runs or by a gather, whichever it is."""
    matrix, index = torch.randn(3, 80), torch.cat([torch.arange(a, b) for a, b in runs])
    columns = Columns.of(index)
    assert torch.equal(columns.of_matrix(matrix), matrix[:, index])
    long = len(runs) == 1 or len(index) >= 16 * len(runs)
    assert [(run.start, run.stop) for run in columns.runs] == (runs if long else [])


def test_what_is_not_worth_it_is_left_to_autograd() -> None:
    """A scattered mask, very many blocks, nearly all of a matrix, and nothing of it."""
    generator = torch.Generator().manual_seed(0)
    assert rectangles(torch.rand(40, 50, generator=generator) < 0.3) is None
    stairs = torch.eye(MOST_RECTANGLES + 1, dtype=torch.bool).repeat_interleave(8, 0)
    assert rectangles(stairs) is None
    assert rectangles(stairs[:-8]) is not None
    assert rectangles(~one_entry()) is None
    assert rectangles(empty()) is None


class LargestResult(TorchDispatchMode):
    """Notes how many entries the largest result of any operation has."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.entries = max([self.entries, *sizes])
        return result


def test_a_scattered_mask_is_seen_in_its_first_rows() -> None:
    """Of billions of weights the others are not looked at; rectangles in the first rows alone are not enough."""
    scattered = torch.rand(5000, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    with LargestResult() as largest:
        assert rectangles(scattered) is None
    assert largest.entries < scattered.numel() / 5
    late = scattered.clone()
    late[:1000] = True
    assert rectangles(late) is None
    late[1000:] = False
    found = rectangles(late)
    assert found is not None
    assert [part.entries.stop for part in found] == [8000]


class Net(nn.Module):
    """Two linear layers, in either orientation, one of them used twice, and one whose weight is used past it."""

    def __init__(self, kind: str, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        linear = nn.Linear if kind == "Linear" else lambda a, b: Conv1D(b, a)
        self.table = nn.Embedding(M, N)
        self.first = linear(N, M)
        self.second = linear(M, N)
        self.past = nn.Linear(N, M, bias=False)
        if tied:
            self.past.weight = self.table.weight
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, ids: Tensor, again: bool = False) -> Tensor:
        """Logits over the table's rows."""
        x = self.table(ids)
        x = x + self.second(torch.tanh(self.first(x)))
        inner = checkpoint(self._twice, x, use_reentrant=False) if again else self._twice(x)
        return self.past(inner) + inner @ self.past.weight.t().square()

    def _twice(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


def masks_of(net: Net, kind: str) -> dict[str, Tensor]:
    """The mask on every matrix, turned where its shape is."""
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    mask = MASKS[kind]()
    chosen = {name: mask if shape == (M, N) else mask.t() for name, shape in shapes.items() if len(shape) == 2}
    return chosen | {"first.bias": torch.arange(shapes["first.bias"][0]) % 2 == 0}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layer", ["Linear", "Conv1D"])
@pytest.mark.parametrize("kind", MASKS)
def test_masters_get_the_dense_gradients(kind: str, layer: str, tied: bool, again: bool) -> None:
    """In float64, accumulated over two batches, whatever uses a weight and however often, recomputed or not."""
    dense, net = Net(layer, tied).double(), Net(layer, tied).double()
    masks = masks_of(net, kind)
    compact = CompactParameters(net, masks)
    compact.attach()
    for ids in (torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[7, 7, 11]])):
        dense(ids).square().mean().backward()
        net(ids, again).square().mean().backward()
    weights = dict(dense.named_parameters())
    for name, master in zip(compact.names, compact.masters, strict=True):
        gradient = weights[name].grad
        assert gradient is not None
        torch.testing.assert_close(master.grad, gradient[masks[name]], rtol=1e-12, atol=1e-12)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_dense_gradient_is_never_formed() -> None:
    """No gradient reaches the weight of a layer whose entries are chosen by rows; that of a scattered one does."""
    layer = nn.Sequential(nn.Linear(N, 600, bias=False), nn.Linear(600, 600, bias=False))
    scattered = torch.rand(600, 600, generator=torch.Generator().manual_seed(0)) < 0.1
    rows = torch.zeros(600, N, dtype=torch.bool)
    rows[::3] = True
    compact = CompactParameters(layer, {"0.weight": rows, "1.weight": scattered})
    seen = []
    for name, weight in layer.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    compact.attach()
    layer(torch.randn(5, N)).sum().backward()
    assert seen == ["1.weight"]
    assert all(master.grad is not None for master in compact.masters)
    compact.detach()
    layer(torch.randn(5, N)).sum().backward()
    assert sorted(seen) == ["0.weight", "1.weight", "1.weight"]


def test_under_autocast_and_in_bfloat16() -> None:
    """The masters' gradients are float32, and differ from the dense ones by the arithmetic's rounding alone."""
    for autocast in (True, False):
        dtype = torch.float32 if autocast else torch.bfloat16
        dense, net = nn.Linear(N, M).to(dtype), nn.Linear(N, M).to(dtype)
        net.load_state_dict(dense.state_dict())
        compact = CompactParameters(net, {"weight": some_rows()})
        compact.attach()
        x = torch.randn(3, 5, N, dtype=dtype)
        for module in (dense, net):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                module(x).float().square().mean().backward()
        (gradient,) = [master.grad for master in compact.masters]
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert dense.weight.grad is not None
        expected = dense.weight.grad[some_rows()].float()
        torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=1e-2 * float(expected.abs().max()))


def test_the_input_s_gradient_is_as_it_was() -> None:
    """What is before the layer learns as ever."""
    net, x = nn.Linear(N, M), torch.randn(4, N, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    CompactParameters(net, {"weight": some_columns()}).attach()
    (found,) = torch.autograd.grad(net(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_a_single_vector_is_an_input_too() -> None:
    """As it is for the layer itself."""
    net, x = nn.Linear(N, M), torch.randn(N)
    net(x).square().sum().backward()
    assert net.weight.grad is not None
    expected = net.weight.grad[some_rows()]
    net.zero_grad()
    compact = CompactParameters(net, {"weight": some_rows()})
    compact.attach()
    net(x).square().sum().backward()
    torch.testing.assert_close(compact.masters[0].grad, expected)
