"""The command line: the table of its verbs, and its reports of errors.

A verb's module is imported when the verb is run, so that help and the small verbs start fast.
"""

import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pkgutil import resolve_name

from dualsft.commands.terminal import calm_libraries, tolerant_output

FLAGS = {
    "--debug": "show the whole traceback of an error, not its sentence alone",
    "--quiet": "show results and errors, and no progress",
}
"""Flags that every command takes, anywhere on its line."""

VERBS = {
    "select": ("score every example and every weight, and choose a subset of each", "select:SelectCLI.command"),
    "fit": ("fine-tune the chosen weights on the chosen examples", "fit:FitCLI.command"),
    "plan": ("tell what select or fit will hold in memory, before anything is loaded", "plan:plan_command"),
    "validate": ("evaluate a checkpoint on data or tasks", "validate:ValidateCLI.command"),
    "allocate": (
        "choose anew from the scores of a finished selection, with other budgets or allocators",
        "allocate:allocate_command",
    ),
    "audit": (
        "train variants of a selection, to see how far its scores can be trusted",
        "audit:AuditCLI.command",
    ),
    "export": ("apply, revert and extract deltas; write a PEFT adapter", "export:export_command"),
    "compare": (
        "compare methods of selection under budgets and seeds: each trained and evaluated alike",
        "compare:compare_command",
    ),
    "report": ("show what was chosen, trained and measured, as one page for the browser", "report:report_command"),
    "plugins": ("list the registered scorers, paths and allocators", "plugins:plugins_command"),
    "quickstart": ("run the whole job on an embedded model and embedded data", "quickstart:quickstart_command"),
}
"""Verb -> one line of help, and where in `dualsft.commands` the function is that runs it on the arguments after it."""


def run(arguments: Sequence[str]) -> None:
    """Run one verb on its arguments, as typed without the program's name.

    Raises:
        UserError: on a mistake in the input or the settings.
        ArgumentError: on options that cannot be parsed.
        SystemExit: after a verb has printed its help or its configuration.
    """
    verb, *rest = _verb_first(arguments) or [""]
    if verb == "help" and rest:
        verb, rest = rest[0], ["--help"]
    if verb in VERBS:
        resolve_name(f"dualsft.commands.{VERBS[verb][1]}")(rest)
    elif verb in ("-h", "--help", "help"):
        print(_help())
    elif verb == "--version":
        print(f"dualsft {version('dualsft')}")
    elif not verb:
        print(_help(), file=sys.stderr)
        sys.exit(2)
    elif verb.startswith("-"):
        raise ArgumentError(None, f"name a command before {verb}; the commands are {', '.join(VERBS)}.")
    else:
        from dualsft.errors import UserError  # imports torch

        (meant,) = get_close_matches(verb, VERBS, n=1) or [""]
        advice = f"did you mean {meant}? Its commands" if meant else "its commands"
        raise UserError(f"dualsft has no command {verb!r}; {advice} are {', '.join(VERBS)}.")


def _verb_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with configurations that are given before the verb behind it, where its parser takes them."""
    before: list[str] = []
    rest = list(arguments)
    while rest and rest[0].split("=")[0] in ("--config", "-c"):
        count = 1 if "=" in rest[0] else 2
        before, rest = [*before, *rest[:count]], rest[count:]
    return [*rest[:1], *before, *rest[1:]] if rest else before


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {line}" for verb, (line, _) in VERBS.items())
    flags = "\n".join(f"  {flag:<{width}}  {line}" for flag, line in FLAGS.items())
    return (
        "usage: dualsft COMMAND [options]\n\n"
        "Choose what to train on and what to train.\n\n"
        f"commands:\n{verbs}\n\n"
        "options:\n"
        f"  {'-h, --help':<{width}}  show this and exit; `dualsft COMMAND --help` shows a command's options\n"
        f"  {'--version':<{width}}  show the version and exit\n{flags}"
    )


def main(run: Callable[[Sequence[str]], None] = run) -> None:
    """Run the console script: a user's mistake ends in one sentence and exit code 1, 2 for options, 130 for Ctrl-C.

    Args:
        run: What is run on the arguments of the process, without the flags.
    """
    arguments = [argument for argument in sys.argv[1:] if argument not in FLAGS]
    debug, quiet = (flag in sys.argv[1:] for flag in FLAGS)
    with tolerant_output(), calm_libraries(quiet):
        try:
            run(arguments)
        except (Exception, KeyboardInterrupt) as error:
            from dualsft.commands.messages import explanation, is_told_by_another_rank  # imports torch
            from dualsft.sharding.groups import is_distributed
            from dualsft.sharding.last_words import leave_job

            explained = explanation(error)
            if explained is None and not is_distributed():
                raise
            if not is_told_by_another_rank(error):
                if explained is None:
                    sys.excepthook(type(error), error, error.__traceback__)
                else:
                    if debug:
                        traceback.print_exception(error)
                    print(explained[0], file=sys.stderr, flush=True)
            leave_job()
            sys.exit(explained[1] if explained else 1)
