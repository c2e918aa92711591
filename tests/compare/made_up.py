"""Comparisons of made-up scores, with or without files for their pictures."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from rich.console import Console

from nnunet_lomix.compare import Comparison, Source
from nnunet_lomix.compare.report import write_report
from nnunet_lomix.compare.scoring import choose_settings
from nnunet_lomix.compare.statistics import compare_trainers

TRAINERS = ("nnUNetTrainer", "nnUNetTrainerLoMix")


def make_scores(
    cases=("a", "b", "c", "d"),
    classes=("liver", "tumour"),
    trainers=TRAINERS,
    seeds=1,
    metrics=("Dice", "HD95"),
    random=0,
) -> pd.DataFrame:
    rng = np.random.default_rng(random)
    rows = [
        (case, name, trainer, seed, metric, rng.uniform(0, 20 if metric == "HD95" else 1))
        for case in cases
        for name in classes
        for trainer in trainers
        for seed in range(seeds)
        for metric in metrics
    ]
    return to_scores(rows)


def to_scores(rows: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["case", "class", "trainer", "seed", "metric", "value"])


def make_curves(trainers=TRAINERS) -> pd.DataFrame:
    rows = [(t, s, f, e, e / 10, -e / 10, 60.0) for t in trainers for s in (0, 1) for f in (0, 1) for e in range(5 + s)]
    columns = ["trainer", "seed", "fold", "epoch", "pseudo_dice", "train_loss", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def make_files(folder: Path, scores: pd.DataFrame, shape=(5, 12, 14), images=True) -> dict:
    """References, predictions and images of all cases, as arguments of :class:`Source`."""

    def write(array, name) -> Path:
        sitk.WriteImage(sitk.GetImageFromArray(array), folder / name)
        return folder / name

    rng = np.random.default_rng(0)
    labels = np.zeros(shape, np.uint8)
    labels[..., 3:8, 3:9] = 1
    reference = write(labels, "reference.nii.gz")
    image = write(rng.normal(size=shape).astype(np.float32), "image.nii.gz")
    predictions = {}
    for j, trainer in enumerate(scores["trainer"].unique()):
        labels[..., 3:8, 6 + j] = 0
        predictions[trainer] = write(labels, f"prediction_{j}.nii.gz")
    cases = scores["case"].unique()
    return {
        "references": dict.fromkeys(cases, reference),
        "predictions": {place: dict.fromkeys(cases, predictions[place[0]]) for place in _trainings(scores)},
        "images": dict.fromkeys(cases, image) if images else {},
    }


def _trainings(scores: pd.DataFrame) -> list[tuple[str, int]]:
    return list(scores[["trainer", "seed"]].drop_duplicates().itertuples(index=False, name=None))


def make_result(scores: pd.DataFrame, tolerance=1.0, resamples=200, notes=(), **source) -> Comparison:
    """All that is known of some scores; by default their files aren't there."""
    cases = {case: Path("nowhere", case) for case in scores["case"].unique()}
    values = {
        "references": cases,
        "predictions": dict.fromkeys(_trainings(scores), cases),
        "folders": {},
        "labels": {name: (i,) for i, name in enumerate(scores["class"].unique(), 1)},
        "ignore": None,
        "reader": SimpleITKIO,
        "dataset": "test",
        "label_source": "test",
    }
    made = Source(**values | source)
    settings = choose_settings(made, list(scores["metric"].unique()), tolerance)
    return Comparison(made, settings, scores, compare_trainers(scores, made.trainers, resamples), tuple(notes))


def report(folder: Path, result: Comparison, width: int = 80) -> str:
    """Writes the report; returns what was printed."""
    printed = io.StringIO()
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder, result, Console(file=printed, width=width))
    return printed.getvalue()
