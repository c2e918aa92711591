"""The steps of the demo."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

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

    def run(self, progress: Progress) -> None:
        """All steps but the report."""
        s = self.settings
        # all bars from the start: what is still to come
        generate = progress.add_task("Generate images", total=s.train_cases + s.test_cases, start=False)
        plan = progress.add_task("Plan and preprocess", total=1, start=False)
        train = {t: progress.add_task(f"Train {t}", total=s.epochs, start=False) for t in TRAINERS}
        predict = progress.add_task("Predict held-out cases", total=1, start=False)
        with _shown(progress, generate):
            self.generate(partial(progress.advance, generate))
        with _shown(progress, plan):
            self.plan()
        with _shown(progress, *train.values()):
            self.train(lambda trainer, epochs: progress.update(train[trainer], completed=epochs))
        with _shown(progress, predict):
            self.predict()

    def generate(self, on_case: Callable[[], None]) -> None:
        s = self.settings
        if not self.raw.is_dir():
            write_dataset(self.raw, [s.size] * s.dim, s.train_cases, s.test_cases, on_case)

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

    def train(self, on_epochs: Callable[[str, int], None]) -> None:
        """Both trainings side by side: one core each, so their times can be compared.

        Args:
            on_epochs: called again and again with a trainer and the number of epochs that it has finished.
        """
        folds = {t: model.fold(FOLD) for t, model in self.models.items()}
        logs = {self.logs / f"train_{t}.log": t for t, fold in folds.items() if not fold.is_finished()}
        options = [self.dataset_id, self.trained, FOLD, "-p", PLANS, "-device", self.device, "--c"]
        budget = {
            "epochs": self.settings.epochs,
            "iterations": self.settings.iterations,
            "finished_epochs": FINISHED_EPOCHS,
        }
        self._run(
            {log: ["nnUNetv2_train", *options, "-tr", TRAINERS[t]] for log, t in logs.items()},
            {
                "nnUNet_n_proc_DA": "0",  # the same batches for both trainers, and no processes beside them
                "NNUNET_LOMIX_DEMO": json.dumps(budget),
            },
            lambda log: on_epochs(logs[log], count_epochs(folds[logs[log]])),
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


@contextmanager
def _shown(progress: Progress, *bars: TaskID) -> Iterator[None]:
    """Starts the clocks of the bars; at the end they are full and their clocks stop."""
    for bar in bars:
        progress.start_task(bar)
    yield
    for bar in bars:
        progress.update(bar, completed=progress.tasks[bar].total)


def count_epochs(fold: FoldFolder) -> int:
    """How many epochs a training of the demo has finished."""
    file = fold.path / FINISHED_EPOCHS
    return int(file.read_text()) if file.is_file() else 0
