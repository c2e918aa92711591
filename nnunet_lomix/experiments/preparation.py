"""Planning, preprocessing and the folds of a dataset, where a training would miss them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_lomix.errors import LoMixError, describe
from nnunet_lomix.experiments.training import Training
from nnunet_lomix.nnunet.commands import run_command
from nnunet_lomix.nnunet.datasets import (
    SPLITS,
    default_splits,
    find_root,
    read_splits,
    require_root,
    suggest_dataset,
    write_splits,
)
from nnunet_lomix.nnunet.results import read_dataset_json, read_json

# nnU-Net sets as many threads for planning as there are loaders in training, and some train without (0)
VARIABLES_OF_COMMANDS = {"nnUNet_n_proc_DA": None}
# the planners of nnU-Net whose plans are known by their names
PLANNERS = {
    "nnUNetPlans": "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}


@dataclass(frozen=True)
class Preparation:
    """What is still to be done for a dataset before its trainings can start; nothing may be.

    Attributes:
        dataset: name.
        commands: of nnU-Net, in this order.
    """

    dataset: str
    commands: tuple[tuple[str, ...], ...]

    def run(self, log: Path) -> None:
        """Run the commands, then write nnU-Net's folds: trainings that start side by side would write them at a time.

        Raises:
            LoMixError: a command failed, or the dataset has too few cases for folds.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        for number, command in enumerate(self.commands):
            run_command(command, log.with_name(f"{log.stem}_{number}{log.suffix}"), VARIABLES_OF_COMMANDS)
        folder = require_root("nnUNet_preprocessed") / self.dataset
        if not (folder / SPLITS).exists():
            write_splits(folder, default_splits(folder))


def find_preparations(trainings: Sequence[Training]) -> list[Preparation]:
    """A preparation for each dataset.

    Raises:
        LoMixError: something is neither there nor can nnU-Net's commands make it.
    """
    return [_find_preparation(dataset, trainings) for dataset in dict.fromkeys(t.dataset for t in trainings)]


def leave_out_waiting(trainings: Sequence[Training]) -> list[Training]:
    """Without those of a cascade whose first stage has not predicted all cases yet: they need its predictions."""
    return [training for training in trainings if not _waits(training)]


def _waits(training: Training) -> bool:
    folder = require_root("nnUNet_preprocessed") / training.dataset
    file = folder / f"{training.plans}.json"
    if not file.is_file():
        return "cascade" in training.configuration
    manager = _read_plans(file)
    if training.configuration not in manager.available_configurations:
        return False  # which is told later
    first = manager.get_configuration(training.configuration).previous_stage_name
    if first is None:
        return False
    model = replace(training, configuration=first).model
    predicted = model.path / "predicted_next_stage" / training.configuration
    return len(list(predicted.glob("*"))) < read_dataset_json(folder).get("numTraining", 0)


def _find_preparation(dataset: str, trainings: Sequence[Training]) -> Preparation:
    folder = require_root("nnUNet_preprocessed") / dataset
    commands: list[tuple[str, ...]] = []
    for plans in dict.fromkeys(t.plans for t in trainings):
        own = dict.fromkeys(t.configuration for t in trainings if (t.dataset, t.plans) == (dataset, plans))
        commands += _prepare_plans(folder, plans, list(own))
    folds = {int(t.fold) for t in trainings if t.dataset == dataset and t.fold != "all"}
    there = len(read_splits(folder)) if (folder / SPLITS).exists() else 5
    beyond = [str(fold) for fold in sorted(folds) if fold >= there]
    if beyond:
        raise LoMixError(
            f"{dataset} has the folds 0 to {there - 1}, not {', '.join(beyond)}: leave them out, or add folds "
            "(nnunet_lomix splits)."
        )
    return Preparation(dataset, tuple(commands))


def _prepare_plans(folder: Path, plans: str, configurations: Sequence[str]) -> list[tuple[str, ...]]:
    number = _number(folder.name)
    file = folder / f"{plans}.json"
    if not file.is_file():
        _require_raw(folder.name)
        if plans not in PLANNERS:
            raise LoMixError(
                f"{folder.name} has no plans {plans}, and nnU-Net has no planner of that name: plan first."
            )
        # 3d_cascade_fullres takes the data of 3d_fullres, and isn't given to this command
        own = dict.fromkeys(c.replace("3d_cascade_fullres", "3d_fullres") for c in configurations)
        return [("nnUNetv2_plan_and_preprocess", "-d", number, "-pl", PLANNERS[plans], "-c", *own, "--no_pbar")]
    manager = _read_plans(file)
    for configuration in configurations:
        if configuration not in manager.available_configurations:
            raise LoMixError(
                f"{folder.name} has no configuration {configuration} in its {plans}: "
                f"there are {', '.join(manager.available_configurations)}."
            )
    cases = read_dataset_json(folder).get("numTraining", 0)
    data = {str(manager.get_configuration(c).data_identifier): c.replace("cascade_", "") for c in configurations}
    missing = [c for name, c in data.items() if len(list((folder / name).glob("*.pkl"))) < max(1, int(cases))]
    if not missing:
        return []
    _require_raw(folder.name)
    return [("nnUNetv2_preprocess", "-d", number, "-plans_name", plans, "-c", *missing, "--no_pbar")]


def _number(dataset: str) -> str:
    """What nnU-Net's commands for planning take instead of the name."""
    number = re.match(r"Dataset(\d{3})_", dataset)
    if number is None:
        raise LoMixError(f"{dataset!r} is not the name of a dataset, which is like Dataset004_Hippocampus.")
    return str(int(number[1]))


def _read_plans(file: Path) -> PlansManager:
    plans = PlansManager(read_json(file, "configurations", "plans_name"))
    try:
        for configuration in plans.available_configurations:
            _ = plans.get_configuration(configuration).data_identifier
    except Exception as error:  # nnU-Net raises anything at all for plans that are not its own
        raise LoMixError(f"{file} is not nnU-Net's: {describe(error)}.") from None
    return plans


def _require_raw(dataset: str) -> None:
    root = find_root("nnUNet_raw")
    if root is None or not (root / dataset).is_dir():
        raise LoMixError(
            f"{dataset} is not preprocessed, and not in nnUNet_raw ({root or 'which is not set'}): put it there first"
            f"{suggest_dataset(dataset)}"
        )
