"""What a trained model predicts for a case, as nnUNetv2_predict does it."""

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
from nnunet_lomix.nnunet.results import FINAL, FoldFolder

Case = tuple[np.ndarray, dict[str, Any]]  # pixels (channels first) and properties, as nnU-Net's readers give them


def read_case(image: Path, plans: dict[str, Any], dataset_json: Mapping[str, Any]) -> tuple[str, Case]:
    """A case with all of its channels, by nnU-Net's reader, and its name.

    Args:
        image: one of its files, ``CASE_0000.ENDING``; the others are found beside it. A file may hold several channels,
            as an RGB picture does.
        plans: content of the model's plans.json, which names the reader.
        dataset_json: content of its dataset.json, with the ending of files and the names of channels.

    Raises:
        LoMixError: it isn't named as nnU-Net's raw images are, can't be read, or has another number of channels than
            the model.
    """
    ending, channels = dataset_json["file_ending"], dataset_json["channel_names"]
    name = re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", image.name)
    if name is None:
        raise LoMixError(f"{image} is not named as nnU-Net's images are, CASE_0000{ending}: rename it.")
    files = create_paths_fn(str(image.parent), sorted(os.listdir(image.parent)), ending, name[1])
    for file in files:
        require_utf8(file)
    with explaining(f"nnU-Net can't read {', '.join(files)}"):
        pixels, properties = PlansManager(plans).image_reader_writer_class().read_images(files)
    if len(pixels) != len(channels):
        raise LoMixError(
            f"The number of channels is {len(pixels)} in {', '.join(files)}, but {len(channels)} in the model "
            f"({', '.join(map(str, channels.values()))}): keep the files of all channels of a case, and no others, "
            "beside each other, numbered as nnU-Net's are."
        )
    return name[1], (pixels, properties)


def predict(model: Path, folds: Sequence[FoldFolder], case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Segmentation and probabilities by all folds of a model together, on the CPU, where it repeats exactly.

    Raises:
        LoMixError: the model can't predict.
    """
    numbers = tuple(int(fold.fold) if fold.fold.isdecimal() else fold.fold for fold in folds)
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        with explaining(f"nnU-Net can't load {model}"):
            predictor.initialize_from_trained_model_folder(str(model), numbers, FINAL)
        if predictor.configuration_manager.previous_stage_name is not None:
            raise LoMixError("The second stage of a cascade can't predict an image alone: export without --case.")
        with explaining(f"nnU-Net can't predict by {model}"):
            return predictor.predict_single_npy_array(*deepcopy(case), save_or_return_probabilities=True)
