import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from dualsft.errors import UserError
from dualsft.export.checkpoints import prepare_extract
from dualsft.export.compatibility import check_configurations
from tests.world.models import save_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return Path(save_tiny_model(tmp_path_factory.mktemp("configurations") / "base"))


def changed(base: Path, folder: Path, settings: dict[str, Any]) -> str:
    """The base's weights with other settings; None takes one out."""
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(base / "model.safetensors")
    told = {**json.loads((base / "config.json").read_text()), **settings}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return str(folder)


DECISIVE: dict[str, dict[str, Any]] = {
    "head_dim, num_attention_heads, num_key_value_heads": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
    },
    "rope_parameters.rope_theta": {"rope_parameters": None, "rope_theta": 5e5},  # its name of old
    "rope_parameters.factor, rope_parameters.rope_type": {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    },
    "rms_norm_eps": {"rms_norm_eps": 1e-3, "use_cache": False},
    "hidden_act": {"hidden_act": "gelu"},
    "tie_word_embeddings": {"tie_word_embeddings": False},
    "model_type": {"model_type": "mistral", "rms_norm_eps": 1e-3},
    "architectures": {"architectures": ["OtherForCausalLM"]},
}


@pytest.mark.parametrize("differing", DECISIVE)
def test_settings_that_change_what_weights_mean_are_refused(differing: str, base: Path, tmp_path: Path) -> None:
    """The sentence names each that differs, and no other."""
    tuned = changed(base, tmp_path / "tuned", DECISIVE[differing])
    words = re.escape(f"{tuned} and {base} have different settings in config.json ({differing}), and a delta holds")
    with pytest.raises(UserError, match=f"^{words}"):
        check_configurations(str(base), tuned)


IDLE: dict[str, Any] = {
    "transformers_version": "4.57.0",
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "_name_or_path": "somewhere",
    "use_cache": False,
    "output_attentions": True,
    "architectures": ["LlamaModel"],
    "attention_dropout": 0.1,
    "initializer_range": 0.5,
    "eos_token_id": [1, 2],
    "pad_token_id": None,
    "of_somebody_s_own": 3,
    "trainer_version": "1",
}


def test_settings_that_only_keep_book_do_not_matter(base: Path, tmp_path: Path) -> None:
    """Nor do defaults that one file leaves out."""
    left_out = dict.fromkeys(("mlp_bias", "attention_bias", "head_dim", "rope_parameters"))
    defaults = json.loads((base / "config.json").read_text())
    assert all(defaults[key] == getattr(LlamaConfig(hidden_size=32, num_attention_heads=4), key) for key in left_out)
    check_configurations(str(base), changed(base, tmp_path / "tuned", {**IDLE, **left_out}))


def test_extract_compares_configurations(base: Path, tmp_path: Path) -> None:
    """Checkpoints of equal tensors are refused for their settings."""
    tuned = Path(save_tiny_model(tmp_path / "tuned", seed=1))
    told = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**told, "rms_norm_eps": 1e-3}))
    with pytest.raises(
        UserError, match=r"tuned and .*base have different settings in config.json \(rms_norm_eps\), and a"
    ):
        prepare_extract(str(base), str(tuned))
