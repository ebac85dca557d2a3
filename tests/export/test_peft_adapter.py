from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dualsft.cli import run
from dualsft.errors import UserError
from tests.cases import make
from tests.world.models import tiny_tokenizer


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3 moe"])
def test_experts_are_refused_and_can_be_applied(architecture: str, tmp_path: Path) -> None:
    """Files hold experts one by one, modules all in one tensor: no adapter, but the way that is named works."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model = make(architecture, torch.float32)
    model.save_pretrained(base)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.experts.down_proj")[1] += 0.25
    model.save_pretrained(tuned)
    for folder in (base, tuned):
        tiny_tokenizer().save_pretrained(folder)
    run(["export", "extract", "--base", str(base), "--model", str(tuned), "--output_dir", str(tmp_path / "delta")])
    pair = ["--base", str(base), "--delta", str(tmp_path / "delta" / "delta.safetensors"), "--output_dir"]
    words = (
        r"base stores its weights under other names than its modules have, so that no adapter .*; use export apply ins"
    )
    with pytest.raises(UserError, match=words):
        run(["export", "peft", *pair, str(tmp_path / "adapter")])
    assert not (tmp_path / "adapter").exists()
    run(["export", "apply", *pair, str(tmp_path / "applied")])
    before, after, found = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned", "applied"))
    assert any("experts.1." in name and not torch.equal(before[name], after[name]) for name in after)
    assert found.keys() == after.keys()
    assert all(torch.equal(found[name], after[name]) for name in after)
