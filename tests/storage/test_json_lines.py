"""Files of JSON lines, with texts of any language in them."""

import json
from pathlib import Path

from dualsft.storage.json_lines import json_lines


def test_a_line_feed_alone_ends_a_line(tmp_path: Path) -> None:
    """Separators that JSON leaves within texts do not cut them."""
    texts = ["one\u2028two", "a\u0085b\u2029", "next\nline\r\n", "\x1c"]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(f"{json.dumps(text, ensure_ascii=False)}\n" for text in texts), encoding="utf-8")
    assert [json.loads(line) for line in json_lines(path)] == texts
    assert json_lines(tmp_path / "none") == []
