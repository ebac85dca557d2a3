"""Bytes that are held, against the bytes of real tensors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dualsft.allocators import RandomWeights
from dualsft.matrix.interaction import ColumnSums
from dualsft.paths import TargetPath
from dualsft.plans import scoring
from dualsft.plans.held import Shards
from dualsft.plans.job import DataSizes, FitJob, Machine, SelectJob, Trained
from dualsft.plans.scoring import plan_select
from dualsft.plans.shape import ModelShape
from dualsft.plans.training import plan_fit
from dualsft.selection.held_direction import HeldDirection
from dualsft.selection.offload import Offload
from dualsft.selection.paths.settings import PathSettings
from dualsft.selection.prior import Prior
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.warmup import Warmup
from dualsft.training.compact import CompactParameters
from tests.cases import chunks_of
from tests.plans.cases import tiny_shape
from tests.world.models import VOCABULARY, tiny_llama


def size_of(tensors: object) -> int:
    """The bytes of some tensors."""
    return sum(t.numel() * t.itemsize for t in tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_sums_are_those_of_a_real_model(tmp_path: Path, tied: bool, dtype: str) -> None:
    """Tied weights count once, and sums are float32 at least."""
    shape = tiny_shape(tmp_path, dtype, tied=tied)
    model = tiny_llama(tied, getattr(torch, dtype))
    assert shape.count == sum(p.numel() for p in model.parameters())
    assert Shards(shape).weights == size_of(model.parameters())
    assert Shards(shape).sums == size_of(ColumnSums(model).sums.values())
    assert Shards(shape).directions == size_of(HeldDirection(dict(model.named_parameters()), model).held.values())


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_holds_its_rows_rounded_up(tmp_path: Path, ranks: int) -> None:
    """The first rank's share of each tensor is torch's first chunk of its rows."""
    shape, model = tiny_shape(tmp_path), tiny_llama()
    assert Shards(shape, ranks).weights == size_of(p.chunk(ranks)[0] for p in model.parameters())


def test_a_sharded_model_gathers_its_root_and_two_blocks(tmp_path: Path) -> None:
    """In a pass for rows and columns: weights and directions, and the gradients of a block in two types.

    Those of the root unit come when the batch's activations are gone.
    """
    model = tiny_llama(False)
    root = sum(p.numel() for n, p in model.named_parameters() if ".layers." not in n)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    shards = Shards(tiny_shape(tmp_path, tied=False), 2, sharded=True)
    assert shards.with_units(10**6, 1, gradients=True) == 10**6 + 4 * (2 * root + 4 * block + 2 * block)
    assert shards.with_units(0, 1, gradients=True) == 4 * (2 * root + max(6 * block, 2 * root))
    assert shards.with_units(7, 1, gradients=False) == 7 + 4 * (2 * root + 4 * block)
    assert Shards(shards.shape).with_units(7, 1, gradients=True) == 7


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_compact_state_is_that_of_a_real_step(shape: ModelShape, share: float) -> None:
    """Masters, indices and Adam's moments of a fit have the bytes that they have after a step."""
    model = tiny_llama()
    masks = {n: torch.zeros(p.numel(), dtype=torch.bool) for n, p in model.named_parameters()}
    for mask in masks.values():
        mask[: round(share * len(mask))] = True
    shaped = {n: masks[n].view(p.shape) for n, p in model.named_parameters()}
    compact = CompactParameters(model, None if share == 1 else shaped)
    optimizer = torch.optim.AdamW(compact.parameters())
    for master in compact.masters:
        master.grad = torch.zeros_like(master)
    optimizer.step()
    (phase,) = plan_fit(FitJob(shape, trained=Trained(share, prior=True))).phases
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert phase.held["masters"] == phase.held["gradients"] == size_of(compact.masters)
    assert phase.held["optimizer"] == size_of(moments)
    assert phase.held["base values"] == size_of(compact.stored())
    assert phase.held.get("indices", 0) == size_of(compact.buffers())


def test_shards_of_all_changes_come_together_on_rank_zero(shape: ModelShape) -> None:
    """Beside its own, which a single process does without; gradients are gone by then."""
    data = DataSizes(8, 4, 2)
    plans = [plan_fit(FitJob(shape, Machine("cuda", ranks), data)) for ranks in (1, 2)]
    assert [[phase.name for phase in plan.phases] for plan in plans] == [["training"], ["training", "export"]]
    training, export = plans[1].phases
    assert export.host == {"changes": round(1.5 * shape.count * (8 + 4))}
    assert export.held == {name: training.held[name] for name in ("weights", "masters", "optimizer")}


def test_a_replica_holds_what_a_single_process_does(shape: ModelShape) -> None:
    """Of everything but the scores that it chooses by; its part of a training batch is smaller."""
    data = DataSizes(8, 4, 2)
    one, eight = (SelectJob(shape, Machine("cuda", ranks, replicas=ranks), data) for ranks in (1, 8))
    for alone, replica in zip(plan_select(one).phases, plan_select(eight).phases, strict=True):
        assert replica.held == alone.held
        assert replica.host == alone.host or alone.name == "choice"
        assert replica.batch <= alone.batch
    assert replica.disk == alone.disk
    assert plan_select(eight).phases[-2].disk["sums of each replica"] == 8 * 4 * shape.count
    assert replica.host["mask"] == alone.host["mask"]  # of tensors that all have a single block
    random = replace(eight, settings=SelectionSettings(parameter_allocator=RandomWeights()))
    assert plan_select(random).phases[-1].host["mask"] == alone.host["mask"]
    assert SelectJob(shape, Machine("cuda", 8), data).shards.weights < eight.shards.weights == one.shards.weights
    hybrid, four = (SelectJob(shape, Machine("cuda", *ranks), data) for ranks in ((8, False, None, 2), (4,)))
    assert hybrid.shards == four.shards


@pytest.mark.parametrize(
    ("offload", "share", "on_host"),
    [("auto", 23, True), ("auto", 24, False), ("always", 99, True), ("never", 1, False)],
)
def test_a_warm_up_on_the_host_leaves_the_weights_on_the_card(
    shape_in: Callable[[str], ModelShape], offload: Offload, share: float, on_host: bool
) -> None:
    """By the same rule as the run: 16 bytes a weight are too many for three quarters of what the weights leave free."""
    shape = shape_in("bfloat16")
    machine = Machine("cuda", memory=round(share * shape.count))
    job = SelectJob(shape, machine, DataSizes(8, 4, 2), settings=SelectionSettings(offload_optimizer=offload))
    warm_up = plan_select(job).phases[0]
    assert set(warm_up.held) == ({"weights"} if on_host else {"weights", "masters", "optimizer"})
    if on_host:
        assert sum(warm_up.host.values()) == 18 * shape.count
        assert not warm_up.step


@pytest.mark.parametrize(
    ("offload", "share", "on_host"),
    [("auto", 9.2, True), ("auto", 9.5, False), ("always", 99, True), ("never", 1, False)],
)
def test_sums_on_the_host_leave_weights_and_directions_on_the_card(
    tmp_path: Path, offload: Offload, share: float, on_host: bool
) -> None:
    """By the same rule as the run: 4 bytes a weight are too many for three quarters of what the others leave free."""
    shape = tiny_shape(tmp_path, "bfloat16")
    machine = Machine("cuda", memory=round(share * shape.count))
    job = SelectJob(shape, machine, DataSizes(8, 4, 2), settings=SelectionSettings(offload_sums=offload))
    scores = plan_select(job).phases[-2]
    assert (scores.held["weights"], scores.held["direction"]) == (2 * shape.count, 2 * shape.count)
    place = scores.host if on_host else scores.held
    assert place["accumulator"] == 4 * shape.count
    assert ("accumulator" in scores.held) != on_host
    assert ("gradients on their way" in scores.held) == on_host
    on_cpu = replace(job, machine=Machine("cpu"))
    assert "accumulator" in plan_select(on_cpu).phases[-2].held


def test_a_prior_keeps_the_logits_of_a_large_batch_on_the_host(tmp_path: Path) -> None:
    """Of selections and fits, on a GPU alone; there a batch takes that much less."""
    shape, sizes = tiny_shape(tmp_path), DataSizes(32, 8, 4)
    settings = SelectionSettings(prior=Prior(weight=0.5))
    with chunks_of(14):
        phases = {
            device: [
                scoring._prior(SelectJob(shape, Machine(device), sizes, settings=settings)),
                plan_fit(FitJob(shape, Machine(device), sizes, trained=Trained(share=0.5, prior=True))).phases[0],
            ]
            for device in ("cpu", "cuda")
        }
    size = 4 * 7 * VOCABULARY * 4  # examples, supervised tokens of each, bytes of a float32
    for here, there in zip(phases["cpu"], phases["cuda"], strict=True):
        assert there.host["base model's logits"] == size
        assert "base model's logits" not in here.host
        assert here.batch - there.batch > size / 2


def test_directions_stay_through_the_choice_where_sides_take_turns(shape: ModelShape) -> None:
    """One for each validation set, on the device, while weights are ranked on the host; else the weights alone."""
    settings = SelectionSettings(order="parameters_then_data")
    job = SelectJob(shape, Machine("cuda"), DataSizes(8, 4, 2, sets=2), settings=settings)
    choice = plan_select(job).phases[-1]
    assert choice.held == {"weights": job.shards.weights, "2 directions": 2 * job.shards.directions}
    once = plan_select(replace(job, settings=SelectionSettings())).phases[-1]
    assert once.held == {"weights": job.shards.weights}


def test_a_path_has_a_training_two_ends_and_points(shape: ModelShape) -> None:
    """Each phase over the tokens that it takes, with the points' weights in files and the sums beside each point's."""
    path = PathSettings(along=TargetPath(), pieces=4, most_pieces=8, epochs=2, held_out=0.5)
    sizes = DataSizes(8, 4, 2, pool_tokens=1000.0, validation_tokens=100.0)
    warm = Warmup(fraction=0.0)
    job = SelectJob(shape, Machine("cpu"), sizes, settings=SelectionSettings(path=path, warmup=warm))
    plan = {phase.name: phase for phase in plan_select(job).phases}
    assert {name: phase.tokens for name, phase in plan.items()} == {
        "path": 100.0,
        "held-out loss": 250.0,
        "pool loss": 2000.0,
        "validation loss": 200.0,
        "validation": 900.0,
        "choice": None,
    }
    weights, sums = job.shards.weights, job.shards.sums
    assert plan["path"].disk == {"points of the path": 5 * weights, "state under way": 3 * sums}
    assert plan["pool loss"].disk == {"points of the path": 5 * weights}
    assert plan["choice"].disk == {"scores": sums, "mask.safetensors": -(-job.shape.count // 8)}
    assert plan["pool loss"].held == {"weights": weights}
    assert plan["validation"].held["sums of earlier points"] == plan["validation"].held["direction"] == sums
    assert plan["validation"].step == 2 * sums
