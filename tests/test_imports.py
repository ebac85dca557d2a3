"""What importing a part of the package does not import: help and the small verbs start fast."""

import subprocess
import sys

import pytest

import dualsft

HEAVY = ("lightning", "transformers", "datasets", "jsonargparse", "pyarrow", "datasketch", "torchmetrics", "pandas")


STEPS = {
    "help": "run(['--help'])",
    "light parts": """
import dualsft.scorers
import dualsft.allocators
import dualsft.data.layout
run(['plugins'])
from dualsft import Scorer, DataAllocator
""",
    "a selection": "from dualsft import load_selection; load_selection",
    "a configuration": """
try: run(['select', '--print_config'])
except SystemExit: pass
""",
}
"""What one interpreter does, one after the other."""


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """The modules that a fresh interpreter holds after each step; those of the steps before it are among them."""
    program = "import sys\nfrom dualsft.cli import run\n"
    program += "".join(f"{step}\nprint('\\nHELD', *sys.modules)\n" for step in STEPS.values())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    held = [set(line.split()) for line in done.stdout.splitlines() if line.startswith("HELD ")]
    return dict(zip(STEPS, held, strict=True))


def test_help_imports_no_library(imported: dict[str, set[str]]) -> None:
    """Neither does the package itself."""
    assert not imported["help"] & {*HEAVY, "torch", "numpy"}


@pytest.mark.slow
def test_light_parts_import_torch_at_most(imported: dict[str, set[str]]) -> None:
    """Scorers, allocators, layouts and the list of plugins need no other large library than torch."""
    assert not imported["light parts"] & set(HEAVY)


@pytest.mark.slow
def test_selections_are_opened_without_a_trainer(imported: dict[str, set[str]]) -> None:
    """Whoever reads a selection does not wait for what would make or train one."""
    assert not imported["a selection"] & {"lightning", "datasets", "pandas"}


@pytest.mark.slow
def test_configurations_are_printed_without_data_libraries(imported: dict[str, set[str]]) -> None:
    """A verb's options are known without the library that loads data sets, and without the code of any model."""
    assert not imported["a configuration"] & {"datasets", "pandas", "transformers.modeling_utils"}


def test_public_names_are_listed_before_they_are_imported() -> None:
    """Every public name is in `dir`, comes from the module that defines it, and no other name is there."""
    assert set(dualsft.__all__) <= set(dir(dualsft))
    assert all(getattr(dualsft, name).__name__ == name for name in dualsft.__all__)
    with pytest.raises(AttributeError, match="module 'dualsft' has no attribute 'Scorers'"):
        _ = dualsft.Scorers
