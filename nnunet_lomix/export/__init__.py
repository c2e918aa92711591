"""A model trained with LoMix, for people who have only nnU-Net: the same network under nnUNetTrainer's name."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.export.model import (
    CROSS_VALIDATION,
    POSTPROCESSING,
    REMEDIES,
    read_checkpoints,
    rename_plans,
    write_model,
)
from nnunet_lomix.export.network import STOCK, check_network
from nnunet_lomix.export.predictions import compare_predictions, find_cases, read_case
from nnunet_lomix.nnunet.datasets import require_utf8
from nnunet_lomix.nnunet.results import (
    DATASET_JSON,
    FINAL,
    NAME_THE_MODEL,
    FoldFolder,
    ModelFolder,
    read_json,
    require_types,
)


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
        LoMixError: something is missing, the network isn't nnUNetTrainer's, a checkpoint can't be trusted, or the
            models differ.
        UsageError: a name can't be one of nnU-Net's.
    """
    console = console or Console()
    # unlike Path.resolve, realpath raises nothing for a link that leads to itself
    model, out = ModelFolder(Path(os.path.realpath(results))), Path(os.path.realpath(out))
    require_utf8(model.path)
    require_utf8(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoMixError(f"{out} is {'there and not empty' if out.is_dir() else 'a file'}: choose another --out.")
    dataset_json = read_json(model.path / DATASET_JSON, "file_ending", "channel_names", "labels", remedy=NAME_THE_MODEL)
    require_types(model.path / DATASET_JSON, dataset_json, file_ending=str, channel_names=dict)
    plans = model.read_plans()
    renamed = rename_plans(plans, dataset_name, plans_name)
    folds = find_folds(model)
    checkpoints = read_checkpoints(folds)
    checked = {file: check_network(checkpoint, plans, dataset_json) for file, checkpoint in checkpoints.items()}
    found = find_cases(images, dataset_json["file_ending"])
    cases = {name: read_case(plans, dataset_json["channel_names"], files) for name, files in found.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as temporary:
            made = Path(temporary, "model")
            relative = write_model(model, checkpoints, checked, renamed, made)
            for name, case in cases.items():
                agreement = compare_predictions(model.path, made / relative, _numbers(folds), case)
                console.print(f"{name}: {agreement}", soft_wrap=True, markup=False)
            if out.exists():
                out.rmdir()
            made.rename(out)
    except OSError as error:
        place = _name_place(error, model.path, out)
        raise LoMixError(f"{place}: {error.strerror}; nothing was exported.") from None
    sentences = [
        f"Exported {', '.join(fold.path.name for fold in folds)} to {out / relative}",
        *(f"Its network was compared with {STOCK}'s by {how}." for how in sorted(set(checked.values()))),
        *_list_contents(model, ModelFolder(out / relative)),
        _describe_names(relative, plans, renamed),
    ]
    for sentence in sentences:
        console.print(sentence, soft_wrap=True, markup=False)
    return out / relative


def _name_place(error: OSError, model: Path, out: Path) -> Path:
    """What could not be read of the model, or else the folder to make, whatever is made on the way to it."""
    place = Path(str(error.filename))
    is_temporary = str(place).startswith(f"{out}.")
    return place if place.is_relative_to(model) and not is_temporary else out


def find_folds(model: ModelFolder) -> list[FoldFolder]:
    """The folds whose training has ended.

    Raises:
        LoMixError: there are none.
    """
    folds = [fold for fold in model.folds() if fold.is_finished()]
    if not folds:
        raise LoMixError(f"{model.path} has no fold_X/{FINAL}: name the folder of a trainer whose training has ended.")
    return folds


def _numbers(folds: Sequence[FoldFolder]) -> list[int | str]:
    return [int(fold.fold) if fold.fold.isdecimal() else fold.fold for fold in folds]


def _list_contents(model: ModelFolder, made: ModelFolder) -> Iterator[str]:
    """What the exported model has beyond checkpoints, and what it lacks, in sentences."""
    for folder in sorted({file.parent for file in made.path.glob(f"{CROSS_VALIDATION}*/{POSTPROCESSING}")}):
        yield f"Its postprocessing is in {folder.name}."
    unfinished = [fold.path.name for fold in model.folds() if not fold.is_finished()]
    if unfinished:
        yield f"Left out, as its training has not ended: {', '.join(unfinished)}"
    for name, remedy in REMEDIES.items():
        lacking = [fold.path.name for fold in made.folds() if not (fold.path / name).is_file()]
        if lacking:
            yield f"For nnUNetv2_export_model_to_zip {', '.join(lacking)} lacks {name}: {remedy}."


def _describe_names(relative: Path, plans: Mapping[str, Any], renamed: Mapping[str, Any]) -> str:
    """How nnU-Net finds a renamed model, or what a model that keeps its names can do to one of the recipient."""
    if renamed != plans:
        return f"nnUNetv2_predict finds it by -d {renamed['dataset_name']} and -p {renamed['plans_name']}."
    return (
        f"Where it is installed, it replaces a model {relative} that is there already: to prevent that, export it with "
        "another --plans-name or --dataset-name."
    )
