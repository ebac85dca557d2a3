"""`dualsft plan`: what a selection or a fit will hold, keep and compute, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jsonargparse import ActionYesNo, ArgumentParser

from dualsft.commands.keys import knows
from dualsft.commands.plan_job import known_to, make_job, parsed
from dualsft.commands.plan_probe import run_probe
from dualsft.errors import UserError
from dualsft.plans.job import Job
from dualsft.plans.phase import Plan
from dualsft.plans.probe import probe_options, probe_text
from dualsft.plans.remedies import plan_job, remedies
from dualsft.plans.scoring import can_be_planned
from dualsft.plans.sizes import parse_memory
from dualsft.plans.text import (
    UNKNOWN,
    elsewhere,
    heading,
    is_safe,
    phase_table,
    remedy_table,
    verdict,
    work,
)

DESCRIPTION = (
    "Tells what a selection or a fit will hold in memory, phase by phase, whether it fits, and what to change where it "
    "does not. Takes the configuration and the options of select and of fit; reads no weights and no data, only the "
    "model's config.json, unless a probe is asked for."
)


@dataclass(frozen=True)
class PlanOptions:
    """What is asked of a plan.

    Args:
        verb: The command that is planned.
        memory: Memory of a card, such as 80GiB.
        supervised: Share of the tokens that are supervised; 1 is the most that a batch can take.
        pool_tokens: Tokens of data.train, for the work that it takes.
        validation_tokens: Tokens of data.validation, likewise.
        throughput: TFLOP/s that a card reaches, for the time that the work takes.
        probe: Read the data, load the model, and run a few batches of each phase here, for its peak and its time.
    """

    verb: Literal["select", "fit"] = "select"
    memory: str | None = None
    supervised: float = 1.0
    pool_tokens: float | None = None
    validation_tokens: float | None = None
    throughput: float | None = None
    probe: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.supervised <= 1:
            raise UserError(f"--supervised is {self.supervised}; give a share above 0, up to 1.")
        for name in ("pool_tokens", "validation_tokens", "throughput"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"--{name} is {value}; give a positive number.")


def plan_command(arguments: Sequence[str]) -> None:
    """Print the plan, and what a probe shows."""
    parser = ArgumentParser(prog="dualsft plan", description=DESCRIPTION, exit_on_error=False)
    parser.add_argument("--for", dest="verb", choices=["select", "fit"], default="select", help="The command planned.")
    probe = "Read the data, load the model, and run a few batches of each phase here: its peak, and its time."
    parser.add_argument("--probe", action=ActionYesNo, default=False, help=probe)
    parser.add_class_arguments(PlanOptions, skip={"verb", "probe"})
    own, others = _split(parser, arguments)
    options = PlanOptions(**vars(parser.parse_args(own)))
    limit = parse_memory(options.memory) if options.memory else None
    tokens = options.pool_tokens, options.validation_tokens
    job = make_job(options.verb, others, options.supervised, *tokens, not options.probe, limit)
    # what cannot be planned can be tried
    plan = None if options.probe and not can_be_planned(job) else plan_job(job)
    print(heading(job) if plan is None else _text(job, plan, limit, options.throughput), flush=True)
    if options.probe:
        given = known_to(options.verb, others)
        seen = run_probe(options.verb, [*given, *probe_options(job)], parsed(options.verb, given).output_dir)
        print(f"\n{probe_text(job, plan, seen)}")


def _split(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of a plan, and those of the command that is planned."""
    own: list[str] = []
    others: list[str] = []
    into = others
    for argument in arguments:
        if argument.startswith("-"):
            key = argument.lstrip("-").partition("=")[0]
            into = own if key in ("h", "help", "for") or knows(parser, key) else others
        into.append(argument)
    return own, others


def _text(job: Job, plan: Plan, limit: int | None, throughput: float | None) -> str:
    speed = None if throughput is None else throughput * 1e12
    lines = [*elsewhere(plan), *work(plan, speed, job.machine.ranks), UNKNOWN]
    parts = [heading(job), phase_table(plan), verdict(plan, limit), "\n".join(lines)]
    if limit is not None and not is_safe(plan, limit):
        parts.append(f"What to change, the cheapest first:\n\n{remedy_table(remedies(job, limit), limit)}")
    return "\n\n".join(parts)
