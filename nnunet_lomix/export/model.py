"""Writing a model as one of nnUNetTrainer, and where it comes from."""

import hashlib
import json
import platform
import re
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.checkpoints import STATE
from nnunet_lomix.nnunet.internals import draw_progress
from nnunet_lomix.nnunet.network import STOCK
from nnunet_lomix.nnunet.results import DATASET_JSON, FINAL, FINGERPRINT, PLANS, PROGRESS, SUMMARY, ModelFolder

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
Checkpoints = Mapping[Path, Mapping[str, Any]]  # the content of each file


def name_model(dataset: str, plans: str, configuration: str) -> Path:
    """Where nnU-Net's trainer would write the model, below its results; no name leads to another place.

    >>> name_model("Dataset004_Hippocampus", "nnUNetPlans", "2d").as_posix()
    'Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__2d'

    Raises:
        LoMixError: a name isn't one of nnU-Net's.
    """
    if not re.fullmatch(r"Dataset\d{3,}_[^/\\]+", dataset):
        raise LoMixError(
            f"{dataset!r} is no name of a dataset as nnU-Net's are: give one by --dataset-name Dataset123_A."
        )
    # nnU-Net takes the name of a model's folder apart at each "__"
    if not plans or re.search(r"[/\\]|__", plans):
        raise LoMixError(
            f"{plans!r} can't be part of a folder's name: give another one by --plans-name, without / \\ __."
        )
    if re.search(r"[/\\]", configuration):
        raise LoMixError(f"The configuration {configuration!r} can't be part of a folder's name.")
    return ModelFolder.of(Path(), dataset, STOCK, plans, configuration).path


def list_cross_validated(model: ModelFolder) -> list[Path]:
    """The files of nnUNetv2_find_best_configuration that belong to a model."""
    return [folder / name for folder in sorted(model.path.glob(f"{CROSS_VALIDATION}*")) for name in CROSS_VALIDATED]


def list_outdated(model: ModelFolder) -> list[Path]:
    """Validations, and what was found by them, that were made with an earlier checkpoint than a fold's final one."""
    files = [(fold, fold.path / SUMMARY) for fold in model.folds()]
    files += [(fold, file) for fold in model.folds() for file in list_cross_validated(model)]
    return list(dict.fromkeys(file for fold, file in files if file.is_file() and fold.is_outdated(file)))


def write_model(
    model: ModelFolder, checkpoints: Checkpoints, checked: Mapping[Path, str], plans: Mapping[str, Any], made: Path
) -> None:
    """Write the model into the folder ``made``, which it makes.

    Args:
        model: the original.
        checkpoints: by their files.
        checked: for each checkpoint by what its network was compared with nnUNetTrainer's, for the provenance.
        plans: content of the exported plans.json.
        made: the folder.

    Raises:
        OSError: a file can't be read or written.
    """
    old_plans, folds = model.read_plans(), dict.fromkeys(file.parent for file in checkpoints)
    for fold in folds:
        (made / fold.name).mkdir(parents=True)
    for file, checkpoint in checkpoints.items():
        try:
            torch.save(_make_stock(checkpoint, plans), made / file.relative_to(model.path))
        except RuntimeError as error:  # torch's for a full disk
            raise OSError(0, str(error).splitlines()[0], str(made)) from None
    copied = [model.path / name for name in DESCRIPTIONS]
    copied += [fold / name for fold in folds for name in REMEDIES]
    copied += list_cross_validated(model)
    outdated = list_outdated(model)
    for file in copied:
        if not file.is_file() or file in outdated:
            continue
        target = made / file.relative_to(model.path)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if plans != old_plans:
        (made / PLANS).write_text(json.dumps(plans, indent=4), encoding="utf-8")
    for fold in folds:
        if not (fold / PROGRESS).is_file():
            draw_progress(checkpoints[fold / FINAL].get("logging", {}), made / fold.name)
    (made / "provenance.txt").write_text(_describe(model, checkpoints, checked, old_plans), encoding="utf-8")


def _make_stock(checkpoint: Mapping[str, Any], plans: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint as one of nnUNetTrainer, without the state of LoMix, with the names of these plans."""
    stock = {key: value for key, value in checkpoint.items() if key != STATE} | {"trainer_name": STOCK}
    own_plans = checkpoint["init_args"].get("plans")
    if isinstance(own_plans, dict):
        names = {key: plans[key] for key in ("dataset_name", "plans_name")}
        stock["init_args"] = {**checkpoint["init_args"], "plans": {**own_plans, **names}}
    return stock


def _describe(
    model: ModelFolder, checkpoints: Checkpoints, checked: Mapping[Path, str], plans: Mapping[str, Any]
) -> str:
    """The text of provenance.txt; ``plans`` are the original ones."""
    sources = [*filter(Path.is_file, (model.path / name for name in DESCRIPTIONS)), *checkpoints]
    hashes = "\n".join(f"{_sha256(file)}  {file.relative_to(model.path)}" for file in sources)
    versions = ", ".join(f"{name} {version(name)}" for name in ("nnunet_lomix", "nnunetv2", "torch"))
    entries = "\n".join(
        f"{file.relative_to(model.path)}: {checkpoint['trainer_name']}, {checkpoint['current_epoch']} epochs, "
        f"{_describe_learning(checkpoint)}; network compared with {STOCK}'s by {checked[file]}"
        for file, checkpoint in checkpoints.items()
    )
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


def _describe_learning(checkpoint: Mapping[str, Any]) -> str:
    """What LoMix had to do with a training, by the history of the weights in its state."""
    state = checkpoint.get(STATE)
    if state is None:
        return "no LoMix state"
    history: list[Mapping[str, float]] = [epoch for epoch in state["history"] if epoch]
    if not history:  # a finished checkpoint of another trainer, which LoMix's has saved again
        return "none of them with LoMix"
    some = f"{len(history)} of them with " if len(history) < checkpoint["current_epoch"] else ""
    return f"{some}LoMix, weighting rule {state['rule']}, {len(history[-1])} supervised maps"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
