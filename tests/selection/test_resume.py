"""A killed run goes on where it was, to the same result; nothing but a finished run passes for a selection."""

import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dualsft import load_selection
from dualsft.allocators import DataAllocator, Diverse, LayerQuota, PerSourceQuota, ScoredExamples
from dualsft.errors import UserError
from dualsft.runs.folder import RunFolder
from dualsft.selection import Warmup, passes, scoring_checkpoint
from dualsft.selection import run as method
from tests.world.faults import PoolAware, kill_at, killed_run
from tests.world.forks import FORKS
from tests.world.jobs import ADAM, SGD, Inputs, contents, select, write_inputs

OPTIONS: dict[str, Any] = {"warmup": Warmup(fraction=0.5, epochs=2, learning_rate=1e-3, keep=True)}


@pytest.fixture(scope="module")
def unbroken(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an unbroken run leaves."""
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    select(inputs, folder, OPTIONS, seed=1)
    return contents(folder)


PLACES = {
    "before the warm-up": (scoring_checkpoint, "warm_up", 1, False),
    "in the warm-up": (scoring_checkpoint, "warm_up", 1, True),
    "before the warm-up is written out": (scoring_checkpoint, "write_shards", 1, False),
    "after the warm-up is written out": (scoring_checkpoint, "write_shards", 1, True),
    "before the validation gradient": (passes, "gradient_pass", 1, False),
    "after the validation gradient": (passes, "gradient_pass", 1, True),
    "before the scores": (passes, "gradient_pass", 2, False),
    "after the scores": (passes, "gradient_pass", 2, True),
    "before staging": (method, "write_selection", 1, False),
    "after staging": (method, "write_selection", 1, True),
    "in publishing": (Path, "replace", 8, True),
    "after publishing": (method, "publish", 1, True),
    "before dropping the state": (RunFolder, "finish", 1, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_gives_the_same_bytes(
    inputs: Inputs, tmp_path: Path, unbroken: dict[str, bytes], place: str
) -> None:
    """Wherever a run dies, resuming it ends in the artifact of the unbroken run, and without it there is none."""
    killed_run(inputs, tmp_path, OPTIONS, *PLACES[place], seed=1)
    if "publish" not in place and "dropping" not in place:
        with pytest.raises(UserError, match="not a finished selection"):
            load_selection(tmp_path)
    if "written out" in place:
        assert [path.name for path in tmp_path.iterdir()] == [".unfinished"]
    with pytest.raises(UserError, match="holds an unfinished run"):
        select(inputs, tmp_path, OPTIONS, seed=1)
    select(inputs, tmp_path, OPTIONS, seed=1, resume=True)
    assert contents(tmp_path) == unbroken


def test_finished_phases_are_not_repeated(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that died in the scores repeats neither warm-up nor validation gradient, and still tells their cost."""
    killed_run(inputs, tmp_path, OPTIONS, passes, "gradient_pass", 2, seed=1)
    warm_ups = kill_at(monkeypatch, scoring_checkpoint, "warm_up")
    gradient_passes = kill_at(monkeypatch, passes, "gradient_pass", call=2)
    selection = select(inputs, tmp_path, OPTIONS, seed=1, resume=True)
    assert (len(warm_ups), len(gradient_passes)) == (0, 1)
    costs = selection.manifest["phases"]
    assert [(phase["name"], phase["examples"]) for phase in costs] == [
        ("warm-up", 8),
        ("validation gradient", 2),
        ("scores", 8),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"options": {**OPTIONS, "warmup": Warmup(0.5)}}, r"\(warmup\)"),
        ({"options": {**OPTIONS, "dtype": "float64"}}, r"\(model\)"),
        ({"options": {**OPTIONS, "data_budget": 3, "preconditioner": "none"}}, r"\(preconditioner\)"),
        ({"options": {**OPTIONS, "data_allocator": Diverse()}}, r"\(measured\)"),
        ({"data": {"prompt_template": "Q: {prompt}\n"}}, r"\(data\)"),
        ({"data": {"batch_size": 3}}, r"\(data\)"),
        ({"precision": "bf16-mixed"}, r"\(model\)"),
        ({"seed": 2}, r"\(seed\)"),
    ],
)
def test_other_settings_do_not_resume(inputs: Inputs, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """What decides the outcome must be the same; what differs is named."""
    killed_run(inputs, tmp_path, OPTIONS, passes, "gradient_pass", seed=1)
    with pytest.raises(UserError, match=f"unfinished run with other settings {named}"):
        select(inputs, tmp_path, **{"options": OPTIONS, "seed": 1, **change}, resume=True)


class Choosy(DataAllocator):
    """An allocator that takes nothing."""

    def allocate(self, examples: ScoredExamples, budget: int) -> Tensor:
        """Refuses whatever there is."""
        raise UserError("none of these")


def test_records_that_an_allocator_cannot_choose_from_cost_no_scoring(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column that is missing, and a source that no record has, are told before anything is computed or written."""
    warm_ups = kill_at(monkeypatch, scoring_checkpoint, "warm_up", call=99)
    for allocator, problem in (
        (PerSourceQuota("topic"), r"model\.data_allocator: per_source_quota finds no column 'topic' in row 0"),
        (PerSourceQuota("prompt", {"here": 1.0}), r"model\.data_allocator: per_source_quota gives a share to 'here'"),
    ):
        with pytest.raises(UserError, match=problem):
            select(inputs, tmp_path / "out", {**OPTIONS, "data_allocator": allocator}, seed=1)
    assert not warm_ups
    assert not (tmp_path / "out").exists()


def test_another_choice_goes_on_from_the_scores(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice that fails leaves the scores; with another one nothing is scored again, and the bytes are its own."""
    with pytest.raises(UserError, match="none of these"):
        select(inputs, tmp_path / "out", {**OPTIONS, "data_allocator": Choosy()}, seed=1)
    other = {**OPTIONS, "data_budget": 3, "parameter_allocator": LayerQuota(), "frozen": ["norm"]}
    expected = contents(select(inputs, tmp_path / "direct", other, seed=1).folder)
    gradient_passes = kill_at(monkeypatch, passes, "gradient_pass", call=99)
    select(inputs, tmp_path / "out", other, seed=1, resume=True)
    assert not gradient_passes
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("change", [{"data_budget": 3}, {"frozen": ["norm"]}])
def test_a_choice_that_scores_rest_on_is_part_of_the_run(
    inputs: Inputs, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Where one side is scored by the other's choice, that choice cannot change halfway."""
    options = {**OPTIONS, "order": "parameters_then_data"}
    killed_run(inputs, tmp_path, options, passes, "gradient_pass", 2, seed=1)
    with pytest.raises(UserError, match=r"with other settings \((budgets|frozen)\)"):
        select(inputs, tmp_path, {**options, **change}, seed=1, resume=True)


def test_the_step_size_may_change_until_scores_depend_on_it(inputs: Inputs, tmp_path: Path) -> None:
    """A run that dies before its directions are made goes on with another step size; after that, not."""
    other = {**OPTIONS, "step_size": 1.0}
    expected = contents(select(inputs, tmp_path / "unbroken", other, seed=1).folder)
    killed_run(inputs, tmp_path / "early", OPTIONS, passes, "gradient_pass", 1, True, seed=1)
    select(inputs, tmp_path / "early", other, seed=1, resume=True)
    assert contents(tmp_path / "early") == expected
    killed_run(inputs, tmp_path / "late", OPTIONS, passes, "gradient_pass", 2, seed=1)
    with pytest.raises(UserError, match=r"holds scores made with model\.step_size 2e-05, not 1\.0"):
        select(inputs, tmp_path / "late", other, seed=1, resume=True)


def test_other_inputs_do_not_resume(tmp_path: Path) -> None:
    """The same paths with other contents are other inputs."""
    inputs = write_inputs(tmp_path / "in")
    killed_run(inputs, tmp_path / "out", SGD, passes, "gradient_pass")
    with open(inputs.train, "a", encoding="utf-8") as stream:
        stream.write('{"prompt": "one", "response": "more"}\n')
    model = write_inputs(tmp_path / "other", seed=1).model
    with pytest.raises(UserError, match=r"other settings \(data\)"):
        select(inputs, tmp_path / "out", SGD, resume=True)
    other = replace(inputs, model=model)
    with pytest.raises(UserError, match=r"other settings \(data, model\)"):
        select(other, tmp_path / "out", SGD, resume=True)


def test_a_finished_selection_is_replaced_only_when_asked(inputs: Inputs, tmp_path: Path) -> None:
    """Without overwrite it stays; with it the new selection is there alone, in its own settings."""
    select(inputs, tmp_path, {**OPTIONS, "data_budget": 2})
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds files"):
        select(inputs, tmp_path, SGD)
    with pytest.raises(UserError, match=r"holds a finished run with other settings \(.*budgets.*\)"):
        select(inputs, tmp_path, SGD, resume=True)
    assert contents(tmp_path) == before
    select(inputs, tmp_path, {**SGD, "data_budget": 1}, overwrite=True)
    assert len(load_selection(tmp_path).example_ids) == 1
    assert not (tmp_path / "warmup").exists()


def test_resuming_a_finished_selection_changes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    """A run killed after its last step is complete; resuming it once more says so, and sweeps up."""
    first = select(inputs, tmp_path, SGD)
    before = contents(tmp_path)
    (tmp_path / ".finished").mkdir()
    again = select(inputs, tmp_path, SGD, resume=True)
    assert contents(tmp_path) == before
    assert again.manifest == first.manifest
    assert not (tmp_path / ".finished").exists()
    with pytest.raises(UserError, match="holds a finished run"):
        RunFolder(tmp_path, resume=True).claim({})


def run_in_child(inputs: Inputs, folder: Path, started: Path, options: dict[str, Any], data: dict[str, Any]) -> None:
    """A selection in a process of its own, to be killed."""
    started.touch()
    select(inputs, folder, options, data, seed=4, resume=True)


def child(inputs: Inputs, folder: Path, *settings: dict[str, Any]) -> Any:
    """The process, to be started."""
    return FORKS.Process(target=run_in_child, args=(inputs, folder, folder.with_suffix(".started"), *settings))


def run_and_kill(inputs: Inputs, folder: Path, seconds: float, *settings: dict[str, Any]) -> int | None:
    """The exit code of a run that is sent SIGKILL this long after it has begun, unless it is over."""
    started = folder.with_suffix(".started")
    started.unlink(missing_ok=True)
    process = child(inputs, folder, *settings)
    process.start()
    while process.is_alive() and not started.exists():
        time.sleep(0.002)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "data"),
    [
        (ADAM, {}),
        ({**ADAM, "scorer": PoolAware(), "token_scores": True, "save_minutes": 1e-9}, {"packing": True}),
    ],
    ids=["by phase", "by batch, packed, in two passes"],
)
def test_kill_9_at_any_moment(tmp_path: Path, options: dict[str, Any], data: dict[str, Any]) -> None:
    """SIGKILL at random moments, resumed each time: the last result is that of the unbroken run."""
    inputs = write_inputs(tmp_path)
    pool = Path(inputs.train)
    pool.write_text(pool.read_text(encoding="utf-8") * 8, encoding="utf-8")
    assert run_and_kill(inputs, tmp_path / "unbroken", 600, options, data) == 0
    unbroken = contents(tmp_path / "unbroken")
    work = sum(phase["seconds"] for phase in load_selection(tmp_path / "unbroken").manifest["phases"])
    draw = random.Random(0)
    moments = [*sorted(draw.uniform(0.0, work) for _ in range(5)), 600.0]
    out = tmp_path / "killed"
    codes: list[int | None] = []
    while not (out / "manifest.json").exists() or (out / ".unfinished").exists():
        codes.append(run_and_kill(inputs, out, moments[len(codes)], options, data))
    assert codes[0] == -signal.SIGKILL
    assert set(codes) <= {-signal.SIGKILL, 0}
    assert contents(out) == unbroken


@pytest.mark.heavy
def test_sigterm_ends_a_run(tmp_path: Path) -> None:
    """As it ends any process, though Lightning would have it go on; nothing is lost that was kept."""
    inputs = write_inputs(tmp_path)
    pool = Path(inputs.train)
    pool.write_text(pool.read_text(encoding="utf-8") * 50, encoding="utf-8")
    process = child(inputs, tmp_path / "out", SGD, {})
    process.start()
    while process.is_alive() and not list((tmp_path / "out").glob(".unfinished/validation-direction.safetensors")):
        time.sleep(0.002)
    process.terminate()
    process.join(60)
    assert process.exitcode == -signal.SIGTERM
    assert run_and_kill(inputs, tmp_path / "out", 600, SGD, {}) == 0


def test_any_failure_leaves_the_folder_free(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the program, or of a library, with nothing to resume yet: the next try needs neither option."""
    for error in (RuntimeError("device-side assert"), KeyError("x"), OSError(5, "Input/output error")):
        with monkeypatch.context() as patch:
            kill_at(patch, passes, "gradient_pass", error=error)
            with pytest.raises(Exception):  # noqa: B017, PT011 (whatever it is)
                select(inputs, tmp_path / "out", SGD)
        assert not (tmp_path / "out").exists()
    select(inputs, tmp_path / "out", SGD)


def test_a_folder_that_is_removed_meanwhile_is_told(inputs: Inputs, tmp_path: Path) -> None:
    """In a sentence, whether the next thing that is written there is a state or the result."""
    for place in ((passes, "gradient_pass"), (method, "write_selection")):
        with pytest.MonkeyPatch.context() as patch:
            function = getattr(*place)

            def removing(*args: Any, function: Any = function, **kwargs: Any) -> Any:
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
                return function(*args, **kwargs)

            patch.setattr(*place, removing)
            with pytest.raises(UserError, match="was removed, or taken over"):
                select(inputs, tmp_path / "out", SGD)
        assert not (tmp_path / "out").exists()
