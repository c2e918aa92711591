"""The download of ACDC, in its own layout and in other ones, with all its cases."""

import numpy as np
import SimpleITK as sitk

from nnunet_lomix.convert import convert

from .downloads import draw_labels, es_frame, read_all, replace, write_volume


def test_acdc(whole, nnunet):
    folder = convert("acdc", whole["acdc"])
    description, folds, labels = read_all(folder)
    assert folder.name == "Dataset602_ACDC" and description["channel_names"] == {"0": "cineMRI"}
    assert len(labels) == 200 and len(description["labels"]) == 4
    for patient in range(1, 101):
        name = f"patient{patient:03}"
        for phase, frame in (("ED", 1), ("ES", es_frame(patient))):
            assert np.array_equal(labels[f"{name}_{phase}"], draw_labels(f"{name} {frame}", 3))
        for fold in folds[:2]:  # both frames on one side
            sides = [[case.startswith(name) for case in fold[part]].count(True) for part in ("train", "val")]
            assert sides in ([2, 0], [0, 2], [0, 0])
    assert [(len(fold["train"]), len(fold["val"])) for fold in folds] == [(140, 40), (140, 20)] + 3 * [(7, 40)]
    assert folds[0]["train"] == folds[1]["train"] and not set(folds[0]["val"]) & set(folds[1]["val"])
    tested = {int(case[7:10]) for case in folds[0]["val"]}
    assert tested == {2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95}
    assert {int(case[7:10]) for case in folds[1]["val"]} == {19, 21, 29, 33, 41, 50, 61, 71, 76, 80}
    name = f"patient033_frame{es_frame(33):02}.nii.gz"
    before = whole["acdc"] / "database/training/patient033" / name
    assert (folder / "imagesTr/patient033_ES_0000.nii.gz").read_bytes() == before.read_bytes()


def test_other_forms_of_the_same_volumes_are_read(own, nnunet):
    """Not packed, in a folder of its name, or packed by its name alone; an Info.cfg with the mark of another editor."""
    source = own("acdc")
    patients = ("patient001", "patient002", "patient003")
    for patient, form in zip(patients, ("plain", "in a folder", "not packed"), strict=True):
        packed = source / f"database/training/{patient}/{patient}_frame01.nii.gz"
        plain = packed.with_suffix("")
        packed.unlink()
        file = write_volume(
            plain / plain.name if form == "in a folder" else plain, 50 * draw_labels(f"{patient} 1", 3).astype(np.int16)
        )
        if form == "not packed":
            file.rename(packed)
    info = source / "database/training/patient001/Info.cfg"
    replace(info, b"\xef\xbb\xbf" + info.read_bytes())
    folder = convert("acdc", source)
    for patient in patients:
        written = folder / f"imagesTr/{patient}_ED_0000.nii.gz"
        image = sitk.ReadImage(str(written))
        assert np.array_equal(sitk.GetArrayFromImage(image), 50 * draw_labels(f"{patient} 1", 3))
        assert image.GetSpacing() == (1.5, 1.5, 5.0) and image.GetPixelID() == sitk.sitkInt16
        assert written.read_bytes()[:2] == b"\x1f\x8b"
