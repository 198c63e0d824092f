# SPDX-License-Identifier: Apache-2.0
"""One writer a folder (or file): a lock that the kernel releases when its owner ends, however.

`flock` on `.mikernels.lock`, which names the owner for the message that a second writer gets. The
file goes when the lock is released; one that a killed owner left is taken over. NFS carries `flock`
over to its server; a file system without locks gives a warning, and no protection.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mikernels.files import explained, irregular

LOCK = ".mikernels.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Owned:
    """A folder that this process writes to; `check` says whether it is still that folder."""

    def __init__(self, where: str, folder: Path, descriptor: int):
        self.where, self.folder = where, folder
        # held open: the number of a deleted folder could be given to a new one
        self._descriptor = descriptor

    def check(self) -> None:
        """Costs 2 us.

        Raises:
            FileNotFoundError: the folder was deleted, or another stands in its place.
        """
        mine = os.fstat(self._descriptor)
        try:
            there = os.stat(self.folder)
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            state = "it was deleted" if there is None else "another folder in its place"
            raise FileNotFoundError(
                errno.ENOENT,
                f"{self.where}: {self.folder} must stay while it is written to, got {state}; what "
                f"was written before is lost with it: start again",
            )


@contextmanager
def owned(folder: Path, where: str, name: str = LOCK) -> Iterator[Owned]:
    """Be the only one that writes to an existing folder.

    Args:
        where: who asks, for messages. name: of the lock file; another one locks one file only.

    Raises:
        BlockingIOError: another process (or another writer in this one) has it, with its pid, host
            and start.
        OSError: the folder is missing or cannot be written.
    """
    path = folder / name
    lock, owner = _locked(path, where), os.getpid()
    try:
        inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield Owned(where, folder, inner)
        finally:
            os.close(inner)
    finally:
        # while it is still locked: whoever opened it before sees that it has no name any more. A
        # name that cannot be removed is taken over; an error under way is the one that tells
        with suppress(OSError):
            # a forked child that ends is not the owner, who still writes
            if os.getpid() == owner and _is(path, lock):
                path.unlink()
        os.close(lock)


def _locked(path: Path, where: str) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with explained(where, "a lock", path, "choose a folder that can be written"):
            descriptor = os.open(path, flags, 0o666)
        try:
            _take(path, descriptor, where)
            if _is(path, descriptor):
                with explained(where, "a lock", path, "free space or choose another folder"):
                    _sign(descriptor, where)
                return descriptor
        except BaseException:
            os.close(descriptor)  # and with it the lock, which is nobody's
            raise
        os.close(descriptor)  # its owner has just released it


def _take(path: Path, descriptor: int, where: str) -> None:
    status = os.fstat(descriptor)
    kind = irregular(status.st_mode) or ("a file of two names" if status.st_nlink > 1 else None)
    if kind is not None:
        raise FileExistsError(
            errno.EEXIST, f"{where}: {path} must be a lock of ours or absent, got {kind}; remove it"
        )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                f"{where}: {path.parent} must have one writer at a time, got a second beside "
                f"{_owner(descriptor)}; wait for its end, or choose another folder",
            ) from error
        warnings.warn(
            f"{where}: {path.parent} is on a file system without locks "
            f"({os.strerror(error.errno)}); make sure that nothing else writes there",
            RuntimeWarning,
            stacklevel=5,
        )


def _sign(descriptor: int, where: str) -> None:
    """Write who owns it, for the message that a second writer gets."""
    os.ftruncate(descriptor, 0)
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    me = {"pid": os.getpid(), "host": platform.node(), "since": now, "as": where}
    os.pwrite(descriptor, json.dumps(me).encode(), 0)


def _is(path: Path, descriptor: int) -> bool:
    """Whether the open file still has that name."""
    try:
        there = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    mine = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"{owner['as']} of process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not written its name yet
