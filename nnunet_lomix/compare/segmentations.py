"""Reading segmentations, by nnU-Net's own readers."""

import io
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, determine_reader_writer_from_dataset_json

from nnunet_lomix.errors import LoMixError


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


def read_segmentation(file: Path, reader: type[BaseReaderWriter]) -> tuple[np.ndarray, Grid]:
    """The label of each voxel.

    Returns:
        Labels (int32), 3D, or 2D for an image of a single slice; and where their voxels are.

    Raises:
        LoMixError: nnU-Net's reader can't read the file, or it is no segmentation.
    """
    try:
        channels, properties = reader().read_seg(str(file))
    except Exception as error:  # the libraries below the readers raise anything
        raise LoMixError(f"nnU-Net's {reader.__name__} can't read {file}: {error}") from error
    labels = channels[0].astype(np.int32)
    if len(channels) != 1 or not np.array_equal(labels, channels[0]):
        raise LoMixError(f"{file} is no segmentation: it needs one channel of whole numbers.")
    if (labels < 0).any():
        raise LoMixError(
            f"{file} has negative labels, which nnU-Net doesn't know: give what is to be ignored the highest label, "
            "and name it ignore in a dataset.json."
        )
    spacing = tuple(float(s) for s in properties["spacing"])
    if len(labels) == 1:
        labels, spacing = labels[0], spacing[1:]
    return labels, Grid(labels.shape, spacing, _list_placement(properties))


def _list_placement(properties: Mapping[str, Any]) -> tuple[float, ...]:
    """From what nnU-Net's readers keep for their own writing."""
    simple_itk, nibabel = properties.get("sitk_stuff", {}), properties.get("nibabel_stuff", {})
    parts = [simple_itk.get("origin", ()), simple_itk.get("direction", ()), nibabel.get("original_affine", ())]
    return tuple(float(v) for part in parts for v in np.ravel(part))


def list_values(file: Path, reader: type[BaseReaderWriter]) -> set[int]:
    """All values of a segmentation; raises as :func:`read_segmentation`."""
    return {int(value) for value in np.unique(read_segmentation(file, reader)[0])}


def find_reader(dataset_json: Mapping[str, Any], example: Path) -> type[BaseReaderWriter]:
    """The class of nnU-Net that reads such a file; ``dataset_json`` has at least ``file_ending``.

    Raises:
        LoMixError: there is none.
    """
    messages = io.StringIO()  # every reader that doesn't fit prints
    try:
        with redirect_stdout(messages), redirect_stderr(messages):
            return determine_reader_writer_from_dataset_json(dataset_json, str(example), verbose=False)
    except RuntimeError as error:
        raise LoMixError(f"No reader of nnU-Net can read {example}.") from error


def guess_ending(folder: Path) -> str:
    """The ending of the files in a folder that nnU-Net can read.

    Raises:
        LoMixError: there is none, or there are several.
    """
    known = {ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings}
    found: Counter[str] = Counter()
    for file in folder.iterdir():
        fitting = [ending for ending in known if file.name.endswith(ending)]
        if fitting:
            found[max(fitting, key=len)] += 1  # the longest: .nii.gz rather than .gz
    if len(found) != 1:
        raise LoMixError(
            f"{folder} must have files of one kind that nnU-Net reads, not {', '.join(sorted(found)) or 'none'}: set "
            "file_ending in a dataset.json."
        )
    return next(iter(found))
