"""Locks: a folder that one process at a time may work in.

A lock is the operating system's lock on a file, by POSIX's ``lockf``: it ends with the process that holds it, however
that dies, is kept when the process becomes another program by ``exec``, and is not inherited by its children. The file
itself stays; whoever holds the lock has written into it who that is.

A process that closes any file of that name gives up its lock. Therefore all locks of a process on one folder share an
open file, and nothing here opens the file in the process that holds the lock.
"""

import json
import logging
import os
import socket
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from fasteners import InterProcessLock

from nnunet_lomix.errors import LoMixError

NAME = "nnunet_lomix.lock"
PATIENCE = 1.0  # seconds, as whoever asks whether a lock is held takes it for a moment
# what this process holds; by its id, too, as its children have a copy of this, but not the locks
_HELD: "weakref.WeakValueDictionary[tuple[int, Path], InterProcessLock]" = weakref.WeakValueDictionary()
_TAKEN: set[tuple[int, Path]] = set()  # what this program has ever asked for
_KEPT: list[InterProcessLock] = []  # until the process ends
logger = logging.getLogger(__name__)


class Lock:
    """Holds the lock of a folder until it is released or the process ends.

    The process that holds a lock may take it again, and so may its children while it lives, as the ranks of a training
    on several GPUs do. On a file system without locks nobody is refused.

    Args:
        folder: is made if it isn't there.
        activity: what the folder is used for, for the message that others get: "training".

    Raises:
        LoMixError: another process holds the lock; the sentence names it.
        OSError: the folder can't be written.
    """

    def __init__(self, folder: Path, activity: str) -> None:
        key = _key(folder)
        self._lock = _HELD.get(key)
        if self._lock is not None:
            return
        # the lock makes folders by recursion, whose error reads as if the file system had no locks
        folder.mkdir(parents=True, exist_ok=True)
        # to read the file gives up, for an instant, a lock that this process has from before it became this program
        kept = key not in _TAKEN and _is_of(read_owner(folder), os.getpid())
        _TAKEN.add(key)
        lock = InterProcessLock(folder / NAME)
        try:
            held = lock.acquire(timeout=PATIENCE)
            if held:
                _write_owner(lock.lockfile.fileno(), activity)
        except threading.ThreadError:
            logger.warning("The file system of %s has no locks: start nothing else that writes there.", folder)
            held = True  # better a training without a lock than none
        # closed with the last Lock of this process
        weakref.finalize(lock, lock.lockfile.close)
        if held:
            self._lock = _HELD[key] = lock
            _KEPT.extend([lock] if kept else [])
        elif not _is_of(read_owner(folder), os.getppid()):
            raise LoMixError(f"{folder} is in use: {describe_owner(folder)}. Wait until it has ended, or end it first.")

    def release(self) -> None:
        """Others may have it, once every Lock of this process on the folder is released."""
        self._lock = None

    def keep_over_exec(self) -> None:
        """The lock stays until this process ends, also when it becomes another program."""
        if self._lock is not None:
            os.set_inheritable(self._lock.lockfile.fileno(), True)
            _KEPT.append(self._lock)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def is_locked(folder: Path) -> bool:
    """Whether a process other than this one holds the lock of a folder."""
    file = folder / NAME
    if _key(folder) in _HELD or not file.is_file():
        return False
    lock = InterProcessLock(file)
    try:
        held = lock.acquire(blocking=False)
    except (threading.ThreadError, OSError):  # no locks there, or somebody else's folder
        return False
    lock.lockfile.close()
    return not held


def read_owner(folder: Path) -> dict[str, Any]:
    """What the holder of a folder's lock has written, or one that held it before; nothing if this process holds it.

    Returns:
        ``activity``, ``pid``, ``host`` and ``since`` (Unix time), or an empty dict.
    """
    if _key(folder) in _HELD:
        return {}
    try:
        owner = json.loads((folder / NAME).read_text())
        types = {"activity": str, "pid": int, "host": str, "since": int | float}
        return owner if all(isinstance(owner[key], kind) for key, kind in types.items()) else {}
    except (OSError, ValueError, TypeError, KeyError):  # damaged, or about to be written
        return {}


def describe_owner(folder: Path) -> str:
    """Who holds a folder's lock.

    >>> describe_owner(Path("missing"))
    'another process works there'
    """
    owner = read_owner(folder)
    if not owner:
        return "another process works there"
    try:
        since = time.strftime(" since %Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
    except (ValueError, OverflowError, OSError):  # no time that a clock can show
        since = ""
    return f"{owner['activity']} by process {owner['pid']} on {owner['host']}{since}"


def _key(folder: Path) -> tuple[int, Path]:
    # unlike resolve, realpath raises nothing for a link that leads to itself
    return os.getpid(), Path(os.path.realpath(folder))


def _is_of(owner: dict[str, Any], process: int) -> bool:
    return owner.get("pid") == process and owner.get("host") == socket.gethostname()


def _write_owner(file: int, activity: str) -> None:
    """By the file that is open, as closing another one would give up the lock."""
    owner = {"activity": activity, "pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    os.ftruncate(file, 0)
    os.write(file, json.dumps(owner).encode())
