"""Locks, held by real processes."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fasteners import InterProcessLock

from nnunet_lomix.compare import compare_into
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.locks import NAME, Lock, describe_owner, is_locked

USE = "import os, sys, time; from pathlib import Path; from nnunet_lomix.locks import *; folder = Path(sys.argv[1]); "
TAKE = USE + "lock = Lock(folder, 'training'); print('locked', flush=True); "
NEXT = "[sys.executable, '-c', {!r}, folder]"
BECOME = USE + f"lock = Lock(folder, 'start'); lock.keep_over_exec(); os.execv(sys.executable, {NEXT})"


@pytest.fixture
def start():
    """Starts a Python process with the folder as its argument, and waits until it prints a line, which it gives."""
    processes = []

    def start_process(code: str, folder: Path) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-c", code, str(folder)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True))
        return processes[-1], processes[-1].stdout.readline().strip()

    yield start_process
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def hold_lock(start):
    """Starts a process that holds the lock of a folder until it is killed."""
    return lambda folder: start(TAKE + "time.sleep(999)", folder)[0]


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path, hold_lock):
    folder = tmp_path / "made"
    holder = hold_lock(folder)
    assert is_locked(folder)
    owner = f"training by process {holder.pid} on {socket.gethostname()} since 20"
    with pytest.raises(LoMixError, match=f"made is in use: {owner}.* Wait until it has ended"):
        compare_into(folder, None, None)
    assert [file.name for file in folder.iterdir()] == [NAME]
    (folder / NAME).write_text("")
    with pytest.raises(LoMixError, match="made is in use: another process works there"):
        Lock(folder, "training")
    holder.kill()
    holder.wait()
    Lock(folder, "comparison").release()
    assert describe_owner(folder).startswith(f"comparison by process {os.getpid()} on ")


def test_whoever_waits_for_a_moment_gets_it(tmp_path, start):
    start(TAKE + "time.sleep(0.3)", tmp_path)
    with Lock(tmp_path, "training"):
        assert not is_locked(tmp_path)  # by another process


def test_a_killed_process_holds_nothing_though_its_child_lives_who_holds_nothing_either(tmp_path, start):
    # each a single write, as the lines of two processes would mix
    fork = "child = os.fork(); os.write(1, f'{child or is_locked(folder)}\\n'.encode()); "
    holder, _ = start(TAKE + fork + "time.sleep(99)", tmp_path)
    lines = {holder.stdout.readline().strip(), holder.stdout.readline().strip()}
    (child,) = map(int, lines - {"True"})  # it has not taken its parent's lock for its own
    try:
        assert is_locked(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives
        Lock(tmp_path, "training").release()
    finally:
        os.kill(child, 9)


def test_a_lock_is_kept_over_exec_whatever_the_next_program_does_with_it(tmp_path, start):
    child = USE + "Lock(folder, 'rank 0'); print('passed')"
    again = TAKE + "lock.release(); import subprocess; "
    again += f"print(subprocess.check_output([sys.executable, '-c', {child!r}, folder]), flush=True); sys.stdin.read()"
    holder, line = start(BECOME.format(again), tmp_path)
    assert line == "locked" and "passed" in holder.stdout.readline()  # its children may, too
    assert is_locked(tmp_path) and describe_owner(tmp_path).startswith(f"training by process {holder.pid} on ")
    holder.communicate("")
    assert not is_locked(tmp_path)


def test_a_lock_that_is_kept_serves_neither_for_another_folder_nor_for_a_grandchild(tmp_path, start, hold_lock):
    hold_lock(tmp_path / "other")
    process, _ = start(BECOME.format(USE + "Lock(folder / 'other', 'training')"), tmp_path)
    assert process.wait() == 1
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TAKE!r}, sys.argv[1]], check=True)"
    outer = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', {!r}, sys.argv[1]]).returncode)"
    assert start(BECOME.format(outer.format(inner)), tmp_path)[1] == "1"


def test_a_process_holds_a_lock_until_its_last_one_is_released(tmp_path, start):
    """POSIX gives up a lock with any file of that name that the process closes."""
    first = Lock(tmp_path, "training")
    second = Lock(tmp_path / ".", "training")
    first.release()
    with Lock(tmp_path, "training"):
        pass
    others_see_it = USE + "print(is_locked(folder))"
    assert not is_locked(tmp_path) and start(others_see_it, tmp_path)[1] == "True"
    second.release()
    assert start(others_see_it, tmp_path)[1] == "False"


def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch, caplog):
    def no_locks(self):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(InterProcessLock, "trylock", no_locks)
    with caplog.at_level(logging.WARNING), Lock(tmp_path, "training"), Lock(tmp_path, "training"):
        assert not is_locked(tmp_path)
    assert "has no locks: start nothing else that writes there" in caplog.text


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Lock(tmp_path / "file", "training")
    assert not is_locked(tmp_path / "file") and not is_locked(tmp_path / "missing")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_the_lock_file_of_somebody_else_says_whose_it_is(tmp_path, monkeypatch):
    """As another user the same process may write into the folder, but not into the file."""
    Lock(tmp_path, "training").release()
    tmp_path.chmod(0o777)
    monkeypatch.chdir(tmp_path)  # tests' folders are closed to others
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=f"its {NAME} is of the user root: let it be removed"):
            Lock(Path(), "training")
    finally:
        os.seteuid(0)
