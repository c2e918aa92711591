"""Files that are either whole or not there."""

import os
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: str | Path):
    """Gives a path beside ``path``; a file written there replaces ``path`` if the block ends without an exception."""
    with scratch(path) as temporary:
        yield temporary
        if temporary.exists():
            os.replace(temporary, path)


@contextmanager
def scratch(path: str | Path):
    """Gives a new path beside ``path``; a file written there is removed at the end of the block."""
    temporary = Path(f"{path}.{uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
