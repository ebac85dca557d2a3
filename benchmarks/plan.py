"""Peaks that `dualsft plan` predicts beside peaks that are measured, for each phase, on two families of models.

    python benchmarks/plan.py                    float32 on this machine's CPU, one and two ranks, some ten minutes idle
    python benchmarks/plan.py --ranks 1 --families llama

A measured peak is that of the resident set of a process, above what it held before the model was made; of two ranks it
is the larger one's. All phases of a family run in one process, one after the other, each on two batches.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from memory import STEADY, Meter
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dualsft.data.layout import Batch
from dualsft.matrix.curvature import HessianVectorProduct, displaced, twice_differentiable
from dualsft.matrix.passes import gradient_pass
from dualsft.models.dtypes import direction_dtype
from dualsft.objectives import SelfDistillation, example_losses
from dualsft.plans.job import DataSizes, FitJob, Machine, SelectJob, Trained
from dualsft.plans.passes import Running
from dualsft.plans.phase import Phase
from dualsft.plans.scoring import plan_select
from dualsft.plans.shape import ModelShape
from dualsft.plans.training import plan_fit
from dualsft.runs.table import markdown_table
from dualsft.scorers import DiagonalFisher, FirstOrder, HessianVector
from dualsft.selection.passes import scoring_mode
from dualsft.selection.prior import Prior
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.warmup import Warmup
from dualsft.sharding.local_batch import local_rows
from dualsft.sharding.shard_model import shard_model
from dualsft.sharding.shards import local_shard
from dualsft.training.compact import CompactParameters

FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": partial(
        LlamaConfig,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=16384,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    ),
    "gpt2": partial(GPT2Config, n_embd=512, n_layer=8, n_head=8, vocab_size=16384, n_positions=512),
}
FEW: dict[str, Callable[..., Any]] = {
    "llama": partial(FAMILIES["llama"], hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=512),
    "gpt2": partial(FAMILIES["gpt2"], n_embd=64, n_layer=1, vocab_size=512),
}
ROWS, TOKENS, SHARE = 4, 128, 0.1
COLD = Warmup(fraction=0.0)
PHASES: dict[str, tuple[str, dict[str, Any]]] = {
    "first_order: gradient": ("validation gradient", {}),
    "first_order: scores": ("scores", {}),
    "prior, beside the base model": ("prior gradient", {"prior": Prior(weight=0.2), "warmup": Warmup()}),
    "diagonal_fisher: squared gradient": (
        "validation squared gradient",
        {"scorer": DiagonalFisher("empirical_fisher")},
    ),
    "diagonal_fisher: scores": ("scores", {"scorer": DiagonalFisher("empirical_fisher")}),
    "hessian_vector, exact": ("validation Hessian-vector product", {"scorer": HessianVector()}),
    "hessian_vector, finite difference": (
        "validation gradient a step",
        {"scorer": HessianVector("finite_difference")},
    ),
}
FITS = {
    "fit, dense": Trained(1.0, step="single"),
    "fit, masked": Trained(SHARE, step="single"),
    "fit, structured": Trained(SHARE, structured=True, step="single"),
}
Model = Any


def predicted(folder: Path, ranks: int, checkpointing: bool) -> dict[str, Phase]:
    """Case -> the phase as it is planned."""
    shape, data = ModelShape(folder, "float32"), DataSizes(ROWS * TOKENS, TOKENS, ROWS)
    common: dict[str, Any] = {
        "shape": shape,
        "machine": Machine("cpu", ranks),
        "data": data,
        "running": Running(checkpointing),
    }
    found = {}
    for case, (name, options) in PHASES.items():
        given = {"preconditioner": "none", "warmup": COLD, "scorer": FirstOrder(), "step_size": 1e-5, **options}
        plan = plan_select(SelectJob(**common, settings=SelectionSettings(**given)))
        found[case] = next(phase for phase in plan.phases if phase.name == name)
    for case, trained in FITS.items():
        found[case] = plan_fit(FitJob(**common, trained=trained)).phases[0]
    return found


def batches(vocabulary: int, first: int) -> Iterator[Batch]:
    """Two batches of random tokens without padding, all supervised."""
    for k in range(first, 2):
        ids = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(k))
        yield {
            "input_ids": ids,
            "labels": ids.clone(),
            "attention_mask": torch.ones_like(ids),
            "example_id": torch.arange(k * ROWS, (k + 1) * ROWS),
        }


def like(model: Model, dtype: Callable[[Tensor], torch.dtype] = direction_dtype) -> dict[str, Tensor]:
    """A small number for each weight of this rank."""
    return {n: torch.full_like(local_shard(p.detach()), 1e-6, dtype=dtype(p)) for n, p in model.named_parameters()}


def score(model: Model, checkpointing: bool, **options: Any) -> None:
    """One pass over both batches."""
    with scoring_mode(model, checkpointing):
        gradient_pass(model, partial(batches, model.config.vocab_size), **options)


def distil(model: Model, checkpointing: bool) -> None:
    """The prior's pass."""
    base = make(model.config, distributed.get_world_size() if distributed.is_initialized() else 1)
    base.requires_grad_(False)
    prior = SelfDistillation(1.0, 1.0, 2.0, "max_prob")
    score(model, checkpointing, losses=lambda m, b, layout: prior.losses(m, b, layout, base))


def multiply(model: Model, checkpointing: bool) -> None:
    """An exact product with the Hessian."""
    with twice_differentiable(model):
        derivative = HessianVectorProduct(model, like(model, lambda p: p.dtype))
        score(model, checkpointing, derivative=derivative, shards=derivative.shards)


def displace(model: Model, checkpointing: bool) -> None:
    """One of the two gradients of a finite difference."""
    with displaced(model, like(model, lambda p: p.dtype), 1e-6):
        score(model, checkpointing)


def train(model: Model, checkpointing: bool, trained: Trained) -> None:
    """Two steps of AdamW on the chosen weights."""
    from dualsft.models.loading import checkpoint_activations

    model.train()
    if checkpointing:
        checkpoint_activations(model)
    mask = None if trained.share == 1 else {n: chosen(p.shape, trained) for n, p in model.named_parameters()}
    compact = CompactParameters(model, mask)
    del mask
    optimizer = torch.optim.AdamW(compact.parameters(), lr=1e-5)
    compact.write_back_after(optimizer)
    compact.attach()
    torch_peak_begins()
    for batch in batches(model.config.vocab_size, 0):
        example_losses(model, local_rows(batch)).sum().backward()
        optimizer.step()
    compact.detach()
    if checkpointing:
        model.gradient_checkpointing_disable()
    model.requires_grad_(True)
    model.eval()


def chosen(shape: torch.Size, trained: Trained) -> Tensor:
    """A mask of the share of a tensor: its first rows, or entries at random."""
    if trained.structured:
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[: max(1, round(SHARE * shape[0]))] = True
        return mask
    return torch.rand(shape) < SHARE


def torch_peak_begins() -> None:
    """Forget the peak of what comes before: unpacking a mask on the host."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


WORK: dict[str, Callable[[Model, bool], None]] = {
    "first_order: gradient": score,
    "first_order: scores": lambda m, c: score(m, c, directions=[like(m)]),
    "prior, beside the base model": distil,
    "diagonal_fisher: squared gradient": lambda m, c: score(m, c, squared=True),
    "diagonal_fisher: scores": lambda m, c: score(m, c, directions=[like(m)], columns=False),
    "hessian_vector, exact": multiply,
    "hessian_vector, finite difference": displace,
    **{case: partial(train, trained=trained) for case, trained in FITS.items()},
}


def make(config: Any, ranks: int) -> Model:
    """A model with random weights, in shards if there are several ranks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if ranks > 1:
        shard_model(model, init_device_mesh("cpu", (ranks,)))
    return model


def measure(family: str, ranks: int, checkpointing: bool, phases: list[str]) -> dict[str, int]:
    """Case -> the peak of this process."""
    if ranks > 1:
        distributed.init_process_group("gloo")
    few = make(FEW[family](), ranks)
    for work in map(WORK.__getitem__, phases):  # loads the code that torch loads when it is first used
        work(few, checkpointing)
    del few, work
    meter = Meter("cpu")
    model = make(FAMILIES[family](), ranks)
    found = {}
    for case in phases:
        say(f"{family}, rank {os.environ['RANK']} of {ranks}: {case}")
        torch_peak_begins()
        WORK[case](model, checkpointing)
        found[case] = meter.peak()
    return found


def say(text: str) -> None:
    """Tell how far the measurement is."""
    print(text, file=sys.stderr, flush=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def measure_alone(family: str, ranks: int, checkpointing: bool, phases: list[str]) -> dict[str, int]:
    """`measure` in fresh processes: the larger rank's peaks."""
    port = str(free_port())
    command = [sys.executable, __file__, "--measure", family, "--ranks", str(ranks), "--phases", *phases]
    command += ["--checkpointing"] if checkpointing else []
    jobs = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        jobs.append(subprocess.Popen(command, env={**os.environ, **STEADY, **place}, stdout=subprocess.PIPE))
    answers = [json.loads(job.communicate()[0].splitlines()[-1]) for job in jobs]
    return {case: max(answer[case] for answer in answers) for case in phases}


def rows(family: str, ranks: int, checkpointing: bool, phases: list[str]) -> Iterator[list[str]]:
    """The lines of the table about one family on so many ranks."""
    with TemporaryDirectory() as folder:
        FAMILIES[family]().save_pretrained(folder)
        plan = predicted(Path(folder), ranks, checkpointing)
    for case, size in measure_alone(family, ranks, checkpointing, phases).items():
        ratio = plan[case].peak / size
        yield [case, family, str(ranks), f"{plan[case].peak / 2**20:,.0f}", f"{size / 2**20:,.0f}", f"{ratio:.2f}"]


def main() -> None:
    """Print the table; or, in a process of its own, the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--phases", choices=WORK, nargs="+", default=list(WORK))
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--measure", choices=FAMILIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.ranks[0], options.checkpointing, options.phases)))
        return
    found = [["phase", "model", "ranks", "planned, MiB", "measured, MiB", "ratio"]]
    for ranks in options.ranks:
        for family in options.families:
            found += rows(family, ranks, options.checkpointing, options.phases)
    print(markdown_table(found))


if __name__ == "__main__":
    main()
