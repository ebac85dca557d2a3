"""Memory and step time of masked fine-tuning beside dense AdamW and LoRA, on the same model and batches in one run.

    python benchmarks/masked_fit.py                     the table of docs/finetuning.md, on this machine's CPU
    python benchmarks/masked_fit.py --shape llama-3.2-3b --device cuda --checkpointing --batch_tokens 8192

Memory is the peak of a process that takes two steps on a batch of a few tokens, above what it held before the model was
made, in bytes per weight of the model: weights, gradients, optimizer state, indices, and whatever a step takes for a
moment. What activations take, and the libraries' own buffers, is left out: as much as a forward and backward pass peaks
above the weights and an earlier pass's gradients. Time is that of a step on a real batch (forward, backward,
optimizer), in one process, as the median over rounds of the ratio to the dense step of the same round.

dense         float32 weights, gradients and AdamW state, bfloat16 arithmetic by autocast
dense, bf16   the same loop in bfloat16 throughout, which loses small updates
scattered     weights in bfloat16, a random share of every tensor trained with float32 masters
rows, columns, blocks   the same with whole rows, whole columns or blocks of 64 x 64 chosen
LoRA          PEFT's, on every linear layer of the bfloat16 model, with about as many trained weights (needs `peft`)
"""

import argparse
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from memory import STEADY, Meter
from scoring import SHAPES, make_batch, make_model
from torch import Tensor, nn

from dualsft.data.layout import Batch
from dualsft.models.loading import checkpoint_activations
from dualsft.objectives import example_losses
from dualsft.training.compact import CompactParameters

ACTIVATIONS = "activations"
CASES = {
    "dense": (),
    "dense, bf16": (),
    **{f"scattered {share}": ("scattered", share) for share in ("0.01", "0.05", "0.1", "0.5")},
    **{f"{kind} 0.1": (kind, "0.1") for kind in ("rows", "columns", "blocks")},
    "LoRA 0.01": ("LoRA", "0.01"),
    "LoRA 0.1": ("LoRA", "0.1"),
}
_BLOCK = 64


@dataclass(frozen=True)
class Training:
    """A model with what trains it.

    Attributes:
        model: The model.
        optimizer: Over what is trained.
        trained: How many weights that is.
        autocast: Whether arithmetic is in bfloat16 though the weights are not.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trained: int
    autocast: bool = False

    def step(self, batch: Batch) -> None:
        """One optimizer step on one batch."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext():
            loss = example_losses(self.model, batch).mean()  # type: ignore[arg-type]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def mask_of(kind: str, share: float, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Which entries of a tensor are trained; of a vector a scattered share, whatever the kind."""
    if kind == "scattered" or weight.dim() < 2:
        return torch.rand(weight.shape, generator=generator, device=generator.device) < share
    height, width = weight.shape
    units = {"rows": (height, 1), "columns": (1, width), "blocks": (-(-height // _BLOCK), -(-width // _BLOCK))}[kind]
    chosen = torch.zeros(math.prod(units), dtype=torch.bool, device=generator.device)
    order = torch.randperm(len(chosen), generator=generator, device=generator.device)
    chosen[order[: max(1, round(share * len(chosen)))]] = True
    chosen = chosen.view(units)
    if kind == "blocks":
        chosen = chosen.repeat_interleave(_BLOCK, 0)[:height].repeat_interleave(_BLOCK, 1)[:, :width]
    return chosen.expand(weight.shape).contiguous()


class Masks(Mapping[str, Tensor]):
    """Masks that are made when they are asked for, as those of a selection are unpacked."""

    def __init__(self, model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
        self._weights, self._make = dict(model.named_parameters()), make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(self._weights[name])

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def masked(model: nn.Module, kind: str, share: float) -> Training:
    """The model with compact parameters for a share of every tensor, drawn on the model's device."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    compact = CompactParameters(model, Masks(model, lambda weight: mask_of(kind, share, weight, generator)))
    compact.attach()
    optimizer = torch.optim.AdamW(compact.parameters(), lr=1e-5)
    compact.write_back_after(optimizer)
    return Training(model, optimizer, compact.num_selected)


def lora(model: nn.Module, share: float) -> Training:
    """PEFT's LoRA on every linear layer, of the rank that comes nearest to a share of the weights."""
    from peft import LoraConfig, get_peft_model

    weights = sum(p.numel() for p in model.parameters())
    per_rank = sum(sum(m.weight.shape) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head")
    rank = max(1, round(share * weights / per_rank))
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return Training(adapted, torch.optim.AdamW(trained, lr=1e-4), sum(p.numel() for p in trained), autocast=True)


def prepare(case: str, options: argparse.Namespace) -> Training:
    """The model and its optimizer."""
    model = make_model(options.shape, options.device, "float32" if case == "dense" else "bfloat16").train()
    if options.checkpointing:
        checkpoint_activations(model)
    if not CASES[case]:
        parameters = list(model.parameters())
        count = sum(p.numel() for p in parameters)
        return Training(model, torch.optim.AdamW(parameters, lr=1e-5), count, autocast=case == "dense")
    kind, share = CASES[case]
    return lora(model, float(share)) if kind == "LoRA" else masked(model, kind, float(share))


def measure(options: argparse.Namespace) -> int:
    """The peak of two steps on a batch of a few tokens, in bytes; steps on a tiny model come first, to load code."""
    tiny = argparse.Namespace(**{**vars(options), "shape": "tiny"})
    prepare("dense, bf16" if options.measure == ACTIVATIONS else options.measure, tiny).step(
        make_batch(make_model("tiny", options.device, "float32"), 1, 8)
    )
    meter = Meter(options.device)
    meter.restart()
    if options.measure == ACTIVATIONS:
        return activations(options, meter)
    training = prepare(options.measure, options)
    batch = make_batch(training.model, 1, 8)
    for _ in range(2):
        training.step(batch)
    return meter.peak()


def activations(options: argparse.Namespace, meter: Meter) -> int:
    """The peak of a pass above the weights and the gradients of an earlier pass, in bytes."""
    model = make_model(options.shape, options.device, "bfloat16").train()
    batch = make_batch(model, 1, 8)
    for _ in range(2):
        example_losses(model, batch).mean().backward()
    return meter.peak() - sum(2 * p.numel() * p.element_size() for p in model.parameters())


def measure_alone(options: argparse.Namespace, case: str) -> int:
    """`measure` in a fresh process."""
    given = {"shape": options.shape, "device": options.device, "measure": case}
    arguments = [f"--{name}={value}" for name, value in given.items()]
    if options.checkpointing:
        arguments.append("--checkpointing")
    command = [sys.executable, __file__, *arguments]
    return int(subprocess.run(command, env={**os.environ, **STEADY}, stdout=subprocess.PIPE, check=True).stdout)


def seconds_of(training: Training, batch: Batch, device: str) -> float:
    """How long a step takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    training.step(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step_times(cases: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a dense step, and the others' ratios to the dense step of the same round: medians."""
    trainings: dict[str, Training] = {case: prepare(case, options) for case in cases}
    batch = make_batch(trainings["dense"].model, options.batch_tokens // options.tokens, options.tokens)
    found: dict[str, list[float]] = {case: [] for case in cases}
    for number in range(options.rounds + 1):
        for case, training in trainings.items():
            seconds = seconds_of(training, batch, options.device)
            if number:  # the first round makes the optimizers' state
                found[case].append(seconds if case == "dense" else seconds / found["dense"][-1])
    return {case: statistics.median(values) for case, values in found.items()}


def report(options: argparse.Namespace) -> Iterator[str]:
    """The table, line by line."""
    cases = [case for case in CASES if "LoRA" not in case or importlib.util.find_spec("peft")]
    weights = sum(p.numel() for p in make_model(options.shape, "meta", "bfloat16").parameters())
    yield f"{weights:,} weights, {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    yield f"{options.batch_tokens} tokens a batch, {options.tokens} an example, checkpointing {options.checkpointing}"
    times = step_times(cases, options)
    beside = measure_alone(options, ACTIVATIONS)
    dense = measure_alone(options, "dense") - beside
    yield f"activations and buffers: {beside / 2**20:.0f} MiB, left out below"
    yield f"{'case':16} {'trained':>9} {'bytes/weight':>13} {'dense/this':>11} {'step/dense':>11}"
    for case in cases:
        peak = measure_alone(options, case) - beside
        trained = prepare(case, options).trained / weights
        step = f"{times[case]:.3f} s" if case == "dense" else f"{times[case]:.2f}"
        yield f"{case:16} {trained:9.1%} {peak / weights:13.2f} {dense / peak:11.2f} {step:>11}"


def main() -> None:
    """Print the table; or, in a process of its own, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="medium")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--tokens", type=int, default=256, help="per example")
    parser.add_argument("--batch_tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=[ACTIVATIONS, *CASES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options))
        return
    for text in report(options):
        print(text, flush=True)


if __name__ == "__main__":
    main()
