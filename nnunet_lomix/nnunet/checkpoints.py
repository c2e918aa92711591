"""nnU-Net's checkpoints, read without running what a stranger may have put into them."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from nnunet_lomix.errors import LoMixError, explaining

STATE = "lomix"  # the key of our trainers' state
KEYS = {"network_weights": dict, "trainer_name": str, "init_args": dict, "current_epoch": int}
_READING = Lock()  # what torch allows to be loaded is a setting of the whole process
NUMBERS = (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)


def read_checkpoint(path: str | Path, trusted: bool = False) -> dict[str, Any]:
    """A checkpoint of nnU-Net, on the CPU, memory-mapped.

    torch loads tensors and plain Python values only; beyond these, nnU-Net's logging has numbers of numpy, and these
    are all that is allowed, unless the file is trusted, as nnU-Net trusts the one that it continues.

    Raises:
        LoMixError: the file can't be read, has something else in it that might run code, or isn't nnU-Net's.
    """
    try:
        with _READING, torch.serialization.safe_globals(_allowed()):
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=not trusted)
    except OSError as error:
        raise LoMixError(f"{path} can't be read: {error.strerror or error}.") from None
    # torch names what it refuses; a damaged or forged file makes the unpickler raise anything at all
    except Exception as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if found:
            raise LoMixError(
                f"{path} has {found[1]} in it, which no checkpoint of nnU-Net has: it was not loaded, since loading "
                "may run code; ask who made it."
            ) from None
        raise LoMixError(
            f"{path} is no checkpoint, or is damaged, and was not loaded: copy it again, or remove it if the folder "
            "has another checkpoint."
        ) from None
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), kind) for k, kind in KEYS.items()):
        raise LoMixError(f"{path} is not a checkpoint of nnU-Net: one of {', '.join(KEYS)} isn't what it writes.")
    if not all(isinstance(w, torch.Tensor) for w in checkpoint["network_weights"].values()):
        raise LoMixError(f"{path} is not a checkpoint of nnU-Net: its network_weights aren't all tensors.")
    if not _is_state(checkpoint.get(STATE)):
        raise LoMixError(f"{path} has a {STATE} that no trainer of nnunet_lomix writes: it is damaged or forged.")
    return checkpoint


def require_pretrained(path: str | Path) -> None:
    """Refuse by a LoMixError what nnU-Net can't take by -pretrained_weights: it needs a network's weights alone.

    As nnU-Net does, this runs whatever code is in the file.
    """
    with explaining(f"-pretrained_weights: {path} is no checkpoint"):
        torch.load(path, map_location="cpu", weights_only=False)["network_weights"].items()


def _is_state(state: object) -> bool:
    """None, or what is read of our trainers' state: the rule's name and the weights of each epoch."""
    match state:
        case None:
            return True
        case {"rule": str(), "history": list(history)}:
            return all(isinstance(e, dict) and all(isinstance(w, float) for w in e.values()) for e in history)
    return False


def _allowed() -> list[Callable | tuple[Callable, str]]:  # as torch wants it
    # the function that makes a number has one name since numpy 2 and had another one before; files have either
    modules = ("numpy._core.multiarray", "numpy.core.multiarray")
    return [np.dtype, *(type(np.dtype(number)) for number in NUMBERS), *map(_make_scalar, modules)]


def _make_scalar(module: str) -> Callable[[np.dtype, bytes], np.generic]:
    """Stands for numpy's function of this name, which makes objects and strings, too; this one makes only numbers."""

    def scalar(dtype: np.dtype, data: bytes) -> np.generic:
        if dtype.type not in NUMBERS:
            raise ValueError(f"{dtype} is not among the numbers of a checkpoint")
        return np.frombuffer(data, dtype)[0]

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar
