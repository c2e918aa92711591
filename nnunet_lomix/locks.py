"""Locks: a folder that one process at a time may work in.

A lock is POSIX's ``lockf`` on a file: it ends with the process that holds it, however that dies, is kept when the
process becomes another program by ``exec``, and is not inherited by its children. The file stays, and says who holds
the lock or held it last. A process that closes any file of that name gives up its lock. Therefore all locks of a
process on one folder share an open file, and nothing here opens the file again in that process.
"""

import errno
import logging
import os
import socket
import threading
import time
import weakref
from contextlib import AbstractContextManager
from pathlib import Path

from fasteners import InterProcessLock

from nnunet_lomix.errors import LoMixError

NAME = "nnunet_lomix.lock"
PATIENCE = 1.0  # seconds, as is_locked takes the lock for a moment
KEPT = "NNUNET_LOMIX_LOCK"  # variable: process, file and folder of a lock that is kept over exec
# by the process, too, as a child that was forked has a copy of this, but not the locks
_HELD: "weakref.WeakValueDictionary[tuple[int, str], InterProcessLock]" = weakref.WeakValueDictionary()
logger = logging.getLogger(__name__)


class Lock(AbstractContextManager["Lock"]):
    """Holds the lock of a folder, which is made if it isn't there, until it is released or the process ends.

    A process that holds a lock may take it again. A lock that was kept over ``exec`` serves the new program and its
    children, such as the ranks of a training on several GPUs. On a file system without locks nobody is refused.
    The activity, such as "training", is for the message that others get.

    Raises:
        LoMixError: another process holds the lock; the sentence names it.
        OSError: the folder or its lock file can't be written; of somebody else's file the text says whose it is.
    """

    def __init__(self, folder: Path, activity: str) -> None:
        self._key = _key(folder)
        self._lock = _HELD.get(self._key)
        process, file, path = os.environ.get(KEPT, "0 0 ").split(" ", 2)
        kept_by = int(process) if path == self._key[1] else None
        if kept_by == os.getpid():
            _write_owner(int(file), activity)
        if self._lock is not None or kept_by in (os.getpid(), os.getppid()):
            return
        folder.mkdir(parents=True, exist_ok=True)  # fasteners' error would read as if the file system had no locks
        lock = InterProcessLock(folder / NAME)
        try:
            held = lock.acquire(timeout=PATIENCE)
            if held:
                _write_owner(lock.lockfile.fileno(), activity)
        except threading.ThreadError:
            logger.warning("The file system of %s has no locks: start nothing else that writes there.", folder)
            held = True  # better a training without a lock than none
        except PermissionError as error:
            raise _name_user(error, folder / NAME) from None
        weakref.finalize(lock, lock.lockfile.close)  # with the last Lock of this process
        if not held:
            raise LoMixError(f"{folder} is in use: {describe_owner(folder)}. Wait until it has ended, or end it first.")
        self._lock = _HELD[self._key] = lock

    def release(self) -> None:
        """Others may have it, once every Lock of this process on the folder is released."""
        self._lock = None

    def keep_over_exec(self) -> None:
        """The lock stays when this process becomes another program, until that ends."""
        if self._lock is not None:
            file = self._lock.lockfile.fileno()
            os.set_inheritable(file, True)
            os.environ[KEPT] = f"{os.getpid()} {file} {self._key[1]}"

    def __exit__(self, *exception: object) -> None:
        self.release()


def is_locked(folder: Path) -> bool:
    """Whether a process other than this one holds the lock of a folder."""
    if _key(folder) in _HELD or not (folder / NAME).is_file():
        return False
    lock = InterProcessLock(folder / NAME)
    try:
        free = lock.acquire(blocking=False)
    except (threading.ThreadError, OSError):  # no locks there, or somebody else's file
        return False
    lock.lockfile.close()
    return not free


def describe_owner(folder: Path) -> str:
    """Who holds a folder's lock, or held it last: activity, process, host and time. Not for the holder itself."""
    try:
        owner = (folder / NAME).read_text(errors="replace").strip()
    except OSError:
        owner = ""
    return owner or "another process works there"


def _key(folder: Path) -> tuple[int, str]:
    return os.getpid(), os.path.realpath(folder)  # unlike resolve, it raises nothing for a link that leads to itself


def _write_owner(file: int, activity: str) -> None:
    """By the file that is open, as closing another one would give up the lock."""
    os.ftruncate(file, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(file, f"{activity} by process {os.getpid()} on {socket.gethostname()} since {since}".encode())


def _name_user(error: PermissionError, file: Path) -> OSError:
    """The same error, which says whose the file is if there is one."""
    try:
        remedy = "let it be removed or made writable for you"
        return PermissionError(errno.EACCES, f"its {file.name} is of the user {file.owner()}: {remedy}", str(file))
    except (OSError, KeyError, NotImplementedError):  # no file or no name, or Windows
        return error
