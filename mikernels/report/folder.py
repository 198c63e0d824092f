# SPDX-License-Identifier: Apache-2.0
"""A report's folder: whole under its name, or absent, and never anything else's.

It is written beside its place as `.<name>.partial` and renamed when it is complete; a former report
is `.<name>.former` for the moment between two renames. What a kill left under these names is taken
away, or put back, by the next report of that name. A folder is a report if `report.json` says so
and it holds those files and no others.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mikernels.files import explained, read_json, sync_folder, write_all
from mikernels.owning import owned

MARKER, PAGE, DATA = "report.json", "index.html", "data"
# what a report of any version holds; of a half-written one there is no list
_OWN = re.compile(r"report\.json|\.report\.json\.partial|index\.html|data/[a-z]+(-[0-9]{5,})?\.js")
FIX, FREE = "choose another --out, or move it away", "free space or choose another --out"


def files_of(folder: Path) -> list[str]:
    """All that is in a folder, by its path within: folders end with a slash.

    Raises:
        NotADirectoryError: it is a file or a link.
    """
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "no folder")
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            found.append(f"{path.name}/")
            found += [f"{path.name}/{name}" for name in files_of(path)]
        else:
            found.append(path.name)
    return found


def check_free(folder: Path, where: str) -> None:
    """A report can be written there: nothing is, or an empty folder, or a report.

    Raises:
        FileExistsError: it is something else.
    """
    if not os.path.lexists(folder):
        return
    try:
        there = files_of(folder)
        if not there:
            return
        strange = _strange(folder, there, where)
    except NotADirectoryError:
        strange = "a file or a link"
    if strange is not None:
        raise FileExistsError(
            errno.EEXIST,
            f"{where}: {folder} must be absent, empty or a former report, got {strange}; {FIX}",
        )


def is_report(folder: Path, where: str) -> bool:
    """Whether a folder holds a report and nothing else."""
    try:
        there = files_of(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return bool(there) and _strange(folder, there, where) is None


def remove_report(folder: Path, where: str) -> None:
    """Delete what `is_report`; anything else stays."""
    if is_report(folder, where):
        _discard(folder)


def _strange(folder: Path, there: list[str], where: str) -> str | None:
    """What makes it no report, if anything does."""
    if MARKER not in there:
        return f"a folder without {MARKER} ({', '.join(there[:3])})"
    from mikernels.schema import ReportFile, check

    path = folder / MARKER
    try:
        # a folder of somebody's own whose report.json says something else
        own = {*check(ReportFile, read_json(path, where, "a report", FIX), where, path, FIX).files}
    except ValueError:
        return f"another {MARKER} than a report's"
    more = [name for name in there if name not in own | {MARKER, f"{DATA}/"}]
    return f"{more[0]} in it" if more else None


def _leftover(folder: Path) -> bool:
    """Whether nothing but files of a report's names is there."""
    try:
        return all(name == f"{DATA}/" or _OWN.fullmatch(name) for name in files_of(folder))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _discard(folder: Path) -> None:
    for name in reversed(files_of(folder)):
        path = folder / name
        path.rmdir() if name.endswith("/") else path.unlink()
    folder.rmdir()


class Writer:
    """The files of a report in the making.

    Args:
        final: the folder's name when it is complete, for messages.
    """

    def __init__(self, folder: Path, final: Path, where: str):
        self.folder, self._final, self._where = folder, final, where
        self.files: list[str] = []
        self.bytes = 0

    def write(self, name: str, content: str) -> None:
        """A new file, on the disk when this returns."""
        data = content.encode("utf-8", "replace")
        with (
            explained(self._where, "a report", self._final, FREE),
            open(self.folder / name, "xb", buffering=0) as file,
        ):
            write_all(file, data)
            os.fsync(file.fileno())
        self.files.append(name)
        self.bytes += len(data)


@contextmanager
def new_report(folder: Path, where: str) -> Iterator[Writer]:
    """A Writer whose files take the place of `folder` when the block ends well.

    Raises:
        FileExistsError: something else is there. BlockingIOError: another report is being written.
        OSError: it cannot be written; what was there before is as it was.
    """
    check_free(folder, where)
    partial, former = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "former"))
    with explained(where, "a report", folder, FREE):
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with owned(folder.absolute().parent, where, f".{folder.name}.lock"):
        _recover(folder, partial, former, where)
        with explained(where, "a report", folder, FREE):
            partial.mkdir()
        try:
            (partial / DATA).mkdir()
            yield Writer(partial, folder, where)
            # what came there meanwhile is not ours either
            check_free(folder, where)
            with explained(where, "a report", folder, FREE):
                sync_folder(partial / DATA)
                sync_folder(partial)
                _swap(partial, folder, former)
        except BaseException:
            with suppress(OSError):  # the error under way is the one that tells
                _discard(partial)
            raise


def _recover(folder: Path, partial: Path, former: Path, where: str) -> None:
    """Put back, or take away, what a kill left."""
    for path in (partial, former):
        if os.path.lexists(path) and not _leftover(path):
            raise FileExistsError(
                errno.EEXIST,
                f"{where}: {path} must be absent or what an interrupted report left, got something "
                f"else; move it away",
            )
    if os.path.lexists(former):
        if os.path.lexists(folder):
            _discard(former)
        else:
            os.rename(former, folder)
    if os.path.lexists(partial):
        _discard(partial)


def _swap(partial: Path, folder: Path, former: Path) -> None:
    replaced = os.path.lexists(folder)
    if replaced:
        os.rename(folder, former)
    try:
        os.rename(partial, folder)
    except BaseException:
        if replaced:
            os.rename(former, folder)
        raise
    sync_folder(folder.absolute().parent)
    if replaced:
        _discard(former)
