"""The trainers, for nnU-Net's ``-tr`` and for subclasses of your own.

A training length is part of the name, as in nnU-Net: ``nnUNetTrainerLoMix_50epochs``. Any number of epochs works,
and any of the trainers below; such a class is made when it is first asked for.
"""

import os
import re
from difflib import get_close_matches

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.registration import FOLDER, VARIABLE
from nnunet_lomix.trainers.base import ending_with_a_sentence
from nnunet_lomix.trainers.baselines import (
    nnUNetTrainerAdditiveMix,
    nnUNetTrainerEqualDeepSupervision,
    nnUNetTrainerLoMixFixedWeights,
    nnUNetTrainerLoMixPaper,
)
from nnunet_lomix.trainers.emcad import (
    nnUNetTrainerEMCAD,
    nnUNetTrainerEMCADAdditiveMix,
    nnUNetTrainerEMCADEqualDeepSupervision,
    nnUNetTrainerEMCADLoMix,
    nnUNetTrainerEMCADLoMixPaper,
    nnUNetTrainerEMCADSingleOutput,
)
from nnunet_lomix.trainers.lomix import nnUNetTrainerLoMix

TRAINERS = (
    nnUNetTrainerLoMix,
    nnUNetTrainerLoMixFixedWeights,
    nnUNetTrainerLoMixPaper,
    nnUNetTrainerAdditiveMix,
    nnUNetTrainerEqualDeepSupervision,
    nnUNetTrainerEMCAD,
    nnUNetTrainerEMCADSingleOutput,
    nnUNetTrainerEMCADLoMix,
    nnUNetTrainerEMCADLoMixPaper,
    nnUNetTrainerEMCADAdditiveMix,
    nnUNetTrainerEMCADEqualDeepSupervision,
)
__all__ = [t.__name__ for t in TRAINERS]


def __getattr__(name: str) -> type:
    base_name, _, length = name.rpartition("_")
    epochs = re.fullmatch(r"([1-9]\d*)epochs?", length)
    if base_name not in __all__ or not epochs:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    doc = f"{base_name} for {epochs[1]} epochs."
    attributes = {"epochs": int(epochs[1]), "__module__": __name__, "__doc__": doc}
    # kept in the module: a second look-up gives the same class, and it can be pickled
    return globals().setdefault(name, type(name, (globals()[base_name],), attributes))


@ending_with_a_sentence()
def find_trainer(name: str) -> type:
    """The trainer of that name, for nnU-Net's look-up.

    Raises:
        SystemExit: no trainer has that name, but one of ours is alike, and our folder is the last that is searched.
        AttributeError: no trainer has that name.
    """
    try:
        return globals()[name] if name in __all__ else __getattr__(name)
    except AttributeError:
        alike = get_close_matches(name.partition("_")[0], __all__, n=1, cutoff=0.85)
        if not alike or os.environ.get(VARIABLE, "").split(os.pathsep)[-1] != FOLDER:
            raise
        raise LoMixError(
            f"nnunet_lomix has no trainer {name!r}. Did you mean {alike[0]!r}? For a training length, append "
            f"_<number>epochs to one of these; for a class of your own, add its folder to {VARIABLE} and set epochs in "
            "it. 'nnunet_lomix info' lists the trainers."
        ) from None
