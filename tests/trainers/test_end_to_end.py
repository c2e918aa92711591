"""Real trainings by nnU-Net's own commands: classes in 2d, and a cascade of regions with an ignore label."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from nnunet_lomix.compare import compare, read_results

from ..conftest import CASES, SHAPE, UNVALIDATED

pytestmark = pytest.mark.end_to_end


def test_train_validate_and_predict_2d(own_results, tmp_path):
    nnunet = own_results("classes")
    nnunet.train(701, "2d", TINY_EPOCHS="2", **UNVALIDATED)
    fold = nnunet.model("2d") / "fold_0"
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 2
    stock_keys = set(checkpoint) - {"lomix"}
    assert stock_keys == {
        *("network_weights", "optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch"),
        *("init_args", "trainer_name", "inference_allowed_mirroring_axes"),
    }
    assert "lomix_weights" not in checkpoint["logging"]
    assert checkpoint["lomix"]["optimizer"]["state"][0]["step"] == checkpoint["lomix"]["loss"]["rule.steps"] == 4

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
    options = ("-i", images, "-f", 0, "-npp", 1, "-nps", 1, "-device", "cpu", "-o", tmp_path / "predicted")
    nnunet.run("nnUNetv2_predict", "-d", 701, "-c", "2d", "-tr", "nnUNetTrainerLoMixTiny", *options)
    predicted = sitk.ReadImage(tmp_path / "predicted" / f"{CASES[-1]}.nii.gz")
    assert sitk.GetArrayFromImage(predicted).shape == SHAPE


def test_regions_and_the_ignore_label_in_3d_and_a_second_stage(own_results, monkeypatch):
    """Dice of compare is that of nnU-Net's validation; the second trainer is a copy of the first."""
    nnunet = own_results("regions_ignore")
    add_second_stage(nnunet)
    nnunet.train(701, "3d_fullres")
    model = nnunet.model("3d_fullres")
    check_scores(nnunet, model, monkeypatch)

    # other folds would predict the remaining cases: here each gets a copy of the one that fold 0 predicted
    folder = model / "predicted_next_stage" / "3d_cascade_fullres"
    (predicted,) = folder.glob("*.b2nd")
    for case in CASES[:-1]:
        if not (folder / f"{case}.b2nd").exists():
            shutil.copy(predicted, folder / f"{case}.b2nd")
    nnunet.train(701, "3d_cascade_fullres", **UNVALIDATED)
    assert (nnunet.model("3d_cascade_fullres") / "fold_0" / "checkpoint_final.pth").is_file()


def add_second_stage(nnunet):
    """Images this small get no cascade from the planner: here the second stage is of the resolution of the first."""
    shutil.copytree(nnunet.preprocessed.resolve(), nnunet.folder / "with_cascade")
    nnunet.preprocessed.unlink()
    (nnunet.folder / "with_cascade").rename(nnunet.preprocessed)
    (plans_file,) = nnunet.preprocessed.glob(f"*/{nnunet.plans}.json")
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["3d_fullres"]["next_stage"] = "3d_cascade_fullres"
    second = {"inherits_from": "3d_fullres", "previous_stage": "3d_fullres", "next_stage": None}
    plans["configurations"]["3d_cascade_fullres"] = second
    plans_file.write_text(json.dumps(plans))


def check_scores(nnunet, model, monkeypatch):
    shutil.copytree(model, model.with_name(f"Copy__{nnunet.plans}__3d_fullres"))
    for name, value in nnunet.variables.items():
        monkeypatch.setenv(name, value)
    source = read_results("701", "3d_fullres", ["nnUNetTrainerLoMixTiny", "Copy"], nnunet.plans)
    result = compare(source)
    dice = result.scores.query("metric == 'Dice' and trainer == 'Copy'").set_index(["case", "class"])["value"]
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert len(summary["mean"]) == 2
    for case in summary["metric_per_case"]:
        for name, theirs in zip(source.labels, case["metrics"].values(), strict=True):
            own = dice[Path(case["prediction_file"]).name.removesuffix(".nii.gz"), name]
            assert own == pytest.approx(theirs["Dice"], abs=1e-6)
    assert (result.comparison["p"] == 1).all() and (result.comparison["difference"] == 0).all()
    assert len(source.curves) == 2 and result.information["epoch_seconds"]["Copy"] > 0


def test_missing_variables_get_one_sentence(own_results):
    nnunet = own_results("classes")
    output = nnunet.train(701, "2d", fails=True, nnUNet_results=None)
    assert "The environment variable nnUNet_results is not set" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_a_mistake_in_a_subclass_gets_one_sentence(own_results):
    output = own_results("classes").train(701, "2d", "-tr", "nnUNetTrainerLoMixTinyUnknownOperator", fails=True)
    assert "unknown operator 'divide'; choose from: add, average, concat, fusion, max," in output.splitlines()[-1]
    assert "Traceback" not in output
