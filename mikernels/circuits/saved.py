# SPDX-License-Identifier: Apache-2.0
"""A circuit as one file: safetensors, whose metadata say what the tensors are, under a checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from mikernels.files import explained, parse_json, sealed
from mikernels.models.graph import Graph, Layer
from mikernels.tensor_files import bytes_of, open_tensors, read_tensors, write_tensors

FORMAT, VERSION = "mikernels.circuit", 1
KEY = "circuit"
EXPECTED = "a circuit that Circuit.save wrote"
FIX = "find the circuit again"


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(bytes_of(t))
    return digest.hexdigest()


def write(
    path: Path, graph: Graph, facts: dict[str, str | None], tensors: dict[str, torch.Tensor]
) -> None:
    """Write atomically.

    Raises:
        OSError: with what could not be written, and where. TypeError: for a tensor that a file
            cannot hold.
    """
    layers = [layer._asdict() for layer in graph.layers]
    whole: dict[str, Any] = {"format": FORMAT, "version": VERSION, **facts}
    whole["graph"] = {"model": graph.model, "d": graph.d, "layers": layers}
    text = json.dumps(sealed(whole, tensors=_digest(tensors)), allow_nan=False)
    with explained("Circuit.save", "a circuit", path, "give another path"):
        write_tensors(path, tensors, {KEY: text})


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote: the graph, facts and tensors by name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is another, or damaged, with its path.
    """
    where = "Circuit.load"
    try:
        with open_tensors(path) as file:
            text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise ValueError("safetensors of something else")
        raw, tensors = parse_json(text.encode()), read_tensors(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: {path} must be {EXPECTED}, got no such file; {FIX}"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {path} must be {EXPECTED}, got {error}; {FIX}") from error
    # pydantic costs 35 ms
    from mikernels.schema import CircuitFile, check, check_sealed

    form = check(CircuitFile, raw, where, path, FIX)
    check_sealed(raw, where, path, FIX)
    if (now := _digest(tensors)) != form.sha256.get("tensors"):
        raise ValueError(
            f"{where}: {path} must hold the tensors that were written, got other bytes (SHA-256 "
            f"{now[:16]}...); {FIX}"
        )
    layers = tuple(Layer(**layer.model_dump()) for layer in form.graph.layers)
    facts = form.model_dump(include={"level", "method", "label", "rules"})
    return {"graph": Graph(form.graph.model, form.graph.d, layers), **facts, **tensors}
