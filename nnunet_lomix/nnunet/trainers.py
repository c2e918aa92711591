"""Which trainer nnU-Net itself takes for a name, that of ``-tr`` or of a checkpoint."""

import contextlib
import io

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_lomix.errors import LoMixError, describe


class TrainerNotFound(LoMixError):
    """No trainer of that name is installed here."""


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """The class, by nnU-Net's own look-up.

    Raises:
        TrainerNotFound: the look-up found no such trainer.
        LoMixError: the look-up failed, mostly since a module that nnU-Net searches can't be imported.
    """
    not_found = (
        f"Could not find requested nnunet trainer {name} ",  # nnU-Net's
        f"nnunet_lomix has no trainer {name!r}",  # of our own folder, for a name that looks like one of ours
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the look-up prints where it searches
            return recursive_find_trainer_class_by_name(name)
    # the modules that nnU-Net searches may raise anything at all when they are imported
    except (Exception, SystemExit) as error:
        if str(error).startswith(not_found):
            raise TrainerNotFound(f"nnU-Net finds no trainer {name}.") from None
        raise LoMixError(f"nnU-Net's look-up of trainers failed: {describe(error)}.") from error
