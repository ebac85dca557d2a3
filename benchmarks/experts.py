"""What scoring a mixture of experts costs against a plain pass: by grouped products, and by a loop over the experts.

    python benchmarks/experts.py                                          the tables of docs/scoring.md, on this CPU
    python benchmarks/experts.py --device cuda --dtype bfloat16 --hidden 2048 --width 768 --experts 128 --top_k 8

A plain pass is forward and backward with transformers' own grouped products. The first table has its seconds per batch
(on a CPU, of processor time, whatever else runs there), and medians over rounds of the ratio to it in the same round:
of the one pass of first-order scoring (rows and columns) and of the row pass (no weight gradients), with experts
grouped and in a loop. The second has the operations that each launches for a batch in bfloat16, in which torch
multiplies all groups in one.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from launches import Launches
from scoring import Stopwatch, make_batch, plain_pass
from transformers import MixtralConfig, MixtralForCausalLM

from dualsft.data.layout import Batch
from dualsft.matrix.passes import gradient_pass
from dualsft.models.dtypes import direction_dtype
from dualsft.models.experts import group_experts
from dualsft.selection.passes import scoring_mode

WAYS: dict[str, tuple[str | None, bool | None]] = {
    "plain": ("grouped_mm", None),
    "one pass": (None, True),
    "row pass": (None, False),
    "one pass, loop": ("eager", True),
    "row pass, loop": ("eager", False),
}
"""Name -> the implementation of experts, ours if None, and whether there are columns; None for no scoring."""


@dataclass(frozen=True)
class Shape:
    """The shape of a mixture.

    Attributes:
        hidden: Width of the model.
        width: Of each expert.
        layers: How many blocks.
        experts: In each block.
        top_k: Experts of each token.
    """

    hidden: int
    width: int
    layers: int
    experts: int
    top_k: int

    def model(self, device: str, dtype: str) -> Any:
        """A mixture of this shape with random weights."""
        torch.manual_seed(0)
        config = MixtralConfig(
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            vocab_size=2048,
            num_local_experts=self.experts,
            num_experts_per_tok=self.top_k,
        )
        with torch.device(device):
            return MixtralForCausalLM(config).to(getattr(torch, dtype)).eval()


def run(model: Any, batches: list[Batch], way: str, watch: Callable[[Any], Any]) -> None:
    """One pass over the batches."""
    implementation, columns = WAYS[way]
    if implementation is None:
        group_experts(model)
    else:
        model.set_experts_implementation(implementation)
    if columns is None:
        for batch in watch(batches):
            plain_pass(model, batch)
        return
    u = {n: 1e-6 * torch.randn_like(p, dtype=direction_dtype(p)) for n, p in model.named_parameters()}
    with scoring_mode(model, False):
        gradient_pass(model, lambda first: batches[first:], watch, [u], columns=columns)


def seconds(model: Any, batches: list[Batch], rounds: int) -> dict[str, float]:
    """Seconds of a plain batch, and the other ways' ratios to it; the first batch of each pass is left out."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    for _ in range(rounds):
        for way, values in found.items():
            run(model, batches, way, watch := Stopwatch(model.device.type, clock))
            mean = statistics.mean(watch.seconds[1:])
            values.append(mean if way == "plain" else mean / found["plain"][-1])
    return {way: statistics.median(values) for way, values in found.items()}


def launches(model: Any, batch: Batch, way: str) -> int:
    """What one batch launches."""
    run(model, [batch, batch], way, watch := Launches())
    return watch.counts.total()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--width", type=int, default=256, help="of each expert")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch_tokens", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.dtype}, {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}", end=", ")
    print(f"{options.batch_tokens} tokens a batch, {options.length} an example")
    heading = "experts" + "".join(f"{way:>17}" for way in WAYS)
    sizes = (options.hidden, options.width, options.layers)
    shapes = [Shape(*sizes, experts, options.top_k) for experts in options.experts]
    models = {shape.experts: shape.model(options.device, options.dtype) for shape in shapes}
    print(f"seconds per plain batch, and ratios\n{heading}")
    for experts, model in models.items():
        batches = [make_batch(model, options.batch_tokens // options.length, options.length)] * options.batches
        found = seconds(model, batches, options.rounds)
        print(f"{experts:7d}" + "".join(f"{value:17.3f}" for value in found.values()), flush=True)
    print(f"launches per batch, bfloat16\n{heading}")
    for experts, model in models.items():
        half = deepcopy(model).to(torch.bfloat16)
        counts = map(partial(launches, half, make_batch(half, 4, options.length)), WAYS)
        print(f"{experts:7d}" + "".join(f"{count:17d}" for count in counts), flush=True)


if __name__ == "__main__":
    main()
