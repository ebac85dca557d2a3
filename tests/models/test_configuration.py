"""Two configurations differ if the library reads other settings of the model from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from dualsft.models.configuration import changed_settings, stored_configuration
from tests.world.models import save_tiny_model

PLAIN: dict[str, Any] = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4}


def test_what_is_stored_is_what_matters(tmp_path: Path) -> None:
    """Versions and token ids do not; all the rest of the file is there."""
    base = Path(save_tiny_model(tmp_path / "base"))
    stored, file = stored_configuration(base), json.loads((base / "config.json").read_text())
    assert stored.items() < file.items()
    assert file.keys() - stored.keys() >= {"transformers_version", "dtype", "eos_token_id", "architectures"}


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        (PLAIN, []),
        ({**PLAIN, "rms_norm_eps": 1e-6}, []),  # the default
        ({**PLAIN, "unknown": 3, "use_cache": False}, []),
        ({**PLAIN, "rope_theta": 500000.0}, ["rope_parameters.rope_theta"]),
        ({**PLAIN, "rms_norm_eps": 1e-5, "hidden_act": "gelu"}, ["hidden_act", "rms_norm_eps"]),
        ({**PLAIN, "model_type": "mistral"}, ["model_type"]),
        ({**PLAIN, "hidden_size": "32"}, ["hidden_size"]),  # which the library refuses
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_changed_settings_are_named(now: dict[str, Any], changed: list[str]) -> None:
    """Not how they are written down, and not those that change no result."""
    assert changed_settings(PLAIN, now) == changed
