"""Planning, preprocessing and the folds of a dataset, where a training would miss them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

from nnunet_lomix.errors import LoMixError, explaining
from nnunet_lomix.experiments.training import Training
from nnunet_lomix.locks import Lock
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
from nnunet_lomix.nnunet.results import FINGERPRINT, read_dataset_json, read_json

# nnU-Net sets as many threads for planning as there are loaders in training, and some train without (0)
VARIABLES_OF_COMMANDS = {"nnUNet_n_proc_DA": None}
# the planners of nnU-Net whose plans are known by their names
PLANNERS = {
    "nnUNetPlans": "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}
Command = tuple[str, ...]


@dataclass(frozen=True)
class Preparation:
    """What the trainings of an experiment need of a dataset before they can start.

    Attributes:
        dataset: name.
        needed: pairs of plans and a configuration.
        folded: whether they need folds.
    """

    dataset: str
    needed: tuple[tuple[str, str], ...]
    folded: bool

    def list_commands(self) -> list[Command]:
        """nnU-Net's commands for what is missing now, in order.

        Raises:
            LoMixError: something is neither there nor can nnU-Net's commands make it.
        """
        folder = require_root("nnUNet_preprocessed") / self.dataset
        commands: list[Command] = []
        for plans in dict.fromkeys(plans for plans, _ in self.needed):
            configurations = [configuration for other, configuration in self.needed if other == plans]
            planning = _plan(folder, plans)
            # until there are plans nobody knows whether others' data will do; it is asked again then
            commands += [*planning, *_preprocess(folder, plans, configurations, bool(planning))]
        return list(dict.fromkeys(commands))

    def run(self, log: Path) -> None:
        """Run the commands, then write nnU-Net's folds, as trainings side by side would write them at the same time.

        Data that is there is left alone: trainings may be reading it.

        Raises:
            LoMixError: a command failed, or the dataset has too few cases for folds.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        folder = require_root("nnUNet_preprocessed") / self.dataset
        with Lock(folder, "preparing"):
            number = 0
            while commands := self.list_commands():  # each may make the next ones superfluous
                run_command(commands[0], log.with_name(f"{log.stem}_{number}{log.suffix}"), VARIABLES_OF_COMMANDS)
                number += 1
                if commands[0] in self.list_commands():
                    raise LoMixError(f"{' '.join(commands[0])} has not made what it should; its log is beside {log}.")
            if self.folded and not (folder / SPLITS).exists():
                write_splits(folder, default_splits(folder))


def find_preparations(trainings: Sequence[Training]) -> list[Preparation]:
    """A preparation for each dataset.

    Raises:
        LoMixError: something is neither there nor can nnU-Net's commands make it, or there is no such fold.
    """
    preparations = []
    for dataset in dict.fromkeys(t.dataset for t in trainings):
        own = [t for t in trainings if t.dataset == dataset]
        folds = {int(t.fold) for t in own if t.fold != "all"}
        _require_folds(dataset, folds)
        needed = dict.fromkeys((t.plans, t.configuration) for t in own)
        preparations.append(Preparation(dataset, tuple(needed), bool(folds)))
        preparations[-1].list_commands()  # may refuse
    return preparations


def find_first_stage(training: Training) -> str | None:
    """The configuration of a cascade whose predictions a training still has to wait for; None if it can start.

    Raises:
        LoMixError: the plans are not nnU-Net's.
    """
    folder = require_root("nnUNet_preprocessed") / training.dataset
    file = folder / f"{training.plans}.json"
    if not file.is_file():
        return "3d_lowres" if training.configuration == "3d_cascade_fullres" else None
    manager = _read_plans(file)
    if training.configuration not in manager.available_configurations:
        return None  # which is told later
    configuration = manager.get_configuration(training.configuration)
    first: str | None = configuration.previous_stage_name
    if first is None:
        return None
    model = replace(training, configuration=first).model
    predicted = model.path / "predicted_next_stage" / training.configuration
    cases = len(list((folder / configuration.data_identifier).glob("*.pkl")))
    return first if len(list(predicted.glob("*"))) < max(1, cases) else None


def _require_folds(dataset: str, folds: set[int]) -> None:
    folder = require_root("nnUNet_preprocessed") / dataset
    there = len(read_splits(folder)) if (folder / SPLITS).exists() else 5
    beyond = [str(fold) for fold in sorted(folds) if fold >= there]
    if beyond:
        raise LoMixError(
            f"{dataset} has the folds 0 to {there - 1}, not {', '.join(beyond)}: leave them out, or add folds "
            "(nnunet_lomix splits)."
        )


def _plan(folder: Path, plans: str) -> list[Command]:
    if (folder / f"{plans}.json").is_file():
        return []
    number = _number(folder.name)
    _require_raw(folder.name)
    if plans not in PLANNERS:
        raise LoMixError(f"{folder.name} has no plans {plans}, and nnU-Net no planner of that name: plan first.")
    planning: Command = ("nnUNetv2_plan_experiment", "-d", number, "-pl", PLANNERS[plans])
    if (folder / FINGERPRINT).is_file():
        return [planning]
    return [("nnUNetv2_extract_fingerprint", "-d", number, "--no_pbar"), planning]


def _preprocess(folder: Path, plans: str, configurations: Sequence[str], unplanned: bool) -> list[Command]:
    # the second stage of a cascade has the data of 3d_fullres, and isn't known to this command
    data = list(dict.fromkeys(c.replace("3d_cascade_fullres", "3d_fullres") for c in configurations))
    missing = data if unplanned else _list_missing(folder, plans, data)
    if not missing:
        return []
    _require_raw(folder.name)
    return [("nnUNetv2_preprocess", "-d", _number(folder.name), "-plans_name", plans, "-c", *missing, "--no_pbar")]


def _list_missing(folder: Path, plans: str, configurations: Sequence[str]) -> list[str]:
    """Configurations without data, or with that of a part of the raw cases, as an interrupted command leaves it."""
    manager = _read_plans(folder / f"{plans}.json")
    for configuration in configurations:
        if configuration not in manager.available_configurations:
            raise LoMixError(
                f"{folder.name} has no configuration {configuration} in its {plans}: "
                f"there are {', '.join(manager.available_configurations)}."
            )
    cases = max(1, _count_raw_cases(folder.name))
    data = {c: folder / str(manager.get_configuration(c).data_identifier) for c in configurations}
    return [c for c, there in data.items() if len(list(there.glob("*.pkl"))) < cases]


def _count_raw_cases(dataset: str) -> int:
    """How many training cases there are in ``nnUNet_raw``, as nnU-Net counts; 0 if they aren't there any more."""
    root = find_root("nnUNet_raw")
    if root is None or not (root / dataset).is_dir():
        return 0
    with explaining(f"{root / dataset} is not a raw dataset of nnU-Net"):
        dataset_json = read_dataset_json(root / dataset)
        if "dataset" in dataset_json:  # the cases are listed there
            return len(dataset_json["dataset"])
        folder = str(root / dataset / "imagesTr")
        return len(get_identifiers_from_splitted_dataset_folder(folder, dataset_json["file_ending"]))


def _number(dataset: str) -> str:
    """What nnU-Net's commands for planning take instead of the name."""
    number = re.match(r"Dataset(\d{3})_", dataset)
    if number is None:
        raise LoMixError(f"{dataset!r} is not the name of a dataset, which is like Dataset004_Hippocampus.")
    return str(int(number[1]))


def _read_plans(file: Path) -> PlansManager:
    with explaining(f"{file} is not nnU-Net's"):
        plans = PlansManager(read_json(file, "configurations", "plans_name"))
        for configuration in plans.available_configurations:
            _ = plans.get_configuration(configuration).data_identifier
    return plans


def _require_raw(dataset: str) -> None:
    root = find_root("nnUNet_raw")
    if root is None or not (root / dataset).is_dir():
        raise LoMixError(
            f"{dataset} is not preprocessed, and not in nnUNet_raw ({root or 'which is not set'}): put it there first"
            f"{suggest_dataset(dataset)}"
        )
