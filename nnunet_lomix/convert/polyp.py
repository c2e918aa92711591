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
from PIL import Image

from nnunet_lomix.convert.common import Case, Download, advise
from nnunet_lomix.errors import LoMixError, explaining, shorten
from nnunet_lomix.nnunet.datasets import is_hidden
from nnunet_lomix.splits import draw

SIZES = {"CVC-ClinicDB": 612, "Kvasir-SEG": 1000, "CVC-ColonDB": 380, "ETIS-LaribPolypDB": 196, "PraNet": 2248}
IMAGES = ("Original", "images", "image", "ETIS-LaribPolypDB")
MASKS = ("Ground Truth", "masks", "mask")
ENDINGS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
PARTS = {"train": "train", "traindataset": "train", "test": "test", "testdataset": "test"}
PARTS |= dict.fromkeys(("val", "valid", "validation"), "val")
HELD_OUT = 0.1  # of a collection without a split, for validation and for tests each
THRESHOLD = 127  # masks that were saved as JPEG have noise around 0 and 255
DEPTHS_OF_8 = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes of at most 8 bits
FRAMES_ALIKE = (
    "The test pictures were drawn one by one, so other frames of their videos are among the training cases: scores are "
    "higher than they would be on other patients."
)


def find(source: Path) -> Download:
    """A collection in a folder, in one of the layouts above.

    Raises:
        LoMixError: there is none, there are several, or it is not whole.
    """
    found = {folder: pair_files(*pair) for folder, pair in find_pairs(source).items()}
    names = [stem for own in found.values() for stem in own]
    name = identify(source, len(names))
    cases: dict[str, Case] = {}
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for folder, own in found.items():
        # the same number in several folders is another picture
        prefix = f"{folder.name}_" if len(set(names)) < len(names) else ""
        named = {f"{prefix}{name_case(stem)}": case for stem, case in own.items()}
        cases |= named
        part = part_of(source, folder)
        if part:
            parts[part] += named
    if len(cases) != len(names):
        raise LoMixError(f"{source} has pictures whose names differ by zeros or spaces alone: give them other names.")
    drawn = not any(parts.values())
    if drawn:
        parts = split(sorted(cases))
    for image, mask in cases.values():
        sizes = [" × ".join(map(str, open_picture(file).size)) for file in (mask, image)]
        if sizes[0] != sizes[1]:
            raise LoMixError(f"{mask} has {' pixels, but its image '.join(sizes)}: repeat the download.")
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
    pictures, own = (
        {file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in ENDINGS and not is_hidden(file)}
        for folder in (images, masks)
    )
    own = {stem if stem in pictures else stem.removeprefix("p"): file for stem, file in own.items()}
    for there, names, other in ((masks, pictures, own), (images, own, pictures)):
        missing = [stem for stem in names if stem not in other]
        if missing:
            raise LoMixError(f"{there} lacks {shorten(missing)}: the download is not whole, so repeat it.")
    return {stem: Case(picture, own[stem]) for stem, picture in pictures.items()}


def identify(source: Path, count: int) -> str:
    """Which collection has so many pictures.

    Raises:
        LoMixError: none of the known ones.
    """
    if count not in SIZES.values():
        known = ", ".join(f"{name} {size}" for name, size in SIZES.items())
        raise LoMixError(
            f"{source} has {count} pictures, and no known collection has so many ({known}): the download is not whole, "
            "so repeat it."
        )
    return next(name for name, size in SIZES.items() if size == count)


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
        LoMixError: it can't be read, or isn't 8-bit.
    """
    picture = open_picture(source)
    if picture.mode not in DEPTHS_OF_8:
        raise LoMixError(f"{source} has pixels of the kind {picture.mode}: convert it to a PNG of 8 bits per channel.")
    if (picture.format, picture.mode) == ("PNG", "RGB"):
        shutil.copyfile(source, target)
        return
    with explaining(f"{source} can't be read, so repeat the download"):
        picture.convert("RGB").save(target)


def write_mask(source: Path, target: Path) -> None:
    """Write a mask as PNG of 0 and 1. Two values are clear, whatever they are; JPEG has noise around 0 and 255.

    Raises:
        LoMixError: it can't be read, has other values, or has no polyp, which each picture of these collections has.
    """
    picture = open_picture(source)
    with explaining(f"{source} can't be read, so repeat the download"):
        pixels = np.asarray(picture.convert("RGB")).max(axis=-1) if picture.mode in DEPTHS_OF_8 else np.asarray(picture)
    values = np.unique(pixels)
    if len(values) > 2 and picture.mode not in DEPTHS_OF_8:
        raise LoMixError(
            f"{source} has {len(values)} values from {values[0]} to {values[-1]}, of the kind {picture.mode}, but a "
            "mask has two: convert it to a PNG of 0 and 255."
        )
    mask = pixels > (0 if len(values) == 2 and values[0] == 0 else THRESHOLD)
    if not mask.any():
        raise LoMixError(
            f"{source} has no polyp, as its values end at {values[-1]}: masks are 255 there, so repeat the download."
        )
    Image.fromarray(mask.astype(np.uint8)).save(target)


def open_picture(file: Path) -> Image.Image:
    """A picture whose header has been read.

    Raises:
        LoMixError: it can't be.
    """
    with explaining(f"{file} can't be read, so repeat the download"):
        return Image.open(file)
