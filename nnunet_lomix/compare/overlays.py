"""Pictures of cases: predictions over the image, as PNG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import SimpleITK as sitk
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

# Okabe and Ito's colours, which the colour-blind can tell apart; on grey images
CLASS_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2")


def draw_overlays(
    image: Path | None, reference: Path, predictions: Mapping[str, Path], values: Sequence[int] | None = None
) -> tuple[dict[str, bytes], str]:
    """Each prediction as coloured areas over the image, the reference as white contours; in 3D one slice.

    The slice is across the axis with the coarsest voxels: of those with reference the one where the predictions differ
    in most voxels.

    Args:
        image: image file; None, or one that can't be read or has another shape than the reference, leaves the ground
            black.
        reference: file of the reference segmentation.
        predictions: file of the prediction of each trainer.
        values: the labels to draw, in the order of ``CLASS_COLOURS``; None draws all but 0.

    Returns:
        A PNG for each trainer, and which slice it shows in words ("" for 2D).

    Raises:
        RuntimeError: SimpleITK can't read a segmentation.
    """
    file = sitk.ReadImage(str(reference))
    spacing = np.array(file.GetSpacing()[::-1])
    expected = sitk.GetArrayFromImage(file)
    predicted = {trainer: _read(path) for trainer, path in predictions.items()}
    ground = _read_image(image, expected.shape)
    if values is None:
        values = sorted({int(v) for labels in (expected, *predicted.values()) for v in np.unique(labels)} - {0})
    where = ""
    if expected.ndim == 3:
        axis = expected.shape.index(1) if 1 in expected.shape else int(spacing.argmax())
        index = _pick_slice(expected, list(predicted.values()), axis)
        where = f"slice {index + 1} of {expected.shape[axis]}"
        ground, expected = _cut(ground, index, axis), _cut(expected, index, axis)
        predicted = {trainer: _cut(labels, index, axis) for trainer, labels in predicted.items()}
        spacing = np.delete(spacing, axis)
    window = _crop((expected > 0) | np.any([labels > 0 for labels in predicted.values()], axis=0))
    aspect = spacing[0] / spacing[1]
    pictures = {
        trainer: _draw_overlay(ground[window], expected[window], labels[window], aspect, values)
        for trainer, labels in predicted.items()
    }
    return pictures, where


def _read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def _read_image(path: Path | None, shape: tuple[int, ...]) -> np.ndarray:
    """Grey values; zeros where there is no image that fits."""
    try:
        image = np.zeros(shape) if path is None else _read(path)
    except RuntimeError:  # a picture without its ground is better than no report
        return np.zeros(shape)
    if image.ndim > len(shape):  # colours
        image = image.mean(axis=-1)
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


def _cut(array: np.ndarray, index: int, axis: int) -> np.ndarray:
    """A slice as it is drawn: only across the first axis does the second one point down, as in pictures."""
    cut = array.take(index, axis)
    return cut if axis == 0 else cut[::-1]


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
        for i, value in enumerate(values):
            areas[predicted == value] = (*to_rgb(CLASS_COLOURS[i % len(CLASS_COLOURS)]), 0.5)
        ax.imshow(areas, aspect="auto", interpolation="nearest")
        for value in values:
            if (expected == value).any() and min(expected.shape) > 1:
                contour = ax.contour(expected == value, [0.5], colors="white", linewidths=1.5)
                contour.set_path_effects([withStroke(linewidth=3, foreground="black")])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
