from dualsft.runs.table import markdown_table


def test_a_table_is_markdown_and_lines_up() -> None:
    """The first column is left-aligned, the others right, each as wide as its widest cell."""
    rows = [["metric", "base", "step 5"], ["loss", "1.2345", "0.5"], ["perplexity", "-", "2"]]
    assert markdown_table(rows).splitlines() == [
        "| metric     |   base | step 5 |",
        "| ---------- | -----: | -----: |",
        "| loss       | 1.2345 |    0.5 |",
        "| perplexity |      - |      2 |",
    ]
