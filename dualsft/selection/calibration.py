"""The break-even of a GPU (`dualsft.matrix.calibration`), measured once and kept: runs on it then round alike.

CACHE/break-even/NAME.json     of one kind of card, type of activations, and release of torch and dualsft
"""

import json
import math
import re
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock

from dualsft.data.cache_folder import cache_folder, refused
from dualsft.matrix.calibration import measured_break_even
from dualsft.matrix.linear_tap import BreakEven, settle_break_even
from dualsft.matrix.passes import compute_dtype
from dualsft.models import PreTrainedModel
from dualsft.runs.progress import say
from dualsft.sharding.collectives import on_rank_zero
from dualsft.sharding.shards import compute_device
from dualsft.storage.writing import replacing

_ESTIMATED = "the cheaper way to the scores of a linear layer is estimated, not measured"


def calibrate(model: PreTrainedModel, cache_dir: str | None) -> None:
    """On a GPU go by its own break-even: all ranks by that of rank zero's, from the cache or measured now.

    Where nothing can be kept the estimate stays, as another measurement would round otherwise when the run is resumed.
    """
    device, dtype = compute_device(model), compute_dtype(model)
    if device.type == "cuda":
        found = on_rank_zero(lambda: _kept_or_measured(cache_folder(cache_dir) / "break-even", device, dtype))
        if found is not None:
            settle_break_even(device.type, found)


def _kept_or_measured(folder: Path, device: torch.device, dtype: torch.dtype) -> BreakEven | None:
    """The break-even that the folder keeps, measured if there is none; None if it cannot keep any, or none shows."""
    what = f"{torch.cuda.get_device_name(device)} {dtype} torch {torch.__version__} dualsft {version('dualsft')}"
    path = folder / (re.sub(r"[^\w.-]+", "-", what) + ".json")
    if (found := _kept(path)) is not None:  # one may read where one may not write
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", fallback_to_soft=False):
            if (found := _kept(path)) is None:
                found = _measured(device, dtype)
                if found is not None:
                    with replacing(path) as partial:
                        partial.write_text(json.dumps(found._asdict()), encoding="utf-8")
    except (OSError, NotImplementedError) as error:  # the second where a file system has no locks
        say(refused(folder, error, _ESTIMATED))
        return None
    return found


def _measured(device: torch.device, dtype: torch.dtype) -> BreakEven | None:
    """The break-even as it is measured now, told if that fails: where memory is short, or other work is on the card."""
    found = None
    with suppress(torch.OutOfMemoryError):
        found = measured_break_even(device, dtype)
    if found is None:
        say(f"{_ESTIMATED}: the times of this card tell nothing now.")
    return found


def _kept(path: Path) -> BreakEven | None:
    """What a file holds; None if there is none, or it holds anything else."""
    try:
        found = BreakEven(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if all(isinstance(part, float) and 0 <= part < math.inf for part in found) else None
