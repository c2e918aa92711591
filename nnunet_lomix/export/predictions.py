"""Whether two models predict alike."""

import contextlib
import io
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_lomix.errors import LoMixError, describe
from nnunet_lomix.nnunet.datasets import name_image
from nnunet_lomix.nnunet.results import FINAL

Case = tuple[np.ndarray, dict[str, Any]]  # pixels (channels first) and properties, as nnU-Net's readers give them


def find_cases(images: Sequence[str], dataset_json: dict[str, Any]) -> dict[str, list[str]]:
    """For each case, by name, the files of all of its channels in nnU-Net's order.

    Args:
        images: one image of each case.
        dataset_json: content of the file.

    Raises:
        LoMixError: an image isn't named as nnU-Net's raw images are, or a channel isn't there.
    """
    ending = dataset_json["file_ending"]
    cases = {}
    for image in map(Path, images):
        name = re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", image.name)
        if not name:
            raise LoMixError(f"{image} is not named as nnU-Net's images are, CASE_0000{ending}: rename it.")
        channels = range(len(dataset_json["channel_names"]))
        files = [image.with_name(name_image(name[1], channel, ending)) for channel in channels]
        for file in files:
            if not file.is_file():
                raise LoMixError(f"{file} isn't there, and the model needs this channel of {name[1]}.")
        cases[name[1]] = [str(file) for file in files]
    return cases


def read_case(plans: dict[str, Any], channels: list[str]) -> Case:
    """A case by nnU-Net's reader.

    Args:
        plans: content of the file, which names the reader.
        channels: the file of each channel.

    Raises:
        LoMixError: it can't be read.
    """
    try:
        return PlansManager(plans).image_reader_writer_class().read_images(channels)
    except Exception as error:  # the libraries below the readers raise anything
        raise LoMixError(f"nnU-Net can't read {', '.join(channels)}: {describe(error)}") from None


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
        try:
            predictor.initialize_from_trained_model_folder(str(model), tuple(folds), FINAL)
        # nnU-Net imports what it searches for the trainer, which may raise anything at all
        except (Exception, SystemExit) as error:
            raise LoMixError(f"nnU-Net can't load {model}: {describe(error)}") from error
        if predictor.configuration_manager.previous_stage_name is not None:
            raise LoMixError("The second stage of a cascade can't predict an image alone: export without --case.")
        return predictor.predict_single_npy_array(*deepcopy(case), save_or_return_probabilities=True)
