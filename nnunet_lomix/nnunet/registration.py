"""How an unmodified nnU-Net finds our trainers.

nnU-Net (since 2.8.0) looks for trainers that it doesn't ship in the folders listed in the environment
variable ``nnUNet_extTrainer``. torch (since 2.5) calls every entry point of the group
``torch.backends`` at the end of ``import torch``; ours, :func:`register`, appends our look-up folder to
that variable. So every process that uses torch knows the trainers, DDP workers included.
"""

import os

VARIABLE = "nnUNet_extTrainer"
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "lookup")


def register() -> None:
    """Append our look-up folder to ``nnUNet_extTrainer``, once, behind the folders of the user.

    Never raises: an exception here would make ``import torch`` fail.
    """
    try:
        folders = [f for f in os.environ.get(VARIABLE, "").split(os.pathsep) if f]
        if FOLDER not in folders:
            os.environ[VARIABLE] = os.pathsep.join([*folders, FOLDER])
    except Exception:  # whatever it is, torch matters more; 'nnunet_lomix info' then says what is missing
        return
