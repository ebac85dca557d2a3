"""What starting the command line costs, against importing the libraries that it stands on.

    python benchmarks/import_time.py --repetitions 5

Prints the median CPU seconds of each command, run by turns in processes of their own, their ratios to
`import torch, lightning, transformers`, and for those that need no more than torch the ratio to `import torch`. CPU
seconds, not time on the clock, so that a busy machine changes little.
"""

import argparse
import os
import statistics
import subprocess
import sys

DUALSFT = ["-m", "dualsft"]
TORCH, LIGHTNING = "import torch", "import torch, lightning, transformers"
GOALS = {
    "dualsft --help": ([*DUALSFT, "--help"], TORCH, 0.1),
    "dualsft plugins": ([*DUALSFT, "plugins"], TORCH, 1.1),
    "import dualsft.scorers": (["-c", "import dualsft.scorers"], TORCH, 1.1),
    "dualsft select --print_config": ([*DUALSFT, "select", "--print_config"], LIGHTNING, 1.15),
}
"""What is measured -> how Python is called for it, what it is compared with, and the largest ratio to be had."""


def cpu_seconds(arguments: list[str]) -> float:
    """User and system seconds that a Python process takes."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each command (default: %(default)s)")
    repetitions = parser.parse_args().repetitions
    commands = {base: ["-c", base] for base in (TORCH, LIGHTNING)} | {name: goal[0] for name, goal in GOALS.items()}
    for arguments in commands.values():  # bytecode is compiled, and files are in the cache
        cpu_seconds(arguments)
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repetitions):
        for name, arguments in commands.items():
            seconds[name].append(cpu_seconds(arguments))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for base in (TORCH, LIGHTNING):
        print(f"{base:<38} {medians[base]:6.2f} s")
    for name, (_, base, goal) in GOALS.items():
        told = [f"{medians[name] / medians[of]:5.2f} of `{of}`" for of in dict.fromkeys((LIGHTNING, base))]
        print(f"{name:<38} {medians[name]:6.2f} s  {', '.join(told)} (goal: {goal})")


if __name__ == "__main__":
    main()
