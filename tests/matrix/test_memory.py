"""What a gradient pass holds at a time; the allocator's own record of every byte, so the figures have no noise."""

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from dualsft.data.layout import Batch
from dualsft.matrix.passes import gradient_pass
from dualsft.objectives import example_losses
from tests.cases import collate, given, llama, make_examples, random_direction
from tests.world.data import random_batch
from tests.world.models import tiny_llama


def peak(work: Callable[[], object]) -> int:
    """The most bytes of tensors that are alive at a time while this works, beyond those that were alive before."""
    gc.collect()  # what an earlier profile saw made, and waits in a cycle, would be taken off when it goes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def scoring(model: PreTrainedModel, examples: int) -> Callable[[], object]:
    """Rows and columns of this many examples of one length, in batches of 10 that are made when they are asked for."""
    direction = random_direction(model)

    def batches(first: int) -> Iterator[Batch]:
        for k in range(first, examples // 10):
            yield random_batch(10, 24, seed=k, ragged=False)

    return lambda: gradient_pass(model, batches, directions=[direction])


def weight_bytes(model: PreTrainedModel) -> int:
    """What one number of four bytes for each weight takes."""
    return 4 * sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module", autouse=True)
def _torch_is_loaded() -> None:
    """Torch makes parts of itself when they are first used; what those hold is no part of any pass."""
    scoring(tiny_llama(), 10)()


@pytest.fixture(params=["by gradient", "by product"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Linear layers take one way to the rows, whatever the lengths."""
    pays = request.param == "by gradient"
    monkeypatch.setattr("dualsft.matrix.linear_tap.by_gradient_pays", lambda *_: pays)
    return str(request.param)


@pytest.mark.slow
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_flat_in_the_pool(dtype: torch.dtype) -> None:
    """80 examples take no more than 20 of the same lengths, to a thousandth."""
    model = tiny_llama(dtype=dtype)
    few, many = (peak(scoring(model, examples)) for examples in (20, 80))
    assert few > weight_bytes(model)
    assert many == pytest.approx(few, rel=1e-3)


def test_kept_gradients_would_show() -> None:
    """The record sees gradients that are kept: each example's adds the size of the weights."""
    model = tiny_llama()

    def keep(examples: int) -> list[object]:
        batch = random_batch(1, 24)
        return [
            torch.autograd.grad(example_losses(model, batch).sum(), list(model.parameters())) for _ in range(examples)
        ]

    grown = peak(lambda: keep(12)) - peak(lambda: keep(4))
    assert grown == pytest.approx(8 * weight_bytes(model), rel=0.05)


def deep_model() -> PreTrainedModel:
    """Many layers, so that one of them is a small part of the whole."""
    torch.manual_seed(0)
    return llama(hidden_size=64, intermediate_size=128, num_hidden_layers=12, head_dim=32).eval()


def test_dense_gradients_are_never_all_there(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what the rows take alone, columns take the accumulator and one gradient: not two of the largest fit in.

    Where it is formed by example, a gradient is turned if it has more columns than rows, which takes a copy. A plain
    backward pass, in comparison, ends with the gradients of all the weights.
    """
    monkeypatch.setattr("dualsft.matrix.passes.spot_check", lambda *_: None)  # single gradients again, of two examples
    monkeypatch.setattr("dualsft.matrix.linear_tap._BLOCK", 256)  # smaller than the layers, as in a real model
    model = deep_model()
    batch = collate(make_examples((2,)))  # whose activations are as good as nothing
    direction = random_direction(model)

    def score(columns: bool) -> int:
        return peak(lambda: gradient_pass(model, given([batch]), directions=[direction], columns=columns))

    def plain() -> None:
        example_losses(model, batch).sum().backward()
        model.zero_grad(set_to_none=True)

    largest = 4 * max(p.numel() for p in model.parameters())
    assert largest < weight_bytes(model) / 50
    extra = score(columns=True) - weight_bytes(model) - score(columns=False)
    assert extra < (3 if way == "by gradient" else 2) * largest
    assert peak(plain) > weight_bytes(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_gradient_is_alive_when_it_is_folded(tied: bool, dtype: torch.dtype) -> None:
    """Whenever a parameter's gradient is complete, all others have been dropped or are still to come."""
    model = tiny_llama(tied, dtype)
    named = dict(model.named_parameters())
    seen: list[tuple[str, list[str]]] = []

    def look(name: str) -> Callable[[torch.Tensor], None]:
        return lambda _: seen.append((name, [n for n, p in named.items() if p.grad is not None]))

    handles = [p.register_post_accumulate_grad_hook(look(name)) for name, p in named.items()]
    scoring(model, 20)()
    for handle in handles:
        handle.remove()
    assert {name for name, _ in seen} == set(named)
    assert all(alive == [name] for name, alive in seen)
    assert all(p.grad is None for p in named.values())
