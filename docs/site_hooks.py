"""Hooks of mkdocs: README.md is the start page, and the API reference has a page for each module of public names."""  # noqa: INP001

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)]*)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the start page and the pages of the reference."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for module, names in public_names().items():
        directives = "\n\n".join(f"::: {module}.{name}" for name in names)
        files.append(File.generated(config, f"reference/{module}.md", content=f"# {module}\n\n{directives}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Point links at pages of the site; a link to another file of the repository becomes its text."""
    in_root = page.file.src_uri == "index.md"

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        path = path.removeprefix("docs/") if in_root else path.replace("../README.md", "index.md")
        return f"[{text}]({path}#{anchor})" if files.get_file_from_path(path) else text

    return _LINK.sub(link, markdown)


def public_names() -> dict[str, list[str]]:
    """Return the modules that define the public names, and their names."""
    modules: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / "loom" / "__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            modules.setdefault(str(node.module), []).extend(alias.name for alias in node.names)
    return modules
