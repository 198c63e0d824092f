# SPDX-License-Identifier: Apache-2.0
"""A page for every script of examples/, with what it printed: `docs/examples/NAME.txt`, whose first
line is the command.

A script is in cells, `# %% what the next lines do`, as notebooks read it; here each is a paragraph
with its code. `tests/test_examples.py` holds that what is shown is what a run prints.
"""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)


def cells(name: str) -> tuple[str, list[str]] | None:
    """Docstring, and the texts and codes of the cells in turn; None of what is no example."""
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    first, *rest = CELL.split(source)
    about = ast.get_docstring(ast.parse(source)) or ""
    if not rest:
        return None
    return about, [first[first.index('"""', first.index('"""') + 3) + 3 :], *rest]


def fenced(code: str) -> str:
    code = code.strip("\n")
    if all(line.startswith("# ") for line in code.splitlines()):
        # what is for a shell
        return "\n".join(["```", *(line[2:] for line in code.splitlines()), "```"])
    return f"```python\n{code}\n```"


def page(name: str, repository: str) -> str:
    about, (first, *rest) = cells(name) or ("", [""])
    title, _, more = about.partition("\n")
    shown = (ROOT / "docs" / "examples" / f"{name}.txt").read_text(encoding="utf-8")
    parts = [f"# {title.rstrip('.')}", more.strip("\n"), fenced(first)]
    for text, code in zip(rest[::2], rest[1::2], strict=True):
        text = text.strip()
        parts += [text if text.endswith((":", "?", ")", "`")) else f"{text}.", fenced(code)]
    parts += [
        "## What it prints",
        f"```text\n{shown.rstrip()}\n```",
        f"[The script]({repository}/blob/main/examples/{name}.py); `--help` shows what can be set.",
    ]
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    scripts = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
    found = {name: made[0] for name in scripts if (made := cells(name)) is not None}
    rows = [f"- [{about.partition(chr(10))[0]}]({name}.md)" for name, about in found.items()]
    intro = (
        "Each is a script of the folder `examples`, in cells, so that it opens as a notebook too. "
        "None needs a model hub or a GPU."
    )
    index = "\n".join(["# Examples", "", intro, "", *rows, ""])
    files.append(File.generated(config, "examples/index.md", content=index))
    for name in found:
        text = page(name, config.extra["repository"])
        files.append(File.generated(config, f"examples/{name}.md", content=text))
    return files
