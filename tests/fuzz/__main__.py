"""``python -m tests.fuzz NAME --cases N [--start S]``: run one fuzzer, or all."""

import argparse
import time

from tests.fuzz.fuzzers import FUZZERS

parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
parser.add_argument("name", nargs="*", choices=[*FUZZERS, []], help="Which fuzzers to run; all of them by default.")
parser.add_argument("--cases", type=int, default=1000, help="How many cases each tries.")
parser.add_argument("--start", type=int, default=0, help="Where the pseudo-random cases start: others for each number.")
arguments = parser.parse_args()
for name in arguments.name or FUZZERS:
    began = time.perf_counter()
    outcomes = FUZZERS[name].run(arguments.cases, arguments.start)
    told = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items())
    print(f"{name:<12} {told} in {time.perf_counter() - began:.0f} s", flush=True)
