"""Learning curves, from the log in nnU-Net's checkpoints."""

from collections.abc import Mapping, Sequence

import pandas as pd

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.checkpoints import read_checkpoint
from nnunet_lomix.nnunet.results import FoldFolder, ModelFolder

EPOCH_COLUMNS = ["epoch", "pseudo_dice", "train_loss", "seconds"]
CURVE_COLUMNS = ["trainer", "seed", "fold", *EPOCH_COLUMNS]
# columns of the curves, and what nnU-Net calls them in its log
LOGGED = {
    "pseudo_dice": "mean_fg_dice",
    "train_loss": "train_losses",
    "start": "epoch_start_timestamps",
    "end": "epoch_end_timestamps",
}


def read_curves(fold: FoldFolder) -> pd.DataFrame:
    """A row for each epoch that has ended, from the log in the last checkpoint; no rows if there is none.

    Returns:
        Columns ``epoch``, ``pseudo_dice`` (0 to 1, mean over classes as nnU-Net's; NaN if it is undefined),
        ``train_loss`` and ``seconds``.

    Raises:
        LoMixError: the checkpoint can't be used.
    """
    file = fold.last_checkpoint()
    log = {} if file is None else read_checkpoint(file).get("logging", {})
    try:
        curves = pd.DataFrame({name: pd.Series(log.get(key, []), dtype=float) for name, key in LOGGED.items()})
    except Exception:  # anything at all may be in its place
        raise LoMixError(f"{file} has a log that nnU-Net doesn't write: it is damaged or forged.") from None
    curves = curves[curves["end"].notna()]
    return curves.assign(epoch=curves.index, seconds=curves["end"] - curves["start"])[EPOCH_COLUMNS]


def read_all_curves(models: Mapping[tuple[str, int], ModelFolder], folds: Sequence[str]) -> pd.DataFrame:
    """``CURVE_COLUMNS`` of several trainings: :func:`read_curves` of each, behind its trainer, seed and fold.

    Args:
        models: by trainer and seed.
        folds: of each of them; one without a checkpoint has no rows.

    Raises:
        LoMixError: a checkpoint can't be used.
    """
    curves = [
        read_curves(model.fold(fold)).assign(trainer=trainer, seed=seed, fold=fold)
        for (trainer, seed), model in models.items()
        for fold in folds
    ]
    curves = [own for own in curves if len(own)]
    return pd.concat(curves, ignore_index=True)[CURVE_COLUMNS] if curves else pd.DataFrame(columns=CURVE_COLUMNS)
