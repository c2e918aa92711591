"""nnU-Net's own other networks and trainers with LoMix: the rows of the table in docs/training.md."""

import re
from pathlib import Path

import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as planners
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_lomix.trainers import nnUNetTrainerLoMix

from .conftest import LoMixTiny, Tiny, train_steps

pytestmark = pytest.mark.end_to_end

TABLE = (Path(__file__).parents[2] / "docs" / "training.md").read_text().partition("## nnU-Net's other")[2]
ROWS = [line.strip("|").split("|") for line in TABLE.splitlines() if line.startswith("| ")][1:]
REFUSED = [row for row in ROWS if "refused" in row[1]]
WORKING = [row for row in ROWS if row[1].strip().startswith("works")]


def names(rows: list[list[str]]) -> list[str]:
    return [name for row in rows for name in re.findall(r"`(_?nnUNet\w*Trainer\w*)`", row[0])]


def combine(name: str, order: int) -> type:
    """A variant of nnU-Net and LoMix, the variant first or second."""
    bases = (recursive_find_trainer_class_by_name(name), nnUNetTrainerLoMix)[::order]
    return type("Combined", (Tiny, *bases), {})


@pytest.mark.parametrize(("preset", "configuration"), [("M", "2d"), ("XL", "3d_fullres")])
def test_residual_encoders_train(make, monkeypatch, preset, configuration):
    make(LoMixTiny, initialize=False)  # for nnU-Net's variables
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # the planner sets as many threads
    planner = getattr(planners, f"nnUNetPlannerResEnc{preset}")(701)
    monkeypatch.setattr(planner, "save_plans", lambda plans: None)  # the folder is of all tests
    planner.plan_experiment()

    class ResidualEncoder(LoMixTiny):
        samples = 2

        def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
            super().__init__(planner.plans | {"continue_training": False}, configuration, fold, dataset_json, device)

    trainer = make(ResidualEncoder, configuration=configuration)
    assert type(trainer.network).__name__ == "ResidualEncoderUNet"
    assert len(trainer.loss.maps) == 19
    train_steps(trainer)
    # the head of the coarsest output, too, which nnU-Net's own loss leaves out
    heads = [p for name, p in trainer.network.named_parameters() if re.search(r"seg_layers\.\d\.weight", name)]
    assert len(heads) == 3 and all(p.grad.any() for p in heads)


@pytest.mark.parametrize("name", names(WORKING))
def test_what_works_by_the_table_trains(make, name):
    for order in (1, -1):
        trainer = make(combine(name, order))
        before = {key: p.clone() for key, p in trainer.loss.named_parameters()}
        train_steps(trainer)
        assert all(not torch.equal(before[key], p) for key, p in trainer.loss.named_parameters())


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0].strip()[:40])
def test_what_is_refused_by_the_table_is_refused_by_its_sentence(make, row):
    """In either order, and in 2d, where Primus can't be made; `X` stands for the user's class."""
    (sentence,) = re.findall(r"\"(X .*?)\"", row[1])
    for name in names([row]):
        expected = sentence.replace("X ", "Combined ", 1).replace("…", name)
        for order in (1, -1):
            for configuration in ("2d", "3d_fullres"):
                with pytest.raises(SystemExit) as ended:
                    make(combine(name, order), configuration=configuration)
                assert str(ended.value) == expected


def test_the_table_was_read():
    assert {"nnUNet_Primus_S_Trainer", "nnUNetTrainerNoDeepSupervision", "nnUNetTrainerCELoss"} <= set(names(REFUSED))
    assert {"nnUNetTrainerBN", "nnUNetTrainerDA5"} <= set(names(WORKING))
