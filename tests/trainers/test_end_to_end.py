"""Real trainings by nnU-Net's own commands, plain classes: 2d, 3d_fullres, the cascade, resume, prediction."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from ..conftest import CASES, SHAPE, UNVALIDATED

pytestmark = pytest.mark.end_to_end


def segmentation(path):
    array = sitk.GetArrayFromImage(sitk.ReadImage(path))
    assert array.shape == SHAPE
    return array


def test_train_resume_validate_and_predict_2d(own_results, tmp_path):
    nnunet = own_results("classes")
    nnunet.train(701, "2d", **UNVALIDATED)
    fold = nnunet.model("2d") / "fold_0"
    first = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    nnunet.train(701, "2d", "--c", TINY_EPOCHS="2", **UNVALIDATED)
    last = torch.load(fold / "checkpoint_final.pth", weights_only=False)

    assert (first["current_epoch"], last["current_epoch"]) == (1, 2)
    stock_keys = set(last) - {"lomix"}
    assert stock_keys == {
        *("network_weights", "optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch"),
        *("init_args", "trainer_name", "inference_allowed_mirroring_axes"),
    }
    assert "lomix_weights" not in last["logging"]
    assert not torch.equal(first["lomix"]["loss"]["rule.theta"], last["lomix"]["loss"]["rule.theta"])
    assert last["lomix"]["optimizer"]["state"][0]["step"] == last["lomix"]["loss"]["rule.steps"] == 4  # in 2 epochs

    weights = pd.read_csv(fold / "lomix_weights.csv", index_col="epoch")
    assert list(weights.index) == [0, 1]
    assert np.allclose(weights.sum(axis=1), 1, atol=1e-4) and (weights > 0).all(axis=None)
    assert (fold / "lomix_weights.png").stat().st_size > 0
    assert not list(fold.glob("*.tmp"))
    logs = "".join(path.read_text() for path in fold.glob("training_log*"))
    assert logs.count("LoMix weights z_0 0.0") == 2

    assert not (fold / "validation" / "summary.json").exists()
    nnunet.train(701, "2d", "--val")
    assert "foreground_mean" in json.loads((fold / "validation" / "summary.json").read_text())

    images = nnunet.raw / "Dataset701_classes" / "imagesTs"
    by_name = tmp_path / "by_name"
    options = ("-i", images, "-f", 0, "-npp", 1, "-nps", 1, "-device", "cpu")
    nnunet.run("nnUNetv2_predict", "-d", 701, "-c", "2d", "-tr", "nnUNetTrainerLoMixTiny", "-o", by_name, *options)
    segmentation(by_name / f"{CASES[-1]}.nii.gz")


def test_the_cascade(own_results):
    nnunet = own_results("classes")
    # images this small get no cascade from the planner: the plans are completed by hand
    shutil.copytree(nnunet.preprocessed.resolve(), nnunet.folder / "with_cascade")
    nnunet.preprocessed.unlink()
    (nnunet.folder / "with_cascade").rename(nnunet.preprocessed)
    (plans_file,) = nnunet.preprocessed.glob("*/nnUNetPlans.json")
    plans = json.loads(plans_file.read_text())
    lowres = dict(plans["configurations"]["3d_fullres"], spacing=[1.2, 1.2, 1.2], next_stage="3d_cascade_fullres")
    plans["configurations"]["3d_lowres"] = dict(lowres, data_identifier="nnUNetPlans_3d_lowres")
    plans["configurations"]["3d_cascade_fullres"] = {
        "inherits_from": "3d_fullres",
        "previous_stage": "3d_lowres",
    }
    plans_file.write_text(json.dumps(plans))
    nnunet.run("nnUNetv2_preprocess", "-d", 701, "-c", "3d_lowres", "-np", 1)
    for fold_training in ("3d_lowres", "3d_cascade_fullres"):
        if fold_training == "3d_cascade_fullres":  # the training cases, too, need a prediction of the first stage
            complete_first_stage(nnunet)
        # the validation of the first stage predicts for the second one
        nnunet.train(701, fold_training, **(UNVALIDATED if fold_training == "3d_cascade_fullres" else {}))
        assert (nnunet.model(fold_training) / "fold_0" / "checkpoint_final.pth").is_file()


def complete_first_stage(nnunet):
    """Other folds would predict the remaining cases: here each gets a copy of the one that fold 0 predicted."""
    folder = nnunet.model("3d_lowres") / "predicted_next_stage" / "3d_cascade_fullres"
    (predicted,) = folder.glob("*.b2nd")
    for case in CASES[:-1]:
        if not (folder / f"{case}.b2nd").exists():
            shutil.copy(predicted, folder / f"{case}.b2nd")


def test_missing_variables_get_one_sentence(own_results):
    nnunet = own_results("classes")
    output = nnunet.train(701, "2d", fails=True, nnUNet_results=None)
    assert "The environment variable nnUNet_results is not set" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_a_mistake_in_a_subclass_gets_one_sentence(own_results):
    output = own_results("classes").train(701, "2d", "-tr", "nnUNetTrainerLoMixTinyUnknownOperator", fails=True)
    assert "unknown operator 'divide'; choose from: add, average, concat, fusion, max," in output.splitlines()[-1]
    assert "Traceback" not in output
