"""What importing a part of the package does not import: help and the small verbs start fast."""

import subprocess
import sys

import pytest

import dualsft

HEAVY = ("lightning", "transformers", "datasets", "jsonargparse", "pyarrow", "datasketch", "torchmetrics", "pandas")


def imported(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after a statement."""
    command = f"{statement}\nimport sys\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


LIGHT = """
import dualsft.scorers
import dualsft.allocators
import dualsft.data.layout
from dualsft.cli import run; run(['plugins'])
from dualsft import Scorer, DataAllocator
"""


@pytest.mark.slow
def test_light_parts_import_torch_at_most() -> None:
    """Scorers, allocators, layouts and the list of plugins need no other large library than torch."""
    assert not imported(LIGHT) & set(HEAVY)


def test_help_imports_no_library() -> None:
    """Neither does the package itself."""
    assert not imported("from dualsft.cli import run; run(['--help'])") & {*HEAVY, "torch", "numpy"}


@pytest.mark.slow
def test_selections_are_opened_without_a_trainer() -> None:
    """Whoever reads a selection does not wait for what would make or train one."""
    assert not imported("from dualsft import load_selection; load_selection") & {"lightning", "datasets", "pandas"}


@pytest.mark.slow
def test_configurations_are_printed_without_data_libraries() -> None:
    """A verb's options are known without the library that loads data sets, and without the code of any model."""
    printing = "from dualsft.cli import run\ntry: run(['select', '--print_config'])\nexcept SystemExit: pass"
    light = "import sys; assert 'transformers.modeling_utils' not in sys.modules"
    assert not imported(f"{printing}\n{light}") & {"datasets", "pandas"}


def test_public_names_are_listed_before_they_are_imported() -> None:
    """Every public name is in `dir`, comes from the module that defines it, and no other name is there."""
    assert set(dualsft.__all__) <= set(dir(dualsft))
    assert all(getattr(dualsft, name).__name__ == name for name in dualsft.__all__)
    with pytest.raises(AttributeError, match="module 'dualsft' has no attribute 'Scorers'"):
        _ = dualsft.Scorers
