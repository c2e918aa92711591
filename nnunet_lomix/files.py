"""Files that are either whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a path beside ``path``; a file written there replaces ``path`` if the block ends without an exception.

    Two processes that replace the same file at the same time need a lock (:mod:`nnunet_lomix.locks`): they would share
    the path.
    """
    with scratch(path) as temporary:
        yield temporary
        if temporary.exists():
            # on the disk first: else a machine that loses its power may keep the new name without the content
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)


@contextmanager
def scratch(path: str | Path) -> Iterator[Path]:
    """Gives a path beside ``path``; a file written there is removed at the end of the block.

    Always the same path: what a killed process left there is overwritten by the next one, so that nothing piles up.
    """
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
