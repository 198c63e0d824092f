# SPDX-License-Identifier: Apache-2.0
"""A page for every public module, from its `__all__`: a new public name needs no edit of docs/.

Public are `mikernels`, its packages and modules that have an `__all__`, and those of
`mikernels.integrations`. On a page names stand with the others of the file that defines them, below
that file's own docstring, which holds their equation. A name is shown once: where it is defined, on
the first page that has it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# what has an `__all__` for other files of the package alone
INTERNAL = {"mikernels.cli", "mikernels.integrations.lazy"}


def source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def parsed(module: str) -> ast.Module:
    return ast.parse(source(module).read_text(encoding="utf-8"))


def exported(module: str) -> list[str]:
    for node in parsed(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def public_modules() -> Iterator[str]:
    yield "mikernels"
    for folder in ("mikernels", "mikernels/integrations"):
        for path in sorted((ROOT / folder).iterdir()):
            module = f"{folder}/{path.stem}".replace("/", ".")
            if path.stem.startswith("_") or module in INTERNAL or not source(module).is_file():
                continue
            if exported(module):
                yield module


def defining(module: str, name: str) -> str:
    """The module that defines a name which `module` exports, through any number of packages."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if alias.name == "*" and name in exported(node.module):
                    return defining(node.module, name)
                if (alias.asname or alias.name) == name:
                    if source(f"{node.module}.{alias.name}").is_file():
                        return f"{node.module}.{alias.name}"
                    return defining(node.module, alias.name)
    return module


def page(module: str, shown: set[tuple[str, str]]) -> str:
    groups: dict[str, list[str]] = {}
    for name in exported(module):
        home = defining(module, name)
        if name != "__version__" and (home, name) not in shown:
            shown.add((home, name))
            groups.setdefault(home, []).append(name)
    lines = [f"# {module}", ""]
    docstring = "    options: {members: [], show_root_heading: false, show_root_toc_entry: false}"
    if groups:
        lines += [f"::: {module}", docstring, ""]
    for home, names in sorted(groups.items()):
        if home != module:
            lines += [f"## {', '.join(names)}", "", f"::: {home}", docstring, ""]
        for name in names:
            if f"{module}.{name}" == home:
                lines += [line for n in exported(home) for line in (f"::: {home}.{n}", "")]
            else:
                lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines) if groups else ""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    shown: set[tuple[str, str]] = set()
    for module in public_modules():
        if text := page(module, shown):
            uri = f"reference/{module}.md"
            files.append(File.generated(config, uri, content=text))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    # a file that defines one name: its heading and the name's are one entry in the contents
    for entry in (entry for top in page.toc for entry in top.children):
        if [inner.title for inner in entry.children] == [entry.title]:
            entry.children = entry.children[0].children
