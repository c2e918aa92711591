"""The pictures of a comparison: plots as SVG in the colours of the page around them, overlays as PNG.

The plots are drawn in placeholder colours which :func:`_to_svg` replaces by CSS variables (``--ink``, ``--trainer-0``,
…), so that one picture reads on a light and on a dark page.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import fill
from xml.etree import ElementTree
from zlib import crc32

import matplotlib
import numpy as np
import pandas as pd
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

MARKERS = "osD^vP"
SYMBOLS = "●■◆▲▼✚"  # the same in text
# Okabe and Ito's colours, which the colour-blind can tell apart; on grey images
CLASS_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2")
WIDTH = 4.6  # inches; as wide as a phone when its text is at reading size

_INK = "#010203"
_TRAINERS = tuple(f"#0{i}0504" for i in range(len(MARKERS)))
_VARIABLES = {_INK: "var(--ink)", **{colour: f"var(--trainer-{i})" for i, colour in enumerate(_TRAINERS)}}


def draw_differences(
    differences: pd.DataFrame, rows: pd.DataFrame, number: int, unit: str, lower_is_better: bool, title: str
) -> str:
    """A strip of paired differences for each class, with their mean and its interval.

    Args:
        differences: candidate − reference in ``unit``, a row for each case, a column for each class.
        rows: for each of these classes (index) ``difference``, ``difference_low`` and ``difference_high`` in ``unit``.
        number: which trainer the candidate is; gives colour and marker.
        unit: for the axis.
        lower_is_better: whether negative differences are better.
        title: for those who can't see the picture.

    Returns:
        An ``<svg>`` element.
    """
    with _style():
        figure, ax = _make_panel(differences.columns, 0.42)
        limit = _limit(np.abs(differences.to_numpy()), rows[["difference_low", "difference_high"]].abs().max(axis=None))
        for y, name in enumerate(differences.columns):
            _draw_points(ax, differences[name].to_numpy(), y, number, limit)
            low, high = rows.loc[name, ["difference_low", "difference_high"]]
            ax.plot([low, high], [y, y], color=_INK, lw=2.2, solid_capstyle="butt", zorder=3)
            ax.plot(rows.loc[name, "difference"], y, "d", color=_INK, ms=8, zorder=4)
        ax.axvline(0, color=_INK, lw=1)
        ax.set_xlim(-1.04 * limit, 1.04 * limit)
        ax.set_xlabel(f"difference in {unit}")
        left, right = ("← better", "worse →") if lower_is_better else ("← worse", "better →")
        ax.set_title(left, loc="left", fontsize=11)
        ax.set_title(right, loc="right", fontsize=11)
        return _to_svg(figure, title)


def draw_distributions(values: pd.DataFrame, unit: str, title: str) -> str:
    """The scores of all cases for each class and trainer, with their median and quartiles.

    Args:
        values: scores in ``unit``, a row for each case; columns are (class, trainer), of every class all trainers.
        unit: for the axis.
        title: for those who can't see the picture.

    Returns:
        An ``<svg>`` element.
    """
    classes, trainers = (list(values.columns.unique(level)) for level in (0, 1))
    with _style():
        step = 0.8 / len(trainers)
        figure, ax = _make_panel(classes, 0.14 + 0.24 * len(trainers))
        limit = _limit(values.to_numpy(), 0)
        for row, name in enumerate(classes):
            for i, trainer in enumerate(trainers):
                y = row + step * (i - (len(trainers) - 1) / 2)
                scores = values[name, trainer].to_numpy()
                _draw_points(ax, scores, y, i, limit, spread=0.3 * step)
                low, median, high = np.minimum(np.percentile(scores, (25, 50, 75)), limit)
                ax.plot([low, high], [y, y], color=_INK, lw=2.2, solid_capstyle="butt", zorder=3)
                ax.plot(median, y, "|", color=_INK, ms=11, mew=2.2, zorder=4)
        ax.margins(x=0.04)
        ax.set_xlabel(unit)
        return _to_svg(figure, title)


def draw_curves(curves: pd.DataFrame, trainers: Sequence[str], title: str) -> str:
    """Pseudo Dice over the epochs: each training thin, the mean over a trainer's trainings bold.

    Args:
        curves: ``trainer``, ``seed``, ``fold``, ``epoch``, ``pseudo_dice`` (0 to 1).
        trainers: all trainers, the reference first; those without curves are left out.
        title: for those who can't see the picture.

    Returns:
        An ``<svg>`` element.
    """
    with _style():
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        ax = figure.subplots()
        for i, trainer in enumerate(trainers):
            own = curves[curves["trainer"] == trainer]
            if own.empty:
                continue
            trainings = 100 * own.pivot(index="epoch", columns=["seed", "fold"], values="pseudo_dice")
            colour = _TRAINERS[i % len(_TRAINERS)]
            if trainings.shape[1] > 1:
                ax.plot(trainings, color=colour, lw=0.8, alpha=0.45)
            # where one training was shorter, a mean of the others would jump
            mean = trainings.dropna().mean(axis=1)
            marks = dict(marker=MARKERS[i % len(MARKERS)], ms=5, markevery=max(1, len(mean) // 12))
            ax.plot(mean, color=colour, lw=2, **marks)
        ax.set_xlabel("epoch")
        ax.set_ylabel("pseudo Dice, points")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.grid(color=_INK, alpha=0.15, lw=0.8)
        return _to_svg(figure, title)


@contextmanager
def _style() -> Iterator[None]:
    # nnU-Net's own plots change matplotlib's global settings
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        matplotlib.rcParams.update(dict.fromkeys(inked, _INK))
        # names are no formulas; text stays text, for search and screen readers
        matplotlib.rcParams.update(
            {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "", "font.size": 11}
        )
        matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
        yield


def _make_panel(classes: Sequence[str], row_height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 0.9 + row_height * len(classes)), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(classes)), [fill(str(name), 14) for name in classes])
    ax.set_ylim(len(classes) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x", color=_INK, alpha=0.15, lw=0.8)
    ax.set_axisbelow(True)
    return figure, ax


def _limit(sizes: np.ndarray, at_least: float) -> float:
    """Where an axis ends: at the largest value, unless a few are far beyond all others, as an empty mask's HD95 is."""
    needed = 1.1 * np.nan_to_num(at_least)
    largest = max(float(sizes.max()), needed)
    usual = max(2.5 * float(np.quantile(sizes, 0.9)), needed)
    return min(usual, largest) or largest or 1.0


def _draw_points(ax: Axes, values: np.ndarray, y: float, number: int, limit: float, spread: float = 0.28):
    """Points beyond the limit become triangles at the edge."""
    heights = y + np.random.default_rng(0).uniform(-spread, spread, len(values))
    colour = _TRAINERS[number % len(_TRAINERS)]
    style = dict(linestyle="none", color=colour, mec="none", alpha=0.6, clip_on=False)
    inside = np.abs(values) <= limit
    ax.plot(values[inside], heights[inside], MARKERS[number % len(MARKERS)], ms=4.5, **style)
    for side, marker in ((1, ">"), (-1, "<")):
        beyond = ~inside & (side * values > 0)
        ax.plot(np.full(beyond.sum(), side * limit), heights[beyond], marker, ms=6, **style)


def _to_svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in [c for c in parent if c.tag.endswith(("}style", "}metadata"))]:
            parent.remove(child)
    for element in root.iter():
        # HTML knows the elements of SVG without their namespace
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        for colour, variable in _VARIABLES.items():
            if "style" in element.attrib:
                element.set("style", element.get("style").replace(colour, variable))
    _make_ids_unique(root, title)
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


def _make_ids_unique(root: ElementTree.Element, title: str):
    """Two pictures of a page must not share an id, or one is drawn with the other's markers."""
    prefix = f"p{crc32(title.encode()):x}"
    for element in root.iter():
        for name, value in element.items():
            if name == "id":
                element.set(name, f"{prefix}-{value}")
            elif name == "href":
                element.set(name, f"#{prefix}-{value[1:]}")
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{prefix}-"))


def draw_overlays(
    image: Path | None, reference: Path, predictions: Mapping[str, Path], labels: Sequence[int] | None = None
) -> tuple[dict[str, bytes], str]:
    """Each prediction as coloured areas over the image, the reference as white contours; in 3D one slice.

    The slice is across the axis with the coarsest voxels: of those with reference the one where the predictions differ
    in most voxels.

    Args:
        image: image file; None, or one that can't be read or has another shape than the reference, leaves the ground
            black.
        reference: file of the reference segmentation.
        predictions: file of the prediction of each trainer.
        labels: the values to draw, in the order of ``CLASS_COLOURS``; None draws all but 0.

    Returns:
        A PNG for each trainer, and which slice it shows in words ("" for 2D).
    """
    file = sitk.ReadImage(str(reference))
    expected = sitk.GetArrayFromImage(file)
    predicted = {trainer: _read(path) for trainer, path in predictions.items()}
    labels = (
        sorted({*np.unique(expected), *(v for p in predicted.values() for v in np.unique(p))} - {0})
        if labels is None
        else labels
    )
    ground = _read_image(image, expected.shape)
    spacing = np.array(file.GetSpacing()[::-1])
    where = ""
    if expected.ndim == 3:
        axis = expected.shape.index(1) if 1 in expected.shape else int(spacing.argmax())
        index = _pick_slice(expected, list(predicted.values()), axis)
        where = f"slice {index + 1} of {expected.shape[axis]}"
        # only across the first axis does the second point down, as in pictures
        ground, expected, *cut = (
            a.take(index, axis)[:: -1 if axis else 1] for a in (ground, expected, *predicted.values())
        )
        predicted = dict(zip(predicted, cut, strict=True))
        spacing = np.delete(spacing, axis)
    window = _crop((expected > 0) | np.any([p > 0 for p in predicted.values()], axis=0))
    draw = partial(_draw_overlay, ground[window], expected[window], aspect=spacing[0] / spacing[1], labels=labels)
    return {trainer: draw(p[window]) for trainer, p in predicted.items()}, where


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
    candidates = (
        np.any([p != predicted[0] for p in predicted], axis=0),
        np.any([p != expected for p in predicted], axis=0),
        expected > 0,
    )
    shown = next((mask for mask in candidates if mask.any()), candidates[-1])
    voxels, with_reference = (np.moveaxis(mask, axis, 0).sum(axis=(1, 2)) for mask in (shown, expected > 0))
    # false positives far from the reference would be a picture without any outline
    preferred = voxels * (with_reference > 0)
    return int((preferred if preferred.any() else voxels).argmax())


def _crop(mask: np.ndarray) -> tuple[slice, ...]:
    """A square around the mask with a margin; everything if the mask is empty."""
    if not mask.any():
        return (slice(None),) * mask.ndim
    ends = [(i.min(), i.max() + 1) for i in np.nonzero(mask)]
    half = max(high - low for low, high in ends) * 0.7 + 4
    centres = [(low + high) / 2 for low, high in ends]
    return tuple(slice(max(0, int(c - half)), int(c + half) + 1) for c in centres)


def _draw_overlay(
    image: np.ndarray, expected: np.ndarray, predicted: np.ndarray, aspect: float, labels: Sequence[int]
) -> bytes:
    height = image.shape[0] * aspect / image.shape[1]
    with _style():
        figure = Figure(figsize=(3, 3 * height))
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        style = dict(aspect="auto", interpolation="nearest")
        low, high = np.percentile(image, (1, 99))
        ax.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), **style)
        areas = np.zeros((*image.shape, 4))
        for i, value in enumerate(labels):
            areas[predicted == value] = (*to_rgb(CLASS_COLOURS[i % len(CLASS_COLOURS)]), 0.5)
        ax.imshow(areas, **style)
        for value in labels:
            if (expected == value).any() and min(expected.shape) > 1:
                contour = ax.contour(expected == value, [0.5], colors="white", linewidths=1.5)
                contour.set_path_effects([withStroke(linewidth=3, foreground="black")])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
