"""Runs the planned command on a few batches, in a process of its own."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dualsft.errors import UserError
from dualsft.plans.probe import Seen


def run_probe(verb: str, arguments: Sequence[str], output_dir: str | None) -> Seen:
    """Run a verb on a few batches of its data, and return what was seen; what it wrote is removed.

    Args:
        verb: select or fit.
        arguments: Its configuration and options.
        output_dir: The folder that the planned run is to write to; the probe writes beside it.

    Raises:
        UserError: if the run fails; its own sentence stands above.
    """
    beside = Path(output_dir).absolute().parent if output_dir else None
    where = beside if beside is not None and beside.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="dualsft-probe-", dir=where) as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "dualsft.commands.probe_worker", verb, str(report), *arguments]
        done = subprocess.run([*command, "--output_dir", f"{folder}/run"], stdout=subprocess.DEVNULL)
        if done.returncode or not report.is_file():
            raise UserError(f"the probe's {verb} ended with exit code {done.returncode}; what it says stands above.")
        return Seen.from_json(report.read_text(encoding="utf-8"))
