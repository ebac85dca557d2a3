"""Links between files of the repository, as links between pages of the site."""

import posixpath
import re
from collections.abc import Mapping

_BLOCK = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def relinked(text: str, origin: str, page: str, pages: Mapping[str, str]) -> str:
    """A page's text with the links that its file has, which work in the repository, led to pages of the site.

    What the site has no page for, such as code, is named by its path in place of the link.

    Args:
        text: Markdown; blocks of code are left as they are.
        origin: The file's path in the repository.
        page: The page's path in the site's sources.
        pages: Path in the repository -> path in the site's sources, pictures included.
    """

    def led(match: re.Match[str]) -> str:
        mark, shown, link = match.groups()
        path, hash_, fragment = link.partition("#")
        if "://" in link or not path:
            return match[0]
        meant = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if meant in pages:
            to = posixpath.relpath(pages[meant], posixpath.dirname(page) or ".")
            return f"{mark}[{shown}]({to}{hash_}{fragment})"
        plain = shown.replace("`", "")
        return f"`{meant}`" if meant.endswith(plain) else f"{shown} (`{meant}`)"

    parts = _BLOCK.split(text)
    return "".join(part if k % 2 else _LINK.sub(led, part) for k, part in enumerate(parts))
