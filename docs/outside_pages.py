"""Pages of the site that lie beside the folder `docs`, such as the README: a hook of mkdocs."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "start.md",  # index.md is the first page
    **{name: name for name in ("BENCHMARKS.md", "SECURITY.md", "CHANGELOG.md")},
    **{name: name for name in ("pretrained/checkpoint/README.md", "pretrained/samples/README.md")},
}
"""Their paths, and those in the site."""


def on_files(files: Files, config: Any) -> Files:
    """Add them as if they lay in `docs`."""
    for path, name in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to where the pages are in the site."""
    prefix = "docs/" if page.file.src_uri in OUTSIDE.values() else r"\.\./"
    markdown = re.sub(rf"\]\({prefix}(?=[^)]*\.(md|png))", "](", markdown)
    return markdown.replace("](README.md", "](start.md")
