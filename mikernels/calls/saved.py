# SPDX-License-Identifier: Apache-2.0
"""A call in a file: its arguments as they were before it, and what it gave.

    <number>-<operator>.safetensors

holds a tensor for each argument and result, under its name, and in its metadata what describes
them: shapes, strides, alignment, scalars, the implementation and why, the machine. Arguments that
share memory (or that overlap themselves, as expanded tensors do) are laid out in one piece of bytes
`memory.<number>`, so that they share it again. The file is written before the call, for one that
never returns, and once more with the results.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mikernels import _ext
from mikernels._dispatch import OPS, Op
from mikernels._memory import overlaps_itself
from mikernels._version import __version__
from mikernels.files import explained, parse_json, sealed
from mikernels.machine import cpu_name
from mikernels.owning import owned
from mikernels.tensor_files import (
    DTYPES,
    bytes_of,
    check_writable,
    open_tensors,
    read_tensors,
    write_tensors,
)

if TYPE_CHECKING:
    from mikernels.schema import SavedCall, SavedTensor, SavedValue

FORMAT, VERSION = "mikernels-call", 1
_NAME = re.compile(r"([0-9]{6,})-\w+\.safetensors")
# what allocators align to, on every device
ALIGNED = 64
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class Saver:
    """Saves calls to a folder that this process owns, until a limit is reached.

    Args:
        folder: made when missing; former calls in it stay.
        max_calls, max_bytes: what this saver writes at most.
    """

    def __init__(self, folder: Path, max_calls: int, max_bytes: int):
        # where it is now: the process may go to another folder before it writes
        self.folder = folder.absolute()
        self.max_calls, self.max_bytes = max_calls, max_bytes
        self._number = self._calls = self._bytes = 0
        self._lock, self._stopped = threading.Lock(), False
        self._stack = ExitStack()

    def open(self) -> None:
        """Own the folder.

        Raises:
            OSError: it cannot be made or written. BlockingIOError: somebody else writes there.
        """
        with explained("log", "calls", self.folder, "choose another folder"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(owned(self.folder, "log"))
        former = [int(m[1]) for path in self.folder.iterdir() if (m := _NAME.fullmatch(path.name))]
        self._number, self._pid = max(former, default=0), os.getpid()

    def close(self) -> None:
        self._stack.close()

    def before(self, op: Op, args: tuple[Any, ...], name: str, why: str) -> Saving | None:
        """Save what a call is given; None where it is not saved."""
        # a forked child would write to the same names
        if self._stopped or os.getpid() != self._pid:
            return None
        if reason := _unsaveable(op._names, args):
            warnings.warn(f"log: {op.name} is not saved: {reason}", stacklevel=2)
            return None
        size = 2 * sum(a.nbytes for a in args if isinstance(a, torch.Tensor))
        with self._lock:
            if self._calls >= self.max_calls:
                self._stop(f"{self._calls} calls are saved, max_calls={self.max_calls}")
                return None
            if self._bytes + size > self.max_bytes:
                self._stop(
                    f"{op.name} with its results may take {size:,} bytes beside {self._bytes:,} "
                    f"that are written, max_bytes={self.max_bytes:,}"
                )
                return None
            self._calls += 1
            self._number += 1
            path = self.folder / f"{self._number:06d}-{op.name}.safetensors"
        saving = Saving(self, path, op, args, name, why)
        return saving if saving.write() else None

    def _stop(self, reason: str) -> None:
        self._stopped = True
        warnings.warn(f"log: no more calls are saved to {self.folder}: {reason}", stacklevel=3)

    def count(self, size: int) -> None:
        with self._lock:
            self._bytes += size

    def failed(self, error: OSError) -> None:
        """The calls go on, and are not saved any more."""
        with self._lock:
            self._stop(str(error))


class Saving:
    """One call: saved when made, once more when it has ended."""

    def __init__(
        self, saver: Saver, path: Path, op: Op, args: tuple[Any, ...], name: str, why: str
    ):
        self._saver, self.path, self._size = saver, path, 0
        self._op, self._args = op, args
        self._tensors: dict[str, torch.Tensor] = {}
        arguments = self._pack(op._names, args)
        # copied where the call will write; all others stay as they are
        for entry in (arguments[i] for i in op.written if args[i] is not None):
            held = entry["tensor"]["held"]
            self._tensors[held] = self._tensors[held].clone()
        self._call: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "operator": op.name,
            "schema": op.schema,
            "implementation": name,
            "reason": why,
            "machine": machine(),
            "arguments": arguments,
            "results": None,
            "error": None,
        }

    def returned(self, found: Any) -> bool:
        named = results_of(self._op, self._args, found)
        self._call["results"] = self._pack(list(named), list(named.values()))
        return self.write()

    def raised(self, error: BaseException) -> None:
        self._call["error"] = f"{type(error).__name__}: {error}"
        self.write()

    def _pack(self, names: Sequence[str], values: Sequence[Any]) -> list[dict[str, Any]]:
        given = {n: v.detach() for n, v in zip(names, values, strict=True) if _is_tensor(v)}
        files, places = lay_out(given, first=sum("memory." in name for name in self._tensors))
        self._tensors |= files
        return [
            {"name": n, "tensor": places[n]} if n in places else {"name": n, **scalar(v)}
            for n, v in zip(names, values, strict=True)
        ]

    def write(self) -> bool:
        """Write the file anew; False where it could not be."""
        hashes = {n: hashlib.sha256(bytes_of(t)).hexdigest() for n, t in self._tensors.items()}
        text = json.dumps(sealed(self._call, **hashes), allow_nan=False)
        try:
            with explained("log", "a call", self.path, "free space, or log without a folder"):
                write_tensors(self.path, self._tensors, {FORMAT: text})
            size = self.path.stat().st_size
        except OSError as error:
            self._saver.failed(error)
            return False
        self._saver.count(size - self._size)
        self._size = size
        return True


def results_of(op: Op, args: Sequence[Any], gave: Any) -> dict[str, torch.Tensor | None]:
    """What a call returned and what it wrote, by name."""
    returns = op.default._schema.returns
    given = gave if isinstance(gave, tuple) else (gave,) if returns else ()
    named = {
        f"result.{r.name or i}": t for i, (r, t) in enumerate(zip(returns, given, strict=True))
    }
    return named | {f"after.{op._names[i]}": args[i] for i in op.written if args[i] is not None}


def machine() -> dict[str, Any]:
    """What the bits of a result may hang on."""
    return {
        "mikernels": __version__,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "level": _ext.cpu_level(),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
    }


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _unsaveable(names: Sequence[str], args: Sequence[Any]) -> str:
    """Why a call cannot be saved; "" if it can."""
    if len(args) != len(names):
        return f"it takes {len(names)} arguments, got {len(args)}"
    for name, t in zip(names, args, strict=True):
        if not _is_tensor(t):
            if not isinstance(t, bool | int | float | str | None):
                return f"{name} is a {type(t).__name__}"
            continue
        if type(t) not in (torch.Tensor, torch.nn.Parameter) or _is_wrapped(t):
            return f"{name} is a {type(t).__name__} of a transformation or another library"
        try:
            check_writable(name, t)
        except TypeError as error:
            return str(error)
        if t.is_cuda and torch.cuda.is_current_stream_capturing():
            return "it is recorded in a CUDA graph"
    return ""


def scalar(value: Any) -> dict[str, Any]:
    """A float by its bits, for NaN and infinity are none of JSON's."""
    return {"float": value.hex()} if isinstance(value, float) else {"value": value}


def reach(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from the first entry to the end of the last one."""
    if 0 in shape:
        return 0
    return (sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1) * itemsize


def _end(t: torch.Tensor) -> int:
    return t.data_ptr() + reach(t.shape, t.stride(), t.element_size())


def lay_out(
    tensors: Mapping[str, torch.Tensor], first: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """What a file holds of tensors, and for each how it lay in memory.

    Args:
        first: number of the first piece of memory.
    """
    files: dict[str, torch.Tensor] = {}
    places: dict[str, dict[str, Any]] = {}
    for group in _overlapping(tensors):
        ends = [_end(tensors[name]) for name in group]
        start = tensors[group[0]].data_ptr()
        alone = len(group) == 1 and not overlaps_itself(tensors[group[0]])
        held = group[0] if alone else f"memory.{first}"
        if alone:
            files[held] = tensors[held]
        else:
            first += 1
            files[held] = _bytes(tensors, group, start, max(ends) - start)
        for name in group:
            t = tensors[name]
            places[name] = {
                "held": held,
                "at": None if alone else t.data_ptr() - start,
                "shape": list(t.shape),
                "strides": list(t.stride()),
                "dtype": DTYPES[t.dtype],
                "aligned": (t if alone else tensors[group[0]]).data_ptr() % ALIGNED,
                "device": t.device.type,
            }
    return files, places


def _overlapping(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names by shared memory, each group by address."""

    def where(name: str) -> tuple[str, int]:
        t = tensors[name]
        # on the CPU by address, for NumPy gives each tensor of an array a storage of its own
        home = "" if t.device.type == "cpu" else str(t.untyped_storage().data_ptr())
        return f"{t.device} {home}", t.data_ptr()

    group: list[str] = []
    home, end = "", 0
    for name in sorted(tensors, key=where):
        at, start = where(name)
        if group and (at != home or start >= end or not tensors[name].numel()):
            yield group
            group = []
        end = max(end, _end(tensors[name])) if group else _end(tensors[name])
        home = at
        group.append(name)
    if group:
        yield group


def _bytes(
    tensors: Mapping[str, torch.Tensor], group: Sequence[str], start: int, size: int
) -> torch.Tensor:
    """The memory from an address on, uncopied."""
    t = tensors[group[0]]
    if t.device.type == "cpu":
        return torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=torch.uint8)
    storage = t.untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8, device=t.device)
    return raw.set_(storage, start - storage.data_ptr(), (size,), (1,))


@dataclass
class Call:
    """A saved call, read back."""

    path: Path
    form: SavedCall
    tensors: dict[str, torch.Tensor]

    @property
    def op(self) -> Op:
        return OPS[self.form.operator]

    def arguments(self, device: str | None = None) -> list[Any]:
        """The arguments in fresh memory, as they lay.

        Args:
            device: instead of their own.
        """
        return self._unpack(self.form.arguments, device)

    def results(self) -> dict[str, torch.Tensor] | None:
        """By name; None where the call never returned."""
        if self.form.results is None:
            return None
        values = self._unpack(self.form.results, "cpu")
        return {r.name: v for r, v in zip(self.form.results, values, strict=True) if v is not None}

    def _unpack(self, entries: Sequence[SavedValue], device: str | None) -> list[Any]:
        memory: dict[str, torch.Tensor] = {}
        values: list[Any] = []
        for entry in entries:
            if entry.tensor is not None:
                values.append(self._placed(entry.tensor, memory, device))
            else:
                values.append(entry.value if entry.float_ is None else float.fromhex(entry.float_))
        return values

    def _placed(
        self, place: SavedTensor, memory: dict[str, torch.Tensor], device: str | None
    ) -> torch.Tensor:
        held, dtype = self.tensors[place.held], _dtype(place.dtype)
        target = torch.device(device or place.device)
        if place.at is None:
            base = _memory(reach(place.shape, place.strides, dtype.itemsize), place.aligned, target)
            return _view(base, place, place.aligned, dtype).copy_(held)
        if place.held not in memory:
            base = memory[place.held] = _memory(held.numel(), place.aligned, target)
            base[place.aligned : place.aligned + held.numel()] = held
        return _view(memory[place.held], place, place.aligned + place.at, dtype)


def _dtype(name: str) -> torch.dtype:
    return next(dtype for dtype, own in DTYPES.items() if own == name)


def _memory(size: int, aligned: int, device: torch.device) -> torch.Tensor:
    whole = -(-(size + aligned) // ALIGNED) * ALIGNED
    return torch.empty(whole, dtype=torch.uint8, device=device)


def _view(base: torch.Tensor, place: SavedTensor, at: int, dtype: torch.dtype) -> torch.Tensor:
    return base.view(dtype).as_strided(place.shape, place.strides, at // dtype.itemsize)


def _unfit(place: SavedTensor, tensors: Mapping[str, torch.Tensor]) -> str:
    """Why a tensor cannot be laid out as it says; "" if it can."""
    held = tensors.get(place.held)
    if held is None:
        return f"no tensor {place.held}"
    if place.dtype not in DTYPES.values() or len(place.shape) != len(place.strides):
        return f"{place.dtype} {place.shape} with strides {place.strides}"
    dtype = _dtype(place.dtype)
    if place.at is None:
        same = held.dtype == dtype and list(held.shape) == place.shape
        return "" if same else f"{held.dtype} {list(held.shape)} for {place.dtype} {place.shape}"
    end = place.at + reach(place.shape, place.strides, dtype.itemsize)
    if held.dtype != torch.uint8 or held.dim() != 1 or end > len(held):
        return f"{end:,} bytes in {held.dtype} {list(held.shape)}"
    return "" if (place.aligned + place.at) % dtype.itemsize == 0 else f"one at byte {place.at}"


def load(path: str | Path) -> Call:
    """Read a saved call; every byte of it is checked.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is missing, foreign or changed.
    """
    # what registers the operators: nobody may have asked for one before
    from mikernels import ops as _registered  # noqa: F401
    from mikernels.schema import SavedCall, check, check_sealed

    path = Path(path)
    fix = "save it again with mikernels.log('save', FOLDER)"

    def unusable(expected: str, got: object) -> ValueError:
        return ValueError(f"replay: {path} must be {expected}, got {got}; {fix}")

    expected = "a call saved by mikernels.log"
    try:
        with open_tensors(path) as file:
            text = (file.metadata() or {}).get(FORMAT)
        tensors = read_tensors(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"replay: {path} must be {expected}, got no such file") from error
    except (OSError, ValueError) as error:
        raise unusable(expected, error) from error
    if text is None:
        raise unusable(expected, f"a safetensors file without {FORMAT!r} in its metadata")
    try:
        raw = parse_json(text.encode())
    except ValueError as error:
        raise unusable(expected, error) from error
    if not isinstance(raw, dict) or raw.get("version") != VERSION:
        got = raw.get("version") if isinstance(raw, dict) else type(raw).__name__
        raise unusable(f"{expected}, version {VERSION}", f"version {got!r}")
    form = check(SavedCall, raw, "replay", path, fix)
    check_sealed(raw, "replay", path, fix)
    if form.operator not in OPS:
        raise unusable(f"of an operator among {sorted(OPS)}", repr(form.operator))
    op = OPS[form.operator]
    if form.schema_ != op.schema or [a.name for a in form.arguments] != list(op._names):
        raise ValueError(
            f"replay: {path} must be of {op.schema!r}, got {form.schema_!r}; replay it with "
            f"mikernels {form.machine.mikernels}, which saved it"
        )
    hashes = {n: hashlib.sha256(bytes_of(t)).hexdigest() for n, t in tensors.items()}
    kept = {n: h for n, h in form.sha256.items() if n != "self"}
    if hashes != kept:
        names = sorted(n for n in hashes.keys() | kept.keys() if hashes.get(n) != kept.get(n))
        raise unusable(f"unchanged: {names[0]} with its checksum", "others")
    for entry in [*form.arguments, *(form.results or [])]:
        if entry.tensor is not None and (wrong := _unfit(entry.tensor, tensors)):
            raise unusable(f"with a place for {entry.name}", wrong)
    return Call(path, form, tensors)
