"""How a selection keeps the scores of its weights: in float32, rounded to half of the space, or not at all."""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from dualsft.selection.artifact import WEIGHT_SCORES
from dualsft.selection.settings import KeptScores


def keep_scores(folder: Path, scores: Mapping[str, Tensor], kept: KeptScores) -> None:
    """Leave the files of the scores that a selection keeps in its folder, and no others.

    Args:
        folder: Holds no such files, or those of all scores in float32, written by several ranks.
        scores: Parameter name -> φ_j; each may be read from these files when it is asked for.
        kept: How they are kept.
    """
    written = [*folder.glob(f"{WEIGHT_SCORES}*")]
    if kept == "full" and written:
        return
    left = {name: scores[name] for name in sorted(scores)} if kept != "none" else {}
    if kept == "bfloat16":
        left = {name: score.to(torch.bfloat16) for name, score in left.items()}
    for path in written:
        path.unlink()
    if left:
        save_torch_state_dict(left, folder, filename_pattern=f"{WEIGHT_SCORES}{{suffix}}.safetensors")
