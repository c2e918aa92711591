"""Reading a case as nnU-Net does; what a model predicts is compared with nnU-Net's commands in tests/export."""

import numpy as np
import pytest
import SimpleITK as sitk
from skimage.io import imsave

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.prediction import read_case

PLANS = {"image_reader_writer": "SimpleITKIO"}
ONE = {"file_ending": ".nii.gz", "channel_names": {"0": "MRI"}}
TWO = ONE | {"channel_names": {"0": "T1", "1": "T2"}}


def write(file, value=0.0):
    sitk.WriteImage(sitk.GetImageFromArray(np.full((1, 4, 5), value, np.float32)), file)
    return file


def test_the_channels_of_a_case_are_collected_as_nnunet_does(tmp_path):
    for name in ("p_1_0000", "p_1_0002", "p_0000", "p_1", "._p_1_0000", "qp_1_0000"):
        write(tmp_path / f"{name}.nii.gz", 2.0 if name == "p_1_0002" else 1.0)
    (tmp_path / "p_1_0001.png").touch()
    name, (pixels, _) = read_case(tmp_path / "p_1_0002.nii.gz", PLANS, TWO)
    assert name == "p_1" and pixels.shape == (2, 1, 4, 5) and pixels[:, 0, 0, 0].tolist() == [1.0, 2.0]


def test_an_rgb_picture_is_one_file_with_three_channels(tmp_path):
    rgb = {"file_ending": ".png", "channel_names": {"0": "red", "1": "green", "2": "blue"}}
    pixels = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    imsave(tmp_path / "p_0000.png", pixels, check_contrast=False)
    imsave(tmp_path / "grey_0000.png", pixels[..., 0], check_contrast=False)
    plans = {"image_reader_writer": "NaturalImage2DIO"}
    assert np.array_equal(read_case(tmp_path / "p_0000.png", plans, rgb)[1][0][:, 0], pixels.transpose(2, 0, 1))
    with pytest.raises(LoMixError, match=r"grey_0000.png, but 3 in the model \(red, green, blue\): keep"):
        read_case(tmp_path / "grey_0000.png", plans, rgb)


def test_mistakes_get_one_sentence(tmp_path):
    with pytest.raises(LoMixError, match="CASE_0000.nii.gz: rename it"):
        read_case(write(tmp_path / "case.nii.gz"), PLANS, ONE)
    write(tmp_path / "case_0000.nii.gz")
    files = f"{tmp_path}/case_0000.nii.gz, {tmp_path}/case_0001.nii.gz"
    with pytest.raises(LoMixError, match=rf"number of channels is 2 in {files}, but 1 in the model \(MRI\): keep"):
        read_case(write(tmp_path / "case_0001.nii.gz"), PLANS, ONE)
    (tmp_path / "bad_0000.nii.gz").write_text("no image")
    with pytest.raises(LoMixError, match="nnU-Net can't read .*bad_0000.nii.gz"):
        read_case(tmp_path / "bad_0000.nii.gz", PLANS, ONE)
