"""The help that people read first."""

import pytest

from dualsft.cli import run
from dualsft.commands.short_help import FIRST


@pytest.mark.parametrize("verb", FIRST)
def test_help_shows_what_is_set_first(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option of the table with a word on what it does, in the terminal's width; all others by `--help all`."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        run([verb, "--model.data_budgt", "5", "-h"])  # whoever asks for help gets it, not advice
    short = capsys.readouterr().out
    assert not stop.value.code
    assert max(map(len, short.splitlines())) <= 80
    with pytest.raises(SystemExit):
        run([verb, "--help", "all"])
    full = capsys.readouterr().out
    assert len(short.splitlines()) < len(full.splitlines()) / 4
    for key in (key for keys in FIRST[verb].values() for key in keys):
        line = next(line for line in short.splitlines() if f"--{key} " in f"{line} ")
        assert line.split(maxsplit=1)[1:] or key in short
        assert f"--{key} " in full or f"--{key}," in full
