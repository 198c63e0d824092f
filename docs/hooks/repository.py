# SPDX-License-Identifier: Apache-2.0
"""README.md and its siblings as pages, and links that hold both in the repository and on the site.

A text is written once, for a reader of the repository: its links are relative to its file. Here
each becomes a page of the site, a figure that is copied beside it, or, for any other file, its
address in the repository. What a link points to must exist; a warning fails a strict build.
"""

import logging
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.repository")
ROOT = Path(__file__).parents[2]
# files of the repository that are pages
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
# what Markdown, its extensions and mkdocstrings write: not the tag that `<x, w>` in a text becomes
TAGS = re.compile(
    "a|abbr|autoref|b|blockquote|br|code|dd|del|details|div|dl|dt|em|h[1-6]|hr|img|input|label|li|"
    "nav|ol|p|path|pre|small|span|strong|sub|summary|sup|svg|table|tbody|td|th|thead|tr|ul"
)
LINK = re.compile(r"(\]\()([^()\s]+)(\))")
FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"!\[[^]]*\]\(([^()\s:]+\.(?:svg|png))\)")


def home(uri: str) -> str:
    """Where the text of a page lies in the repository."""
    return {page: name for name, page in PAGES.items()}.get(uri, f"docs/{uri}")


def pointed(uri: str, target: str) -> str:
    """The file of the repository that a link of a page points to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(home(uri)), target))


def site_uri(name: str) -> str:
    """Where a file of the repository would be on the site."""
    return PAGES.get(name) or name.removeprefix("docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for page in files.documentation_pages():
        path = page.abs_src_path
        for target in FIGURE.findall(Path(path).read_text(encoding="utf-8")) if path else ():
            figure = pointed(page.src_uri, target)
            if files.get_file_from_path(site_uri(figure)) is None and (ROOT / figure).is_file():
                path = str(ROOT / figure)
                files.append(File.generated(config, site_uri(figure), abs_src_path=path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    # what is generated links to pages only
    if page.file.abs_src_path is None:
        return markdown

    def moved(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if target.startswith(("http:", "https:", "mailto:", "#")):
            return match.group()
        name, mark, anchor = target.partition("#")
        name = pointed(uri, name)
        if files.get_file_from_path(site_uri(name)) is not None:
            found = posixpath.relpath(site_uri(name), posixpath.dirname(uri) or ".")
        elif (ROOT / name).exists():
            kind = "tree" if (ROOT / name).is_dir() else "blob"
            found = f"{config.extra['repository']}/{kind}/main/{name}"
        else:
            log.warning("%s: a link must point to a file, got %s", home(uri), target)
            return match.group()
        return f"{before}{found}{mark}{anchor}{after}"

    # code is no text: what looks like a link in it stays
    pieces = FENCE.split(markdown)
    pieces[::2] = [LINK.sub(moved, piece) for piece in pieces[::2]]
    return "".join(pieces)


class Tags(HTMLParser):
    """The names of the tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    tags = Tags()
    tags.feed(html)
    for name in sorted(name for name in tags.names if not TAGS.fullmatch(name)):
        log.warning("%s: <%s must be in backticks or a block of code", page.file.src_uri, name)
