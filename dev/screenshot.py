"""Takes a screenshot of a page at any width, light or dark: ``python -m dev.screenshot PAGE OUT.png --width 390``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dev.browser import browser, find_chromium


def main(arguments: Sequence[str] | None = None) -> None:
    """Take a screenshot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--whole", action="store_true", help="all of the page, not one window")
    parser.add_argument("--scroll_to", help="a selector that is brought to the window's top")
    options = parser.parse_args(arguments)
    program = find_chromium()
    if program is None:
        raise SystemExit("There is no Chromium here: install the package chromium.")
    with browser(program) as running:
        tab = running.tab()
        tab.open(options.page.resolve().as_uri(), options.width, options.height, options.dark)
        if options.scroll_to:
            tab.value(f"document.querySelector({json.dumps(options.scroll_to)}).scrollIntoView()")
        tab.screenshot(options.image, options.whole)


if __name__ == "__main__":
    main()
