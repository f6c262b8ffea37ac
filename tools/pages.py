"""What `make docs` adds to the guides: the README as first page, the project's own pages, and one page a module.

A hook of mkdocs. Links in the guides are written for who reads the files, and are led to where the same thing stands on the pages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lotus", "selection")
WHOLE = {"README.md": "index.md"} | {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}
"""Files of the project's root -> pages."""

_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)#\s]*)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:func|class|mod|data|meth|attr):(<code>)[~.]?")
_ELSEWHERE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//[^"']*""")


def modules() -> list[str]:
    """Every module whose name has no leading underscore, packages before what they hold."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if not any(part.startswith("_") for part in name.split(".")):
                found.append(name)
    return sorted(found)


def page_of(path: Path) -> str | None:
    """The page on which a file of the repository stands; None where there is none."""
    here = path.relative_to(ROOT)
    if str(here) in WHOLE:
        return WHOLE[str(here)]
    if here.parts[0] == "docs":
        return str(here.relative_to("docs"))
    if here.suffix == ".py" and here.parts[0] in PACKAGES:
        name = ".".join(here.with_suffix("").parts).removesuffix(".__init__")
        return f"reference/{name}.md"
    return None


def led(text: str, folder: Path) -> str:
    """``text`` with its links, written for a file in ``folder``, led to the pages; a link to what has none becomes words."""

    def turned(link: re.Match[str]) -> str:
        words, target, anchor = link[1], link[2], link[3] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        page = page_of((folder / target).resolve())
        if page is None:
            return words.lstrip("!").strip("[]") if not words.startswith("!") else link[0]
        return f"{words}({page}{anchor})"

    return _LINK.sub(turned, text)


def on_config(config: Any) -> Any:
    """The reference in the menu: a group for each package inside lotus, the others one by one."""
    groups: dict[str, list[Any]] = {}
    for name in modules():
        package = ".".join(name.split(".")[:2]) if name.startswith("lotus.") else name.split(".")[0]
        groups.setdefault(package, []).append({name: f"reference/{name}.md"})
    menu = [{package: pages} if len(pages) > 1 else pages[0] for package, pages in groups.items()]
    config.nav = [*(one for one in config.nav if "Reference" not in one), {"Reference": menu}]
    return config


def on_files(files: Any, config: Any) -> Any:
    for name, page in WHOLE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for name in modules():
        files.append(File.generated(config, f"reference/{name}.md", content=f"::: {name}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    source = page.file.src_uri
    if source.startswith("reference/"):
        return markdown
    return led(markdown, ROOT if source in WHOLE.values() else ROOT / "docs")


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Roles of Sphinx in docstrings are names in a fixed font here."""
    return _ROLE.sub(r"\1", html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    found = _ELSEWHERE.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri}: loads from elsewhere: {found[0]}")
    return output
