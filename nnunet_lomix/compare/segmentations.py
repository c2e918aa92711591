"""Reading segmentations and images by nnU-Net's own readers, for scores and pictures."""

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, determine_reader_writer_from_dataset_json
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_lomix.compare.grids import Grid, make_grid
from nnunet_lomix.errors import LoMixError, explaining
from nnunet_lomix.nnunet.datasets import is_hidden, require_utf8
from nnunet_lomix.nnunet.results import read_json

IMAGE_NAME = re.compile(r"_\d{4}\.")  # a case, and the number of a channel
LARGEST_LABEL = 65535  # that nnU-Net's readers write


def read_segmentation(
    file: Path, reader: type[BaseReaderWriter], spacing: Sequence[float] | None = None
) -> tuple[np.ndarray, Grid]:
    """The label of each voxel.

    Args:
        file: which.
        reader: class of nnU-Net that reads it.
        spacing: mm along each of three axes, for a file that should have its spacing beside it and doesn't.

    Returns:
        Labels (int32), 3D, or 2D for an image of a single slice; and where their voxels are. Both are as the reader
        gives them: one that reorients does so with both.

    Raises:
        LoMixError: nnU-Net's reader can't read the file, or it is no segmentation.
    """
    beside = read_spacing(file, reader)
    channels, properties = _read(file, reader, lambda: reader().read_seg(str(file)))
    with np.errstate(invalid="ignore"):  # NaN, and what is beyond the range, differ afterwards
        labels = channels[0].astype(np.int32)
    # the reader takes the channels of a flat image for an axis, though it has no spacing
    is_single = len(channels) == 1 and labels.ndim == len(properties["spacing"])
    if not is_single or not np.array_equal(labels, channels[0]):
        hint = ", and _0000 marks images" if IMAGE_NAME.search(file.name) else ""
        raise LoMixError(f"{file} is no segmentation: it needs one channel of whole numbers{hint}.")
    if (labels < 0).any():
        if IMAGE_NAME.search(file.name):
            raise LoMixError(f"{file} is no segmentation: it has negative values, and _0000 marks images.")
        raise LoMixError(
            f"{file} has negative labels, which nnU-Net doesn't know: give what is to be ignored the highest label, "
            "and name it ignore in a dataset.json."
        )
    own = properties["spacing"] if spacing is None or beside else spacing
    labels = _flatten(labels)
    return labels, make_grid(labels.shape, own, properties)


def read_image(file: Path, reader: type[BaseReaderWriter]) -> np.ndarray:
    """Grey values, the mean over channels, as :func:`read_segmentation` gives the segmentation of this image.

    Raises:
        LoMixError: nnU-Net's reader can't read the file.
    """
    channels, _ = _read(file, reader, lambda: reader().read_images([str(file)]))
    return _flatten(channels.mean(axis=0))


def read_spacing(file: Path, reader: type[BaseReaderWriter]) -> tuple[float, ...] | None:
    """The spacing in the JSON file beside a 3D TIFF; None without one, and for files that have it in themselves.

    Raises:
        LoMixError: the JSON file can't be read, or has no spacing.
    """
    beside = file.with_suffix(".json")
    if not issubclass(reader, Tiff3DIO) or not beside.is_file():
        return None
    spacing = read_json(beside, "spacing")["spacing"]
    try:
        values = tuple(map(float, spacing))
    except (TypeError, ValueError):
        values = ()
    if len(values) != 3 or not all(0 < value < math.inf for value in values):
        raise LoMixError(f"{beside} has the spacing {spacing!r}, which is not three lengths in mm: correct it.")
    return values


def _read(
    file: Path, reader: type[BaseReaderWriter], read: Callable[[], tuple[np.ndarray, dict[str, Any]]]
) -> tuple[np.ndarray, dict[str, Any]]:
    require_utf8(file)
    with (
        explaining(f"nnU-Net's {reader.__name__} can't read {file}"),
        redirect_stdout(io.StringIO()),  # prints that it assumes a spacing, which we may know
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", "Casting complex values to real")  # half of the numbers would be lost
        return read()


def _flatten(array: np.ndarray) -> np.ndarray:
    """An array of a single slice as 2D."""
    return array[0] if len(array) == 1 else array


def list_values(file: Path, reader: type[BaseReaderWriter]) -> set[int]:
    """All values of a segmentation.

    Raises:
        LoMixError: as :func:`read_segmentation`, or a value is larger than any label.
    """
    values = {int(value) for value in np.unique(read_segmentation(file, reader)[0])}
    if max(values) > LARGEST_LABEL:
        raise LoMixError(
            f"{file} has the value {max(values)}, but nnU-Net's labels end at {LARGEST_LABEL}: correct it, or name the "
            "labels in a dataset.json."
        )
    return values


def find_reader(dataset_json: Mapping[str, Any], example: Path) -> type[BaseReaderWriter]:
    """The class of nnU-Net that reads such a file; ``dataset_json`` has at least ``file_ending``.

    Raises:
        LoMixError: there is none.
    """
    require_utf8(example)
    messages = io.StringIO()  # every reader that doesn't fit prints
    with (
        explaining(f"No reader of nnU-Net can read {example}"),
        redirect_stdout(messages),
        redirect_stderr(messages),
    ):
        return determine_reader_writer_from_dataset_json(dataset_json, str(example), verbose=False)


def guess_ending(folder: Path) -> str:
    """The ending of the files in a folder that nnU-Net can read.

    Raises:
        LoMixError: there is none, or there are several.
    """
    known = {ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings}
    found: Counter[str] = Counter()
    for file in folder.iterdir():
        fitting = [ending for ending in known if file.name.endswith(ending) and not is_hidden(file)]
        if fitting:
            found[max(fitting, key=len)] += 1  # the longest: .nii.gz rather than .gz
    if len(found) != 1:
        raise LoMixError(
            f"{folder} must have files of one kind that nnU-Net reads, not {', '.join(sorted(found)) or 'none'}: set "
            "file_ending in a dataset.json."
        )
    return next(iter(found))
