"""Copies of a model, each sharded over its ranks (hybrid sharding): what they find together is one process's."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import Strategy
from torch import distributed

from dualsft.errors import UserError
from dualsft.runs.phase_store import PhaseStore
from dualsft.runs.state_file import damage_of
from dualsft.selection import load_selection
from dualsft.sharding.collectives import all_gather, barrier
from dualsft.sharding.groups import form_groups, rank, replica, replicate_group, shard_group
from dualsft.sharding.strategy import FSDP2, checked_shard_size
from tests.sharding.test_compact import assert_close, loaded, mask_of, trained
from tests.sharding.test_fit import CASES, MORE_CASES
from tests.sharding.test_passes import all_cases, passes_alone
from tests.sharding.test_passes import assert_same as assert_same_pass
from tests.sharding.test_replicas import EXACT, OFTEN, SMALL, Unbroken, kept, replicas
from tests.sharding.test_select import OTHERS, PLAIN, WARM, assert_same, select_all
from tests.world.data import sums
from tests.world.fits import all_fitted, assert_same_fit
from tests.world.jobs import SGD, Inputs, contents, make_workspace, select, write_inputs
from tests.world.ranks import run_on_ranks

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
]

PAIRS = partial(FSDP2, shard_size=2)


def groups() -> tuple[list[int], list[int], int, list[list[int]], list[float]]:
    """This rank's groups and replica, what its shards have told each other, and sums over replicas."""
    form_groups(2)
    total = torch.tensor([10.0 ** rank()])
    distributed.all_reduce(total, group=replicate_group().handle)
    told = all_gather([rank()], shard_group())
    return [*shard_group().ranks], [*replicate_group().ranks], replica(), told, total.tolist()


def test_groups() -> None:
    """Consecutive ranks hold a copy, and those as far apart as a copy is large the same shard."""
    assert run_on_ranks(4, groups) == [
        ([0, 1], [0, 2], 0, [[0], [1]], [101.0]),
        ([0, 1], [1, 3], 0, [[0], [1]], [1010.0]),
        ([2, 3], [0, 2], 1, [[2], [3]], [101.0]),
        ([2, 3], [1, 3], 1, [[2], [3]], [1010.0]),
    ]


def between_copies(inputs: Inputs, folder: Path, batch_tokens: int) -> list[tuple[str, int]]:
    """A selection on two copies: each collective that leaves one, with how many floating-point numbers it is about."""
    calls: list[tuple[str, int]] = []

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(distributed, name)

        def counted(*args: Any, **options: Any) -> Any:
            group = options.get("group", args[2] if len(args) > 2 else None)
            if group is not shard_group().handle:
                tensors = [of for of in args if isinstance(of, torch.Tensor)]
                calls.append((name, sum(of.numel() for of in tensors if of.is_floating_point())))
            return function(*args, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "barrier"):
            patch.setattr(distributed, name, counting(name))
        select_all(inputs, folder, {"selection": SGD}, 4, {"batch_tokens": batch_tokens}, PAIRS)
    return calls


def test_a_batch_takes_no_communication_between_copies(tmp_path: Path) -> None:
    """As many collectives for few batches as for many; each pass adds up the sums of each shard once."""
    rows = sums(24)
    inputs = write_inputs(tmp_path, rows, rows[-6:])
    few = run_on_ranks(4, between_copies, inputs, tmp_path / "few", 1000)
    many = run_on_ranks(4, between_copies, inputs, tmp_path / "many", 40)
    assert few == many
    size = load_selection(tmp_path / "few" / "selection").manifest["model"]["num_parameters"]
    added_up = [sum(n for name, n in calls if name == "all_reduce") for calls in many]
    assert sum(added_up) == 2 * 2 * size  # two copies, two passes: for the validation gradient, and over the pool


def after_damage(folder: Path, shard_size: int) -> list[Any]:
    """Which of three states are left after the second was damaged, and how many files this rank has looked at.

    There is another complete state of the second, as a kill leaves one before the older is deleted.
    """
    form_groups(shard_size)
    kept = PhaseStore(folder)
    for phase in ("first", "second", "third"):
        kept.save(phase, {"sum:w": torch.ones(3)}, {})
    looked = 0
    with pytest.MonkeyPatch.context() as patch:

        def damage(path: Path) -> str | None:
            nonlocal looked
            looked += 1
            return damage_of(path)

        patch.setattr("dualsft.runs.phase_store.damage_of", damage)
        if rank() == 0:
            for part in folder.glob("second@1.*"):
                part.with_name(part.name.replace("@1", "@2")).write_bytes(part.read_bytes())
            damaged = folder / f"second@1.rank-1-of-{shard_size}.safetensors"
            damaged.write_bytes(damaged.read_bytes()[:-1])
        barrier()
        store = PhaseStore(folder)
        found = [store.load(phase) is not None for phase in ("third", "second", "third", "first")]
    return [found, looked > 0]


@pytest.mark.parametrize("shard_size", [2, 4])
def test_a_damaged_state_is_dropped_once(tmp_path: Path, shard_size: int) -> None:
    """With those after it; the ranks that have written the states look for damage, and all copies learn of it."""
    for k, (found, looked) in enumerate(run_on_ranks(4, after_damage, tmp_path, shard_size)):
        assert found == [True, False, False, True]
        assert looked == (k < shard_size)


def test_which_shard_sizes_there_are() -> None:
    """One that divides the ranks, and is more than one of them; by default all."""
    assert [checked_shard_size(size, 4, 8) for size in (None, "node", 2, 8)] == [8, 4, 2, 8]
    assert checked_shard_size("node", 1, 1) == 1
    for size in (3, 0, -2, 16):
        with pytest.raises(UserError, match=f"over {size} ranks, which does not divide the job's 8"):
            checked_shard_size(size, 4, 8)
    with pytest.raises(UserError, match="over a single rank"):
        checked_shard_size("node", 1, 8)


def in_pairs(function: Callable[..., Any], *args: Any) -> Any:
    """A function on ranks of which each two hold a copy."""
    form_groups(2)
    return function(*args)


def test_whatever_a_pass_does_it_does_on_copies() -> None:
    """With fewer batches than ranks, and examples that are not finite, each found by the copy that has it."""
    expected = passes_alone()
    for answer in run_on_ranks(4, in_pairs, all_cases):
        for name, found in answer.items():
            assert_same_pass(found, expected[name], 1e-9)


def test_masters_of_copies_are_those_of_one_process() -> None:
    """Gradients are added up over shards and over copies; a state is the first copy's, and every copy takes it."""
    mask = mask_of(torch.float64)
    found, expected = run_on_ranks(4, in_pairs, trained, torch.float64, mask), trained(torch.float64, mask)
    for key in ("gradients", "state", "weights"):
        assert_close(found[0][key], expected[key], 1e-6)
    for of_rank in found[1:]:
        assert_close(of_rank["weights"], found[0]["weights"], 0)
    answers = run_on_ranks(4, in_pairs, loaded, expected["state"], expected["gradients"], mask)
    for found_again, key in zip(answers[0], ("state", "gradients", "weights"), strict=True):
        assert_close(found_again, dict(expected[key]), 0)


def test_selections_on_copies(tmp_path: Path) -> None:
    """Plain, warmed up, along a path, exactly in second order, by halves: the scores, choices and counts."""
    inputs = write_inputs(tmp_path)
    runs = {name: PLAIN[name] for name in ("first order", "second derivatives")}
    runs |= {name: OTHERS[name] for name in ("sources", "along the pool")} | WARM
    runs = {name: {**options, "dtype": "float64"} for name, options in runs.items()}
    run_on_ranks(4, select_all, inputs, tmp_path / "ranks", runs, 4, None, PAIRS)
    for name, options in runs.items():
        expected = select(inputs, tmp_path / "alone" / name, options)
        assert_same(load_selection(tmp_path / "ranks" / name), expected, 1e-10)


FITS = {name: CASES[name] for name in ("clipped by norm", "mean over tokens")}
FITS |= {name: MORE_CASES[name] for name in ("moving average", "on the host", "prior, all weights")}


def test_fits_on_copies(tmp_path: Path) -> None:
    """The losses of all batches, the weights and the metrics."""
    workspace = make_workspace(tmp_path)
    cases = {name: replace(case, ranks=PAIRS) for name, case in FITS.items()}
    expected = all_fitted(workspace, tmp_path / "expected", FITS)
    for found in run_on_ranks(4, all_fitted, workspace, tmp_path / "found", cases):
        for name in FITS:
            assert_same_fit(found[name], expected[name])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """A selection on two copies that nobody has killed; it is that of one process."""
    folder, rows = tmp_path_factory.mktemp("unbroken"), sums(24)
    inputs = write_inputs(folder, rows, rows[-8:])
    states = run_on_ranks(4, kept, inputs, folder / "out", -1, -1, None, PAIRS)
    expected = select(inputs, folder / "alone", OFTEN, SMALL)
    assert_same(load_selection(folder / "out"), expected, EXACT)
    return Unbroken(inputs, folder / "out", states)


@pytest.mark.parametrize(
    ("of_rank", "share", "count", "strategy"),
    [(0, 0.3, 4, PAIRS), (3, 0.7, 4, PAIRS), (2, 0.9, 2, FSDP2), (1, 0.6, 2, replicas)],
)
def test_a_killed_run_goes_on(
    unbroken: Unbroken, tmp_path: Path, of_rank: int, share: float, count: int, strategy: Callable[[], Strategy | str]
) -> None:
    """From states that each copy has kept by itself: to the same bytes, and on other ranks to the same."""
    out, last = tmp_path / "out", round(share * unbroken.states[of_rank])
    with pytest.raises(AssertionError, match=r"rank . (died without a word|failed)"):
        run_on_ranks(4, kept, unbroken.inputs, out, of_rank, last, None, PAIRS)
    assert not (out / "manifest.json").exists()
    again = run_on_ranks(count, kept, unbroken.inputs, out, -1, -1, None, strategy)
    if count == 4:
        assert again[of_rank] < unbroken.states[of_rank]
        assert contents(out) == contents(unbroken.folder)
    assert_same(load_selection(out), load_selection(unbroken.folder), EXACT)
