"""What a type of number costs the scores: the whole first-order chain in each against float64, on the embedded model.

    python benchmarks/numerics.py                        192 examples of the embedded pool, about three minutes
    python benchmarks/numerics.py --examples 1280        all of it

Every type starts from the same bfloat16 weights and takes the same steps: validation gradient, direction, rows and
columns. The SGD direction is taken at the weights as they are shipped, Adam's after the quick start's warm-up, whose
second moment it needs. The reference is float64 autograd over one example at a time; float32 and bfloat16 autograd are
there too, with sums in float64, for what the type costs whoever adds the scores up. A score near zero may move by half
the pool when it changes its sign, and a few such examples decide Spearman's coefficient of a small pool.

A bfloat16 model's pass holds its direction in bfloat16. The last lines compare its example scores with those of the
same pass with a float32 direction, over all the examples and over those that are short: of these, linear layers round
the direction themselves.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef
from transformers import PreTrainedModel

from dualsft import InstructionDataModule
from dualsft.allocators import GlobalTopK
from dualsft.data.layout import one_example
from dualsft.matrix.example_values import ExampleValues
from dualsft.matrix.interaction import Direction
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.passes import Batches, gradient_pass
from dualsft.models.loading import Dtype, load_model
from dualsft.objectives import example_losses
from dualsft.quickstart import ASSETS, GSM8K
from dualsft.scorers import FirstOrder
from dualsft.selection.directions import Statistics, preconditioner, scorer_direction
from dualsft.selection.held_direction import HeldDirection
from dualsft.selection.warmup import Warmup, warm_up

MODEL, VALIDATION = str(ASSETS / "model"), str(GSM8K / "validation.jsonl")
STEP_SIZE = 2e-5
SHORT = 24
"""Tokens of an example below which linear layers take their rows from products with u, on a CPU."""


def embedded_data(**options: Any) -> InstructionDataModule:
    """The embedded pool and validation set, under the quick start's settings unless told otherwise."""
    settings: dict[str, Any] = {"tokenizer": MODEL, "max_length": 512, "batch_tokens": 2048, "batch_size": 8}
    return InstructionDataModule(str(GSM8K / "pool.jsonl"), **{"validation": VALIDATION, **settings, **options})


def draw(data: InstructionDataModule, count: int, longest: int = 512) -> list[int]:
    """Some of the pool's examples of at most this many tokens, at random."""
    ids = [i for i in data.train_examples.ok_ids() if data.train_examples.lengths[i] <= longest]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return sorted(ids[k] for k in order[:count].tolist())


@dataclass(frozen=True)
class Checkpoint:
    """Where to score.

    Attributes:
        weights: Parameter name -> weight, bfloat16.
        moments: Parameter name -> Adam's second moment; empty for the SGD direction.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)

    def model(self, dtype: Dtype) -> PreTrainedModel:
        """The model, its weights in this type."""
        model = load_model(MODEL, dtype).eval()
        model.load_state_dict(self.weights, strict=False)  # a tied head has no weight of its own
        return model


def shipped() -> Checkpoint:
    """The weights as they are shipped."""
    return Checkpoint(dict(load_model(MODEL).named_parameters()))


def warmed_up(data: InstructionDataModule) -> Checkpoint:
    """The weights after the quick start's warm-up, in bfloat16, and their second moment."""
    model, settings = load_model(MODEL), Warmup(fraction=0.1, learning_rate=3e-4)
    ids = settings.draw(data.train_examples.ok_ids(), seed=0)
    moments = warm_up(model, data.training_loader(ids, seed=0), settings.epochs, settings.learning_rate)
    return Checkpoint(dict(model.named_parameters()), dict(moments))


@dataclass(frozen=True)
class Scores:
    """Both score vectors.

    Attributes:
        examples: φ_i, float64.
        weights: Parameter name -> φ_j.
    """

    examples: Tensor
    weights: dict[str, Tensor]


Pass = Callable[..., GradientPass]


def score(
    model: PreTrainedModel,
    moments: dict[str, Tensor],
    data: InstructionDataModule,
    ids: list[int],
    run: Pass,
    wide: bool = False,
) -> Scores:
    """The first-order chain over these examples, each pass by `run`; if ``wide``, with rows from u as it is."""
    validation = run(model, lambda first: data.validation_loader(start=first))
    gradient = {name: total / validation.counted for name, total in validation.sums.items()}
    known = Statistics(model, gradient, preconditioner(model, moments or None), len(ids))
    u = HeldDirection(scorer_direction(FirstOrder(), known, STEP_SIZE), model)
    found = run(model, lambda first: data.pool_loader(ids, first), directions=[dict(u.exact) if wide else u.held])
    rows = torch.tensor([found.rows[0][i] for i in ids], dtype=torch.float64)
    return Scores(rows, {name: u.exact[name] * total for name, total in found.sums.items()})


def autograd_pass(model: PreTrainedModel, batches: Batches, directions: Sequence[Direction] = ()) -> GradientPass:
    """What `gradient_pass` gives, from autograd over one example at a time, with all sums in float64."""
    named = dict(model.named_parameters())
    found = GradientPass({name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()})
    found.rows = [ExampleValues() for _ in directions]
    for alone in (one_example(batch, k) for batch in batches(0) for k in range(len(batch["example_id"]))):
        loss = example_losses(model, alone).sum()
        gradient = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        found.counted += 1
        for name, total in found.sums.items():
            total += gradient[name]
        for rows, u in zip(found.rows, directions, strict=True):
            row = sum(float((gradient[name].double() * u[name]).sum()) for name in named)
            rows.add([int(alone["example_id"])], [row])
    return found


def autocast_pass(*arguments: Any, **options: Any) -> GradientPass:
    """`gradient_pass` under bfloat16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return gradient_pass(*arguments, **options)


WAYS: dict[str, tuple[Dtype, Pass]] = {
    "float64": ("float64", gradient_pass),
    "float32": ("float32", gradient_pass),
    "bfloat16": ("bfloat16", gradient_pass),
    "float32, bfloat16 autocast": ("float32", autocast_pass),
    "float32 autograd": ("float32", autograd_pass),
    "bfloat16 autograd": ("bfloat16", autograd_pass),
}


@dataclass(frozen=True)
class Agreement:
    """How near two pairs of score vectors are.

    Attributes:
        spearman: Rank correlation of the example scores.
        pearson: Correlation of the example scores.
        overlap: Share of the tenth of the weights with the largest |φ_j| that is the same.
        example_error: Σ_i |difference| of the example scores, relative to Σ_i |φ_i|.
        weight_error: Σ_j |difference| of the weights' scores, relative to Σ_j |φ_j|.
    """

    spearman: float
    pearson: float
    overlap: float
    example_error: float
    weight_error: float


def agreement(found: Scores, reference: Scores) -> Agreement:
    """How near these scores are to a reference."""
    count = sum(score.numel() for score in reference.weights.values()) // 10
    masks = [GlobalTopK().allocate({n: s.float() for n, s in s.weights.items()}, count) for s in (found, reference)]
    pairs = [(found.weights[name], reference.weights[name]) for name in reference.weights]
    return Agreement(
        spearman=float(spearman_corrcoef(found.examples, reference.examples)),
        pearson=float(torch.corrcoef(torch.stack([found.examples, reference.examples]))[0, 1]),
        overlap=sum(int((masks[0][name] & masks[1][name]).sum()) for name in masks[0]) / count,
        example_error=relative_error([(found.examples, reference.examples)]),
        weight_error=relative_error(pairs),
    )


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Σ|x - y| / Σ|y| of two vectors, given in parts."""
    parts = [(float((x.double() - y).abs().sum()), float(y.double().abs().sum())) for x, y in pairs]
    return sum(difference for difference, _ in parts) / sum(size for _, size in parts)


def rounding(checkpoint: Checkpoint, data: InstructionDataModule, ids: list[int]) -> Agreement:
    """What a direction in bfloat16 costs the scores of a bfloat16 model, against one in float32."""
    model = checkpoint.model("bfloat16")
    held, wide = (score(model, checkpoint.moments, data, ids, gradient_pass, wide) for wide in (False, True))
    return agreement(held, wide)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=192)
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    data = embedded_data()
    ids = draw(data, options.examples)
    print(f"{len(ids)} examples of the embedded pool, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| direction | numbers | Spearman | Pearson | overlap of masks | example error | weight error |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    checkpoints = {"SGD": shipped(), "Adam": warmed_up(data)}
    for name, checkpoint in checkpoints.items():
        reference = score(checkpoint.model("float64"), checkpoint.moments, data, ids, autograd_pass)
        for way, (dtype, run) in WAYS.items():
            found = agreement(score(checkpoint.model(dtype), checkpoint.moments, data, ids, run), reference)
            print(
                f"| {name} | {way} | {found.spearman:.5f} | {found.pearson:.6f} | {found.overlap:.4f} "
                f"| {found.example_error:.1e} | {found.weight_error:.1e} |",
                flush=True,
            )
    print("\n| direction in bfloat16 against float32 | examples | Spearman | Pearson | example error |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name, checkpoint in checkpoints.items():
        short = draw(data, options.examples, SHORT)
        for which, chosen in (("of all lengths", ids), (f"of at most {SHORT} tokens", short)):
            found = rounding(checkpoint, data, chosen)
            print(
                f"| {name} | {len(chosen)} {which} | {found.spearman:.5f} | {found.pearson:.6f} "
                f"| {found.example_error:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
