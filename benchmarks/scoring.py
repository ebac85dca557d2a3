"""What scoring costs against an ordinary forward and backward pass, side by side on the same batches in one run.

    python benchmarks/scoring.py                                  the table of docs/scoring.md, on this machine's CPU
    python benchmarks/scoring.py --shape llama-3.2-3b --device cuda --dtype bfloat16 --checkpointing

For each number of tokens per example it prints the time of a plain pass, of the one pass that first-order scoring
takes (rows and columns), and of the row pass of second-order scoring (no weight gradients), each as the median over
rounds of the ratio to the plain pass of the same round; and the model's floating-point operations per second in the
one pass. What a pass does once, on its first batch, to see which module uses which weight and to check two or three
rows against autograd, is timed by itself, in plain batches.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dualsft.data.layout import Batch
from dualsft.matrix.passes import gradient_pass
from dualsft.models.dtypes import direction_dtype
from dualsft.objectives import example_losses
from dualsft.selection.passes import scoring_mode

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
}
SHAPES["tiny"] = {**SHAPES["small"], "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
SHAPES["medium"] = {**SHAPES["small"], "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
for _folder in sorted((Path(__file__).parents[1] / "configs" / "shapes").iterdir()):
    SHAPES[_folder.name] = json.loads((_folder / "config.json").read_text(encoding="utf-8"))


def make_config(shape: str) -> LlamaConfig:
    """A Llama's configuration of this shape, its head tied unless the shape says otherwise."""
    return LlamaConfig(**{"tie_word_embeddings": True, "max_position_embeddings": 8192, **SHAPES[shape]})


def make_model(shape: str, device: str, dtype: str) -> Any:
    """A Llama of this shape with random weights."""
    torch.manual_seed(0)
    config = make_config(shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval()


def make_batch(model: Any, examples: int, tokens: int) -> Batch:
    """Random tokens without padding; the second half of each example is supervised."""
    ids = torch.randint(model.config.vocab_size, (examples, tokens))
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return {
        "example_id": torch.arange(examples),
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "labels": labels.to(model.device),
    }


def plain_pass(model: Any, batch: Batch) -> None:
    """Forward and backward, as in training; the gradients are dropped."""
    example_losses(model, batch).sum().backward()
    model.zero_grad(set_to_none=True)


class Stopwatch:
    """Passes batches on and times the work on each.

    Args:
        device: Where the work is done.
        clock: The host's clock, in seconds.
    """

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self.seconds: list[float] = []

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the consumer's work on one is done when it asks for the next."""
        for batch in batches:
            start = self._now()
            yield batch
            self.seconds.append(self._now() - start)

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return self._clock()


def compare(
    model: Any,
    batches: list[Batch],
    directions: list[dict[str, Tensor]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds per batch: a plain pass's median, and medians of the ratios to the plain pass of the same round.

    The first batch of every pass is left out: it warms caches up and, in scoring, carries the spot check.
    """

    def plain(watch: Stopwatch) -> None:
        for batch in watch(batches):
            plain_pass(model, batch)

    def scoring(watch: Stopwatch, columns: bool) -> None:
        gradient_pass(model, lambda first: batches[first:], watch, directions, columns=columns)

    passes: dict[str, Callable[[Stopwatch], None]] = {
        "plain": plain,
        "one pass": partial(scoring, columns=True),
        "row pass": partial(scoring, columns=False),
    }
    found: dict[str, list[float]] = {name: [] for name in (*passes, "first batch")}
    for _ in range(rounds):
        for name, run in passes.items():
            run(watch := Stopwatch(model.device.type, clock))
            seconds = statistics.mean(watch.seconds[1:])
            found[name].append(seconds if name == "plain" else seconds / found["plain"][-1])
            if name == "one pass":
                found["first batch"].append((watch.seconds[0] - seconds) / found["plain"][-1])
    return {name: statistics.median(values) for name, values in found.items()}


def flops(model: Any, tokens: int, length: int, checkpointing: bool) -> float:
    """Multiplications and additions of a forward and backward pass: 6 per weight and token, 8 with recomputation.

    Embedding rows are looked up, not multiplied, but the head, which is tied to them, is; causal attention adds
    6 x layers x length x width per token.
    """
    weights = sum(p.numel() for p in model.parameters())
    attention = model.config.num_hidden_layers * length * model.config.hidden_size
    return tokens * (8 if checkpointing else 6) * (weights + attention)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--directions", type=int, default=1, help="one for each validation set, three with stability")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one_thread", action="store_true", help="in its processor time, which neighbours change less")
    options = parser.parse_args()
    clock = time.perf_counter
    if options.one_thread:
        torch.set_num_threads(1)
        clock = time.thread_time
    model = make_model(options.shape, options.device, options.dtype)
    directions = [
        {n: 1e-6 * torch.randn_like(p, dtype=direction_dtype(p)) for n, p in model.named_parameters()}
        for _ in range(options.directions)
    ]
    weights = sum(p.numel() for p in model.parameters())
    print(f"{weights:,} weights, {options.dtype}, {options.device}, {torch.get_num_threads()} threads, torch", end=" ")
    print(f"{torch.__version__}, {options.batch_tokens} tokens a batch, checkpointing {options.checkpointing}")
    print("tokens/example   plain s   one pass/plain   row pass/plain   one pass GFLOP/s   extra of the first batch")
    for length in options.lengths:
        examples = options.batch_tokens // length
        batches = [make_batch(model, examples, length) for _ in range(options.batches)]
        with scoring_mode(model, options.checkpointing):
            found = compare(model, batches, directions, options.rounds, clock)
        rate = flops(model, examples * length, length, options.checkpointing) / found["plain"] / found["one pass"]
        print(
            f"{length:14d} {found['plain']:9.3f} {found['one pass']:16.3f} {found['row pass']:16.3f} "
            f"{rate / 1e9:18.0f} {found['first batch']:25.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
