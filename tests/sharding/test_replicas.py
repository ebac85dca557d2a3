"""A selection by replicas of the model, each with its own examples, is the one that a single process makes."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import Strategy
from torch import distributed, nn

from dualsft.data.layout import Batch
from dualsft.data.loaders import RowLists
from dualsft.matrix.passes import gradient_pass
from dualsft.runs.phase_store import PhaseStore
from dualsft.selection import Warmup, load_selection
from dualsft.sharding.groups import form_groups, rank, rank_slice
from dualsft.training.compact import CompactParameters
from tests.cases import given, make, random_direction
from tests.sharding.test_passes import CASES, passes_alone
from tests.sharding.test_passes import assert_same as assert_same_pass
from tests.sharding.test_select import OTHERS, PLAIN, WALK, WARM, Runs, assert_same, select_all
from tests.world.data import sums
from tests.world.faults import SHORTAGES, Shortage, poisoned_by
from tests.world.jobs import SGD, Inputs, contents, select, trainer, write_inputs
from tests.world.ranks import run_on_ranks

pytestmark = pytest.mark.heavy

EXACT = 1e-12
"""Share of the largest score: what another order of addition changes in float64."""
IN_FLOAT64: dict[str, Any] = {**SGD, "dtype": "float64"}
WARMED: dict[str, Any] = {"dtype": "float64", "warmup": Warmup(fraction=0.5, epochs=2, learning_rate=1e-3)}


def replicas() -> str:
    """The strategy by its name."""
    return "ddp"


def in_float64(runs: Runs) -> Runs:
    """The same selections, computed in float64."""
    return {name: {**options, "dtype": "float64"} for name, options in runs.items()}


def check(folder: Path, runs: Runs, count: int, data: dict[str, Any] | None = None) -> None:
    """Select on replicas and on one process, and compare."""
    inputs = write_inputs(folder)
    if data and "validation" in data:
        data = {**data, "validation": {"a": inputs.validation, "b": inputs.train}}
    run_on_ranks(count, select_all, inputs, folder / "ranks", runs, count, data, replicas)
    for name, options in runs.items():
        expected = select(inputs, folder / "alone" / name, options, data)
        assert_same(load_selection(folder / "ranks" / name), expected, EXACT)


def test_plain_selections_on_three_ranks(tmp_path: Path) -> None:
    """Every scorer, a prior, re-scored orders, and scores by token."""
    check(tmp_path, in_float64(PLAIN), 3)


def test_whatever_is_chosen_by_is_chosen_on_two_ranks(tmp_path: Path) -> None:
    """A stranger's scorer, several validation sets, halves of them, paths, packed and recomputed.

    Allocators are called by rank zero with the scores, as on shards.
    """
    runs = {name: OTHERS[name] for name in ("whole rows", "sources", "along the target", "along the pool")}
    check(tmp_path, in_float64(runs), 2, {"packing": True, "validation": None})


def test_a_warmed_up_selection_on_two_ranks(tmp_path: Path) -> None:
    """The warm-up's batches are shared out; its second moment, a teacher beside the model, and what it has kept."""
    check(tmp_path, in_float64(WARM), 2)
    kept = {"again": {"warmup": Warmup(checkpoint=str(tmp_path / "ranks" / "adam" / "warmup")), "dtype": "float64"}}
    inputs = write_inputs(tmp_path)
    run_on_ranks(2, select_all, inputs, tmp_path / "ranks", kept, 2, None, replicas)
    assert_same(load_selection(tmp_path / "ranks" / "again"), load_selection(tmp_path / "alone" / "adam"), EXACT)


def test_a_single_rank_is_a_single_process(tmp_path: Path) -> None:
    """Under the strategy too."""
    check(tmp_path, {"first order": PLAIN["first order"]}, 1)


def passed() -> dict[str, Any]:
    """Passes of each replica over batches of its own."""
    form_groups(1)
    found = {}
    for name, (batches, seeds, options) in CASES.items():
        us = [random_direction(make("llama"), seed) for seed in seeds]
        own: list[Batch] = batches[rank_slice()]
        found[name] = gradient_pass(make("llama"), given(own), directions=us, **options)
    return found


def test_whatever_a_pass_does_replicas_do() -> None:
    """Kinds of passes and of statistics, with fewer batches than ranks, and examples that are not finite."""
    expected = passes_alone()
    for answer in run_on_ranks(2, passed):
        for name, found in answer.items():
            assert_same_pass(found, expected[name], 1e-9)


def gradients_of_two() -> tuple[list[torch.Tensor | None], dict[int, torch.Tensor]]:
    """Gradients, and pending ones, of three layers: the second is used by rank one alone, the third by none."""
    form_groups(1)
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in range(3))
    compact = CompactParameters(layers)
    compact.attach()
    for _ in range(2):
        torch.stack(
            [layers[k](torch.ones(3, dtype=torch.float64) + rank()).sum() for k in range(rank() + 1)]
        ).sum().backward()
    pending = compact.pending_gradients()
    compact.add_up_gradients()
    return [master.grad for master in compact.masters], pending


def test_gradients_are_added_up_wherever_one_has_any() -> None:
    """Those that a rank lacks count as zero, and what no rank has stays away; a checkpoint would hold the same sums."""
    for gradients, pending in run_on_ranks(2, gradients_of_two):
        assert [None if of is None else of.unique().tolist() for of in gradients] == [[6.0], [4.0], None]
        assert {k: of.unique().tolist() for k, of in pending.items()} == {0: [6.0], 1: [4.0]}


def watched(inputs: Inputs, folder: Path, batch_tokens: int) -> tuple[list[tuple[str, int]], list[list[int]]]:
    """A selection on replicas: each collective with its floating-point entries, and the ids of each batch."""
    calls: list[tuple[str, int]] = []
    read: list[list[int]] = []
    getitem = RowLists.__getitem__

    def reading(self: RowLists, ids: list[int]) -> Any:
        read.append(ids)
        return getitem(self, ids)

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(distributed, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [of for of in args if isinstance(of, torch.Tensor)]
            calls.append((name, sum(of.numel() for of in tensors if of.is_floating_point())))
            return function(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowLists, "__getitem__", reading)
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "broadcast", "barrier"):
            patch.setattr(distributed, name, counting(name))
        select_all(inputs, folder, {"selection": IN_FLOAT64}, 2, {"batch_tokens": batch_tokens}, replicas)
    return calls, read


def test_a_batch_takes_no_communication_and_is_read_by_one_rank(tmp_path: Path) -> None:
    """As many collectives for few batches as for many; in each pass all sums are added up once, and all rows read."""
    rows = sums(24)
    inputs = write_inputs(tmp_path, rows, rows[-6:])
    few = run_on_ranks(2, watched, inputs, tmp_path / "few", 1000)
    many = run_on_ranks(2, watched, inputs, tmp_path / "many", 40)
    assert all(len(read) > 4 * len(fewer) for (_, read), (_, fewer) in zip(many, few, strict=True))
    assert [calls for calls, _ in few] == [calls for calls, _ in many]
    model = load_selection(tmp_path / "few" / "selection").manifest["model"]
    for calls, _ in many:  # two passes: for the validation gradient, and over the pool
        assert sum(size for name, size in calls if name == "all_reduce") == 2 * model["num_parameters"]
    read = sorted(i for _, batches in many for ids in batches for i in ids)
    assert read == sorted([*range(24), *range(6)])


OFTEN: dict[str, Any] = {**WARMED, "save_minutes": 1e-9}
SMALL: dict[str, Any] = {"batch_tokens": 60}


def kept(
    inputs: Inputs,
    folder: Path,
    of_rank: int = -1,
    last: int = -1,
    options: dict[str, Any] | None = None,
    strategy: Callable[[], Strategy | str] = replicas,
) -> int:
    """A selection on all ranks that there are, from whatever an earlier one left; how many states this rank keeps.

    One of the ranks may die when it has kept its last state.
    """
    write, count = PhaseStore._write, 0

    def write_and_die(self: PhaseStore, *arguments: Any) -> None:
        nonlocal count
        write(self, *arguments)
        count += 1
        if (rank(), count) == (of_rank, last):
            os._exit(1)

    on_all: dict[str, Any] = {"strategy": strategy(), "devices": distributed.get_world_size()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseStore, "_write", write_and_die)
        select(inputs, folder, options or OFTEN, SMALL, ranks=on_all, resume=(folder / ".unfinished").exists())
    return count


@dataclass(frozen=True)
class Unbroken:
    """What a selection is made from, where two ranks have made it, and how many states each has kept for it."""

    inputs: Inputs
    folder: Path
    states: list[int]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """A selection that nobody has killed."""
    folder, rows = tmp_path_factory.mktemp("unbroken"), sums(30)
    inputs = write_inputs(folder, rows, rows[-8:])
    return Unbroken(inputs, folder / "out", run_on_ranks(2, kept, inputs, folder / "out"))


@pytest.mark.parametrize(
    ("of_rank", "share", "count"),
    [(0, 0.2, 2), (0, 1.0, 2), (1, 0.5, 2), (0, 0.6, 3), (1, 0.8, 1)],
)
def test_a_killed_run_goes_on(unbroken: Unbroken, tmp_path: Path, of_rank: int, share: float, count: int) -> None:
    """From states that each rank has kept by itself: to the same bytes, and on other numbers of ranks to the same.

    A state is kept before every batch; rank zero's others are those of the warm-up's steps and of finished phases.
    """
    last = round(share * unbroken.states[of_rank])
    with pytest.raises(AssertionError, match=r"rank . (died without a word|failed)"):
        run_on_ranks(2, kept, unbroken.inputs, tmp_path / "out", of_rank, last)
    assert not (tmp_path / "out" / "manifest.json").exists()
    if count == 1:
        select(unbroken.inputs, tmp_path / "out", OFTEN, SMALL, resume=True)
    else:
        again = run_on_ranks(count, kept, unbroken.inputs, tmp_path / "out")
        assert again[of_rank] < unbroken.states[of_rank]
    if count == 2:
        assert contents(tmp_path / "out") == contents(unbroken.folder)
    else:
        assert_same(load_selection(tmp_path / "out"), load_selection(unbroken.folder), EXACT)


ALONG = {**IN_FLOAT64, "path": replace(WALK, columns="product"), "token_scores": True, "save_minutes": 1e-9}


def test_a_killed_path_goes_on(tmp_path: Path) -> None:
    """Its points and the sums over them are rank zero's states, which all read; it is killed twice, each rank once."""
    rows = sums(14)
    inputs = write_inputs(tmp_path, rows, rows[-6:])
    states = run_on_ranks(2, kept, inputs, tmp_path / "unbroken", -1, -1, ALONG)
    for of_rank in (0, 1):
        with pytest.raises(AssertionError, match=r"rank . (died without a word|failed)"):
            run_on_ranks(2, kept, inputs, tmp_path / "out", of_rank, round(0.4 * states[of_rank]), ALONG)
    run_on_ranks(2, kept, inputs, tmp_path / "out", -1, -1, ALONG)
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def short_of_memory(inputs: Inputs, folder: Path, times: tuple[int, ...], backward: bool) -> int:
    """A selection in which rank 1 runs out of memory when its model runs for one of these times; how often it ran."""
    trap = Shortage(SHORTAGES["accelerator"], *(times if rank() == 1 else ()), backward=backward)
    on_two: dict[str, Any] = {"strategy": "ddp", "devices": 2}
    module = trap.module()(inputs.model, **WARMED)
    trainer(**on_two).select(module, inputs.data(batch_size=8), str(folder))
    return trap.runs


@pytest.mark.parametrize("backward", [False, True])
def test_a_rank_that_is_out_of_memory_halves_its_batches(tmp_path: Path, backward: bool) -> None:
    """Alone, in the warm-up and in the passes; the others wait, and the scores are the same."""
    inputs = write_inputs(tmp_path)
    expected = select(inputs, tmp_path / "alone", WARMED, {"batch_size": 8})
    steps = run_on_ranks(2, short_of_memory, inputs, tmp_path / "enough", (), False)[1]
    alone = {} if backward else {"warm-up": (1,), "scores": (steps - 1,)}
    for name, times in {**alone, "both": (2, steps)}.items():
        run_on_ranks(2, short_of_memory, inputs, tmp_path / name, times, backward)
        found = load_selection(tmp_path / name)
        assert_same(found, expected, EXACT)
        assert found.manifest["scoring_batch_tokens"] == (100 if name == "warm-up" else 50)


POISONED: dict[str, Any] = {**WARMED, "warmup": Warmup(fraction=1.0, epochs=2, learning_rate=1e-3)}


def poisoned(inputs: Inputs, folder: Path, **ranks: Any) -> None:
    """A selection whose model is not finite on some texts of the warm-up and of the pool."""
    module = poisoned_by(gradient="4", loss="P")(inputs.model, **POISONED)
    trainer(**ranks).select(module, inputs.data(batch_size=4), str(folder))


def poisoned_on_ranks(inputs: Inputs, folder: Path) -> None:
    """The same on replicas."""
    poisoned(inputs, folder, strategy="ddp", devices=2)


def test_examples_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    """Of the warm-up's steps and of the passes, whichever rank has them."""
    inputs = write_inputs(tmp_path)
    poisoned(inputs, tmp_path / "alone")
    run_on_ranks(2, poisoned_on_ranks, inputs, tmp_path / "ranks")
    found = load_selection(tmp_path / "ranks")
    assert "nonfinite" in found.examples["status"].to_pylist()
    assert_same(found, load_selection(tmp_path / "alone"), EXACT)
