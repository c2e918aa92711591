"""Real trainings by nnU-Net's own commands: regions, the ignore label, both; residual-encoder plans."""

import json

import pytest

pytestmark = pytest.mark.end_to_end


@pytest.mark.parametrize(
    "labels, configuration",
    [("regions", "3d_fullres"), ("ignore", "2d"), ("regions_ignore", "2d")],
)
def test_train_and_validate(own_results, labels, configuration):
    nnunet = own_results(labels, residual_encoder=labels == "regions")
    nnunet.train(701, configuration)
    summary = nnunet.model(configuration) / "fold_0" / "validation" / "summary.json"
    assert len(json.loads(summary.read_text())["mean"]) == 2
