"""Whether two models predict alike."""

import contextlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_paths_fn

from nnunet_lomix.errors import LoMixError, explaining
from nnunet_lomix.nnunet.datasets import require_utf8
from nnunet_lomix.nnunet.results import FINAL

Case = tuple[np.ndarray, dict[str, Any]]  # pixels (channels first) and properties, as nnU-Net's readers give them


def find_cases(images: Sequence[str], ending: str) -> dict[str, list[str]]:
    """For each case, by name, its files in the order of their channel numbers, collected as nnU-Net does.

    Args:
        images: one image of each case; its other files are found beside it. A file may hold several channels, as an
            RGB picture does.
        ending: of the image files, as dataset.json has it.

    Raises:
        LoMixError: an image isn't named as nnU-Net's raw images are.
    """
    cases = {}
    for image in map(Path, images):
        name = re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", image.name)
        if not name:
            raise LoMixError(f"{image} is not named as nnU-Net's images are, CASE_0000{ending}: rename it.")
        cases[name[1]] = create_paths_fn(str(image.parent), sorted(os.listdir(image.parent)), ending, name[1])
    return cases


def read_case(plans: dict[str, Any], channel_names: Mapping[str, str], files: Sequence[str]) -> Case:
    """A case by nnU-Net's reader.

    Args:
        plans: content of the file, which names the reader.
        channel_names: those of the model, as dataset.json has them.
        files: those of the case.

    Raises:
        LoMixError: it can't be read, or has another number of channels than the model.
    """
    for file in files:
        require_utf8(file)
    with explaining(f"nnU-Net can't read {', '.join(files)}"):
        pixels, properties = PlansManager(plans).image_reader_writer_class().read_images(files)
    if len(pixels) != len(channel_names):
        names = ", ".join(map(str, channel_names.values()))
        raise LoMixError(
            f"The number of channels is {len(pixels)} in {', '.join(files)}, but {len(channel_names)} in the model "
            f"({names}): keep the files of all channels of a case, and no others, beside each other, numbered as "
            "nnU-Net's are."
        )
    return pixels, properties


def compare_predictions(original: Path, exported: Path, folds: Sequence[int | str], case: Case) -> str:
    """Predict a case with all folds of both models, as nnUNetv2_predict does, on the CPU, where it repeats exactly.

    Args:
        original, exported: folders of the models.
        folds: numbers, or ``"all"``.
        case: as from :func:`read_case`.

    Returns:
        That they agree bit for bit, and in how much.

    Raises:
        LoMixError: they don't agree, or one of them can't predict.
    """
    segmentation, probabilities = _predict(original, folds, case)
    other_segmentation, other_probabilities = _predict(exported, folds, case)
    if not (
        np.array_equal(segmentation, other_segmentation) and probabilities.tobytes() == other_probabilities.tobytes()
    ):
        raise LoMixError("The predictions of the original and the exported model differ: nothing was exported.")
    shape = " x ".join(map(str, segmentation.shape))
    return f"same segmentation ({shape}) and same probabilities ({probabilities.size} values), bit for bit"


def _predict(model: Path, folds: Sequence[int | str], case: Case) -> tuple[np.ndarray, np.ndarray]:
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        with explaining(f"nnU-Net can't load {model}"):
            predictor.initialize_from_trained_model_folder(str(model), tuple(folds), FINAL)
        if predictor.configuration_manager.previous_stage_name is not None:
            raise LoMixError("The second stage of a cascade can't predict an image alone: export without --case.")
        with explaining(f"nnU-Net can't predict by {model}"):
            return predictor.predict_single_npy_array(*deepcopy(case), save_or_return_probabilities=True)
