"""Writing a model as one of nnUNetTrainer, and where it comes from."""

import hashlib
import platform
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nnunet_lomix.errors import LoMixError
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
EXTRAS = (PROGRESS, SUMMARY)  # of each fold: nnUNetv2_export_model_to_zip wants these, too
PROVENANCE = "provenance.txt"
Checkpoints = Mapping[Path, Mapping[str, Any]]  # the content of each file


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
        plans: content of the file.
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
        stock = {key: value for key, value in checkpoint.items() if key != STATE} | {"trainer_name": STOCK}
        try:
            torch.save(stock, _make_place(file, model, made / relative))
        except RuntimeError as error:  # torch's for a full disk
            raise OSError(0, str(error).splitlines()[0], str(made)) from None
    folds = list(dict.fromkeys(file.parent for file in checkpoints))
    copied = [model.path / name for name in DESCRIPTIONS] + [fold / name for fold in folds for name in EXTRAS]
    for file in filter(Path.is_file, copied):
        shutil.copyfile(file, _make_place(file, model, made / relative))
    (made / relative / PROVENANCE).write_text(_provenance(model, checkpoints, checked))
    return relative


def _place_model(plans: Mapping[str, Any], configuration: str) -> Path:
    """Where nnU-Net's trainer would write it, below its results; a stranger's names lead to no other place.

    Raises:
        LoMixError: a name isn't one of nnU-Net's.
    """
    dataset, plans_name = plans["dataset_name"], plans["plans_name"]
    if not re.fullmatch(r"Dataset\d{3,}_[^/\\]+", dataset) or re.search(r"[/\\]", plans_name + configuration):
        raise LoMixError(f"{dataset}, {plans_name} and {configuration} in plans.json can't be names of folders.")
    return ModelFolder.of(Path(), dataset, STOCK, plans_name, configuration).path


def _make_place(file: Path, model: ModelFolder, made: Path) -> Path:
    """Where a file of the model belongs in the exported one; its folder is made."""
    target = made / file.relative_to(model.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _provenance(model: ModelFolder, checkpoints: Checkpoints, checked: Mapping[Path, str]) -> str:
    sources = [*filter(Path.is_file, (model.path / name for name in DESCRIPTIONS)), *checkpoints]
    hashes = "\n".join(f"{_sha256(file)}  {file.relative_to(model.path)}" for file in sources)
    versions = ", ".join(f"{name} {version(name)}" for name in ("nnunet_lomix", "nnunetv2", "torch"))
    entries = "\n".join(_describe(file, checkpoint, checked[file]) for file, checkpoint in checkpoints.items())
    unfinished = [fold.path.name for fold in model.folds() if not fold.is_finished()]
    left_out = f"Left out, as its training had not ended: {', '.join(unfinished)}\n" if unfinished else ""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        f"Exported from {model.path.name} on {now}\n"
        f"by {versions}, Python {platform.python_version()}.\n\n"
        f"How the weights were learned:\n{entries}\n{left_out}\n"
        "LoMix is a loss: it mixes and supervises the outputs of all decoder scales during training. The network is\n"
        f"that of {STOCK}, and so are the name and all keys of these checkpoints; the loss's state was left out.\n\n"
        f"SHA-256 of the files it was made from:\n{hashes}\n"
    )


def _describe(file: Path, checkpoint: Mapping[str, Any], checked: str) -> str:
    state = checkpoint.get(STATE)
    learned = "no LoMix state"
    if state is not None:
        maps: Mapping[str, float] = next((epoch for epoch in reversed(state["history"]) if epoch), {})
        learned = f"LoMix, weighting rule {state['rule']}, {len(maps)} supervised maps"
    return (
        f"{file.parent.name}/{file.name}: {checkpoint['trainer_name']}, {checkpoint['current_epoch']} epochs, {learned}"
        f"; network compared with {STOCK}'s by {checked}"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
