"""The bank: what identifies a job, and what is kept of it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from dualsft.experiments.bank import Bank, Result, do, is_taken, log_file, read_result, work_folder
from dualsft.experiments.jobs import Job, job_from_json
from dualsft.experiments.schedule import plan, readable, seconds_left
from dualsft.experiments.workers import Worker, do_all


def job(number: int = 0, **changes: object) -> Job:
    """A job that is told from others by its number."""
    given = {"inputs": {"data.train": "pool.jsonl"}, "fingerprints": {"data.train": "abc"}, "work": 10.0, **changes}
    return Job("fit", f"fit {number}", {"fit": {"number": number}}, **given)  # type: ignore[arg-type]


def explain(error: Exception) -> str:
    """The message alone."""
    return str(error)


def test_identity_is_what_the_result_rests_on() -> None:
    """Another name, place or estimate of the same work is the same job; other settings or other data are another."""
    same = job(inputs={"data.train": "elsewhere.jsonl"}, work=3.0)
    assert same.key == job().key
    assert job_from_json(job().as_json()).key == job().key
    assert len({job().key, job(1).key, job(fingerprints={"data.train": "abd"}).key}) == 3


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    """A finished job is left alone, whoever asks; its result is what it was, and what was under way is gone."""
    bank, calls = Bank(tmp_path / "bank"), []

    def execute(asked: Job, place: Path) -> Result:
        calls.append(asked.name)
        work_folder(place).mkdir()
        return Result(metrics={"target": {"loss": 0.1 + 0.2}}, costs={"seconds": 1.5}, seconds=2.0)

    assert bank.missing([job(), job()]) == [job()]
    for _ in range(2):
        do(bank.put(job()), execute, explain)
    assert calls == ["fit 0"]
    assert bank.missing([job()]) == []
    found = bank.result(job())
    assert found is not None
    assert found.metrics["target"]["loss"] == 0.1 + 0.2
    assert not work_folder(bank.place(job())).exists()


def test_failures_are_kept_and_tried_again(tmp_path: Path) -> None:
    """A job that failed says why, keeps what it had under way, and is done again the next time."""
    bank = Bank(tmp_path)

    def fail(asked: Job, place: Path) -> Result:
        work_folder(place).mkdir()
        raise ValueError("no room")

    do(bank.put(job()), fail, explain)
    assert bank.result(job()) == Result(error="no room")
    assert work_folder(bank.place(job())).is_dir()
    assert bank.missing([job()]) == [job()]
    do(bank.put(job()), lambda asked, place: Result(seconds=1.0), explain)
    assert bank.result(job()) == Result(seconds=1.0)


@pytest.mark.parametrize("text", ["", "{", '{"error": null, "strange": 1}', "[]"])
def test_half_written_results_count_as_none(tmp_path: Path, text: str) -> None:
    """What another program did to a result makes the job be done again, and nothing fail."""
    bank = Bank(tmp_path)
    (bank.put(job()) / "result.json").write_text(text)
    assert bank.result(job()) is None


def test_estimates_rest_on_finished_jobs(tmp_path: Path) -> None:
    """Time is told by the rate of jobs of the same kind, and not at all before there is one."""
    bank, jobs = Bank(tmp_path), [job(0, work=10.0), job(1, work=30.0), job(2, work=20.0)]
    assert seconds_left(bank, jobs) is None
    assert "is known once" in plan(bank, jobs, 1)
    do(bank.put(jobs[0]), lambda asked, place: Result(seconds=5.0), explain)
    assert seconds_left(bank, jobs) == pytest.approx(25.0)
    assert plan(bank, jobs, 1).splitlines()[0].startswith("done")
    assert "in about 25 seconds" in plan(bank, jobs, 1)
    assert [readable(s) for s in (30, 90, 600, 10_000)] == ["30 seconds", "90 seconds", "10.0 minutes", "2.8 hours"]


SERVER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from dualsft.experiments.workers import serve
def do(place):
    print("at work on", place.name)
    if place.name == "kills":
        os._exit(7)
    if place.name == "waits":
        (place / "waiting").write_text(str(os.getpid()))
        time.sleep(60)
    (place / "done").touch()
if __name__ == "__main__":
    serve(do, lambda place: place / "log.txt")
"""


def test_a_job_that_kills_its_worker_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code of a worker that died is told, another one takes its place, and output goes to each job's log."""
    root = str(Path(__file__).parents[2])
    (tmp_path / "serving.py").write_text(SERVER.format(root=root))
    places = [tmp_path / name for name in ("first", "kills", "last")]
    for place in places:
        place.mkdir()
    told: dict[str, int | None] = {}
    workers = [Worker("serving", {"PYTHONPATH": str(tmp_path)})]
    do_all(places, workers, lambda place, code: told.update({place.name: code}))
    workers[0].stop()
    assert told == {"first": None, "kills": 7, "last": None}
    assert [place.name for place in places if (place / "done").exists()] == ["first", "last"]
    assert log_file(places[2]).read_text() == "at work on last\n"


def test_what_another_command_is_at_is_put_off(tmp_path: Path) -> None:
    """Of several commands on one bank each does what no other is at; a job that is given up comes last."""
    (tmp_path / "serving.py").write_text(SERVER.format(root=str(Path(__file__).parents[2])))
    places = [tmp_path / name for name in ("first", "second", "last")]
    for place in places:
        place.mkdir()
    others, told = FileLock(places[0] / "lock"), []
    others.acquire()

    def done(place: Path, code: int | None) -> None:
        told.append(place.name)
        if place.name == "last":
            others.release()

    worker = Worker("serving", {"PYTHONPATH": str(tmp_path)})
    do_all(places, [worker], done, taken=is_taken)
    worker.stop()
    assert told == ["second", "last", "first"]


def test_workers_end_when_their_caller_stops(tmp_path: Path) -> None:
    """An exception, as of Ctrl-C, in the caller ends the processes, and what is left is not begun."""
    (tmp_path / "serving.py").write_text(SERVER.format(root=str(Path(__file__).parents[2])))
    places = [tmp_path / name for name in ("first", "waits", "last")]
    for place in places:
        place.mkdir()

    def stop(place: Path, code: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do_all(places, [Worker("serving", {"PYTHONPATH": str(tmp_path)})], stop)
    assert not (places[2] / "done").exists()
    assert read_result(places[2]) is None
    assert "serving" not in sys.modules


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """A killed command leaves no worker behind that goes on training."""
    (tmp_path / "serving.py").write_text(SERVER.format(root=str(Path(__file__).parents[2])))
    (tmp_path / "waits").mkdir()
    command = [sys.executable, "-m", "serving"]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(f"{tmp_path / 'waits'}\n")
    process.stdin.flush()
    while not (tmp_path / "waits" / "waiting").is_file():
        time.sleep(0.05)
    process.stdin.close()
    assert process.wait(20) == 0
    assert process.stdout is not None
    process.stdout.close()
