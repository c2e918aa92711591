"""Segmentations and images, read by nnU-Net's own readers: labels, and where the voxels are."""

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, determine_reader_writer_from_dataset_json
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_lomix.errors import LoMixError, explaining, shorten
from nnunet_lomix.nnunet.datasets import require_utf8
from nnunet_lomix.nnunet.results import DATASET_JSON, PLANS, ModelFolder, read_json

Reader = type[BaseReaderWriter]

IMAGE_NAME = re.compile(r"_\d{4}\.")  # a case, and the number of a channel
LARGEST_LABEL = 65535  # that nnU-Net's readers write
# Of the smallest spacing: that voxels lie further apart than this is no rounding of a header. Those who take a voxel's
# corner for its centre are half a voxel off.
TOLERATED_SHIFT = 0.25
# Spacings are rounded, too, in a JSON file for one; what that adds up to over an image is compared by positions.
TOLERATED_SPACING = 1e-3


def find_reader(dataset_json: Mapping[str, Any], example: Path) -> Reader:
    """The class of nnU-Net that reads such a file; a :class:`LoMixError` if there is none.

    ``dataset_json`` has at least ``file_ending``.
    """
    require_utf8(example)
    messages = io.StringIO()  # every reader that doesn't fit prints
    with (
        explaining(f"No reader of nnU-Net can read {example}"),
        redirect_stdout(messages),
        redirect_stderr(messages),
    ):
        return determine_reader_writer_from_dataset_json(dataset_json, str(example), verbose=False)


def read_configuration(model: ModelFolder, configuration: str) -> tuple[dict[str, Any], Reader]:
    """What is planned for a configuration, and the class that reads its files.

    Raises:
        LoMixError: the plans aren't nnU-Net's.
    """
    with explaining(f"{model.path / PLANS} isn't as nnU-Net wants it"):
        manager = PlansManager(model.read_plans())
        return dict(manager.get_configuration(configuration).configuration), manager.image_reader_writer_class


def has_scale(reader: Reader, with_spacings: bool) -> bool:
    """Whether distances are in mm: PNG, BMP, and TIFF without a spacing beside it have no scale."""
    return not issubclass(reader, NaturalImage2DIO) and (with_spacings or not issubclass(reader, Tiff3DIO))


def guess_ending(folder: Path) -> str:
    """The ending of the files in a folder that nnU-Net can read.

    Raises:
        LoMixError: there is none, or there are several.
    """
    known = {ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings}
    names = sorted(file.name for file in folder.iterdir())
    found = set()
    for name in names:
        fitting = [ending for ending in known if name.endswith(ending) and not name.startswith(".")]
        if fitting:
            found.add(max(fitting, key=len))  # the longest: .nii.gz rather than .gz
    if len(found) != 1:
        there = shorten(sorted(found) or names) or "nothing"
        raise LoMixError(
            f"{folder} must have files of one kind that nnU-Net reads, not {there}: set file_ending in a dataset.json."
        )
    return found.pop()


def list_labels(folder: Path, dataset_json: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """The labels or regions that nnU-Net scores: the values of each by name, and the value that doesn't count.

    Args:
        folder: where the file is, for the message.
        dataset_json: its content.

    Raises:
        LoMixError: the labels aren't nnU-Net's.
    """
    file = folder / DATASET_JSON

    def as_tuple(values: int | Sequence[int]) -> tuple[int, ...]:
        return tuple(int(v) for v in np.atleast_1d(values))

    with explaining(f"The labels of {file} aren't as nnU-Net v2 wants them"):
        manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
        named = {name: as_tuple(values) for name, values in manager.label_dict.items() if name != "ignore"}
        regions = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        scored = {as_tuple(values) for values in regions}
        "".join(named).encode()  # JSON can name half a character, which no report can hold
    lowest, highest = min(manager.all_labels), max(manager.all_labels)
    if highest > LARGEST_LABEL:
        raise LoMixError(f"The labels of {file} end at {highest}, but nnU-Net's at {LARGEST_LABEL}: number them anew.")
    if lowest < 0:
        raise LoMixError(f"The labels of {file} begin at {lowest}, but nnU-Net's at 0: number them anew.")
    return {name: values for name, values in named.items() if values in scored}, manager.ignore_label


def list_values(file: Path, reader: Reader) -> set[int]:
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


@dataclass(frozen=True)
class Grid:
    """Where the voxels are, along the axes of the array.

    Attributes:
        shape: their number along each axis.
        spacing: mm of a voxel along each axis.
        origin: position of the first voxel, in mm to the patient's left, to the back and upwards; () if nnU-Net's
            reader keeps none.
        steps: for each axis the way from a voxel to the next one, as ``origin``; () if the reader keeps none.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = ()
    steps: tuple[tuple[float, ...], ...] = ()

    @property
    def corners(self) -> np.ndarray:
        """Positions of the outermost voxels, as ``origin``, one a row; only where the reader keeps positions."""
        ends = list(product(*((0, length - 1) for length in self.shape)))
        return np.array(self.origin) + np.array(ends) @ np.array(self.steps)


def _make_grid(shape: tuple[int, ...], spacing: Sequence[float], properties: Mapping[str, Any]) -> Grid:
    """The grid of an array with this shape, which may lack the first axes of its file.

    Args:
        shape: of the array.
        spacing: of all axes of the file.
        properties: what nnU-Net's reader gives, and keeps for its own writing.
    """
    axes = len(shape)
    own_spacing = tuple(map(float, spacing[-axes:]))
    if "nibabel_stuff" in properties:
        kept = properties["nibabel_stuff"]
        # nibabel's positions are to the right and to the front
        affine = np.diag([-1, -1, 1, 1]) @ kept.get("reoriented_affine", kept["original_affine"])
        origin, columns = affine[:3, 3], affine[:3, :3]
    elif "sitk_stuff" in properties:
        kept = properties["sitk_stuff"]
        origin = np.array(kept["origin"])
        columns = np.reshape(kept["direction"], (len(origin), len(origin))) * kept["spacing"]
    else:
        return Grid(shape, own_spacing)
    # a column for each axis, x, y, z and maybe channels, which the array has in the opposite order
    steps = tuple(tuple(map(float, step[:3])) for step in columns.T[::-1])
    return Grid(shape, own_spacing, tuple(map(float, origin[:3])), steps[-axes:])


def require_same_grid(file: Path, own: Grid, reference: Grid, placed: bool = True) -> None:
    """Refuse a prediction whose voxels aren't those of its reference.

    Args:
        file: of the prediction, for the message.
        own, reference: where their voxels are.
        placed: whether they must lie at the same positions, too.

    Raises:
        LoMixError: shape, spacing or, with ``placed``, positions differ.
    """
    alike = own.shape == reference.shape
    if not alike or not np.allclose(own.spacing, reference.spacing, rtol=TOLERATED_SPACING, atol=0):
        what = "spacing" if alike else "shape"
        found, expected = (" × ".join(f"{n:g}" for n in getattr(grid, what)) for grid in (own, reference))
        raise LoMixError(f"{file} has the {what} {found}, but its reference {expected}: resample it.")
    if not placed or own.origin == reference.origin == ():
        return
    # positions are linear in the indices, so that nothing is further away than a corner
    alike = len(own.origin) == len(reference.origin)
    distance = np.linalg.norm(own.corners - reference.corners, axis=1).max() if alike else math.inf
    if distance > TOLERATED_SHIFT * min(reference.spacing):
        raise LoMixError(
            f"{file} has another origin or direction than its reference, so its voxels are elsewhere, up to "
            f"{distance:.2g} mm away: resample it."
        )


def read_segmentation(file: Path, reader: Reader, spacing: Sequence[float] | None = None) -> tuple[np.ndarray, Grid]:
    """The label of each voxel.

    Args:
        file: its path.
        reader: class of nnU-Net that reads it.
        spacing: mm along each of three axes, for a file that should have its spacing beside it and doesn't.

    Returns:
        Labels (int32), 3D, or 2D for an image of a single slice; and where their voxels are. Both are as the reader
        gives them: one that reorients does so with both.

    Raises:
        LoMixError: nnU-Net's reader can't read the file, or it is no segmentation.
    """
    beside = read_spacing(file, reader)
    with _reading(file, reader):
        channels, properties = reader().read_seg(str(file))
    with np.errstate(invalid="ignore"):  # NaN, and what is beyond the range, differ afterwards
        labels = channels[0].astype(np.int32)
    # the reader takes the channels of a flat image for an axis, though it has no spacing
    is_single = len(channels) == 1 and labels.ndim == len(properties["spacing"])
    if not is_single or not np.array_equal(labels, channels[0]):
        found = f", not {channels[0][labels != channels[0]].flat[0]:.7g}" if is_single else ""
        hint = ", and _0000 marks images" if IMAGE_NAME.search(file.name) else ""
        raise LoMixError(f"{file} is no segmentation: it needs one channel of whole numbers{found}{hint}.")
    if (labels < 0).any():
        if IMAGE_NAME.search(file.name):
            raise LoMixError(f"{file} is no segmentation: it has negative values, and _0000 marks images.")
        raise LoMixError(
            f"{file} has negative labels, which nnU-Net doesn't know: give what is to be ignored the highest label, "
            "and name it ignore in a dataset.json."
        )
    own = properties["spacing"] if spacing is None or beside else spacing
    labels = _flatten(labels)
    return labels, _make_grid(labels.shape, own, properties)


def read_image(file: Path, reader: Reader) -> np.ndarray:
    """Grey values, the mean over channels, as :func:`read_segmentation` gives the segmentation of this image.

    Raises:
        LoMixError: nnU-Net's reader can't read the file.
    """
    with _reading(file, reader):
        channels, _ = reader().read_images([str(file)])
    return _flatten(channels.mean(axis=0))


def read_spacing(file: Path, reader: Reader) -> tuple[float, ...] | None:
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


@contextmanager
def _reading(file: Path, reader: Reader) -> Iterator[None]:
    """What nnU-Net's reader prints in the block isn't kept, and what it raises names the file."""
    require_utf8(file)
    with (
        explaining(f"nnU-Net's {reader.__name__} can't read {file}"),
        redirect_stdout(io.StringIO()),  # prints that it assumes a spacing, which we may know
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", "Casting complex values to real")  # half of the numbers would be lost
        yield


def _flatten(array: np.ndarray) -> np.ndarray:
    """An array of a single slice as 2D."""
    return array[0] if len(array) == 1 else array
