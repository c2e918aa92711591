"""The scores of every case and prediction: in parallel, and only once.

Voxels that the reference marks as ignored are background in both masks. An image of a single slice is 2D.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from rich.progress import track
from scipy.ndimage import find_objects

from nnunet_lomix.compare.metrics import IMPLEMENTATION, METRICS, measure
from nnunet_lomix.compare.segmentations import Grid, read_segmentation
from nnunet_lomix.compare.sources import Source
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import replacing

# goes up with every change of results that IMPLEMENTATION doesn't show: both are part of the cache's keys
VERSION = 1
SAVED_EVERY = 100  # cases: what a job that is killed leaves behind
CaseScores = list[list[float]]  # [Dice, NSD, HD95] of each class


@dataclass(frozen=True)
class ScoringSettings:
    """How segmentations are read and scored.

    Attributes:
        labels: the values of each class or region, by name.
        ignore: the value of voxels of the reference that don't count, if there are any.
        tolerance: of the NSD, in mm.
        reader: class of nnU-Net that reads the files.
        placed: whether origin and direction must be those of the reference, too. nnU-Net doesn't look at them, so in
            its own results they may differ.
    """

    labels: Mapping[str, tuple[int, ...]]
    ignore: int | None
    tolerance: float
    reader: type[BaseReaderWriter]
    placed: bool = True


def score(source: Source, tolerance: float, jobs: int, cache_file: str | Path | None = None) -> pd.DataFrame:
    """Score all predictions.

    Memory does not grow with the number of cases: each process holds one reference and one prediction.

    Args:
        source: the files.
        tolerance: of the NSD, in mm.
        jobs: number of processes.
        cache_file: results by content of the files; also written if this is interrupted. None: no cache.

    Returns:
        A row for each case, class, trainer, seed and metric: columns ``case``, ``class``, ``trainer``, ``seed``,
        ``metric`` and ``value`` (Dice and NSD 0 to 1, HD95 in mm; never NaN).

    Raises:
        LoMixError: a file is no segmentation, or a prediction has another shape or spacing than its reference.
    """
    settings = ScoringSettings(
        source.labels, source.ignore, tolerance, source.reader, placed=source.configuration is None
    )
    results = _read_cache(cache_file)
    keys = _make_keys(source, settings, jobs)
    todo: dict[str, dict[str, Path]] = {}
    for (case, trainer, seed), key in keys.items():
        if key not in results:
            todo.setdefault(case, {})[key] = source.predictions[trainer, seed][case]
    try:
        for done, scored in enumerate(_score_cases(todo, source.references, settings, jobs), 1):
            results |= scored
            if done % SAVED_EVERY == 0:
                _write_cache(cache_file, results)
    finally:
        if todo:
            _write_cache(cache_file, results)
    rows = [
        (case, name, trainer, seed, metric, value)
        for (case, trainer, seed), key in keys.items()
        for name, values in zip(source.labels, results[key], strict=True)
        for metric, value in zip(METRICS, values, strict=True)
    ]
    return pd.DataFrame(rows, columns=["case", "class", "trainer", "seed", "metric", "value"])


def _read_cache(file: str | Path | None) -> dict[str, CaseScores]:
    try:
        return dict(json.loads(Path(file).read_text())) if file is not None and Path(file).exists() else {}
    except (TypeError, ValueError):  # damaged: everything is scored again
        return {}


def _write_cache(file: str | Path | None, results: Mapping[str, CaseScores]) -> None:
    if file is not None:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(results))


def _make_keys(source: Source, settings: ScoringSettings, jobs: int) -> dict[tuple[str, str, int], str]:
    """For each case, trainer and seed a text that says all that its scores depend on."""
    meaning = [
        IMPLEMENTATION,
        VERSION,
        list(settings.labels.values()),
        settings.ignore,
        float(settings.tolerance),
        settings.reader.__name__,
        settings.placed,
    ]
    start = _digest(repr(meaning).encode())
    files = {*source.references.values(), *(file for own in source.predictions.values() for file in own.values())}
    hashes = dict(Parallel(jobs, prefer="threads")(delayed(_hash_file)(file) for file in files))
    return {
        (case, trainer, seed): f"{start} {hashes[source.references[case]]} {hashes[file]}"
        for (trainer, seed), own in source.predictions.items()
        for case, file in own.items()
    }


def _hash_file(file: Path) -> tuple[Path, str]:
    # a TIFF's spacing is in a file beside it
    files = [f for f in (file, file.with_suffix(".json")) if f.exists()]
    return file, _digest(b"".join(f.read_bytes() for f in files))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _score_cases(
    todo: Mapping[str, Mapping[str, Path]], references: Mapping[str, Path], settings: ScoringSettings, jobs: int
) -> Iterator[dict[str, CaseScores]]:
    if not todo:
        return
    tasks = (delayed(score_case)(references[case], predictions, settings) for case, predictions in todo.items())
    # results come one by one, and tasks are handed out as they are needed
    scored = Parallel(min(jobs, len(todo)), return_as="generator_unordered")(tasks)
    yield from track(scored, "Scoring", total=len(todo))


def score_case(reference: Path, predictions: Mapping[str, Path], settings: ScoringSettings) -> dict[str, CaseScores]:
    """Score several predictions of one case.

    Args:
        reference: file.
        predictions: files, by any keys.
        settings: how.

    Returns:
        For each key the values of each label: ``[[Dice, NSD, HD95], …]``.

    Raises:
        LoMixError: as :func:`score`.
    """
    expected, grid = read_segmentation(reference, settings.reader)
    ignored = expected == settings.ignore  # nowhere if that is None
    expected[ignored] = 0
    diagonal = float(np.linalg.norm(np.multiply(grid.shape, grid.spacing)))
    expected_boxes = find_objects(expected)
    scores: dict[str, CaseScores] = {}
    for key, file in predictions.items():
        predicted, own_grid = read_segmentation(file, settings.reader)
        _require_same_grid(file, own_grid, grid, settings.placed)
        predicted[ignored] = 0
        boxes = [expected_boxes, find_objects(predicted)]
        scores[key] = []
        for values in settings.labels.values():
            # masks only where a label is: whole images are large, organs aren't
            window = _enclose(values, boxes, predicted.ndim)
            mask, own_mask = (np.isin(labels[window], values) for labels in (expected, predicted))
            scores[key].append(measure(mask, own_mask, grid.spacing, settings.tolerance, diagonal))
    return scores


def _require_same_grid(file: Path, own: Grid, reference: Grid, placed: bool) -> None:
    for what in ("shape", "spacing"):
        found, expected = getattr(own, what), getattr(reference, what)
        if not _agree(found, expected):
            raise LoMixError(
                f"{file} has the {what} {_format(found)}, but its reference {_format(expected)}: resample it."
            )
    # hundredths of mm are rounding
    if placed and not _agree(own.placement, reference.placement, atol=1e-2):
        raise LoMixError(
            f"{file} has another origin or direction than its reference, so its voxels are elsewhere: resample it."
        )


def _agree(found: Sequence[float], expected: Sequence[float], atol: float = 1e-8) -> bool:
    return len(found) == len(expected) and np.allclose(found, expected, rtol=1e-3, atol=atol)


def _format(numbers: Sequence[float]) -> str:
    return " × ".join(f"{n:g}" for n in numbers)


def _enclose(values: Sequence[int], boxes: Sequence[list[Any]], dimensions: int) -> tuple[slice, ...]:
    """The smallest window with all voxels of some values; ``boxes`` are lists by value − 1, from ``find_objects``."""
    own = [found[v - 1] for found in boxes for v in values if v <= len(found) and found[v - 1]]
    if not own:
        return (slice(0),) * dimensions
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*own, strict=True))
