"""What is compared, from nnU-Net's results folder: the validation cases of trained folds."""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_lomix.compare.sources import (
    SHOWN,
    Source,
    Training,
    find_spacings,
    list_images,
    list_labels,
    match_cases,
    name_trainings,
    pick_references,
    require_equal,
    require_one_name_each,
    shorten,
)
from nnunet_lomix.errors import LoMixError, explaining
from nnunet_lomix.nnunet.curves import CURVE_COLUMNS, read_all_curves
from nnunet_lomix.nnunet.datasets import (
    SPLITS,
    find_images,
    find_labels,
    find_root,
    list_cases,
    name_dataset,
    read_splits,
    require_references,
    require_root,
    suggest_dataset,
)
from nnunet_lomix.nnunet.results import PLANS, ModelFolder

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
        folds: by default all that are validated; with ``intersection`` those of them that all have.
        results: results folders, one for each seed, each with all trainers; by default ``nnUNet_results``.
        names: what to call the trainers, by default as they are; those of one name are its seeds.
        intersection: compare the folds and cases that all have, instead of refusing others.

    Raises:
        LoMixError: something is missing, or folds, splits, cases, labels or spacing differ.
        UsageError: names, trainers and results folders don't fit together.
    """
    dataset = name_dataset(dataset)
    models = _find_models(dataset, configuration, trainers, plans, results, names)
    folders = {training: model.path for training, model in models.items()}

    read = {model.path: _read_configuration(model, configuration) for model in models.values()}
    json_files = {model.path: model.read_dataset_json() for model in models.values()}
    labels, ignore = require_equal({f: list_labels(f, content) for f, content in json_files.items()}, "labels")
    for part in PLANNED:
        require_equal({folder: planned.get(part) for folder, (planned, _) in read.items()}, f"planned {part}")
    ending = require_equal({folder: content["file_ending"] for folder, content in json_files.items()}, "file ending")

    folds, fold_notes = _find_folds(list(models.values()), folds, ending, intersection)
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
    notes = [*fold_notes, *match_notes]
    if "all" in folds:
        notes.append("Fold all is validated on the cases that it was trained with: this says nothing about others.")
    notes += curve_notes
    images = find_images(dataset)
    references = pick_references(require_references(dataset), ending, cases)
    _, reader = next(iter(read.values()))
    return Source(
        references=references,
        predictions=predictions,
        folders=folders,
        labels=labels,
        ignore=ignore,
        reader=reader,
        dataset=dataset,
        label_source="dataset.json of the trained models",
        configuration=configuration,
        folds=tuple(folds),
        notes=tuple(notes),
        images=list_images(images, ending, cases) if images else {},
        spacings=find_spacings(references, predictions.values(), reader, find_labels(dataset)),
        curves=curves,
    )


def _read_configuration(model: ModelFolder, configuration: str) -> tuple[dict[str, Any], type[BaseReaderWriter]]:
    """What is planned for a configuration, and the class that reads its files.

    Raises:
        LoMixError: the plans aren't nnU-Net's.
    """
    with explaining(f"{model.path / PLANS} isn't as nnU-Net wants it"):
        manager = PlansManager(model.read_plans())
        return dict(manager.get_configuration(configuration).configuration), manager.image_reader_writer_class


def _require_dataset(root: Path, dataset: str) -> None:
    if not (root / dataset).is_dir():
        raise LoMixError(
            f"There is no {dataset} in the results folder {root}: train it, or check -d and --results"
            f"{suggest_dataset(dataset)}"
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
    for root in roots:
        _require_dataset(root, dataset)
    for folder in folders:
        if not folder.is_dir():
            there = sorted(file.parent.name for file in folder.parent.glob(f"*/{PLANS}"))
            close = get_close_matches(folder.name, there, SHOWN, 0.7)
            hint = f"did you mean {shorten(close, ' or ')}?" if close else f"there is {shorten(there) or 'nothing'}."
            raise LoMixError(f"There is no {folder.name!r} in {folder.parent}; {hint}")
    require_one_name_each(trainers, names, "--trainers")
    repeated = [name for _ in roots for name in names or trainers]
    return {training: ModelFolder(folder) for training, folder in name_trainings(folders, repeated).items()}


def _find_folds(
    models: Sequence[ModelFolder], wanted: Sequence[str], ending: str, intersection: bool
) -> tuple[list[str], list[str]]:
    """The folds to compare, and notes on those left out, which ``intersection`` allows if any training has them."""
    validated = {
        model.path: {fold.fold for fold in model.folds() if list_cases(fold.validation, ending)} for model in models
    }
    by_any = set().union(*validated.values())
    wanted = list(dict.fromkeys(wanted)) or sorted(by_any - {"all"}, key=lambda fold: (len(fold), fold))
    lacking = {fold: [folder for folder, own in validated.items() if fold not in own] for fold in wanted}
    common = [fold for fold in wanted if not lacking[fold]]
    for folder, own in validated.items():
        missing = [fold for fold in wanted if fold not in own]
        if [fold for fold in missing if not intersection or fold not in by_any]:
            raise LoMixError(
                f"{folder} has no validation of fold {shorten(missing)}: run nnUNetv2_train with --val, choose folds "
                "by -f, or compare the common ones by --intersection."
            )
    if wanted and not common:
        raise LoMixError(f"No fold is validated in all of {shorten(validated)}: run nnUNetv2_train with --val.")
    if not wanted:
        raise LoMixError(
            f"No fold of {shorten(validated)} is validated: run nnUNetv2_train with --val. (fold_all is validated on "
            "its own training cases: ask for it by -f all.)"
        )
    if common == wanted:
        return common, []
    left_out = (
        f"{fold} (not in {shorten(folder.name for folder in lacking[fold])})" for fold in wanted if fold not in common
    )
    return common, [f"Compared are the folds that all have, {', '.join(common)}; left out: {', '.join(left_out)}."]


def _list_validation(model: ModelFolder, folds: Sequence[str], ending: str) -> dict[str, tuple[str, Path]]:
    """Fold and file of each case."""
    files = {fold: list_cases(model.fold(fold).validation, ending) for fold in folds}
    found: dict[str, tuple[str, Path]] = {}
    for fold, own in files.items():
        for case, file in own.items():
            if case in found:
                choices = ", or ".join(f"-f {' '.join(group)}" for group in _group_disjoint(files))
                raise LoMixError(
                    f"{case} is validated in folds {found[case][0]} and {fold} of {model.path}, as a fold with few "
                    f"training cases has the validation cases of the one that it is drawn from: choose {choices}."
                )
            found[case] = fold, file
    return found


def _group_disjoint(folds: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Folds that can be compared together: each joins the first group that has none of its cases."""
    groups: list[list[str]] = []
    for fold, cases in folds.items():
        fitting = (group for group in groups if all(set(cases).isdisjoint(folds[other]) for other in group))
        group = next(fitting, None)
        if group is None:
            groups.append([fold])
        else:
            group.append(fold)
    return groups


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
            parts.append(read_all_curves({training: model}, folds))
        except LoMixError as error:
            notes.append(f"There are no learning curves of {training[0]}: {error}")
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=CURVE_COLUMNS), notes
