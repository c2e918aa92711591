"""The pictures in docs/images, and what the documents say of them: from a demo, which is deterministic."""

import json
import shutil
from pathlib import Path
from typing import Any

from documents import ROOT

from nnunet_lomix.demo import default_settings, run_demo
from nnunet_lomix.trainers import nnUNetTrainerLoMix

IMAGES = ROOT / "docs" / "images"
NOTES = IMAGES / "demo.json"
WEIGHTS = "lomix_weights.png"
WIDTH = 1000  # pixels of the page, and most height of a picture
# of the report; None is the top of the page
SECTIONS = {"compare_report.png": None, "compare_plots.png": "#differences", "compare_overlays.png": "#overlays"}


def write_pictures(folder: Path, images: Path = IMAGES) -> list[Path]:
    """Run the 2D demo in a folder, and make the pictures of its report; gives the files that were written."""
    run_demo(folder, default_settings(2))
    report = folder / "report_2d"
    shutil.copyfile(report / WEIGHTS, images / WEIGHTS)
    take_pictures(report / "report.html", images)
    rows = json.loads((report / "comparison.json").read_text())["comparison"]
    comparison = [{name: row[name] for name in ("metric", "class", "difference", "verdict")} for row in rows]
    notes = {"defaults": defaults_of(nnUNetTrainerLoMix), "comparison": comparison}
    (images / NOTES.name).write_text(json.dumps(notes, indent=1) + "\n")
    return [images / name for name in (WEIGHTS, *SECTIONS, NOTES.name)]


def take_pictures(page_file: Path, images: Path) -> None:
    """Those of a report in Debian's chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": WIDTH})
        page.goto(page_file.as_uri())
        for name, section in SECTIONS.items():
            place = page.locator(section or "body").bounding_box()
            clip = {**place, "height": min(place["height"], WIDTH)}
            page.screenshot(path=images / name, full_page=True, clip=clip)
        browser.close()


def defaults_of(trainer: type) -> dict[str, Any]:
    """The settings of a LoMix trainer, by which its weights and results change."""
    names = ["operators", "mixed_scales", "rule", "anchor", "share", "stride", "weight_ce", "weight_dice"]
    names += ["weights_lr", "fusion_lr", "loss_weight_decay"]
    return json.loads(json.dumps({name: getattr(trainer, name) for name in names}))
