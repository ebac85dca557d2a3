"""The help of a verb that people read: what is set first, by purpose; `--help all` has every option."""

import re
import shutil
import textwrap
from argparse import Action, ArgumentParser
from collections.abc import Sequence
from importlib.metadata import entry_points
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ActionYesNo

from dualsft.commands.parsing import NAMED

_READ = ("model.model_name_or_path", "data.train", "data.validation")
_RUN = ("output_dir", "resume", "overwrite", "seed_everything")
_DATA = ("data.format", "data.max_length", "data.prompt_template")
_DEVICES = ("trainer.accelerator", "trainer.devices", "trainer.strategy")
_TRAINING = ("optimizer", "lr_scheduler", "trainer.max_epochs", "data.batch_size", "trainer.accumulate_grad_batches")
_MEMORY = ("model.dtype", "data.batch_tokens", "model.gradient_checkpointing", *_DEVICES)
Groups = dict[str, tuple[str, ...]]

SELECT: Groups = {
    "what is read": _READ,
    "how much is chosen": ("model.data_budget", "model.parameter_budget"),
    "how it is scored": (
        *("model.scorer", "model.warmup.fraction", "model.warmup.learning_rate", "model.prior.weight"),
        *("model.order", "model.path.along"),
    ),
    "how it is chosen": ("model.data_allocator", "model.parameter_allocator"),
    "how records become text": _DATA,
    "memory and devices": _MEMORY,
    "the run": _RUN,
}
FIT: Groups = {
    "what is read": ("model.model_name_or_path", "model.selection", *_READ[1:]),
    "how it is trained": (*_TRAINING, "model.loss", "model.export"),
    "how records become text": _DATA,
    "memory and devices": _MEMORY,
    "the run": _RUN,
}
FIRST: dict[str, Groups] = {
    "select": SELECT,
    "fit": FIT,
    "validate": {
        "what is read": ("model.model_name_or_path", "data.validation"),
        "tasks of the lm-evaluation-harness": ("tasks", "few_shot", "limit", "chat_template"),
        "answers that are generated": ("model.generation.max_new_tokens", "model.generation.answer_pattern"),
        "how records become text": _DATA,
        "memory and devices": ("model.dtype", "data.batch_tokens", "data.batch_size", *_DEVICES),
        "the run": ("output_dir", "overwrite", "seed_everything"),
    },
    "audit": {
        "what is audited": ("model.selection", "audit.sides", "audit.runs", "audit.seeds"),
        "how variants are trained": ("model.model_name_or_path", *_TRAINING),
        "the runs": ("output_dir", "overwrite", "bank", "parallel", "dry_run"),
    },
}
"""Verb -> group -> the options that its short help shows."""
_LEFT = 38
IN_OUR_WORDS = {
    "optimizer": "A torch optimizer by name, AdamW at 2e-5 unless given; its options follow, such as --optimizer.lr",
    "lr_scheduler": "A schedule by name, constant unless given; its options follow, as --lr_scheduler.KEY",
    "trainer.max_epochs": "Epochs to train",
    "trainer.accumulate_grad_batches": "Batches whose gradients make one step of the optimizer",
    "trainer.accelerator": "cpu, gpu, mps, or auto for what there is",
    "trainer.devices": "How many devices, or which",
    "trainer.strategy": "auto; for several devices ddp (all of the model on each), fsdp2 (a shard) or hsdp",
    "seed_everything": "Seed of every draw and order",
}
"""Options of Lightning's whose help is long, or says little -> what they do here."""


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether the short help is asked for."""
    return bool({"-h", "--help"} & set(arguments)) and not wants_all(arguments)


def wants_all(arguments: Sequence[str]) -> bool:
    """Whether every option's help is asked for."""
    return any(of in ("-h", "--help") and following == "all" for of, following in pairwise(arguments))


def short_help(parser: ArgumentParser, verb: str) -> str:
    """The usage, the options of `FIRST` with what they do and take, and where the others are."""
    width = min(shutil.get_terminal_size().columns, 110)
    actions = {action.dest: action for action in parser._actions}
    parts = [
        f"usage: dualsft {verb} --config FILE [--KEY VALUE ...]",
        textwrap.fill(str(parser.description), width),
        *(
            "\n".join([f"{title}:", *(_option(actions[key], width) for key in keys)])
            for title, keys in FIRST[verb].items()
        ),
        "A configuration may hold any of these, with the dots as sections or as they are.\n"
        f"  {f'dualsft {verb} --help all':<{_LEFT - 2}}every option\n"
        f"  {f'dualsft {verb} --print_config':<{_LEFT - 2}}a configuration of all, with their help\n"
        f"  {'dualsft --help':<{_LEFT - 2}}the commands, and flags that all take",
    ]
    return "\n\n".join(parts)


def _option(action: Action, width: int) -> str:
    left = f"  --{action.dest} {_values(action)}".rstrip()
    told = textwrap.wrap(_help(action), width - _LEFT) or [""]
    first = [f"{left:<{_LEFT}}{told[0]}"] if len(left) < _LEFT else [left, f"{'':<{_LEFT}}{told[0]}"]
    return "\n".join([*first, *(f"{'':<{_LEFT}}{line}" for line in told[1:])])


def _help(action: Action) -> str:
    """The first sentence of an option's help, the values or names that it takes, and its default."""
    told = IN_OUR_WORDS.get(action.dest, str(action.help)).replace("``", "")
    text = re.split(r"(?<=\w{3})\.\s", f"{' '.join(told.split())} ")[0].rstrip(". ")
    kind = getattr(action, "_typehint", None)
    literals = [part for part in (kind, *get_args(kind)) if get_origin(part) is Literal]
    choices = [str(value) for part in literals for value in get_args(part)]
    names = sorted({point.name for point in entry_points(group=NAMED.get(action.dest, "none"))})
    taken = f" [{', '.join(names or choices)}]" if names or choices else ""
    return f"{text}{taken}{_default(action.default)}"


def _default(value: Any) -> str:
    """A default in brackets; nothing for those that say nothing."""
    if not isinstance(value, (str, int, float)) or value == "" or value is False:
        return ""
    return f" (default: {value!r})" if isinstance(value, str) and value.split() != [value] else f" (default: {value})"


def _values(action: Any) -> str:
    if isinstance(action, ActionYesNo):
        return ""
    kind = getattr(action, "_typehint", action.type)
    kinds = {get_origin(part) or part for part in (kind, *get_args(kind))}
    plain = {bool: "true|false", int: "N", float: "X"}
    numbers = [plain[of] for of in (bool, int, float) if of in kinds]
    return numbers[-1] if numbers and str not in kinds else "NAME" if action.dest in NAMED else "VALUE"
