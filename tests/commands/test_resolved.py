"""Settings by dotted key, as a grid gives them, come back as they were."""

from pathlib import Path
from typing import Any

import pytest

from dualsft.commands.resolved import as_arguments, resolved


@pytest.mark.parametrize("text", ["#### (.+)", r"-?[\d,.]*\d", "a: b", "12", "'quoted'", ""])
def test_texts_are_neither_quoted_nor_read(text: str, tmp_path: Path) -> None:
    """A pattern that begins with a dash is no option, and one with a hash sign has no quotes around it."""
    given: dict[str, Any] = {
        "model.model_name_or_path": str(tmp_path),
        "data.validation": "rows.jsonl",
        "model.generation.answer_pattern": text,
        "model.generation.max_new_tokens": 3,
    }
    assert resolved("validate", as_arguments(given))["model"]["generation"] == {
        "answer_pattern": text,
        "max_new_tokens": 3,
    }
