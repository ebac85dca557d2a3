"""The page as HTML: nothing of the data is markup, and everybody can read it."""

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dualsft.reports.blocks import Example, Picture, Piece, Section, Table, Text
from dualsft.reports.page import render
from tests.reports.cases import SCRIPT


class Elements(HTMLParser):
    """The elements of a page in order, each with its attributes and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][2].append(data)

    def of(self, *tags: str) -> list[tuple[str, dict[str, str | None], list[str]]]:
        return [element for element in self.found if element[0] in tags]


def paint(figure: Any) -> None:
    """One line."""
    figure.subplots().plot([0, 1], [1, 0])


TABLE = Table(SCRIPT, ["name", SCRIPT], [[SCRIPT, "1"], ["b", "2"]])
SECTIONS = [
    Section(
        SCRIPT,
        [
            Text(SCRIPT, "lead"),
            TABLE,
            Picture("line", SCRIPT, SCRIPT, paint, numbers=Table("n", ["a"], [["1"]], folded=True)),
        ],
        [Section("Same", [Example(SCRIPT, SCRIPT, [Piece(SCRIPT, 2, SCRIPT), Piece("x", learnt=False)], SCRIPT)])],
    ),
    Section("Same", [], [Section("Same", [Text("end")])]),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Elements:
    """A page with a script in every text that data can reach."""
    return Elements(render(SCRIPT, SECTIONS, tmp_path_factory.mktemp("figures")))


def test_control_characters_are_seen_and_do_nothing(tmp_path: Path) -> None:
    """A page holds none of them, nor marks that would turn the text behind them round; line ends stay."""
    hostile = "a\x00b\x1b[31m\u202ec\u2066\x7f\td\ne"
    page = render(
        "t", [Section(hostile, [Text(hostile), Example(hostile, hostile, [Piece(hostile)], hostile)])], tmp_path
    )
    assert not set(page) & {chr(code) for code in (*range(9), 11, 12, *range(14, 32), 127, 0x202E, 0x2066)}
    assert "a\u2400b\u241b[31m\ufffdc\ufffd\u2421\td\ne" in page


def test_a_script_in_the_data_is_text(page: Elements) -> None:
    """Titles, captions, cells, examples, alternatives and hints are escaped wherever they stand."""
    assert not page.of("script")
    assert not any(name.startswith("on") for _, attributes, _ in page.found for name in attributes)
    shown = "".join(text for _, _, parts in page.found for text in parts)
    assert shown.count(SCRIPT) >= 9
    assert [a["alt"] for _, a, _ in page.of("img")] == [SCRIPT]


def test_nothing_is_loaded_from_elsewhere(page: Elements) -> None:
    """All addresses are within the page or are the data themselves."""
    keys = ("src", "srcset", "href")
    found = [value or "" for _, attributes, _ in page.found for key, value in attributes.items() if key in keys]
    assert found
    assert all(address.startswith(("data:", "#")) for address in found)
    style = "".join(text for tag, _, parts in page.found if tag == "style" for text in parts)
    assert "@media print" in style
    assert not re.search(r"@import|url\(", style)


def test_headings_and_landmarks(page: Elements) -> None:
    """One h1, no level skipped, one main part, header and navigation; parts are named by their headings."""
    levels = [int(tag[1]) for tag, _, _ in page.of("h1", "h2", "h3", "h4", "h5")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(len(page.of(tag)) == 1 for tag in ("main", "header", "nav", "h1", "title"))
    assert page.of("html")[0][1]["lang"] == "en"
    ids = [str(a["id"]) for _, a, _ in page.found if "id" in a]
    assert [count for count in Counter(ids).values() if count > 1] == []
    named = [str(a["aria-labelledby"]) for _, a, _ in page.found if "aria-labelledby" in a]
    links = [str(a["href"]).removeprefix("#") for _, a, _ in page.of("a")]
    assert {*named, *links} <= set(ids)


def test_tables_and_figures_have_names(page: Elements) -> None:
    """Every table has a caption, heads of columns and rows; every image an alternative and a size."""
    assert len(page.of("table")) == len(page.of("caption")) == 2
    assert [a["scope"] for _, a, _ in page.of("th")] == ["col", "col", "row", "row", "col", "row"]
    for _, attributes, _ in page.of("img"):
        assert {"alt", "width", "height"} <= attributes.keys()
    assert all(a.get("tabindex") == "0" for _, a, _ in page.found if a.get("class") == "scroll")


def test_the_same_sections_give_the_same_bytes(tmp_path: Path) -> None:
    """Page and figures do not change from one call to the next; a figure has a PNG and an SVG, and a dark version."""
    pages = [render("x", SECTIONS, tmp_path / name) for name in ("a", "b")]
    assert pages[0] == pages[1]
    for name in ("line.png", "line.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    (source,), (image,) = Elements(pages[0]).of("source"), Elements(pages[0]).of("img")
    assert source[1]["media"] == "screen and (prefers-color-scheme: dark)"
    assert source[1]["srcset"] != image[1]["src"]
