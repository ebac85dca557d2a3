"""Paths: shorthands written out, and what no system takes refused."""

import os
import sys
from pathlib import Path

import pytest

from dualsft.errors import UserError
from dualsft.storage.paths import check_writable, expanded, named, real


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~", "{home}"),
        ("~/a/~b", "{home}/a/~b"),
        ("$DATA/a", "/data/a"),
        ("~/${DATA}x", "{home}//datax"),
        ("a/b", "a/b"),
        ("someone/data-set_v1.5", "someone/data-set_v1.5"),
        ("a~", "a~"),
        ("", ""),
        ("数/é", "数/é"),
    ],
)
def test_shorthands_are_written_out(given: str, meant: str, tmp_path: Path) -> None:
    """As a shell does, and once; relative paths and hub ids stay as they are."""
    assert expanded(given) == meant.format(home=tmp_path / "home")
    assert expanded(expanded(given)) == expanded(given)


def test_names_that_only_look_like_shorthands(tmp_path: Path) -> None:
    """A file that is there under this name is meant by it."""
    (tmp_path / "$HOURLY.jsonl").touch()
    assert expanded("$HOURLY.jsonl") == "$HOURLY.jsonl"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("$NOWHERE/a", r"names \$NOWHERE, an environment variable that is not set"),
        ("${NOWHERE}", r"names \$\{NOWHERE\}, an environment variable"),
        ("~nobody-of-this-name/a", "home folder of a user that this machine does not know"),
        ("a\0b", r"The path a\\x00b holds a NUL character"),
        ("a/" + "x" * 256, "has a part of 256 bytes"),
        ("é" * 128, "has a part of 256 bytes"),
        ("x" * 200_000, "has a part of 200,000 bytes"),
        ("x/" * 3000, "has 6,000 bytes"),
        ("a\udcff", r"The path a\\udcff is not UTF-8"),
    ],
)
def test_what_no_file_system_takes(given: str, problem: str) -> None:
    """One short sentence each, which can be printed."""
    with pytest.raises(UserError, match=problem) as refused:
        expanded(given)
    assert len(str(refused.value)) < 350
    assert str(refused.value).isprintable()


def test_a_locale_that_cannot_name_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the locale's encoding lacks cannot be opened; the way out is named."""
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("ascii"))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert expanded("a/b") == "a/b"
    with pytest.raises(UserError, match=r"The path 数\.jsonl is not ASCII; this locale's encoding is ascii: set"):
        expanded("数.jsonl")


@pytest.mark.parametrize("inside", ["", "new", "new/and/deeper"])
def test_a_writable_folder_is_left_as_it_was(inside: str, tmp_path: Path) -> None:
    """Existing or not, nothing is made in it or on the way to it."""
    (tmp_path / "here").mkdir()
    check_writable(tmp_path / "here" / inside)
    assert list((tmp_path / "here").iterdir()) == []


def test_unwritable_folders(tmp_path: Path) -> None:
    """What is in the way has its reason: a file, a lost link, a file system that takes nothing; the option is named."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/new cannot be written \(Not a directory\); choose another --output_dir"):
        check_writable(tmp_path / "file" / "new")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"link cannot be written \(No such file or directory\)"):
        check_writable(tmp_path / "link")
    with pytest.raises(UserError, match=r"/proc/new cannot be written \(.+\); choose another trainer\.logger"):
        check_writable(Path("/proc/new"), "trainer.logger.save_dir")


def test_links_in_a_circle(tmp_path: Path) -> None:
    """They lead nowhere, so that nothing can be written, and are no error of their own."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to(tmp_path)
    assert real(tmp_path / "loop" / "x") == tmp_path.resolve() / "loop" / "x"
    assert real(tmp_path / "link" / "x") == tmp_path.resolve() / "x"
    with pytest.raises(UserError, match="loop/x cannot be written"):
        check_writable(tmp_path / "loop" / "x")


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write anywhere")
def test_a_folder_of_someone_else(tmp_path: Path) -> None:
    """One without the permission to write."""
    (tmp_path / "theirs").mkdir(mode=0o500)
    with pytest.raises(UserError, match="theirs/new cannot be written"):
        check_writable(tmp_path / "theirs" / "new")


def test_long_paths_are_cut_in_the_middle() -> None:
    """Start and end are what tells one from another."""
    assert named("a" * 100 + "b" * 100) == "a" * 60 + "..." + "b" * 60
