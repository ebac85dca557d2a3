"""What only a GPU can tell, in one run of eight minutes at most on one card, without a network.

    python benchmarks/gpu.py --output gpu.json                   all sections, the most decisive ones first
    python benchmarks/gpu.py --sections correctness strategies   these alone
    python benchmarks/gpu.py --render gpu.json                   the page of an earlier run's figures

Models have random weights at the shapes of 1, 3 and 8 billion weights in ``configs/shapes/``. The file is written anew
after every figure. A section that fails, or takes too long, is told and stops no other. Without a GPU a miniature of
most sections runs on the CPU, which shows that they work and measures nothing.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_checks import SECTIONS
from gpu_checks.page import page
from gpu_checks.results import Outcome, Results, read_results
from gpu_checks.worker import Runner, work

_BEGIN = time.monotonic()


def run(options: argparse.Namespace) -> int:
    """Run the sections that are asked for; how many of them were not done."""

    def command(names: Sequence[str]) -> list[str]:
        return [sys.executable, __file__, "--device", options.device, "--worker", *names]

    names = options.sections or [n for n, of in SECTIONS.items() if of.miniature or options.device == "cuda"]
    date = time.strftime("%Y-%m-%d")
    results = Results(options.output, {"device": options.device, "date": date, "budget in seconds": options.seconds})
    results.sections = {name: Outcome(SECTIONS[name].what) for name in names}
    results.write()
    limits = {name: section.limit for name, section in SECTIONS.items()}
    Runner(results, command, limits, options.seconds - (time.monotonic() - _BEGIN)).run(names)
    print(f"\n{page(results)}")
    return sum(found.outcome != "done" for found in results.sections.values())


def main() -> None:
    """Run the sections, or print a page; or, in a process of its own, run them and tell of each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="for all sections together")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="these alone, in this order")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cuda where there is a GPU")
    parser.add_argument("--render", type=Path, metavar="FILE", help="print the page of an earlier run's figures")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if options.worker:
        work(options.worker, options.device)
        return
    if options.render:
        print(page(read_results(options.render)), end="")
        return
    if unknown := [name for name in options.sections or [] if name not in SECTIONS]:
        parser.error(f"no section is called {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.device is None:
        import torch  # takes seconds, which the page of an earlier run need not

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cpu":
        print("No GPU: a miniature of the sections runs on the CPU, and its times mean nothing.", flush=True)
    raise SystemExit(run(options) > 0)


if __name__ == "__main__":
    main()
