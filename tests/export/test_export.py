"""A model trained with LoMix is used by an nnU-Net that doesn't know LoMix."""

import errno
import hashlib
import json
import os
import shutil
import time
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file

from nnunet_lomix import export
from nnunet_lomix.cli import main
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.prediction import read_case
from nnunet_lomix.nnunet.results import ModelFolder

from ..conftest import CASES, EXTERNAL_TRAINERS, NnUNet
from ..nnunet.test_checkpoints import Malicious

pytestmark = pytest.mark.end_to_end

MODEL = "Dataset701_classes/nnUNetTrainer__nnUNetPlans__2d"
BLOCK = """
import sys

class Block:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "nnunet_lomix":
            raise ImportError("nnunet_lomix is not installed")

sys.meta_path.insert(0, Block)
"""


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """An nnU-Net with one fold of the shortest LoMix training."""
    shared = prepared("classes")
    nnunet = NnUNet(tmp_path_factory.mktemp("trained"), shared.plans)
    for name in ("raw", "preprocessed"):
        os.symlink(getattr(shared, name), getattr(nnunet, name))
    nnunet.train(701, "2d")
    return nnunet


@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    """A copy of the trainer's folder, to spoil; nnU-Net finds its trainer."""
    monkeypatch.setenv("nnUNet_extTrainer", str(EXTERNAL_TRAINERS))
    return shutil.copytree(trained.model("2d"), tmp_path / trained.model("2d").name)


@pytest.fixture
def one_thread():
    """As nnU-Net's commands in these tests have: more of them add up in another order, and differ in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_nnunet_alone_uses_it(trained, copied, tmp_path, one_thread):
    """Exported, zipped, installed and used for a prediction where nnunet_lomix can't be imported."""
    image = trained.raw / "Dataset701_classes" / "imagesTs" / f"{CASES[-1]}_0000.nii.gz"
    result = CliRunner().invoke(main, ["export", str(copied), "--out", str(tmp_path / "out"), "--case", str(image)])
    assert "same segmentation (20 x 32 x 32) and same probabilities (61440 values), bit for bit" in result.output

    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(BLOCK)
    alone = dict(PYTHONPATH=str(tmp_path / "block"), TORCH_DEVICE_BACKEND_AUTOLOAD="0", nnUNet_extTrainer=None)
    assert "is not installed" in trained.run("python", "-c", "import nnunet_lomix", fails=True, **alone)

    archive, installed, predicted = (tmp_path / name for name in ("model.zip", "installed", "predicted"))
    installed.mkdir()
    options = ("-d", 701, "-c", "2d", "-f", 0, "-o", archive)
    trained.run("nnUNetv2_export_model_to_zip", *options, nnUNet_results=str(tmp_path / "out"), **alone)
    trained.run("nnUNetv2_install_pretrained_model_from_zip", archive, nnUNet_results=str(installed), **alone)
    options = ("-i", image.parent, "-o", predicted, "-f", 0, "-npp", 1, "-nps", 1, "-device", "cpu")
    trained.run("nnUNetv2_predict_from_modelfolder", "-m", installed / MODEL, *options, "--save_probabilities", **alone)

    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(copied), (0,))
    pixels, properties = SimpleITKIO().read_images([str(image)])
    segmentation, probabilities = predictor.predict_single_npy_array(pixels, properties, None, None, True)
    name = CASES[-1]
    assert np.array_equal(np.load(predicted / f"{name}.npz")["probabilities"], probabilities)
    assert np.array_equal(SimpleITKIO().read_seg(str(predicted / f"{name}.nii.gz"))[0][0], segmentation)
    assert len(np.unique(probabilities)) > 1000  # not a constant


def test_what_is_written(trained, tmp_path):
    source = trained.model("2d")
    made = export.export_model(source, tmp_path / "out")
    assert made == tmp_path / "out" / MODEL
    original = torch.load(source / "fold_0" / "checkpoint_final.pth", weights_only=False)
    exported = torch.load(made / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert exported["trainer_name"] == "nnUNetTrainer"
    assert set(original) - set(exported) == {"lomix"} and not set(exported) - set(original)
    assert exported["logging"] == original["logging"]
    for name, weight in original["network_weights"].items():
        assert torch.equal(weight, exported["network_weights"][name])
    for name in ("dataset.json", "plans.json", "dataset_fingerprint.json", "fold_0/validation/summary.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    assert sorted(p.name for p in (made / "fold_0").glob("*.pth")) == sorted(
        p.name for p in (source / "fold_0").glob("*.pth")
    )
    text = (made / "provenance.txt").read_text()
    # 3 outputs, and 4 operators for each of the 4 subsets of two or three of them
    how = "barrier, 19 supervised maps; network compared with nnUNetTrainer's by its"
    assert "nnUNetTrainerLoMixTiny" in text and how in text and "nnunetv2 2." in text
    digest = hashlib.sha256((source / "fold_0" / "checkpoint_final.pth").read_bytes()).hexdigest()
    assert f"{digest}  fold_0/checkpoint_final.pth" in text
    assert os.listdir(tmp_path) == ["out"]


def refuse(source, out, *args):
    before = sorted(out.parent.rglob("*"))
    result = CliRunner().invoke(main, ["export", str(source), "--out", str(out), *map(str, args)])
    assert result.exit_code and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert sorted(out.parent.rglob("*")) == before
    return result.output


def edit_checkpoint(folder, **changes):
    file = folder / "fold_0" / "checkpoint_final.pth"
    torch.save(torch.load(file, weights_only=False) | changes, file)


def edit_plans(folder, **changes):
    plans = json.loads((folder / "plans.json").read_text())
    (folder / "plans.json").write_text(json.dumps(plans | changes))


def test_code_in_a_checkpoint_is_refused_and_not_run(copied, tmp_path):
    edit_checkpoint(copied, lomix=Malicious(tmp_path / "written"))
    assert "mkdir in it" in refuse(copied, tmp_path / "out")
    assert not (tmp_path / "written").exists()


def test_an_original_that_cannot_predict_says_why(copied, tmp_path, trained, monkeypatch):
    image = trained.raw / "Dataset701_classes" / "imagesTs" / f"{CASES[-1]}_0000.nii.gz"
    monkeypatch.delenv("nnUNet_extTrainer")
    output = refuse(copied, tmp_path / "out", "--case", image)
    missing = "RuntimeError: Could not find requested nnunet trainer nnUNetTrainerLoMixTiny"
    assert f"nnU-Net can't load {copied}: {missing}" in output


def test_mistakes_get_one_sentence(copied, tmp_path):
    out = tmp_path / "out"
    assert "name the folder TRAINER__PLANS__CONFIGURATION" in refuse(copied / "fold_0", out)
    assert "choose another --out" in refuse(copied, copied)
    (tmp_path / "file").touch()
    assert "file is a file: choose another --out" in refuse(copied, tmp_path / "file")
    assert f"{tmp_path / 'file' / 'out'}: " in refuse(copied, tmp_path / "file" / "out")
    edit_plans(copied, dataset_name="Dataset001_/../../elsewhere")
    assert "is no name of a dataset" in refuse(copied, out)
    (copied / "fold_0" / "checkpoint_final.pth").unlink()
    assert "no fold_X/checkpoint_final.pth" in refuse(copied, out)


def test_all_ended_folds_are_exported_and_compared(copied, tmp_path, trained):
    """fold_all, too, which nnU-Net's own search for folds leaves out; a training that goes on is named."""
    (copied / "fold_0").rename(copied / "fold_all")
    (copied / "fold_1").mkdir()
    image = trained.raw / "Dataset701_classes" / "imagesTs" / f"{CASES[-1]}_0000.nii.gz"
    result = CliRunner().invoke(main, ["export", str(copied), "--out", str(tmp_path / "out"), "--case", str(image)])
    assert "bit for bit" in result.output and "Exported fold_all to" in result.output
    assert "Left out, as its training has not ended: fold_1" in result.output
    made = tmp_path / "out" / MODEL
    assert (made / "fold_all" / "checkpoint_final.pth").is_file()
    assert "had not ended: fold_1" in (made / "provenance.txt").read_text()


def test_a_model_that_differs_is_named(copied, trained, tmp_path):
    other = shutil.copytree(copied, tmp_path / "other")
    weights = torch.load(other / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    name = next(reversed(weights))
    edit_checkpoint(other, network_weights=weights | {name: weights[name] * (1 + 1e-5)})
    model = ModelFolder(copied)
    image = trained.raw / "Dataset701_classes" / "imagesTs" / f"{CASES[-1]}_0000.nii.gz"
    _, case = read_case(image, model.read_plans(), json.loads((copied / "dataset.json").read_text()))
    assert "bit for bit" in export.compare_predictions(copied, copied, model.folds(), case)
    with pytest.raises(LoMixError, match="differ: nothing was exported"):
        export.compare_predictions(copied, other, model.folds(), case)


def test_what_cannot_be_written_or_read_is_named_as_the_user_gave_it(copied, tmp_path, monkeypatch):
    """Not the temporary folder beside it, in which the model is made."""

    def deny(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    out = tmp_path / "out"
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: deny(target))
    assert refuse(copied, out) == f"Error: {out}: Permission denied; nothing was exported.\n"
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: deny(source))
    assert refuse(copied, out) == f"Error: {copied / 'dataset.json'}: Permission denied; nothing was exported.\n"


def test_a_model_with_other_names_leaves_that_of_the_recipient_alone(copied, tmp_path, trained, monkeypatch):
    """Exported under other names, zipped, and installed where nnUNetTrainer has a model of the same dataset."""
    names = ("--dataset-name", "Dataset904_Shared", "--plans-name", "Mine")
    result = CliRunner().invoke(main, ["export", str(copied), "--out", str(tmp_path / "out"), *names])
    assert "nnUNetv2_predict finds it by -d Dataset904_Shared and -p Mine." in result.output
    assert "replaces" not in result.output
    made = tmp_path / "out" / "Dataset904_Shared" / "nnUNetTrainer__Mine__2d"
    before, after = (json.loads((folder / "plans.json").read_text()) for folder in (copied, made))
    assert after == before | {"dataset_name": "Dataset904_Shared", "plans_name": "Mine"}
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        plans = torch.load(made / "fold_0" / name, weights_only=False)["init_args"]["plans"]
        assert (plans["dataset_name"], plans["plans_name"]) == ("Dataset904_Shared", "Mine")
    assert "of Dataset701_classes on " in (made / "provenance.txt").read_text()

    results = tmp_path / "results"
    own = results / MODEL / "plans.json"
    own.parent.mkdir(parents=True)
    own.write_text("the recipient's")
    archive, predicted = tmp_path / "model.zip", tmp_path / "predicted"
    options = ("-d", "Dataset904_Shared", "-p", "Mine", "-c", "2d", "-f", 0)
    trained.run("nnUNetv2_export_model_to_zip", *options, "-o", archive, nnUNet_results=str(tmp_path / "out"))
    monkeypatch.setenv("nnUNet_results", str(results))
    install_model_from_zip_file(str(archive))
    assert own.read_text() == "the recipient's" and os.listdir(own.parent) == ["plans.json"]
    images = trained.raw / "Dataset701_classes" / "imagesTs"
    options = ("-d", 904, "-p", "Mine", "-c", "2d", "-f", 0, "-i", images, "-o", predicted, "-npp", 1, "-nps", 1)
    trained.run("nnUNetv2_predict", *options, "-device", "cpu", nnUNet_results=str(results))
    assert (predicted / f"{CASES[-1]}.nii.gz").is_file()


def test_a_model_that_keeps_its_names_gets_a_warning(copied, tmp_path):
    result = CliRunner().invoke(main, ["export", str(copied), "--out", str(tmp_path / "out")])
    assert f"it replaces a model {MODEL} that is there already" in result.output
    assert "another --plans-name or --dataset-name" in result.output


def test_postprocessing_is_carried_and_stays_in_the_zip(copied, tmp_path, monkeypatch):
    """What nnUNetv2_find_best_configuration writes; the predictions beside it are nobody else's business."""
    found = copied / "crossval_results_folds_0"
    (found / "postprocessed").mkdir(parents=True)
    written = {name: f"{name} of it" for name in ("summary.json", "postprocessing.pkl", "postprocessing.json")}
    for name, text in {**written, "case_0.nii.gz": "image", "postprocessed/summary.json": "other"}.items():
        (found / name).write_text(text)
    result = CliRunner().invoke(main, ["export", str(copied), "--out", str(tmp_path / "out")])
    assert "Its postprocessing is in crossval_results_folds_0." in result.output
    made = tmp_path / "out" / MODEL / "crossval_results_folds_0"
    assert {file.name: file.read_text() for file in made.iterdir()} == written
    with zipped(tmp_path, monkeypatch) as archive:
        assert (
            archive.read(f"{MODEL}/crossval_results_folds_0/postprocessing.pkl").decode() == "postprocessing.pkl of it"
        )


def test_what_an_earlier_checkpoint_gave_is_left_out(copied, tmp_path):
    found = copied / "crossval_results_folds_0" / "postprocessing.pkl"
    found.parent.mkdir()
    found.touch()
    final = copied / "fold_0" / "checkpoint_final.pth"
    os.utime(final, (time.time() + 60,) * 2)
    result = CliRunner().invoke(main, ["export", str(copied), "--out", str(tmp_path / "out")])
    outdated = "fold_0/validation/summary.json, crossval_results_folds_0/postprocessing.pkl"
    assert f"Left out, as a checkpoint is newer: {outdated}" in result.output
    assert "fold_0 lacks validation/summary.json: validate it by nnUNetv2_train with --val" in result.output
    assert not [*(tmp_path / "out" / MODEL).glob("*/**/summary.json")] and not [*(tmp_path / "out").rglob("*.pkl")]


def test_a_missing_progress_is_drawn_from_the_log(copied, tmp_path, monkeypatch):
    (copied / "fold_0" / "progress.png").unlink()
    result = CliRunner().invoke(main, ["export", str(copied), "--out", str(tmp_path / "out")])
    assert "lacks" not in result.output
    with zipped(tmp_path, monkeypatch) as archive:
        assert archive.read(f"{MODEL}/fold_0/progress.png").startswith(b"\x89PNG")


def test_what_the_zip_lacks_is_named_with_the_remedy(copied, tmp_path):
    (copied / "fold_0" / "progress.png").unlink()
    (copied / "fold_0" / "validation" / "summary.json").unlink()
    edit_checkpoint(copied, logging={})
    result = CliRunner().invoke(main, ["export", str(copied), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    zipping = "For nnUNetv2_export_model_to_zip fold_0 lacks "
    assert f"{zipping}validation/summary.json: validate it by nnUNetv2_train with --val, and export again." in (
        result.output
    )
    assert f"{zipping}progress.png: it can't be drawn from the log in its checkpoint, so put any" in result.output


@contextmanager
def zipped(tmp_path, monkeypatch):
    """The archive that nnU-Net makes of fold 0 of what was exported to ``out``."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "out"))
    export_pretrained_model("Dataset701_classes", str(tmp_path / "model.zip"), ("2d",), folds=(0,))
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        yield archive


@pytest.mark.parametrize(
    "history, learned",
    [
        ([], "2 epochs, none of them with LoMix; network"),
        ([{}, {}], "2 epochs, none of them with LoMix; network"),
        (
            [{}, {"z_0": 0.5, "z_1": 0.5}],
            "2 epochs, 1 of them with LoMix, weighting rule barrier, 2 supervised maps; n",
        ),
        (2 * [{"z_0": 0.5, "z_1": 0.5}], "2 epochs, LoMix, weighting rule barrier, 2 supervised maps; network"),
    ],
)
def test_provenance_says_in_how_many_epochs_there_was_lomix(copied, tmp_path, history, learned):
    """A finished checkpoint of nnUNetTrainer gets a state of LoMix when LoMix's trainer only validates and saves it."""
    edit_checkpoint(copied, current_epoch=2, lomix={"rule": "barrier", "history": history})
    (copied / "fold_0" / "checkpoint_best.pth").unlink()
    made = export.export_model(copied, tmp_path / "out")
    assert f"fold_0/checkpoint_final.pth: nnUNetTrainerLoMixTiny, {learned}" in (made / "provenance.txt").read_text()
