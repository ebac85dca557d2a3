"""How many operations a scoring pass launches for a batch, beside a plain pass over the same batch.

    python benchmarks/launches.py                    a Llama of 28 layers in bfloat16, a few seconds
    python benchmarks/launches.py --layers 4 --dtype float32 --by_gradient

On a GPU each operation but views and allocations is one launch or more, whose cost shows where batches are small. They
are counted on the CPU, where torch takes the same steps, in the second batch, as the first is checked besides. A plain
pass is forward and backward. Of linear layers the products with u are counted (`linear_tap.py`), as a GPU takes for all
but long examples; with ``--by_gradient`` the gradients of single examples.

Below the table of passes stands what the one pass launches beyond the plain one, by operation.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from scoring import make_batch, plain_pass
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from dualsft.data.layout import Batch
from dualsft.matrix.passes import gradient_pass
from dualsft.models.dtypes import direction_dtype
from dualsft.selection.passes import scoring_mode

NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "is_same_size", "promote_types"}
PASSES = {"plain pass": None, "one pass": (1, True), "row pass": (1, False), "column pass": (0, True)}
"""Name -> how many directions, and whether there are columns; None for no scoring."""


class Launches(TorchDispatchMode):
    """Counts operations but views and allocations, of all batches but the first that it is given to watch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        self.counts[name] += not function.is_view and name not in NO_LAUNCH
        return function(*args, **(kwargs or {}))

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches."""
        for k, batch in enumerate(batches):
            if k:
                with self:
                    yield batch
            else:
                yield batch


def launches(model: Any, batch: Batch, options: tuple[int, bool] | None) -> Counter[str]:
    """What one batch launches: operation -> how often."""
    watch = Launches()
    if options is None:
        for each in watch([batch, batch]):
            plain_pass(model, each)
        return watch.counts
    directions, columns = options
    u = {n: 1e-6 * torch.randn_like(p, dtype=direction_dtype(p)) for n, p in model.named_parameters()}
    with scoring_mode(model, False):
        gradient_pass(model, lambda first: [batch, batch][first:], watch, [u] * directions, columns=columns)
    return watch.counts


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--by_gradient", action="store_true")
    parser.add_argument("--examples", type=int, default=4)
    options = parser.parse_args()
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=options.layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    batch = make_batch(model, options.examples, 8)
    with patch("dualsft.matrix.linear_tap.by_gradient_pays", lambda *_: options.by_gradient):
        found = {name: launches(model, batch, of) for name, of in PASSES.items()}
    plain = found["plain pass"].total()
    print(f"{options.layers} layers, {options.dtype}, {options.examples} examples, torch {torch.__version__}")
    for name, counts in found.items():
        print(f"{name:12} {counts.total():6,} {counts.total() / plain:6.2f}")
    more = found["one pass"] - found["plain pass"]
    print("more in one pass: " + ", ".join(f"{name} {count}" for name, count in more.most_common() if count))


if __name__ == "__main__":
    main()
