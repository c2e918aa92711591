"""The steps of the demo."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nnunet_lomix.compare import compare_into, read_folders
from nnunet_lomix.demo.data import write_dataset
from nnunet_lomix.files import replacing
from nnunet_lomix.nnunet.commands import folders_below, run_commands
from nnunet_lomix.nnunet.curves import read_all_curves
from nnunet_lomix.nnunet.registration import VARIABLE
from nnunet_lomix.nnunet.results import FoldFolder, ModelFolder, read_json
from nnunet_lomix.weights.history import PICTURE

# the trainers by the names that the report shows
TRAINERS = {"nnUNetTrainer": "nnUNetTrainerDemo", "nnUNetTrainerLoMix": "nnUNetTrainerLoMixDemo"}
TRAINERS_FOLDER = Path(__file__).parent / "trainers_folder"
PLANS = "nnUNetPlans"
FOLD = "0"
FINISHED_EPOCHS = "finished_epochs.txt"  # written by the trainers of the demo into their fold folders


@dataclass(frozen=True)
class Settings:
    """How large a demo is.

    Attributes:
        dim: 2 or 3.
        epochs, iterations: length of each training, and of each of its epochs.
        size: length of the images along each axis.
        train_cases, test_cases: number of images for training (a fifth for its validation) and held out.
        slimming: the network has the channels of nnU-Net's plan divided by this.
    """

    dim: int
    epochs: int
    iterations: int
    size: int
    train_cases: int
    test_cases: int
    slimming: int


class Steps:
    """The steps of one demo, in the order of :meth:`run`; each looks first whether its output is there."""

    def __init__(self, out: Path, settings: Settings, device: str) -> None:
        self.out = out
        self.settings = settings
        self.device = device
        self.dataset_id = str(899 + settings.dim)
        dataset = f"Dataset{self.dataset_id}_LoMixDemo{settings.dim}D"
        self.planned = {2: "2d", 3: "3d_fullres"}[settings.dim]
        self.trained = f"{self.planned}_slim"
        self.raw = out / "raw" / dataset
        self.plans = out / "preprocessed" / dataset / f"{PLANS}.json"
        self.predictions = {t: out / "predictions" / dataset / t for t in TRAINERS}
        self.models = {
            t: ModelFolder.of(out / "results", dataset, name, PLANS, self.trained) for t, name in TRAINERS.items()
        }
        self.logs = out / f"logs_{settings.dim}d"
        self.logs.mkdir(exist_ok=True)

    def run(self, console: Console) -> None:
        """All steps but the report, with a bar for each; where the output is no terminal, with a line now and then."""
        s = self.settings
        steps: dict[str, tuple[int, Callable[[Callable[[int], None]], None]]] = {
            "Generate images": (s.train_cases + s.test_cases, self.generate),
            "Plan and preprocess": (1, lambda show: self.plan()),
            "Train both trainers, epochs": (2 * s.epochs, self.train),
            "Predict held-out cases": (1, lambda show: self.predict()),
        }
        # rich lets the bars of what has not started pulse; these lie still
        columns = (BarColumn(pulse_style="bar.back"), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
            # all bars from the start: what is still to come
            bars = {title: progress.add_task(title, total=total, start=False) for title, (total, _) in steps.items()}
            for title, (total, step) in steps.items():
                progress.start_task(bars[title])
                show = _make_show(progress, bars[title], title, total)
                show(0)
                step(show)
                show(total)

    def generate(self, show: Callable[[int], None]) -> None:
        s = self.settings
        if not self.raw.is_dir():
            write_dataset(self.raw, [s.size] * s.dim, s.train_cases, s.test_cases, show)

    def plan(self) -> None:
        """nnU-Net's planning and preprocessing; then a configuration with a slimmer network is added.

        nnU-Net's documentation of the plans files shows how. It comes last: with it the step is complete.
        """
        if self.plans.is_file() and self.trained in read_json(self.plans, "configurations")["configurations"]:
            return
        options = ["-d", self.dataset_id, "-c", self.planned, "-npfp", 2, "-np", 2, "--clean"]
        self._run({self.logs / "plan_and_preprocess.log": ["nnUNetv2_plan_and_preprocess", *options]})
        plans = read_json(self.plans, "configurations")
        architecture = deepcopy(plans["configurations"][self.planned]["architecture"])
        channels = architecture["arch_kwargs"]["features_per_stage"]
        architecture["arch_kwargs"]["features_per_stage"] = [n // self.settings.slimming for n in channels]
        plans["configurations"][self.trained] = {"inherits_from": self.planned, "architecture": architecture}
        with replacing(self.plans) as temporary:
            temporary.write_text(json.dumps(plans, indent=4))

    def train(self, show: Callable[[int], None]) -> None:
        """Both trainings side by side: one core each, so their times can be compared."""
        folds = {t: model.fold(FOLD) for t, model in self.models.items()}
        options = [self.dataset_id, self.trained, FOLD, "-p", PLANS, "-device", self.device, "--c"]
        budget = {
            "epochs": self.settings.epochs,
            "iterations": self.settings.iterations,
            "finished_epochs": FINISHED_EPOCHS,
        }
        self._run(
            {
                self.logs / f"train_{t}.log": ["nnUNetv2_train", *options, "-tr", TRAINERS[t]]
                for t, fold in folds.items()
                if not fold.is_finished()
            },
            {
                "nnUNet_n_proc_DA": "0",  # the same batches for both trainers, and no processes beside them
                "NNUNET_LOMIX_DEMO": json.dumps(budget),
            },
            lambda log: show(sum(map(count_epochs, folds.values()))),
        )

    def predict(self) -> None:
        """Both trainers predict the held-out cases."""
        missing = {t: folder for t, folder in self.predictions.items() if not folder.is_dir()}
        unfinished = {t: folder.with_name(f"unfinished_{t}") for t, folder in missing.items()}
        command = ["nnUNetv2_predict", "-i", self.raw / "imagesTs", "-device", self.device]
        command += ["-d", self.dataset_id, "-p", PLANS, "-c", self.trained, "-f", FOLD]
        command += ["-npp", 0, "-nps", 0]  # no processes beside the two commands
        self._run(
            {
                self.logs / f"predict_{t}.log": [*command, "-tr", TRAINERS[t], "-o", folder]
                for t, folder in unfinished.items()
            }
        )
        for t, folder in missing.items():
            os.replace(unfinished[t], folder)

    def report(self, console: Console) -> None:
        """As nnunet_lomix compare, and the picture of the weights."""
        s = self.settings
        folder = self.out / f"report_{s.dim}d"
        source = read_folders(
            self.raw / "labelsTs", [*self.predictions.values()], [*TRAINERS], images=self.raw / "imagesTs"
        )
        note = (
            f"Both trainers: {s.epochs * s.iterations} steps with 1/{s.slimming} of the channels that nnU-Net plans, "
            "from the same start on the same batches. So short a training shows that everything works; it proves "
            "nothing about a full one."
        )
        source = replace(
            source,
            dataset=self.raw.name,
            configuration=self.trained,
            notes=(note,),
            curves=read_all_curves({(t, 0): model for t, model in self.models.items()}, [FOLD]),
        )
        compare_into(folder, source, console)
        with replacing(folder / PICTURE) as temporary:
            shutil.copyfile(self.models["nnUNetTrainerLoMix"].fold(FOLD).path / PICTURE, temporary)
        console.print(f"What LoMix has learned: {folder / PICTURE}", soft_wrap=True, highlight=False, markup=False)

    def _run(
        self,
        commands: Mapping[Path, Sequence[object]],
        variables: Mapping[str, str] | None = None,
        on_poll: Callable[[Path], None] = lambda log: None,
    ) -> None:
        own = {
            **folders_below(self.out),
            VARIABLE: str(TRAINERS_FOLDER),
            "nnUNet_n_proc_DA": "1",  # the planner fails with 0
            "nnUNet_compile": "false",  # takes longer than the training
            "nnUNet_wandb_enabled": "0",
            # predictions side by side use all cores each; threads that wait busily slow them down fivefold
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONUNBUFFERED": "1",
        }
        run_commands(commands, {**own, **(variables or {})}, on_poll)


def _make_show(progress: Progress, bar: TaskID, title: str, total: int) -> Callable[[int], None]:
    """A function that shows how much of a step is done: all of it in the bar, and each quarter as a line of a log."""
    printed = -1

    def show(done: int) -> None:
        nonlocal printed
        progress.update(bar, completed=done)
        if not progress.console.is_terminal and printed < 4 * done // total:
            printed = 4 * done // total
            print(f"{title}: {done} of {total}", file=progress.console.file, flush=True)

    return show


def count_epochs(fold: FoldFolder) -> int:
    """How many epochs a training of the demo has finished."""
    file = fold.path / FINISHED_EPOCHS
    return int(file.read_text()) if file.is_file() else 0
