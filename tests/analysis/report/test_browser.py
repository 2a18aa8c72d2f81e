"""The page in a real browser: nothing is cut, overlaps or fails WCAG, on a screen, on a phone, in the dark, on paper.

`make test-browser` installs what this needs. Screenshots and PDF pages stay in runs/screenshots, for a person to see.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from hpc_train.analysis.report.model import Report
from hpc_train.analysis.report.renderers.files import write_report
from hpc_train.analysis.report.report import make_report
from tests import jobs
from tests.chromium import INSTALL, chromium
from tests.laws import Laws, Slow, write
from tests.synthetic import Recipe, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest.importorskip("playwright.sync_api", reason=f"Playwright is not installed: {INSTALL}")
axe = pytest.importorskip("axe_playwright_python.base", reason=f"axe-core is not installed: {INSTALL}")
pdfium = pytest.importorskip("pypdfium2", reason=f"pypdfium2 is not installed: {INSTALL}")

PICTURES = jobs.ROOT / "runs" / "screenshots"
LAYOUT = (Path(__file__).parent / "layout.js").read_text()
TALLEST_PX = 16_000  # of a picture: Chromium paints no taller surface
INK, DARK_INK = "getComputedStyle(document.body).color", "rgb(28, 33, 38)"
PAPER_PX = 680  # 180 mm, A4 without its margins
GPU = {"peak_gpu_bytes": [31e9], "rank_room_bytes": 42e9, "peak_anonymous_bytes": [2e9], "expected_peak_bytes": [29e9]}
USE = {"loop_time_s": [9.0], "loop_cpu_s": [8.1], "loop_read_bytes": [3e9], "loop_written_bytes": [41e6]}
STUDY = Laws(
    name="gpt-medium",
    steps=130,
    noise=0.02,
    serial=0.02,
    message_bytes=4e5,
    idle_w={"package-0": 60.0, "dram": 8.0},
    meta={**GPU, **USE, "flops_per_sample": 6e9, "peak_flops": 1.2e13, "peak_source": "data sheet"},
)


def study(root: Path) -> None:
    """1 to 16 ranks with a straggler, in several attempts at every table that there is."""
    for size in (1, 2, 4, 8):
        write(root, replace(STUDY, ranks=size, ranks_per_host=2))
    write(root, replace(STUDY, ranks=16, ranks_per_host=2, slow=(Slow(5, 1.1),)))


def many_ranks(root: Path) -> None:
    for size in (25, 50, 100, 200):
        slow = (Slow(77, 1.3),) if size > 77 else ()
        write(root, replace(STUDY, ranks=size, ranks_per_host=8, steps=60, noise=0.05, slow=slow))


def many_groups(root: Path) -> None:
    for batch in range(60, 780, 60):
        for size in (1, 2):
            stamp = f"20261123T{batch:06}Z"
            write_run(root, Recipe(size=size, step_s=0.01 / size, steps=40, global_batch=batch, stamp=stamp))


def strategies(root: Path) -> None:
    """Strategies on equal work, an estimated energy, hostile names, an incomplete run."""
    long = {"cpu_model": "<b>A processor with a name that is as long as vendors like them</b> " * 2}
    for size in (1, 2, 4):
        for index, strategy in enumerate(("horovod", "mpi", "sharded")):
            recipe = Recipe(
                size=size, step_s=0.01 / size, strategy=strategy, stamp=f"20261123T2{index}0000Z", meta=long
            )
            write_run(root, replace(recipe, quality="estimated", source="estimate", assumption="10 W per busy core"))
    write_run(root, Recipe(size=8, step_s=0.002, complete=False, joules=None))


def lone(root: Path) -> None:
    """One run without a meter: no baseline, no energy, no advice."""
    write_run(root, Recipe(size=2, joules=None))


def commits(root: Path) -> None:
    """One job on two commits, three runs each: what changed between them, and by how much."""
    for commit, factor in (("a" * 40, 1.0), ("b" * 40, 1.1)):
        meta = {**STUDY.meta, "git": {"commit": commit, "dirty": False}}
        for seed in range(3):
            stamp = f"20261123T2{int(10 * factor) % 10}000{seed}Z"
            write(root, replace(STUDY, ranks=8, seed=seed, stamp=stamp, work_s=0.08 * factor, meta=meta))


KINDS = (study, many_ranks, many_groups, strategies, commits, lone)
REPORTS = {each.__name__.replace("_", "-"): each for each in KINDS}


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module", params=[*REPORTS, "recorded"])
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Report, Path]:
    """(name, report, its page)"""
    name = request.param
    root = jobs.ROOT / "tests" / "runs"
    if name in REPORTS:
        root = tmp_path_factory.mktemp(name)
        REPORTS[name](root)
    made = make_report([root])
    return name, made, write_report(made, tmp_path_factory.mktemp("page"))


def opened(browser: "Browser", path: Path, width: int, scheme: Any = "light") -> tuple["Page", list[str]]:
    """The page and the list that its console writes to."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    return page, said


def unfold(page: "Page") -> None:
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")


def picture(page: "Page", name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    whole = page.evaluate("document.documentElement.scrollHeight")
    page.screenshot(path=PICTURES / f"{name}.png", full_page=whole < TALLEST_PX)


def violations(page: "Page") -> list[str]:
    """What axe-core finds, one line each with the elements."""
    page.evaluate(axe.AXE_FILE_PATH.read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{each['id']}: {each['help']}: {[node['target'] for node in each['nodes'][:3]]}" for each in found]


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (390, "light")])
def test_nothing_is_cut_overlaps_or_fails_wcag(
    browser: "Browser", shown: tuple[str, Report, Path], width: int, scheme: str
) -> None:
    name, _, path = shown
    page, said = opened(browser, path, width, scheme)
    try:
        for state in ("folded", "whole"):
            picture(page, f"{name}-{width}-{scheme}-{state}")
            assert page.evaluate(LAYOUT) == [], state
            assert violations(page) == [], state
            unfold(page)
        assert said == [], "the console, or a request"
    finally:
        page.close()


def test_the_first_screen_has_four_numbers_then_the_sentence_then_at_most_four_figures(
    browser: "Browser", shown: tuple[str, Report, Path]
) -> None:
    _, made, path = shown
    page, _ = opened(browser, path, 1280)
    try:
        assert page.locator(".numbers dd.value:visible").count() == 4
        assert page.locator("h1").inner_text() == made.headlines[0]
        tops = page.evaluate(
            "['.numbers', 'h1', '#figures'].map(s => document.querySelector(s).getBoundingClientRect().top)"
        )
        assert tops == sorted(tops) and tops[1] < 900
        assert 1 <= page.locator("figure:visible").count() <= 4
        assert page.locator("table:visible").count() == 0
        unfold(page)
        num_tables = sum(len(section.tables) for section in made.sections)
        assert page.locator("table:visible:not(.runs)").count() == num_tables
    finally:
        page.close()


def test_paper_has_everything_unfolded_and_nothing_beyond_its_edges(
    browser: "Browser", shown: tuple[str, Report, Path]
) -> None:
    name, made, path = shown
    page, _ = opened(browser, path, PAPER_PX, "dark")
    try:
        assert page.evaluate(INK) != DARK_INK, "on a dark screen"
        page.emulate_media(media="print")
        assert page.evaluate(INK) == DARK_INK, "paper is white"
        assert page.evaluate(LAYOUT) == []
        paper = PICTURES / f"{name}.pdf"
        page.pdf(path=paper, prefer_css_page_size=True)
    finally:
        page.close()
    pdf = pdfium.PdfDocument(paper)
    texts = []
    for number, sheet in enumerate(pdf):
        words = sheet.get_textpage()
        texts.append(words.get_text_bounded())
        for index in range(words.count_rects()):
            left, bottom, right, top = words.get_rect(index)
            assert left >= 0 and right <= sheet.get_width() and bottom >= 0 and top <= sheet.get_height()
        if number < 3:
            sheet.render(scale=1.3).to_pil().save(PICTURES / f"{name}-paper-{number + 1}.png")
    told = letters(" ".join(texts))
    for section in made.sections:
        assert all(letters(table.title) in told for table in section.tables)
        assert all(letters(note.text) in told for note in section.notes)


def letters(text: str) -> str:
    """Letters and digits alone: lines and pages break anywhere else."""
    return re.sub(r"[\W_]", "", text)


def test_a_table_that_fits_has_no_line_at_its_edge(browser: "Browser", tmp_path: Path) -> None:
    """Shadows at the edges show that a table goes on. Of an edge between two pixels a part stayed uncovered."""
    write_run(tmp_path, Recipe(size=2))
    path = write_report(make_report([tmp_path]), tmp_path)
    page = browser.new_page(viewport={"width": 1111, "height": 900}, device_scale_factor=1.5, color_scheme="dark")
    try:
        page.goto(path.as_uri())
        unfold(page)
        tables = [
            table for table in page.locator(".scroll").all() if table.evaluate("e => e.scrollWidth <= e.clientWidth")
        ]
        assert tables
        for table in tables:
            pixels = np.asarray(Image.open(io.BytesIO(table.screenshot())).convert("L")).astype(int)
            for edge in (pixels[:, 0], pixels[:, -1]):
                assert (np.abs(edge - np.median(pixels)) <= 2).mean() > 0.5, "a line from top to bottom"
    finally:
        page.close()


# ------------------------------------------------------------------------------------------- do the checks notice?

SVG = "<figure><svg viewBox='0 0 99 20' style='width: 99px'>{}</svg></figure>"
FAULTS = {
    "the page is": "<div style='width: 2000px'>wide</div>",
    "outside the page": "<p style='position: absolute; left: 1270px; width: 60px'>here</p>",
    "cut": "<p style='width: 50px; overflow: hidden; white-space: nowrap'>a long sentence that is cut</p>",
    "not seen to scroll": "<div style='width: 90px; overflow-x: auto; white-space: nowrap'>a long, long table</div>",
    "overlap": "<p>below</p><p style='margin-top: -2.2em'>above</p>",
    "too small": SVG.format("<text y='9' font-size='5'>tiny</text>"),
    "in the figure": SVG.format("<text x='80' y='12'>beyond</text>"),
    "of <svg>": SVG.format("<text y='12'>one</text><text y='13'>two</text>"),
}


@pytest.mark.parametrize("says", FAULTS)
def test_a_planted_fault_is_noticed(browser: "Browser", says: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    try:
        page.set_content(f"<!DOCTYPE html><html><body>{FAULTS[says]}</body></html>")
        assert any(says in problem for problem in page.evaluate(LAYOUT)), page.evaluate(LAYOUT)
    finally:
        page.close()


def test_pale_text_is_a_violation(browser: "Browser") -> None:
    page = browser.new_page()
    try:
        page.set_content("<!DOCTYPE html><html lang=en><title>t</title><main><h1 style='color: #ccc'>pale</h1></main>")
        assert any(line.startswith("color-contrast") for line in violations(page))
    finally:
        page.close()
