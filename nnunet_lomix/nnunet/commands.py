"""Running nnU-Net's commands: each with a log file, several side by side."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.registration import VARIABLE

SECONDS_BETWEEN_POLLS = 0.2


def folders_below(root: Path) -> dict[str, str]:
    """nnU-Net's three variables, for folders ``raw``, ``preprocessed`` and ``results`` below one."""
    return {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}


def trainers_first(folder: Path) -> dict[str, str]:
    """nnU-Net's variable for trainers, with a folder of trainers before those that this process has in it."""
    folders = [str(folder), os.environ.get(VARIABLE, "")]
    return {VARIABLE: os.pathsep.join(filter(None, folders))}


def run_command(
    command: Sequence[object], log: Path, variables: Mapping[str, str | None], working_folder: Path | None = None
) -> None:
    """Run one command until it has ended; arguments and exceptions are those of :func:`run_commands`."""
    run_commands({log: command}, variables, working_folder=working_folder)


def run_commands(
    commands: Mapping[Path, Sequence[object]],
    variables: Mapping[str, str | None],
    on_poll: Callable[[Path], None] = lambda log: None,
    working_folder: Path | None = None,
) -> None:
    """Run commands side by side until all have ended; an interrupt, or the failure of one, ends them all.

    Args:
        commands: for each log file the command that writes it: the name of the program, which is looked for beside this
            Python first, and its arguments, which are made strings.
        variables: environment variables beside those of this process; None removes one.
        on_poll: called with the log file of each running command, some times a second.
        working_folder: where the commands run; None for the folder of this process.

    Raises:
        LoMixError: a command isn't there or has failed.
    """
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    running: dict[Path, subprocess.Popen[bytes]] = {}
    try:
        for log, (name, *arguments) in commands.items():
            program = find_program(str(name), environment.get("PATH", os.defpath))
            with log.open("w") as output:
                running[log] = subprocess.Popen(
                    [program, *map(str, arguments)],
                    env=environment,
                    cwd=working_folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
        while running:
            time.sleep(SECONDS_BETWEEN_POLLS)
            for log, process in list(running.items()):
                on_poll(log)
                if process.poll() is not None:
                    del running[log]
                    if process.returncode:
                        last_line = (read_log(log) or ["nothing"])[-1].strip()
                        raise LoMixError(f"{commands[log][0]} failed; its log {log} ends with: {last_line}")
    finally:
        # all are told to end before one is waited for: a training may take a while to write its checkpoint
        with ExitStack() as waiting:  # for the others, too, if a wait is interrupted
            for process in running.values():
                process.terminate()
                waiting.callback(process.wait)


def read_log(log: Path) -> list[str]:
    """The lines of a command's output that aren't blank; none if there is no file.

    Where a training fails, its data loaders' threads complain behind the reason: that is left out.
    """
    text = log.read_text(errors="replace") if log.exists() else ""
    text = re.sub(r"Exception in thread .*\(results_loop\):\n(Traceback .*\n)?( .*\n)*\S.*(\n|$)", "", text)
    return [line for line in text.splitlines() if line.strip()]


def find_program(name: str, path: str) -> str:
    """A program beside this Python, or else on a search path.

    Raises:
        LoMixError: it is in neither.
    """
    program = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), path]))
    if program is None:
        raise LoMixError(f"{name} is neither beside {sys.executable} nor on the PATH: install nnunetv2.")
    return program
