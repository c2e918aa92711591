"""What a trainer refuses for a plan, told before any training starts."""

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import NoReturn

import torch
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_lomix.errors import LoMixError, describe

# how others' code refuses what it is given; another exception may come of the place, as a node without a GPU
REFUSALS = (AssertionError, NotImplementedError, ValueError)


class _Network(Exception):
    """The trainer wants its network, and so has refused nothing before."""


def require_trainable(trainer: str, dataset: str, plans: str, configuration: str) -> None:
    """Make a trainer as nnU-Net does, and its loss, but not its network; it leaves nothing behind.

    Args:
        trainer: name of a trainer that is there.
        dataset, plans, configuration: names of what is planned.

    Raises:
        LoMixError: the trainer refuses; the sentence is its own, or names it.
    """

    def refuse_to_build(plans_manager: object, *others: object) -> NoReturn:
        raise _Network

    with _unseen():
        try:
            made = get_trainer_from_args(dataset, configuration, 0, trainer, plans, device=torch.device("cpu"))
            made.build_network_architecture = refuse_to_build
            with contextlib.suppress(_Network):
                made.initialize()
            made._build_loss()
        except (SystemExit, LoMixError) as error:
            raise LoMixError(str(error)) from None
        except REFUSALS as error:
            what = f"{trainer} can't train {dataset} {plans} {configuration}"
            raise LoMixError(f"{what}: {describe(error).rstrip('.')}.") from error
        except Exception:  # the training will tell
            return


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """What a trainer writes, prints, warns of and logs in the block is not kept."""
    logger, environment = logging.getLogger("nnunet_lomix"), os.environ.copy()
    handlers, level = list(logger.handlers), logger.level
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        os.environ |= {"nnUNet_results": folder, "nnUNet_wandb_enabled": "0"}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            logger.handlers[:] = handlers
            logger.setLevel(level)
