"""Compiles a model's transformer blocks by `torch.compile`, in place: names, state dicts and hooks stay as they are.

Blocks that are alike share what is compiled, so that the time it takes does not grow with their number. A batch of
another kind is compiled anew: of one row or several, with padding or without, for training or for evaluation. What
stands outside the blocks (embeddings, head, loss) runs as it did.

Compiled code cannot be differentiated twice or in forward mode, and has no place for taps: passes that need these run
the blocks uncompiled (`uncompiled`).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dualsft.errors import UserError, first_line
from dualsft.sharding.shard_model import transformer_blocks

NO_COMPILER = "install a C++ compiler, and for a GPU Triton, or do not compile"
"""A remedy (see `UserError`)."""

_BACKEND = "inductor"

_MOST_KINDS = 64
"""Kinds of batches and blocks that are compiled; torch gives up after 8 of them, and fits have up to a dozen."""


def compile_blocks(model: nn.Module) -> None:
    """Have each block compiled when it is first called.

    Raises:
        UserError: if the model has no blocks.
    """
    if not (blocks := transformer_blocks(model)):
        raise UserError(f"{type(model).__name__} has no list of layers, so that none can be compiled", NO_COMPILER)
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _MOST_KINDS)
    for block in blocks:
        block.compile(backend=_BACKEND)


def check_compiler(device: torch.device) -> None:
    """Compile one addition, which takes all that compiling a model does.

    Raises:
        UserError: if torch cannot compile for this device here.
    """
    try:
        torch.compile(_add_one, backend=_BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # each part of the chain has exceptions of its own
        reason = first_line(getattr(error, "inner_exception", error))
        raise UserError(f"torch cannot compile for {device.type} here ({reason})", NO_COMPILER) from error


def _add_one(x: Tensor) -> Tensor:
    return x + 1


def compiled_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that run compiled, those inside compiled blocks among them."""
    outer = [module for module in model.modules() if module._compiled_call_impl is not None]
    return {inner for module in outer for inner in module.modules()}


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which compiled blocks run as they would if they were not."""
    return torch.compiler.set_stance("force_eager") if compiled_modules(model) else nullcontext()
