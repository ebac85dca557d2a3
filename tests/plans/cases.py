"""Small models as configurations alone."""

from pathlib import Path
from typing import Any

from dualsft.plans.shape import ModelShape
from tests.world.models import tiny_llama


def write_config(path: Path, **options: Any) -> Path:
    """A folder with the configuration of `tiny_llama` with these options, and nothing else."""
    tiny_llama(**options).config.save_pretrained(path)
    return path


def tiny_shape(path: Path, dtype: Any = "float32", **options: Any) -> ModelShape:
    """The shape of `tiny_llama` with these options."""
    return ModelShape(write_config(path, **options), dtype)
