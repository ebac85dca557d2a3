"""Models, batches and times that several sections share."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from scoring import make_batch, make_model
from torch import Tensor

from dualsft.data.batches import collate
from dualsft.data.layout import Batch, to_device
from dualsft.data.packing import collate_packed
from dualsft.models.dtypes import direction_dtype


def build(shape: str, device: str, dtype: str = "bfloat16") -> Any:
    """A model with random weights, in evaluation mode, once what earlier ones held is free."""
    release(device)
    return make_model(shape, device, dtype)


def release(device: str) -> None:
    """Give memory that nobody uses back to the device."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def small_direction(model: Any) -> dict[str, Tensor]:
    """A random u, in the type in which a pass holds it."""
    return {n: 1e-6 * torch.randn_like(p, dtype=direction_dtype(p)) for n, p in model.named_parameters()}


def count(model: Any) -> int:
    """How many weights a model has."""
    return sum(p.numel() for p in model.parameters())


def full_batches(model: Any, batch_tokens: int, length: int, number: int) -> list[Batch]:
    """Batches of examples of one length, the ids counted on."""
    size = max(1, batch_tokens // length)
    batches = [make_batch(model, size, length) for _ in range(number)]
    for k, batch in enumerate(batches):
        batch["example_id"] = torch.arange(k * size, (k + 1) * size)
    return batches


def ragged(model: Any, lengths: Iterable[int], first: int = 0) -> list[dict[str, Any]]:
    """Examples of these lengths; the second half of each is supervised."""
    generator = torch.Generator().manual_seed(first)
    found = []
    for k, length in enumerate(lengths, first):
        ids = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        found.append({"example_id": k, "input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return found


def padded(model: Any, examples: list[dict[str, Any]]) -> Batch:
    """One example to a row."""
    return to_device(collate(examples, 0), model.device)


def packed(model: Any, examples: list[dict[str, Any]], in_a_row: int) -> Batch:
    """So many examples to a row."""
    rows = [examples[k : k + in_a_row] for k in range(0, len(examples), in_a_row)]
    return to_device(collate_packed(rows, 0), model.device)


def timed(device: str, work: Callable[[], object]) -> float:
    """Seconds of one call, until the device has done it."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Wait until the device has done all work."""
    if device == "cuda":
        torch.cuda.synchronize()


def second_alone(before: Callable[[], None], after: Callable[[], None]) -> Callable[[Iterable[Batch]], Iterator[Batch]]:
    """A pass's watch that calls a function before the second batch's work, and another after it."""

    def watch(batches: Iterable[Batch]) -> Iterator[Batch]:
        for k, batch in enumerate(batches):
            if k == 1:
                before()
            yield batch
            if k == 1:
                after()

    return watch
