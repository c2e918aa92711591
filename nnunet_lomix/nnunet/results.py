"""What a training leaves in nnU-Net's results folder, and where.

A *model folder* ``RESULTS/DATASET/TRAINER__PLANS__CONFIGURATION`` holds ``plans.json``, ``dataset.json`` and a *fold
folder* for each fold, with checkpoints and the validation. :class:`ModelFolder` and :class:`FoldFolder` know the names.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_lomix.errors import LoMixError

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
PLANS, DATASET_JSON, FINGERPRINT = "plans.json", "dataset.json", "dataset_fingerprint.json"
VALIDATION = "validation"
SUMMARY = f"{VALIDATION}/summary.json"
PROGRESS = "progress.png"  # the curves that nnU-Net draws
SECONDS_TO_WRITE = 3600  # a checkpoint that is younger than its last epoch by more is a copy
NAME_THE_MODEL = "name the folder TRAINER__PLANS__CONFIGURATION that nnU-Net has trained"


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

    def is_validated(self) -> bool:
        """Whether the validation has ended, and is of the final checkpoint that is there."""
        return (self.path / SUMMARY).is_file() and not self.has_stale_validation()

    def has_stale_validation(self) -> bool:
        """Whether there is a validation, whole or in part, of a training before the one that has ended."""
        summary = self.path / SUMMARY
        files = [summary] if summary.is_file() else self.validation.glob("*")
        return any(map(self.is_outdated, files))

    def is_outdated(self, file: Path) -> bool:
        """Whether a file that is made with the final checkpoint is older than it.

        The times of both files decide. But a copied checkpoint has the time of the copying, which says nothing; then
        it is the end of its last epoch.
        """
        final = self.path / FINAL
        if not final.is_file():
            return False
        made, written = file.stat().st_mtime, final.stat().st_mtime
        if made >= written:
            return False
        from nnunet_lomix.nnunet.checkpoints import read_checkpoint  # torch, which takes seconds

        try:
            ended = float(read_checkpoint(final)["logging"]["epoch_end_timestamps"][-1])
        except (LoMixError, LookupError, TypeError, ValueError):  # damaged, or not nnU-Net's
            return True
        return made < (ended if written - ended > SECONDS_TO_WRITE else written)

    def last_checkpoint(self) -> Path | None:
        """The final checkpoint, or else the one from which ``--c`` would go on."""
        files = (self.path / name for name in (FINAL, LATEST, BEST))
        return next((file for file in files if file.is_file()), None)


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
        """``plans.json``; a :class:`LoMixError` if it isn't there, or isn't nnU-Net's."""
        types = {"dataset_name": str, "plans_name": str, "configurations": dict}
        return read_json(self.path / PLANS, remedy=NAME_THE_MODEL, **types)

    def read_dataset_json(self) -> dict[str, Any]:
        """``dataset.json``, as :func:`read_dataset_json` reads it."""
        return read_dataset_json(self.path)


def read_dataset_json(folder: Path, remedy: str = NAME_THE_MODEL) -> dict[str, Any]:
    """``dataset.json`` of a dataset, of a model or of a folder of predictions; the remedy is that of :func:`read_json`.

    Raises:
        LoMixError: it isn't there, or isn't nnU-Net's.
    """
    return read_json(folder / DATASET_JSON, "labels", remedy=remedy, file_ending=str)


def read_json(
    file: Path, *keys: str, remedy: str = "nnU-Net writes it beside what it trains", **types: type
) -> dict[str, Any]:
    """A JSON file of nnU-Net's that is an object.

    Args:
        file: its path.
        keys: that it must have.
        remedy: what the user should do if it isn't there or damaged, for the message.
        types: further keys that it must have, ``str`` or ``dict`` as nnU-Net gives them.

    Raises:
        LoMixError: it isn't there, can't be read, or is something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # with or without the mark of Windows' editors
    except FileNotFoundError:
        raise LoMixError(f"{file} isn't there: {remedy}.") from None
    except OSError as error:
        raise LoMixError(f"{file} can't be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # no JSON, or nested too deeply
        raise LoMixError(f"{file} can't be read: {error}; {remedy}.") from None
    if not isinstance(content, dict) or not {*keys, *types} <= content.keys():
        raise LoMixError(f"{file} is not nnU-Net's: it lacks one of {', '.join((*keys, *types))}.")
    for key, kind in types.items():
        if not isinstance(content[key], kind):
            raise LoMixError(f"{file} is not nnU-Net's: its {key} is not {'a text' if kind is str else 'an object'}.")
    return content
