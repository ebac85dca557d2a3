"""What torch's profiler counts in a batch: launches, waits for the device, and kernels by kind."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from masked_fit import masked
from scoring import plain_pass
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dualsft.data.layout import Batch
from dualsft.matrix.passes import gradient_pass
from dualsft.selection.passes import scoring_mode
from gpu_checks.models import build, full_batches, packed, padded, ragged, second_alone, small_direction, timed, wait
from gpu_checks.section import Figure, Scale

_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemsetAsync")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_READS = ("aten::_local_scalar_dense", "aten::nonzero")
_KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas"),
    "copies": ("memcpy", "memset", "copy"),
    "reductions": ("reduce", "norm", "softmax"),
    "embedding and indices": ("index", "embedding", "gather", "scatter"),
    "elementwise": ("elementwise", "vectorized", "triton"),
}
"""Kind -> parts of the kernels' names; the first that fits counts."""
_ATTENTION = ("flash", "efficient", "cudnn", "fmha", "sdpa", "scaled_dot_product")


@dataclass
class Counts:
    """What was counted.

    Attributes:
        calls: Name of an operation on the host -> how often it was called.
        kernels: Name of a kernel -> its microseconds.
    """

    calls: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)

    def of(self, names: tuple[str, ...]) -> int:
        """How often anything was called whose name begins so, as versions are appended to some."""
        return sum(count for call, count in self.calls.items() if call.startswith(names))

    def busy(self) -> float:
        """Seconds of all kernels together."""
        return sum(self.kernels.values()) / 1e6

    def by_kind(self) -> Counter[str]:
        """Kind of kernel -> its share of their time."""
        found: Counter[str] = Counter()
        for name, time in self.kernels.items():
            low = name.lower()
            kind = next((kind for kind, parts in _KINDS.items() if any(part in low for part in parts)), "other")
            found[kind] += time
        total = sum(found.values()) or 1
        return Counter({kind: time / total for kind, time in found.items()})

    def figures(self, name: str) -> Iterator[Figure]:
        """Operators, launches, waits and reads of the work of this name."""
        operators = sum(n for call, n in self.calls.items() if call.startswith("aten::"))
        yield Figure(f"{name}: operators on the host", operators)
        yield Figure(f"{name}: launches", self.of(_LAUNCHES))
        yield Figure(f"{name}: waits for the device", self.of(_WAITS))
        yield Figure(f"{name}: reads of single numbers", self.of(_READS))


class Profiler:
    """Counts what happens between `start` and `stop`."""

    def __init__(self, device: str) -> None:
        self._device = device
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self._profile = profile(activities=activities)

    def start(self) -> None:
        """Begin."""
        wait(self._device)
        self._profile.__enter__()

    def stop(self) -> None:
        """End, once the device is done."""
        wait(self._device)
        self._profile.__exit__(None, None, None)

    def counts(self) -> Counts:
        """What was counted; the wait at the end is left out."""
        found = Counts()
        for event in self._profile.events():
            if event.device_type == DeviceType.CPU:
                found.calls[event.name] += 1
            else:
                found.kernels[event.name] += event.time_range.elapsed_us()
        found.calls["cudaDeviceSynchronize"] -= min(1, found.calls["cudaDeviceSynchronize"])
        return found


def counted(device: str, work: Callable[[], object]) -> Counts:
    """What one call does, after one that is not counted."""
    work()
    profiler = Profiler(device)
    profiler.start()
    work()
    profiler.stop()
    return profiler.counts()


def _scored(scale: Scale, model: Any, batches: list[Batch], **options: Any) -> Counts:
    """What the second batch of a pass does."""
    profiler = Profiler(scale.device)
    with scoring_mode(model, checkpointing=False):
        gradient_pass(model, lambda first: batches[first:], second_alone(profiler.start, profiler.stop), **options)
    return profiler.counts()


def launches(scale: Scale) -> Iterator[Figure]:
    """Launches, waits and reads of a batch on a deep model, beside those of a plain pass; few tokens show them all."""
    model = build(scale.deep, scale.device)
    batches = full_batches(model, scale.batch_tokens // 4, scale.lengths[0] // 4, 2)
    u = small_direction(model)
    found = {
        "plain pass": counted(scale.device, partial(plain_pass, model, batches[1])),
        "one pass": _scored(scale, model, batches, directions=[u]),
        "row pass": _scored(scale, model, batches, directions=[u], columns=False),
        "gradient pass": _scored(scale, model, batches),
    }
    del u
    training = masked(model.train(), "scattered", 0.1)
    found["masked step"] = counted(scale.device, partial(training.step, batches[1]))
    for name, counts in found.items():
        yield from counts.figures(name)


def kernels(scale: Scale) -> Iterator[Figure]:
    """Where the device's time goes in the one pass, and how much of the time it works."""
    model = build(scale.shapes[0], scale.device)
    batches = full_batches(model, scale.batch_tokens, scale.lengths[0], 2)
    u = small_direction(model)
    for name, counts in (
        ("plain pass", counted(scale.device, partial(plain_pass, model, batches[1]))),
        ("one pass", _scored(scale, model, batches, directions=[u])),
    ):
        yield Figure(f"{name}: kernels", counts.busy(), "s")
        for kind, share in counts.by_kind().most_common():
            yield Figure(f"{name}: {kind}", share, "of the kernels' time")
        for k, (kernel, time) in enumerate(counts.kernels.most_common(6), 1):
            yield Figure(f"{name}: kernel {k}", f"{time / 1e3:.2f} ms {kernel[:90]}")


def attention(scale: Scale) -> Iterator[Figure]:
    """Plain passes over the same examples without a mask, with one, padded and packed, and their attention kernels."""
    model = build(scale.shapes[0], scale.device)
    for length in scale.lengths:
        size = max(2, scale.batch_tokens // length)
        equal = padded(model, ragged(model, [length] * size))
        uneven = ragged(model, [length - k % 2 for k in range(size)])
        cases = {
            "no mask": {name: value for name, value in equal.items() if name != "attention_mask"},
            "mask of ones": equal,
            "padded": padded(model, uneven),
            "packed, two in a row": packed(model, uneven, 2),
        }
        alone = 0.0
        for name, batch in cases.items():
            if name == "no mask":  # as examples are told apart by their rows
                batch = {**batch, "spans": torch.tensor([(row, 0, length) for row in range(size)])}
            work = partial(plain_pass, model, batch)
            work()
            seconds = min(timed(scale.device, work) for _ in range(scale.rounds))
            alone = alone or seconds
            yield Figure(f"{name}, {length} tokens / no mask", seconds / alone, "ratio")
            counts = counted(scale.device, work)
            names = counts.kernels if scale.cuda else [name for name in counts.calls if name.startswith("aten::_")]
            used = sorted({n[:70] for n in names if any(part in n.lower() for part in _ATTENTION)})
            yield Figure(f"{name}, {length} tokens: kernels", "; ".join(used) or "none with such a name")
