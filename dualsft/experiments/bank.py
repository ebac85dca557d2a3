"""The bank: a folder with the results of jobs, so that none is done twice, whoever asks for it.

KEY/job.json       what the job is
KEY/result.json    its figures, or why it failed; written last
KEY/log.txt        what it printed
KEY/work/          what it has under way, from which it goes on after a kill; removed in the end
KEY/selection/     the selection that it made, if it makes one
KEY/lock           held by the process that is at work on it
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from dualsft.errors import UserError
from dualsft.experiments.jobs import Job, job_from_json
from dualsft.storage.paths import check_writable, expanded
from dualsft.storage.writing import write_atomically, writing_to

_JOB, _RESULT, _LOG, _LOCK = "job.json", "result.json", "log.txt", "lock"


@dataclass(frozen=True)
class Result:
    """What became of a job.

    Attributes:
        error: Why it failed, in one sentence; None if it did not.
        metrics: Evaluation -> metric -> value.
        costs: seconds (of the training, or of the selection's phases), evaluation_seconds, peak_memory_bytes,
            bytes_on_disk (of the delta, the adapter or the selection), trained_weights, examples, steps.
        seconds: Wall time of all of it, loading included.
        versions: Of the packages that it ran with.
    """

    error: str | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)


class Bank:
    """A folder of jobs' results.

    Args:
        folder: Where they are, or will be; made when the first job is put there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(expanded(os.fspath(folder)))

    def check(self) -> None:
        """Refuse a folder in which nothing can be put.

        Raises:
            UserError: if it is a file, or cannot be written.
        """
        if os.path.exists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; give --bank a folder.")
        check_writable(self.path)

    def place(self, job: Job) -> Path:
        """The folder of a job."""
        return self.path / job.key

    def result(self, job: Job) -> Result | None:
        """What became of a job; None if it has not been done."""
        return read_result(self.place(job))

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of the jobs that have not been done or have failed, each once."""
        once = {job.key: job for job in jobs}
        return [job for job in once.values() if (found := self.result(job)) is None or found.error is not None]

    def put(self, job: Job) -> Path:
        """Make a job's folder, with what it is to do; return the folder."""
        place = self.place(job)
        with writing_to(self.path):
            place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / _JOB, job.as_json())
        return place


def read_result(place: Path) -> Result | None:
    """The result in a job's folder; None if there is none, or none that can be read."""
    try:
        return Result(**json.loads((place / _RESULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_result(place: Path, result: Result) -> None:
    """Write a job's result into its folder, in one step."""
    write_atomically(place / _RESULT, json.dumps(asdict(result), indent=1))


def read_job(place: Path) -> Job:
    """The job in a folder."""
    return job_from_json((place / _JOB).read_text(encoding="utf-8"))


def log_file(place: Path) -> Path:
    """The file that a job's output goes to."""
    return place / _LOG


def do(place: Path, execute: Callable[[Job, Path], Result], explain: Callable[[Exception], str]) -> None:
    """Do the job in a folder, unless another process finishes it first, and write its result.

    Args:
        place: The job's folder.
        execute: Does the job in the folder.
        explain: One sentence for an exception that it raises.
    """
    with _locked(place):
        found = read_result(place)
        if found is not None and found.error is None:
            return
        try:
            result = execute(read_job(place), place)
        except Exception as error:
            result = Result(error=explain(error))  # what is under way stays, for another try
        else:
            shutil.rmtree(work_folder(place), ignore_errors=True)
        write_result(place, result)


def is_taken(place: Path) -> bool:
    """Whether another process is at work on the job in a folder."""
    try:
        with FileLock(place / _LOCK, timeout=0):
            return False
    except Timeout:
        return True


def work_folder(place: Path) -> Path:
    """The folder of what a job has under way."""
    return place / "work"


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Wait until no other process is at work on the job, and keep others out."""
    with FileLock(place / _LOCK):
        yield
