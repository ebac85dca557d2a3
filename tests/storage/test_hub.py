"""The hub's clients where the hub cannot be reached."""

from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from dualsft.data.records import read_records
from dualsft.errors import UserError
from dualsft.models.loading import model_folder
from dualsft.storage import hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked for over the network, each of which fails at once."""
    requests: list[str] = []

    class Session:
        def head(self, url: str, **_: Any) -> None:
            requests.append(url)
            raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    return requests


def test_a_model_or_data_set_of_the_hub_without_a_network(asked: list[str]) -> None:
    """One question is asked, the caches are looked at, and the sentence says that the machine is offline."""
    for read in (lambda: model_folder("nobody/no-model"), lambda: read_records("nobody/no-data")):
        with pytest.raises(UserError, match=r"nobody/no-.*this machine is offline"):
            read()
    assert asked == [constants.ENDPOINT] * 2
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_offline_mode_asks_nobody(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``HF_HUB_OFFLINE`` says it already."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.is_reachable()
    assert not asked
