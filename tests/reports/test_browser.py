"""The page in a real browser: no request, no error, no line that is too long, in light and dark, and on paper."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.browser import Tab, browser, find_chromium
from dualsft.reports.report import make_report
from dualsft.selection import Selection
from tests.reports.cases import SCRIPT, sample, write_audit, write_comparison, write_fit

PHONE, DESKTOP = 360, 1280
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BROKEN = "[...document.images].filter(image => !image.naturalWidth).length"
CONTRAST = """
(() => {
  const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const channels = colour => { probe.clearRect(0, 0, 1, 1); probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data]; };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
  const over = (top, under) => [0, 1, 2].map(k => top[k] * top[3] / 255 + under[k] * (1 - top[3] / 255));
  const behind = element => { const layers = []; let at = element;
    for (; at; at = at.parentElement) layers.unshift(channels(getComputedStyle(at).backgroundColor));
    return layers.reduce((under, top) => over(top, under), [255, 255, 255]); };
  const ratio = element => { const [a, b] = [channels(getComputedStyle(element).color), behind(element)].map(light);
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); };
  const shown = [...document.querySelectorAll('main *, nav *, header *')].filter(element =>
    [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()) && element.checkVisibility());
  return Math.min(...shown.map(ratio));
})()
"""


@pytest.fixture(scope="module")
def page(selection: Selection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on all kinds of directories, with a script among the data of each."""
    folder = tmp_path_factory.mktemp("browser")
    fits = [write_fit(folder / name, samples=[sample(0, "yes"), sample(4, SCRIPT)]) for name in ("one", "two")]
    return make_report(
        [selection.folder, *fits, write_audit(folder / "audit"), write_comparison(folder / "compare")]
    ).write(folder / "out")


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    """A page of Chromium, if it is installed."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on this machine: install the package chromium")
    with browser(program) as running:
        yield running.tab()


@pytest.mark.heavy
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_in_a_browser(width: int, dark: bool, page: Path, tab: Tab) -> None:
    """It asks for nothing but itself, says nothing, scrolls down only, shows every figure, and can be read."""
    tab.open(page.as_uri(), width, dark=dark)
    assert tab.requested == [page.as_uri()]
    assert tab.said == []
    assert tab.value("document.title") == "Report on 1 selection, 2 fits, 1 audit, 1 comparison"
    assert tab.value(TOO_WIDE) == 0
    assert tab.value(BROKEN) == 0
    sources = tab.value(
        "[...document.querySelectorAll('picture')].filter(p => p.querySelector('source'))"
        ".map(p => p.querySelector('img').currentSrc === p.querySelector('source').srcset)"
    )
    assert sources
    assert set(sources) == {dark}
    assert tab.value(CONTRAST) >= 4.5


@pytest.mark.heavy
def test_the_browser_sees_what_it_must(tab: Tab, tmp_path: Path) -> None:
    """Of a page that asks for an image, complains, and is wide, broken and pale, each is noticed."""
    (tmp_path / "bad.html").write_text(
        "<main style='width: 2000px; color: #aaa'>pale<img src='https://localhost:1/x.png'></main>"
        "<script>console.error('ours'); throw Error('thrown')</script>"
    )
    tab.open((tmp_path / "bad.html").as_uri(), PHONE)
    assert tab.requested[1:] == ["https://localhost:1/x.png"]
    assert any("ours" in text for text in tab.said)
    assert any("thrown" in text for text in tab.said)
    assert tab.value(TOO_WIDE) > 1000
    assert tab.value(BROKEN) == 1
    assert tab.value(CONTRAST.replace("'main *", "'main, main *")) == pytest.approx(2.32, abs=0.01)


@pytest.mark.heavy
def test_the_page_by_keyboard_and_on_paper(page: Path, tab: Tab, tmp_path: Path) -> None:
    """The first key reaches the link to the content, which then has the focus; in print all figures are light."""
    tab.open(page.as_uri(), DESKTOP, dark=True)
    tab.ask("Input.dispatchKeyEvent", type="rawKeyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert tab.value("document.activeElement.className") == "skip"
    tab.ask("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    assert tab.value("document.activeElement.id") == "content"
    tab.open(page.as_uri(), DESKTOP, dark=True, print_=True)
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.value("[...document.images].every(image => image.currentSrc === image.src)")
    tab.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
