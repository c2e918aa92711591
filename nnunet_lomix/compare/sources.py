"""What is compared: references, and every trainer's predictions of the same cases.

A :class:`Source` comes from nnU-Net's results folder or from plain folders. What can't be compared is refused by name,
before anything is scored.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import normalize

import pandas as pd

from nnunet_lomix.compare.processes import in_processes
from nnunet_lomix.errors import LoMixError, UsageError, shorten
from nnunet_lomix.nnunet.curves import CURVE_COLUMNS, read_all_curves
from nnunet_lomix.nnunet.datasets import (
    SPLITS,
    find_part,
    find_root,
    list_cases,
    name_dataset,
    name_image,
    read_splits,
    require_references,
    require_root,
    require_utf8,
    suggest_dataset,
)
from nnunet_lomix.nnunet.results import DATASET_JSON, PLANS, FoldFolder, ModelFolder, read_dataset_json
from nnunet_lomix.nnunet.segmentations import (
    Reader,
    find_reader,
    guess_ending,
    has_scale,
    list_labels,
    list_values,
    read_configuration,
    read_spacing,
)

MEAN = "mean"  # the name of the mean over classes
# what all trainers must have alike in their plans
PLANNED = ("spacing", "patch_size", "batch_size", "normalization_schemes", "architecture")

Training = tuple[str, int]  # a trainer's name, and which of its seeds
Value = TypeVar("Value")


@dataclass(frozen=True)
class Source:
    """What is compared.

    Attributes:
        references: file of each case.
        predictions: for each trainer and seed the file of each case; everywhere the same cases, the reference trainer
            first.
        folders: where these are from, for each trainer and seed.
        labels: the values of each class or region by name, without background.
        ignore: the value of voxels of the reference that don't count, if there are any.
        reader: class of nnU-Net that reads the files.
        dataset: nnU-Net's name of the dataset, or the folder of references.
        label_source: where the labels are from, in words.
        configuration: "2d", …; None for plain folders.
        folds: those compared; () for plain folders.
        notes: sentences that a reader of the results should know.
        images: file of the first channel of each case, where it is known.
        spacings: mm along each axis of each case whose files have their spacing beside them, as 3D TIFFs do.
        curves: as from :func:`~nnunet_lomix.nnunet.curves.read_all_curves`; empty for plain folders.
    """

    references: dict[str, Path]
    predictions: dict[Training, dict[str, Path]]
    folders: dict[Training, Path]
    labels: dict[str, tuple[int, ...]]
    ignore: int | None
    reader: Reader
    dataset: str
    label_source: str
    configuration: str | None = None
    folds: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    images: dict[str, Path] = field(default_factory=dict)
    spacings: dict[str, tuple[float, ...]] = field(default_factory=dict)
    curves: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=CURVE_COLUMNS))

    @property
    def distance_unit(self) -> str:
        """``mm``, or ``pixels`` where files have no scale and nnU-Net takes 1: PNG, BMP, TIFF without a spacing."""
        return "mm" if has_scale(self.reader, bool(self.spacings)) else "pixels"

    @property
    def trainers(self) -> list[str]:
        """Names, the reference first."""
        return list(dict.fromkeys(trainer for trainer, _ in self.predictions))


# nnU-Net's results folder


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
    wrong = [fold for fold in folds if fold != "all" and not fold.isdecimal()]
    if wrong:
        raise UsageError(f"-f takes numbers or all, separated by spaces, not {wrong[0]!r}.")
    folds = [fold if fold == "all" else str(int(fold)) for fold in folds]
    dataset = name_dataset(dataset, results=results)
    folders = _find_models(dataset, configuration, trainers, plans, results, names)
    models = {training: ModelFolder(folder) for training, folder in folders.items()}
    planned = {model.path: read_configuration(model, configuration) for model in models.values()}
    described = {model.path: model.read_dataset_json() for model in models.values()}
    labels, ignore = _require_labels(described)
    for part in PLANNED:
        _require_equal({folder: own.get(part) for folder, (own, _) in planned.items()}, f"planned {part}")
    ending = _require_equal({folder: content["file_ending"] for folder, content in described.items()}, "file ending")

    folds, notes = _choose_folds(list(models.values()), folds, ending, intersection)
    validated = {training: _list_validation(model, folds, ending) for training, model in models.items()}
    _require_same_splits(validated, folders)
    references, predictions, match_notes = _match_cases(
        require_references(dataset), validated, folders, ending, intersection
    )
    if not intersection:
        _require_whole_folds(dataset, folds, references)
    if "all" in folds:
        notes.append("Fold all is validated on the cases that it was trained with: this says nothing about others.")
    curves, curve_notes = _read_curves(models, folds)
    images = find_part(dataset, "imagesTr")
    _, reader = next(iter(planned.values()))
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
        notes=(*notes, *match_notes, *curve_notes),
        images=_list_images(images, ending, references) if images else {},
        spacings=_find_spacings(references, predictions.values(), reader, find_part(dataset, "labelsTr")),
        curves=curves,
    )


def _find_models(
    dataset: str,
    configuration: str,
    trainers: Sequence[str],
    plans: str,
    results: Sequence[str | Path],
    names: Sequence[str],
) -> dict[Training, Path]:
    roots = [Path(folder).expanduser() for folder in results] or [require_root("nnUNet_results")]
    for root in roots:
        if not (root / dataset).is_dir():
            raise LoMixError(
                f"There is no {dataset} in the results folder {root}: train it, or check -d and --results"
                f"{suggest_dataset(dataset)}"
            )
    folders = [ModelFolder.of(root, dataset, name, plans, configuration).path for root in roots for name in trainers]
    for folder in folders:
        if not folder.is_dir():
            there = sorted(file.parent.name for file in folder.parent.glob(f"*/{PLANS}"))
            close = get_close_matches(folder.name, there, 5, 0.7)
            hint = f"did you mean {shorten(close, ' or ')}?" if close else f"there is {shorten(there) or 'nothing'}."
            raise LoMixError(f"There is no {folder.name!r} in {folder.parent}; {hint}")
    return _name_trainings(folders, names, trainers, "--trainers")


def _choose_folds(
    models: Sequence[ModelFolder], wanted: Sequence[str], ending: str, intersection: bool
) -> tuple[list[str], list[str]]:
    """The folds to compare, and notes on those left out, which ``intersection`` allows if any training has them."""
    validated = {
        model: {f.fold for f in model.folds() if list_cases(f.validation, ending) and not f.has_stale_validation()}
        for model in models
    }
    by_any = set().union(*validated.values())
    wanted = list(dict.fromkeys(wanted)) or sorted(by_any - {"all"}, key=lambda fold: (len(fold), fold))
    if not wanted:
        folds = [fold for model in models for fold in model.folds()]
        raise LoMixError(
            f"No fold of {shorten(model.path for model in models)} is validated: {_advise(folds)}. (fold_all is "
            "validated on its own training cases: ask for it by -f all.)"
        )
    lacking = {fold: [model for model in models if fold not in validated[model]] for fold in wanted}
    for model in models:
        missing = [fold for fold in wanted if model in lacking[fold]]
        if [fold for fold in missing if not intersection or fold not in by_any]:
            raise LoMixError(
                f"{model.path} has no validation of fold {shorten(missing)}: {_advise([*map(model.fold, missing)])}, "
                "choose folds by -f, or compare the common ones by --intersection."
            )
    common = [fold for fold in wanted if not lacking[fold]]
    if not common:
        unvalidated = [model.fold(fold) for fold, without in lacking.items() for model in without]
        raise LoMixError(
            f"No fold is validated in all of {shorten(model.path for model in models)}: {_advise(unvalidated)}."
        )
    left_out = [f"{fold} (not in {shorten(m.path.name for m in own)})" for fold, own in lacking.items() if own]
    note = f"Compared are the folds that all have, {', '.join(common)}; left out: {', '.join(left_out)}."
    return common, [note] if left_out else []


def _advise(folds: Sequence[FoldFolder]) -> str:
    """What makes validations of folds, which nnU-Net can't validate before they are trained."""

    def name(some: Iterable[FoldFolder]) -> str:
        return shorten(f"{fold.path.parent.name}/{fold.path.name}" for fold in some)

    if stale := [fold for fold in folds if fold.has_stale_validation()]:
        return f"the checkpoint of {name(stale)} is newer than its validation: run nnUNetv2_train with --val"
    if untrained := [fold for fold in folds if not fold.is_finished()]:
        return f"train with nnUNetv2_train, as {name(untrained)} isn't trained to the end"
    return "run nnUNetv2_train with --val"


def _list_validation(model: ModelFolder, folds: Sequence[str], ending: str) -> dict[str, Path]:
    """The file of each case, which is in one fold only."""
    files = {fold: list_cases(model.fold(fold).validation, ending) for fold in folds}
    fold_of: dict[str, str] = {}
    for fold, own in files.items():
        for case in own:
            if case in fold_of:
                choices = ", or ".join(f"-f {' '.join(group)}" for group in _group_disjoint(files))
                raise LoMixError(
                    f"{case} is validated in folds {fold_of[case]} and {fold} of {model.path}, as a fold with few "
                    f"training cases has the validation cases of the one that it is drawn from: choose {choices}."
                )
            fold_of[case] = fold
    return {case: file for own in files.values() for case, file in own.items()}


def _group_disjoint(folds: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Folds that can be compared together: each joins the first group that has none of its cases."""
    groups: list[list[str]] = []
    for fold, cases in folds.items():
        for group in groups:
            if all(set(cases).isdisjoint(folds[other]) for other in group):
                group.append(fold)
                break
        else:
            groups.append([fold])
    return groups


def _require_same_splits(validated: Mapping[Training, Mapping[str, Path]], folders: Mapping[Training, Path]) -> None:
    """Refuse trainings that have a case in different folds."""
    first, expected = next(iter(validated.items()))
    for training, own in validated.items():
        shared = sorted(own.keys() & expected.keys())
        # a file lies in fold_X/validation
        moved = [case for case in shared if own[case].parts[-3] != expected[case].parts[-3]]
        if moved:
            raise LoMixError(
                f"{folders[training]} and {folders[first]} were trained on different splits: {shorten(moved)} are in "
                "other folds."
            )


def _require_whole_folds(dataset: str, folds: Sequence[str], cases: Collection[str]) -> None:
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


# plain folders


def read_folders(
    references: str | Path,
    folders: Sequence[str | Path],
    names: Sequence[str] = (),
    intersection: bool = False,
    jobs: int = 1,
    images: str | Path | None = None,
) -> Source:
    """Folders of predictions, with a folder of references whose files are named alike.

    Labels are those of dataset.json, beside predictions or references; without it, all values of the references.

    Args:
        references: folder.
        folders: of predictions, those of the reference trainer first.
        names: of the trainers; those of one name are its seeds. By default as of :func:`name_folders`, no seeds.
        intersection: compare the cases that all have, instead of refusing others.
        jobs: number of processes that look for values, without dataset.json.
        images: folder with the images of the cases, named as nnU-Net's, for the pictures.

    Raises:
        LoMixError: something is missing, or cases or labels differ.
        UsageError: names and folders don't fit together.
    """
    reference_folder, prediction_folders = Path(references), [Path(folder) for folder in folders]
    _require_folders([reference_folder, *prediction_folders], "check --references and --predictions")
    _require_folders([Path(images)] if images else [], "check --images")
    trainings = _name_trainings(prediction_folders, names, name_folders(prediction_folders), "--predictions")

    # the dataset.json of a raw or preprocessed dataset lies above the references
    looked_in = [*prediction_folders, reference_folder, reference_folder.parent]
    described = {f: read_dataset_json(f) for f in looked_in if (f / DATASET_JSON).exists()}
    if described:
        ending = _require_equal({folder: own["file_ending"] for folder, own in described.items()}, "file ending")
        labels, ignore = _require_labels(described)
        label_source = shorten(folder / DATASET_JSON for folder in described)
    else:
        ending = guess_ending(reference_folder)
    predicted = {training: _require_cases(folder, ending) for training, folder in trainings.items()}
    files, predictions, notes = _match_cases(reference_folder, predicted, trainings, ending, intersection)
    listed = list_cases(reference_folder, ending)
    if without := sorted(listed.keys() - set().union(*predicted.values())):
        notes.append(
            f"{len(without)} of {len(listed)} references have no prediction and don't count: {shorten(without)}."
        )
    reader = find_reader(next(iter(described.values()), {"file_ending": ending}), next(iter(files.values())))
    if not described:
        found = in_processes(list_values, [(file.absolute(), reader) for file in files.values()], jobs)
        labels, ignore = {str(value): (value,) for value in sorted(set().union(*found) - {0})}, None
        label_source = "all values of the references, as there is no dataset.json"
    if not labels:
        raise LoMixError(f"{reference_folder} has nothing but background to compare: the labels are {label_source}.")
    pictured = _list_images(Path(images), ending, files) if images else {}
    if images and (missing := [name_image(case, 0, ending) for case in files if case not in pictured]):
        raise LoMixError(f"{images} has no {shorten(missing)}: name the folder of all images, or none.")
    return Source(
        references=files,
        predictions=predictions,
        folders=trainings,
        labels=labels,
        ignore=ignore,
        reader=reader,
        dataset=str(reference_folder),
        label_source=label_source,
        notes=tuple(notes),
        images=pictured,
        spacings=_find_spacings(files, predictions.values(), reader),
    )


def _require_cases(folder: Path, ending: str) -> dict[str, Path]:
    cases = list_cases(folder, ending)
    if not cases:
        there = shorten(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise LoMixError(
            f"{folder} has no file that ends in {ending}, as the references do, but {there}: convert them, or name "
            "another folder."
        )
    return cases


def name_folders(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart: the shortest ends of their paths that differ, without the last parts that all share.

    Folders that are called alike may hold anything, so they never get one name, but for a folder that is given twice.

    >>> name_folders([Path("/data/before"), Path("/data/after")])
    ['before', 'after']
    >>> name_folders([Path("/runs/A/fold_0/validation"), Path("/runs/B/fold_0/validation")])
    ['A', 'B']
    >>> name_folders([Path("/runs/A/preds"), Path("/runs/B/preds"), Path("/ens")])
    ['A/preds', 'B/preds', 'ens']
    """
    paths = [folder.resolve().parts for folder in folders]
    while min(map(len, paths)) > 1 and len({path[-1] for path in paths}) == 1 < len(set(paths)):
        paths = [path[:-1] for path in paths]
    names = []
    for path in paths:
        # one part if no other path ends alike; the whole path is always enough
        length = next(n for n in range(1, len(path) + 1) if sum(p[-n:] == path[-n:] for p in set(paths)) == 1)
        names.append("/".join(path[-length:]))
    return names


# both


def _name_trainings(
    folders: Sequence[Path], names: Sequence[str], default: Sequence[str], option: str
) -> dict[Training, Path]:
    """Folders by trainer and seed: those of one name are the seeds of one trainer, in their order.

    Without names the default ones count, one for each of what ``option`` gave. There may be several folders for each:
    every results folder has all trainers.
    """
    if names and len(names) != len(default):
        raise UsageError(f"--names needs a name for each of the {len(default)} {option}, not {len(names)}.")
    by_trainer: dict[str, list[Path]] = {}
    for name, folder in zip(cycle(names or default), folders, strict=False):
        require_utf8(name)
        by_trainer.setdefault(name, []).append(folder)
    for name, own in by_trainer.items():
        if len({folder.resolve() for folder in own}) < len(own):
            raise UsageError(
                f"{name} is given twice with the same folder: trainers and seeds are in different folders."
            )
    if len(folders) == 1:
        raise UsageError(f"There is only {name}: a comparison needs at least two trainers, the reference first.")
    if len(by_trainer) == 1:
        raise UsageError(
            f"All {len(folders)} are called {name}, which makes them seeds of one trainer: give each its --names."
        )
    return {(name, seed): folder for name, own in by_trainer.items() for seed, folder in enumerate(own)}


def _require_labels(described: Mapping[Path, Mapping[str, Any]]) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """The classes and the ignored value that the ``dataset.json`` of all folders has."""
    labels, ignore = _require_equal({folder: list_labels(folder, own) for folder, own in described.items()}, "labels")
    if MEAN in labels:
        raise LoMixError(f"No class can be called {MEAN}, as the mean over classes is: rename that label.")
    return labels, ignore


def _require_equal(values: Mapping[Path, Value], what: str) -> Value:
    """The value that all folders have; ``what`` names it if they differ."""
    (first, expected), *others = values.items()
    for folder, value in others:
        if value != expected:
            own, theirs = (f" ({v})" if len(str(v)) < 80 else "" for v in (value, expected))
            raise LoMixError(
                f"The {what} of {folder}{own} differs from that of {first}{theirs}: compare what was trained alike."
            )
    return expected


def _require_folders(folders: Sequence[Path], remedy: str) -> None:
    """Refuse folders that aren't there; ``remedy`` ends the sentence."""
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise LoMixError(f"There is no folder {shorten(missing)}: {remedy}.")


def _match_cases(
    reference_folder: Path,
    predicted: Mapping[Training, Mapping[str, Path]],
    folders: Mapping[Training, Path],
    ending: str,
    intersection: bool,
) -> tuple[dict[str, Path], dict[Training, dict[str, Path]], list[str]]:
    """References and predictions of the same cases, and notes on cases that ``intersection`` leaves out."""
    everything = sorted(set().union(*predicted.values()))
    for training, own in predicted.items():
        _refuse_images(folders[training], own, everything)
    for training, own in predicted.items():
        missing = [case for case in everything if case not in own]
        if {normalize("NFC", case) for case in missing} & {normalize("NFC", case) for case in own}:
            raise LoMixError(
                f"{folders[training]} lacks {shorten(missing)}, but has names that look like it and are made of other "
                "Unicode characters (NFC and NFD): rename its files."
            )
        if missing and not intersection:
            raise LoMixError(
                f"{folders[training]} lacks cases that others have, {shorten(missing)}: predict them, train on the "
                "same splits, or compare the common ones by --intersection."
            )
    common = [case for case in everything if all(case in own for own in predicted.values())]
    if not common:
        raise LoMixError(f"No case is predicted in all of {shorten(folders.values())}.")
    references = list_cases(reference_folder, ending)
    without = [case for case in common if case not in references]
    _refuse_images(reference_folder, references, common)
    first = next(iter(folders))
    _refuse_images(folders[first], predicted[first], references)
    if without:
        raise LoMixError(
            f"{reference_folder} has no reference of {shorten(without)}: add it, or remove the prediction."
        )
    left_out = [case for case in everything if case not in common]
    note = f"{len(common)} of {len(everything)} cases are predicted by all; left out: {', '.join(left_out)}."
    return (
        {case: references[case] for case in common},
        {training: {case: own[case] for case in common} for training, own in predicted.items()},
        [note] if left_out else [],
    )


def _refuse_images(folder: Path, files: Collection[str], cases: Iterable[str]) -> None:
    """Refuse a folder of images: instead of a case it has one with the number of a channel behind its name."""
    for case in cases:
        channel = name_image(case, 0, "")
        if case not in files and channel in files:
            raise LoMixError(
                f"{folder} has {channel} and no {case}: _0000 marks images, so name the folder of the segmentations."
            )


def _find_spacings(
    references: Mapping[str, Path],
    predictions: Iterable[Mapping[str, Path]],
    reader: Reader,
    raw_labels: Path | None = None,
) -> dict[str, tuple[float, ...]]:
    """The spacing of each case whose files have it beside them, from the first of its files that has it.

    nnU-Net copies no spacings to ``gt_segmentations``, but ``raw_labels``, if they are there, are the same files, and
    it writes spacings beside its predictions.
    """
    others = list(predictions)
    found = {}
    for case, reference in references.items():
        raw = [raw_labels / reference.name] if raw_labels else []
        files = [reference, *raw, *(own[case] for own in others)]
        if spacing := next(filter(None, (read_spacing(file, reader) for file in files)), None):
            found[case] = spacing
    return found


def _list_images(folder: Path, ending: str, cases: Iterable[str]) -> dict[str, Path]:
    """The first channel of each case's image, where it is there."""
    files = {case: folder / name_image(case, 0, ending) for case in cases}
    return {case: file for case, file in files.items() if file.exists()}
