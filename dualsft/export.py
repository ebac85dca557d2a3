"""`dualsft export`: from base and delta to the tuned model, back, and other forms of the same change."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from dualsft.arguments import CONFIG
from dualsft.cli import quieten
from dualsft.errors import UserError
from dualsft.finetune.checkpoints import Writer, prepare_apply, prepare_extract, prepare_revert
from dualsft.finetune.peft_adapter import prepare_peft
from dualsft.run_folder import RunFolder, publish

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
    "additional_chat_templates",
)
"""Names of what these commands write, the tokenizer's files among them."""


class Form(NamedTuple):
    """One subcommand."""

    description: str
    prepare: Callable[..., Writer]
    options: tuple[str, ...]
    last: str
    """What seals the result."""


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
    """Take a change from one form to another.

    Args:
        arguments: Which, then its options.

    Raises:
        UserError: on a mistake in the input or the settings; the output folder is then as it was.
        ArgumentError: on options that cannot be parsed.
    """
    quieten()
    if not arguments or (not arguments[0].startswith("-") and arguments[0] not in FORMS):
        told = f"has no form {arguments[0]!r}; its" if arguments else "needs to know what to make; its"
        raise UserError(f"dualsft export {told} forms are {', '.join(FORMS)}.")
    parser, parsers = _parsers()
    config = parser.parse_args(list(arguments))
    name, options = config.form, config[config.form]
    for key in (*FORMS[name].options, "output_dir"):
        if not options[key]:
            raise UserError(f"--{key} is not given; `dualsft export {name} --help` says what it is.")
    replay = parsers[name].dump(Namespace(**{**vars(options), "overwrite": False}), skip_none=False)
    try:
        _export(FORMS[name], options, replay)
    except KeyboardInterrupt as stop:
        raise UserError("The export was interrupted and left nothing behind; run it again.") from stop


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
    folder = Path(options.output_dir).expanduser()
    inputs = tuple(given.values())
    run = RunFolder(folder, overwrite=options.overwrite, inputs=inputs, resumable=False, written=WRITTEN)
    write = form.prepare(**given)
    run.claim({"command": f"export to {form.last}", **given})
    try:
        staged = run.staging()
        write(staged)
        (staged / "config.yaml").write_text(replay, encoding="utf-8")
        publish(staged, folder, last=form.last)
    except OSError as error:
        run.release()
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --output_dir.") from error
    except BaseException:  # nothing of this is worth resuming
        run.release()
        raise
    run.finish()
    print(f"wrote {folder}")
