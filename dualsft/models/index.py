"""The index of a checkpoint that is divided into files: ``model.safetensors.index.json``."""

import json
from pathlib import Path

from dualsft.errors import UserError

ADVICE = "copy the checkpoint again, or write it anew with save_pretrained"


def read_index(path: Path) -> dict[str, str]:
    """Name of each tensor -> name of its file.

    Raises:
        UserError: if the index is damaged, or names a file that is not there.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {ADVICE}.") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{path} is damaged (its weight_map does not name the file of each tensor); {ADVICE}.")
    if not isinstance(index.get("metadata", {}), dict):
        raise UserError(f"{path} is damaged (its metadata are no object); {ADVICE}.")
    folder = path.parent.absolute()
    for file in sorted(set(files.values())):
        if not (folder / file).is_file() or folder not in (folder / file).parents or not file.endswith(".safetensors"):
            raise UserError(f"{path} names {file}, which is no safetensors file there; {ADVICE}.")
    return files
