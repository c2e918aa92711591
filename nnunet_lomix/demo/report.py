"""What the demo shows at its end: Dice of both trainers, paired differences, pictures."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from nnunet_lomix.files import replacing

COLOURS = ("#3a7fd5", "#f5a623", "#e0393e", "#4cc26b")
SHOWN_CASES = 4


def write_report(
    folder: Path,
    images: Path,
    truth: Path,
    predictions: Mapping[str, Path],
    labels: Mapping[str, int],
    seconds: Mapping[str, float],
    setup: str,
    console: Console,
):
    """Print the table; write ``table.csv`` (every Dice), ``results.md`` (the table) and ``overlays.png``.

    Args:
        folder: where to write; made if it isn't there.
        images, truth: folders of the held-out images and their labels.
        predictions: for each of the two trainers, the reference first, the folder of its predictions.
        labels: the classes to score.
        seconds: median seconds an epoch for each trainer.
        setup: what each training was, in a few words.
        console: where to print.
    """
    folder.mkdir(exist_ok=True)
    scores = read_scores(truth, predictions, labels)
    with replacing(folder / "table.csv") as temporary:
        scores.to_csv(temporary, index=False, float_format="%.4f")
    rows = format_rows(compare(scores, *predictions))
    header = ["Dice", *predictions, "difference", "95 % interval", "better:worse"]
    caption = _caption(scores["case"].nunique(), seconds, setup)
    with replacing(folder / "results.md") as temporary:
        temporary.write_text(to_markdown(header, rows, caption))
    _draw_overlays(folder / "overlays.png", images, truth, predictions, labels, scores)
    console.print(to_table(header, rows))
    console.print(caption, soft_wrap=True)


def dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Dice of two masks of one shape; NaN if both are empty.

    >>> dice(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    size = truth.sum() + prediction.sum()
    return float(2 * (truth & prediction).sum() / size) if size else float("nan")


def read_scores(truth: Path, predictions: Mapping[str, Path], labels: Mapping[str, int]) -> pd.DataFrame:
    """Dice of every case, class and trainer, a row each: ``case``, ``class``, ``trainer``, ``dice``."""
    rows = []
    for file in sorted(truth.glob("*.nii.gz")):
        expected = read_image(file)
        for trainer, folder in predictions.items():
            predicted = read_image(folder / file.name)
            for name, value in labels.items():
                case = file.name.removesuffix(".nii.gz")
                rows.append((case, name, trainer, dice(expected == value, predicted == value)))
    return pd.DataFrame(rows, columns=["case", "class", "trainer", "dice"])


def compare(scores: pd.DataFrame, reference: str, candidate: str) -> pd.DataFrame:
    """Paired comparison for each class and for the mean over classes of each case.

    A case in which the Dice of either trainer is undefined counts for neither. The interval of the mean
    difference is Student's t.

    Args:
        scores: as from :func:`read_scores`.
        reference, candidate: the trainers; differences are candidate − reference.

    Returns:
        A row for each class, and ``mean``; columns ``reference``, ``candidate``, ``difference``, ``low``,
        ``high``, ``better``, ``worse`` (numbers of cases).
    """
    paired = scores.pivot(index=["case", "class"], columns="trainer", values="dice").dropna()
    by_class = {name: paired.xs(name, level="class") for name in scores["class"].unique()}
    by_class["mean"] = paired.groupby(level="case").mean()
    return pd.DataFrame(
        {name: _compare_pairs(pairs[reference], pairs[candidate]) for name, pairs in by_class.items()}
    ).T


def _compare_pairs(reference: pd.Series, candidate: pd.Series) -> dict[str, float]:
    differences = candidate - reference
    # NaN for a single case
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.sem()
    return {
        "reference": reference.mean(),
        "candidate": candidate.mean(),
        "difference": differences.mean(),
        "low": differences.mean() - half,
        "high": differences.mean() + half,
        "better": (differences > 0).sum(),
        "worse": (differences < 0).sum(),
    }


def format_rows(comparison: pd.DataFrame) -> list[list[str]]:
    """The rows of the table as text, for :func:`to_table` and :func:`to_markdown`."""
    return [
        [
            str(row.Index),
            f"{row.reference:.3f}",
            f"{row.candidate:.3f}",
            f"{row.difference:+.3f}",
            f"{row.low:+.3f} to {row.high:+.3f}",
            f"{row.better:.0f}:{row.worse:.0f}",
        ]
        for row in comparison.itertuples()
    ]


def to_table(header: list[str], rows: list[list[str]]) -> Table:
    # fits into 80 columns: nnUNetTrainerLoMix is folded before LoMix
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold", max_width=16 if i > 2 else 13)
    for row in rows:
        table.add_row(*row, style="bold" if row is rows[-1] else None)
    return table


def to_markdown(header: list[str], rows: list[list[str]], caption: str) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{caption}\n"


def _caption(cases: int, seconds: Mapping[str, float], setup: str) -> str:
    times = ", ".join(f"{trainer} {s:.1f} s" for trainer, s in seconds.items())
    return (
        f"{cases} held-out cases. Both trainers: {setup}, from the same start on the same batches. "
        "Differences are means over cases, paired, with Student's t interval, which leaves out how much a "
        f"training with another seed would differ. Median time of an epoch: {times}.\n"
        "So short a training shows that everything works. It proves nothing about the accuracy of a full one."
    )


def read_image(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _draw_overlays(
    path: Path,
    images: Path,
    truth: Path,
    predictions: Mapping[str, Path],
    labels: Mapping[str, int],
    scores: pd.DataFrame,
):
    """A row for each of the first cases: the image, the truth and the predictions over it; 3D: one slice."""
    cases = scores["case"].unique()[:SHOWN_CASES]
    means = scores.groupby(["case", "trainer"])["dice"].mean()
    # nnU-Net's own plots change matplotlib's global settings
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(11, 0.7 + 2.75 * len(cases)), layout="constrained")
        grid = figure.subplots(len(cases), 2 + len(predictions), squeeze=False)
        for row, case in zip(grid, cases, strict=True):
            expected = read_image(truth / f"{case}.nii.gz")
            cut = best_slice(expected)
            image = read_image(images / f"{case}_0000.nii.gz")[cut]
            _draw(row[0], image, None, case)
            _draw(row[1], image, expected[cut], "truth")
            for ax, (trainer, folder) in zip(row[2:], predictions.items(), strict=True):
                predicted = read_image(folder / f"{case}.nii.gz")
                _draw(ax, image, predicted[cut], f"{trainer}\nmean Dice {means[case, trainer]:.3f}")
        patches = [Patch(color=COLOURS[value - 1], label=name) for name, value in labels.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)


def best_slice(labels: np.ndarray) -> tuple | int:
    """Index of what to show: all of a 2D image; in 3D the slice with most classes, then most foreground."""
    if labels.ndim == 2:
        return ()
    return max(range(len(labels)), key=lambda i: (len(np.unique(labels[i])), np.count_nonzero(labels[i])))


def _draw(ax: Axes, image: np.ndarray, labels: np.ndarray | None, title: str):
    ax.imshow(image, cmap="gray", vmin=np.percentile(image, 1), vmax=np.percentile(image, 99))
    if labels is not None:
        colours = ListedColormap(COLOURS)
        shown = np.ma.masked_equal(labels, 0)
        ax.imshow(shown, cmap=colours, vmin=1, vmax=len(COLOURS), alpha=0.65, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.axis("off")
