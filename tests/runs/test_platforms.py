"""The package on systems other than POSIX, simulated."""

import subprocess
import sys

import pytest

IMPORTS = """
import builtins, importlib, pkgutil

usual = builtins.__import__


def without(name, globals=None, *args, **kwargs):
    importer = (globals or {}).get("__name__", "")
    if name in ("fcntl", "grp", "pwd", "resource", "termios") and importer.startswith("dualsft"):
        raise ModuleNotFoundError(name)
    return usual(name, globals, *args, **kwargs)


builtins.__import__ = without
import dualsft

for module in pkgutil.walk_packages(dualsft.__path__, "dualsft."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.mark.heavy
def test_every_module_is_imported_without_posix() -> None:
    """Where `fcntl`, `resource` and their like do not exist for the package's own code."""
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
