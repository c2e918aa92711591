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


def can_lock(folder: Path) -> bool:
    """Whether a process of its own finds the folder without a lock."""
    return subprocess.check_output([sys.executable, "-c", USE + "print(is_locked(folder))", folder]) == b"False\n"


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path, start):
    folder = tmp_path / "made"
    holder, _ = start(TAKE + "time.sleep(99)", folder)
    assert is_locked(folder)
    owner = f"training by process {holder.pid} on {socket.gethostname()} since 20"
    with pytest.raises(LoMixError, match=f"made is in use: {owner}.* Wait until it has ended"):
        Lock(folder, "training")
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


def test_a_lock_that_is_kept_serves_for_its_own_folder_alone(tmp_path, start):
    start(TAKE + "time.sleep(99)", tmp_path / "other")
    process, _ = start(BECOME.format(USE + "Lock(folder / 'other', 'training')"), tmp_path)
    assert process.wait() == 1


def test_a_grandchild_of_the_holder_is_refused(tmp_path, start):
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TAKE!r}, sys.argv[1]], check=True)"
    outer = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', {!r}, sys.argv[1]]).returncode)"
    assert start(BECOME.format(outer.format(inner)), tmp_path)[1] == "1"


def test_a_process_holds_a_lock_until_its_last_one_is_released(tmp_path):
    """POSIX gives up a lock with any file of that name that the process closes."""
    first = Lock(tmp_path, "training")
    second = Lock(tmp_path / ".", "training")
    first.release()
    with Lock(tmp_path, "training"):
        pass
    assert not is_locked(tmp_path) and not can_lock(tmp_path)
    second.release()
    assert can_lock(tmp_path)


def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch, caplog):
    def no_locks(self):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(InterProcessLock, "trylock", no_locks)
    with caplog.at_level(logging.WARNING), Lock(tmp_path, "training"), Lock(tmp_path, "training"):
        assert not is_locked(tmp_path)
    assert "has no locks: start nothing else that writes there" in caplog.text


def test_a_folder_or_a_lock_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Lock(tmp_path / "file", "training")
    assert not is_locked(tmp_path / "file") and not is_locked(tmp_path / "missing")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_the_lock_file_of_somebody_else_says_whose_it_is(tmp_path):
    """As another user the same process may write into the folder, but not into the file."""
    Lock(tmp_path, "training").release()
    tmp_path.chmod(0o777)
    code = USE + "os.chdir(folder); os.setuid(65534); Lock(Path(), 'training')"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert f"its {NAME} is of the user root: let it be removed" in done.stderr


def test_two_comparisons_into_one_folder(tmp_path, start):
    holder, _ = start(TAKE.replace("training", "comparison") + "time.sleep(99)", tmp_path)
    with pytest.raises(LoMixError, match=f"in use: comparison by process {holder.pid} on "):
        compare_into(tmp_path, None, None)
    assert sorted(file.name for file in tmp_path.iterdir()) == [NAME]
