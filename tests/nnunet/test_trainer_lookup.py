"""Which class nnU-Net takes for a name; that there is none is not the same as a look-up that fails."""

import os
import re
import sys

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.registration import FOLDER
from nnunet_lomix.nnunet.trainer_lookup import TrainerNotFound, list_external_trainers, look_up_trainer
from nnunet_lomix.trainers import nnUNetTrainerLoMix

MINE = "from nnunet_lomix.trainers import nnUNetTrainerLoMix\nclass nnUNetTrainerMine(nnUNetTrainerLoMix): pass\n"


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder that nnU-Net searches before ours."""
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), FOLDER]))
    return tmp_path


def test_trainers_of_nnunet_ours_and_the_users(own_folder, capsys):
    (own_folder / "mine.py").write_text("from nnunet_lomix.trainers import nnUNetTrainerLoMix as nnUNetTrainerMine")
    assert look_up_trainer("nnUNetTrainer") is nnUNetTrainer
    assert look_up_trainer("nnUNetTrainerLoMix") is look_up_trainer("nnUNetTrainerMine") is nnUNetTrainerLoMix
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("SomebodysTrainer", "nnU-Net finds no trainer SomebodysTrainer"),
        ("nnUNetTrainerDA6", "nnU-Net finds no trainer nnUNetTrainerDA6: did you mean nnUNetTrainerDA5?"),
        ("nnUNetTrainerMin", "nnU-Net finds no trainer nnUNetTrainerMin: did you mean nnUNetTrainerMine?"),
        # a name that looks like a typo of one of ours
        ("nnUNetTrainerLoMixx", "nnunet_lomix has no trainer 'nnUNetTrainerLoMixx'. Did you mean 'nnUNetTrainerLoMix'"),
    ],
)
def test_an_unknown_name_is_not_installed(own_folder, name, sentence):
    (own_folder / "mine.py").write_text(MINE)
    (own_folder / ".#mine.py").symlink_to("nowhere")  # an editor's lock
    (own_folder / "folder.py").mkdir()
    (own_folder / "no_package").mkdir()
    (own_folder / "no_package" / "mine.py").write_text("class SomebodysTrainer(nnUNetTrainer): pass")
    with pytest.raises(TrainerNotFound, match=re.escape(sentence)):
        look_up_trainer(name)


@pytest.mark.parametrize(
    "code, why",
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("class", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("raise RuntimeError('no GPU\\nat all')", "RuntimeError: no GPU"),
        ("raise SystemExit('set a variable first')", "SystemExit: set a variable first"),
        ("raise ValueError", "ValueError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_and_the_others_are_listed(own_folder, code, why):
    (own_folder / "broken.py").write_text(code)
    (own_folder / "mine.py").write_text(MINE)
    with pytest.raises(LoMixError) as error:
        look_up_trainer("SomebodysTrainer")
    assert not isinstance(error.value, TrainerNotFound)
    assert str(error.value) == f"nnU-Net's look-up of trainers failed: {why}."
    trainers, problems = list_external_trainers()
    file = own_folder / "broken.py"
    assert problems == [f"{file} can't be imported, and nnU-Net's look-up stops there: {why}; mend it."]
    assert [trainer.__name__ for trainer in trainers] == ["nnUNetTrainerMine"]


def test_a_class_that_is_no_trainer_is_said(own_folder):
    (own_folder / "mine.py").write_text("class SomebodysTrainer: pass")
    with pytest.raises(LoMixError, match="AssertionError: The requested nnunet trainer class must inherit from"):
        look_up_trainer("SomebodysTrainer")


def test_the_trainers_of_a_user_are_listed(own_folder, capsys):
    """Those that a module defines, in packages, too, and not what it imports; the modules are forgotten again."""
    (own_folder / "mine.py").write_text(f"{MINE}print('imported')\nclass NoTrainer: pass\n")
    package = own_folder / "also" / "deep"
    package.mkdir(parents=True)
    for folder in (own_folder / "also", package):
        (folder / "__init__.py").touch()
    (package / "yours.py").write_text("from mine import nnUNetTrainerMine\nclass Yours(nnUNetTrainerMine): pass\n")
    trainers, problems = list_external_trainers()
    assert not problems
    assert [(t.__module__, t.__name__) for t in trainers] == [
        ("mine", "nnUNetTrainerMine"),  # nnU-Net asks modules before packages
        ("also.deep.yours", "Yours"),
    ]
    assert not {"mine", "also", "also.deep.yours"} & set(sys.modules) and str(own_folder) not in sys.path
    assert capsys.readouterr().out == ""


def test_a_module_with_the_name_of_another_one_is_named(own_folder):
    """Python has a module json already, and so nnU-Net never sees this one."""
    (own_folder / "json.py").write_text(MINE)
    with pytest.raises(TrainerNotFound):
        look_up_trainer("nnUNetTrainerMine")
    trainers, (problem,) = list_external_trainers()
    assert not trainers
    assert problem.startswith(f"{own_folder / 'json.py'} is not used, as ") and "rename the file" in problem


def test_a_folder_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path / "typo"), FOLDER, ""]))
    problem = f"{tmp_path / 'typo'} is not a folder, though nnUNet_extTrainer names it: mend the variable."
    assert list_external_trainers() == ([], [problem])
