"""What it takes to choose weights by their scores: processor time for each weight.

    python benchmarks/choice.py                      63 million weights on this machine, a minute
    python benchmarks/choice.py --layers 28 --threads 8
    python benchmarks/choice.py --ranks 2            one rank and several that choose together, side by side

For each rule, with a budget of a tenth: nanoseconds of processor time for each weight, those of the rule by the digits
of all keys (two histograms over whole tensors, then the mask, as release 0.1.0 chose), the ratio, and whether both
choose the same weights. Then the parts of `dualsft allocate` around the rule: counting a mask, packing it, and the
diagnostics.

With ``--ranks`` nanoseconds of time for each weight, from scores in a file to the file of masks, for the rules that
several ranks can follow together: of a single rank, and of the slowest of several that share the machine's cores, the
least of three rounds; whether both write the same bytes; and how much of the mask the memory of a rank holds.
"""

import argparse
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed

from dualsft.allocators import GlobalTopK, LayerQuota, ParameterAllocator, Proportional, Structured, UniformPerLayer
from dualsft.allocators.base import ScoredParameters
from dualsft.allocators.choice import Choice, ranked
from dualsft.selection.diagnostics.parameters import parameter_figures
from dualsft.selection.mask import own_entries, pack_bits, write_masks
from dualsft.sharding.files import read_full_tensors
from dualsft.sharding.groups import job_group

RULES: dict[str, ParameterAllocator] = {
    "global_top_k": GlobalTopK(),
    "global_top_k, signed": GlobalTopK("signed"),
    "layer_quota": LayerQuota(),
    "uniform_per_layer": UniformPerLayer(),
    "proportional": Proportional(),
    "structured": Structured(),
}
ROUNDS = 3
USERS = ("top_k", "layer_quota", "uniform_per_layer", "proportional", "structured")
_LOWEST = torch.iinfo(torch.int32).min


class ChoiceByDigits(Choice):
    """The same choice by two histograms over the digits of the keys of whole tensors."""

    def take(self, names: Iterable[str], k: int) -> None:
        """Choose the best k of these tensors' entries."""
        if k == 0:
            return
        names = sorted(names)
        upper, rank = self._digit(((keys >> 16) + 2**15 for keys in map(self._keys, names)), k)
        lower, ties = self._digit((q[(q >> 16) == upper - 2**15] & 0xFFFF for q in map(self._keys, names)), rank)
        threshold = (upper - 2**15) * 2**16 + lower
        for name in names:
            keys = self._keys(name)
            chosen = keys > threshold
            at_threshold = (keys == threshold).nonzero().squeeze(1)[:ties]
            chosen[at_threshold] = True
            ties -= len(at_threshold)
            self._mask[name] |= chosen.view(self._mask[name].shape)
            self._taken[name] = int(self._mask[name].sum())

    @staticmethod
    def _digit(digits: Iterable[Tensor], k: int) -> tuple[int, int]:
        counts = torch.as_tensor(sum(torch.bincount(part, minlength=2**16) for part in digits))
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= k).nonzero()[-1])
        return digit, k - int(at_least[digit] - counts[digit])

    def _keys(self, name: str) -> Tensor:
        bits = (ranked(self._scores[name], self._by) + 0.0).flatten().view(torch.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(self._mask[name].flatten(), _LOWEST)


def llama_scores(hidden: int, layers: int, vocabulary: int) -> dict[str, Tensor]:
    """Heavy-tailed scores of a model of Llama's shape, of another scale in each tensor."""
    shapes: dict[str, Sequence[int]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        for part, rows in {"q": hidden, "k": hidden // 4, "v": hidden // 4, "o": hidden}.items():
            shapes[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = (rows, hidden)
        for part in ("gate", "up", "down"):
            sizes = (4 * hidden, hidden) if part != "down" else (hidden, 4 * hidden)
            shapes[f"model.layers.{layer}.mlp.{part}_proj.weight"] = sizes
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for k, (name, shape) in enumerate(sorted(shapes.items())):
        score = torch.empty(tuple(shape)).normal_(generator=generator)
        score *= torch.empty(tuple(shape)).normal_(generator=generator)
        scores[name] = score.mul_(1e-9 * (1 + k % 7))
    return scores


def timed(work: Callable[[], Any], weights: int) -> tuple[Any, float]:
    """What a call returns, and its nanoseconds of processor time for each weight."""
    start = time.process_time()
    result = work()
    return result, (time.process_time() - start) / weights * 1e9


def by_digits(rule: Any, scores: Mapping[str, Tensor], budget: int) -> Mapping[str, Tensor]:
    """The rule's choice with `ChoiceByDigits`."""
    patches = [patch(f"dualsft.allocators.{module}.Choice", ChoiceByDigits) for module in USERS]
    for each in patches:
        each.start()
    chosen: Mapping[str, Tensor] = rule.allocate(scores, budget)
    for each in patches:
        each.stop()
    return chosen


def work(rank: int, ranks: int, port: int, folder: Path, rule: str, found: Any) -> None:
    """What one of several ranks takes to choose by the scores in a folder: nanoseconds, and bytes of its masks."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    scores = dict(read_full_tensors([folder / "scores.safetensors"]))
    weights = sum(prod(score.shape) for score in scores.values())
    group, path = job_group(), folder / f"{ranks}.safetensors"
    distributed.barrier()
    start = time.perf_counter()
    masks = RULES[rule].allocate(ScoredParameters(scores, None, group), weights // 10)
    write_masks(path, masks, group)
    taken = time.perf_counter() - start
    held = sum(len(own_entries(mask, group)) for mask in masks.values())
    found.put((taken / weights * 1e9, held / weights))
    distributed.destroy_process_group()


def on_ranks(count: int, folder: Path, rule: str) -> tuple[float, float]:
    """The most nanoseconds and bytes for each weight of any of so many ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = get_context("spawn")
    found = context.Queue()
    ranks = [context.Process(target=work, args=(k, count, port, folder, rule, found)) for k in range(count)]
    for process in ranks:
        process.start()
    answers = [found.get(timeout=600) for _ in ranks]
    for process in ranks:
        process.join()
    return max(ns for ns, _ in answers), max(held for _, held in answers)


def compare_ranks(scores: Mapping[str, Tensor], count: int) -> Iterator[str]:
    """A table of one rank beside several, line by line."""
    yield f"| rule | one rank, ns | {count} ranks, ns | ratio | same | mask of a rank, bytes |"
    yield "| --- | ---: | ---: | ---: | --- | ---: |"
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_file(dict(scores), folder / "scores.safetensors")
        for rule in (rule for rule, allocator in RULES.items() if allocator.together):
            rounds = [(on_ranks(1, folder, rule)[0], *on_ranks(count, folder, rule)) for _ in range(ROUNDS)]
            alone, together, held = map(min, zip(*rounds, strict=True))
            same = len({(folder / f"{ranks}.safetensors").read_bytes() for ranks in (1, count)}) == 1
            yield f"| {rule} | {alone:.1f} | {together:.1f} | {alone / together:.2f} | {same} | {held:.2f} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", type=int, help="compare one rank with so many that choose together")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scores = llama_scores(options.hidden, options.layers, options.vocabulary)
    weights = sum(prod(score.shape) for score in scores.values())
    if options.ranks:
        print(f"{weights:,} weights, gloo on one machine's CPU, torch {torch.__version__}")
        for line in compare_ranks(scores, options.ranks):
            print(line, flush=True)
        return
    print(f"{weights:,} weights, {options.threads} threads, torch {torch.__version__}; processor time in ns a weight")
    print("| rule | ns | by digits | ratio | same |\n| --- | ---: | ---: | ---: | --- |")
    for name, rule in RULES.items():
        chosen, ns = timed(lambda rule=rule: rule.allocate(scores, weights // 10), weights)  # type: ignore[misc]
        before, slow = timed(lambda rule=rule: by_digits(rule, scores, weights // 10), weights)  # type: ignore[misc]
        same = all(torch.equal(chosen[part], before[part]) for part in scores)
        print(f"| {name} | {ns:.1f} | {slow:.1f} | {slow / ns:.1f} | {same} |", flush=True)
    parts: dict[str, Callable[[], Any]] = {
        "counting a mask": lambda: [mask.count_nonzero() for mask in chosen.values()],
        "packing it": lambda: [pack_bits(mask) for mask in chosen.values()],
        "diagnostics": lambda: parameter_figures(chosen, scores),
    }
    for name, work in parts.items():
        print(f"{name}: {timed(work, weights)[1]:.1f} ns")


if __name__ == "__main__":
    main()
