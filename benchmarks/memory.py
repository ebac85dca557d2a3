"""Peak memory of scoring in bytes per weight: the same for any number of examples, beside training and kept gradients.

    python benchmarks/memory.py                                   float32 on this machine's CPU, two or three minutes
    python benchmarks/memory.py --shape llama-3.2-3b --device cuda --dtype bfloat16 --kept 4

Each figure is the peak of one process that does nothing else, above what it held before the model was made: of the
resident set on a CPU, of the allocator on CUDA. Scoring is the one pass that first-order scoring takes; it needs the
weights, a direction of their type, an accumulator in float32, and the activations of one batch. Activations are what a
plain forward and backward pass takes beyond the weights and their gradients, with the gradients of an earlier batch in
place; without them the peak is lower, as gradients come while activations go. Kept gradients are for comparison: what
it takes to score by storing the gradient of each example.
"""

import argparse
import copy
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from scoring import SHAPES, make_batch, make_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dualsft.data.layout import Batch, Layout
from dualsft.matrix.curvature import HessianVectorProduct, twice_differentiable
from dualsft.matrix.passes import gradient_pass
from dualsft.models.dtypes import accumulator_dtype, direction_dtype
from dualsft.objectives import SelfDistillation, example_losses
from dualsft.selection.passes import scoring_mode
from dualsft.selection.prior import Prior
from dualsft.selection.terms import Teacher

STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For the C library: what is freed goes back to the system at once, so that the resident set is what is in use."""


def batches(model: Any, options: argparse.Namespace) -> Iterator[Batch]:
    """The examples in batches, each made when it is asked for."""
    size = options.batch_size
    for first in range(0, options.examples, size):
        yield make_batch(model, min(size, options.examples - first), options.tokens)


def score(model: Any, options: argparse.Namespace) -> None:
    """Rows and columns of all examples, in one pass."""
    direction = {n: torch.full_like(p, 1e-6, dtype=direction_dtype(p)) for n, p in model.named_parameters()}
    with scoring_mode(model, checkpointing=False):
        gradient_pass(model, lambda first: islice(batches(model, options), first, None), directions=[direction])


def train(model: Any, options: argparse.Namespace) -> None:
    """Forward and backward over all examples; the gradients add up."""
    for batch in batches(model, options):
        example_losses(model, batch).sum().backward()


def keep(model: Any, options: argparse.Namespace) -> None:
    """The gradient of each example, one example at a time, all kept."""
    options.batch_size, kept = 1, []
    for batch in batches(model, options):
        kept.append(torch.autograd.grad(example_losses(model, batch).sum(), list(model.parameters())))


def distil(model: Any, options: argparse.Namespace) -> None:
    """The prior's gradient over all examples, with the base model beside the model."""
    prior, teacher = Prior(weight=1.0).term(), Teacher(model, lambda: copy.deepcopy(model), untouched=False)
    with teacher.available() as base:
        losses = partial(_distilled, prior, base)
        gradient_pass(model, lambda first: islice(batches(model, options), first, None), losses=losses)


def _distilled(prior: SelfDistillation, base: Any, model: Any, batch: Batch, layout: Layout) -> Tensor:
    return prior.losses(model, batch, layout, base)


def multiply(model: Any, options: argparse.Namespace) -> None:
    """A Hessian-vector product over all examples."""
    direction = {n: torch.full_like(p, 1e-6) for n, p in model.named_parameters()}
    with twice_differentiable(model):
        derivative = HessianVectorProduct(model, direction)
        gradient_pass(model, lambda first: islice(batches(model, options), first, None), derivative=derivative)


WORK: dict[str, Callable[[Any, argparse.Namespace], None]] = {
    "score": score,
    "train": train,
    "keep": keep,
    "distil": distil,
    "multiply": multiply,
}


class Meter:
    """The peak of this process's memory, in bytes above what it holds now."""

    def __init__(self, device: str) -> None:
        gc.collect()
        self._cuda = device == "cuda"
        self._before = torch.cuda.memory_allocated() if self._cuda else _resident("VmRSS")

    def restart(self) -> None:
        """Forget what the peak was."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """The largest since `restart`."""
        return (torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")) - self._before


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(options: argparse.Namespace) -> int:
    """The peak of one piece of work, in bytes.

    The same work on a model of a few weights comes first: it loads the code that torch loads when it is first used.
    """
    work, few = WORK[options.measure], argparse.Namespace(**{**vars(options), "examples": 2, "batch_size": 1})
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    work(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).to(options.device), few)
    meter = Meter(options.device)
    model = make_model(options.shape, options.device, options.dtype)
    meter.restart()
    work(model, options)
    return meter.peak()


def measure_alone(options: argparse.Namespace, work: str, examples: int) -> int:
    """`measure` in a fresh process."""
    given = {**vars(options), "measure": work, "examples": examples}
    arguments = [f"--{name}={value}" for name, value in given.items() if not isinstance(value, list)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env={**os.environ, **STEADY}, stdout=subprocess.PIPE, check=True
    )
    return int(done.stdout)


def report(options: argparse.Namespace) -> Iterator[str]:
    """The table, line by line as it is measured."""
    parameters = list(make_model(options.shape, "meta", options.dtype).parameters())
    count = sum(p.numel() for p in parameters)
    stored = sum(p.numel() * p.element_size() for p in parameters)
    wide = sum(p.numel() * accumulator_dtype(p).itemsize for p in parameters)

    def line(name: str, size: float, note: str = "") -> str:
        return f"{name:45} {size / count:8.2f}   {note}".rstrip()

    yield f"{count:,} weights in {options.dtype}, {options.device}, torch {torch.__version__}"
    yield f"{f'batches of {options.batch_size} examples of {options.tokens} tokens':38} bytes per weight"
    fresh, training = (measure_alone(options, "train", n * options.batch_size) for n in (1, 2))
    directed = sum(p.numel() * direction_dtype(p).itemsize for p in parameters)
    parts = {"weights": stored, "direction": directed, "accumulator": wide, "activations": training - 2 * stored}
    yield from (line(name, size) for name, size in parts.items())
    yield line("sum of these four", total := sum(parts.values()))
    peaks = []
    for examples in options.pools:
        peaks.append(measure_alone(options, "score", examples))
        note = f"{peaks[-1] / total:.3f} of the sum, {peaks[-1] / peaks[0]:.3f} of the first pool"
        yield line(f"scoring {examples:,} examples, peak", peaks[-1], note)
    few = 2 * options.batch_size
    yield line("the prior's gradient, peak", measure_alone(options, "distil", few), "base model and model, accumulator")
    yield line(
        "a Hessian-vector product, peak", measure_alone(options, "multiply", few), "and its direction, gradients"
    )
    yield line("a training pass, peak", training, "weights, gradients, activations; no optimizer")
    yield line("a training pass without earlier gradients", fresh)
    kept = []
    for examples in options.kept:
        kept.append((examples, measure_alone(options, "keep", examples)))
        yield line(f"kept gradients of {examples:,} examples, peak", kept[-1][1], _growth(kept, count))


def _growth(kept: list[tuple[int, int]], count: int) -> str:
    if len(kept) == 1:
        return ""
    (fewer, before), (more, after) = kept[-2:]
    return f"{(after - before) / (more - fewer) / count:.2f} more per example"


def main() -> None:
    """Print the table; or, in a process of its own, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=40)
    parser.add_argument("--pools", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--kept", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--measure", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options))
        return
    for text in report(options):
        print(text, flush=True)


if __name__ == "__main__":
    main()
