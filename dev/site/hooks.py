"""What mkdocs calls while it builds the site (`hooks` in mkdocs.yml)."""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from dev.site.links import relinked
from dev.site.pages import BESIDE, made_pages

_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//"""
    r"""|<link rel=["']?(?!canonical)[^>]+href=["']?(?:https?:)?//"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from something else than files in docs/."""
    for path, text in made_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page's file to pages of the site."""
    path = page.file.src_uri
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files} | BESIDE
    origins = {made: origin for origin, made in BESIDE.items()}
    return relinked(markdown, origins.get(path, f"docs/{path}"), path, pages)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would load anything from elsewhere: the site works without a network."""
    if found := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")
    return output
