"""Which files are compared: references, and every trainer's predictions of the same cases.

From nnU-Net's results folder (:func:`read_results`) or from plain folders (:func:`read_folders`). What can't be
compared is refused here, by name and before anything is scored.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import click
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_lomix.compare.curves import COLUMNS, read_curves
from nnunet_lomix.compare.statistics import MEAN
from nnunet_lomix.splits import name_dataset

SHOWN = 5  # names in a message
# what all trainers must have alike
PLANNED = ("spacing", "patch_size", "batch_size", "normalization_schemes", "architecture")


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
        curves: as from :func:`~nnunet_lomix.compare.curves.read_curves`; empty for plain folders.
    """

    references: dict[str, Path]
    predictions: dict[tuple[str, int], dict[str, Path]]
    folders: dict[tuple[str, int], Path]
    labels: dict[str, tuple[int, ...]]
    ignore: int | None
    reader: type
    dataset: str
    label_source: str
    configuration: str | None = None
    folds: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    images: dict[str, Path] = field(default_factory=dict)
    curves: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS))

    @property
    def trainers(self) -> list[str]:
        """Names, the reference first."""
        return list(dict.fromkeys(trainer for trainer, _ in self.predictions))

    @property
    def files(self) -> dict[str, tuple[Path | None, Path, dict[str, Path]]]:
        """For each case its image, its reference, and the prediction of each trainer's first seed."""
        return {
            case: (self.images.get(case), file, {name: self.predictions[name, 0][case] for name in self.trainers})
            for case, file in self.references.items()
        }


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
        click.ClickException: if something is missing, or folds, splits, cases, labels or spacing differ.
    """
    dataset = name_dataset(dataset, "-d, nnUNet_preprocessed, nnUNet_raw and nnUNet_results")
    roots = [Path(folder) for folder in results or [_folder(nnUNet_results, "nnUNet_results")]]
    folders = [root / dataset / f"{trainer}__{plans}__{configuration}" for root in roots for trainer in trainers]
    _require_models(folders)
    _require_one_each(trainers, names, "--trainers")
    models = _name(folders, [*(names or trainers)] * len(roots))

    first, *_ = models.values()
    json_files = {folder: _read_dataset_json(folder) for folder in models.values()}
    managers = {folder: _read_plans(folder) for folder in models.values()}
    labels, ignore = _require_equal({f: _list_labels(f, content) for f, content in json_files.items()}, "labels")
    planned = {folder: m.get_configuration(configuration).configuration for folder, m in managers.items()}
    for part in PLANNED:
        _require_equal({folder: own.get(part) for folder, own in planned.items()}, f"planned {part}")
    ending = _require_equal({folder: content["file_ending"] for folder, content in json_files.items()}, "file ending")

    folds = _find_folds(models.values(), folds, ending)
    in_folds = {key: _list_validation(folder, folds, ending) for key, folder in models.items()}
    _require_same_splits(
        {models[key]: {case: fold for case, (fold, _) in own.items()} for key, own in in_folds.items()}
    )
    predictions = {key: {case: file for case, (_, file) in own.items()} for key, own in in_folds.items()}
    predictions, notes = _match(predictions, models, intersection)
    if "all" in folds:
        notes += ("Fold all is validated on the cases that it was trained with: this says nothing about others.",)
    if not intersection:
        _require_whole_folds(dataset, folds, predictions)
    references = _find_references(dataset, ending, predictions)
    raw = Path(str(nnUNet_raw)) if nnUNet_raw.is_set() else None
    return Source(
        references,
        predictions,
        models,
        labels,
        ignore,
        reader=managers[first].image_reader_writer_class,
        dataset=dataset,
        label_source="dataset.json of the trained models",
        configuration=configuration,
        folds=tuple(folds),
        notes=notes,
        images=_find_images(raw / dataset / "imagesTr", ending, references) if raw else {},
        curves=read_curves(models, folds),
    )


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
        names: of the trainers, by default those of the folders; those of one name are its seeds.
        intersection: compare the cases that all have, instead of refusing others.
        jobs: number of processes that look for values, without dataset.json.
        images: folder with the images of the cases, named as nnU-Net's, for the pictures.

    Raises:
        click.ClickException: if something is missing, or cases or labels differ.
    """
    references, folders = Path(references), [Path(folder) for folder in folders]
    _require_folders([references, *folders], "check --references and --predictions")
    _require_folders([Path(images)] if images else [], "check --images")
    _require_one_each(folders, names, "--predictions")
    models = _name(folders, names or [folder.resolve().name for folder in folders])

    described = {folder: _read_dataset_json(folder) for folder in _list_described([*folders, references])}
    ending = _require_equal({folder: content["file_ending"] for folder, content in described.items()}, "file ending")
    ending = ending or _guess_ending(references)
    predictions = {key: _list_files(folder, ending) for key, folder in models.items()}
    predictions, notes = _match(predictions, models, intersection)
    files = _pick(_list_files(references, ending), predictions, references)
    example, *_ = files.values()
    reader = _find_reader(next(iter(described.values()), {"file_ending": ending}), example)
    if described:
        labels, ignore = _require_equal({f: _list_labels(f, content) for f, content in described.items()}, "labels")
        label_source = _join([folder / "dataset.json" for folder in described])
    else:
        found = Parallel(jobs)(delayed(_list_values)(file, reader) for file in files.values())
        labels, ignore = {str(value): (value,) for value in sorted(set().union(*found) - {0})}, None
        label_source = "all values of the references, as there is no dataset.json"
    if not labels:
        raise click.ClickException(
            f"{references} has nothing but background to compare: the labels are {label_source}."
        )
    return Source(
        files,
        predictions,
        models,
        labels,
        ignore,
        reader,
        dataset=str(references),
        label_source=label_source,
        notes=notes,
        images=_require_images(Path(images), ending, files) if images else {},
    )


@dataclass(frozen=True)
class Grid:
    """Where the voxels are.

    Attributes:
        shape: their number along each axis.
        spacing: mm of a voxel along each axis.
        placement: origin and direction, all numbers as the reader has them; () if it has none.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    placement: tuple[float, ...]


def read_labels(file: Path, reader: type) -> tuple[np.ndarray, Grid]:
    """A segmentation (int32); an image of a single slice is 2D.

    Raises:
        click.ClickException: if nnU-Net's reader can't read the file, or it is no segmentation.
    """
    try:
        channels, properties = reader().read_seg(str(file))
    except Exception as error:  # the libraries below the readers raise anything
        raise click.ClickException(f"nnU-Net's {reader.__name__} can't read {file}: {error}") from error
    labels = channels[0].astype(np.int32)
    if len(channels) != 1 or not np.array_equal(labels, channels[0]):
        raise click.ClickException(f"{file} is no segmentation: it needs one channel of whole numbers.")
    if (labels < 0).any():
        raise click.ClickException(
            f"{file} has negative labels, which nnU-Net doesn't know: give what is to be ignored the highest label, "
            "and name it ignore in a dataset.json."
        )
    spacing = tuple(float(s) for s in properties["spacing"])
    if len(labels) == 1:
        labels, spacing = labels[0], spacing[1:]
    return labels, Grid(labels.shape, spacing, _list_placement(properties))


def _list_placement(properties: dict) -> tuple[float, ...]:
    """From what nnU-Net's readers keep for their own writing."""
    simple_itk, nibabel = properties.get("sitk_stuff", {}), properties.get("nibabel_stuff", {})
    parts = [simple_itk.get("origin", ()), simple_itk.get("direction", ()), nibabel.get("original_affine", ())]
    return tuple(float(v) for part in parts for v in np.ravel(part))


def _folder(variable, name: str) -> Path:
    if not variable.is_set():
        raise click.ClickException(f"The environment variable {name} is not set: set it to nnU-Net's folder.")
    return Path(str(variable))


def _require_folders(folders: Sequence[Path], remedy: str):
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise click.ClickException(f"There is no folder {_join(missing)}: {remedy}.")


def _require_models(folders: Sequence[Path]):
    for folder in folders:
        if not folder.is_dir():
            there = sorted(f.name for f in folder.parent.glob("*__*__*/"))
            close = get_close_matches(folder.name, there, SHOWN, 0.7)
            hint = f"did you mean {_join(close, ' or ')}?" if close else f"there is {_join(there) or 'nothing'}."
            raise click.ClickException(f"There is no {folder.name!r} in {folder.parent}; {hint}")


def _require_one_each(given: Sequence, names: Sequence[str], option: str):
    if names and len(names) != len(given):
        raise click.UsageError(f"--names needs a name for each of the {len(given)} {option}, not {len(names)}.")


def _name(folders: Sequence[Path], names: Sequence[str]) -> dict[tuple[str, int], Path]:
    """Folders by trainer and seed."""
    seeds = {name: [f for f, own in zip(folders, names, strict=True) if own == name] for name in names}
    if len(seeds) < 2:
        alike = (
            f"All {len(folders)} are called {names[0]}, which makes them seeds of one trainer: give each its --names"
        )
        alone = f"There is only {names[0]}: a comparison needs at least two trainers, the reference first"
        raise click.UsageError(f"{alike if len(set(folders)) > 1 else alone}.")
    for name, own in seeds.items():
        if len(set(own)) < len(own):
            raise click.UsageError(f"{name} is given twice with the same folder: seeds are in different folders.")
    return {(name, seed): folder for name, own in seeds.items() for seed, folder in enumerate(own)}


def _read_dataset_json(folder: Path) -> dict:
    content = _read(folder / "dataset.json", lambda file: json.loads(file.read_text()))
    missing = {"labels", "file_ending"} - content.keys()
    if missing:
        raise click.ClickException(f"{folder / 'dataset.json'} has no {_join(sorted(missing))}: it must be nnU-Net's.")
    return content


def _read_plans(folder: Path) -> PlansManager:
    return _read(folder / "plans.json", lambda file: PlansManager(str(file)))


def _read(file: Path, read: Callable):
    try:
        return read(file)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{file} can't be read: nnU-Net writes it beside what it trains.") from error


def _list_labels(folder: Path, dataset_json: dict) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """The labels or regions that nnU-Net scores, by name, and the label to ignore."""
    try:
        manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        file = folder / "dataset.json"
        raise click.ClickException(f"The labels of {file} aren't as nnU-Net v2 wants them: {error}") from error
    scored = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    if MEAN in manager.label_dict:
        raise click.ClickException(f"No class can be called {MEAN}, as the mean over classes is: rename that label.")
    scored = {_as_tuple(values) for values in scored}
    named = {name: _as_tuple(values) for name, values in manager.label_dict.items() if name != "ignore"}
    return {name: values for name, values in named.items() if values in scored}, manager.ignore_label


def _as_tuple(values) -> tuple[int, ...]:
    return tuple(int(v) for v in np.atleast_1d(values))


def _require_equal(values: Mapping[Path, object], what: str):
    """The value that all folders have; None if there are no folders."""
    (first, expected), *others = [*values.items()] or [(None, None)]
    for folder, value in others:
        if value != expected:
            own, theirs = (f" ({v})" if len(str(v)) < 80 else "" for v in (value, expected))
            raise click.ClickException(
                f"The {what} of {folder}{own} differs from that of {first}{theirs}: compare what was trained alike."
            )
    return expected


def _find_folds(folders: Sequence[Path], wanted: Sequence[str], ending: str) -> list[str]:
    validated = {
        folder: {p.name[5:] for p in folder.glob("fold_*") if any((p / "validation").glob(f"*{ending}"))}
        for folder in folders
    }
    wanted = list(dict.fromkeys(wanted)) or sorted(set().union(*validated.values()) - {"all"})
    for folder, own in validated.items():
        missing = [fold for fold in wanted if fold not in own]
        if missing:
            raise click.ClickException(
                f"{folder} has no validation of fold {_join(missing)}: run nnUNetv2_train with --val, or choose folds "
                "by -f."
            )
    if not wanted:
        raise click.ClickException(
            f"No fold of {_join(folders)} is validated: run nnUNetv2_train with --val. (fold_all is validated on its "
            "own training cases: ask for it by -f all.)"
        )
    return wanted


def _list_validation(folder: Path, folds: Sequence[str], ending: str) -> dict[str, tuple[str, Path]]:
    """Fold and file of each case."""
    found = {}
    for fold in folds:
        for case, file in _list_files(folder / f"fold_{fold}" / "validation", ending).items():
            if case in found:
                raise click.ClickException(
                    f"{case} is validated in folds {found[case][0]} and {fold} of {folder}: compare one of them at a "
                    "time by -f."
                )
            found[case] = fold, file
    return found


def _list_files(folder: Path, ending: str) -> dict[str, Path]:
    """Files by case, sorted."""
    return {file.name.removesuffix(ending): file for file in sorted(folder.glob(f"*{ending}"))}


def _require_same_splits(folds: Mapping[Path, Mapping[str, str]]):
    (first, expected), *others = folds.items()
    for folder, own in others:
        moved = [case for case in sorted(own) if own[case] != expected.get(case, own[case])]
        if moved:
            raise click.ClickException(
                f"{folder} and {first} were trained on different splits: {_join(moved)} are in other folds."
            )


def _require_whole_folds(dataset: str, folds: Sequence[str], predictions: Mapping):
    """Validations that were all interrupted look alike; nnU-Net's splits know which cases there should be."""
    file = Path(str(nnUNet_preprocessed), dataset, "splits_final.json") if nnUNet_preprocessed.is_set() else None
    if file is None or not file.exists():
        return
    splits = {str(i): fold["val"] for i, fold in enumerate(_read(file, lambda f: json.loads(f.read_text())))}
    own = next(iter(predictions.values()))
    for fold in folds:
        missing = [case for case in splits.get(fold, ()) if case not in own]
        if missing:
            raise click.ClickException(
                f"No validation of fold {fold} has {_join(missing)}, though {file} lists it: run nnUNetv2_train with "
                "--val, or compare the cases that are there by --intersection."
            )


def _match(
    predictions: dict[tuple[str, int], dict[str, Path]], models: Mapping[tuple[str, int], Path], intersection: bool
) -> tuple[dict[tuple[str, int], dict[str, Path]], tuple[str, ...]]:
    """Predictions of the same cases for all, and a note on those left out."""
    everything = sorted(set().union(*predictions.values()))
    common = [case for case in everything if all(case in own for own in predictions.values())]
    for key, own in predictions.items():
        missing = [case for case in everything if case not in own]
        if missing and not intersection:
            raise click.ClickException(
                f"{models[key]} lacks cases that others have, {_join(missing)}: predict them, train on the same "
                "splits, or compare the common ones by --intersection."
            )
    if not common:
        raise click.ClickException(f"No case is predicted in all of {_join(models.values())}.")
    left_out = [case for case in everything if case not in common]
    note = f"{len(common)} of {len(everything)} cases are predicted by all; left out: {', '.join(left_out)}."
    return {key: {case: own[case] for case in common} for key, own in predictions.items()}, (note,) * bool(left_out)


def _find_references(dataset: str, ending: str, predictions: Mapping) -> dict[str, Path]:
    """What nnU-Net itself scores against, or the raw labels, of which it is a copy."""
    folders = [
        Path(str(variable), dataset, sub)
        for variable, sub in ((nnUNet_preprocessed, "gt_segmentations"), (nnUNet_raw, "labelsTr"))
        if variable.is_set()
    ]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise click.ClickException(
            f"There are no references: neither {dataset}/gt_segmentations in nnUNet_preprocessed nor "
            f"{dataset}/labelsTr in nnUNet_raw; set these variables."
        )
    return _pick(_list_files(folder, ending), predictions, folder)


def _find_images(folder: Path, ending: str, cases: Iterable[str]) -> dict[str, Path]:
    files = {case: folder / f"{case}_0000{ending}" for case in cases}
    return {case: file for case, file in files.items() if file.exists()}


def _require_images(folder: Path, ending: str, cases: Sequence[str]) -> dict[str, Path]:
    files = _find_images(folder, ending, cases)
    missing = [f"{case}_0000{ending}" for case in cases if case not in files]
    if missing:
        raise click.ClickException(f"{folder} has no {_join(missing)}: name the folder of all images, or none.")
    return files


def _pick(references: dict[str, Path], predictions: Mapping, folder: Path) -> dict[str, Path]:
    cases = next(iter(predictions.values()))
    missing = [case for case in cases if case not in references]
    if missing:
        raise click.ClickException(f"{folder} has no reference of {_join(missing)}: add it, or remove the prediction.")
    return {case: references[case] for case in cases}


def _list_described(folders: Sequence[Path]) -> list[Path]:
    """Folders with a dataset.json; that of a raw or preprocessed dataset lies above the references."""
    return [folder for folder in [*folders, folders[-1].parent] if (folder / "dataset.json").exists()]


def _guess_ending(folder: Path) -> str:
    known = {ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings}
    # the longest: .nii.gz rather than .gz
    own = (max((e for e in known if file.name.endswith(e)), key=len, default=None) for file in folder.iterdir())
    found = Counter(ending for ending in own if ending)
    if len(found) != 1:
        raise click.ClickException(
            f"{folder} must have files of one kind that nnU-Net reads, not {_join(sorted(found)) or 'none'}: set "
            "file_ending in a dataset.json."
        )
    return next(iter(found))


def _find_reader(dataset_json: dict, example: Path) -> type:
    messages = io.StringIO()  # of every reader that does not fit
    try:
        with redirect_stdout(messages), redirect_stderr(messages):
            return determine_reader_writer_from_dataset_json(dataset_json, str(example), verbose=False)
    except RuntimeError as error:
        raise click.ClickException(f"No reader of nnU-Net can read {example}.") from error


def _list_values(file: Path, reader: type) -> set[int]:
    return {int(value) for value in np.unique(read_labels(file, reader)[0])}


def _join(names: Sequence, separator: str = ", ") -> str:
    """The first few names."""
    names = [str(name) for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more
