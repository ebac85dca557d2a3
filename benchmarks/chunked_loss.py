"""What a loss in chunks of supervised tokens costs against torch's of whole logits, on the same batch in one run.

    python benchmarks/chunked_loss.py                    a table for this machine's CPU; a minute
    python benchmarks/chunked_loss.py --device cuda --dtype bfloat16 --hidden 3072 --examples 8 --tokens 2048

The model is one block between an embedding and a tied head of a large vocabulary, so that the table is about the loss.
For losses alone, a gradient, and the pass that first-order scoring takes, with half of the tokens supervised and with
all, it prints the seconds of whole logits and ``F.cross_entropy``, the median over rounds of the ratio of chunks to
them in the same round, and the peak of both in GiB beyond what is held before: of the allocator's on a GPU, else of the
bytes of living tensors.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dualsft.data.layout import Batch, Layout
from dualsft.matrix.interaction import ColumnSums, RowSums
from dualsft.objectives import chunks, example_losses, likelihood
from dualsft.objectives.cross_entropy import widened
from dualsft.plans.live import LiveBytes


@contextmanager
def whole() -> Iterator[None]:
    """Compute whole logits, and torch's cross-entropy of those that predict supervised tokens."""

    def by_torch(logits: Any, targets: Any, _: Any) -> Any:
        return F.cross_entropy(widened(logits), targets, reduction="none")

    with patch.object(chunks, "LARGEST", 2**62), patch.object(likelihood, "cross_entropy", by_torch):
        yield


def make_model(options: argparse.Namespace) -> Any:
    """Random weights."""
    torch.manual_seed(0)
    size = options.hidden
    config = LlamaConfig(
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=1,
        num_attention_heads=size // 64,
        vocab_size=options.vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype)).eval()


def make_batch(options: argparse.Namespace, supervised: float) -> Batch:
    """Random tokens without padding, of which the last share is supervised."""
    ids = torch.randint(options.vocabulary, (options.examples, options.tokens), device=options.device)
    labels = ids.clone()
    labels[:, : options.tokens - round(supervised * options.tokens)] = -100
    return {"example_id": torch.arange(len(ids)), "input_ids": ids, "labels": labels, "attention_mask": ids**0}


def work_of(model: Any, batch: Batch) -> dict[str, Callable[[], None]]:
    """What is timed, by name."""
    layout = Layout.of(batch)

    @torch.no_grad()
    def losses() -> None:
        example_losses(model, batch, layout)

    def gradient() -> None:
        with ColumnSums(model):
            example_losses(model, batch, layout).sum().backward()

    row_sums = RowSums(model, [{name: torch.randn_like(p) for name, p in model.named_parameters()}])

    def scores() -> None:
        with ColumnSums(model), row_sums as rows:
            rows.begin(layout)
            example_losses(model, batch, layout).sum().backward()

    return {"losses": losses, "gradient": gradient, "one pass": scores}


def seconds(work: Callable[[], None], device: str) -> float:
    """Of one call; of this process's own threads where a CPU computes, which others may be using too."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak(work: Callable[[], None], batch: Batch, options: argparse.Namespace) -> float:
    """GiB beyond what is held before."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with LiveBytes(options.vocabulary) as live:
        work()
    return live.peaks[0].size / 2**30


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = make_model(options)
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {"whole": whole, "chunks": nullcontext}
    print("| supervised | work | whole: seconds | chunks: ratio | whole: peak GiB | chunks: peak GiB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for supervised in (0.5, 1.0):
        batch = make_batch(options, supervised)
        for name, work in work_of(model, batch).items():
            times: dict[str, list[float]] = {way: [] for way in ways}
            peaks: dict[str, float] = {}
            for number in range(options.rounds + 1):
                for way, setting in ways.items():
                    with setting():
                        run = partial(seconds, work, options.device)
                        if number:
                            times[way].append(run())
                        else:  # the first round finds out what the model is like
                            run()
                            peaks[way] = peak(work, batch, options)
            ratio = statistics.median(b / a for a, b in zip(times["whole"], times["chunks"], strict=True))
            typical = statistics.median(times["whole"])
            bytes_of = f"{peaks['whole']:.2f} | {peaks['chunks']:.2f}"
            print(f"| {supervised:.0%} | {name} | {typical:.2f} | {ratio:.2f} | {bytes_of} |", flush=True)


if __name__ == "__main__":
    main()
