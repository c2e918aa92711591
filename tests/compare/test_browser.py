"""The page in a real browser, Debian's chromium: ``pytest -m browser``; skipped where there is none."""

import json
import shutil
from collections.abc import Iterator

import pytest

from tests.compare.made_up import TRAINERS, make_curves, make_files, make_result, make_scores, report

pytestmark = pytest.mark.browser

PAGES = {
    "four metrics": {"metrics": ("Dice", "NSD", "HD95", "IoU"), "classes": ("liver", "tumour")},
    "40 classes": {"metrics": ("Dice", "NSD", "HD95"), "classes": [f"organ number {i}" for i in range(40)]},
    "five metrics, three trainers": {
        "metrics": ("clDice", "Dice", "NSD", "HD95", "IoU"),
        "classes": ("vessel",),
        "trainers": (*TRAINERS, "nnUNetTrainerLoMixFixedWeights_50epochs"),
        "seeds": 2,
    },
}
# what a browser knows and the text of the page doesn't; each gives descriptions of what is wrong
FAULTS = {
    "wider than the window": "[document.documentElement.scrollWidth].filter(width => width > innerWidth)",
    # the table of all cases may scroll, with a column for each of many trainers
    "runs out of its box": """[...document.querySelectorAll('main *:not(svg *, .scroll:has(.cases))')]
        .filter(e => e.clientWidth > 1 && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 99))""",
    "text that runs out of its figure": """[...document.querySelectorAll('figure text')].filter(e => {
        const [own, box] = [e, e.closest('figure')].map(x => x.getBoundingClientRect());
        return own.left < box.left || own.right > box.right || own.top < box.top || own.bottom > box.bottom;
    }).map(e => e.textContent)""",
    # intervals of tables, too
    "a number on two lines": r"""(() => {
        const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT), broken = [];
        for (let node; node = walker.nextNode();) {
            const interval = node.parentElement.closest('td') ? '( to [−+]?[\\d.]+)?' : '';
            const pattern = new RegExp('[−+<]?\\d[\\d.]*' + interval, 'g');
            if (!node.parentElement.closest('dl, h3, tbody th, svg')) for (const found of node.data.matchAll(pattern)) {
                const range = document.createRange();
                range.setStart(node, found.index);
                range.setEnd(node, found.index + found[0].length);
                if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1) broken.push(found[0]);
            }
        }
        return broken;
    })()""",
    "a metric alone in a row": """[...document.querySelectorAll('.grid.even, .grid.odd')].filter(grid => {
        const rows = {};
        for (const e of grid.children) (rows[e.offsetTop] ??= []).push(e);
        const counts = Object.values(rows).map(row => row.length);
        return Math.max(...counts) > 1 && counts.at(-1) == 1;
    }).map(e => e.className)""",
}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: pip install -e .[test]")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        # containers run as root, where chromium's own sandbox can't
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=PAGES)
def page_file(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    scores = make_scores([f"case_{i:03}" for i in range(12)], **PAGES[request.param])
    trainers = scores["trainer"].unique()
    scores.loc[scores["metric"] == "HD95", "value"] *= 50
    report(folder, make_result(scores, curves=make_curves(trainers), **make_files(folder, scores)))
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_page(browser, page_file, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    messages = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(page_file.as_uri())
    page.locator("details").evaluate("e => e.open = true")
    faults = {name: found for name, script in FAULTS.items() if (found := page.evaluate(script))}
    background, ink = page.evaluate(
        "['backgroundColor', 'color'].map(k => getComputedStyle(document.body)[k].match(/\\d+/g).map(Number))"
    )
    page.close()
    assert not faults and not messages, json.dumps([faults, messages], indent=1, ensure_ascii=False)
    assert (sum(background) < sum(ink)) == (scheme == "dark")
