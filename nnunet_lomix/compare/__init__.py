"""Compare trainers on the same cases: Dice, NSD, HD95, IoU or clDice, with intervals, tests and effect per case.

The files of a :class:`Source` become ``scoring``'s table of scores, by the ``metrics`` that are asked for;
``statistics`` says what they show of the trainers, ``findings`` puts that into words and tables, and ``report`` writes
them down, with the pictures of ``plots`` and ``overlays``.

>>> source = read_results("4", "3d_fullres", ["nnUNetTrainer", "nnUNetTrainerLoMix"])  # doctest: +SKIP
>>> compare(source).comparison  # doctest: +SKIP
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nnunet_lomix.compare.findings import Comparison
from nnunet_lomix.compare.report import write_report
from nnunet_lomix.compare.scoring import choose_settings, score
from nnunet_lomix.compare.sources import Source, read_folders, read_results
from nnunet_lomix.compare.statistics import compare_trainers
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import scratch
from nnunet_lomix.locks import Lock

__all__ = ["Comparison", "Source", "compare", "compare_into", "read_folders", "read_results"]


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
    settings = choose_settings(source, metrics, tolerance)
    scores, notes = score(source, settings, jobs, cache_file)
    return Comparison(source, settings, scores, compare_trainers(scores, source.trainers), (*source.notes, *notes))


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
    try:
        lock = Lock(folder, "comparison")
        with scratch(folder / "report.md") as probe:
            probe.touch()
    except OSError as error:
        raise LoMixError(f"{folder} can't be written ({error.strerror}): choose another --out.") from None
    with lock:
        write_report(folder, compare(source, tolerance, jobs, folder / "scores_cache.json", metrics), console)
