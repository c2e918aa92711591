"""What a training leaves in nnU-Net's results folder, and where.

A *model folder* ``RESULTS/DATASET/TRAINER__PLANS__CONFIGURATION`` holds ``plans.json``, ``dataset.json`` and a *fold
folder* for each fold, with checkpoints and the validation. :class:`ModelFolder` and :class:`FoldFolder` know the names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.checkpoints import CheckpointError, read_checkpoint

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
PLANS, DATASET_JSON, FINGERPRINT = "plans.json", "dataset.json", "dataset_fingerprint.json"
VALIDATION = "validation"
SUMMARY = f"{VALIDATION}/summary.json"
PROGRESS = "progress.png"  # the curves that nnU-Net draws
NAME_THE_MODEL = "name the folder TRAINER__PLANS__CONFIGURATION that nnU-Net has trained"
EPOCH_COLUMNS = ["epoch", "pseudo_dice", "train_loss", "seconds"]
CURVE_COLUMNS = ["trainer", "seed", "fold", *EPOCH_COLUMNS]
# columns of the curves, and what nnU-Net calls them in its log
LOGGED = {
    "pseudo_dice": "mean_fg_dice",
    "train_loss": "train_losses",
    "start": "epoch_start_timestamps",
    "end": "epoch_end_timestamps",
}


@dataclass(frozen=True)
class FoldFolder:
    """``fold_0``, ``fold_1``, … or ``fold_all``."""

    path: Path

    @property
    def fold(self) -> str:
        """``"0"``, …, ``"all"``."""
        return self.path.name.removeprefix("fold_")

    @property
    def validation(self) -> Path:
        """Folder of the predicted validation cases."""
        return self.path / VALIDATION

    def is_finished(self) -> bool:
        """Whether the training has ended; the validation follows."""
        return (self.path / FINAL).is_file()

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that nnU-Net keeps: the final one, or else where ``--c`` would go on."""
        files = (self.path / name for name in (FINAL, LATEST, BEST))
        return next((file for file in files if file.is_file()), None)

    def read_summary(self) -> dict[str, Any]:
        """nnU-Net's ``summary.json`` of the validation.

        Raises:
            LoMixError: it isn't there, or isn't nnU-Net's.
        """
        return read_json(
            self.path / SUMMARY, "metric_per_case", "foreground_mean", remedy="run nnUNetv2_train with --val"
        )

    def read_curves(self) -> pd.DataFrame:
        """A row for each epoch that has ended, from the log in the last checkpoint; no rows if there is none.

        Returns:
            Columns ``epoch``, ``pseudo_dice`` (0 to 1, mean over classes as nnU-Net's; NaN if it is undefined),
            ``train_loss`` and ``seconds``.

        Raises:
            CheckpointError: the checkpoint can't be used.
        """
        file = self.last_checkpoint()
        log = {} if file is None else read_checkpoint(file).get("logging", {})
        try:
            curves = pd.DataFrame({name: pd.Series(log.get(key, []), dtype=float) for name, key in LOGGED.items()})
        except (AttributeError, TypeError, ValueError):
            raise CheckpointError(f"{file} has a log that nnU-Net doesn't write: it is damaged or forged.") from None
        curves = curves[curves["end"].notna()]
        return curves.assign(epoch=curves.index, seconds=curves["end"] - curves["start"])[EPOCH_COLUMNS]


@dataclass(frozen=True)
class ModelFolder:
    """``TRAINER__PLANS__CONFIGURATION`` below a dataset."""

    path: Path

    @classmethod
    def of(cls, results: Path, dataset: str, trainer: str, plans: str, configuration: str) -> "ModelFolder":
        """Where nnU-Net writes; ``dataset`` is its name, ``results`` what ``nnUNet_results`` names."""
        return cls(results / dataset / f"{trainer}__{plans}__{configuration}")

    def fold(self, fold: int | str) -> FoldFolder:
        return FoldFolder(self.path / f"fold_{fold}")

    def folds(self) -> list[FoldFolder]:
        """The fold folders of the model that are there, sorted by name."""
        return [FoldFolder(path) for path in sorted(self.path.glob("fold_*")) if path.is_dir()]

    def read_plans(self) -> dict[str, Any]:
        """``plans.json``.

        Raises:
            LoMixError: it isn't there, or isn't nnU-Net's.
        """
        return read_json(self.path / PLANS, "dataset_name", "plans_name", "configurations", remedy=NAME_THE_MODEL)

    def read_dataset_json(self) -> dict[str, Any]:
        """``dataset.json``.

        Raises:
            LoMixError: it isn't there, or isn't nnU-Net's.
        """
        return read_dataset_json(self.path)


def list_folds(folder: Path) -> list[FoldFolder]:
    """The fold that a folder is, or else those of the model folder that it is; none if it is neither."""
    return [FoldFolder(folder)] if folder.name.startswith("fold_") else ModelFolder(folder).folds()


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """``dataset.json`` of a dataset, of a model or of a folder of predictions.

    Raises:
        LoMixError: it isn't there, or isn't nnU-Net's.
    """
    return read_json(folder / DATASET_JSON, "labels", "file_ending", remedy=NAME_THE_MODEL)


def read_json(file: Path, *keys: str, remedy: str = "nnU-Net writes it beside what it trains") -> dict[str, Any]:
    """A file of nnU-Net's that is an object.

    Args:
        file: which.
        keys: that it must have.
        remedy: what the user should do if it isn't there, for the message.

    Raises:
        LoMixError: it isn't there, can't be read, or is something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoMixError(f"{file} isn't there: {remedy}.") from None
    except (OSError, ValueError) as error:
        raise LoMixError(f"{file} can't be read: {error}.") from None
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise LoMixError(f"{file} is not nnU-Net's: it lacks one of {', '.join(keys)}.")
    return content


def read_curves(models: Mapping[tuple[str, int], ModelFolder], folds: Sequence[str]) -> pd.DataFrame:
    """The curves of several trainings, as :meth:`FoldFolder.read_curves` gives them.

    Args:
        models: by trainer and seed.
        folds: of each of them; one without a checkpoint has no rows.

    Returns:
        ``CURVE_COLUMNS``: ``trainer``, ``seed`` and ``fold``, and those of one training.

    Raises:
        CheckpointError: a checkpoint can't be used.
    """
    curves = [
        model.fold(fold).read_curves().assign(trainer=trainer, seed=seed, fold=fold)
        for (trainer, seed), model in models.items()
        for fold in folds
    ]
    curves = [own for own in curves if len(own)]
    return pd.concat(curves, ignore_index=True)[CURVE_COLUMNS] if curves else pd.DataFrame(columns=CURVE_COLUMNS)
