"""Reads a grid from a YAML file; what is wrong is told with its place, in one sentence."""

from argparse import ArgumentError
from dataclasses import MISSING, asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from dualsft.errors import UserError, naming
from dualsft.experiments.grid import Budgets, Evaluation, Grid, Method
from dualsft.storage.paths import expanded

T = TypeVar("T")
_TAKES = {
    "select": "settings of `dualsft select` by dotted key",
    "fit": "settings of `dualsft fit` by dotted key",
    "validate": "settings of `dualsft validate` by dotted key",
    "data": "settings of `dualsft select` by dotted key, or null",
    "parameters": "settings of `dualsft select` by dotted key, or null",
    "adapter": "a configuration of PEFT, such as {peft_type: LORA}",
    "examples": "chosen, random, lowest or all",
    "weights": "chosen, random, lowest or all",
    "group": "plasticity or stability",
    "max_new_tokens": "a whole number",
    "forgetting": "true or false",
    "tasks": "names of tasks, separated by commas or as a list",
    "metric": "the name of a metric",
    "seeds": "a list of whole numbers",
    "config": "a file, or a list of files",
    "patterns": "true or false",
}
"""Key -> what it takes, in plain words."""
_BUDGET = "a fraction in (0, 1], a count, or null for all"


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, after a look at its keys."""
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else key
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                raise UserError(f"line {line} gives {name!r} a second time; rename or drop one of the two.")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_grid(file: str) -> Grid:
    """The grid in a file; paths of configurations, data sets and task folders in it start at the file's folder.

    Raises:
        UserError: if it cannot be read, has unknown or repeated keys, or values that no grid has.
    """
    path = Path(expanded(file))
    try:
        with naming(str(path)):
            given = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"The grid {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"The grid {path} is not YAML: {' '.join(str(error).split())}.") from error
    with naming(str(path)):
        return grid_from(given, path.parent)


def grid_from(given: Any, folder: Path) -> Grid:
    """The grid in a loaded file, whose paths start at a folder."""
    keys = _known(given, Grid, "the grid")
    needed = [of.name for of in fields(Grid) if of.default is of.default_factory is MISSING]
    if missing := [name for name in needed if keys.get(name) is None]:
        raise UserError(f"the grid has no {missing[0]}; it needs {', '.join(needed)}.")
    config, budgets = keys["config"], keys["budgets"]
    if not isinstance(budgets, list):
        raise UserError("budgets does not take what is given; give a list of {data: ..., parameters: ...}.")
    return Grid(
        config=[_found(file, folder) for file in _texts(config)],
        methods={name: _typed(of, Method, f"methods.{name}") for name, of in _named(keys["methods"], "methods")},
        budgets=[_typed(of, Budgets, f"budgets[{k}]") for k, of in enumerate(budgets)],
        seeds=_parsed("seeds", keys["seeds"], list[int], ""),
        evaluations={
            name: _with_paths(_typed(of, Evaluation, f"evaluations.{name}"), folder)
            for name, of in _named(keys.get("evaluations") or {}, "evaluations")
        },
        patterns=_parsed("patterns", keys.get("patterns", False), bool, ""),
    )


def as_yaml(grid: Grid) -> str:
    """The grid as a file that `read_grid` reads, in which nothing that has its default is written."""
    shown = {key: value for key, value in asdict(grid).items() if value}
    for name, kind in (("methods", Method), ("evaluations", Evaluation)):
        default = asdict(kind()) if kind is Method else {f.name: f.default for f in fields(kind)} | {"validate": {}}
        if name in shown:
            shown[name] = {key: {k: v for k, v in of.items() if v != default[k]} for key, of in shown[name].items()}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def _named(given: Any, place: str) -> list[tuple[str, Any]]:
    """The parts of a mapping of names; an empty part is an empty mapping."""
    if not isinstance(given, dict):
        raise UserError(f"{place} gives no names with settings each.")
    for name in given:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{place} has the name {name!r}, which is not text; put it in quotes.")
    return [(name, {} if of is None else of) for name, of in given.items()]


def _known(given: Any, kind: Any, place: str) -> dict[str, Any]:
    """A mapping whose keys are fields of a class."""
    known = [field.name for field in fields(kind)]
    if not isinstance(given, dict):
        raise UserError(f"{place} is empty or no mapping; it has the keys {', '.join(known)}.")
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            meant = f", perhaps {near[0]}" if near else ""
            raise UserError(f"{place} has no key {key!r}{meant}; it knows {', '.join(known)}.")
    return given


def _typed(given: Any, kind: type[T], place: str) -> T:
    """An instance of a dataclass from a mapping."""
    types = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    values = {key: _parsed(key, value, types[key], f"{place}.") for key, value in _known(given, kind, place).items()}
    with naming(place):
        return kind(**values)


def _parsed(key: str, value: Any, kind: Any, place: str) -> Any:
    """A value of a type; jsonargparse says whether it is one."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{key}", type=kind)
    try:
        return parser.parse_object({key: value})[key]
    except ArgumentError as error:
        takes = _BUDGET if place.startswith("budgets") else _TAKES.get(key, "text")
        raise UserError(f"{place}{key} does not take {value!r}; it takes {takes}.") from error


def _texts(config: Any) -> list[str]:
    """The files of the configuration."""
    return _parsed("config", [config] if isinstance(config, str) else config, list[str], "")


def _found(path: str, folder: Path) -> str:
    """A path in the grid's folder if there is one, otherwise as it is: elsewhere, or the id of a data set."""
    near = folder / expanded(path)
    return str(near.resolve()) if near.exists() else path


def _with_paths(evaluation: Evaluation, folder: Path) -> Evaluation:
    """An evaluation with the path of its data found."""
    if evaluation.data is None:
        return evaluation
    return Evaluation(**{**vars(evaluation), "data": _found(evaluation.data, folder)})
