"""A model trained with LoMix, for people who have only nnU-Net: the same network under nnUNetTrainer's name."""

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.export.model import CROSS_VALIDATION, POSTPROCESSING, REMEDIES, list_outdated, name_model, write_model
from nnunet_lomix.files import building
from nnunet_lomix.nnunet.checkpoints import read_checkpoint
from nnunet_lomix.nnunet.datasets import require_utf8
from nnunet_lomix.nnunet.network import STOCK, check_network
from nnunet_lomix.nnunet.prediction import Case, predict, read_case
from nnunet_lomix.nnunet.results import BEST, DATASET_JSON, FINAL, NAME_THE_MODEL, FoldFolder, ModelFolder, read_json


def export_model(
    results: str | Path,
    out: str | Path,
    images: Sequence[str] = (),
    dataset_name: str | None = None,
    plans_name: str | None = None,
    console: Console | None = None,
) -> Path:
    """Write ``out/DATASET/nnUNetTrainer__PLANS__CONFIGURATION``, whole or not at all.

    Args:
        results: folder of a trainer, with plans.json and the folds.
        out: folder to make.
        images: an image of each case by which both models are compared; its other files are found beside it.
        dataset_name, plans_name: names of the exported model, for nnU-Net's ``-d`` and ``-p``; None for its own.
        console: where the outcome is printed.

    Returns:
        The folder of the exported model.

    Raises:
        LoMixError: something is missing, the network isn't nnUNetTrainer's, a checkpoint can't be trusted, the models
            differ, or a name can't be one of nnU-Net's.
    """
    console = console or Console()
    # unlike Path.resolve, realpath raises nothing for a link that leads to itself
    model, out = ModelFolder(Path(os.path.realpath(results))), Path(os.path.realpath(out))
    require_utf8(model.path)
    require_utf8(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoMixError(f"{out} is {'there and not empty' if out.is_dir() else 'a file'}: choose another --out.")
    plans, folds = model.read_plans(), [fold for fold in model.folds() if fold.is_finished()]
    if not folds:
        raise LoMixError(f"{model.path} has no fold_X/{FINAL}: name the folder of a trainer whose training has ended.")
    dataset_json = read_json(
        model.path / DATASET_JSON, "labels", remedy=NAME_THE_MODEL, file_ending=str, channel_names=dict
    )
    files = [fold.path / name for fold in folds for name in (FINAL, BEST)]
    checkpoints = {file: read_checkpoint(file) for file in files if file.is_file()}
    checked = {file: check_network(checkpoint, plans, dataset_json) for file, checkpoint in checkpoints.items()}
    configuration = next(iter(checkpoints.values()))["init_args"]["configuration"]
    names = {"dataset_name": dataset_name, "plans_name": plans_name}
    renamed = plans | {key: name for key, name in names.items() if name is not None}
    relative = name_model(renamed["dataset_name"], renamed["plans_name"], configuration)
    cases = dict(read_case(Path(image), plans, dataset_json) for image in images)
    try:
        with building(out) as temporary:
            write_model(model, checkpoints, checked, renamed, temporary / relative)
            for name, case in cases.items():
                agreement = compare_predictions(model.path, temporary / relative, folds, case)
                console.print(f"{name}: {agreement}", soft_wrap=True, markup=False)
    except OSError as error:
        # a file of the model, or else the folder to make, whatever is made on the way to it
        place = error.filename if Path(str(error.filename)).is_relative_to(model.path) else out
        raise LoMixError(f"{place}: {error.strerror}; nothing was exported.") from None
    for sentence in (
        f"Exported {', '.join(fold.path.name for fold in folds)} to {out / relative}",
        *(f"Its network was compared with {STOCK}'s by {how}." for how in sorted(set(checked.values()))),
        *_describe(model, ModelFolder(out / relative), renamed if renamed != plans else None, relative),
    ):
        console.print(sentence, soft_wrap=True, markup=False)
    return out / relative


def compare_predictions(original: Path, exported: Path, folds: Sequence[FoldFolder], case: Case) -> str:
    """Predict a case with both models; says that they agree bit for bit, and in how much.

    Raises:
        LoMixError: they don't agree, or one of them can't predict.
    """
    segmentation, probabilities = predict(original, folds, case)
    other_segmentation, other_probabilities = predict(exported, folds, case)
    same = np.array_equal(segmentation, other_segmentation)
    if not same or probabilities.tobytes() != other_probabilities.tobytes():
        raise LoMixError("The predictions of the original and the exported model differ: nothing was exported.")
    shape = " x ".join(map(str, segmentation.shape))
    return f"same segmentation ({shape}) and same probabilities ({probabilities.size} values), bit for bit"


def _describe(model: ModelFolder, made: ModelFolder, renamed: dict[str, Any] | None, relative: Path) -> Iterator[str]:
    """What the exported model has beyond checkpoints, what it lacks, and how nnU-Net finds it, in sentences."""
    for folder in sorted({file.parent for file in made.path.glob(f"{CROSS_VALIDATION}*/{POSTPROCESSING}")}):
        yield f"Its postprocessing is in {folder.name}."
    unfinished = [fold.path.name for fold in model.folds() if not fold.is_finished()]
    if unfinished:
        yield f"Left out, as its training has not ended: {', '.join(unfinished)}"
    if outdated := [str(file.relative_to(model.path)) for file in list_outdated(model)]:
        yield f"Left out, as a checkpoint is newer: {', '.join(outdated)}"
    for name, remedy in REMEDIES.items():
        lacking = [fold.path.name for fold in made.folds() if not (fold.path / name).is_file()]
        if lacking:
            yield f"For nnUNetv2_export_model_to_zip {', '.join(lacking)} lacks {name}: {remedy}."
    if renamed is not None:
        where = f"-d {renamed['dataset_name']} and -p {renamed['plans_name']}"
        yield f"With nnUNet_results={shlex.quote(str(made.path.parents[1]))} nnUNetv2_predict finds it by {where}."
    else:
        yield (
            f"Where it is installed, it replaces a model {relative} that is there already: to prevent that, export it "
            "with another --plans-name or --dataset-name."
        )
