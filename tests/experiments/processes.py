"""Processes beside a test."""

import subprocess
import sys
from pathlib import Path

HOLDER = """
import sys
from pathlib import Path
from nnunet_lomix.locks import Lock
lock = Lock(Path(sys.argv[1]), sys.argv[2])
print(flush=True)
input()
"""


def hold_lock(folder: Path, activity: str) -> "subprocess.Popen[bytes]":
    """A process that holds the lock of a folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder, activity], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    return process
