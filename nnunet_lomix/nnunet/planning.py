"""What nnU-Net's planning and preprocessing leave for a training, and the commands that make what is missing of it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_lomix.errors import LoMixError, explaining
from nnunet_lomix.nnunet.datasets import (
    SPLITS,
    find_part,
    find_root,
    is_hidden,
    read_splits,
    require_root,
    suggest_dataset,
)
from nnunet_lomix.nnunet.results import FINGERPRINT, read_dataset_json, read_json

if TYPE_CHECKING:  # slow to import
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

# the planners of nnU-Net whose plans are known by their names
PLANNERS = {
    "nnUNetPlans": "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}
SECOND_STAGE = {"3d_cascade_fullres": "3d_fullres"}  # of a cascade, and the configuration that has its data
IN_RAW = "every raw dataset of nnU-Net has one"
Command = tuple[str, ...]


def list_missing(dataset: str, needed: Sequence[tuple[str, str]]) -> list[Command]:
    """nnU-Net's commands for what a dataset lacks now, in order.

    Args:
        dataset: its name.
        needed: pairs of plans and a configuration.

    Raises:
        LoMixError: something is neither there nor can nnU-Net's commands make it.
    """
    folder = require_root("nnUNet_preprocessed") / dataset
    commands: list[Command] = []
    for plans in dict.fromkeys(plans for plans, _ in needed):
        # the command that preprocesses doesn't know second stages
        missing = list(dict.fromkeys(SECOND_STAGE.get(c, c) for other, c in needed if other == plans))
        if (folder / f"{plans}.json").is_file():
            missing = _find_unprocessed(folder, plans, missing)
        else:  # until there are plans nobody knows whether others' data will do; it is asked again then
            number = _require_raw(dataset)
            if plans not in PLANNERS:
                raise LoMixError(f"{dataset} has no plans {plans}, and nnU-Net no planner of that name: plan first.")
            if not (folder / FINGERPRINT).is_file():
                commands.append(("nnUNetv2_extract_fingerprint", "-d", number, "--no_pbar"))
            commands.append(("nnUNetv2_plan_experiment", "-d", number, "-pl", PLANNERS[plans]))
        if missing:
            number = _require_raw(dataset)
            commands.append(("nnUNetv2_preprocess", "-d", number, "-plans_name", plans, "-c", *missing, "--no_pbar"))
    return list(dict.fromkeys(commands))


def find_first_stage(dataset: str, plans: str, configuration: str) -> str | None:
    """The configuration whose predictions a second stage of a cascade reads; None if it isn't one.

    Raises:
        LoMixError: the plans are not nnU-Net's.
    """
    file = require_root("nnUNet_preprocessed") / dataset / f"{plans}.json"
    if not file.is_file():
        return "3d_lowres" if configuration in SECOND_STAGE else None
    manager = _read_plans(file)
    if configuration not in manager.available_configurations:
        return None  # which list_missing tells
    first: str | None = manager.get_configuration(configuration).previous_stage_name
    return first


def list_cases(dataset: str, plans: str, configuration: str, fold: str) -> set[str]:
    """The cases that a training on a fold reads; without ``splits_final.json`` all that are preprocessed.

    Raises:
        LoMixError: the plans or the folds are not nnU-Net's.
    """
    folder = require_root("nnUNet_preprocessed") / dataset
    if fold != "all" and (folder / SPLITS).exists():
        split = read_splits(folder)[int(fold)]
        return {*split["train"], *split["val"]}
    if not (folder / f"{plans}.json").is_file():
        return set()
    data = folder / str(_read_plans(folder / f"{plans}.json").get_configuration(configuration).data_identifier)
    return {file.stem for file in data.glob("*.pkl") if not is_hidden(file)}


def require_folds(dataset: str, folds: Sequence[int]) -> None:
    """Refuse folds that a dataset doesn't have.

    Raises:
        LoMixError: it lacks one, or its ``splits_final.json`` is not nnU-Net's.
    """
    folder = require_root("nnUNet_preprocessed") / dataset
    there = len(read_splits(folder)) if (folder / SPLITS).exists() else 5
    beyond = [str(fold) for fold in sorted({*folds}) if fold >= there]
    if beyond:
        raise LoMixError(
            f"{dataset} has the folds 0 to {there - 1}, not {', '.join(beyond)}: leave them out, or add folds "
            "(nnunet_lomix splits)."
        )


def _find_unprocessed(folder: Path, plans: str, configurations: Sequence[str]) -> list[str]:
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
    from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder  # slow to import

    folder = find_part(dataset, "")
    if folder is None:
        return 0
    with explaining(f"{folder} is not a raw dataset of nnU-Net"):
        dataset_json = read_dataset_json(folder, IN_RAW)
        if "dataset" in dataset_json:  # the cases are listed there
            return len(dataset_json["dataset"])
        return len(get_identifiers_from_splitted_dataset_folder(str(folder / "imagesTr"), dataset_json["file_ending"]))


def _read_plans(file: Path) -> "PlansManager":
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # slow to import

    with explaining(f"{file} is not nnU-Net's"):
        plans = PlansManager(read_json(file, "configurations", "plans_name"))
        for configuration in plans.available_configurations:
            _ = plans.get_configuration(configuration).data_identifier
    return plans


def _require_raw(dataset: str) -> str:
    """The number of a dataset that is in ``nnUNet_raw``: what nnU-Net's commands for planning take, not its name."""
    number = re.match(r"Dataset(\d{3})_", dataset)
    if number is None:
        raise LoMixError(
            f"{dataset!r} is not the name of a dataset, which is like Dataset004_Hippocampus, with three digits."
        )
    folder = find_part(dataset, "")
    if folder is None:
        raise LoMixError(
            f"{dataset} is not preprocessed, and not in nnUNet_raw ({find_root('nnUNet_raw') or 'which is not set'}): "
            f"put it there first{suggest_dataset(dataset)}"
        )
    read_dataset_json(folder, IN_RAW)
    return str(int(number[1]))
