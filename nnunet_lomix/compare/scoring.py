"""The scores of every case and prediction: in parallel, and only once.

Voxels that the reference marks as ignored belong to no class in both masks. An image of a single slice is 2D.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from rich.progress import track
from scipy.ndimage import find_objects

from nnunet_lomix.compare.metrics import METRICS, USUAL, choose_metrics
from nnunet_lomix.compare.processes import in_processes
from nnunet_lomix.compare.sources import Source
from nnunet_lomix.errors import LoMixError, UsageError, shorten
from nnunet_lomix.files import replacing
from nnunet_lomix.nnunet.segmentations import Reader, read_segmentation, require_same_grid

# goes up with every change of results that a metric's sentence doesn't show: both are part of the cache's keys
VERSION = 4
SAVED_EVERY = 100  # cases: what a job that is killed leaves behind
NO_CLASS = -1  # instead of ignored labels: 0 may belong to a region


class CaseScores(NamedTuple):
    """What is known of a prediction.

    Attributes:
        scores: for each class the value of each metric: those of shares 0 to 1, distances in mm; never NaN.
        strangers: values of the prediction that are no label.
        reference_strangers: those of the reference.
    """

    scores: dict[str, dict[str, float]]
    strangers: list[int]
    reference_strangers: list[int]


@dataclass(frozen=True)
class ScoringSettings:
    """How segmentations are read and scored.

    Attributes:
        labels: the values of each class or region, by name.
        ignore: the value of voxels of the reference that don't count, if there are any.
        reader: class of nnU-Net that reads the files.
        metrics: names of those to compute, of :data:`~nnunet_lomix.compare.metrics.METRICS`.
        tolerance: of the NSD, in mm.
        placed: whether origin and direction must be those of the reference, too. nnU-Net doesn't look at them, so in
            its own results they may differ.
    """

    labels: Mapping[str, tuple[int, ...]]
    ignore: int | None
    reader: Reader
    metrics: Sequence[str] = USUAL
    tolerance: float = 1.0
    placed: bool = True


def choose_settings(source: Source, metrics: Sequence[str] = (), tolerance: float = 1.0) -> ScoringSettings:
    """How the files of a source are scored; refuses metrics that there aren't, and a tolerance that isn't finite."""
    if not math.isfinite(tolerance):
        raise UsageError(f"--tolerance {tolerance} is no length: give a number of mm, or of pixels for PNG.")
    placed = source.configuration is None
    return ScoringSettings(source.labels, source.ignore, source.reader, choose_metrics(metrics), tolerance, placed)


def score(
    source: Source, settings: ScoringSettings, jobs: int = 1, cache_file: str | Path | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Score all predictions; each process holds one reference and one prediction at a time.

    Results are kept in ``cache_file``, if any, by the content of the files, also if this is interrupted.

    Returns:
        A row for each case, class, trainer, seed and metric: columns ``case``, ``class``, ``trainer``, ``seed``,
        ``metric`` and ``value`` (shares 0 to 1, distances in the unit of distances; never NaN). And sentences that a
        reader of the scores should know.

    Raises:
        LoMixError: a file is no segmentation, or the voxels of a prediction aren't those of its reference.
    """
    keys, results = _make_keys(source, settings, jobs), _read_cache(cache_file)
    unknown: dict[str, dict[str, Path]] = {}  # files by case and key
    for (case, trainer, seed), key in keys.items():
        if key not in results:
            unknown.setdefault(case, {})[key] = source.predictions[trainer, seed][case].absolute()
    calls = [
        (source.references[case].absolute(), files, settings, source.spacings.get(case))
        for case, files in unknown.items()
    ]
    scored_cases = track(in_processes(score_case, calls, jobs), "Scoring", len(calls), disable=not calls)
    try:
        for done, scored in enumerate(scored_cases, 1):
            results |= scored
            if done % SAVED_EVERY == 0:
                _write_cache(cache_file, results)
    finally:
        if calls:
            _write_cache(cache_file, results)
    found = {place: results[key] for place, key in keys.items()}
    rows = [
        (case, name, trainer, seed, metric, values[metric])
        for (case, trainer, seed), scored in found.items()
        for name, values in scored.scores.items()
        for metric in settings.metrics
    ]
    table = pd.DataFrame(rows, columns=["case", "class", "trainer", "seed", "metric", "value"])
    return table, [*_note_strangers(found), *_note_missing_spacings(source)]


def _note_strangers(found: Mapping[tuple[str, str, int], CaseScores]) -> list[str]:
    """A sentence on values that are no label, if there are any; ``found`` is by case, trainer and seed."""
    cases: dict[tuple[int, str], dict[str, None]] = {}  # by value and where it is
    for (case, trainer, _), scored in found.items():
        for value in scored.reference_strangers:
            cases.setdefault((value, "the references"), {})[case] = None
        for value in scored.strangers:
            cases.setdefault((value, f"{trainer}'s predictions"), {})[case] = None
    if not cases:
        return []
    listed = (
        f"{value} in {place} of {len(own)} case{'s' if len(own) > 1 else ''} ({shorten(own)})"
        for (value, place), own in cases.items()
    )
    return [
        f"Values that are no label count as background, {shorten(listed, '; ')}: if they mean a label, as 255 does in "
        "masks of 0 and 255, write the label's value instead."
    ]


def _note_missing_spacings(source: Source) -> list[str]:
    missing = [case for case in source.references if case not in source.spacings]
    if not source.spacings or not missing:
        return []
    return [f"There is no spacing of {shorten(missing)}, so their voxels count as 1 mm: write it beside them, as JSON."]


def _read_cache(file: str | Path | None) -> dict[str, CaseScores]:
    try:
        content = json.loads(Path(file).read_text()) if file is not None and Path(file).exists() else {}
        return {key: CaseScores(**scored) for key, scored in dict(content).items()}
    # damaged, or of an older version: everything is scored again
    except (OSError, RecursionError, TypeError, ValueError):
        return {}


def _write_cache(file: str | Path | None, results: Mapping[str, CaseScores]) -> None:
    if file is not None:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps({key: scored._asdict() for key, scored in results.items()}))


def _make_keys(source: Source, settings: ScoringSettings, jobs: int) -> dict[tuple[str, str, int], str]:
    """For each case, trainer and seed a text that says all that its scores depend on."""
    meaning = [
        VERSION,
        [METRICS[name].sentence for name in settings.metrics],
        dict(settings.labels),
        settings.ignore,
        settings.reader.__name__,
        float(settings.tolerance),
        settings.placed,
    ]
    start = _digest(repr(meaning).encode())
    files = {*source.references.values(), *(file for own in source.predictions.values() for file in own.values())}
    hashes = dict(Parallel(min(jobs, len(files)), prefer="threads")(delayed(_hash_file)(file) for file in files))
    return {
        (case, trainer, seed): f"{start} {hashes[source.references[case]]} {hashes[file]} {source.spacings.get(case)}"
        for (trainer, seed), own in source.predictions.items()
        for case, file in own.items()
    }


def _hash_file(file: Path) -> tuple[Path, str]:
    # a TIFF's spacing is in a file beside it
    beside = file.with_suffix(".json")
    try:
        return file, _digest(b"".join(f.read_bytes() for f in (file, beside) if f == file or f.exists()))
    except OSError as error:
        raise LoMixError(f"{error.filename} can't be read: {error.strerror}.") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def score_case(
    reference: Path, predictions: Mapping[str, Path], settings: ScoringSettings, spacing: Sequence[float] | None = None
) -> dict[str, CaseScores]:
    """Score several predictions of one case; they and the results have the same keys.

    ``spacing`` (mm along each of three axes) is for files that should have their spacing beside them and don't.

    >>> settings = ScoringSettings({"liver": (1,)}, None, SimpleITKIO, ["Dice", "clDice"])  # doctest: +SKIP
    >>> scored = score_case(Path("a.nii.gz"), {"z": Path("z/a.nii.gz")}, settings)  # doctest: +SKIP
    >>> scored["z"].scores["liver"]["clDice"]  # doctest: +SKIP

    Raises:
        LoMixError: as :func:`score`.
    """
    known = {value for values in settings.labels.values() for value in values}
    expected, grid = read_segmentation(reference, settings.reader, spacing)
    ignored = expected == settings.ignore  # nowhere if that is None
    expected[ignored] = NO_CLASS
    # no further than to the highest label: a single voxel of 100 000 000 would make a list of that length
    expected_boxes = find_objects(expected, max(known))
    reference_strangers = _list_strangers(expected, expected_boxes, known)
    diagonal = float(np.linalg.norm(np.multiply(grid.shape, grid.spacing)))
    found: dict[str, CaseScores] = {}
    for key, file in predictions.items():
        predicted, own_grid = read_segmentation(file, settings.reader, spacing)
        require_same_grid(file, own_grid, grid, settings.placed)
        predicted[ignored] = NO_CLASS
        boxes = find_objects(predicted, max(known))
        scores = {}
        for name, values in settings.labels.items():
            # masks only where a label is: whole images are large, organs aren't
            window = _enclose(values, [expected_boxes, boxes], predicted.ndim)
            mask, own_mask = (np.isin(labels[window], values) for labels in (expected, predicted))
            scores[name] = {
                metric: METRICS[metric].measure(mask, own_mask, grid.spacing, settings.tolerance, diagonal)
                for metric in settings.metrics
            }
        found[key] = CaseScores(scores, _list_strangers(predicted, boxes, known), reference_strangers)
    return found


def _list_strangers(labels: np.ndarray, boxes: Sequence[Any], known: Collection[int]) -> list[int]:
    """All values that are no label; ``boxes`` are those from ``find_objects``, by value − 1."""
    between = [value for value, box in enumerate(boxes, 1) if box and value not in known]
    beyond = np.unique(labels[labels > len(boxes)])
    return [*between, *map(int, beyond)]


def _enclose(values: Sequence[int], boxes: Sequence[list[Any]], dimensions: int) -> tuple[slice, ...]:
    """The smallest window with all voxels of some values; ``boxes`` are lists by value − 1, from ``find_objects``."""
    if 0 in values:  # around everything else
        return (slice(None),) * dimensions
    own = [found[v - 1] for found in boxes for v in values if found[v - 1]]
    if not own:
        return (slice(0),) * dimensions
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*own, strict=True))
