"""One sentence for each mistake in task files of the lm-evaluation-harness, which itself raises any exception.

Unknown names and groups without tasks show in the files alone and are found before any data is read. A split that the
data do not have, or a file without rows, is recognised by the exception.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from traceback import walk_tb
from typing import Any

from dualsft.errors import UserError

_DEFINING = {"dataset_path", "custom_dataset", "include"}  # with one of these a group defines a task of its own


@dataclass(frozen=True)
class TaskIndex:
    """The names of tasks that can be asked for.

    Attributes:
        entries: The harness's entries by name.
        folder: Where own task files are.
        unread: Files there that the harness skipped, and its message about each.
    """

    entries: Mapping[str, Any]
    folder: Path | None
    unread: Mapping[Path, str]

    def check(self, name: str) -> None:
        """Refuse a name that is no task, group or tag, and a group without tasks or with an unknown member."""
        if name not in self.entries:
            raise UserError(f"There is no task {name!r} {self._where(name)}.")
        entry = self.entries[name]
        if entry.kind.name == "GROUP":
            self._check_group(name, entry.cfg, entry.yaml_path, set(), ())

    def _where(self, name: str) -> str:
        """Where a task was looked for, close names, and the harness's message on a file that may define the task."""
        if self.folder:
            where = f"in {self.folder} or among the harness's own"
        else:
            where = "among the harness's own (--task_folder adds more)"
        if close := get_close_matches(name, sorted(self.entries), 3):
            where += f"; close names are {', '.join(close)}"
        word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
        for path, message in self.unread.items():
            if word.search(path.stem) or word.search(path.read_text(encoding="utf-8", errors="replace")):
                return f"{where}; the harness says: {' '.join(message.split())}"
        return where

    def _check_group(
        self, name: str, config: Mapping[str, Any], file: Path, inherited: set[str], above: tuple[str, ...]
    ) -> None:
        """Check a group's members as the harness finds them when it loads it.

        Args:
            name: The group.
            config: The content of its file.
            file: Its file.
            inherited: Settings that the groups around it give to their members.
            above: Those groups.
        """
        members = config.get("task")
        if not isinstance(members, list) or not members:
            raise UserError(f"The group {name!r} ({file}) has no tasks; list them under its key task.")
        if name in above:
            raise UserError(f"The group {name!r} ({file}) holds itself; take it out of its own members.")
        for member in members:
            own = {"task": member} if isinstance(member, str) else member
            if isinstance(own, Mapping):
                self._check_member(name, own, file, inherited | config.keys(), (*above, name))

    def _check_member(
        self, group: str, member: Mapping[str, Any], file: Path, inherited: set[str], above: tuple[str, ...]
    ) -> None:
        name = member.get("group", member.get("task"))
        if entry := self.entries.get(name):
            if entry.kind.name == "GROUP":
                self._check_group(name, entry.cfg, entry.yaml_path, inherited | member.keys(), above)
        elif "group" in member:
            self._check_group(name, member, file, inherited, above)
        elif "task" in member and not _DEFINING & (inherited | member.keys()):
            raise UserError(
                f"The group {group!r} ({file}) holds {name!r}, but there is no such task {self._where(name)}; correct "
                "the name there, or add the task."
            )


def task_at_fault(failure: BaseException) -> Any | None:
    """The task that the harness was making when it failed; for a task of a group, only the call stack shows it."""
    owners = (frame.f_locals.get("self") for frame, _ in walk_tb(failure.__traceback__))
    return next((one for one in owners if getattr(getattr(one, "config", None), "task", None)), None)


def explanation(failure: BaseException, task: Any) -> str | None:
    """What is wrong with the data of the `task_at_fault`, in a sentence; None if it is something else."""
    source = (getattr(task.config, "metadata", None) or {}).get("config_source", "without a file")
    who, data = f"The task {task.config.task!r} ({source}) cannot be loaded", getattr(task, "dataset", None)
    if isinstance(data, Mapping):
        for key, split in _splits(task):
            if split not in data:
                return f"{who}: its {key} is {split!r}, but its data have {', '.join(data)}; name one of these there."
    elif isinstance(failure, StopIteration) or "corresponds to no data" in str(failure):
        files = _files((task.config.dataset_kwargs or {}).get("data_files"))
        empty = [str(file) for file in files if file.is_file() and not file.stat().st_size]
        named = ", ".join(empty or map(str, files))
        return f"{who}: its data have no rows{named and f' ({named})'}; fill them, or name others in dataset_kwargs."
    return None


def _splits(task: Any) -> Iterator[tuple[str, str]]:
    for key in ("test_split", "validation_split", "training_split", "fewshot_split"):
        split = getattr(task.config, key, None)
        if isinstance(split, str):
            yield key, split
    if isinstance(split := getattr(task.config.fewshot_config, "split", None), str):
        yield "fewshot_config's split", split


def _files(data_files: Any) -> list[Path]:
    """The files that a task's ``data_files`` name: one pattern, several, or those of each split."""
    if isinstance(data_files, str):
        return [Path(path).absolute() for path in sorted(glob(data_files)) or [data_files]]
    parts = data_files.values() if isinstance(data_files, Mapping) else data_files or []
    return [file for part in parts for file in _files(part)]


def check_same(name: str, one: Any, other: Any, sources: tuple[str, str]) -> None:
    """Refuse a task that is in two of the names with different settings, as results are listed by its name."""
    first, second = one.dump_config(), other.dump_config()
    if differing := sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key)):
        raise UserError(
            f"The task {name!r} is in both {sources[0]!r} and {sources[1]!r}, with different settings "
            f"({', '.join(differing)}); evaluate these in a run each."
        )
