"""The files of a report and what is printed, from made-up scores; how the page looks is in test_browser.py."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from nnunet_lomix.compare import plots
from nnunet_lomix.compare import report as report_module
from nnunet_lomix.compare.report import write_report
from nnunet_lomix.errors import LoMixError
from tests.compare.made_up import TRAINERS, make_curves, make_files, make_result, make_scores, report

FILES = ("comparison.json", "report.html", "report.md", "scores.csv")
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Checks that elements are closed in order; keeps elements, text and attributes."""

    VOID = ("meta", "img", "br", "wbr", "link", "input", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def read_page(folder) -> Page:
    return Page((folder / "report.html").read_text())


def test_a_reader_that_leaves_early_costs_no_file(tmp_path):
    """``nnunet_lomix compare … | head``"""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    result = make_result(make_scores())
    with pytest.raises((BrokenPipeError, SystemExit)):
        write_report(tmp_path, result, Console(file=Closed()))
    assert sorted(p.name for p in tmp_path.iterdir()) == list(FILES)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "scores.csv"), result.scores)


def test_json_is_strict_and_keeps_every_number(tmp_path):
    result = make_result(make_scores(cases=["only"]), dataset="Däta")  # no interval: NaN is no JSON
    report(tmp_path, result)

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=refuse)
    assert content["information"] == result.information and content["information"]["dataset"] == "Däta"
    assert content["units"] == {"Dice": "0 to 1", "HD95": "mm"}
    for row, expected in zip(content["comparison"], result.comparison.to_dict("records"), strict=True):
        assert row["difference"] == pytest.approx(expected["difference"], abs=1e-12)
        assert row["difference_low"] is None and row["seed_low"] is None and row["verdict"] == "undecided"
        assert row.keys() == expected.keys()


@pytest.mark.parametrize("images, shape", [(True, (5, 12, 14)), (False, (12, 14))])
def test_page_is_sound_and_self_contained(tmp_path, images, shape):
    scores = make_scores(seeds=2, cases=["a", "b"])
    files = make_files(tmp_path, scores, shape, images)
    report(tmp_path / "out", make_result(scores, curves=make_curves(), **files))
    page = read_page(tmp_path / "out")
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
    for tag, name, value in page.attributes:
        if name in loading:
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
        assert not re.search(r"url\((?!#)", value or "")
        assert not name.startswith("on")
    assert not {"script", "link", "iframe", "object", "base"} & {*page.tags}
    assert not re.search(r"@import|url\((?!#)", (tmp_path / "out" / "report.html").read_text())
    # two metrics twice, and the curves; two cases of two trainers
    pictures = {"svg": "aria-label", "img": "alt"}
    texts = [value for tag, name, value in page.attributes if pictures.get(tag) == name]
    assert (page.tags.count("svg"), page.tags.count("img")) == (5, 4) and len(texts) == 9
    assert all(len(text) > 20 for text in texts)
    assert any(re.search(r"a, (slice \d of 5)?: prediction of nnUNetTrainerLoMix", text) for text in texts)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len({*ids})
    used = {value[1:] for tag, name, value in page.attributes if (tag, name) == ("use", "xlink:href")}
    clipped = {value[5:-1] for _, name, value in page.attributes if name == "clip-path"}
    assert used and clipped and used | clipped <= {*ids}


def test_names_are_only_text(tmp_path):
    scores = make_scores(cases=[EVIL, "b"], classes=[EVIL + "|[bold]", "$x"], trainers=["A", EVIL])
    source = {"dataset": EVIL, "label_source": EVIL, "configuration": EVIL, "curves": make_curves(["A", EVIL])}
    source["folders"] = {("A", 0): Path("a"), (EVIL, 0): Path(EVIL)}
    result = make_result(scores, notes=[EVIL], **source | make_files(tmp_path, scores))
    printed = report(tmp_path / "out", result)
    page = read_page(tmp_path / "out")
    assert "script" not in page.tags
    assert EVIL in "".join(page.words)
    assert "[bold]" in printed
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert not re.search(r"(?<!\\)<script", markdown)
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {10, 7}  # a bar of a name is no new cell


@pytest.mark.parametrize("cases, classes", [(["a", "b"], ["liver"]), (["only"], ["x", "y"])])
def test_one_case_and_one_class(tmp_path, cases, classes):
    printed = report(tmp_path, make_result(make_scores(cases=cases, classes=classes)))
    text = "".join(read_page(tmp_path).words)
    assert ("a single case" in text) == (len(cases) == 1)
    assert "nan" not in printed.lower() and "nan" not in text.lower()
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| mean |")]
    assert bool(rows) == (len(classes) > 1)  # one class is its own mean


def test_more_trainers_than_colours_and_equal_scores(tmp_path):
    trainers = [f"nnUNetTrainer{i}" for i in range(8)]
    scores = make_scores(classes=["x", "y", "z"], trainers=trainers, metrics=["Dice"])
    scores["value"] = scores["value"].where(~scores["trainer"].isin(trainers[:2]), 0.5)
    report(tmp_path, make_result(scores, curves=make_curves(trainers)))
    text = "".join(read_page(tmp_path).words)
    assert "nnUNetTrainer1 and nnUNetTrainer0 have the same mean Dice in each of 4 cases." in text


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_terminal_is_as_wide_as_it_is(tmp_path, width):
    trainers = ["nnUNetTrainer", "nnUNetTrainerLoMixFixedWeights_50epochs"]
    scores = make_scores(classes=["pulmonary vein", "x"], trainers=trainers)
    scores["value"] *= np.where(scores["metric"] == "HD95", 50, 1)
    printed = report(tmp_path, make_result(scores), width)
    assert max(map(len, printed.splitlines()[:-1])) <= width
    assert (trainers[1] in printed.split("HD95, mm")[1]) == (width == 140)
    assert re.search(
        r" [+−-]\d+\.\d+ +[+−-]\d+\.\d+ to [+−-]\d+\.\d+ +\S+ +\d+:\d+:\d+", printed
    )  # no number is folded
    assert "b:s:w: cases better:same:worse" in " ".join(printed.split())
    assert "…" not in printed  # nothing is cut off
    assert re.search(r"HD95, mm, lower is better", printed)


@pytest.mark.parametrize(
    "verdict, by_seed", [("better", [0.6, 0.7]), ("worse", [0.6, 0.7]), ("better", [0.6]), ("undecided", [0.6])]
)
def test_only_verdicts_on_trainers_are_bold(tmp_path, verdict, by_seed):
    result = make_result(make_scores(cases="abcdefgh", metrics=["Dice"]))
    row = {"verdict": verdict, "difference": 0.05, "difference_low": 0.04, "difference_high": 0.06, "p_holm": 0.001}
    comparison = result.comparison.assign(**row)
    comparison["by_seed"] = comparison["reference_by_seed"] = [by_seed] * len(comparison)
    printed = report(tmp_path, replace(result, comparison=comparison))
    page, markdown = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    on_networks, bold = len(by_seed) == 1, len(by_seed) > 1
    assert ("**" in markdown) == bold == bool(re.search('class="verdict (better|worse)"', page))
    assert ('class="headline networks"' in page) == on_networks == ("* is about these" in " ".join(printed.split()))
    text = f"| {verdict}, these two networks |" if on_networks and verdict == "better" else f"| {verdict} |"
    assert text in markdown and ("+5.00*" in printed) == (verdict != "undecided")


def test_every_plot_has_a_legend(tmp_path):
    report(tmp_path, make_result(make_scores(), curves=make_curves(TRAINERS[:1])))
    page = (tmp_path / "report.html").read_text()
    figures = [figure for figure in re.findall(r"<figure>.*?</figure>", page, re.DOTALL) if "<svg" in figure]
    legends = [re.sub(r"<[^>]*>", "", figure.split('aria-label="Legend"')[1]) for figure in figures]
    assert len(legends) == 5
    for legend in legends[:2]:
        assert all(word in legend for word in ("a case", "their mean", "its 95 % interval"))
    for legend in legends[2:4]:
        assert all(word in legend for word in (*TRAINERS, "median", "middle half"))
    # a trainer without a curve is in no legend of curves
    assert "nnUNetTrainer" in legends[4] and "LoMix" not in legends[4]


def test_there_is_one_minus_sign(tmp_path):
    scores = make_scores(metrics=("Dice", "NSD", "HD95"), seeds=2)
    printed = report(tmp_path, make_result(scores))
    texts = [printed, (tmp_path / "report.md").read_text(), "".join(read_page(tmp_path).words)]
    assert all("−" in text for text in texts)
    for text in texts:
        text = re.sub(r"\d{4}-\d\d-\d\d", "", text)  # the date
        # a hyphen before a number, but for the ranges and names that have it within a word
        assert not re.findall(r"(?<![\w-])-\s?\d", text)
    # programs read the sign of the keyboard
    content = json.loads((tmp_path / "comparison.json").read_text())
    data = (tmp_path / "scores.csv").read_text() + json.dumps(content["comparison"], ensure_ascii=False)
    assert "−" not in data and re.search(r"-\d", data)


# pictures that fail


def test_cases_that_cannot_be_drawn_are_named(tmp_path):
    scores = make_scores(cases=["a", "b"])
    files = make_files(tmp_path, scores)
    (tmp_path / "broken.nii.gz").write_bytes(b"broken")
    files["references"] = files["references"] | {"a": tmp_path / "broken.nii.gz"}
    report(tmp_path, make_result(scores, **files))
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"Scored, but not drawn: a \(nnU-Net.*SimpleITKIO can.*read .*broken.nii.gz", text)
    assert text.count("<img") == 2


@pytest.mark.parametrize(
    "picture, missing, error, reason",
    [
        ("differences", 2, MemoryError(), "(MemoryError)"),
        ("distributions", 2, IndexError("tuple index\nout of range"), "(IndexError: tuple index)"),
        ("curves", 1, LoMixError("No file."), "(No file.)"),
    ],
)
def test_a_picture_that_fails_is_left_out_with_a_line(tmp_path, monkeypatch, picture, missing, error, reason):
    def fail(*args):
        raise error

    monkeypatch.setattr(plots, f"draw_{picture}", fail)
    printed = report(tmp_path, make_result(make_scores(), curves=make_curves()))
    assert sorted(p.name for p in tmp_path.iterdir()) == list(FILES) and "report.html" in printed
    page = read_page(tmp_path)
    assert f"This picture could not be drawn {reason}" in "".join(page.words)
    assert page.tags.count("svg") == 5 - missing


def test_a_page_that_fails_leaves_whole_numbers(tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError

    scores = make_scores()
    monkeypatch.setattr(report_module, "to_html", fail)
    with pytest.raises(MemoryError):
        report(tmp_path, make_result(scores))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["comparison.json", "report.md", "scores.csv"]
    assert len(pd.read_csv(tmp_path / "scores.csv")) == len(scores)
