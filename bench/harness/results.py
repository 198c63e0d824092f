# SPDX-License-Identifier: Apache-2.0
"""The results file: one JSON a machine, cases merged into it one by one.

{"schema": 1, "machine": facts, "peaks": ceilings, "cases": [case, ...]}; a case is what
`harness.measure` returns, keyed by op, shape, mode and, on a CPU, its threads, on a GPU, the dtype:
measuring it again replaces it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mikernels.files import explained, finite, read_json, write_json
from mikernels.owning import owned

from .spec import DTYPES

SCHEMA = 1


def key(case: dict[str, Any]) -> tuple[str, str, str, int | str]:
    # files from before there were GPUs have no device
    how: int | str = case["facts"]["torch_threads"]
    if case.get("device", "cpu") != "cpu":
        how = next(name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{case['dtype']}")
    return case["op"], case["shape"]["name"], case["mode"], how


def key_of(op: str, shape: str, mode: str, dtype: str, device: str) -> tuple[str, str, str, Any]:
    """The key that a case will have."""
    return op, shape, mode, torch.get_num_threads() if device == "cpu" else dtype


def new(machine: dict[str, Any], peaks: dict[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "machine": machine, "peaks": peaks, "cases": []}


def load(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: when it is not one, or is of another schema.
    """
    from mikernels.schema import Results, check

    fix = "measure again, into another file"
    try:
        results = read_json(path, "bench", "a results file", fix)
    except OSError as error:
        raise ValueError(str(error)) from error
    if not isinstance(results, dict) or not {"schema", "machine", "peaks", "cases"} <= set(results):
        raise ValueError(f"bench: {path} is not a results file of `mikernels bench --json`")
    if results["schema"] != SCHEMA:
        raise ValueError(
            f"bench: {path} must have schema {SCHEMA}, got {results['schema']!r}; measure again"
        )
    check(Results, results, "bench", path, fix)
    for number, case in enumerate(results["cases"]):
        try:
            key(case)
        except (KeyError, TypeError, AttributeError, StopIteration) as error:
            raise ValueError(
                f"bench: {path} must hold cases.{number} with op, shape, mode, dtype and facts, "
                f"got {type(error).__name__}: {error}; {fix}"
            ) from error
    return results


def same_machine(path: Path, old: dict[str, Any], machine: dict[str, Any]) -> None:
    """Ratios from two processors do not belong in one file.

    Raises:
        ValueError: when they differ.
    """
    gpus = [m.get("gpu", {}).get("name") for m in (machine, old["machine"])]
    if gpus[0] != gpus[1]:
        raise ValueError(
            f"bench: {path} holds results of {gpus[1] or 'a CPU'}, these are of "
            f"{gpus[0] or 'a CPU'}; choose another --json file"
        )
    if gpus[0] is not None:
        # the host of a lent GPU changes, and does not decide its times
        return
    mine, theirs = ([m["cpu"], m["cores"], m["flags"]] for m in (machine, old["machine"]))
    if mine != theirs:
        raise ValueError(
            f"bench: {path} holds results of {theirs[0]!r} ({theirs[1]} cores), this machine is "
            f"{mine[0]!r} ({mine[1]} cores) or has other CPU flags; choose another --json file"
        )


def merge(results: dict[str, Any], case: dict[str, Any]) -> None:
    """Adds the case, in the place of an earlier one with the same key."""
    kept = [old for old in results["cases"] if key(old) != key(case)]
    results["cases"] = [*kept, case]


def save(path: Path, results: dict[str, Any]) -> None:
    """Atomic: a killed run leaves the previous file whole, a full disk too."""
    with explained("bench", "results", path, "free space, then go on with --resume"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, finite(results))


@contextmanager
def written(path: Path | None) -> Iterator[None]:
    """Be the only one that merges cases into the file; None is no file.

    Raises:
        BlockingIOError: another process does.
    """
    if path is None:
        yield
        return
    with explained("bench", "results", path, "choose another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with owned(path.parent, "bench", f".{path.name}.lock"):
        yield
