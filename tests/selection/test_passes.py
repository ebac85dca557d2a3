"""When memory runs out a pass begins again with half batches, once in a run, and nothing else changes."""

import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dualsft import SelectionModule
from dualsft.errors import UserError
from dualsft.matrix import module_call, spot_check, tap
from dualsft.runs.phase_keeper import PhaseKeeper
from dualsft.runs.phase_store import PhaseStore
from dualsft.selection import Selection, passes
from tests.references import assert_same_gradients
from tests.selection.test_keeping import ALWAYS, resumed_until_done
from tests.world.data import OK
from tests.world.faults import SHORTAGES, PoolAware, Shortage, kill_at, killed_run
from tests.world.jobs import ADAM, SGD, Inputs, contents, select

TWICE: dict[str, Any] = {**SGD, "scorer": PoolAware()}


@pytest.fixture(scope="module")
def plain(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Selection]:
    """What runs with enough memory find, by scorer."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: select(inputs, folder / name, options) for name, options in (("one", SGD), ("two", TWICE))}


def assert_same_scores(found: Selection, expected: Selection) -> None:
    """Equal up to rounding, on both sides."""
    ours, theirs = (selection.examples["score"].to_pylist() for selection in (found, expected))
    size = max(abs(theirs[i]) for i in OK)
    assert [ours[i] for i in OK] == pytest.approx([theirs[i] for i in OK], rel=1e-4, abs=1e-5 * size)
    assert_same_gradients(found.parameter_scores(), expected.parameter_scores(), 1e-5)


def left_on(model: PreTrainedModel) -> list[str]:
    """What a pass must not leave behind."""
    hooks = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks"]
    found = [
        name for name, module in model.named_modules() if module.training or any(getattr(module, h) for h in hooks)
    ]
    for name, p in model.named_parameters():
        if p.grad is not None or not p.requires_grad or p._post_accumulate_grad_hooks:
            found.append(name)
    return found


@pytest.fixture
def found_at_start(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What lies on the model as each attempt at a pass begins."""
    found: list[list[str]] = []
    original = passes.gradient_pass

    def looking(model: PreTrainedModel, *rest: Any, **options: Any) -> Any:
        found.append(left_on(model))
        return original(model, *rest, **options)

    monkeypatch.setattr(passes, "gradient_pass", looking)
    return found


# the model's runs: validation 1; one pass: a look at the weights' uses 2, a batch 3, its spot check 4 and 5, more
# batches 6 and 7; two passes: batches 2 to 4, then a look 5, a batch 6, its spot check 7 and 8, and more batches
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scorer", "run", "backward"),
    [("one", 1, True), ("one", 3, False), ("one", 4, False), ("one", 6, True), ("two", 4, True), ("two", 8, False)],
)
def test_a_shortage_halves_the_batches(
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    plain: dict[str, Selection],
    found_at_start: list[list[str]],
    scorer: str,
    run: int,
    backward: bool,
) -> None:
    """Wherever it happens, the scores are those of a run with enough memory, and one line tells what was done."""
    trap = Shortage(SHORTAGES["accelerator"], run, backward=backward)
    monkeypatch.setattr("tests.world.jobs.SelectionModule", trap.module())
    found = select(inputs, tmp_path, {"one": SGD, "two": TWICE}[scorer])
    assert_same_scores(found, plain[scorer])
    assert found.manifest["scoring_batch_tokens"] == 50
    assert plain[scorer].manifest["scoring_batch_tokens"] == 100
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dualsft: memory")]
    name = {1: "validation gradient"}.get(run, "pool gradient" if scorer == "two" and run < 5 else "scores")
    assert told == [
        f"dualsft: memory ran out in the {name} (at a request for 2.00 GiB); it starts again with batches of 50 "
        "tokens, not 100."
    ]
    trapped = ["model.layers.1.mlp"]
    assert found_at_start == [trapped] * len(found_at_start)


@pytest.mark.parametrize(
    ("place", "name", "call", "kind"),
    [
        (module_call, "jvp", 2, "accelerator"),
        (module_call, "functional_call", 2, "accelerator"),
        (tap.F, "embedding", 6, "host"),  # after the two looks at padding
        (spot_check, "check_covered", 2, "python"),
    ],
)
def test_a_shortage_is_known_wherever_it_is_met(
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plain: dict[str, Selection],
    found_at_start: list[list[str]],
    place: Any,
    name: str,
    call: int,
    kind: str,
) -> None:
    """In a tap, which runs inside autograd's own backward, or in the check beside it; however it is said."""
    calls = kill_at(monkeypatch, place, name, call, error=SHORTAGES[kind])
    found = select(inputs, tmp_path, SGD)
    assert len(calls) > call
    assert_same_scores(found, plain["one"])
    assert found.manifest["scoring_batch_tokens"] == 50
    assert found_at_start == [[]] * 3


def test_a_gradient_left_half_done_is_dropped(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: dict[str, Selection]
) -> None:
    """If memory runs out in a check, with a weight's gradient just complete, the next attempt begins without it."""
    completed: list[Tensor] = []

    def fail(parameter: Tensor) -> None:
        completed.append(parameter)
        if len(completed) == 5:  # one batch of the validation set, three of the pool, and the check of the scores
            raise MemoryError

    class Trapped(SelectionModule):
        def configure_model(self) -> None:
            super().configure_model()
            self.model.lm_head.weight.register_post_accumulate_grad_hook(fail)

    monkeypatch.setattr("tests.world.jobs.SelectionModule", Trapped)
    found = select(inputs, tmp_path, TWICE)
    assert [phase["name"] for phase in found.manifest["phases"]][2] == "scores"
    assert len(completed) == 6
    assert_same_scores(found, plain["two"])


@pytest.mark.usefixtures("plain")  # torch compiles what forward-mode derivatives take when they are first asked for
def test_the_failed_attempt_is_out_of_memory_before_the_next(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its activations nor its sums wait for the garbage collector."""
    alive: list[weakref.ref[Tensor]] = []
    left: list[int] = []
    trap = Shortage(SHORTAGES["host"], 5, backward=True)

    class Watched(trap.module()):  # type: ignore[misc]
        def configure_model(self) -> None:
            super().configure_model()
            self.model.lm_head.register_forward_hook(lambda _, args, output: alive.append(weakref.ref(output)))

    original = passes.gradient_pass

    def looking(*rest: Any, **options: Any) -> Any:
        left.append(sum(reference() is not None for reference in alive))
        return original(*rest, **options)

    monkeypatch.setattr("tests.world.jobs.SelectionModule", Watched)
    monkeypatch.setattr(passes, "gradient_pass", looking)
    totals = torch.zeros

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        made = totals(*args, **kwargs)
        alive.append(weakref.ref(made))
        return made

    with monkeypatch.context() as patch:
        patch.setattr("dualsft.matrix.interaction.torch.zeros", noted)
        gc.disable()
        try:
            select(inputs, tmp_path, {**SGD, "token_scores": True})
        finally:
            gc.enable()
    assert left == [0, 0, 0]
    assert len(alive) > 40


@pytest.mark.parametrize("kind", ["accelerator", "host"])
def test_after_a_shortage_of_the_device_sums_are_held_on_the_host(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: dict[str, Selection], kind: str
) -> None:
    """In the attempt that follows; the scores are the same. They are not where the host itself is short."""
    original, places, trap = passes.gradient_pass, [], Shortage(SHORTAGES[kind], 3)

    def noted(*rest: Any, **options: Any) -> Any:
        places.append(options["sums_on_host"])
        return original(*rest, **options)

    monkeypatch.setattr("tests.world.jobs.SelectionModule", trap.module())
    monkeypatch.setattr(passes, "gradient_pass", noted)
    monkeypatch.setattr(passes, "offloads_sums", lambda *_, is_short: is_short)
    found = select(inputs, tmp_path, SGD)
    assert places == [False, False, kind == "accelerator"]
    assert_same_scores(found, plain["one"])


def test_a_second_shortage_stops_the_run(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same pass or a later one; with the advice that is given, the run can be finished."""
    for name, times in (("a", (2, 3)), ("b", (1, 4))):
        trap = Shortage(SHORTAGES["accelerator"], *times)
        with monkeypatch.context() as patch:
            patch.setattr("tests.world.jobs.SelectionModule", trap.module())
            with pytest.raises(
                UserError,
                match=r"in the scores \(at a request for 2.00 GiB\) with batches of 50 tokens, halved already; set "
                r"model\.gradient_checkpointing and go on with --resume, or start anew \(--overwrite\) with a lower",
            ):
                select(inputs, tmp_path / name, SGD)
        found = select(inputs, tmp_path / name, {**SGD, "gradient_checkpointing": True}, resume=True)
        assert found.manifest["scoring_batch_tokens"] == 50


@pytest.mark.parametrize("run", [1, 3])
def test_a_shortage_where_half_is_too_small_stops_at_once(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int
) -> None:
    """If the longest example of all does not fit into half a batch there is nothing to try."""
    trap = Shortage(SHORTAGES["host"], run)
    monkeypatch.setattr("tests.world.jobs.SelectionModule", trap.module())
    longest = max(len(ids) for which in ("train", "validation") for ids, _ in inputs.examples(which).values())
    told = f"with batches of {2 * longest - 1} tokens, and the longest example has {longest}, more than half; set model"
    with pytest.raises(UserError, match=told):
        select(inputs, tmp_path / "out", SGD, data={"batch_tokens": 2 * longest - 1})
    assert trap.runs == run
    assert (tmp_path / "out").exists() is (run > 2)  # the folder is free again, unless it keeps a finished pass


def test_other_errors_are_not_taken_for_a_shortage(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end the run as they are."""
    trap = Shortage(RuntimeError("CUDA error: device-side assert triggered"), 2)
    monkeypatch.setattr("tests.world.jobs.SelectionModule", trap.module())
    with pytest.raises(RuntimeError, match="device-side assert"):
        select(inputs, tmp_path, SGD)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "run"), [(SGD, 5), (ADAM, 2), (TWICE, 5)], ids=["one pass", "warm-up", "two passes"]
)
def test_halves_are_kept_to_after_a_kill(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], run: int
) -> None:
    """Killed at every other batch, before and after memory ran out, a run ends in the bytes of the unbroken one."""
    found = []
    for kill in (False, True):
        trap = Shortage(SHORTAGES["host"], run)  # counts the runs of the model over all parts of the run
        monkeypatch.setattr("tests.world.jobs.SelectionModule", trap.module())
        folder = tmp_path / str(kill)
        if kill:
            place, calls = "as soon as the state is kept", itertools.repeat(3)
            assert resumed_until_done(inputs, folder, {**options, **ALWAYS}, place, calls, seed=1) > 1
        else:
            select(inputs, folder, options, seed=1)
        assert trap.runs > run
        found.append(contents(folder))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("place", "batch_tokens"),
    [
        ((PhaseKeeper, "begin_again", 1, False), 100),
        ((PhaseKeeper, "begin_again", 1, True), 100),
        ((passes, "gradient_pass", 3, False), 50),
    ],
)
def test_a_kill_while_the_batches_are_halved(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, batch_tokens: int
) -> None:
    """The state of larger batches never meets smaller ones: the run goes on with them, or begins the pass again."""
    trap = Shortage(SHORTAGES["host"], 5)
    monkeypatch.setattr("tests.world.jobs.SelectionModule", trap.module())
    killed_run(inputs, tmp_path / "killed", {**SGD, **ALWAYS}, *place)
    found = select(inputs, tmp_path / "killed", {**SGD, **ALWAYS}, resume=True)
    assert found.manifest["scoring_batch_tokens"] == batch_tokens
    trap.runs = 0 if batch_tokens == 50 else 1000
    select(inputs, tmp_path / "unbroken", SGD)
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


def test_a_state_of_larger_batches_is_not_taken_up(inputs: Inputs, tmp_path: Path, plain: dict[str, Selection]) -> None:
    """Other ranks, or another strategy, may have halved the batches meanwhile: its number of batches means nothing."""
    killed_run(inputs, tmp_path / "killed", {**SGD, **ALWAYS}, PhaseKeeper, "save", 3, True)
    PhaseStore(tmp_path / "killed" / ".unfinished").save(passes.HALVED, {}, {"batch_tokens": 50})
    found = select(inputs, tmp_path / "killed", {**SGD, **ALWAYS}, resume=True)
    assert found.manifest["scoring_batch_tokens"] == 50
    assert_same_scores(found, plain["one"])


def test_what_a_failed_attempt_cost_is_told(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time counts in its phase, its examples do not: they are passed again."""
    trap = Shortage(SHORTAGES["host"], 5)
    monkeypatch.setattr("tests.world.jobs.SelectionModule", trap.module())
    begun: list[float] = []
    original = PhaseKeeper.begin_again

    def noting(keeper: PhaseKeeper, **about: Any) -> None:
        original(keeper, **about)
        begun.append(keeper.earlier["seconds"])

    monkeypatch.setattr(PhaseKeeper, "begin_again", noting)
    (phase,) = select(inputs, tmp_path, SGD).manifest["phases"][1:]
    assert phase["examples"] == len(OK)
    assert phase["seconds"] > begun[0] > 0
