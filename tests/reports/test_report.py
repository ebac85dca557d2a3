"""The command: all kinds on one page, and what is refused."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from dualsft import UserError
from dualsft.cli import run
from dualsft.reports.audit import audit_section
from dualsft.reports.blocks import Drawn, Table, Text
from dualsft.reports.comparison import comparison_section
from dualsft.reports.report import make_report
from dualsft.reports.sources import Source
from dualsft.selection import Selection
from dualsft.selection.example_tokens import TokenScores
from tests.reports.cases import POOL, SCRIPT, sample, write_audit, write_comparison, write_fit
from tests.reports.test_page import Elements
from tests.world.jobs import QUIET, write_inputs


@pytest.mark.slow
def test_all_kinds_on_one_page(selection: Selection, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each directory has its part, every figure is there as PNG and SVG, and no row's markup is in the page."""
    fits = [write_fit(tmp_path / name, samples=[sample(0, SCRIPT)]) for name in ("one", "two")]
    folders = [*fits, write_audit(tmp_path / "audit"), write_comparison(tmp_path / "compare"), selection.folder]
    run(["report", *map(str, folders), "--output_dir", str(tmp_path / "out")])
    assert "report.html" in capsys.readouterr().out
    page = Elements((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    titles = ["".join(parts).strip() for _, _, parts in page.of("h2")][1:]
    assert titles == [
        *("Selection: selection", "Fits beside each other", "Fit: one", "Fit: two"),
        *("Audit: audit", "Comparison: compare"),
    ]
    assert not page.of("script")
    names = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert len(page.of("img")) == len(names)
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }


def test_another_report_is_not_replaced_unasked(tmp_path: Path) -> None:
    """Only with --overwrite, and foreign files are left alone even then."""
    fits = [str(write_fit(tmp_path / name, after={})) for name in ("one", "two")]
    out = ["--output_dir", str(tmp_path / "out")]
    run(["report", fits[0], *out])
    with pytest.raises(UserError, match="other settings"):
        run(["report", fits[1], *out])
    run(["report", fits[1], *out, "--overwrite"])
    with pytest.raises(UserError, match="did not write"):
        run(["report", fits[0], "--output_dir", fits[1], "--overwrite"])


def test_a_mistake_leaves_nothing_behind(tmp_path: Path) -> None:
    """A directory that is damaged is refused before anything is written."""
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        run(["report", str(tmp_path / "fit"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--output_dir is not given"):
        run(["report", str(tmp_path / "fit")])


def test_an_audit_has_its_verdicts_and_figures(tmp_path: Path) -> None:
    """The verdict in words, the figures with their intervals, the runs that failed and the pictures."""
    section = audit_section(Source(write_audit(tmp_path / "audit"), "audit", "audit"), "file")
    lead, verdicts, figures, failures = section.blocks
    assert isinstance(lead, Text)
    assert isinstance(verdicts, Table)
    assert verdicts.rows[0][0] == "examples, first_order"
    assert "the order of examples" in verdicts.rows[0][1]
    assert isinstance(figures, Table)
    assert figures.rows[0][1].startswith("1.0 (")
    assert isinstance(failures, Table)
    assert failures.rows == [["random 9", f"no memory {SCRIPT}"]]
    pictures = section.sections[0].blocks
    assert all(isinstance(picture, Drawn) for picture in pictures)
    assert len(pictures) == 2


@pytest.mark.slow
def test_a_comparison_has_its_tables_and_figures(tmp_path: Path) -> None:
    """Both tables with all of their rows, the best in its own words, and the four figures."""
    section = comparison_section(Source(write_comparison(tmp_path / "compare"), "compare", "comparison"), "file")
    quality, costs = (block for block in section.blocks if isinstance(block, Table))
    assert [row[0] for row in quality.rows] == ["base model", "both", SCRIPT]
    assert [row[0] for row in costs.rows] == ["both", SCRIPT]
    assert not any("**" in cell for row in quality.rows for cell in row)
    assert len(section.sections[0].blocks) == 4


def test_damaged_audits_are_refused(tmp_path: Path) -> None:
    """With the file's name."""
    (tmp_path / "audit.json").write_text('{"data": {"first_order": {}}}')
    with pytest.raises(UserError, match=r"audit\.json is damaged"):
        audit_section(Source(tmp_path, "x", "audit"), "file")


@pytest.mark.slow
def test_token_scores_are_computed_if_asked_for(tmp_path: Path) -> None:
    """Of a selection that kept none, the examples are coloured as if it had; where they do not add up it is told."""
    inputs = write_inputs(tmp_path / "inputs", POOL, POOL[:2])
    sources = ["--data.train", inputs.train, "--data.validation", inputs.validation, "--data.max_length", "48"]
    settings = ["--model.preconditioner", "none", "--model.warmup.fraction", "0", *QUIET]
    named = ["--model.model_name_or_path", inputs.model]
    run(["select", *named, *sources, *settings, "--output_dir", str(tmp_path / "selection")])
    run(["report", str(tmp_path / "selection"), "--output_dir", str(tmp_path / "out"), "--token_scores"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'class="p5"' in page
    assert "most for it:" in page

    def wrong(selection: Selection, rows: Sequence[int]) -> TokenScores:
        return {row: ([1], [1.0]) for row in rows}

    with pytest.raises(UserError, match="add up to 1, where selection has"):
        make_report([tmp_path / "selection"], wrong)
