"""A model trained with LoMix is used by an nnU-Net that doesn't know LoMix."""

import errno
import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_export import export_pretrained_model

from nnunet_lomix import export
from nnunet_lomix.cli import main
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.prediction import read_case
from nnunet_lomix.nnunet.results import ModelFolder

from ..conftest import CASES, EXTERNAL_TRAINERS, UNVALIDATED, write_image
from ..fuzz.world import DATASET, DATASET_JSON, PLANS_JSON, WEIGHTS, write_model
from ..nnunet.test_checkpoints import Malicious

MODEL = f"{DATASET}/nnUNetTrainer__nnUNetPlans__2d"
BLOCK = """
import sys

class Block:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "nnunet_lomix":
            raise ImportError("nnunet_lomix is not installed")

sys.meta_path.insert(0, Block)
"""
# nnU-Net's commands one after the other, with the folder of results for each
ALONE = """
import json, os, sys
from importlib.metadata import entry_points

if __name__ == "__main__":
    try:
        import nnunet_lomix
    except ImportError as error:
        print(error)
    for results, *command in json.loads(sys.argv[1]):
        os.environ["nnUNet_results"] = results
        sys.argv = command
        (entry,) = entry_points(group="console_scripts", name=command[0])
        entry.load()()
"""


@pytest.fixture
def model(tmp_path) -> Path:
    """The folder of a trainer with two folds; nothing is trained."""
    folder = tmp_path / "nnUNetTrainerLoMix__nnUNetPlans__2d"
    write_model(folder, "nnUNetTrainerLoMix", 0)
    return folder


@pytest.fixture
def image(tmp_path) -> Path:
    file = tmp_path / "images" / "case_0000.nii.gz"
    file.parent.mkdir()
    write_image(np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float32), file)
    return file


@pytest.fixture
def one_thread():
    """As nnU-Net's commands in these tests have: more of them add up in another order, and differ in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(source, out, *args) -> str:
    result = CliRunner().invoke(main, ["export", str(source), "--out", str(out), *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.output


def refuse(source, out, *args) -> str:
    before = sorted(out.parent.rglob("*"))
    result = CliRunner().invoke(main, ["export", str(source), "--out", str(out), *map(str, args)])
    assert result.exit_code and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert sorted(out.parent.rglob("*")) == before
    return result.output


def edit(file: Path, **changes) -> None:
    if file.suffix == ".pth":
        torch.save(torch.load(file, weights_only=False) | changes, file)
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.end_to_end
def test_nnunet_alone_uses_it(own_results, tmp_path, one_thread, monkeypatch):
    """Trained; exported under other names; zipped, installed and used where nnunet_lomix can't be imported.

    The recipient's own model of the same dataset stays as it is.
    """
    nnunet = own_results("classes")
    nnunet.train(701, "2d", **UNVALIDATED)
    source, images = nnunet.model("2d"), nnunet.raw / "Dataset701_classes" / "imagesTs"
    (source / "fold_0/validation").mkdir(exist_ok=True)
    (source / "fold_0/validation/summary.json").write_text("{}")  # which goes into the zip
    monkeypatch.setenv("nnUNet_extTrainer", str(EXTERNAL_TRAINERS))
    out, recipient, predicted, archive = (tmp_path / name for name in ("an out", "recipient", "predicted", "model.zip"))
    names = ("--dataset-name", "Dataset904_Shared", "--plans-name", "Mine")
    output = run(source, out, *names, "--case", images / f"{CASES[-1]}_0000.nii.gz")
    assert "same segmentation (20 x 32 x 32) and same probabilities (61440 values), bit for bit" in output
    found = f"With nnUNet_results='{out}' nnUNetv2_predict finds it by -d Dataset904_Shared and -p Mine."
    assert found in output and "replaces" not in output
    made = out / "Dataset904_Shared" / "nnUNetTrainer__Mine__2d"
    renamed = {"dataset_name": "Dataset904_Shared", "plans_name": "Mine"}
    before, after = (json.loads((folder / "plans.json").read_text()) for folder in (source, made))
    assert after == before | renamed
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        plans = torch.load(made / "fold_0" / name, weights_only=False)["init_args"]["plans"]
        assert {key: plans[key] for key in renamed} == renamed
    # 3 outputs, and 4 operators for each of the 4 subsets of two or three of them
    how = "LoMix, weighting rule barrier, 19 supervised maps; network compared with nnUNetTrainer's by its class"
    provenance = (made / "provenance.txt").read_text()
    assert "of Dataset701_classes on " in provenance and f"nnUNetTrainerLoMixTiny, 1 epochs, {how}" in provenance

    own = recipient / "Dataset701_classes/nnUNetTrainer__nnUNetPlans__2d/plans.json"
    own.parent.mkdir(parents=True)
    own.write_text("the recipient's")
    shared = ("-p", "Mine", "-c", "2d", "-f", 0)
    predict = ("-i", images, "-o", predicted, "-npp", 1, "-nps", 1, "-device", "cpu", "--save_probabilities")
    commands = [
        (out, "nnUNetv2_export_model_to_zip", "-d", "Dataset904_Shared", *shared, "-o", archive),
        (recipient, "nnUNetv2_install_pretrained_model_from_zip", archive),
        (recipient, "nnUNetv2_predict", "-d", 904, *shared, *predict),
    ]
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(BLOCK)
    (tmp_path / "alone.py").write_text(ALONE)
    alone = dict(PYTHONPATH=str(tmp_path / "block"), TORCH_DEVICE_BACKEND_AUTOLOAD="0", nnUNet_extTrainer=None)
    printed = nnunet.run("python", tmp_path / "alone.py", json.dumps([[*map(str, c)] for c in commands]), **alone)
    assert printed.startswith("nnunet_lomix is not installed\n")
    assert own.read_text() == "the recipient's" and os.listdir(own.parent) == ["plans.json"]

    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(source), (0,))
    pixels, properties = SimpleITKIO().read_images([str(images / f"{CASES[-1]}_0000.nii.gz")])
    segmentation, probabilities = predictor.predict_single_npy_array(pixels, properties, None, None, True)
    assert np.array_equal(np.load(predicted / f"{CASES[-1]}.npz")["probabilities"], probabilities)
    assert np.array_equal(SimpleITKIO().read_seg(str(predicted / f"{CASES[-1]}.nii.gz"))[0][0], segmentation)
    assert len(np.unique(probabilities)) > 1000  # not a constant


def test_what_is_written(model, tmp_path):
    """A finished checkpoint of nnUNetTrainer gets a state of LoMix when LoMix's trainer only validates and saves it."""
    learned = {
        "fold_0/checkpoint_final.pth": ([], "none of them with LoMix; network"),
        "fold_0/checkpoint_best.pth": ([{}, {}], "none of them with LoMix; network"),
        "fold_1/checkpoint_final.pth": (
            [{}, WEIGHTS],
            "1 of them with LoMix, weighting rule barrier, 4 supervised maps; n",
        ),
        "fold_1/checkpoint_best.pth": (2 * [WEIGHTS], "LoMix, weighting rule barrier, 4 supervised maps; network"),
    }
    for name, (history, _) in learned.items():
        if "best" in name:
            shutil.copy(model / name.replace("best", "final"), model / name)
        edit(model / name, lomix={"rule": "barrier", "history": history})
    output = run(model, tmp_path / "new" / "out")
    made, text = tmp_path / "new" / "out" / MODEL, (tmp_path / "new" / "out" / MODEL / "provenance.txt").read_text()
    assert os.listdir(tmp_path / "new") == ["out"]
    assert f"Exported fold_0, fold_1 to {made}" in output and f"it replaces a model {MODEL} that is there" in output
    assert "another --plans-name or --dataset-name" in output and "lacks" not in output
    assert sorted(str(file.relative_to(made)) for file in made.rglob("*.pth")) == sorted(learned)
    for name, (_, how) in learned.items():
        original, exported = (torch.load(folder / name, weights_only=False) for folder in (model, made))
        assert exported["trainer_name"] == "nnUNetTrainer"
        assert set(original) - set(exported) == {"lomix"} and not set(exported) - set(original)
        assert exported["logging"] == original["logging"] and exported["init_args"] == original["init_args"]
        for key, weight in original["network_weights"].items():
            assert torch.equal(weight, exported["network_weights"][key])
        assert f"{name}: nnUNetTrainerLoMix, 2 epochs, {how}" in text
        assert f"{hashlib.sha256((model / name).read_bytes()).hexdigest()}  {name}" in text
    for name in ("dataset.json", "plans.json", "dataset_fingerprint.json", "fold_1/validation/summary.json"):
        assert (made / name).read_bytes() == (model / name).read_bytes()
    assert "network compared with nnUNetTrainer's by its class and its weights" in text and "nnunetv2 2." in text


def test_code_in_a_checkpoint_is_refused_and_not_run(model, tmp_path):
    edit(model / "fold_0/checkpoint_final.pth", lomix=Malicious(tmp_path / "written"))
    assert "mkdir in it" in refuse(model, tmp_path / "out")
    assert not (tmp_path / "written").exists()


def test_an_original_that_cannot_predict_says_why(model, tmp_path, image):
    for fold in "01":
        edit(model / f"fold_{fold}/checkpoint_final.pth", trainer_name="nnUNetTrainerOfSomebody")
    output = refuse(model, tmp_path / "out", "--case", image)
    missing = "RuntimeError: Could not find requested nnunet trainer nnUNetTrainerOfSomebody"
    assert f"nnU-Net can't load {model}: {missing}" in output


def test_mistakes_get_one_sentence(model, tmp_path):
    out, file = tmp_path / "out", tmp_path / "file"
    assert "name the folder TRAINER__PLANS__CONFIGURATION" in refuse(model / "fold_0", out)
    assert "choose another --out" in refuse(model, model)
    file.touch()
    assert "file is a file: choose another --out" in refuse(model, file)
    assert f"{file / 'out'}: " in refuse(model, file / "out")
    edit(model / "plans.json", dataset_name="Dataset001_/../../elsewhere")
    assert "is no name of a dataset" in refuse(model, out)
    for fold in "01":
        (model / f"fold_{fold}" / "checkpoint_final.pth").unlink()
    assert "no fold_X/checkpoint_final.pth" in refuse(model, out)


def test_all_ended_folds_are_exported_and_compared(model, tmp_path, image):
    """fold_all, too, which nnU-Net's own search for folds leaves out; a training that goes on is named."""
    (model / "fold_0").rename(model / "fold_all")
    (model / "fold_1" / "checkpoint_final.pth").unlink()
    output = run(model, tmp_path / "out", "--case", image)
    assert "case: same segmentation" in output and "bit for bit" in output and "Exported fold_all to" in output
    assert "Left out, as its training has not ended: fold_1" in output
    made = tmp_path / "out" / MODEL
    assert (made / "fold_all" / "checkpoint_final.pth").is_file() and not (made / "fold_1").exists()
    assert "had not ended: fold_1" in (made / "provenance.txt").read_text()


def test_a_model_that_differs_is_named(model, tmp_path, image):
    other = shutil.copytree(model, tmp_path / "other")
    final = other / "fold_0" / "checkpoint_final.pth"
    weights = torch.load(final, weights_only=False)["network_weights"]
    name = next(reversed(weights))
    edit(final, network_weights=weights | {name: weights[name] + 1e-3 * torch.arange(3)})
    _, case = read_case(image, PLANS_JSON, DATASET_JSON)
    folds = ModelFolder(model).folds()
    assert "bit for bit" in export.compare_predictions(model, model, folds, case)
    with pytest.raises(LoMixError, match="differ: nothing was exported"):
        export.compare_predictions(model, other, folds, case)


def test_what_cannot_be_written_or_read_is_named_as_the_user_gave_it(model, tmp_path, monkeypatch):
    """Not the temporary folder beside it, in which the model is made."""

    def deny(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    out = tmp_path / "out"
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: deny(target))
    assert refuse(model, out) == f"Error: {out}: Permission denied; nothing was exported.\n"
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: deny(source))
    assert refuse(model, out) == f"Error: {model / 'dataset.json'}: Permission denied; nothing was exported.\n"


def test_postprocessing_and_a_missing_progress_are_in_the_zip(model, tmp_path, monkeypatch):
    """What nnUNetv2_find_best_configuration writes; the predictions beside it are nobody else's business."""
    (model / "fold_0" / "progress.png").unlink()  # is drawn from the log
    found = model / "crossval_results_folds_0"
    (found / "postprocessed").mkdir(parents=True)
    written = {name: f"{name} of it" for name in ("summary.json", "postprocessing.pkl", "postprocessing.json")}
    for name, text in {**written, "case_0.nii.gz": "image", "postprocessed/summary.json": "other"}.items():
        (found / name).write_text(text)
    output = run(model, tmp_path / "out")
    assert "Its postprocessing is in crossval_results_folds_0." in output and "lacks" not in output
    made = tmp_path / "out" / MODEL / "crossval_results_folds_0"
    assert {file.name: file.read_text() for file in made.iterdir()} == written
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "out"))
    export_pretrained_model(DATASET, str(tmp_path / "model.zip"), ("2d",), folds=(0,))
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert archive.read(f"{MODEL}/fold_0/progress.png").startswith(b"\x89PNG")
        postprocessing = archive.read(f"{MODEL}/crossval_results_folds_0/postprocessing.pkl")
        assert postprocessing.decode() == written["postprocessing.pkl"]


def test_what_is_missing_or_of_an_earlier_checkpoint_is_named_with_the_remedy(model, tmp_path):
    """Fold 0 was trained again since it was validated; fold 1 has nothing to draw its progress from."""
    found = model / "crossval_results_folds_0" / "postprocessing.pkl"
    found.parent.mkdir()
    found.touch()
    for fold in "01":
        edit(model / f"fold_{fold}" / "checkpoint_final.pth", logging={})
    (model / "fold_1" / "validation" / "summary.json").touch()
    (model / "fold_1" / "progress.png").unlink()
    output = run(model, tmp_path / "out")
    outdated = "fold_0/validation/summary.json, crossval_results_folds_0/postprocessing.pkl"
    assert f"Left out, as a checkpoint is newer: {outdated}\n" in output
    zipping = "For nnUNetv2_export_model_to_zip"
    remedy = "validate it by nnUNetv2_train with --val, and export again."
    assert f"{zipping} fold_0 lacks validation/summary.json: {remedy}\n" in output
    assert (
        f"{zipping} fold_1 lacks progress.png: it can't be drawn from the log in its checkpoint, so put any" in output
    )
    assert [f.parts[-3] for f in (tmp_path / "out").rglob("summary.json")] == ["fold_1"]
    assert not [*(tmp_path / "out").rglob("*.pkl")]
