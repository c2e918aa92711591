"""What runs one training: nnU-Net's command, in a process that holds the lock of its fold folder.

As a program, ``python -m nnunet_lomix.experiments.job FOLDER COMMAND…`` takes the lock and becomes the command.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments.training import Training
from nnunet_lomix.locks import NAME as LOCK
from nnunet_lomix.locks import Lock
from nnunet_lomix.nnunet.commands import find_program

ACTIVITY = "a training of nnunet_lomix run"  # until a trainer of ours takes the lock itself
IN_USE = 75  # exit status where another process trains already: "temporary failure" in sysexits.h
# who is ended by these can be continued; our trainers end with 128 plus the signal
INTERRUPTIONS = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
INTERRUPTED = {-number for number in INTERRUPTIONS} | {128 + number for number in INTERRUPTIONS}


def start(training: Training, options: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start nnU-Net's command for what a training still lacks; its output goes to the end of its log.

    The options are further arguments of nnUNetv2_train. A LoMixError says that nnU-Net isn't installed.
    """
    program, *arguments = training.command(options)
    program = find_program(program, os.environ.get("PATH", os.defpath))
    training.log.parent.mkdir(parents=True, exist_ok=True)
    with training.log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(training.folder.path), program, *arguments],
            env={**os.environ, "PYTHONUNBUFFERED": "1", **training.variables(), **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the experiment, which ends its trainings itself
        )


def finish(training: Training, process: subprocess.Popen[bytes]) -> None:
    """Note how a process has ended if it has failed, and end what it may have left behind."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # loaders of a training that was killed
    # a log that is younger than this file would be one of a training that was started by hand
    with suppress(OSError):
        os.utime(training.folder.path / LOCK)
    if process.returncode not in INTERRUPTED | {0, IN_USE}:
        training.write_note({"exit": process.returncode})


def main() -> None:
    folder, program, *arguments = sys.argv[1:]
    try:
        lock = Lock(Path(folder), ACTIVITY)
    except LoMixError as error:
        print(error, file=sys.stderr)
        sys.exit(IN_USE)
    except OSError as error:
        sys.exit(f"{folder} can't be written ({error.strerror}).")
    lock.keep_over_exec()
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
