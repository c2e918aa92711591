"""Polyps: CVC-ClinicDB and its fellows, RGB pictures of colonoscopies with a mask each.

Layouts that are known, each anywhere in the first two levels of a download:

- CVC-ClinicDB: ``Original/1.tif`` and ``Ground Truth/1.tif``, or PNG (Bernal et al., 2015; 612 frames of 29 videos);
- Kvasir-SEG: ``images/NAME.jpg`` and ``masks/NAME.jpg`` (Jha et al., 2020; 1000 pictures);
- CVC-ColonDB, as PraNet packs it: ``images/1.png`` and ``masks/1.png`` (380);
- ETIS-LaribPolypDB: ``ETIS-LaribPolypDB/1.tif`` and ``Ground Truth/p1.tif`` (196);
- any of these in ``train``, ``val`` and ``test``, with images and masks in each, as LoMix's repository offers them;
- PraNet's ``TrainDataset`` and ``TestDataset`` (Fan et al., 2020; 1450 and 798).

A split that the download has is kept. Otherwise 80 % of the pictures are for training, 10 % for validation, 10 % for
tests. The paper names none of them, so they are drawn one by one, by a hash of their names: everybody gets the same.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_lomix.compare.sources import shorten
from nnunet_lomix.convert.common import Case, Download, advise, check_sizes, list_files, read
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.splits import draw

SIZES = {"CVC-ClinicDB": 612, "Kvasir-SEG": 1000, "CVC-ColonDB": 380, "ETIS-LaribPolypDB": 196, "PraNet": 2248}
# parts of the names of folders, the surest first
MARKS = {
    "traindataset": "PraNet",
    "original": "CVC-ClinicDB",
    "clinicdb": "CVC-ClinicDB",
    "kvasir": "Kvasir-SEG",
    "colondb": "CVC-ColonDB",
    "etis": "ETIS-LaribPolypDB",
}
IMAGES = ("Original", "images", "image", "ETIS-LaribPolypDB")
MASKS = ("Ground Truth", "masks", "mask")
ENDINGS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
PARTS = {"train": "train", "traindataset": "train", "test": "test", "testdataset": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "val"
)
HELD_OUT = 0.1  # of a collection without a split, for validation and for tests each
THRESHOLD = 127  # masks that were saved as JPEG have noise around 0 and 255
FRAMES_ALIKE = (
    "The test pictures were drawn one by one, so other frames of their videos are among the training cases: scores are "
    "higher than they would be on other patients."
)


def find(source: Path) -> Download:
    """A collection in a folder, in one of the layouts above.

    Raises:
        LoMixError: there is none, there are several, or it is not whole.
    """
    pairs = find_pairs(source)
    found = {folder: pair_files(*pair) for folder, pair in pairs.items()}
    name = identify(source, found)
    cases: dict[str, Case] = {}
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    names = [stem for own in found.values() for stem in own]
    for folder, own in found.items():
        # the same number in several folders is another picture
        prefix = f"{folder.name}_" if len(set(names)) < len(names) else ""
        cases |= {f"{prefix}{name_case(stem)}": case for stem, case in own.items()}
        part = part_of(source, folder)
        if part:
            parts[part] += [f"{prefix}{name_case(stem)}" for stem in own]
    if len(cases) != len(names):
        raise LoMixError(f"{source} has pictures whose names differ by zeros or spaces alone: give them other names.")
    drawn = not any(parts.values())
    if drawn:
        parts = split(sorted(cases))
    check_sizes(cases.values())
    return Download(
        name=name.replace("-", ""),
        number=603,
        channels=["R", "G", "B"],
        classes=["polyp"],
        ending=".png",
        cases=cases,
        train=parts["train"],
        test=parts["test"],
        val=parts["val"],
        write_image=write_image,
        write_labels=write_mask,
        notes=[FRAMES_ALIKE] if drawn and name != "Kvasir-SEG" else [],
    )


def find_pairs(source: Path) -> dict[Path, tuple[Path, Path]]:
    """Folders with a folder of images and one of masks, and these two: one collection, or its parts.

    Raises:
        LoMixError: there are none, or they are no single collection.
    """
    below = [folder for level in ("*", "*/*") for folder in sorted(source.glob(level)) if folder.is_dir()]
    pairs = {}
    for folder in (source, *below):
        images, masks = ([folder / n for n in names if (folder / n).is_dir()] for names in (IMAGES, MASKS))
        if images and masks:
            pairs[folder] = (images[0], masks[0])
    # the same pictures in two formats
    pairs = {f: pair for f, pair in pairs.items() if f.name != "TIF" or f.with_name("PNG") not in pairs}
    if not pairs:
        raise LoMixError(
            f"{source} has no folders of images and masks (Original and Ground Truth, …): {advise(source)}"
        )
    parts = [part_of(source, folder) for folder in pairs]
    if len(pairs) > 1 and (None in parts or parts.count("train") != 1 or "test" not in parts):
        listed = shorten(folder.relative_to(source) for folder in pairs)
        raise LoMixError(f"{source} is not one collection, as it has {listed}: give the folder of one.")
    return pairs


def part_of(source: Path, folder: Path) -> str | None:
    """``train``, ``val`` or ``test``, by the names of a folder below the source; None without such a name."""
    return next((PARTS[name.lower()] for name in folder.relative_to(source).parts if name.lower() in PARTS), None)


def pair_files(images: Path, masks: Path) -> dict[str, Case]:
    """The pictures of a folder with their masks, by name. ETIS's masks are called after the image, with a p before.

    Raises:
        LoMixError: a picture has no mask, or a mask no picture.
    """
    pictures = list_files(images, ENDINGS)
    own = {
        stem if stem in pictures else stem.removeprefix("p"): file for stem, file in list_files(masks, ENDINGS).items()
    }
    for there, names, other in ((masks, pictures, own), (images, own, pictures)):
        missing = [stem for stem in names if stem not in other]
        if missing:
            raise LoMixError(f"{there} lacks {shorten(missing)}: the download is not whole, so repeat it.")
    return {stem: Case(picture, own[stem]) for stem, picture in pictures.items()}


def identify(source: Path, found: dict[Path, dict[str, Case]]) -> str:
    """Which collection this is, by names of folders or the number of pictures; and that all of them are there.

    Raises:
        LoMixError: some are missing, or it is none of the known collections.
    """
    stems = [stem for own in found.values() for stem in own]
    images = (next(iter(own.values())).image.parent for own in found.values() if own)
    inside = " ".join(str(folder.relative_to(source)) for folder in images).lower()
    said = f"{source.resolve().name} {inside}".lower()  # people may call a folder original
    by_name = [name for mark, name in MARKS.items() if mark in (inside if mark == "original" else said)]
    by_size = [name for name, size in SIZES.items() if size == len(stems)]
    name = next(iter(by_name or by_size), "")
    if not name:
        known = ", ".join(f"{name} {size}" for name, size in SIZES.items())
        raise LoMixError(
            f"{source} has {len(stems)} pictures, and no known collection has ({known}): repeat the download."
        )
    if len(stems) != SIZES[name]:
        missing = [number for number in map(str, range(1, SIZES[name] + 1)) if number not in stems]
        listed = f", without {shorten(missing)}" if all(map(str.isdigit, stems)) and len(found) == 1 else ""
        raise LoMixError(
            f"{source} has {len(stems)} of the {SIZES[name]} pictures of {name}{listed}: the download is not whole, so "
            "repeat it."
        )
    return name


def name_case(stem: str) -> str:
    """nnU-Net's name of a picture.

    >>> name_case("7"), name_case("cju0 qkwl")
    ('007', 'cju0_qkwl')
    """
    return f"{int(stem):03}" if stem.isdecimal() else re.sub(r"[^\w.-]", "_", stem)


def split(cases: list[str]) -> dict[str, list[str]]:
    """Training, validation and test cases, drawn one by one."""
    count = int(HELD_OUT * len(cases) + 0.5)
    test = draw(cases, count, seed=0)
    val = [case for case in draw(cases, 2 * count, seed=0) if case not in test]
    return {"train": [case for case in cases if case not in {*test, *val}], "val": val, "test": test}


def write_image(source: Path, target: Path) -> None:
    """Write a picture as RGB PNG, without loss.

    Raises:
        LoMixError: it can't be read, or isn't 8-bit grey or colour.
    """
    pixels = read_pixels(source)
    colours = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    if source.suffix.lower() == ".png" and pixels.shape[-1] == 3:
        shutil.copyfile(source, target)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(target))


def write_mask(source: Path, target: Path) -> None:
    """Write a mask as PNG of 0 and 1.

    Raises:
        LoMixError: it can't be read, isn't 8-bit, or has no polyp, which each picture of these collections has.
    """
    pixels = read_pixels(source)[..., :3]
    mask = (pixels.max(axis=-1) > THRESHOLD).astype(np.uint8)
    if not mask.any():
        raise LoMixError(
            f"{source} has no polyp, as its values end at {pixels.max()}: masks are 255 there, so repeat the download."
        )
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(target))


def read_pixels(file: Path) -> np.ndarray:
    """The pixels of a picture, ``(height, width, channels)``, uint8.

    Raises:
        LoMixError: it can't be read, or isn't 8-bit grey or colour.
    """
    image = read(file)
    pixels = sitk.GetArrayFromImage(image)
    if image.GetDimension() != 2 or pixels.dtype != np.uint8 or image.GetNumberOfComponentsPerPixel() == 2:
        raise LoMixError(f"{file} is no picture of 8-bit grey or colour: repeat the download.")
    return pixels if pixels.ndim == 3 else pixels[..., None]
