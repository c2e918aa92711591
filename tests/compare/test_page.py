"""What a reader sees first: the summary, verdicts of single trainings, units without a scale, legends, one minus."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from PIL import Image
from rich.console import Console
from skimage.io import imsave

from nnunet_lomix.compare import compare, read_folders
from nnunet_lomix.compare.content import describe
from nnunet_lomix.compare.overlays import CLASS_COLOURS, draw_overlays
from nnunet_lomix.compare.report import write_report
from nnunet_lomix.compare.statistics import compare_trainers
from tests.compare.test_report import TRAINERS, make_curves, make_files, make_scores, read_page, report


def planted(seeds=(1, 1), cases=12) -> pd.DataFrame:
    """Dice 5 points higher in all cases; so many trainings of the reference and of the candidate."""
    old = make_scores(cases=[f"c{i:02}" for i in range(cases)], trainers=TRAINERS[:1], metrics=["Dice"])
    old["value"] = 0.4 + 0.3 * old["value"]
    shift = np.random.default_rng(1).uniform(0.04, 0.06, len(old))
    parts = [old.assign(seed=seed, value=old["value"] + seed * 1e-4) for seed in range(seeds[0])]
    new = old.assign(trainer=TRAINERS[1], value=old["value"] + shift)
    parts += [new.assign(seed=seed, value=new["value"] + seed * 1e-4) for seed in range(seeds[1])]
    return pd.concat(parts, ignore_index=True)


def header_of(page: str) -> str:
    return page[page.index("<header>") : page.index("</header>")]


@pytest.mark.parametrize("seeds, about", [((1, 1), "these two networks"), ((3, 1), "these networks")])
def test_a_single_training_is_two_networks_and_no_bold_verdict(tmp_path, seeds, about):
    printed = report(tmp_path, planted(seeds))
    page, markdown = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    sentence = f"{about.capitalize()}: nnUNetTrainerLoMix's mean Dice over 12 cases is 5.0 points higher"
    for text in (page.replace("&#39;", "'"), markdown, re.sub(r"\s+", " ", printed)):
        assert sentence in text
    assert "**" not in markdown and f"| better, {about} |" in markdown
    assert 'class="headline networks"' in page and 'class="verdict better"' not in page
    assert f'<span class="verdict networks">better <small>{about}</small></span>' in page
    assert "* is about these networks" in re.sub(r"\s+", " ", printed)


def test_several_trainings_are_a_bold_verdict_on_the_trainers(tmp_path):
    printed = report(tmp_path, planted((2, 2)))
    page, markdown = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "**nnUNetTrainerLoMix's mean Dice over 12 cases is 5.0 points higher" in markdown
    assert "| better |" in markdown and 'class="headline better"' in page and 'class="verdict better"' in page
    assert not re.search("networks", markdown.split("## How")[0] + header_of(page) + printed)


def test_undecided_is_about_nothing():
    scores = make_scores()
    told = describe(scores, compare_trainers(scores, resamples=99), {})
    assert {row.about for table in told.tables for group in table.groups for row in group.rows} == {""}


@pytest.mark.parametrize("cases, classes", [(12, 14), (3, 1)])
def test_the_summary_comes_before_the_tables_and_is_as_long_for_many_classes(tmp_path, cases, classes):
    scores = make_scores(
        [f"c{i:02}" for i in range(cases)],
        [f"organ {i}" for i in range(classes)],
        [*TRAINERS, "Third"],
        metrics=("Dice", "NSD", "HD95"),
    )
    report(tmp_path, scores, {"notes": ["left out: " + ", ".join(map(str, range(500)))]})
    page = (tmp_path / "report.html").read_text()
    header = header_of(page)
    assert page.index("<header>") < page.index("</header>") < page.index('<section id="scores">')
    # one table of three trainers and three metrics, whatever the number of classes; long notes scroll
    assert header.count("<tr>") == 4 and header.count("<td>") == 9 and 'class="soft note"' in header
    assert re.search(r"\.note \{ max-height: .*overflow-y: auto", page)
    told = describe(scores, compare_trainers(scores, resamples=200), {})
    for table in told.tables:
        for row in table.groups[-1].rows:
            assert row.mean in header and row.difference in header
        assert table.groups[-1].name == ("mean" if classes > 1 else "organ 0")
    # every link has its section
    links = set(re.findall(r'href="#([a-z]+)"', header))
    assert links and links <= set(re.findall(r'<section id="([a-z]+)">', page))


def test_every_plot_has_a_legend(tmp_path):
    report(tmp_path / "out", make_scores(), None, make_curves(TRAINERS[:1]), make_files(tmp_path, ["a"]))
    page = (tmp_path / "out" / "report.html").read_text()
    figures = [figure for figure in re.findall(r"<figure>.*?</figure>", page, re.DOTALL) if "<svg" in figure]
    legends = [re.sub(r"<[^>]*>", "", figure.split('aria-label="Legend"')[1]) for figure in figures]
    assert len(legends) == 5
    for legend in legends[:2]:
        assert {"a case", "their mean", "its 95 % interval"} <= {
            *re.findall("a case|their mean|its 95 % interval", legend)
        }
    for legend in legends[2:4]:
        assert all(word in legend for word in (*TRAINERS, "median", "middle half"))
    # a trainer without a curve is in no legend of curves
    assert "nnUNetTrainer" in legends[4] and "LoMix" not in legends[4]


def test_score_tables_have_columns_that_fit_a_phone_and_pictures_a_column_for_each_trainer(tmp_path):
    trainers = [*TRAINERS, "Third"]
    report(tmp_path / "out", make_scores(trainers=trainers), None, files=make_files(tmp_path, "ab", trainers))
    page = (tmp_path / "out" / "report.html").read_text()
    scores = page[page.index('<section id="scores">') : page.index('<section id="differences">')]
    assert {len(re.findall("<th scope", head)) for head in re.findall("<thead>.*?</thead>", scores)} == {4}
    assert "table-layout: fixed" in page and "better:<wbr>same:<wbr>worse" in scores
    assert re.search(r"\.overlay \.panels \{ grid-template-columns: repeat\(3, ", page)


def test_outlines_have_the_colours_of_their_classes(tmp_path):
    """Two neighbours, of which nothing is predicted: their outlines are the only colours, and none is white."""
    labels = np.zeros((40, 40), np.uint8)
    labels[8:32, 8:20], labels[8:32, 20:32] = 1, 2
    (case,) = make_files(tmp_path, ["a"], shape=(40, 40)).values()
    sitk.WriteImage(sitk.GetImageFromArray(labels), case.reference)
    for file in case.predictions.values():
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros_like(labels)), file)
    pictures, _ = draw_overlays(case._replace(image=None), [1, 2])
    (tmp_path / "x.png").write_bytes(pictures[TRAINERS[0]])
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)

    def where(colour: str) -> np.ndarray:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return np.argwhere(np.abs(pixels - rgb).max(axis=-1) < 30)[:, 1]

    left, right = where(CLASS_COLOURS[0]), where(CLASS_COLOURS[1])
    assert len(left) > 100 and len(right) > 100
    assert not len(where("#ffffff"))
    # side by side where they touch: neither is covered by the other
    assert left.max() < right.min()


# files without a scale


@pytest.fixture(params=[".png", ".bmp", ".tif"])
def without_scale(request, tmp_path):
    """A square of 10 × 10 pixels, and the same moved by 2 pixels."""
    for name, shift in (("truth", 0), ("old", 0), ("new", 2)):
        (tmp_path / name).mkdir()
        for case in "ab":
            mask = np.zeros((30, 30), np.uint8)
            mask[10:20, 10 + shift : 20 + shift] = 1
            imsave(tmp_path / name / f"{case}{request.param}", mask, check_contrast=False)
    return read_folders(tmp_path / "truth", [tmp_path / "old", tmp_path / "new"])


def test_distances_without_a_scale_are_pixels_everywhere(without_scale, tmp_path):
    result = compare(without_scale, tolerance=2)
    assert result.scores.query("metric == 'HD95' and trainer == 'new'")["value"].tolist() == [2.0, 2.0]
    assert result.information["distance_unit"] == "pixels" and result.information["tolerance_pixels"] == 2
    printed = io.StringIO()
    write_report(
        tmp_path / "out",
        result.scores,
        result.comparison,
        result.information,
        result.source.curves,
        result.source.files,
        Console(file=printed, width=80),
    )
    page = (tmp_path / "out" / "report.html").read_text()
    texts = {
        "html": re.sub(r"\s+", " ", "".join(read_page(tmp_path / "out").words)),
        "labels": " ".join(re.findall('aria-label="([^"]*)"', page)),
        "md": (tmp_path / "out" / "report.md").read_text(),
        "json": (tmp_path / "out" / "comparison.json").read_text(),
        "printed": re.sub(r"\s+", " ", printed.getvalue()),
    }
    for name, text in texts.items():
        assert "pixels" in text, name
        assert not re.search(r"\bmm\b", text.replace("not in mm", "")), name
    for name in ("html", "md", "printed"):
        assert "no scale, so that HD95 and the tolerance of the NSD are in pixels, not in mm" in texts[name], name
        assert "HD95, pixels, lower is better" in texts[name], name
    assert "within 2 pixels." in texts["html"] and "2.0 pixels larger" in texts["printed"]
    assert json.loads(texts["json"])["units"]["HD95"] == "pixels"


def test_one_pixel_is_no_pixels():
    scores = make_scores(metrics=("Dice", "NSD", "HD95"))
    information = {"distance_unit": "pixels", "tolerance_pixels": 1.0}
    told = describe(scores, compare_trainers(scores, resamples=99), information)
    assert "within 1 pixel." in told.methods[0]
    assert [table.title for table in told.tables][2] == "HD95, pixels, lower is better"


# few cases; minus signs


@pytest.mark.parametrize("cases, warned", [(1, False), (4, True), (5, True), (6, False)])
def test_few_cases_are_told(cases, warned):
    scores = make_scores(cases=[str(i) for i in range(cases)])
    notes = describe(scores, compare_trainers(scores, resamples=99), {}).notes
    expected = {4: "in 88 of 100 studies at most", 5: "in 94 of 100 studies at most"}
    assert len(notes) == warned and (not warned or expected[cases] in notes[0])


def test_there_is_one_minus_sign(tmp_path):
    scores = make_scores(metrics=("Dice", "NSD", "HD95"), seeds=2)
    printed = report(tmp_path, scores, {"date": "2026"})
    texts = [printed, (tmp_path / "report.md").read_text(), "".join(read_page(tmp_path).words)]
    assert all("−" in text for text in texts)
    for text in texts:
        # a hyphen before a number, but for the ranges and names that have it within a word
        assert not re.findall(r"(?<![\w-])-\s?\d", text)
    # programs read the sign of the keyboard
    data = (tmp_path / "scores.csv").read_text() + json.dumps(
        json.loads((tmp_path / "comparison.json").read_text())["comparison"], ensure_ascii=False
    )
    assert "−" not in data and re.search(r"-\d", data)
