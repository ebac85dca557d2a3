"""Remedies for errors of the mathematics, in terms of configuration keys."""

from collections.abc import Iterator
from contextlib import contextmanager

from dualsft.errors import UserError
from dualsft.matrix.curvature import FULL_PRECISION
from dualsft.matrix.model_calls import SMALLER_BATCHES
from dualsft.matrix.spot_check import NO_PACKING
from dualsft.training.compilation import NO_COMPILER

BY_KEY = {
    NO_COMPILER: "install a C++ compiler, and for a GPU Triton, or set model.compile to false",
    FULL_PRECISION: "set model.dtype to float32 and trainer.precision to 32-true, or the scorer's method to exact",
    NO_PACKING: "set data.packing to false",
    SMALLER_BATCHES: "lower data.batch_tokens or set model.dtype to float32",
}
"""Remedy -> the same, with the keys to set."""


@contextmanager
def remedies_by_key() -> Iterator[None]:
    """Make errors raised in this context name the configuration keys to set, where the mathematics has a remedy."""
    try:
        yield
    except UserError as error:
        if error.remedy not in BY_KEY:
            raise
        raise UserError(error.problem, BY_KEY[error.remedy]) from error
