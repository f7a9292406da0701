"""MkDocs hook: notebooks and linked sources become pages, links lead to them, and nothing in the built site asks another host."""

from __future__ import annotations

import logging
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from mkdocs.structure.toc import AnchorLink

sys.path.insert(0, str(Path(__file__).parent))

from docs_pages import (
    ROOT,
    for_site,
    is_elsewhere,
    left_over,
    linked_files,
    loaded,
    notebook_page,
    place_in_site,
    source_page,
    styles_from_elsewhere,
)

log = logging.getLogger("mkdocs.plugins.docs_hook")  # warnings below this name fail a strict build


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook and for each file outside docs/ that a page links to."""
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        path = f"notebooks/{notebook.name}"
        source = notebook.read_text(encoding="utf-8")
        text, pictures = notebook_page(path, source)
        files.append(File.generated(config, place_in_site(path), content=text))
        files.append(File.generated(config, path, content=source))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    waiting = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages() if not file.generated_by]
    while waiting:
        path, text = waiting.pop()
        for target in linked_files(text, path):
            place = place_in_site(target)
            if files.get_file_from_path(place):
                continue
            if not (ROOT / target).is_file():
                log.warning("%s links to %s, which is no file of the repository.", path, target)
                continue
            linked = (ROOT / target).read_text(encoding="utf-8")
            files.append(File.generated(config, place, content=source_page(target, linked), inclusion=InclusionLevel.NOT_IN_NAV))
            if target.endswith(".md"):
                waiting.append((target, linked))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links out of docs/ lead to their pages in the site."""
    return markdown if page.file.generated_by else for_site(markdown, f"docs/{page.file.src_uri}")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave constants out of the contents of API pages, and the second of the two colons before code."""
    if page.file.src_uri.startswith("api/"):
        leave_out_constants(page.toc.items)
    return html.replace("::</p>", ":</p>")


def leave_out_constants(entries: list[AnchorLink]) -> None:
    """Take names in capitals out of a table of contents, at every level."""
    entries[:] = [entry for entry in entries if not re.fullmatch(r"[A-Z][A-Z0-9_]+", re.sub(r"<[^>]*>|&nbsp;", "", entry.title).strip())]
    for entry in entries:
        leave_out_constants(entry.children)


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of every page, style and script that would load something from another host, or something that is not there, and of reStructuredText."""
    site = Path(config.site_dir)
    for page in sorted(site.rglob("*.html")):
        html = page.read_text(encoding="utf-8")
        if marks := left_over(html):
            log.warning("%s shows reStructuredText: %s.", page.relative_to(site), ", ".join(dict.fromkeys(marks)))
        for address in dict.fromkeys(loaded(html)):
            if is_elsewhere(address) and not address.startswith("data:"):
                log.warning("%s loads %s from another host.", page.relative_to(site), address)
            elif not is_elsewhere(address) and page.name != "404.html":
                path = posixpath.normpath(
                    posixpath.join(page.relative_to(site).parent.as_posix(), address.partition("#")[0].partition("?")[0])
                )
                if not (site / path).exists():
                    log.warning("%s loads %s, which is not in the site.", page.relative_to(site), address)
    for style in sorted(site.rglob("*.css")):
        for address in styles_from_elsewhere(style.read_text(encoding="utf-8")):
            log.warning("%s loads %s from another host.", style.relative_to(site), address)
