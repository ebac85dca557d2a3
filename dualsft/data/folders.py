"""Which files of a folder belong to a split, by the rules of `datasets.load_dataset`.

The folder's ``README.md`` may say it, as on the Hugging Face hub. Otherwise a file in ``data/`` whose name ends in
``-00000-of-00001`` belongs to the split before that, and names of folders or files say it by the words train,
validation and test and their usual forms. A folder in which nothing says it has one set of records for every split.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dualsft.errors import UserError

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"data/(?P<split>[\w.-]+?)-\d{5}-of-\d{5}\D.*")
_PART = re.compile(r"(?P<before>.*-)(?P<number>\d{5})-of-(?P<count>\d{5})(?!\d).*")
_DESCRIPTIONS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)\r?\n---", re.DOTALL)
_SHOWN = 4


class FolderFiles(NamedTuple):
    """The files of a folder that hold a split, by name, and the names of all that it holds beside them."""

    read: list[Path]
    left_out: tuple[str, ...]


def files_of(folder: Path, split: str, is_data: Callable[[Path], bool]) -> FolderFiles:
    """The data files that hold a split: those of the folder itself or, where it has none, of its subfolders.

    Args:
        folder: The folder; what begins with a dot is not looked at.
        split: Name of the split.
        is_data: Whether a file is of a kind that can be read.

    Raises:
        UserError: If the split is none of the folder's, only some of its files belong to a split, one file is there
            twice, as itself and in another form, or a part of several is missing.
    """
    top = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in top if _is_file(path) and is_data(path) and path.name not in _DESCRIPTIONS]
    nested = [path for path in _below(top) if is_data(path) and path.name not in _DESCRIPTIONS]
    found = {path.relative_to(folder).as_posix(): path for path in [*files, *nested]}
    by_name = {name: _split_of(name) for name in list(found)[: len(files) or None]}
    splits = _splits_by_readme(folder, found, by_name)
    _check(folder, split, splits)
    read = {name: found[name] for name, of in splits.items() if of in (split, None)}
    _check_once(folder, read)
    _check_parts(folder, read)
    others = {path.relative_to(folder).as_posix() for path in [*top, *nested] if _is_file(path) or path in nested}
    return FolderFiles(list(read.values()), tuple(sorted(others - set(read))))


def listed(names: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(list(names)[:_SHOWN]) + more


def _is_file(path: Path) -> bool:
    return not path.is_dir()  # a link that leads nowhere is one, and is refused when it is opened


def _below(top: list[Path]) -> Iterator[Path]:
    for folder in (path for path in top if path.is_dir()):
        inner = sorted(folder.rglob("*"))
        yield from (
            path
            for path in inner
            if _is_file(path) and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )


def _split_of(name: str) -> str | None:
    """The split that a path within the folder names, those of its folders first; None if it names none, or several."""
    if shard := _SHARD.fullmatch(name):
        return shard["split"]
    *folders, file = name.split("/")
    for part in (" ".join(folders), file):
        found = {_WORDS[word] for word in re.split(r"[-._ 0-9]+", part.lower()) if word in _WORDS}
        if len(found) == 1:
            return found.pop()
    return None


def _splits_by_readme(
    folder: Path, names: Mapping[str, Path], by_name: Mapping[str, str | None]
) -> Mapping[str, str | None]:
    """The split of each file that the ``configs`` of the folder's README.md name, ascending; by name if it has none.

    Its ``data_dir`` is the folder that the files are in.

    Raises:
        UserError: If it describes several configurations, or only files that are not there, and names say nothing; or a
            folder that is not there.
    """
    configs = [config for config in _configs(folder / "README.md") if isinstance(config, dict)]
    if len(configs) > 1:
        known = [str(config.get("config_name")) for config in configs]
        raise UserError(
            f"The folder {folder} holds several configurations ({listed(known)}), as its README.md says: give a file "
            "or a subfolder of one of them."
        )
    splits: dict[str, str | None] = {}
    base = f"{given.strip('/')}/" if configs and isinstance(given := configs[0].get("data_dir"), str) else ""
    patterns = [(split, base + path) for split, path in _patterns(configs[0].get("data_files"))] if configs else []
    if base and not patterns:
        if not any(name.startswith(base) for name in names):
            raise UserError(
                f"The folder {folder} holds no data in {base}, which its README.md names: give the file itself."
            )
        return {name: _split_of(name.removeprefix(base)) for name in names if name.startswith(base)}
    for split, pattern in patterns:
        splits |= dict.fromkeys((name for name in _matching(folder, pattern) if name in names), split)
    if patterns and not splits and not any(by_name.values()):
        raise UserError(
            f"The folder {folder} holds none of the files that its README.md names "
            f"({listed([pattern for _, pattern in patterns])}): give the file itself."
        )
    return dict(sorted(splits.items())) or by_name


def _patterns(given: Any) -> Iterator[tuple[str, str]]:
    """The splits and patterns of a configuration's ``data_files``: those without a split are of train."""
    for entry in given if isinstance(given, list) else [given]:
        split = entry.get("split", "train") if isinstance(entry, dict) else "train"
        paths = entry.get("path") if isinstance(entry, dict) else entry
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str) and isinstance(split, str):
                yield split, path


def _matching(folder: Path, pattern: str) -> Iterator[str]:
    try:
        found = list(folder.glob(pattern))
    except (ValueError, NotImplementedError):  # an absolute one, or one of another dialect, which names nothing here
        found = []
    return (path.relative_to(folder).as_posix() for path in found if folder in path.parents)


def _configs(readme: Path) -> list[Any]:
    try:
        front = _FRONT_MATTER.match(readme.read_text(encoding="utf-8-sig"))
        card = yaml.safe_load(front[1]) if front else None
    except (OSError, ValueError, yaml.YAMLError):  # a text for people, which decides nothing then
        return []
    found = card.get("configs") if isinstance(card, dict) else None
    return found if isinstance(found, list) else []


def _check(folder: Path, split: str, splits: Mapping[str, str | None]) -> None:
    if not (named := {of: name for name, of in splits.items() if of is not None}):
        return
    if unnamed := [name for name, of in splits.items() if of is None]:
        of, example = next(iter(named.items()))
        raise UserError(
            f"The folder {folder} holds {example}, of the split {of} by its name, and {listed(unnamed)}, of none: give "
            "the file itself, or a folder of the files to be read."
        )
    if split not in named:
        raise UserError(
            f"The folder {folder} has the splits {listed(sorted(named))}, but not {split!r}: name one of them as "
            "data.train_split or data.validation_split, or give the file itself."
        )


def _check_once(folder: Path, read: Mapping[str, Path]) -> None:
    forms: dict[str, str] = {}
    for name in read:
        bare = name.rpartition(".")[0]
        if (other := bare if bare in read else forms.setdefault(bare, name)) != name:
            raise UserError(
                f"The folder {folder} holds {other} and {name}, which is the same under another name: remove one."
            )


def _check_parts(folder: Path, read: Mapping[str, Path]) -> None:
    parts: dict[tuple[str, str], set[int]] = {}
    for part in filter(None, map(_PART.fullmatch, read)):
        parts.setdefault((part["before"], part["count"]), set()).add(int(part["number"]))
    for (before, count), numbers in parts.items():
        if missing := [number for number in range(int(count)) if number not in numbers]:
            raise UserError(
                f"The folder {folder} lacks {before}{missing[0]:05}-of-{count}, one of {int(count):,} parts: fetch it, "
                "or give the files to be read under other names."
            )
