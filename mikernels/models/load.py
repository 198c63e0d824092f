# SPDX-License-Identifier: Apache-2.0
"""Models and tokenisers from local folders, without running what lies in them."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # the GGUF reader's bar is a bare tqdm on stderr
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Parse a GGUF file once: transformers makes a reader for the configuration, the tokeniser and
    the weights each, and reading 100,000 metadata strings is most of the time of a small model; it
    makes the table of tensor names, 4.7 of the 10.5 s of SmolLM2, for each of 397 modules."""
    import gguf

    makers = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, make in makers.items():
        setattr(gguf, name, functools.cache(make))
    try:
        yield
    finally:
        for name, make in makers.items():
            setattr(gguf, name, make)


def _unreadable(folder: Path, expected: str, error: Exception, fix: str = "") -> ValueError:
    """Of what transformers raised; where that is about code of the folder, the file that asks."""
    if "trust_remote_code" in str(error):
        for path in sorted(folder.glob("*.json")):
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, OSError):
                # not the file that transformers read
                continue
            if isinstance(config, dict) and config.get("auto_map"):
                return ValueError(
                    f"load_model: {path} must not need Python code of its own, got auto_map "
                    f"{config['auto_map']}, which is never run here; load model and tokeniser "
                    f"yourself, with trust_remote_code=True if you trust it, and pass them to "
                    f"ModelSource"
                )
    return ValueError(
        f"load_model: {folder} must hold {expected}, got {type(error).__name__}: {error}{fix}"
    )


def _check_no_kernels(folder: Path) -> None:
    """No attention from a repository, whose compiled code transformers would fetch and run."""
    path = folder / "config.json"
    try:
        level = [json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
    except (ValueError, OSError, RecursionError):
        return  # transformers says what is wrong with it
    while level:
        value = level.pop()
        if isinstance(value, list):
            level.extend(value)
        elif isinstance(value, dict):
            for name, item in value.items():
                level.append(item)
                if name.endswith("_implementation") and "/" in json.dumps(item):
                    raise ValueError(
                        f"load_model: {path} must not name code of a repository, got {name} = "
                        f"{item!r}, which is never fetched here; remove it, or load model and "
                        f"tokeniser yourself and pass them to ModelSource"
                    )


def _check_whole(folder: Path, model: torch.nn.Module, missing: Iterable[str]) -> None:
    """Every weight comes from the folder and is finite; reads all of them once."""
    absent = sorted(missing)
    if absent:
        raise ValueError(
            f"load_model: {folder} must hold every weight of {type(model).__name__}, got none for "
            f"{', '.join(absent[:3])} ({len(absent)} in all), which would be random; complete the "
            f"files, or load model and tokeniser yourself and pass them to ModelSource"
        )
    for name, p in model.named_parameters():
        if not bool(p.isfinite().all()):
            raise ValueError(
                f"load_model: {folder} must hold finite weights, got NaN or inf in {name}; "
                f"restore the file, or load it in a wider dtype"
            )


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def _split(file: Path, gguf_file: str | None) -> tuple[Path, str]:
    """Folder and name of a GGUF file given as such."""
    if not _is_gguf(file):
        raise ValueError(
            f"load_model: folder must be a model folder or a .gguf file, got the file {file}; give "
            f"the folder that it lies in"
        )
    if gguf_file not in (None, file.name):
        raise ValueError(
            f"load_model: gguf_file must be left out for the file {file}, got {gguf_file!r}"
        )
    return file.parent, file.name


class LocalModel:
    """A model's folder: what is in it is loaded piece by piece, the cheap ones first.

    Nothing in the folder is executed: no code of its own (`auto_map`), no question about it, and of
    pickled weights only tensors are read (`weights_only`).

    Args:
        folder: of `config.json`, weights and tokeniser files; or of a GGUF file; or such a file.
        gguf_file: the GGUF file's name in the folder; None finds the only one if there is no
            `config.json`.

    Attributes:
        folder, gguf_file: where it is; None without one. name: what to call it.

    Raises:
        FileNotFoundError: no such folder or file.
        ModuleNotFoundError: without the `models` extra.
        ValueError: the configuration names code of a repository. Later, when `transformers` cannot
            read what is asked for, or only with code from the folder or a repository.
    """

    def __init__(self, folder: str | Path, gguf_file: str | None = None):
        folder = Path(folder)
        if folder.is_file():
            folder, gguf_file = _split(folder, gguf_file)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"load_model: folder must be an existing model folder or .gguf file, got {folder}, "
                f"and nothing is fetched; download the model first, e.g. `hf download ID "
                f"--local-dir FOLDER`"
            )
        ggufs = sorted(path.name for path in folder.iterdir() if _is_gguf(path))
        if gguf_file is None and not (folder / "config.json").exists():
            if len(ggufs) != 1:
                raise FileNotFoundError(
                    f"load_model: {folder} must hold config.json or one *.gguf file, got "
                    f"{ggufs or 'neither'}; name one with gguf_file"
                )
            gguf_file = ggufs[0]
        if gguf_file is not None and gguf_file not in ggufs:
            raise FileNotFoundError(
                f"load_model: gguf_file must be one of {ggufs} in {folder}, got {gguf_file!r}"
            )
        self.folder, self.gguf_file = folder, gguf_file
        self.name = folder.resolve().name if gguf_file is None else Path(gguf_file).stem
        for package in ("transformers", "gguf", "accelerate")[: 3 if gguf_file else 1]:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(
                    f"load_model: {package} must be installed; `pip install 'mikernels[models]'`"
                )
        # False, not the default: without an answer transformers asks on the terminal
        self._options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if gguf_file is not None:
            self._options["gguf_file"] = gguf_file
        _check_no_kernels(folder)

    def files(self) -> list[Path]:
        """The files that decide weights, configuration and tokeniser."""
        if self.gguf_file is not None:
            return [self.folder / self.gguf_file]
        read = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
        return sorted(p for p in self.folder.iterdir() if p.suffix in read and p.is_file())

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Quietly; while it is entered, a GGUF file is parsed once for all that is loaded."""
        once = _gguf_read_once() if "gguf_file" in self._options else nullcontext()
        with _quiet_transformers(), once:
            yield

    def _read(self, kind: Any, expected: str, fix: str = "", **options: Any) -> Any:
        try:
            return kind.from_pretrained(str(self.folder), **options, **self._options)
        except Exception as error:  # a damaged file may raise anything there
            raise _unreadable(self.folder, expected, error, fix) from error

    def sizes(self) -> tuple[int | None, int | None]:
        """d and the number of decoder layers, None for what the configuration does not say."""
        from transformers import AutoConfig

        with self.reading():
            config = self._read(AutoConfig, "a model that transformers reads").get_text_config()
        names = ("hidden_size", "num_hidden_layers")
        d, layers = (getattr(config, name, None) for name in names)
        return d, layers

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        fix = "; save it there with tokenizer.save_pretrained"
        with self.reading():
            return self._read(AutoTokenizer, "a tokeniser", fix)

    def model(self, dtype: torch.dtype = torch.float32, head: bool = False) -> torch.nn.Module:
        """In eval mode.

        Args:
            dtype: of the weights.
            head: with the head that gives a language model's logits.

        Raises:
            ValueError: as above; a weight that is missing or not finite.
        """
        from transformers import AutoModel, AutoModelForCausalLM

        with self.reading():
            model, loaded = self._read(
                AutoModelForCausalLM if head else AutoModel,
                "a model that transformers reads",
                dtype=dtype,
                weights_only=True,
                output_loading_info=True,
            )
        _check_whole(self.folder, model, loaded["missing_keys"])
        return model.eval()


def load_model(
    folder: str | Path, gguf_file: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, Any]:
    """Load `(model, tokenizer)` from a local folder with `transformers`, never from the network.

    Args:
        folder, gguf_file: as for LocalModel.
        dtype: of the loaded weights.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: as LocalModel.
    """
    local = LocalModel(folder, gguf_file)
    with local.reading():
        tokenizer = local.tokenizer()
        return local.model(dtype), tokenizer
