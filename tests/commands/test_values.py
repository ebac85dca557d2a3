"""Values as people write them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dualsft.commands.parsing import parser_of, prepare

WRITTEN: dict[tuple[str, str], Any] = {
    ("model.data_budget", "10%"): 0.1,
    ("model.data_budget", "100 %"): 1.0,
    ("model.warmup.fraction", "2.5%"): 0.025,
    ("model.dtype", "bf16"): "bfloat16",
    ("model.dtype", "FP32"): "float32",
    ("trainer.precision", "fp32"): "32-true",
    ("model.trainable", "*.mlp.*"): ["*.mlp.*"],
    ("model.frozen", '["a", "b"]'): ["a", "b"],
    ("audit.sides", "data"): ["data"],
    ("audit.steps", "3"): [3],
    ("data.prompt_template", "10%{prompt}"): "10%{prompt}",
}


@pytest.mark.parametrize(("key", "written"), WRITTEN)
def test_values_as_people_write_them(key: str, written: str, tmp_path: Path) -> None:
    """Percentages, short names and one text for a list mean the same on command lines and in configurations."""
    verb, expected = "audit" if key.startswith("audit") else "select", WRITTEN[key, written]
    parser = parser_of(verb)
    sections, _, name = key.rpartition(".")
    given: Any = {name: yaml.safe_load(written) if written[0] in "[3" else written}
    for section in reversed(sections.split(".")):
        given = {section: given}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(given))
    for arguments in ([f"--{key}", written], [f"--{key}={written}"], ["--config", str(tmp_path / "job.yaml")]):
        model = ["--model.model_name_or_path", "x"]
        assert parser.parse_args(prepare([*arguments, *model], verb, parser))[key] == expected
