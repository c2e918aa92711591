"""What is compared: references, and every trainer's predictions of the same cases.

A :class:`Source` comes from nnU-Net's results folder (``from_results``) or from plain folders (``from_folders``). The
functions here are what both need: what can't be compared is refused by name, before anything is scored.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_lomix.compare.segmentations import LARGEST_LABEL, read_spacing
from nnunet_lomix.compare.statistics import MEAN
from nnunet_lomix.errors import LoMixError, UsageError, explaining
from nnunet_lomix.nnunet.curves import CURVE_COLUMNS
from nnunet_lomix.nnunet.datasets import list_cases, name_image, require_utf8
from nnunet_lomix.nnunet.results import DATASET_JSON

SHOWN = 5  # names in a message
Training = tuple[str, int]  # a trainer's name, and which of its seeds
Value = TypeVar("Value")


class CaseFiles(NamedTuple):
    """The files of a case, and how they are read.

    Attributes:
        image: its first channel, where it is known.
        reference: the reference segmentation.
        predictions: of each trainer.
        reader: class of nnU-Net that reads them.
        spacing: mm along each axis, for files that should have it beside them and don't.
    """

    image: Path | None
    reference: Path
    predictions: dict[str, Path]
    reader: type[BaseReaderWriter]
    spacing: tuple[float, ...] | None = None


class Labels(NamedTuple):
    """The values of each class or region by name, without background, and the value that doesn't count."""

    classes: dict[str, tuple[int, ...]]
    ignore: int | None


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
    reader: type[BaseReaderWriter]
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
        without_scale = issubclass(self.reader, Tiff3DIO) and not self.spacings
        return "pixels" if without_scale or issubclass(self.reader, NaturalImage2DIO) else "mm"

    @property
    def trainers(self) -> list[str]:
        """Names, the reference first."""
        return list(dict.fromkeys(trainer for trainer, _ in self.predictions))

    @property
    def files(self) -> dict[str, CaseFiles]:
        """For each case its image, its reference, and the prediction of each trainer's first seed."""
        return {
            case: CaseFiles(
                self.images.get(case),
                reference,
                {name: self.predictions[name, 0][case] for name in self.trainers},
                self.reader,
                self.spacings.get(case),
            )
            for case, reference in self.references.items()
        }


def require_one_name_each(given: Sequence[object], names: Sequence[str], option: str) -> None:
    """Refuse names, if there are any, that are more or fewer than what was given by ``option``."""
    if names and len(names) != len(given):
        raise UsageError(f"--names needs a name for each of the {len(given)} {option}, not {len(names)}.")


def name_trainings(folders: Sequence[Path], names: Sequence[str]) -> dict[Training, Path]:
    """Folders by trainer and seed: those of one name are the seeds of one trainer, in their order.

    Raises:
        LoMixError: a name isn't UTF-8.
        UsageError: there is only one trainer, or a folder is given twice.
    """
    for name in names:
        require_utf8(name)
    by_trainer: dict[str, list[Path]] = {}
    for name, folder in zip(names, folders, strict=True):
        by_trainer.setdefault(name, []).append(folder)
    if len(by_trainer) < 2:
        alike = (
            f"All {len(folders)} are called {names[0]}, which makes them seeds of one trainer: give each its --names"
        )
        alone = f"There is only {names[0]}: a comparison needs at least two trainers, the reference first"
        raise UsageError(f"{alike if len(set(folders)) > 1 else alone}.")
    for name, own in by_trainer.items():
        if len({folder.resolve() for folder in own}) < len(own):
            raise UsageError(f"{name} is given twice with the same folder: seeds are in different folders.")
    return {(name, seed): folder for name, own in by_trainer.items() for seed, folder in enumerate(own)}


def list_labels(folder: Path, dataset_json: Mapping[str, Any]) -> Labels:
    """The labels or regions that nnU-Net scores.

    Args:
        folder: where the file is, for the message.
        dataset_json: its content.

    Raises:
        LoMixError: the labels aren't nnU-Net's, or one of them has the name of the mean over classes.
    """
    file = folder / DATASET_JSON
    with explaining(f"The labels of {file} aren't as nnU-Net v2 wants them"):
        manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
        named = {name: _as_tuple(values) for name, values in manager.label_dict.items() if name != "ignore"}
        regions = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        scored = {_as_tuple(values) for values in regions}
        "".join(named).encode()  # JSON can name half a character, which no report can hold
    if MEAN in manager.label_dict:
        raise LoMixError(f"No class can be called {MEAN}, as the mean over classes is: rename that label.")
    lowest, highest = min(manager.all_labels), max(manager.all_labels)
    if highest > LARGEST_LABEL:
        raise LoMixError(f"The labels of {file} end at {highest}, but nnU-Net's at {LARGEST_LABEL}: number them anew.")
    if lowest < 0:
        raise LoMixError(f"The labels of {file} begin at {lowest}, but nnU-Net's at 0: number them anew.")
    return Labels({name: values for name, values in named.items() if values in scored}, manager.ignore_label)


def _as_tuple(values: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(v) for v in np.atleast_1d(values))


def require_equal(values: Mapping[Path, Value], what: str) -> Value:
    """The value that all folders have; there must be one folder at least.

    Raises:
        LoMixError: a folder has another value; ``what`` names it.
    """
    (first, expected), *others = values.items()
    for folder, value in others:
        if value != expected:
            own, theirs = (f" ({v})" if len(str(v)) < 80 else "" for v in (value, expected))
            raise LoMixError(
                f"The {what} of {folder}{own} differs from that of {first}{theirs}: compare what was trained alike."
            )
    return expected


def require_folders(folders: Sequence[Path], remedy: str) -> None:
    """Refuse folders that aren't there; ``remedy`` ends the sentence."""
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise LoMixError(f"There is no folder {shorten(missing)}: {remedy}.")


def match_cases(
    predictions: Mapping[Training, Mapping[str, Path]], folders: Mapping[Training, Path], intersection: bool
) -> tuple[dict[Training, dict[str, Path]], tuple[str, ...]]:
    """Predictions of the same cases for all trainings.

    Args:
        predictions: for each training the file of each case.
        folders: where these are from, for the messages.
        intersection: leave out cases that some training lacks, instead of refusing.

    Returns:
        The predictions of the cases that all have, and notes on those left out.

    Raises:
        LoMixError: a case is missing, or no case is predicted by all.
    """
    everything = sorted(set().union(*predictions.values()))
    for training, own in predictions.items():
        _refuse_images(folders[training], own, everything)
    common = [case for case in everything if all(case in own for own in predictions.values())]
    for training, own in predictions.items():
        missing = [case for case in everything if case not in own]
        if missing and not intersection:
            raise LoMixError(
                f"{folders[training]} lacks cases that others have, {shorten(missing)}: predict them, train on the "
                "same splits, or compare the common ones by --intersection."
            )
    if not common:
        raise LoMixError(f"No case is predicted in all of {shorten(folders.values())}.")
    matched = {training: {case: own[case] for case in common} for training, own in predictions.items()}
    left_out = [case for case in everything if case not in common]
    if not left_out:
        return matched, ()
    note = f"{len(common)} of {len(everything)} cases are predicted by all; left out: {', '.join(left_out)}."
    return matched, (note,)


def pick_references(folder: Path, ending: str, cases: Iterable[str]) -> dict[str, Path]:
    """The reference of each case.

    Raises:
        LoMixError: one is missing.
    """
    references, cases = list_cases(folder, ending), list(cases)
    missing = [case for case in cases if case not in references]
    _refuse_images(folder, references, cases)
    for case in references:
        channel = name_image(case, 0, "")
        if channel in missing:
            raise LoMixError(
                f"The predictions have {channel} where {folder} has {case}: _0000 marks images, so name the folder of "
                "the segmentations."
            )
    if missing:
        raise LoMixError(f"{folder} has no reference of {shorten(missing)}: add it, or remove the prediction.")
    return {case: references[case] for case in cases}


def _refuse_images(folder: Path, files: Collection[str], cases: Collection[str]) -> None:
    """Refuse a folder of images: instead of a case it has one with the number of a channel behind its name."""
    channels = {case: name_image(case, 0, "") for case in cases if case not in files}
    for case, channel in channels.items():
        if channel in files:
            raise LoMixError(
                f"{folder} has {channel} and no {case}: _0000 marks images, so name the folder of the segmentations."
            )


def find_spacings(
    references: Mapping[str, Path],
    predictions: Iterable[Mapping[str, Path]],
    reader: type[BaseReaderWriter],
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
        spacing = next(filter(None, (read_spacing(file, reader) for file in files)), None)
        if spacing:
            found[case] = spacing
    return found


def list_images(folder: Path, ending: str, cases: Iterable[str]) -> dict[str, Path]:
    """The first channel of each case's image, where it is there."""
    files = {case: folder / name_image(case, 0, ending) for case in cases}
    return {case: file for case, file in files.items() if file.exists()}


def shorten(names: Iterable[object], separator: str = ", ") -> str:
    """The first few names, and how many more there are.

    >>> shorten("abcdefgh")
    'a, b, c, d, e and 3 more'
    """
    listed = [str(name) for name in names]
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return separator.join(listed[:SHOWN]) + more
