"""Files and folders that are either whole or not there."""

import os
import tempfile
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


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``folder``, which becomes ``folder`` if the block ends without an exception.

    Its name begins with a dot, so that nnU-Net doesn't take it for a dataset.

    Raises:
        OSError: it can't be made, or ``folder`` is there meanwhile, with something in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        made = Path(temporary, folder.name)
        made.mkdir()
        yield made
        if folder.is_dir():  # an empty one, which not every system replaces
            folder.rmdir()
        os.rename(made, folder)
