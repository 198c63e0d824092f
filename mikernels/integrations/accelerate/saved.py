# SPDX-License-Identifier: Apache-2.0
"""An SAE that a library saved, loaded by that library: for `mikernels accelerate --check`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Saved(NamedTuple):
    """What a library's folder looks like: the package, its files, and how it is loaded."""

    package: str
    config: str
    weights: str
    load: Callable[[Path, dict[str, Any]], Any]


def _saelens(folder: Path, config: dict[str, Any]) -> Any:
    sae_lens: Any = importlib.import_module("sae_lens")
    # settings of training alone are in a checkpoint's configuration
    training = "decoder_init_norm" in config
    kind = sae_lens.TrainingSAE if training else sae_lens.SAE
    return kind.load_from_disk(folder, device="cpu")


def _sparsify(folder: Path, config: dict[str, Any]) -> Any:
    sparsify: Any = importlib.import_module("sparsify")
    return sparsify.SparseCoder.load_from_disk(folder, device="cpu")


def _dictionary_learning(folder: Path, config: dict[str, Any]) -> Any:
    utils: Any = importlib.import_module("dictionary_learning.utils")
    return utils.load_dictionary(str(folder), "cpu")[0]


LIBRARIES = (
    Saved("sae_lens", "cfg.json", "sae_weights.safetensors", _saelens),
    Saved("sparsify", "cfg.json", "sae.safetensors", _sparsify),
    Saved("dictionary_learning", "config.json", "ae.pt", _dictionary_learning),
)


def load_saved(folder: Path) -> Any:
    """The SAE in a folder, as the library that saved it loads it, on the CPU.

    Raises:
        FileNotFoundError: no such folder, or no library's files in it.
        ValueError: its configuration is not JSON.
        ImportError: the library is not installed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"accelerate: {folder} must be a folder of a saved SAE, got none")
    for saved in LIBRARIES:
        if (folder / saved.weights).is_file():
            break
    else:
        known = ", ".join(f"{s.weights} ({s.package})" for s in LIBRARIES)
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise FileNotFoundError(
            f"accelerate: {folder} must hold one of {known}, got {', '.join(found) or 'nothing'}"
        )
    path = folder / saved.config
    if not path.is_file():
        raise FileNotFoundError(
            f"accelerate: {folder} must hold {saved.config} beside {saved.weights}, got none"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"accelerate: {path} must be JSON, got {error}") from error
    try:
        return saved.load(folder, config)
    except ImportError as error:
        raise ImportError(
            f"accelerate: {folder} was saved by {saved.package}, which cannot be imported "
            f"({error}); install it"
        ) from error
