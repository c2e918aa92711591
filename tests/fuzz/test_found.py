"""What fuzzing has found, with the right sentence for each: these inputs once ended in a traceback, or never."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from joblib import Parallel

from nnunet_lomix import splits
from nnunet_lomix.compare import read_folders, scoring

from .commands import CALLS, check, copied, run
from .world import DATASET, MODELS, inside

SPLITS = f"preprocessed/{DATASET}/splits_final.json"
NESTED = "[" * 100_000
IMAGE = f"raw/{DATASET}/imagesTr/a_0000.nii.gz"


def change_json(**changes):
    """Damage to a JSON file: ``a__b=value`` sets the value of b in that of a."""

    def damage(file: Path):
        content = json.loads(file.read_text())
        for path, value in changes.items():
            *above, key = path.split("__")
            place = content
            for name in above:
                place = place[name]
            place[key] = value
        file.write_text(json.dumps(content))

    return damage


def change_checkpoint(**changes):
    return lambda file: torch.save(torch.load(file, weights_only=False) | changes, file)


def make_folder(file: Path):
    file.unlink()
    file.mkdir()


def write_vectors(file: Path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((8, 8, 3), np.uint8), isVector=True), file)


def write(text: str):
    return lambda file: file.write_text(text)


ENDING = "nifti/before/dataset.json"
PLANS, LABELS = f"{MODELS[1]}/plans.json", f"{MODELS[1]}/dataset.json"
NOT_BUILT = "nnU-Net can't build the network of configuration '2d' from plans.json and dataset.json: "
NO_SEGMENTATION = "a.nii.gz is no segmentation: it needs one channel of whole numbers."


@pytest.mark.parametrize(
    "name, file, damage, sentence",
    [
        # nested too deeply for Python's parser
        ("splits", SPLITS, write(NESTED), "splits_final.json is not a list of folds, each with train and val"),
        ("export", PLANS, write(NESTED), "plans.json can't be read: maximum recursion depth exceeded"),
        # values of other types
        ("export", PLANS, change_json(dataset_name=5), "plans.json is not nnU-Net's: its dataset_name is not a text."),
        ("compare results", PLANS, change_json(configurations=[]), "its configurations is not an object."),
        ("export", LABELS, change_json(channel_names=None), "its channel_names is not an object."),
        ("compare results", LABELS, change_json(file_ending=["**"]), "its file_ending is not a text."),
        ("compare folders", ENDING, change_json(file_ending="**/"), "No case is predicted in all of "),
        (
            "compare results",
            LABELS,
            change_json(labels__liver=-1),
            "begin at -1, but nnU-Net's at 0: number",
        ),
        ("compare results", LABELS, change_json(labels__liver={}), "aren't as nnU-Net v2 wants them: TypeError: "),
        ("compare results", PLANS, change_json(configurations={}), "plans.json isn't as nnU-Net wants it: "),
        ("compare results", PLANS, change_json(image_reader_writer="no"), "plans.json isn't as nnU-Net wants it: "),
        # what nnU-Net builds from the plans
        ("export", PLANS, change_json(configurations__2d__architecture=[]), NOT_BUILT),
        ("export", PLANS, change_json(configurations__2d__architecture__arch_kwargs={}), NOT_BUILT),
        ("export", LABELS, change_json(labels={"liver": 1}), f"{NOT_BUILT}RuntimeError: Background label not declared"),
        # images
        ("export with a case", IMAGE, write(""), "a_0000.nii.gz: RuntimeError: Exception thrown in SimpleITK"),
        ("export with a case", IMAGE, write_vectors, "nnU-Net can't predict by "),
        ("compare folders", "nifti/before/a.nii.gz", write(""), "sitk::ERROR: "),
        (
            "compare folders",
            "nifti/before/a.nii.gz",
            make_folder,
            "nifti/before/a.nii.gz can't be read: Is a directory.",
        ),
        ("compare folders", "nifti/before/a.nii.gz", write_vectors, NO_SEGMENTATION),
        ("compare folders", "nifti/references/a.nii.gz", write_vectors, NO_SEGMENTATION),
        ("compare TIFFs", "tiff/references/a.json", write('{"spacing": "abc"}'), "has the spacing 'abc', which"),
        (
            "compare TIFFs",
            "tiff/references/a.json",
            write('{"spacing": [1, 1, NaN]}'),
            "three lengths in mm: correct",
        ),
        # tables
        ("weights", f"{MODELS[1]}/fold_0/lomix_weights.csv", write("qi"), "can't be read: "),
        ("weights", f"{MODELS[1]}/fold_0/lomix_weights.csv", write("epoch,z_0,z_1\n0,,,1\n1,1,1\n"), "can't be read: "),
    ],
)
def test_a_sentence_and_no_traceback(world, name, file, damage, sentence):
    with copied(world) as folder:
        damage(folder / file)
        result = check(CALLS[name], CALLS[name].arguments, folder)
    assert result.exit_code == 1 and sentence in result.stderr, result.stderr


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("splits", "-d", "Dataset" + "a" * 300, "--train-cases", "2"), "File name too long."),
        (("splits", "-d", "9", "--train-cases", "2", "--seeds", "1001"), "can train: 1000 at most."),
        (("splits", "-d", "9\n10", "--train-cases", "2"), "'9\\n10' is neither the number nor the name of a dataset."),
        (
            (*CALLS["compare folders"].arguments, "--tolerance", "nan"),
            "--tolerance nan is no length: give",
        ),
        (
            (*CALLS["compare folders"].arguments, "--tolerance", "inf"),
            "--tolerance inf is no length: give",
        ),
        ((*CALLS["export"].arguments, "--out", "loop"), "loop"),
        (("demo", "--out", "loop"), "loop can't be written"),
        ((*CALLS["compare folders"].arguments, "--out", "loop"), "loop can't be written"),
        ((*CALLS["compare folders"].arguments, "--out", "a/" * 3000), "can't be written (File name too long)"),
    ],
)
def test_arguments(world, arguments, sentence):
    with copied(world) as folder:
        (folder / "loop").symlink_to("loop")
        result = run(arguments, folder)
    assert result.exit_code and isinstance(result.exception, SystemExit), result.exception
    assert sentence in result.stderr and "Traceback" not in result.stderr


def test_more_jobs_than_files_are_no_more_processes(world, monkeypatch):
    """A thread for each of a billion jobs was started."""
    asked = []

    def record(jobs, **options):
        asked.append(jobs)
        return Parallel(1)

    monkeypatch.setattr("nnunet_lomix.compare.scoring.Parallel", record)
    with copied(world) as folder, inside(folder):
        source = read_folders("nifti/references", ["nifti/before", "nifti/after"])
        scoring._make_keys(source, scoring.ScoringSettings(source.labels, None, 1.0, source.reader), 10**9)
    assert asked == [18]  # three folders of six


def test_many_seeds_take_no_longer_each(monkeypatch):
    """Each seed was compared with all folds before it, which took hours for many."""
    looked_at = []
    monkeypatch.setattr(splits, "_content", lambda fold: looked_at.append(fold) or frozenset(fold["train"]))
    made, _ = splits.append_scarce([{"train": list(map(str, range(100))), "val": ["a"]}], 0, 50, 300)
    assert len(made) == len(looked_at) == 301


def test_half_a_character(world):
    """JSON can write it, and UTF-8 can't."""
    with copied(world) as folder:
        change_json(labels={"background": 0, "\ud800": 1, "tumour": 2})(folder / ENDING)
        result = check(CALLS["compare folders"], CALLS["compare folders"].arguments, folder)
        assert "dataset.json aren't as nnU-Net v2 wants them: UnicodeEncodeError: " in result.stderr
        (folder / SPLITS).write_text(json.dumps([{"train": ["\ud800", "b", "c"], "val": ["a"]}]))
        assert check(CALLS["splits"], CALLS["splits"].arguments, folder).exit_code == 0


@pytest.mark.parametrize(
    "name, place",
    [
        ("compare folders", "nifti/after"),  # SimpleITK ended the whole process
        ("export with a case", f"raw/{DATASET}"),  # as here
        ("export", MODELS[1]),
        ("weights", MODELS[1]),
    ],
)
def test_names_that_are_not_utf8(world, name, place):
    with copied(world) as folder:
        other = os.fsdecode(b"not\xffutf8")
        (folder / place).rename(folder / other)
        arguments = [argument.replace(place, other) for argument in CALLS[name].arguments]
        result = run(arguments, folder)
    assert result.exit_code == 1 and result.stderr.endswith(" is not UTF-8: rename it.\n")


@pytest.mark.parametrize("content", ["{", "[]", '{"2D": 3}', NESTED])
def test_a_demo_with_damaged_settings(world, content):
    with copied(world) as folder:
        (folder / "out").mkdir()
        (folder / "out" / "demo.json").write_text(content)
        result = run(CALLS["demo"].arguments, folder)
    assert result.exit_code == 1 and "demo.json " in result.stderr


def test_brackets_in_the_name_of_a_demo(world):
    """rich took [/b] for the end of a style, and raised."""
    with copied(world) as folder:
        assert run(("demo", "--out", "a[/b]"), folder).exit_code == 0


def test_a_damaged_cache_is_no_hindrance(world):
    with copied(world) as folder:
        (folder / "out").mkdir()
        (folder / "out" / "scores_cache.json").write_text(NESTED)
        assert run(CALLS["compare folders"].arguments, folder).exit_code == 0


@pytest.mark.parametrize("damage, code", [(lambda file: None, 0), (write(NESTED), 1)])
def test_a_real_process(world, damage, code):
    with copied(world) as folder:
        damage(folder / SPLITS)
        with inside(folder):
            command = [Path(sys.executable).parent / "nnunet_lomix", *CALLS["splits"].arguments]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == code and ended.stderr.count("\n") == code, ended.stderr
