"""`dualsft export`: from base and delta to the tuned model, back, and other forms of the same change.

A result that --overwrite replaces stays until the new one, written to a hidden folder next to it, is complete and moved
into place. After an interruption either the old or the new one is complete, and the same command starts again.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from safetensors import SafetensorError

from dualsft.commands.keys import check_options
from dualsft.commands.messages import quieten
from dualsft.commands.parsing import CONFIG, replay_of
from dualsft.commands.path_options import expand_paths
from dualsft.errors import UserError
from dualsft.export.checkpoints import Writer, prepare_apply, prepare_extract, prepare_revert
from dualsft.export.peft_adapter import prepare_peft
from dualsft.runs.folder import UNFINISHED, RunFolder, publish
from dualsft.storage.paths import real
from dualsft.storage.writing import sync_to_disk

DESCRIPTION = (
    "Takes the change that a fine-tune made from one form to another: a delta.safetensors, a Hugging Face folder, a "
    "PEFT adapter. All refuse weights that the delta was not made from."
)
OPTIONS = {
    "base": "The base model: a Hugging Face folder or hub id with safetensors weights.",
    "model": "The tuned model: a Hugging Face folder or hub id with safetensors weights.",
    "delta": "The delta.safetensors of a fit, or of export extract.",
}
WRITTEN = (
    *("config.json", "generation_config.json", "README.md", "model-*-of-*.safetensors", "adapter_*"),
    *("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("additional_chat_templates", "*processor_config.json", "chat_template.json"),
)
"""Names of what these commands write, the tokenizer's files among them."""


class Form(NamedTuple):
    """One subcommand; without its last file a folder holds no result."""

    description: str
    prepare: Callable[..., Writer]
    options: tuple[str, ...]
    last: str


FORMS = {
    "apply": Form(
        "Base and delta to the tuned model: a Hugging Face folder, with tokenizer, generation settings and model card.",
        prepare_apply,
        ("base", "delta"),
        "config.json",
    ),
    "revert": Form(
        "Tuned model and delta back to the base model, with the old values of the changed weights from the base.",
        prepare_revert,
        ("model", "base", "delta"),
        "config.json",
    ),
    "extract": Form(
        "Two checkpoints of one model to the delta.safetensors that leads from one to the other.",
        prepare_extract,
        ("base", "model"),
        "delta.safetensors",
    ),
    "peft": Form(
        "Base and delta to a PEFT adapter (SHiRA), which PEFT loads onto the base.",
        prepare_peft,
        ("base", "delta"),
        "adapter_config.json",
    ),
}


def export_command(arguments: Sequence[str]) -> None:
    """Convert a change from one form to another; a mistake in the settings leaves the output folder as it was."""
    quieten()
    if not arguments or (not arguments[0].startswith("-") and arguments[0] not in FORMS):
        told = f"has no form {arguments[0]!r}; its" if arguments else "needs to know what to make; its"
        raise UserError(f"dualsft export {told} forms are {', '.join(FORMS)}.")
    parser, parsers = _parsers()
    if arguments[0] in FORMS:
        check_options(parsers[arguments[0]], f"dualsft export {arguments[0]}", arguments[1:])
    config = parser.parse_args(list(arguments))
    name, options = config.form, expand_paths(config[config.form])
    for key in (*FORMS[name].options, "output_dir"):
        if not options[key]:
            raise UserError(f"--{key} is not given; `dualsft export {name} --help` says what it is.")
    try:
        _export(FORMS[name], options, replay_of(parsers[name], options))
    except KeyboardInterrupt as stop:
        raise UserError("The export was interrupted; run it again.") from stop


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The command's parser, and that of each form."""
    parser = ArgumentParser(prog="dualsft export", description=DESCRIPTION, exit_on_error=False)
    forms = parser.add_subcommands(dest="form")
    parsers = {}
    for name, form in FORMS.items():
        parsers[name] = own = ArgumentParser(description=form.description, exit_on_error=False)
        own.add_argument("-c", *CONFIG[:1], action="config", help="Path to a configuration file in yaml format.")
        for option in form.options:
            own.add_argument(f"--{option}", type=str, default="", help=OPTIONS[option])
        own.add_argument("--output_dir", type=str, default="", help="Folder that the result is written to.")
        own.add_argument("--overwrite", action=ActionYesNo, default=False, help="Replace what --output_dir holds.")
        forms.add_subcommand(name, own, help=form.description)
    return parser, parsers


def _export(form: Form, options: Namespace, replay: str) -> None:
    given = {key: options[key] for key in form.options}
    folder = Path(options.output_dir)
    how: dict[str, Any] = {"inputs": tuple(given.values()), "resumable": False, "written": WRITTEN}
    run = RunFolder(folder, overwrite=options.overwrite, **how)
    full = _holds_a_result(folder)
    write = form.prepare(**given)
    identity = {"command": f"export to {form.last}", **given}
    try:
        if full:
            beside = RunFolder(_beside(folder), overwrite=True, **how)
            with _claimed(beside, identity) as staged:
                _make(staged, write, replay)
            run.claim(identity)
            publish(staged, folder, last=form.last)
        else:
            with _claimed(run, identity) as staged:
                _make(staged, write, replay)
                publish(staged, folder, last=form.last)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder} cannot be written ({reason}); choose another --output_dir.") from error
    if options.overwrite:
        shutil.rmtree(_beside(folder), ignore_errors=True)
    run.finish()
    print(f"wrote {folder}")


def _holds_a_result(folder: Path) -> bool:
    """Whether the folder has a finished result, which is kept until its replacement is complete."""
    full = folder.is_dir() and any(folder.iterdir()) and not (folder / UNFINISHED).is_dir()
    if full and os.path.ismount(folder):
        raise UserError(
            f"{folder} is where a drive is mounted, so that nothing can be written next to it before it is replaced; "
            "give --output_dir a folder in it."
        )
    return full


def _beside(folder: Path) -> Path:
    """The hidden folder, on the same drive, for a result that is to replace another."""
    place = real(folder)
    return place.with_name(f".{place.name}.partial")


@contextmanager
def _claimed(run: RunFolder, identity: Mapping[str, Any]) -> Iterator[Path]:
    """Claim a folder and yield where its results go; after a failure it is as it was, as nothing is worth resuming."""
    run.claim(identity)
    try:
        yield run.staging()
    except BaseException:
        run.release()
        raise


def _make(staged: Path, write: Writer, replay: str) -> None:
    """Write a result and sync it to the disk, so that only the move is left, which needs no space."""
    write(staged)
    (staged / "config.yaml").write_text(replay, encoding="utf-8")
    for path in staged.rglob("*"):
        if path.is_file():
            sync_to_disk(path)
