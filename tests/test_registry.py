from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualsft import registry
from dualsft.errors import UserError
from dualsft.registry import class_path, registered

SCORERS = "dualsft.scorers"


def point(name: str, value: str, package: str, group: str = SCORERS) -> EntryPoint:
    """An entry point of an installed package."""
    made = EntryPoint(name, value, group)
    vars(made)["dist"] = SimpleNamespace(name=package, version="1.0")
    return made


OURS = point("first_order", "dualsft.scorers:FirstOrder", "dualsft")
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts entry points in the place of those that are installed."""

    def put(*points: EntryPoint) -> None:
        def entry_points(**which: Any) -> EntryPoints:
            return EntryPoints(points).select(**which)

        monkeypatch.setattr(registry, "entry_points", entry_points)

    return put


def test_the_built_in_names_are_registered() -> None:
    """This package's own scorer, path and allocators are found by name as any other, and load."""
    assert class_path(SCORERS, "first_order") == "dualsft.scorers.FirstOrder"
    assert class_path("dualsft.paths", "target") == "dualsft.paths.TargetPath"
    assert class_path("dualsft.parameter_allocators", "global_top_k") == "dualsft.allocators.GlobalTopK"
    assert class_path("dualsft.data_allocators", "top_k") == "dualsft.allocators.TopK"
    ours = [entry for entry in registered() if entry.package.startswith("dualsft ")]
    assert {entry.group for entry in ours} == set(registry.GROUPS)
    assert all(entry.description and not entry.problem for entry in ours)


def test_only_what_is_named_is_imported(install: Install) -> None:
    """A name gives an import path; another package's module need not even exist."""
    install(OURS, point("mine", "no_such_module.deep:Mine", "plugin"))
    assert class_path(SCORERS, "first_order") == "dualsft.scorers.FirstOrder"


def test_a_class_path_needs_no_registration(install: Install) -> None:
    """A dotted path is taken as it is, and one that cannot be used is refused with the reason."""
    install()
    assert class_path(SCORERS, "dualsft.scorers.FirstOrder") == "dualsft.scorers.FirstOrder"
    with pytest.raises(UserError, match=r"no_such.Thing cannot be used in dualsft.scorers: ModuleNotFoundError: No mo"):
        class_path(SCORERS, "no_such.Thing")
    with pytest.raises(UserError, match=r"json.JSONDecoder cannot be used .*: it is no subclass of dualsft.scorers.Sc"):
        class_path(SCORERS, "json.JSONDecoder")


def test_unknown_names_are_told_the_known_ones(install: Install) -> None:
    """The error names the nearest, and lists what the group holds."""
    install(OURS, point("mine", "m:Mine", "plugin"), point("other", "m:O", "plugin", "dualsft.data_allocators"))
    with pytest.raises(
        UserError,
        match=r"'firstorder' is not registered in dualsft.scorers \(did you mean first_order\?\); known names: fir",
    ):
        class_path(SCORERS, "firstorder")


def test_two_packages_that_claim_a_name_are_both_named(install: Install) -> None:
    """Nobody wins a name by chance."""
    install(point("mine", "a:Mine", "package-a"), point("mine", "b:Mine", "package-b"))
    with pytest.raises(UserError, match=r"'mine' in dualsft.scorers is claimed by package-a 1.0 and package-b 1.0"):
        class_path(SCORERS, "mine")


def test_the_same_class_twice_is_no_clash(install: Install) -> None:
    """A package that is seen twice on the path claims nothing from itself."""
    install(*[point("mine", "dualsft.scorers:HessianVector", "package-a")] * 2)
    assert class_path(SCORERS, "mine") == "dualsft.scorers.HessianVector"


def test_a_plugin_cannot_shadow_a_built_in_name(install: Install) -> None:
    """Whatever the order, the built-in name is ours, and the list tells the other that the name is taken."""
    usurper = point("first_order", "dualsft.scorers:HessianVector", "usurper")
    for points in ((usurper, OURS), (OURS, usurper)):
        install(*points)
        assert class_path(SCORERS, "first_order") == "dualsft.scorers.FirstOrder"
        first, second = registered()
        assert (first.package, first.problem) == ("dualsft 1.0", "")
        assert (second.package, second.problem) == ("usurper 1.0", "the name is also claimed by dualsft 1.0")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:Thing", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:Nothing", "AttributeError: module 'json' has no attribute 'Nothing'"),
        ("plugin_that_exits:Thing", "SystemExit: 3, at {folder}/plugin_that_exits.py, line 1"),
        ("json:JSONDecoder", "it is no subclass of dualsft.scorers.Scorer"),
        ("json:loads", "it is no subclass of dualsft.scorers.Scorer"),
        ("dualsft.allocators:TopK", "it is no subclass of dualsft.scorers.Scorer"),
        ("dualsft.scorers:SecondOrderScorer", "the class leaves curvature undefined"),
        ("json", "'json' is not module:Class"),
        ("json:JSON Decoder!", "'json:JSON Decoder!' is not module:Class"),
    ],
)
def test_a_broken_plugin_is_listed_with_its_reason(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, reason: str
) -> None:
    """One that cannot be used is told by name, in the list and to whoever asks for it; the others are as ever."""
    (tmp_path / "plugin_that_exits.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    install(OURS, point("broken", target, "plugin"))
    reason = reason.replace("{folder}", str(tmp_path))
    listed = {entry.name: entry for entry in registered()}
    assert listed["broken"].problem == reason
    assert (listed["broken"].package, listed["broken"].target) == ("plugin 1.0", target)
    assert listed["first_order"].problem == ""
    with pytest.raises(UserError) as refusal:
        class_path(SCORERS, "broken")
    assert f"'broken' in dualsft.scorers cannot be used: {reason}; mend plugin 1.0, or" in str(refusal.value)
    assert class_path(SCORERS, "first_order")


def test_a_name_that_cannot_be_typed_is_told(install: Install) -> None:
    """A name with a dot would be taken for an import path."""
    install(point("my.own", "dualsft.scorers:FirstOrder", "plugin"))
    (listed,) = registered()
    assert listed.problem == "the name 'my.own' has other characters than letters, digits, _ and -"


def test_the_list_is_in_order(install: Install) -> None:
    """Groups first, then names."""
    install(point("z", "json:JSONDecoder", "p"), OURS, point("a", "json:JSONDecoder", "p", "dualsft.data_allocators"))
    assert [(entry.group, entry.name) for entry in registered()] == [
        (SCORERS, "first_order"),
        (SCORERS, "z"),
        ("dualsft.data_allocators", "a"),
    ]
