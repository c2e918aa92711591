"""What fuzzing has found, with the right sentence for each: these inputs once ended in a traceback, or never."""

import json
import os

import numpy as np
import pytest
import SimpleITK as sitk

from .test_commands import IMAGE, SPLITS, check, copied, list_arguments
from .world import MODELS

NESTED = "[" * 100_000
PLANS, LABELS = f"{MODELS[1]}/plans.json", f"{MODELS[1]}/dataset.json"
NOT_BUILT = "nnU-Net can't build the network of configuration '2d' from plans.json and dataset.json: "
VECTORS = sitk.GetImageFromArray(np.zeros((8, 8, 3), np.uint8), isVector=True)


@pytest.mark.parametrize(
    "name, file, content, sentence",
    [
        # nested too deeply for Python's parser
        ("splits", SPLITS, NESTED, "splits_final.json is not a list of folds, each with train and val"),
        ("export", PLANS, NESTED, "plans.json can't be read: maximum recursion depth exceeded"),
        # values of other types, in what is there
        ("export", PLANS, {"dataset_name": 5}, "plans.json is not nnU-Net's: its dataset_name is not a text."),
        ("compare results", PLANS, {"configurations": []}, "its configurations is not an object."),
        ("export", LABELS, {"channel_names": None}, "its channel_names is not an object."),
        ("compare results", LABELS, {"file_ending": ["**"]}, "its file_ending is not a text."),
        ("compare nii", "nii/before/dataset.json", {"file_ending": "**/"}, "has no file that ends in "),
        ("compare results", LABELS, {"labels": {"background": 0, "a": -1, "b": 2}}, "begin at -1, but nnU-Net's at 0"),
        ("compare results", LABELS, {"labels": {"background": 0, "a": {}}}, "aren't as nnU-Net v2 wants them: TypeErr"),
        ("compare nii", "nii/before/dataset.json", {"labels": {"background": 0, "\ud800": 1}}, "UnicodeEncodeError: "),
        ("compare results", PLANS, {"configurations": {}}, "plans.json isn't as nnU-Net wants it: "),
        ("compare results", PLANS, {"image_reader_writer": "no"}, "plans.json isn't as nnU-Net wants it: "),
        ("export", LABELS, {"labels": {"liver": 1}}, f"{NOT_BUILT}RuntimeError: Background label not declared"),
        # images
        ("export with a case", IMAGE, "", "a_0000.nii.gz: RuntimeError: Unable to determine ImageIO reader"),
        ("export with a case", IMAGE, VECTORS, "nnU-Net can't predict by "),
        ("compare nii", "nii/before/a.nii.gz", "", "RuntimeError: Unable to determine ImageIO reader"),
        ("compare nii", "nii/before/a.nii.gz", VECTORS, "a.nii.gz is no segmentation: it needs one channel of whole"),
        ("compare nii", "nii/references/a.nii.gz", VECTORS, "a.nii.gz is no segmentation: it needs one channel of"),
        ("weights", f"{MODELS[1]}/fold_0/lomix_weights.csv", "epoch,z_0,z_1\n0,,,1\n1,1,1\n", "can't be read: "),
    ],
)
def test_a_sentence_and_no_traceback(world, name, file, content, sentence):
    with copied(world) as folder:
        if isinstance(content, sitk.Image):
            sitk.WriteImage(content, folder / file)
        elif isinstance(content, str):
            (folder / file).write_text(content)
        else:
            (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | content))
        result = check(list_arguments(name), folder)
    assert result.exit_code == 1 and sentence in result.stderr, result.stderr


@pytest.mark.parametrize("name, place", [("compare nii", "nii/after"), ("export", MODELS[1]), ("weights", MODELS[1])])
def test_names_that_are_not_utf8(world, name, place):
    """SimpleITK ended the whole process."""
    other = os.fsdecode(b"not\xffutf8")
    with copied(world) as folder:
        (folder / place).rename(folder / other)
        result = check([argument.replace(place, other) for argument in list_arguments(name)], folder)
    assert result.exit_code == 1 and result.stderr.endswith(" is not UTF-8: rename it.\n")
