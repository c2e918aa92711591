"""A small valid setting: nnU-Net's three folders with two trained models, and plain folders of segmentations.

Nothing is trained: the files are written as nnU-Net and our trainers write them, and every command accepts them.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage.io import imsave

from nnunet_lomix.nnunet.commands import folders_below
from nnunet_lomix.weights.history import write_history
from tests.convert.downloads import write_synapse

DATASET = "Dataset009_Toy"
TRAINERS = ("nnUNetTrainer", "nnUNetTrainerLoMix")
MODELS = tuple(f"results/{DATASET}/{trainer}__nnUNetPlans__2d" for trainer in TRAINERS)
VALIDATED = {"0": ("a", "b", "c"), "1": ("d", "e", "f")}  # the cases of each fold
CASES = [case for cases in VALIDATED.values() for case in cases]
SHAPE = (1, 8, 8)  # z, y, x
DATASET_JSON = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "liver": 1, "tumour": 2},
    "numTraining": len(CASES),
    "file_ending": ".nii.gz",
}
NETWORK = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2,
        "features_per_stage": [2, 2],
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "kernel_sizes": [[3, 3], [3, 3]],
        "strides": [[1, 1], [2, 2]],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
CONFIGURATION = {
    "data_identifier": "nnUNetPlans_2d",
    "preprocessor_name": "DefaultPreprocessor",
    "batch_size": 2,
    "patch_size": [8, 8],
    "median_image_size_in_voxels": [8.0, 8.0],
    "spacing": [1.0, 1.0],
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [False],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": RESAMPLING,
    "resampling_fn_seg_kwargs": RESAMPLING | {"is_seg": True, "order": 1},
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities_kwargs": RESAMPLING | {"order": 1},
    "architecture": NETWORK,
    "batch_dice": True,
}
PLANS_JSON = {
    "dataset_name": DATASET,
    "plans_name": "nnUNetPlans",
    "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
    "original_median_shape_after_transp": [1, 8, 8],
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "configurations": {"2d": CONFIGURATION},
    "experiment_planner_used": "ExperimentPlanner",
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0, "std": 1.0}},
}
# of this one only checkpoints are there
UNTABLED = f"results/{DATASET}/nnUNetTrainerLoMixFixedWeights__nnUNetPlans__2d"
WEIGHTS = {"z_0": 0.6, "z_1": 0.1, "add_0_1": 0.2, "multiply_0_1": 0.1}
PLAN = f"""
datasets: 9
configurations: 2d
trainers: [{", ".join(TRAINERS)}, nnUNetTrainer_5epochs]
folds: [0, 1]
device: cpu
"""


def write_world(folder: Path) -> None:
    """Write everything below a folder."""
    preprocessed, raw = folder / "preprocessed" / DATASET, folder / "raw" / DATASET
    configuration = preprocessed / "nnUNetPlans_2d"
    configuration.mkdir(parents=True)
    write_json(preprocessed / "splits_final.json", make_splits())
    write_json(raw / "dataset.json", DATASET_JSON)
    write_json(preprocessed / "dataset.json", DATASET_JSON)
    write_json(preprocessed / "nnUNetPlans.json", PLANS_JSON)
    (folder / "plan.yaml").write_text(PLAN)
    write_synapse(folder / "download")
    for number, case in enumerate(CASES):
        save(make_labels(number), preprocessed / "gt_segmentations" / f"{case}.nii.gz")
        save(make_labels(number).astype(np.float32), raw / "imagesTr" / f"{case}_0000.nii.gz")
        for ending in (".pkl", ".b2nd", "_seg.b2nd"):
            (configuration / f"{case}{ending}").touch()
    for seed, (trainer, model) in enumerate(zip(TRAINERS, MODELS, strict=True), 1):
        write_model(folder / model, trainer, 100 * seed)
        for fold in VALIDATED if trainer != "nnUNetTrainer" else ():
            write_history([WEIGHTS, WEIGHTS], folder / model / f"fold_{fold}")
    write_model(folder / UNTABLED, "nnUNetTrainerLoMixFixedWeights", 300)
    write_json(folder / "nii" / "before" / "dataset.json", DATASET_JSON)
    for suffix in (".nii.gz", ".png"):
        for seed, name in enumerate(("references", "before", "after")):
            for number, case in enumerate(CASES):
                save(make_labels(number + 10 * seed), folder / suffix[1:4] / name / f"{case}{suffix}")


def make_splits() -> list[dict[str, list[str]]]:
    """As nnU-Net's: the training cases of a fold are those that no other fold is validated on."""
    return [{"train": [c for c in CASES if c not in cases], "val": list(cases)} for cases in VALIDATED.values()]


def write_model(model: Path, trainer: str, seed: int) -> None:
    write_json(model / "plans.json", PLANS_JSON)
    write_json(model / "dataset.json", DATASET_JSON)
    write_json(model / "dataset_fingerprint.json", {"spacings": [[1.0, 1.0, 1.0]]})
    for fold, cases in VALIDATED.items():
        validation = model / f"fold_{fold}" / "validation"
        for number, case in enumerate(cases):
            save(make_labels(seed + number), validation / f"{case}.nii.gz")
        write_json(validation / "summary.json", make_summary(cases))
        torch.save(make_checkpoint(trainer, fold), validation.parent / "checkpoint_final.pth")
        save(make_labels(seed), validation.parent / "progress.png")


def make_summary(cases: tuple[str, ...]) -> dict:
    metrics = {str(label): {"Dice": 0.5, "IoU": 0.4, "n_pred": 9, "n_ref": 8} for label in (1, 2)}
    files = [{"metrics": metrics, "prediction_file": f"{c}.nii.gz", "reference_file": f"{c}.nii.gz"} for c in cases]
    return {"foreground_mean": metrics["1"], "mean": metrics, "metric_per_case": files}


def make_checkpoint(trainer: str, fold: str) -> dict:
    manager = PlansManager(PLANS_JSON)
    torch.manual_seed(int(fold))
    network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration("2d"), 1, 3, False)
    numbers = [np.float64(0.5), np.float64(0.6)]
    keys = ("mean_fg_dice", "ema_fg_dice", "train_losses", "val_losses", "lrs")
    log = dict.fromkeys(keys, numbers) | {"dice_per_class_or_region": [numbers, numbers]}
    log |= {"epoch_start_timestamps": [0.0, 2.0], "epoch_end_timestamps": [1.0, 3.0]}
    ours = {"lomix": {"rule": "barrier", "history": [WEIGHTS, WEIGHTS]}} if trainer != "nnUNetTrainer" else {}
    return {
        "network_weights": network.state_dict(),
        "optimizer_state": {"state": {}, "param_groups": []},
        "grad_scaler_state": None,
        "logging": log,
        "_best_ema": 0.6,
        "current_epoch": 2,
        "init_args": {"plans": PLANS_JSON, "configuration": "2d", "fold": int(fold), "dataset_json": DATASET_JSON},
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": (0, 1),
        **ours,
    }


def make_labels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, SHAPE).astype(np.uint8)


def save(labels: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".png":
        imsave(file, labels[0], check_contrast=False)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(labels), file)


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The block runs in the folder of a setting, whose variables are set."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, {**folders_below(folder), "COLUMNS": "200"}):
            yield
    finally:
        os.chdir(before)
