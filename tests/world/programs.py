"""Programs of Python as a shell starts them, in processes that need not import the libraries."""

import os
import runpy
import site
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dualsft.cli import main
from tests.world.forks import FORKS


def run_program(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    packages: Path | None = None,
    confine: Callable[[], object] | None = None,
) -> subprocess.CompletedProcess[str]:
    """What ``dualsft ...``, ``python FILE ...`` or ``python -m MODULE ...`` prints and how it ends.

    Args:
        command: The program and its arguments.
        folder: Where it is started.
        environment: Its variables; those that the interpreter reads at its start are heeded as far as PYTHONPATH goes.
        packages: A folder of installed packages that it sees beside those that are seen here.
        confine: Is called in the process before the program.
    """
    told = [folder / f".{name}" for name in ("stdout", "stderr")]
    process = FORKS.Process(target=_program, args=(list(command), folder, dict(environment), packages, told, confine))
    process.start()
    process.join()
    texts = [path.read_text(encoding="utf-8") for path in told]
    return subprocess.CompletedProcess(list(command), process.exitcode or 0, *texts)


def _program(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    packages: Path | None,
    told: Sequence[Path],
    confine: Callable[[], object] | None,
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(told, start=1):
        with open(path, "wb") as stream:
            os.dup2(stream.fileno(), number)
    if packages:
        site.addsitedir(str(packages))
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if confine:
        confine()
    program, *arguments = command
    if program == "dualsft":
        sys.argv = command
        main()
    elif arguments[0] == "-m":
        sys.path.insert(0, str(folder))
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str((folder / arguments[0]).parent))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
