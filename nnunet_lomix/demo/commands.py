"""nnU-Net's commands, side by side, each with a log file."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click


class DemoError(click.ClickException):
    """What went wrong and what to do, in one sentence; ends the command with exit code 1."""


def run_commands(
    commands: Mapping[Path, Sequence[str]],
    environment: Mapping[str, str],
    on_poll: Callable[[Path], None] = lambda log: None,
):
    """Run commands side by side until all have ended; an interrupt, or the failure of one, ends them all.

    Args:
        commands: for each log file the command that writes it, looked for beside this Python first.
        environment: the environment variables.
        on_poll: called with the log file of each running command, some times a second.

    Raises:
        DemoError: a command isn't there or has failed.
    """
    with ExitStack() as stack:
        running = {log: stack.enter_context(_running(c, log, environment)) for log, c in commands.items()}
        while running:
            time.sleep(0.2)
            for log, process in list(running.items()):
                on_poll(log)
                if process.poll() is not None:
                    del running[log]
                    _check(process, log)


@contextmanager
def _running(command: Sequence[str], log: Path, environment: Mapping[str, str]):
    folders = [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
    program = shutil.which(command[0], path=os.pathsep.join(folders))
    if program is None:
        raise DemoError(f"{command[0]} is neither beside {sys.executable} nor on the PATH: install nnunetv2.")
    with log.open("w") as output:
        process = subprocess.Popen(
            [program, *command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def _check(process: subprocess.Popen, log: Path):
    if process.returncode:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        raise DemoError(f"{Path(process.args[0]).name} failed; its log {log} ends with: {last}")
