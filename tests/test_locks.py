"""Locks, held by real processes."""

import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fasteners import InterProcessLock

from nnunet_lomix.compare import compare_into
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.locks import NAME, Lock, describe_owner, is_locked, read_owner

HOLD = "import sys, time; from pathlib import Path; from nnunet_lomix.locks import Lock; "
TAKE = HOLD + "lock = Lock(Path(sys.argv[1]), 'training'); print('locked', flush=True); "


@pytest.fixture
def start():
    """Starts a Python process with the folder as its argument, and waits until it prints a line, which it gives."""
    processes = []

    def start_process(code: str, folder: Path) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-c", code, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start_process
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path, start):
    folder = tmp_path / "made"
    holder, line = start(TAKE + "time.sleep(99)", folder)
    assert line == "locked" and is_locked(folder)
    expected = f"made is in use: training by process {holder.pid} on {socket.gethostname()} since 20"
    with pytest.raises(LoMixError, match=expected):
        Lock(folder, "training")
    owner = read_owner(folder)
    assert owner["pid"] == holder.pid and abs(time.time() - owner["since"]) < 60
    holder.kill()
    holder.wait()
    assert not is_locked(folder)
    with Lock(folder, "comparison"):
        assert json.loads(start(f"print(open({str(folder / NAME)!r}).read())", folder)[1])["pid"] == os.getpid()


def test_whoever_waits_for_a_moment_gets_it(tmp_path, start):
    start(TAKE + "time.sleep(0.3)", tmp_path)
    with Lock(tmp_path, "training"):
        assert not is_locked(tmp_path)  # by another process


def test_a_killed_process_holds_nothing_though_its_children_live(tmp_path, start):
    code = TAKE + "import os; child = os.fork(); child or time.sleep(99); print(child, flush=True); time.sleep(99)"
    holder, _ = start(code, tmp_path)
    child = int(holder.stdout.readline())
    try:
        assert is_locked(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # it lives
        assert not is_locked(tmp_path)
        Lock(tmp_path, "training").release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_is_kept_when_the_process_becomes_another_program(tmp_path, start):
    run = "import sys; print('other program', flush=True); sys.stdin.read()"
    code = HOLD + "import os; Lock(Path(sys.argv[1]), 'training').keep_over_exec(); "
    holder, line = start(code + f"os.execv(sys.executable, [sys.executable, '-c', {run!r}])", tmp_path)
    assert line == "other program"
    assert is_locked(tmp_path) and read_owner(tmp_path)["pid"] == holder.pid
    holder.communicate("")
    assert not is_locked(tmp_path)


def test_the_next_program_of_the_process_may_take_the_lock_too(tmp_path, start):
    again = TAKE + "lock.release(); print('released', flush=True); sys.stdin.read()"
    code = HOLD + "import os; Lock(Path(sys.argv[1]), 'training').keep_over_exec(); "
    code += f"os.execv(sys.executable, [sys.executable, '-c', {again!r}, sys.argv[1]])"
    holder, line = start(code, tmp_path)
    assert line == "locked" and holder.stdout.readline().strip() == "released"
    assert is_locked(tmp_path)  # as it was before the other program
    holder.communicate("")
    assert not is_locked(tmp_path)


def test_a_child_of_the_holder_passes_and_a_grandchild_does_not(tmp_path):
    inner = HOLD + "Lock(Path(sys.argv[1]), 'training'); print('passed')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}, sys.argv[1]], check=True)"
    with Lock(tmp_path, "training"):
        for code, passes in ((inner, True), (outer, False)):
            result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
            assert ("passed" in result.stdout) == passes, result.stderr
        assert f"by process {os.getpid()} on" in result.stderr


def can_lock(folder: Path) -> bool:
    """Whether a process that is no child of this one gets the lock."""
    inner = "import sys; from pathlib import Path; from nnunet_lomix.locks import is_locked; "
    inner += "print(is_locked(Path(sys.argv[1])))"
    return subprocess.check_output([sys.executable, "-c", inner, str(folder)], text=True).strip() == "False"


def test_a_process_holds_a_lock_until_its_last_one_is_released(tmp_path):
    """POSIX gives up a lock with any file of that name that the process closes."""
    first = Lock(tmp_path, "training")
    second = Lock(tmp_path / ".", "training")
    first.release()
    with Lock(tmp_path, "training"):
        pass
    assert not is_locked(tmp_path) and read_owner(tmp_path) == {}
    assert not can_lock(tmp_path)
    second.release()
    assert can_lock(tmp_path)
    forgotten = Lock(tmp_path, "training")
    assert not can_lock(tmp_path)
    del forgotten
    gc.collect()
    assert can_lock(tmp_path)


def test_a_forked_child_does_not_take_its_parents_lock_for_its_own(tmp_path, start):
    code = TAKE + "import os; from nnunet_lomix import locks; "
    code += "os.fork() or (print(locks.is_locked(Path(sys.argv[1])), flush=True), os._exit(0)); time.sleep(99)"
    holder, _ = start(code, tmp_path)
    assert holder.stdout.readline().strip() == "True"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', '{"pid": 1}', '{"activity": 1, "pid": 1, "host": "a", "since": 1}', "\x80\xff"],
)
def test_a_damaged_record_names_nobody(tmp_path, text):
    (tmp_path / NAME).write_bytes(text.encode("latin1"))
    assert read_owner(tmp_path) == {}
    assert describe_owner(tmp_path) == "another process works there"


@pytest.mark.parametrize("since", ["1e300", "NaN", "-1e18", "Infinity"])
def test_a_time_that_is_none_is_left_out(tmp_path, since):
    (tmp_path / NAME).write_text(f'{{"activity": "training", "pid": 7, "host": "node", "since": {since}}}')
    assert describe_owner(tmp_path) == "training by process 7 on node"


def test_a_held_lock_without_a_record_still_refuses(tmp_path, start):
    start(TAKE + "(Path(sys.argv[1]) / 'nnunet_lomix.lock').open('w'); time.sleep(99)", tmp_path)
    (tmp_path / "other").mkdir()
    holder = "from fasteners import InterProcessLock; import sys, time; lock = InterProcessLock(sys.argv[1] + '/"
    holder += NAME + "'); lock.acquire(); print('held', flush=True); time.sleep(99)"
    assert start(holder, tmp_path / "other")[1] == "held"
    with pytest.raises(LoMixError, match="other is in use: another process works there"):
        Lock(tmp_path / "other", "training")


def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch, caplog):
    def no_locks(self):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(InterProcessLock, "trylock", no_locks)
    with caplog.at_level(logging.WARNING), Lock(tmp_path, "training"), Lock(tmp_path, "training"):
        assert not is_locked(tmp_path)
    assert "has no locks: start nothing else that writes there" in caplog.text
    Lock(tmp_path, "training").release()
    (tmp_path / NAME).touch()
    assert not is_locked(tmp_path)


def test_two_comparisons_into_one_folder(tmp_path, start):
    holder, _ = start(TAKE.replace("training", "comparison") + "time.sleep(99)", tmp_path)
    with pytest.raises(LoMixError, match=f"in use: comparison by process {holder.pid} on "):
        compare_into(tmp_path, None, None)
    assert sorted(file.name for file in tmp_path.iterdir()) == [NAME]


def test_a_comparison_into_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LoMixError, match="file can't be written .*: choose another --out"):
        compare_into(tmp_path / "file", None, None)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Lock(tmp_path / "file", "training")
    assert not is_locked(tmp_path / "file") and not is_locked(tmp_path / "missing")
