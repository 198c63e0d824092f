# SPDX-License-Identifier: Apache-2.0
"""One declaration a file: the folder is the list of what is measured.

Order: the operators of SAEs, then those of pairs and of attention, each alphabetically, so that
what has targets on a GPU comes first. The list is read from the sources, without importing them
(10 ms, 90 ms in a fresh process), because `gpu/gpu_check.py` asks before the package is built: this
file needs Python alone.
"""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..harness.spec import Benchmark

FOLDER = Path(__file__).parent
FAMILIES = ("sae", "pairs", "attention")


@functools.cache
def _declarations() -> dict[str, dict[str, ast.expr]]:
    """The keywords of each file's `Benchmark(...)`, in the order above."""
    found = {path.stem: _keywords(path) for path in FOLDER.glob("[!_]*.py")}
    return dict(sorted(found.items(), key=lambda item: (_family(item[1]), item[0])))


def _keywords(path: Path) -> dict[str, ast.expr]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            names = [ast.unparse(target) for target in node.targets]
            if names == ["BENCHMARK"]:
                return {word.arg: word.value for word in node.value.keywords if word.arg}
    raise ValueError(f"bench: {path.name} must set BENCHMARK = Benchmark(...), got none; add it")


def _family(keywords: dict[str, ast.expr]) -> int:
    given = keywords.get("family")
    return FAMILIES.index(ast.literal_eval(given)) if given else 0


def names(family: str | None = None, *, gpu: bool = False) -> tuple[str, ...]:
    """The operators, in order: of a family, or all; with gpu those that are measured on one."""
    return tuple(
        name
        for name, keywords in _declarations().items()
        if (family is None or FAMILIES[_family(keywords)] == family)
        and (not gpu or "gpu_shapes" in keywords)
    )


def load(name: str) -> Benchmark:
    """The declaration of one operator.

    Raises:
        ValueError: for a name that is not in the folder.
    """
    if name not in names():
        raise ValueError(
            f"bench: op must be one of {', '.join(names())} or all, got {name!r}; "
            f"list them with `mikernels bench --list`"
        )
    benchmark: Benchmark = importlib.import_module(f"{__name__}.{name}").BENCHMARK
    return benchmark
