"""MkDocs hooks: pages that lie outside docs/ join the site, and links to other files of the repository lead to where it is hosted.

So a page is written once, with relative links that work in a clone and on a code host, and the site needs no copy of it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

OUTSIDE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASE.md": "release.md",
    "SECURITY.md": "security.md",
    "tests/PEERS.md": "peers.md",
}
"""Pages outside docs/ → their names in the site."""

INSIDE = {page: source for source, page in OUTSIDE.items()}

FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: relinked(link, page.file.src_uri, config.repo_url or ""), part) for part in parts[::2]]
    return "".join(parts)


def relinked(link: re.Match[str], page: str, repository: str) -> str:
    """``link`` of the site's ``page`` as the site needs it. What leads nowhere stays as it is, for MkDocs to find."""
    text, target, anchor = link[1], link[2], link[3] or ""
    if "://" in target:
        return link[0]
    folder = ROOT / os.path.dirname(INSIDE.get(page, f"docs/{page}"))
    path = Path(os.path.normpath(folder / target))
    if not path.is_relative_to(ROOT) or not path.exists():
        return link[0]
    source = path.relative_to(ROOT).as_posix()
    if source in OUTSIDE:
        return f"[{text}]({OUTSIDE[source]}{anchor})"
    if path.suffix == ".md" and source.startswith("docs/"):
        return f"[{text}]({source.removeprefix('docs/')}{anchor})"
    return f"[{text}]({repository.rstrip('/')}/blob/HEAD/{source}{anchor})" if repository else text
