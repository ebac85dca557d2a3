"""The layers of the package: who may import whom, and which libraries the mathematics does without."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dualsft

ROOT = Path(dualsft.__file__).parent
LAYERS = (
    {"errors", "storage"},
    {"registry", "needs", "scorers", "paths", "models", "data"},
    {"sharding"},
    {"allocators", "runs", "objectives", "training", "export"},
    {"matrix", "evaluation"},
    {"selection"},
    {"finetune", "trainer", "quickstart"},
    {"experiments"},
    {"reports", "plans"},
    {"cli", "commands"},
    {"__init__", "__main__"},
)
"""From the ground up: a layer imports those below it, and its own."""
RANK = {name: k for k, layer in enumerate(LAYERS) for name in layer}
MATHEMATICS = ("allocators", "matrix", "objectives", "paths", "scorers", "training")
KEYLESS = ("allocators", "matrix", "objectives", "paths", "scorers", "training")
"""The rooms whose messages name no configuration key."""
KEY = re.compile(r"(?<!dualsft\.)\b(model|data|trainer)\.[a-z_]+")


def _imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules that a file imports, each as the parts of its name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((*node.module.split("."), alias.name) for alias in node.names)


def _rooms(top: str) -> Iterator[Path]:
    yield from (ROOT / top).rglob("*.py") if (ROOT / top).is_dir() else [ROOT / f"{top}.py"]


def test_every_module_has_a_layer() -> None:
    """Nobody adds a folder or a loose module without saying which layer it belongs to."""
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found == set(RANK)


@pytest.mark.parametrize("room", sorted(set(RANK) - {"__init__"}))
def test_imports_point_downwards(room: str) -> None:
    """A module imports from its own layer and those below."""
    for path in _rooms(room):
        for top, *inner in _imports(path):
            if top == "dualsft" and inner and inner[0] in RANK:
                assert RANK[inner[0]] <= RANK[room], f"{path.relative_to(ROOT)} imports {inner[0]}"


@pytest.mark.parametrize("room", MATHEMATICS)
def test_mathematics_is_free_of_frameworks(room: str) -> None:
    """Mathematics imports no Lightning, no torch.distributed and no command line."""
    for path in _rooms(room):
        for name in _imports(path):
            assert name[0] not in ("lightning", "jsonargparse"), path
            assert name[:2] != ("torch", "distributed"), path
        assert "model.step_size" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("room", KEYLESS)
def test_mathematics_names_no_configuration_key(room: str) -> None:
    """Whoever configures it by keys says which one to set; docstrings may name modules, as dualsft.data.layout."""
    for path in _rooms(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not (key := KEY.search(node.value)), f"{path}:{node.lineno} names {key}"


def test_only_sharding_talks_to_other_processes() -> None:
    """torch.distributed is imported in one room."""
    for path in ROOT.rglob("*.py"):
        if "sharding" not in path.parts:
            assert all(name[:2] != ("torch", "distributed") for name in _imports(path)), path
