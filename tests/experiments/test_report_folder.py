"""The folder that an experiment reports to."""

from pathlib import Path

import pytest

from dualsft.errors import UserError
from dualsft.experiments.report_folder import ReportFolder


def test_settings_that_the_configuration_names_count_too(tmp_path: Path) -> None:
    """The reports of the same configuration over another file of settings are kept, unless they may be replaced."""
    settings, folder = tmp_path / "small.yaml", tmp_path / "out"

    def claim(text: str, overwrite: bool = False) -> None:
        settings.write_text(text)
        ReportFolder(folder, overwrite, ["settings"]).claim(
            "config: settings/a.yaml", {"settings/a.yaml": str(settings)}
        )

    claim("{lr: 1}")
    claim("lr: 1  # the same")
    with pytest.raises(UserError, match="holds an experiment with other settings"):
        claim("lr: 2")
    assert (folder / "settings" / "a.yaml").read_text() == "lr: 1  # the same"
    claim("lr: 2", overwrite=True)
    assert (folder / "settings" / "a.yaml").read_text() == "lr: 2"
    claim("lr: 2")
