"""Hooks of MkDocs: the site is made of the pages in docs/ as they are read in the repository.

- The tables of docs/README.md are the navigation: a heading is a section, a row a page.
- Notebooks and the files at the top of the repository become pages.
- A link to any other file of the repository becomes its path: the site has no copy of it.
- At the end every link and picture of the written site must lead somewhere.
"""

from __future__ import annotations

import base64
import html.parser
import json
import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
COPIED = {name: f"project/{name.lower()}" for name in ("CHANGELOG.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md")}
"""Files at the top of the repository that are pages, by their place on the site."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """The navigation, from the index."""
    nav: list[Any] = [{"Home": "README.md"}]
    for heading, body in re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", (ROOT / "docs/README.md").read_text(), re.M):
        pages = [place(target, "README.md") for target in re.findall(r"^\| \[[^\]]*\]\(([^)]+)\)", body, re.M)]
        if pages:
            nav.append({heading: pages})
    config.nav = nav
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds notebooks and the copied files."""
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = from_notebook(notebook)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
        for picture, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{picture}", content=content))
    for name, target in COPIED.items():
        if (ROOT / name).exists():
            files.append(
                File.generated(config, target, content=relinked((ROOT / name).read_text(), f"../{name}", target))
            )
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links out of docs/ lead to their copies."""
    del kwargs
    path = page.file.src_uri
    return markdown if page.file.generated_by else relinked(markdown, path, path)


def from_notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown with its outputs, and their pictures by name."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = {kind: "".join(lines) for kind, lines in output.get("data", {}).items()}
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell above draws]({name})")
            elif "text/html" in data:
                parts.append("\n".join(line for line in data["text/html"].splitlines() if line.strip()))
            else:
                parts.append(f"```text\n{data.get('text/plain', ''.join(output.get('text', '')))}\n```")
    note = f"*This page is the notebook `notebooks/{path.name}` with its outputs.*"
    text = "\n\n".join([parts[0], note, *parts[1:]])
    return relinked(text, f"../notebooks/{path.name}", f"notebooks/{path.stem}.md"), pictures


def place(target: str, page: str) -> str:
    """Where a link of a page leads to, relative to docs/; what is outside of it by its copy, else it begins with "..".

    Args:
      target: as written on the page.
      page: where the page was written, relative to docs/.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if path.startswith("../notebooks/") and path.endswith(".ipynb"):
        return path.removeprefix("../").removesuffix("ipynb") + "md"
    if path == "../README.md":
        return "README.md"
    if path.startswith("../docs/"):
        return path.removeprefix("../docs/")
    return COPIED.get(path.removeprefix("../"), path)


def relinked(markdown: str, written: str, now: str) -> str:
    """A page written in one place of the repository, with links that are right in another."""

    def link(found: re.Match[str]) -> str:
        mark, text, target, anchor = found.groups(default="")
        path = place(target, written)
        if path.startswith(".."):
            return (
                f"`{path.removeprefix('../')}`"
                if text.strip("`") == path.removeprefix("../")
                else f"{text} (`{path.removeprefix('../')}`)"
            )
        return f"{mark}[{text}]({posixpath.relpath(path, posixpath.dirname(now) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)  # code is left alone
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


class _Page(html.parser.HTMLParser):
    """The links and the anchors of a written page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        for name, value in attrs:
            if name in ("href", "src") and value and tag != "base":
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def on_post_build(config: Any) -> None:
    """Checks the written site."""
    site = Path(config.site_dir)
    pages: dict[Path, _Page] = {}
    for path in site.rglob("*.html"):
        pages[path] = _Page()
        pages[path].feed(path.read_text())
    lost = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute
            continue
        for link in page.links:
            target, anchor = urldefrag(unquote(link))
            if re.match(r"[a-z]+:|//", target):
                continue
            there = (path.parent / target).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            if not there.exists() or (anchor and there in pages and anchor not in pages[there].anchors):
                lost.append(f"{path.relative_to(site)}: {link}")
    if lost:
        raise PluginError("links that lead nowhere:\n" + "\n".join(sorted(set(lost))))
