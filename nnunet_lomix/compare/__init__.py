"""Compare trainers on the same cases: Dice, NSD, HD95 and IoU with intervals, tests and effect per case.

- ``sources``, ``from_results``, ``from_folders``: which files are compared;
- ``segmentations``, ``grids``: reading them, and where their voxels are;
- ``metrics``, ``scoring``: the scores of each case;
- ``statistics``: what they say about the trainers;
- ``tables``, ``words``, ``content``: a report's content; ``terminal``, ``markdown``, ``page`` with ``plots`` and
  ``overlays``: how it is shown; ``report``: its files.

>>> source = read_results("4", "3d_fullres", ["nnUNetTrainer", "nnUNetTrainerLoMix"])  # doctest: +SKIP
>>> compare(source).comparison  # doctest: +SKIP
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from nnunet_lomix.compare.from_folders import read_folders
from nnunet_lomix.compare.from_results import read_results
from nnunet_lomix.compare.metrics import METRICS, choose_metrics
from nnunet_lomix.compare.report import write_report
from nnunet_lomix.compare.scoring import score
from nnunet_lomix.compare.sources import Source
from nnunet_lomix.compare.statistics import compare_trainers
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import scratch
from nnunet_lomix.locks import Lock

__all__ = ["Comparison", "Source", "compare", "compare_into", "read_folders", "read_results"]

STATISTICS = (
    "Seeds are averaged within each case. 95 % intervals of means over cases: BCa bootstrap, expanded, 9999 resamples. "
    "p: Wilcoxon's signed-rank test, two-sided; p_holm: Holm's correction over classes and candidates within a metric. "
    "Both are about other cases, and leave out how much another training would differ."
)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` gives.

    Attributes:
        scores: the table from :func:`~nnunet_lomix.compare.scoring.score`.
        comparison: as from :func:`~nnunet_lomix.compare.statistics.compare_trainers`.
        source: the files, and the learning curves.
        information: how this was made, in values that JSON knows: ``dataset``, ``configuration``, ``folds``,
            ``trainers``, ``folders`` (of each trainer, one for each seed), ``cases`` (their number), ``classes`` and
            ``label_source``, ``distance_unit`` (mm or pixels), ``tolerance_mm`` or ``tolerance_pixels``, ``metrics``
            (the implementation), ``statistics``, ``notes``, ``epoch_seconds`` (median of each trainer that has
            curves; nnU-Net logs no memory), ``versions`` and ``date``.
    """

    scores: pd.DataFrame
    comparison: pd.DataFrame
    source: Source
    information: dict[str, Any]


def compare(
    source: Source,
    tolerance: float = 1.0,
    jobs: int = 1,
    cache_file: str | Path | None = None,
    metrics: Sequence[str] = (),
) -> Comparison:
    """Score all predictions and compare every trainer with the first one.

    Args:
        source: from :func:`read_results` or :func:`read_folders`.
        tolerance: of the NSD, in mm, or in pixels where the files have no scale. Best is what two experts differ by;
            along an axis with larger voxels a boundary must be met exactly.
        jobs: number of processes.
        cache_file: where scores are kept, so that the same files are not scored again; None: nowhere.
        metrics: names of :data:`~nnunet_lomix.compare.metrics.METRICS`, the most important first; by default the usual.

    Raises:
        LoMixError: a file can't be scored.
        UsageError: there is no such metric.
    """
    scores, notes = score(source, metrics, tolerance, jobs, cache_file)
    information = _describe(source, tolerance, choose_metrics(metrics)) | {"notes": [*source.notes, *notes]}
    return Comparison(scores, compare_trainers(scores, source.trainers), source, information)


def compare_into(
    folder: str | Path,
    source: Source,
    console: Console,
    tolerance: float = 1.0,
    jobs: int = 1,
    metrics: Sequence[str] = (),
) -> None:
    """As :func:`compare`; writes reports and cache into a folder, and prints the tables.

    Raises:
        LoMixError: a file can't be scored, the folder can't be written, or another process compares into it.
    """
    folder = Path(folder)
    with _claim(folder):
        result = compare(source, tolerance, jobs, folder / "scores_cache.json", metrics)
        write_report(folder, result.scores, result.comparison, result.information, source.curves, source.files, console)


def _claim(folder: Path) -> Lock:
    """Make the folder, and have it for this process alone."""
    try:
        lock = Lock(folder, "comparison")
        with scratch(folder / "report.md") as probe:
            probe.touch()
    except OSError as error:
        raise LoMixError(f"{folder} can't be written ({error.strerror}): choose another --out.") from None
    return lock


def _describe(source: Source, tolerance: float, metrics: Sequence[str]) -> dict[str, Any]:
    packages = ("nnunet_lomix", "nnunetv2", "monai", "torch", "numpy", "scipy")
    return {
        "dataset": source.dataset,
        "configuration": source.configuration,
        "folds": list(source.folds),
        "trainers": source.trainers,
        "folders": {name: [str(f) for (n, _), f in source.folders.items() if n == name] for name in source.trainers},
        "cases": len(source.references),
        "classes": {name: list(values) for name, values in source.labels.items()},
        "label_source": source.label_source,
        "distance_unit": source.distance_unit,
        f"tolerance_{source.distance_unit}": tolerance,
        "metrics": " ".join(METRICS[name].sentence.format(tolerance="the tolerance") for name in metrics),
        "statistics": STATISTICS,
        "epoch_seconds": source.curves.groupby("trainer", sort=False)["seconds"].median().to_dict(),
        "versions": {package: version(package) for package in packages},
        "date": date.today().isoformat(),
    }
