"""The output folder of an experiment: its reports are written anew by each call, its bank is never thrown away."""

import os
from collections.abc import Mapping, Sequence
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

    def claim(self, replay: str, beside: Mapping[str, str] | None = None) -> None:
        """Write the configuration that replays the experiment; refuse to replace that of another one unasked.

        Args:
            replay: The configuration, in YAML.
            beside: Names in the folder -> YAML files that the configuration names, of which copies are kept there.
        """
        kept = {self.path / name: Path(file).read_text(encoding="utf-8") for name, file in (beside or {}).items()}
        texts = {self.path / _CONFIG: replay, **kept}
        if not self._overwrite and any(_differs(path, text) for path, text in texts.items()):
            raise UserError(
                f"{self.path} holds an experiment with other settings (see its {_CONFIG}); choose another "
                "--output_dir, or give --overwrite to replace its reports: finished runs stay in the bank."
            )
        for path, text in texts.items():
            with writing_to(self.path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)


def _differs(path: Path, text: str) -> bool:
    """Whether a file is there and has other settings than a text."""
    return path.is_file() and yaml.safe_load(path.read_text(encoding="utf-8")) != yaml.safe_load(text)
