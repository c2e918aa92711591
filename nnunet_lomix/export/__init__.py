"""A model trained with LoMix, for people who have only nnU-Net: the same network under nnUNetTrainer's name."""

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.export.model import EXTRAS, read_checkpoints, write_model
from nnunet_lomix.export.network import STOCK, check_network
from nnunet_lomix.export.predictions import compare_predictions, find_cases, read_case
from nnunet_lomix.nnunet.results import DATASET_JSON, FINAL, NAME_THE_MODEL, FoldFolder, ModelFolder, read_json


def export_model(
    results: str | Path, out: str | Path, images: Sequence[str] = (), console: Console | None = None
) -> Path:
    """Write ``out/DATASET/nnUNetTrainer__PLANS__CONFIGURATION``, whole or not at all.

    Args:
        results: folder of a trainer, with plans.json and the folds.
        out: folder to make.
        images: an image of each case by which both models are compared; its other channels are found beside it.
        console: where the outcome is printed.

    Returns:
        The folder of the exported model.

    Raises:
        LoMixError: something is missing, the network isn't nnUNetTrainer's, a checkpoint can't be trusted, or the
            models differ.
    """
    console = console or Console()
    model, out = ModelFolder(Path(results).resolve()), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoMixError(f"{out} is {'there and not empty' if out.is_dir() else 'a file'}: choose another --out.")
    dataset_json = read_json(model.path / DATASET_JSON, "file_ending", "channel_names", "labels", remedy=NAME_THE_MODEL)
    plans = model.read_plans()
    folds = find_folds(model)
    checkpoints = read_checkpoints(folds)
    checked = {file: check_network(checkpoint, plans, dataset_json) for file, checkpoint in checkpoints.items()}
    cases = {name: read_case(plans, channels) for name, channels in find_cases(images, dataset_json).items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as temporary:
            made = Path(temporary, "model")
            relative = write_model(model, checkpoints, checked, plans, made)
            for name, case in cases.items():
                agreement = compare_predictions(model.path, made / relative, _numbers(folds), case)
                console.print(f"{name}: {agreement}", soft_wrap=True, markup=False)
            if out.exists():
                out.rmdir()
            made.rename(out)
    except OSError as error:
        raise LoMixError(f"{error.filename or out}: {error.strerror}; nothing was exported.") from None
    _report(console, model, folds, set(checked.values()), out / relative)
    return out / relative


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


def _report(
    console: Console, model: ModelFolder, folds: Sequence[FoldFolder], checked: Collection[str], made: Path
) -> None:
    names = ", ".join(fold.path.name for fold in folds)
    console.print(f"Exported {names} to {made}", soft_wrap=True, markup=False)
    for how in sorted(checked):
        console.print(f"Its network was compared with {STOCK}'s by {how}.", soft_wrap=True, markup=False)
    unfinished = [fold.path.name for fold in model.folds() if not fold.is_finished()]
    if unfinished:
        console.print(f"Left out, as its training has not ended: {', '.join(unfinished)}", markup=False)
    lacking = [f"{fold.path.name}/{name}" for fold in folds for name in EXTRAS if not (fold.path / name).is_file()]
    if lacking:
        console.print(
            f"For nnUNetv2_export_model_to_zip it lacks {', '.join(lacking)}: train with --val first.",
            soft_wrap=True,
            markup=False,
        )
