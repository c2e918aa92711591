"""Dice, normalised surface Dice and HD95 of every case, in parallel and only once.

The boundary metrics are MONAI's. Tools define them differently, so here is what is computed:

- NSD: the share of both boundaries that is within the tolerance of the other one. Boundaries run between voxels, and
  each of their elements counts with its area in mm² (marching cubes; in 2D its length), so that thick slices get their
  right weight (``monai.metrics.compute_surface_dice`` with ``use_subvoxels``; the definition of DeepMind's
  ``surface-distance``).
- HD95: the larger one of the two 95th percentiles of the distances from boundary voxels to the nearest boundary voxel
  of the other mask, in mm (``monai.metrics.compute_hausdorff_distance``). A boundary voxel has a face to the outside.

Dice is nnU-Net's. For empty masks a metric has its best or worst value (Metrics Reloaded): if both are empty, Dice 1,
NSD 1 and HD95 0; if one is, Dice 0, NSD 0 and HD95 the diagonal of the image. Voxels that the reference marks as
ignored are background in both masks. An image of a single slice is 2D.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from rich.progress import track
from scipy.ndimage import find_objects

from nnunet_lomix.compare.sources import Grid, Source, read_labels
from nnunet_lomix.files import replacing

METRICS = ("Dice", "NSD", "HD95")
IMPLEMENTATION = (
    f"Dice as nnU-Net's; NSD (surface weighted by area) and HD95 (between boundary voxels) by MONAI {version('monai')}"
)
# goes up with every change of results that the text above doesn't show: both are part of the cache's keys
VERSION = 1
SAVED_EVERY = 100  # cases: what a job that is killed leaves behind


@dataclass(frozen=True)
class Protocol:
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
    reader: type
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
        click.ClickException: if a file is no segmentation, or a prediction has another shape or spacing than its
            reference.
    """
    protocol = Protocol(source.labels, source.ignore, tolerance, source.reader, placed=source.configuration is None)
    results = _read_cache(cache_file)
    keys = _make_keys(source, protocol, jobs)
    todo = {}
    for (case, trainer, seed), key in keys.items():
        if key not in results:
            todo.setdefault(case, {})[key] = source.predictions[trainer, seed][case]
    try:
        for done, scored in enumerate(_score_cases(todo, source.references, protocol, jobs), 1):
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


def _read_cache(file: str | Path | None) -> dict[str, list]:
    try:
        return dict(json.loads(Path(file).read_text())) if file is not None and Path(file).exists() else {}
    except (TypeError, ValueError):  # damaged: everything is scored again
        return {}


def _write_cache(file: str | Path | None, results: Mapping[str, list]):
    if file is not None:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(results))


def _make_keys(source: Source, protocol: Protocol, jobs: int) -> dict[tuple[str, str, int], str]:
    """For each case, trainer and seed a text that says all that its scores depend on."""
    settings = [list(protocol.labels.values()), protocol.ignore, float(protocol.tolerance), protocol.reader.__name__]
    settings += [protocol.placed]
    settings = hashlib.sha256(repr([IMPLEMENTATION, VERSION, *settings]).encode()).hexdigest()[:32]
    files = {*source.references.values(), *(file for own in source.predictions.values() for file in own.values())}
    hashes = dict(Parallel(jobs, prefer="threads")(delayed(_hash)(file) for file in files))
    return {
        (case, trainer, seed): f"{settings} {hashes[source.references[case]]} {hashes[file]}"
        for (trainer, seed), own in source.predictions.items()
        for case, file in own.items()
    }


def _hash(file: Path) -> tuple[Path, str]:
    # a TIFF's spacing is in a file beside it
    files = [f for f in (file, file.with_suffix(".json")) if f.exists()]
    return file, hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:32]


def _score_cases(
    todo: Mapping[str, Mapping[str, Path]], references: Mapping[str, Path], protocol: Protocol, jobs: int
) -> Iterator[dict[str, list]]:
    if not todo:
        return
    tasks = (delayed(score_case)(references[case], predictions, protocol) for case, predictions in todo.items())
    # results come one by one, and tasks are handed out as they are needed
    scored = Parallel(min(jobs, len(todo)), return_as="generator_unordered")(tasks)
    yield from track(scored, "Scoring", total=len(todo))


def score_case(reference: Path, predictions: Mapping[str, Path], protocol: Protocol) -> dict[str, list]:
    """Score several predictions of one case.

    Args:
        reference: file.
        predictions: files, by any keys.
        protocol: how.

    Returns:
        For each key the values of each label: ``[[Dice, NSD, HD95], …]``.

    Raises:
        click.ClickException: as :func:`score`.
    """
    expected, grid = read_labels(reference, protocol.reader)
    ignored = expected == protocol.ignore  # nowhere if that is None
    expected[ignored] = 0
    diagonal = float(np.linalg.norm(np.multiply(grid.shape, grid.spacing)))
    expected_boxes = find_objects(expected)
    scores = {}
    for key, file in predictions.items():
        predicted, own_grid = read_labels(file, protocol.reader)
        _require_same_grid(file, own_grid, grid, protocol.placed)
        predicted[ignored] = 0
        boxes = [expected_boxes, find_objects(predicted)]
        scores[key] = []
        for values in protocol.labels.values():
            # masks only where a label is: whole images are large, organs aren't
            window = _enclose(values, boxes, predicted.ndim)
            masks = [np.isin(labels[window], values) for labels in (expected, predicted)]
            scores[key].append(measure(*masks, grid.spacing, protocol.tolerance, diagonal))
    return scores


def _require_same_grid(file: Path, own: Grid, reference: Grid, placed: bool):
    for what in ("shape", "spacing"):
        mine, expected = getattr(own, what), getattr(reference, what)
        if len(mine) != len(expected) or not np.allclose(mine, expected, rtol=1e-3):
            raise click.ClickException(
                f"{file} has the {what} {_format(mine)}, but its reference {_format(expected)}: resample it."
            )
    mine, expected = own.placement, reference.placement
    # hundredths of mm are rounding
    if placed and (len(mine) != len(expected) or not np.allclose(mine, expected, rtol=1e-3, atol=1e-2)):
        raise click.ClickException(
            f"{file} has another origin or direction than its reference, so its voxels are elsewhere: resample it."
        )


def _format(numbers: Sequence[float]) -> str:
    return " × ".join(f"{n:g}" for n in numbers)


def _enclose(values: Sequence[int], boxes: Sequence[list], dimensions: int) -> tuple[slice, ...]:
    """The smallest window with all voxels of some values; ``boxes`` are lists by value − 1, from ``find_objects``."""
    own = [found[v - 1] for found in boxes for v in values if v <= len(found) and found[v - 1]]
    if not own:
        return (slice(0),) * dimensions
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*own, strict=True))


def measure(
    expected: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], tolerance: float, diagonal: float
) -> list[float]:
    """Dice, NSD and HD95 of a pair of masks; outside of the arrays there is nothing.

    Args:
        expected, predicted: boolean, of one shape, 2D or 3D.
        spacing: mm for each axis.
        tolerance: of the NSD, in mm.
        diagonal: HD95 if exactly one mask is empty, in mm.
    """
    sizes = expected.sum(), predicted.sum()
    if not all(sizes):
        return [0.0, 0.0, diagonal] if any(sizes) else [1.0, 1.0, 0.0]
    dice = 2 * (expected & predicted).sum() / sum(sizes)
    # seconds that a call with known scores, or one that refuses, need not wait
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    masks = [torch.from_numpy(np.ascontiguousarray(m))[None, None] for m in (predicted, expected)]
    options = dict(include_background=True, spacing=list(spacing))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of MONAI to itself
        nsd = compute_surface_dice(*masks, [tolerance], use_subvoxels=True, **options)
        hd95 = compute_hausdorff_distance(*masks, percentile=95, **options)
    return [float(dice), float(nsd), float(hd95)]
