# SPDX-License-Identifier: Apache-2.0
"""Activation shards: a folder of safetensors files and an `index.json`, written atomically.

Every shard holds `activations [rows, d]`, `targets [rows, d_out]` where they are to be
reconstructed as something else (a transcoder's target is the output of an MLP), and any number of
tensors with one entry a row, such as `token_ids [rows]`. `index.json` names the shards with their
rows and checksums, and is written last, so that its presence means that the folder is complete.

A checksum (CRC-32) covers 256 rows of all tensors of a shard and is verified on every read of them,
on the bytes that are used: 0.13 ms for 0.8 MB (256 rows of 768 in fp32) where zlib has the
processor's instructions for it. Files without our index have none.
"""

from __future__ import annotations

import re
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from mikernels.activations.arrays import ArrayShard, refuse_pickle
from mikernels.activations.sources import Rows, Source, check_activations
from mikernels.files import check_json, explained, partial_of, read_json, sealed, write_json
from mikernels.owning import LOCK, owned
from mikernels.tensor_files import bytes_of, open_tensors, write_tensors

if TYPE_CHECKING:
    from mikernels.schema import Index

Paths = str | Path | Sequence[str | Path]
INDEX = "index.json"
CHUNK_ROWS = 256
WINDOW_BYTES = 64 << 20
_OWN = re.compile(
    r"activations-[0-9]{5,}\.safetensors|\.activations-[0-9]{5,}\.safetensors\.partial"
)


def is_target(tensor: torch.Tensor) -> bool:
    """Whether a tensor named "targets" is what rows are to be reconstructed as: floating `[n, d]`.

    Others of the name, such as labels, just go with the rows.
    """
    return tensor.dim() == 2 and tensor.is_floating_point()


class Shard:
    """One opened file: its shape is known, its rows stay on disk until they are read.

    Args:
        crc32: of every 256 rows; None where none are known.
        target: the tensor that is read as "targets"; None for none. There need be none of the name
            "targets".

    Attributes:
        path: the file. rows, d, dtype: of its activations. d_target: width of its targets, None
            without. row_bytes: of both. extra: names of the other tensors.
    """

    def __init__(
        self, path: Path, key: str, crc32: list[int] | None = None, target: str | None = None
    ):
        self.path = path
        self._crc32 = crc32
        try:
            # the pages are mapped, not read; the map lives as long as this object
            self._file = open_tensors(path)
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            shapes = {name: list(part.get_shape()) for name, part in slices.items()}
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"ShardSource: {path} must be a complete safetensors file, got {error}; it is "
                f"truncated or of another format: write it again or move it out of the folder"
            ) from error
        matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        matrices = [name for name in matrices if name != target] or matrices
        if key not in slices and len(matrices) == 1:
            key = matrices[0]
        if key not in slices or len(shapes[key]) != 2:
            raise ValueError(
                f"ShardSource: {path} must hold a tensor {key!r} [rows, d], got {shapes}; name the "
                f"tensor with key="
            )
        self.rows, self.d = shapes[key]
        self.dtype = slices[key][:0].dtype
        found = None
        if target not in (None, key) and shapes.get(target, []) and is_target(slices[target][:0]):
            found = target
        if target != key and found is None and target not in (None, "targets"):
            raise ValueError(
                f"ShardSource: {path} must hold a floating tensor {target!r} [rows, d_out], got "
                f"{shapes}; name the tensor with target="
            )
        renamed = {key: "activations"}
        self.d_target: int | None = None
        if found is not None:
            n, self.d_target = shapes[found]
            if n != self.rows or not self.d_target:
                raise ValueError(
                    f"ShardSource: {path} must hold {target!r} [{self.rows}, d_out] beside "
                    f"{key!r}, got {shapes[found]}; write it again, or read without by target=None"
                )
            renamed[found] = "targets"
        columns = {name for name, shape in shapes.items() if shape[:1] == [self.rows]}
        # as in the file -> as read; what has the name of one of those is left out
        self._names = {name: name for name in columns - set(renamed.values())} | renamed
        # a checksum covers all of them
        self._slices = {name: slices[name] for name in columns}
        self.extra = sorted(self._names.keys() - renamed.keys())
        self.row_bytes = sum(shapes[name][1] * slices[name][:0].dtype.itemsize for name in renamed)

    def read(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Rows start..stop-1 (cut at the end) of every tensor.

        Raises:
            ValueError: the rows are not those that were written.
        """
        stop = min(stop, self.rows)
        if self._crc32 is None:
            return self._named({name: part[start:stop] for name, part in self._slices.items()})
        # whole chunks, which have a checksum
        first = start - start % CHUNK_ROWS
        last = min(self.rows, -(-stop // CHUNK_ROWS) * CHUNK_ROWS)
        read = {name: part[first:last] for name, part in self._slices.items()}
        for row, got in zip(range(first, last, CHUNK_ROWS), _crc32s(read), strict=True):
            if got != self._crc32[row // CHUNK_ROWS]:
                raise ValueError(
                    f"ShardSource: {self.path} must hold rows {row} to "
                    f"{min(row + CHUNK_ROWS, self.rows) - 1} as they were written, got another "
                    f"checksum: they have changed on the disk; write the shards again or restore "
                    f"the file"
                )
        return self._named({n: rows[start - first : stop - first] for n, rows in read.items()})

    def _named(self, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: rows[own] for own, name in self._names.items()}


def _crc32s(rows: dict[str, torch.Tensor]) -> list[int]:
    """Of every 256 rows, over all tensors in the order of their names."""
    n = next(iter(rows.values())).shape[0]
    found = []
    for start in range(0, n, CHUNK_ROWS):
        crc = 0
        for name in sorted(rows):
            crc = zlib.crc32(bytes_of(rows[name][start : start + CHUNK_ROWS]), crc)
        found.append(crc)
    return found


def open_shards(
    folder: Paths, key: str = "activations", target: str | None = None
) -> list[Shard | ArrayShard]:
    """The shards of a folder, of one file or of several of both, checked against `index.json` where
    there is one.

    Raises:
        FileNotFoundError: no such folder, no shard in it, or a listed shard is missing.
        ValueError: a shard that is truncated, foreign, or does not agree with the index.
    """
    if not isinstance(folder, str | Path):
        if not folder:
            raise ValueError("ShardSource: folder must name at least one file or folder, got none")
        return [shard for path in folder for shard in open_shards(path, key, target)]
    folder = Path(folder)
    if folder.is_file():
        refuse_pickle(folder)
        npy = folder.suffix.lower() == ".npy"
        return [ArrayShard(folder) if npy else Shard(folder, key, target=target)]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"ShardSource: folder must be an existing folder of safetensors shards, got {folder}"
        )
    paths = sorted(folder.glob("*.safetensors"))
    if arrays := sorted(folder.glob("*.npy")):
        if paths:
            raise ValueError(
                f"ShardSource: {folder} must hold files of one kind, got {paths[0].name} and "
                f"{arrays[0].name}; name the files"
            )
        return [ArrayShard(path) for path in arrays]
    expected: dict[str, int] = {}
    crc32: dict[str, list[int] | None] = {}
    if (folder / INDEX).exists():
        index = _read_index(folder)
        expected = {shard.file: shard.rows for shard in index.shards}
        crc32 = {shard.file: shard.crc32 for shard in index.shards}
        names = {path.name for path in paths}
        for name in expected.keys() - names:
            raise FileNotFoundError(
                f"ShardSource: {folder / name} is listed in {INDEX} and missing; write the shards "
                f"again or restore it"
            )
        for name in names - expected.keys():
            raise ValueError(
                f"ShardSource: {folder / name} is not listed in {INDEX}; move it out of the folder"
            )
    if not paths:
        for path in sorted(folder.iterdir()):
            refuse_pickle(path)
        raise FileNotFoundError(
            f"ShardSource: {folder} must hold *.safetensors files, or *.npy, got none"
        )
    shards = [Shard(path, key, crc32.get(path.name), target) for path in paths]
    for shard in shards:
        if shard.rows != expected.get(shard.path.name, shard.rows):
            raise ValueError(
                f"ShardSource: {shard.path} must have {expected[shard.path.name]} rows by {INDEX}, "
                f"got {shard.rows}; write the shards again"
            )
    return list(shards)


def read_index(folder: str | Path) -> dict[str, Any]:
    """`{"shards": [{"file", "rows", "crc32"}, ...], "metadata": {...}}` of `write_shards`.

    Raises:
        FileNotFoundError, ValueError: when there is no such index.
    """
    return _read_index(Path(folder)).model_dump(exclude={"sha256"}, exclude_none=True)


def _read_index(folder: Path) -> Index:
    from mikernels.schema import Index, check, check_sealed

    path, fix = folder / INDEX, "remove it to read every shard of the folder"
    expected = "an index written by write_shards"
    raw = read_json(path, "ShardSource", expected, fix)
    try:
        index = check(Index, raw, "ShardSource", path, fix)
    except ValueError as error:
        reason = str(error).removeprefix(f"ShardSource: {path} must hold ")
        raise ValueError(f"ShardSource: {path} must be {expected}, with {reason}") from error
    if len({shard.file for shard in index.shards}) != len(index.shards):
        raise ValueError(f"ShardSource: {path} must list every shard once, got one twice; {fix}")
    if index.sha256 is None:
        warnings.warn(
            f"ShardSource: {path} is from before checksums: a bit that flipped in a shard is not "
            f"seen; write the shards again to have them",
            stacklevel=4,
        )
        return index
    check_sealed(raw, "ShardSource", path, fix)
    for number, shard in enumerate(index.shards):
        chunks = -(-shard.rows // CHUNK_ROWS)
        if len(shard.crc32 or ()) != chunks:
            raise ValueError(
                f"ShardSource: {path} must hold shards.{number}.crc32 of {chunks} checksums, got "
                f"{len(shard.crc32 or ())}; {fix}"
            )
    return index


class ShardSource(Source):
    """Rows of memory-mapped shards, shuffled without reading everything.

    Shards are cut into chunks of 256 rows. Each epoch visits the chunks in a new random order, and
    rows mix within a window of many chunks (64 MB by default), which is all that is in memory.

    Args:
        folder: a folder of `*.safetensors` (see `write_shards`) or of `*.npy`, one such file, or a
            list of files and folders.
        batch_size: rows of a batch; None is the trainer's.
        seed: decides the orders.
        key: the tensor's name; a shard with a single 2-D tensor, the target aside, may call it
            anything.
        target: the tensor `[rows, d_out]` that the rows are to be reconstructed as, which
            `next_rows` returns as "targets"; shards need not have one of that name. None: the rows
            themselves, whatever lies beside them.
        window_rows: rows that mix with each other; None is 64 MB worth.

    Attributes:
        n_rows: of all shards.

    Raises:
        FileNotFoundError, TypeError, ValueError: for a missing or empty folder, and for a shard
            that is truncated, foreign, pickled or of another width, by name.
    """

    def __init__(
        self,
        folder: Paths,
        batch_size: int | None = None,
        seed: int = 0,
        *,
        key: str = "activations",
        target: str | None = "targets",
        window_rows: int | None = None,
    ):
        super().__init__(batch_size, seed)
        self._shards = open_shards(folder, key, target)
        first = self._shards[0]
        for shard in self._shards:
            check_activations("ShardSource", str(shard.path), [shard.rows, shard.d], shard.dtype)
            if (shard.d, shard.d_target, shard.extra) != (first.d, first.d_target, first.extra):
                expected, got = (
                    f"{s.d}] with {s.extra}"
                    + ("" if s.d_target is None else f" and targets [rows, {s.d_target}]")
                    for s in (first, shard)
                )
                raise ValueError(
                    f"ShardSource: {shard.path} must be [rows, {expected} like {first.path.name}, "
                    f"got [{shard.rows}, {got}; keep one layer of one model in a folder"
                )
        self.d, self._d_target = first.d, first.d_target
        self.n_rows = sum(shard.rows for shard in self._shards)
        if window_rows is None:
            window_rows = WINDOW_BYTES // first.row_bytes
        self._window_chunks = max(1, max(window_rows, batch_size or 0) // CHUNK_ROWS)
        chunks = [-(-shard.rows // CHUNK_ROWS) for shard in self._shards]
        self._first_chunk = [0, *accumulate(chunks)]
        self._chunk_order: tuple[int, torch.Tensor] | None = None

    def read(self, rows: int = 4096) -> Iterator[Rows]:
        """One epoch in the order in which it was written, at most so many rows at a time."""
        if rows < 1:
            raise ValueError(f"ShardSource: rows must be at least 1, got {rows}")
        for shard in self._shards:
            for start in range(0, shard.rows, rows):
                yield shard.read(start, start + rows)

    def _load(self, epoch: int, block: int) -> Rows | None:
        if self._chunk_order is None or self._chunk_order[0] != epoch:
            self._chunk_order = epoch, self._permutation(self._first_chunk[-1], epoch)
        start = block * self._window_chunks
        chosen = sorted(self._chunk_order[1][start : start + self._window_chunks].tolist())
        if not chosen:
            return None
        parts = []
        for chunk in chosen:
            at = bisect_right(self._first_chunk, chunk) - 1
            row = (chunk - self._first_chunk[at]) * CHUNK_ROWS
            parts.append(self._shards[at].read(row, row + CHUNK_ROWS))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _blocks(self, epoch: int) -> int:
        return -(-self._first_chunk[-1] // self._window_chunks)

    def _identity(self) -> dict[str, Any]:
        target = {} if self._d_target is None else {"d_out": self._d_target}
        return {"rows": self.n_rows, "d": self.d, "window_chunks": self._window_chunks, **target}


def write_shards(
    folder: str | Path,
    batches: Iterable[torch.Tensor | dict[str, torch.Tensor]],
    *,
    rows_per_shard: int = 65_536,
    dtype: torch.dtype | None = None,
    metadata: dict[str, Any] | Callable[[], dict[str, Any]] | None = None,
) -> int:
    """Write activations as shards that `ShardSource` reads; returns the number of rows.

    Args:
        folder: made if missing; must not hold shards yet.
        batches: `[n, d]` activations, or dicts of `activations [n, d]`, perhaps `targets
            [n, d_out]`, and tensors `[n, ...]`, as `ModelSource.read` gives them.
        rows_per_shard: rows of every shard but the last.
        dtype: of the stored activations and targets; None keeps theirs.
        metadata: JSON-able, returned by `read_index`; or a function that gives it once all rows are
            written.

    Raises:
        FileExistsError: when the folder holds shards.
        TypeError, ValueError: when metadata is not JSON-able, there is no row, or a tensor has
            another number of rows than the activations.
        BlockingIOError: another process writes shards there.
        OSError: when a file cannot be written, e.g. on a full disk, or the folder was deleted
            meanwhile; earlier shards stay.
    """
    folder = Path(folder).absolute()  # batches may come from code that changes the current one
    if not callable(metadata):
        check_json(metadata or {}, "write_shards: metadata")
    with explained("write_shards", "shards", folder, "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    with owned(folder, "write_shards") as mine:
        if any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
            raise FileExistsError(
                f"write_shards: folder must hold no shards yet, got {folder}; remove them or "
                f"choose another folder"
            )
        shards: list[dict[str, Any]] = []
        sizes: dict[str, int] = {}
        held: list[dict[str, torch.Tensor]] = []
        n_held = 0

        def flush(limit: int) -> None:
            nonlocal held, n_held
            while n_held >= max(limit, 1):
                rows = {name: torch.cat([part[name] for part in held]) for name in held[0]}
                shard = {name: t[:rows_per_shard].contiguous() for name, t in rows.items()}
                held = [{name: tensor[rows_per_shard:] for name, tensor in rows.items()}]
                n_shard = shard["activations"].shape[0]
                n_held -= n_shard
                name = f"activations-{len(shards):05d}.safetensors"
                mine.check()
                fix = "free space or choose another folder"
                with explained("write_shards", "a shard", folder / name, fix):
                    write_tensors(folder / name, shard)
                    sizes[name] = (folder / name).stat().st_size
                shards.append({"file": name, "rows": n_shard, "crc32": _crc32s(shard)})

        for batch in batches:
            rows = dict(batch) if isinstance(batch, dict) else {"activations": batch}
            n = rows["activations"].shape[0]
            for name, tensor in rows.items():
                if tensor.shape[:1] != (n,):
                    raise ValueError(
                        f"write_shards: {name} must have {n} rows like activations, got "
                        f"{list(tensor.shape)}; leave it out, or give an entry a row"
                    )
            rows["activations"] = rows["activations"].to(dtype or rows["activations"].dtype)
            if "targets" in rows and is_target(rows["targets"]):
                rows["targets"] = rows["targets"].to(dtype or rows["targets"].dtype)
            held.append(rows)
            n_held += n
            flush(rows_per_shard)
        flush(1)
        if not shards:
            raise ValueError("write_shards: batches must hold at least one row, got none")
        mine.check()
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise FileNotFoundError(
                    f"write_shards: {path} must stay until {INDEX} is written, got deleted or "
                    f"replaced; write the shards again into another folder"
                )
        told = metadata() if callable(metadata) else metadata or {}
        check_json(told, "write_shards: metadata")
        with explained("write_shards", "the index", folder / INDEX, "free space"):
            write_json(folder / INDEX, sealed({"shards": shards, "metadata": told}))
    return sum(shard["rows"] for shard in shards)


def load_rows(folder: Path) -> tuple[Rows, dict[str, Any]]:
    """All rows of a shard folder in memory, and its metadata."""
    parts = [shard.read(0, shard.rows) for shard in open_shards(folder)]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return rows, read_index(folder)["metadata"]


def remove_shards(folder: Path) -> None:
    """Delete the shards that an interrupted `write_shards` left, which have no index.

    Raises:
        FileExistsError: the folder holds anything else; nothing has been deleted then.
        BlockingIOError: another process writes shards there.
    """

    def refused(path: Path) -> FileExistsError:
        return FileExistsError(
            f"write_shards: {folder} must hold what an interrupted write left and nothing else to "
            f"be written again, got {path}; move it away or choose another folder"
        )

    if folder.is_symlink() or not folder.is_dir():
        raise refused(folder)
    own = {partial_of(Path(INDEX)).name, LOCK}
    with owned(folder, "write_shards"):
        entries = list(folder.iterdir())
        for path in entries:
            if not (_OWN.fullmatch(path.name) or path.name in own) or not path.is_file():
                raise refused(path)
        for path in entries:
            if path.name != LOCK:
                path.unlink()
