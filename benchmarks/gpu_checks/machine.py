"""The machine: what it is, and how fast it multiplies and copies, which other figures are measured against."""

import os
from collections.abc import Callable, Iterator

import torch

from dualsft.matrix.calibration import seconds
from gpu_checks.section import Figure, Scale

_NOMINAL = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Part of a device's name -> dense bfloat16 operations per second that its data sheet states (SXM modules)."""


def machine(scale: Scale) -> Iterator[Figure]:
    """Names, versions, and the speed of a large product and of a copy."""
    yield Figure("torch", torch.__version__)
    yield Figure("threads", float(torch.get_num_threads()))
    yield Figure("cores", float(os.cpu_count() or 0))
    if scale.cuda:
        about = torch.cuda.get_device_properties(0)
        yield Figure("device", about.name)
        yield Figure("memory", about.total_memory / 2**30, "GiB")
        yield Figure("CUDA", str(torch.version.cuda))
    yield Figure("matrix product, bfloat16", product_speed(scale) / 1e12, "TFLOP/s")
    x = torch.empty(scale.side, scale.side, device=scale.device)
    y = torch.empty_like(x)
    yield Figure("copy", 2 * x.nbytes / _seconds(scale, lambda: y.copy_(x)) / 1e9, "GB/s")


def product_speed(scale: Scale) -> float:
    """Operations per second of the product of two square matrices."""
    a, b = (torch.randn(scale.side, scale.side, device=scale.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * scale.side**3 / _seconds(scale, lambda: a @ b)


def peak_speed(scale: Scale) -> float:
    """Operations per second that MFU is counted by: the data sheet's if it is known, else those of `product_speed`."""
    name = torch.cuda.get_device_name() if scale.cuda else ""
    return next((speed for part, speed in _NOMINAL.items() if part in name), 0.0) or product_speed(scale)


def _seconds(scale: Scale, work: Callable[[], torch.Tensor]) -> float:
    (taken,) = seconds(torch.device(scale.device), [work], 10)
    return taken
