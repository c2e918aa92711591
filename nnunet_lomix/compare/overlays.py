"""Pictures of cases: predictions over the image, as PNG."""

import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from nnunet_lomix.compare.sources import Source
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.segmentations import Grid, Reader, read_image, read_segmentation, require_same_grid

# Okabe and Ito's colours, which the colour-blind can tell apart; on grey images
CLASS_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2")
# where rows and columns of a picture should go, to the patient's left, to the back and upwards
DOWN, RIGHT = np.array([0, 1, -1]), np.array([1, 1, 0])


class Overlays(NamedTuple):
    """A PNG for each trainer, which slice it shows in words ("" for 2D), and the labels that are in it."""

    pictures: dict[str, bytes]
    where: str
    values: set[int]


def draw_overlays(source: Source, case: str, values: Sequence[int]) -> Overlays:
    """Each prediction as areas over the image, the reference as outlines, in the colours of the classes; in 3D a slice.

    All files are read as they are for the scores; of several seeds the first is drawn. The slice is across the axis
    with the coarsest voxels: of those with reference the one where the predictions differ in most voxels. An image that
    isn't there, can't be read or has another shape than the reference leaves the ground black. ``values`` are the
    labels to draw, in the order of ``CLASS_COLOURS``.

    Raises:
        LoMixError: a segmentation can't be read, or has another shape or spacing than the reference.
    """
    spacing = source.spacings.get(case)
    expected, grid = read_segmentation(source.references[case], source.reader, spacing)
    predicted = {}
    for trainer in source.trainers:
        file = source.predictions[trainer, 0][case]
        predicted[trainer], own_grid = read_segmentation(file, source.reader, spacing)
        require_same_grid(file, own_grid, grid, placed=False)
    ground = _read_ground(source.images.get(case), source.reader, expected.shape)
    where = ""
    sizes = np.array(grid.spacing)
    if expected.ndim == 3:
        axis = expected.shape.index(1) if 1 in expected.shape else int(sizes.argmax())
        index = _pick_slice(expected, list(predicted.values()), axis)
        where = f"slice {index + 1} of {expected.shape[axis]}"
        ground, expected = _cut(ground, index, axis, grid), _cut(expected, index, axis, grid)
        predicted = {trainer: _cut(labels, index, axis, grid) for trainer, labels in predicted.items()}
        sizes = np.delete(sizes, axis)
    window = _crop((expected > 0) | np.any([labels > 0 for labels in predicted.values()], axis=0))
    aspect = sizes[0] / sizes[1]
    found = {int(value) for labels in (expected, *predicted.values()) for value in np.unique(labels[window])}
    pictures = {
        trainer: _draw_overlay(ground[window], expected[window], labels[window], aspect, values)
        for trainer, labels in predicted.items()
    }
    return Overlays(pictures, where, found.intersection(values))


def _read_ground(file: Path | None, reader: Reader, shape: tuple[int, ...]) -> np.ndarray:
    """Grey values of the image; zeros where there is none that fits."""
    try:
        image = np.zeros(shape) if file is None else read_image(file, reader)
    except LoMixError:  # a picture without its ground is better than none
        return np.zeros(shape)
    return image if image.shape == shape else np.zeros(shape)


def _pick_slice(expected: np.ndarray, predicted: Sequence[np.ndarray], axis: int) -> int:
    """Where the predictions differ most; if they don't, where they are most wrong; if they aren't, of the most area."""
    between = np.any([p != predicted[0] for p in predicted], axis=0)
    wrong = np.any([p != expected for p in predicted], axis=0)
    shown = next((mask for mask in (between, wrong) if mask.any()), expected > 0)
    voxels, with_reference = (np.moveaxis(mask, axis, 0).sum(axis=(1, 2)) for mask in (shown, expected > 0))
    # false positives far from the reference would be a picture without any outline
    preferred = voxels * (with_reference > 0)
    return int((preferred if preferred.any() else voxels).argmax())


def _cut(array: np.ndarray, index: int, axis: int, grid: Grid) -> np.ndarray:
    """A slice as clinics show it: front or head at the top, the patient's left or back on the right."""
    rows_go_up, columns_go_left = axis != 0, False  # as z, y, x of most images, where the reader knows no directions
    if grid.steps:
        down, right = np.delete(grid.steps, axis, axis=0)
        rows_go_up, columns_go_left = bool(down @ DOWN < 0), bool(right @ RIGHT < 0)
    cut = array.take(index, axis)
    return cut[:: -1 if rows_go_up else 1, :: -1 if columns_go_left else 1]


def _crop(mask: np.ndarray) -> tuple[slice, ...]:
    """A square around the mask with a margin; everything if the mask is empty."""
    if not mask.any():
        return (slice(None),) * mask.ndim
    ends = [(i.min(), i.max() + 1) for i in np.nonzero(mask)]
    half = max(high - low for low, high in ends) * 0.7 + 4
    centres = [(low + high) / 2 for low, high in ends]
    return tuple(slice(max(0, int(c - half)), int(c + half) + 1) for c in centres)


def _draw_overlay(
    image: np.ndarray, expected: np.ndarray, predicted: np.ndarray, aspect: float, values: Sequence[int]
) -> bytes:
    # nnU-Net's own plots change matplotlib's global settings
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(3, 3 * image.shape[0] * aspect / image.shape[1]))
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        low, high = np.percentile(image, (1, 99))
        ax.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect="auto", interpolation="nearest")
        areas = np.zeros((*image.shape, 4))
        colours = dict(zip(values, cycle(CLASS_COLOURS), strict=False))
        for value, colour in colours.items():
            areas[predicted == value] = (*to_rgb(colour), 0.5)
        ax.imshow(areas, aspect="auto", interpolation="nearest")
        for value, colour in colours.items():
            if (expected == value).any() and min(expected.shape) > 1:
                # a quarter of a voxel inside, so that the outlines of neighbours lie side by side
                contour = ax.contour(expected == value, [0.75], colors=colour, linewidths=1.5)
                contour.set_path_effects([withStroke(linewidth=3, foreground="black")])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
