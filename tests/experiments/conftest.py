"""An experiment in a small prepared setting, with a short script in place of nnU-Net's training command."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from nnunet_lomix.cli import main
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments import local
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.run import run_experiment
from nnunet_lomix.experiments.training import Training
from nnunet_lomix.nnunet.commands import folders_below

from ..fuzz.world import DATASET, write_world
from ..test_locks import hold_lock, start  # noqa: F401, fixtures

TRAINERS = ("nnUNetTrainer", "nnUNetTrainer_5epochs")
# what the script does is in a file by the trainer and fold: fail, be killed, take long; else it trains and validates,
# and predicts the cases of its fold for the second stage of a cascade
SCRIPT = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
dataset, configuration, fold, _, trainer, _, plans, *_ = sys.argv[1:]
model = pathlib.Path(os.environ["nnUNet_results"], dataset, f"{{trainer}}__{{plans}}__{{configuration}}")
folder = model / f"fold_{{fold}}"
orders = json.loads(pathlib.Path(os.environ["ORDERS"]).read_text())
with open(os.environ["ORDERS"] + ".log", "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["nnUNet_results"]]) + "\\n")
(folder / "training_log_2026_1_2_03_04_05.txt").touch()
print("Epoch 0", flush=True)
order = orders.get(f"{{trainer}} {{fold}}")
if order == "fail":
    print("\\nRuntimeError: no luck today\\n")
    sys.exit(1)
if order in ("stop", "die"):
    (folder / "checkpoint_latest.pth").touch()
    os.kill(os.getpid(), {{"stop": signal.SIGTERM, "die": signal.SIGKILL}}[order])
if order == "save":  # as our trainers do after a signal
    sys.exit(128 + signal.SIGTERM)
if order == "fork" and os.fork() == 0:
    pathlib.Path(os.environ["ORDERS"] + ".child").write_text(str(os.getpid()))
    time.sleep(600)
if order == "hang":
    time.sleep(600)
if configuration == "3d_lowres":
    splits = json.loads(pathlib.Path(os.environ["nnUNet_preprocessed"], dataset, "splits_final.json").read_text())
    predicted = model / "predicted_next_stage/3d_cascade_fullres"
    predicted.mkdir(parents=True, exist_ok=True)
    for case in splits[int(fold)]["val"]:
        (predicted / f"{{case}}.b2nd").touch()
(folder / "checkpoint_final.pth").touch()
(folder / "validation").mkdir(exist_ok=True)
(folder / "validation/summary.json").write_text("{{}}")
"""


def invoke(*arguments: object) -> tuple[int, str]:
    """Exit code and output of nnunet_lomix."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def write_program(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def make_cascade(dataset: Path) -> None:
    """Give the plans of a preprocessed dataset the two stages of a cascade, with the data of 2d."""
    file = dataset / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    of_2d = {"inherits_from": "2d"}
    plans["configurations"] |= {
        "3d_fullres": of_2d,
        "3d_lowres": of_2d | {"next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": of_2d | {"previous_stage": "3d_lowres"},
    }
    file.write_text(json.dumps(plans))


class Setting:
    """Two trainers on two folds of a dataset that is prepared."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        write_world(folder)
        shutil.rmtree(folder / "results")
        self.dataset = folder / "preprocessed" / DATASET
        # nnU-Net's commands are looked for beside this Python first
        write_program(folder / "bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        write_program(folder / "bin/nnUNetv2_train", SCRIPT)
        monkeypatch.setattr(sys, "executable", str(folder / "bin/python"))
        monkeypatch.setattr(local, "SECONDS_BETWEEN_POLLS", 0.05)
        self.orders = folder / "orders"
        for name, value in {**folders_below(folder), "ORDERS": str(self.orders)}.items():
            monkeypatch.setenv(name, value)
        self.out = folder / "out"

    def experiment(self, **changes) -> Experiment:
        own = {"folds": ("0", "1"), "device": "cpu", "out": str(self.out), "trainers": TRAINERS, **changes}
        return Experiment(**{"datasets": (DATASET,), "configurations": ("2d",), **own})

    def write_plan(self, entries: str) -> Path:
        """A file that says to train one fold, with more entries."""
        text = f"datasets: {DATASET}\nconfigurations: 2d\ntrainers: nnUNetTrainer\nfolds: 0\nout: {self.out}\n"
        plan = self.folder / "plan.yaml"
        plan.write_text(text + entries)
        return plan

    def trainings(self, **changes) -> list[Training]:
        return self.experiment(**changes).list_trainings()

    def run(self, orders: dict[str, str] | None = None, retry: bool = False, **changes) -> tuple[str, str]:
        """What was printed, and the sentence at the end if there was one."""
        self.orders.write_text(json.dumps(orders or {}))
        console = Console(width=200, record=True, file=io.StringIO())
        try:
            run_experiment(self.experiment(**changes), console, retry)
        except LoMixError as error:
            return console.export_text(), str(error)
        return console.export_text(), ""

    def started(self) -> list[tuple[list[str], str | None, str]]:
        """Arguments, GPU and results folder of each call of the script."""
        log = Path(f"{self.orders}.log")
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def setting(tmp_path, monkeypatch) -> Setting:
    return Setting(tmp_path, monkeypatch)
