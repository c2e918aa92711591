"""Real trainings by nnU-Net's own commands: regions, the ignore label, both; residual-encoder plans."""

import json
import shutil
from pathlib import Path

import pytest

from nnunet_lomix.compare import compare, read_results

pytestmark = pytest.mark.end_to_end


def test_train_and_validate_regions_in_3d(own_results):
    nnunet = own_results("regions", residual_encoder=True)
    nnunet.train(701, "3d_fullres")
    summary = nnunet.model("3d_fullres") / "fold_0" / "validation" / "summary.json"
    assert len(json.loads(summary.read_text())["mean"]) == 2


def test_dice_of_compare_is_that_of_nnunets_validation(own_results, tmp_path, monkeypatch):
    """Regions and the ignore label, of a real training; the second trainer is a copy of the first."""
    nnunet = own_results("regions_ignore")
    nnunet.train(701, "2d")
    model = nnunet.model("2d")
    shutil.copytree(model, model.with_name(f"Copy__{nnunet.plans}__2d"))
    for name, value in nnunet.variables.items():
        monkeypatch.setenv(name, value)
    source = read_results("701", "2d", ["nnUNetTrainerLoMixTiny", "Copy"], nnunet.plans)
    result = compare(source)
    dice = result.scores.query("metric == 'Dice' and trainer == 'Copy'").set_index(["case", "class"])["value"]
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    for case in summary["metric_per_case"]:
        for name, theirs in zip(source.labels, case["metrics"].values(), strict=True):
            own = dice[Path(case["prediction_file"]).name.removesuffix(".nii.gz"), name]
            assert own == pytest.approx(theirs["Dice"], abs=1e-6)
    assert (result.comparison["p"] == 1).all() and (result.comparison["difference"] == 0).all()
    assert len(source.curves) == 2 and result.information["epoch_seconds"]["Copy"] > 0
