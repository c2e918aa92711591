"""What the reports of a comparison say and contain, on made-up scores."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from rich.console import Console

from nnunet_lomix.compare import overlays, plots
from nnunet_lomix.compare import report as report_module
from nnunet_lomix.compare.content import describe
from nnunet_lomix.compare.markdown import to_markdown
from nnunet_lomix.compare.report import write_report
from nnunet_lomix.compare.sources import CaseFiles
from nnunet_lomix.compare.statistics import compare_trainers, verdict, welch_interval
from nnunet_lomix.compare.words import headline
from nnunet_lomix.errors import LoMixError

TRAINERS = ("nnUNetTrainer", "nnUNetTrainerLoMix")
FILES = ("comparison.json", "report.html", "report.md", "scores.csv")
NO_CURVES = pd.DataFrame(columns=["trainer", "seed", "fold", "epoch", "pseudo_dice"])
EVIL = "<script>alert(1)</script>"


def make_scores(
    cases=("a", "b", "c", "d"), classes=("liver", "tumour"), trainers=TRAINERS, seeds=1, metrics=("Dice", "HD95")
) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (case, name, trainer, seed, metric, rng.uniform(0, 20 if metric == "HD95" else 1))
        for case in cases
        for name in classes
        for trainer in trainers
        for seed in range(seeds)
        for metric in metrics
    ]
    return pd.DataFrame(rows, columns=["case", "class", "trainer", "seed", "metric", "value"])


def make_curves(trainers=TRAINERS) -> pd.DataFrame:
    rows = [(t, s, f, e, e / 10) for t in trainers for s in (0, 1) for f in (0, 1) for e in range(5 + s)]
    return pd.DataFrame(rows, columns=NO_CURVES.columns)


def make_files(folder, cases, trainers=TRAINERS, shape=(5, 12, 14)) -> dict:
    def write(array, name):
        sitk.WriteImage(sitk.GetImageFromArray(array), folder / name)
        return folder / name

    rng = np.random.default_rng(0)
    files = {}
    for i, case in enumerate(cases):
        predictions = {}
        for j, trainer in enumerate(trainers):
            labels = np.zeros(shape, np.uint8)
            labels[..., 3:8, 3 : 6 + j] = 1
            predictions[trainer] = write(labels, f"{i}_{j}.nii.gz")
        image = write(rng.normal(size=shape).astype(np.float32), f"{i}.nii.gz")
        files[case] = CaseFiles(image, write(labels, f"{i}_r.nii.gz"), predictions, SimpleITKIO)
    return files


def report(folder, scores, information=None, curves=NO_CURVES, files=None, width=80) -> str:
    """Writes the report; returns what was printed."""
    printed = io.StringIO()
    comparison = compare_trainers(scores, resamples=200)
    write_report(folder, scores, comparison, information or {}, curves, files or {}, Console(file=printed, width=width))
    return printed.getvalue()


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
        self.words.append(data)


def read_page(folder) -> Page:
    return Page((folder / "report.html").read_text())


def test_all_files_and_nothing_else(tmp_path):
    scores = make_scores()
    report(tmp_path / "new" / "folder", scores, {"dataset": "D"}, make_curves())
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == list(FILES)
    again = pd.read_csv(tmp_path / "new" / "folder" / "scores.csv")
    pd.testing.assert_frame_equal(again, scores)


def test_a_reader_that_leaves_early_costs_no_file(tmp_path):
    """``nnunet_lomix compare … | head``"""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    scores = make_scores()
    with pytest.raises((BrokenPipeError, SystemExit)):
        write_report(
            tmp_path, scores, compare_trainers(scores, resamples=99), {}, NO_CURVES, {}, Console(file=Closed())
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == list(FILES)


def test_json_is_strict_and_keeps_every_number(tmp_path):
    scores = make_scores(cases=["only"])  # no interval: NaN is no JSON
    report(tmp_path, scores, {"dataset": "Däta", "folder": tmp_path})

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=refuse)
    assert content["information"] == {"dataset": "Däta", "folder": str(tmp_path)}
    for row, expected in zip(
        content["comparison"], compare_trainers(scores, resamples=200).to_dict("records"), strict=True
    ):
        assert row["difference"] == pytest.approx(expected["difference"], abs=1e-12)
        assert row["difference_low"] is None


@pytest.mark.parametrize("with_images, shape", [(True, (5, 12, 14)), (False, (12, 14))])
def test_page_is_sound_and_self_contained(tmp_path, with_images, shape):
    scores = make_scores(seeds=2)
    files = make_files(tmp_path, ["a", "b"], shape=shape)
    if not with_images:
        files = {case: own._replace(image=None) for case, own in files.items()}
    report(tmp_path / "out", scores, {"classes": {"liver": [1]}}, make_curves(), files)
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
    assert page.tags.count("svg") == 5
    assert page.tags.count("img") == 4
    assert all(dict(a[1:] for a in page.attributes if a[0] == "svg").values())
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len({*ids})
    used = {value[1:] for tag, name, value in page.attributes if (tag, name) == ("use", "xlink:href")}
    clipped = {value[5:-1] for _, name, value in page.attributes if name == "clip-path"}
    assert used and clipped and used | clipped <= {*ids}


def test_pictures_have_alternative_texts(tmp_path):
    report(tmp_path / "out", make_scores(), None, make_curves(), make_files(tmp_path, "abcd"))
    page = read_page(tmp_path / "out")
    alts = [value for tag, name, value in page.attributes if (tag, name) in {("img", "alt"), ("svg", "aria-label")}]
    assert len(alts) == 8 + 5 and all(len(alt) > 20 for alt in alts)
    assert any(re.search(r"a, slice \d of 5: prediction of nnUNetTrainerLoMix", alt) for alt in alts)


def test_names_are_only_text(tmp_path):
    scores = make_scores(cases=[EVIL, "b"], classes=[EVIL + "|[bold]", "$x"], trainers=["A", EVIL])
    information = {"dataset": EVIL, "notes": [EVIL], "metrics": EVIL, "classes": {EVIL: [1]}, "versions": {EVIL: EVIL}}
    information["folders"] = {EVIL: [EVIL]}
    files = make_files(tmp_path, [EVIL, "b"], ["A", EVIL])
    printed = report(tmp_path / "out", scores, information, make_curves(["A", EVIL]), files)
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
    printed = report(tmp_path, make_scores(cases=cases, classes=classes))
    text = "".join(read_page(tmp_path).words)
    assert ("a single case" in text) == (len(cases) == 1)
    assert "nan" not in printed.lower() and "nan" not in text.lower()
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| mean |")]
    assert bool(rows) == (len(classes) > 1)  # one class is its own mean


def test_more_trainers_than_colours_and_equal_scores(tmp_path):
    trainers = [f"nnUNetTrainer{i}" for i in range(8)]
    scores = make_scores(classes=["x", "y", "z"], trainers=trainers, metrics=["Dice"])
    scores["value"] = scores["value"].where(~scores["trainer"].isin(trainers[:2]), 0.5)
    report(tmp_path, scores, None, make_curves(trainers))
    text = "".join(read_page(tmp_path).words)
    assert "nnUNetTrainer1 and nnUNetTrainer0 have the same mean Dice in each of 4 cases." in text


def test_terminal_fits_80_columns(tmp_path):
    scores = make_scores(
        classes=["pulmonary vein", "x"], trainers=["nnUNetTrainer", "nnUNetTrainerLoMixFixedWeights_50epochs"]
    )
    scores["value"] *= np.where(scores["metric"] == "HD95", 50, 1)
    printed = report(tmp_path, scores)
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert "b:s:w: cases better:same:worse" in printed
    assert "…" not in printed  # nothing is cut off
    assert re.search(r"HD95, mm, lower is better", printed)


def row(metric="Dice", difference=1.2, low=0.3, high=2.1, p=0.01, by_seed=(81.2,), ties=0) -> dict:
    ends = {"difference": difference, "difference_low": low, "difference_high": high, "p_holm": p}
    ends |= {"by_seed": by_seed, "reference_by_seed": [80.0] * len(by_seed)}
    return {"metric": metric, "trainer": "New", "reference": "Old", "ties": ties, **ends}


TWO = "These two networks: "


@pytest.mark.parametrize(
    "given_row, expected, judged",
    [
        (
            row(),
            TWO + "New's mean Dice over 26 cases is 1.2 points higher than Old's (95 % interval 0.3 to 2.1).",
            "better",
        ),
        (
            row(difference=-1.2, low=-2.1, high=-0.3),
            TWO + "New's mean Dice over 26 cases is 1.2 points lower than Old's (95 % interval 0.3 to 2.1).",
            "worse",
        ),
        (
            row(difference=0.4, low=-0.5, high=1.3, p=0.3),
            "New and Old: no difference in mean Dice that these 26 cases can show "
            "(+0.4 points, 95 % interval −0.5 to +1.3).",
            "undecided",
        ),
        (
            row("HD95", -0.4, -0.7, -0.1),
            TWO
            + "New's mean HD95 over 26 cases is 0.4 mm smaller than Old's, which is better (95 % interval 0.1 to 0.7).",
            "better",
        ),
        (
            row("HD95", 0.4, 0.1, 0.7),
            TWO
            + "New's mean HD95 over 26 cases is 0.4 mm larger than Old's, which is worse (95 % interval 0.1 to 0.7).",
            "worse",
        ),
        # a bound of 0.03 is not 0.0
        (
            row(low=0.03),
            TWO + "New's mean Dice over 26 cases is 1.20 points higher than Old's (95 % interval 0.03 to 2.10).",
            "better",
        ),
        (
            row(p=0.0625),
            TWO + "New's mean Dice over 26 cases is 1.2 points higher than Old's (95 % interval 0.3 to 2.1), "
            "but the test doesn't confirm it (p = 0.062).",
            "undecided",
        ),
        # surely better in these cases, but the trainings don't agree: 1.2 ± 4.1 by Welch's t
        (
            row(by_seed=[80.1, 80.4, 83.1]),
            "New's mean Dice over 26 cases is 1.2 points higher than Old's (95 % interval 0.3 to 2.1), "
            "but other trainings may not show it.",
            "undecided",
        ),
        (
            row(by_seed=[80.9, 81.2, 81.5]),
            "New's mean Dice over 26 cases is 1.2 points higher than Old's (95 % interval 0.3 to 2.1).",
            "better",
        ),
        # no interval, however large the difference
        (
            row(low=np.nan, high=np.nan, p=1.0),
            "New's mean Dice over 26 cases is 1.2 points higher than Old's; "
            "there is no interval, so it says nothing about other cases.",
            "undecided",
        ),
        (
            row(difference=0.0, low=0.0, high=0.0, p=1.0, ties=26),
            "New and Old have the same mean Dice in each of 26 cases.",
            "undecided",
        ),
    ],
)
def test_headline(given_row, expected, judged):
    assert headline(given_row, 26, {"Dice": "points", "HD95": "mm"}[given_row["metric"]]) == expected
    assert verdict(given_row) == judged


def test_words_fit_the_scores_through_all_steps():
    """Planted: Dice 5 points higher, HD95 3 mm larger in every one of 12 cases."""
    scores = make_scores(cases=[f"c{i:02}" for i in range(12)], metrics=("Dice", "NSD", "HD95"))
    old = scores[scores["trainer"] == TRAINERS[0]]
    new = old.assign(trainer=TRAINERS[1])
    wobble = np.random.default_rng(1).uniform(-0.01, 0.01, len(old))
    new["value"] += new["metric"].map({"Dice": 0.05, "NSD": 0, "HD95": 3}) + np.where(
        old["metric"] == "Dice", wobble, 0
    )
    scores = pd.concat([old, new], ignore_index=True)
    told = describe(scores, compare_trainers(scores, resamples=500), {})
    (item,) = told.headlines
    assert item.verdict == "better"
    assert re.search(r"mean Dice over 12 cases is (4\.9|5\.0|5\.1) points higher than nnUNetTrainer's", item.first)
    nsd, hd95 = item.others
    assert "have the same mean NSD in each of 12 cases" in nsd
    assert "3.0 mm larger" in hd95 and "which is worse" in hd95
    assert "One training each" in item.seeds
    verdicts = {t.metric: [g.rows[1].verdict for g in t.groups] for t in told.tables}
    assert verdicts == {"Dice": ["better"] * 3, "NSD": ["undecided"] * 3, "HD95": ["worse"] * 3}
    means = {t.metric: [float(r.mean) for r in t.groups[0].rows] for t in told.tables}
    of_class = scores[scores["class"] == "liver"].groupby(["metric", "trainer"])["value"].mean()
    for metric in ("Dice", "NSD"):
        assert means[metric] == pytest.approx([100 * of_class[metric, t] for t in TRAINERS], abs=0.006)
    assert means["HD95"] == pytest.approx([of_class["HD95", t] for t in TRAINERS], abs=0.006)


def test_how_much_seeds_differ_is_told():
    scores = make_scores(cases=[f"c{i:02}" for i in range(12)], seeds=2)
    scores["value"] = 0.5
    better = (scores["trainer"] == TRAINERS[1]) & (scores["seed"] == 1) & (scores["metric"] == "Dice")
    scores.loc[better, "value"] = 0.7
    told = describe(scores, compare_trainers(scores, resamples=200), {})
    sentence = told.headlines[0].seeds
    assert "by seed, points: nnUNetTrainerLoMix 50.0 / 70.0, nnUNetTrainer 50.0 / 50.0;" in sentence
    # the standard error is 10 points, and 12.706 times that with one degree of freedom: −117 to +137, if Dice had no
    # bounds. On the scale of artanh(d / 100) it is 1 / (1 − 0.1²) times a hundredth
    half = 12.7062 * 0.1 / 0.99
    low, high = (100 * np.tanh(np.arctanh(0.1) + end) for end in (-half, half))
    assert f"other trainings (Welch's t): −{-low:.1f} to +{high:.1f}." in sentence and -100 < low < high < 100
    assert "not in the interval" in told.methods[-1]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(3)), st.permutations(range(3)))
def test_the_order_of_seeds_decides_nothing(ours, theirs):
    candidate, reference = np.array([81.1, 83.0, 85.1])[ours], np.array([80.0, 82.0, 84.0])[theirs]
    low, high = welch_interval(candidate, reference)
    # by hand: variances 4.0033 and 4 over 3, of 4 degrees of freedom
    half = 2.7764 * np.sqrt((np.var(candidate, ddof=1) + np.var(reference, ddof=1)) / 3)
    assert [low, high] == pytest.approx([1.0667 - half, 1.0667 + half], abs=1e-3)


def test_interval_of_trainings_without_variance_or_company():
    assert welch_interval([2.0, 2.0], [1.0, 1.0, 1.0]) == (1, 1)
    assert np.isnan(welch_interval([2.0, 2.0], [1.0])).all()


def test_cases_that_cannot_be_drawn_are_named(tmp_path):
    scores = make_scores(cases=["a", "b"])
    files = make_files(tmp_path, ["a", "b"])
    files["a"].reference.write_bytes(b"broken")
    report(tmp_path, scores, files=files)
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"Scored, but not drawn: a \(nnU-Net.*SimpleITKIO can.*read .*0_r.nii.gz", text) and "b</" in text


def test_best_and_worst_of_hd95_are_by_what_is_better(tmp_path):
    scores = make_scores(cases=["same", "much better", "worse"], classes=["x"])
    scores["value"] = 0.5
    new = scores["trainer"] == TRAINERS[1]
    scores.loc[new & (scores["metric"] == "HD95"), "value"] = [0.5, 0.1, 0.9]
    told = describe(scores, compare_trainers(scores, resamples=100), {})
    hd95 = told.extremes[-1]
    assert (hd95.best, hd95.worst) == (("much better", "−0.40 mm"), ("worse", "+0.40 mm"))


PICTURES = [(plots, f"draw_{kind}") for kind in ("differences", "distributions", "curves")]


@pytest.mark.parametrize("module, picture", [*PICTURES, (overlays, "draw_overlays")])
@pytest.mark.parametrize("error", [MemoryError(), IndexError("tuple index\nout of range"), LoMixError("No file.")])
def test_a_picture_that_fails_is_left_out_with_a_line(tmp_path, monkeypatch, module, picture, error):
    def fail(*args, **kwargs):
        raise error

    scores = make_scores()
    out = tmp_path / "out"
    monkeypatch.setattr(module, picture, fail)
    printed = report(out, scores, None, make_curves(), make_files(tmp_path, ["a"]))
    assert sorted(p.name for p in out.iterdir()) == list(FILES) and "report.html" in printed
    text = "".join(read_page(out).words)
    reason = {MemoryError: "(MemoryError)", IndexError: "(IndexError: tuple index)", LoMixError: "(No file.)"}[
        type(error)
    ]
    left_out = "Scored, but not drawn: a " if module is overlays else "This picture could not be drawn "
    assert left_out + reason in text
    missing = {"draw_differences": 2, "draw_distributions": 2, "draw_curves": 1, "draw_overlays": 0}[picture]
    assert read_page(out).tags.count("svg") == 5 - missing


def test_a_page_that_fails_leaves_whole_numbers(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    scores = make_scores()
    out = tmp_path / "out"
    monkeypatch.setattr(report_module, "to_html", fail)
    with pytest.raises(MemoryError):
        report(out, scores)
    assert sorted(p.name for p in out.iterdir()) == ["comparison.json", "report.md", "scores.csv"]
    with open(out / "scores.csv") as file:
        assert sum(1 for _ in csv.reader(file)) == len(scores) + 1


def test_the_pictures_are_of_cases_in_which_what_is_shown_differs(tmp_path):
    cases = ["a", "b", "c", "d", "e", "f"]
    scores = make_scores(cases=cases, classes=["x"], seeds=2, metrics=["Dice"])
    scores["value"] = 0.5
    new = scores["trainer"] == TRAINERS[1]
    gains = dict(zip(cases, (0.1, 0.0, -0.3, 0.2, 0.0, 0.05), strict=True))
    scores.loc[new & (scores["seed"] == 0), "value"] += scores["case"].map(gains)
    scores.loc[new & (scores["seed"] == 1) & (scores["case"] == "e"), "value"] = 1.0  # not shown
    report(tmp_path / "out", scores, None, NO_CURVES, make_files(tmp_path, cases))
    alts = [value for tag, name, value in read_page(tmp_path / "out").attributes if (tag, name) == ("img", "alt")]
    assert [alt[0] for alt in alts[::2]] == ["c", "d", "a", "f"]
    assert alts[1].endswith("Dice, points: 20.0.")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30), st.floats(0, 100) | st.just(float("nan")))
def test_axes_hold_the_interval_and_most_points(sizes, interval):
    limit = plots._limit(np.array(sizes), interval)
    assert limit > 0
    assert not limit < interval
    assert np.mean(np.array(sizes) <= limit) >= 0.9 - 1 / len(sizes)


def test_markdown_and_plots_repeat_to_the_byte(tmp_path):
    scores = make_scores()
    comparison = compare_trainers(scores, resamples=100)
    assert to_markdown(describe(scores, comparison, {})) == to_markdown(describe(scores, comparison, {}))
    assert plots.draw_curves(make_curves(), TRAINERS, "x" * 30) == plots.draw_curves(make_curves(), TRAINERS, "x" * 30)
