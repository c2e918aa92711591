"""What is compared, from nnU-Net's results folder: the validation cases of trained folds."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import pandas as pd
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_lomix.compare.sources import (
    SHOWN,
    Source,
    Training,
    list_files,
    list_images,
    list_labels,
    match_cases,
    name_trainings,
    pick_references,
    require_equal,
    require_one_name_each,
    shorten,
)
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.datasets import (
    SPLITS,
    find_images,
    find_root,
    name_dataset,
    read_splits,
    require_references,
    require_root,
)
from nnunet_lomix.nnunet.results import CURVE_COLUMNS, PLANS, ModelFolder, read_curves

# what all trainers must have alike in their plans
PLANNED = ("spacing", "patch_size", "batch_size", "normalization_schemes", "architecture")


def read_results(
    dataset: str,
    configuration: str,
    trainers: Sequence[str],
    plans: str = "nnUNetPlans",
    folds: Sequence[str] = (),
    results: Sequence[str | Path] = (),
    names: Sequence[str] = (),
    intersection: bool = False,
) -> Source:
    """The validation cases of trained folds, with the references that nnU-Net scores against.

    Args:
        dataset: number or name.
        configuration: "2d", …
        trainers: the reference first.
        plans: their plans.
        folds: by default all that are validated.
        results: results folders, one for each seed, each with all trainers; by default ``nnUNet_results``.
        names: what to call the trainers, by default as they are; those of one name are its seeds.
        intersection: compare the cases that all have, instead of refusing others.

    Raises:
        LoMixError: something is missing, or folds, splits, cases, labels or spacing differ.
        UsageError: names, trainers and results folders don't fit together.
    """
    dataset = name_dataset(dataset)
    models = _find_models(dataset, configuration, trainers, plans, results, names)
    folders = {training: model.path for training, model in models.items()}

    managers = {model.path: PlansManager(model.read_plans()) for model in models.values()}
    json_files = {model.path: model.read_dataset_json() for model in models.values()}
    labels, ignore = require_equal({f: list_labels(f, content) for f, content in json_files.items()}, "labels")
    planned = {folder: m.get_configuration(configuration).configuration for folder, m in managers.items()}
    for part in PLANNED:
        require_equal({folder: own.get(part) for folder, own in planned.items()}, f"planned {part}")
    ending = require_equal({folder: content["file_ending"] for folder, content in json_files.items()}, "file ending")

    folds = _find_folds(list(models.values()), folds, ending)
    validated = {training: _list_validation(model, folds, ending) for training, model in models.items()}
    _require_same_splits({folders[t]: {case: fold for case, (fold, _) in own.items()} for t, own in validated.items()})
    predictions, match_notes = match_cases(
        {training: {case: file for case, (_, file) in own.items()} for training, own in validated.items()},
        folders,
        intersection,
    )
    cases = list(next(iter(predictions.values())))
    if not intersection:
        _require_whole_folds(dataset, folds, cases)
    curves, curve_notes = _read_curves(models, folds)
    notes = list(match_notes)
    if "all" in folds:
        notes.append("Fold all is validated on the cases that it was trained with: this says nothing about others.")
    notes += curve_notes
    images = find_images(dataset)
    return Source(
        references=pick_references(require_references(dataset), ending, cases),
        predictions=predictions,
        folders=folders,
        labels=labels,
        ignore=ignore,
        reader=next(iter(managers.values())).image_reader_writer_class,
        dataset=dataset,
        label_source="dataset.json of the trained models",
        configuration=configuration,
        folds=tuple(folds),
        notes=tuple(notes),
        images=list_images(images, ending, cases) if images else {},
        curves=curves,
    )


def _find_models(
    dataset: str,
    configuration: str,
    trainers: Sequence[str],
    plans: str,
    results: Sequence[str | Path],
    names: Sequence[str],
) -> dict[Training, ModelFolder]:
    roots = [Path(folder) for folder in results] or [require_root("nnUNet_results")]
    folders = [
        ModelFolder.of(root, dataset, trainer, plans, configuration).path for root in roots for trainer in trainers
    ]
    for folder in folders:
        if not folder.is_dir():
            there = sorted(file.parent.name for file in folder.parent.glob(f"*/{PLANS}"))
            close = get_close_matches(folder.name, there, SHOWN, 0.7)
            hint = f"did you mean {shorten(close, ' or ')}?" if close else f"there is {shorten(there) or 'nothing'}."
            raise LoMixError(f"There is no {folder.name!r} in {folder.parent}; {hint}")
    require_one_name_each(trainers, names, "--trainers")
    repeated = [name for _ in roots for name in names or trainers]
    return {training: ModelFolder(folder) for training, folder in name_trainings(folders, repeated).items()}


def _find_folds(models: Sequence[ModelFolder], wanted: Sequence[str], ending: str) -> list[str]:
    validated = {
        model.path: {fold.fold for fold in model.folds() if any(fold.validation.glob(f"*{ending}"))} for model in models
    }
    wanted = list(dict.fromkeys(wanted)) or sorted(set().union(*validated.values()) - {"all"})
    for folder, own in validated.items():
        missing = [fold for fold in wanted if fold not in own]
        if missing:
            raise LoMixError(
                f"{folder} has no validation of fold {shorten(missing)}: run nnUNetv2_train with --val, or choose "
                "folds by -f."
            )
    if not wanted:
        raise LoMixError(
            f"No fold of {shorten(validated)} is validated: run nnUNetv2_train with --val. (fold_all is validated on "
            "its own training cases: ask for it by -f all.)"
        )
    return wanted


def _list_validation(model: ModelFolder, folds: Sequence[str], ending: str) -> dict[str, tuple[str, Path]]:
    """Fold and file of each case."""
    found: dict[str, tuple[str, Path]] = {}
    for fold in folds:
        for case, file in list_files(model.fold(fold).validation, ending).items():
            if case in found:
                raise LoMixError(
                    f"{case} is validated in folds {found[case][0]} and {fold} of {model.path}: compare one of them "
                    "at a time by -f."
                )
            found[case] = fold, file
    return found


def _require_same_splits(folds: Mapping[Path, Mapping[str, str]]) -> None:
    """Refuse trainings that have a case in different folds; ``folds`` are by folder and case."""
    (first, expected), *others = folds.items()
    for folder, own in others:
        moved = [case for case in sorted(own) if own[case] != expected.get(case, own[case])]
        if moved:
            raise LoMixError(
                f"{folder} and {first} were trained on different splits: {shorten(moved)} are in other folds."
            )


def _require_whole_folds(dataset: str, folds: Sequence[str], cases: Sequence[str]) -> None:
    """Validations that were all interrupted look alike; nnU-Net's splits know which cases there should be."""
    root = find_root("nnUNet_preprocessed")
    if root is None or not (root / dataset / SPLITS).exists():
        return
    expected = {str(i): split["val"] for i, split in enumerate(read_splits(root / dataset))}
    for fold in folds:
        missing = [case for case in expected.get(fold, []) if case not in cases]
        if missing:
            raise LoMixError(
                f"No validation of fold {fold} has {shorten(missing)}, though {root / dataset / SPLITS} lists it: run "
                "nnUNetv2_train with --val, or compare the cases that are there by --intersection."
            )


def _read_curves(models: Mapping[Training, ModelFolder], folds: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The curves of all trainings, and notes on those that can't be had: scores need no checkpoint."""
    parts, notes = [], []
    for training, model in models.items():
        try:
            parts.append(read_curves({training: model}, folds))
        except LoMixError as error:
            notes.append(f"There are no learning curves of {training[0]}: {error}")
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=CURVE_COLUMNS), notes
