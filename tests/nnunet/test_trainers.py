"""Which class nnU-Net takes for a name; that there is none is not the same as a look-up that fails."""

import os

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.registration import FOLDER
from nnunet_lomix.nnunet.trainers import TrainerNotFound, find_trainer
from nnunet_lomix.trainers import nnUNetTrainerLoMix


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder that nnU-Net searches before ours."""
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), FOLDER]))
    return tmp_path


def test_trainers_of_nnunet_ours_and_the_users(own_folder, capsys):
    (own_folder / "mine.py").write_text("from nnunet_lomix.trainers import nnUNetTrainerLoMix as nnUNetTrainerMine")
    assert find_trainer("nnUNetTrainer") is nnUNetTrainer
    assert find_trainer("nnUNetTrainerLoMix") is find_trainer("nnUNetTrainerMine") is nnUNetTrainerLoMix
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["SomebodysTrainer", "nnUNetTrainerLoMixx"])
def test_an_unknown_name_is_not_installed(own_folder, name):
    """The look-up of ours tells those whose name looks like a typo of one of ours by another exception."""
    with pytest.raises(TrainerNotFound, match=f"nnU-Net finds no trainer {name}"):
        find_trainer(name)


@pytest.mark.parametrize(
    "code, message",
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'."),
        ("raise RuntimeError('no GPU\\nat all')", "RuntimeError: no GPU."),
        ("raise SystemExit('set a variable first')", "SystemExit: set a variable first."),
        ("raise ValueError", "ValueError."),
        ("class SomebodysTrainer: pass", "AssertionError: The requested nnunet trainer class must inherit from"),
    ],
)
def test_a_look_up_that_fails_says_why(own_folder, code, message):
    (own_folder / "mine.py").write_text(code)
    with pytest.raises(LoMixError) as error:
        find_trainer("SomebodysTrainer")
    assert not isinstance(error.value, TrainerNotFound)
    assert str(error.value).startswith(f"nnU-Net's look-up of trainers failed: {message}")
