"""The download of Synapse, in its own layout, with all its cases."""

import SimpleITK as sitk
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

from nnunet_lomix.convert import convert

from .downloads import SCANS, draw_labels, read_all

# the labels of BTCV, as its site lists them
BTCV = ["background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"]
BTCV += ["inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland"]


def test_synapse(whole, nnunet, capsys):
    folder = convert("synapse", whole["synapse"])
    assert folder == nnunet.raw / "Dataset601_Synapse"
    description, folds, labels = read_all(folder)
    assert description["channel_names"] == {"0": "CT"}
    tested = [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38]
    assert folds[0]["val"] == [f"case{scan:04}" for scan in tested]
    assert folds[0]["train"] == [f"case{scan:04}" for scan in SCANS if scan not in tested]
    assert [(len(fold["train"]), fold["val"]) for fold in folds[1:]] == [(1, folds[0]["val"])] * 3
    classes = description["labels"]
    assert len(classes) == 9
    for scan in SCANS:
        truth = draw_labels(f"scan {scan}", 13)
        case = f"case{scan:04}"
        for value, organ in enumerate(BTCV):
            assert (labels[case][truth == value] == classes.get(organ, 0)).all(), organ
        before = whole["synapse"] / f"RawData/Training/img/img{scan:04}.nii.gz"
        assert (folder / f"imagesTr/{case}_0000.nii.gz").read_bytes() == before.read_bytes()
    written, before = (sitk.ReadImage(str(file)) for file in (folder / f"labelsTr/{case}.nii.gz", before))
    for of in ("Spacing", "Origin", "Direction"):
        assert getattr(written, f"Get{of}")() == getattr(before, f"Get{of}")()
    assert written.GetPixelID() == sitk.sitkUInt8
    verify_dataset_integrity(str(folder), num_processes=1)  # nnU-Net's own check
    output = capsys.readouterr().out
    assert "your dataset is most likely OK" in output and "WARNING" not in output
