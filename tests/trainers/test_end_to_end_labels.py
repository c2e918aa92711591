"""A real training by nnU-Net's own commands, of regions with an ignore label, by residual-encoder plans."""

import json
import shutil
from pathlib import Path

import pytest

from nnunet_lomix.compare import compare, read_results

pytestmark = pytest.mark.end_to_end


def test_regions_and_the_ignore_label_in_3d(own_results, monkeypatch):
    """Dice of compare is that of nnU-Net's validation; the second trainer is a copy of the first."""
    nnunet = own_results("regions_ignore")
    nnunet.train(701, "3d_fullres")
    model = nnunet.model("3d_fullres")
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
