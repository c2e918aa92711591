"""Running commands: their environment, their logs, and what happens to the others when one fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.commands import folders_below, read_log, run_command, run_commands, trainers_first

SHOW = """
import os, sys
print(sys.executable, *sys.argv[1:], sep="|", flush=True)
print(os.getcwd(), *sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("LOMIX_")), file=sys.stderr)
"""
# each waits for the file of the other, so both run at once; the first then stays until it is ended
ENDLESS = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60); os.unlink('pid')"
FAILS = """
import pathlib, time
while not (pathlib.Path("pid").exists() and pathlib.Path("pid").read_text()):
    time.sleep(0.01)
print("first")
print("the reason")
print()
exit(3)
"""


def has_ended(folder: Path) -> bool:
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_a_command_gets_its_arguments_variables_and_folder_and_both_outputs_go_to_the_log(tmp_path, monkeypatch):
    for name in ("LOMIX_KEPT", "LOMIX_CHANGED", "LOMIX_REMOVED"):
        monkeypatch.setenv(name, "old")
    other = tmp_path / "python"  # that beside this Python comes first
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    variables = {"LOMIX_ADDED": "1", "LOMIX_CHANGED": "new", "LOMIX_REMOVED": None}
    run_command(["python", "-c", SHOW, 3, Path("a b")], tmp_path / "log", variables, tmp_path)
    first, second = (tmp_path / "log").read_text().splitlines()
    program, *arguments = first.split("|")
    assert Path(program).parent == Path(sys.executable).parent and arguments == ["3", "a b"]
    assert second == f"{tmp_path} LOMIX_ADDED=1 LOMIX_CHANGED=new LOMIX_KEPT=old"
    assert os.environ["LOMIX_REMOVED"] == "old"


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(LoMixError, match="nnUNetv2_nothing is neither beside .* nor on the PATH: install nnunetv2"):
        run_command(["nnUNetv2_nothing"], tmp_path / "log", {})


def test_a_failure_names_its_log_and_ends_the_others(tmp_path):
    logs = {tmp_path / f"{name}.log": ["python", "-c", code] for name, code in {"a": ENDLESS, "b": FAILS}.items()}
    seen = set()
    with pytest.raises(LoMixError) as error:
        run_commands(logs, {}, seen.add, tmp_path)
    assert str(error.value) == f"python failed; its log {tmp_path / 'b.log'} ends with: the reason"
    assert has_ended(tmp_path) and seen == logs.keys()


def test_a_failure_without_output_says_so(tmp_path):
    with pytest.raises(LoMixError, match="ends with: nothing$"):
        run_command(["python", "-c", "exit(1)"], tmp_path / "log", {})


def test_an_interrupt_ends_all_of_them(tmp_path):
    def interrupt(log):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_commands({tmp_path / "log": ["python", "-c", ENDLESS]}, {}, interrupt, tmp_path)
    assert has_ended(tmp_path)


def test_folders_and_trainers(monkeypatch):
    root = Path("/data")
    expected = {"raw": "/data/raw", "preprocessed": "/data/preprocessed", "results": "/data/results"}
    assert folders_below(root) == {f"nnUNet_{name}": folder for name, folder in expected.items()}
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    assert trainers_first(root) == {"nnUNet_extTrainer": "/data"}
    monkeypatch.setenv("nnUNet_extTrainer", f"/mine{os.pathsep}/yours")
    assert trainers_first(root) == {"nnUNet_extTrainer": os.pathsep.join(["/data", "/mine", "/yours"])}


def test_what_data_loaders_say_behind_a_failure_is_left_out(tmp_path):
    noise = "".join(
        f"Exception in thread Thread-{n} (results_loop):\nTraceback (most recent call last):\n"
        '  File "threading.py", line 1, in run\n    raise e\nRuntimeError: One or more background workers are gone\n'
        for n in (1, 2)
    )
    log = tmp_path / "log"
    log.write_text(f"Epoch 0\n\nTraceback (most recent call last):\n  File\nValueError: the reason\n{noise}")
    assert read_log(log) == ["Epoch 0", "Traceback (most recent call last):", "  File", "ValueError: the reason"]
    assert read_log(tmp_path / "none") == []


def test_all_are_waited_for_though_one_wait_is_interrupted(tmp_path, monkeypatch):
    wait, waited = subprocess.Popen.wait, set()

    def interrupted_once(process, timeout=None):
        waited.add(process.pid)
        wait(process, timeout)
        if len(waited) == 1:
            raise KeyboardInterrupt

    def fail(log):
        raise LoMixError("enough")

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted_once)
    sleep = ["python", "-c", "import time; time.sleep(60)"]
    with pytest.raises(KeyboardInterrupt):
        run_commands({tmp_path / name: sleep for name in ("a", "b")}, {}, fail)
    assert len(waited) == 2
