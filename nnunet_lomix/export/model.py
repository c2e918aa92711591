"""Writing a model as one of nnUNetTrainer, and where it comes from."""

import hashlib
import json
import platform
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunet_lomix.errors import LoMixError, UsageError
from nnunet_lomix.export.network import STOCK
from nnunet_lomix.nnunet.checkpoints import STATE, read_checkpoint
from nnunet_lomix.nnunet.results import (
    BEST,
    DATASET_JSON,
    FINAL,
    FINGERPRINT,
    PLANS,
    PROGRESS,
    SUMMARY,
    FoldFolder,
    ModelFolder,
)

DESCRIPTIONS = (DATASET_JSON, PLANS, FINGERPRINT)
# nnUNetv2_export_model_to_zip wants these of each fold, too; what the user can do where one is missing
REMEDIES = {
    PROGRESS: "it can't be drawn from the log in its checkpoint, so put any picture of this name there",
    SUMMARY: "validate it by nnUNetv2_train with --val, and export again",
}
# what nnUNetv2_find_best_configuration writes into folders of the model, but for the predictions themselves
CROSS_VALIDATION = "crossval_results_folds_"
POSTPROCESSING = "postprocessing.pkl"
CROSS_VALIDATED = ("summary.json", POSTPROCESSING, "postprocessing.json")
PROVENANCE = "provenance.txt"
Checkpoints = Mapping[Path, Mapping[str, Any]]  # the content of each file


def rename_plans(plans: Mapping[str, Any], dataset_name: str | None, plans_name: str | None) -> dict[str, Any]:
    """The content of plans.json with other names, by which nnU-Net finds the folder of a model.

    Args:
        plans: content of the file.
        dataset_name, plans_name: None for the name as it is.

    Raises:
        UsageError: a name isn't one as nnU-Net wants it.
    """
    if dataset_name is not None and not is_dataset_name(dataset_name):
        raise UsageError(f"--dataset-name {dataset_name} is no name of a dataset as nnU-Net's are: Dataset123_Name.")
    # nnU-Net takes the name of a model's folder apart at each "__"
    if plans_name is not None and (not is_file_name(plans_name) or "__" in plans_name):
        raise UsageError(f"--plans-name {plans_name!r} can't be part of a folder's name: choose one without /, \\, __.")
    names = {"dataset_name": dataset_name, "plans_name": plans_name}
    return {**plans, **{key: name for key, name in names.items() if name is not None}}


def is_dataset_name(name: str) -> bool:
    """Whether nnU-Net takes a name for that of a dataset, with a number, and it leads to no other folder.

    >>> is_dataset_name("Dataset004_Hippocampus"), is_dataset_name("Hippocampus"), is_dataset_name("Dataset004_/tmp")
    (True, False, False)
    """
    return re.fullmatch(r"Dataset\d{3,}_.+", name) is not None and is_file_name(name)


def is_file_name(name: str) -> bool:
    """Whether a name is not empty and leads to no other folder."""
    return bool(name) and not re.search(r"[/\\]", name)


def read_checkpoints(folds: Sequence[FoldFolder]) -> Checkpoints:
    """The final and, where they are, the best checkpoints.

    Raises:
        CheckpointError: one of them can't be trusted.
    """
    files = [fold.path / name for fold in folds for name in (FINAL, BEST)]
    return {file: read_checkpoint(file) for file in files if file.is_file()}


def write_model(
    model: ModelFolder, checkpoints: Checkpoints, checked: Mapping[Path, str], plans: Mapping[str, Any], made: Path
) -> Path:
    """Write the model below ``made``.

    Args:
        model: the original.
        checkpoints: as from :func:`read_checkpoints`.
        checked: for each checkpoint by what its network was compared with nnUNetTrainer's, for the provenance.
        plans: content of the exported plans.json, as from :func:`rename_plans`.
        made: folder to make.

    Returns:
        The folder of the model, relative to ``made``.

    Raises:
        LoMixError: the names in the plans aren't nnU-Net's.
        OSError: a file can't be read or written.
    """
    configuration = next(iter(checkpoints.values()))["init_args"]["configuration"]
    relative = _place_model(plans, configuration)
    for file, checkpoint in checkpoints.items():
        try:
            torch.save(_make_stock(checkpoint, plans), _make_place(file, model, made / relative))
        except RuntimeError as error:  # torch's for a full disk
            raise OSError(0, str(error).splitlines()[0], str(made)) from None
    folds = [FoldFolder(path) for path in dict.fromkeys(file.parent for file in checkpoints)]
    copied = [model.path / name for name in DESCRIPTIONS]
    copied += [fold.path / name for fold in folds for name in REMEDIES]
    copied += [folder / name for folder in model.path.glob(f"{CROSS_VALIDATION}*") for name in CROSS_VALIDATED]
    for file in filter(Path.is_file, copied):
        shutil.copyfile(file, _make_place(file, model, made / relative))
    old_plans = model.read_plans()
    if plans != old_plans:
        (made / relative / PLANS).write_text(json.dumps(plans, indent=4), encoding="utf-8")
    for fold in folds:
        if not (fold.path / PROGRESS).is_file():
            _draw_progress(checkpoints[fold.path / FINAL], made / relative / fold.path.name)
    provenance = _provenance(model, checkpoints, checked, old_plans)
    (made / relative / PROVENANCE).write_text(provenance, encoding="utf-8")
    return relative


def _make_stock(checkpoint: Mapping[str, Any], plans: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint as one of nnUNetTrainer, without the state of LoMix, with the names of these plans."""
    stock = {key: value for key, value in checkpoint.items() if key != STATE} | {"trainer_name": STOCK}
    own_plans = checkpoint["init_args"].get("plans")
    if isinstance(own_plans, dict):
        names = {key: plans[key] for key in ("dataset_name", "plans_name")}
        stock["init_args"] = {**checkpoint["init_args"], "plans": {**own_plans, **names}}
    return stock


def _draw_progress(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Draw nnU-Net's progress.png anew from the log in a checkpoint; none if the log isn't as nnU-Net writes it."""
    logger = LocalLogger()
    with matplotlib.rc_context():  # nnU-Net's plot changes matplotlib's global settings
        try:
            logger.load_checkpoint(checkpoint["logging"])
            logger.plot_progress_png(str(folder))
        except (AttributeError, KeyError, TypeError, ValueError):
            plt.close()


def _place_model(plans: Mapping[str, Any], configuration: str) -> Path:
    """Where nnU-Net's trainer would write it, below its results; a stranger's names lead to no other place.

    Raises:
        LoMixError: a name isn't one of nnU-Net's.
    """
    dataset, plans_name = plans["dataset_name"], plans["plans_name"]
    if not is_dataset_name(dataset) or not is_file_name(plans_name + configuration):
        raise LoMixError(f"{dataset}, {plans_name} and {configuration} in plans.json can't be names of folders.")
    return ModelFolder.of(Path(), dataset, STOCK, plans_name, configuration).path


def _make_place(file: Path, model: ModelFolder, made: Path) -> Path:
    """Where a file of the model belongs in the exported one; its folder is made."""
    target = made / file.relative_to(model.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _provenance(
    model: ModelFolder, checkpoints: Checkpoints, checked: Mapping[Path, str], plans: Mapping[str, Any]
) -> str:
    """The text of provenance.txt; ``plans`` are the original ones."""
    sources = [*filter(Path.is_file, (model.path / name for name in DESCRIPTIONS)), *checkpoints]
    hashes = "\n".join(f"{_sha256(file)}  {file.relative_to(model.path)}" for file in sources)
    versions = ", ".join(f"{name} {version(name)}" for name in ("nnunet_lomix", "nnunetv2", "torch"))
    entries = "\n".join(_describe(file, checkpoint, checked[file]) for file, checkpoint in checkpoints.items())
    unfinished = [fold.path.name for fold in model.folds() if not fold.is_finished()]
    left_out = f"Left out, as its training had not ended: {', '.join(unfinished)}\n" if unfinished else ""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        f"Exported from {model.path.name} of {plans['dataset_name']} on {now}\n"
        f"by {versions}, Python {platform.python_version()}.\n\n"
        f"How the weights were learned:\n{entries}\n{left_out}\n"
        "LoMix is a loss: it mixes and supervises the outputs of all decoder scales during training. The network is\n"
        f"that of {STOCK}, and so are the name and all keys of these checkpoints; the loss's state was left out.\n\n"
        f"SHA-256 of the files it was made from:\n{hashes}\n"
    )


def _describe(file: Path, checkpoint: Mapping[str, Any], checked: str) -> str:
    epochs = checkpoint["current_epoch"]
    return (
        f"{file.parent.name}/{file.name}: {checkpoint['trainer_name']}, {epochs} epochs, "
        f"{_describe_learning(checkpoint.get(STATE), epochs)}; network compared with {STOCK}'s by {checked}"
    )


def _describe_learning(state: Mapping[str, Any] | None, epochs: int) -> str:
    """What LoMix had to do with a training of so many epochs, by the history of the weights in its state."""
    if state is None:
        return "no LoMix state"
    history: list[Mapping[str, float]] = [epoch for epoch in state["history"] if epoch]
    if not history:  # a finished checkpoint of another trainer, which LoMix's has saved again
        return "none of them with LoMix"
    some = f"{len(history)} of them with " if len(history) < epochs else ""
    return f"{some}LoMix, weighting rule {state['rule']}, {len(history[-1])} supervised maps"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
