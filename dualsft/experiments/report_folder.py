"""The output folder of an experiment: its reports are written anew by each call, its bank is never thrown away."""

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from dualsft.errors import UserError
from dualsft.storage.paths import check_writable, expanded
from dualsft.storage.writing import write_atomically, writing_to

_CONFIG = "config.yaml"


class ReportFolder:
    """A folder that one experiment writes to, as often as it is run.

    Args:
        folder: The folder.
        overwrite: Whether the reports of another experiment there may be replaced.
        written: The names that the experiment writes.

    Raises:
        UserError: if it is a file, holds anything else, or cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], overwrite: bool, written: Sequence[str]) -> None:
        self.path, self._overwrite = Path(expanded(os.fspath(folder))), overwrite
        if os.path.exists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; give --output_dir a folder.")
        check_writable(self.path)
        names = [path.name for path in sorted(self.path.iterdir())] if self.path.is_dir() else []
        if foreign := [name for name in names if name not in (_CONFIG, *written)]:
            raise UserError(
                f"{self.path} holds files that this experiment did not write ({', '.join(foreign[:3])}); they are left "
                "alone: choose another --output_dir."
            )

    def claim(self, replay: str) -> None:
        """Write the configuration that replays the experiment; refuse to replace that of another one unasked."""
        path = self.path / _CONFIG
        if (
            path.is_file()
            and not self._overwrite
            and yaml.safe_load(path.read_text(encoding="utf-8")) != yaml.safe_load(replay)
        ):
            raise UserError(
                f"{self.path} holds an experiment with other settings (see its {_CONFIG}); choose another "
                "--output_dir, or give --overwrite to replace its reports: finished runs stay in the bank."
            )
        with writing_to(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(path, replay)
