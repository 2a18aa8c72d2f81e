"""What a report says of the next run and of stragglers: the answer in one sentence, and its figures."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_train.analysis.report.model import Report
from hpc_train.analysis.report.renderers.files import write_report
from hpc_train.analysis.report.report import make_report
from tests.analysis.rendered import notes
from tests.laws import Laws, Slow, write

LAWS = Laws(
    name="gpt",
    steps=60,
    noise=0.01,
    serial=0.02,
    ranks_per_host=2,
    message_bytes=4e5,
    idle_w={"package-0": 60.0, "dram": 8.0},
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """One job on 1 to 16 ranks, 2 a node, a little slower on rank 5 at the largest size."""
    root = tmp_path_factory.mktemp("advice")
    for size in (1, 2, 4, 8):
        write(root, replace(LAWS, ranks=size))
    write(root, replace(LAWS, ranks=16, slow=(Slow(5, 1.1),)))
    return make_report([root])


def test_the_headline_answers_all_three_questions(study: Report) -> None:
    (line,) = study.headlines
    assert re.fullmatch(
        r"16 ranks: \d+\.\d+x over 1 rank \(95% interval [\d.-]+ within one run, \d+% efficiency\)"
        r".*; \d+% of the time lost to straggler rank 5 on c2;"
        r" ask for \d+ nodes?",
        line,
    ), line


def test_advice_that_was_not_tested_leads_no_headline(tmp_path: Path) -> None:
    for size in (1, 2):
        write(tmp_path, replace(LAWS, ranks=size))
    made = make_report([tmp_path])
    assert "ask for" not in made.headlines[0]
    assert any("was not tested" in note for note in notes(made.sections[0], "next-run"))
    assert "forecast" not in [plot.id for plot in made.sections[0].plots], "any curve fits two sizes"


def test_advice_among_the_measured_sizes_is_given_though_the_model_is_not_trusted() -> None:
    """Recorded on two cores: 4 ranks contradict every model, and 2 are measured to be the fastest."""
    (section,) = make_report([Path("tests/runs/mlp-mnist")]).sections
    assert section.headline.endswith("; ask for 2 ranks, the best of the sizes measured")
    (number,) = [each for each in section.numbers if each.title == "Ask for"]
    assert number.value == "2 ranks"
    told = notes(section, "next-run")
    assert told[0].startswith("The next run: Ask for 2 ranks: ") and len(told) == 1
    assert any("The advice is among the measured sizes alone." in note for note in notes(section, "next-run-details"))
    assert "forecast" not in section.leading, "its curve is the model's"


def test_the_figures_say_what_they_show(study: Report) -> None:
    made = {plot.id: plot for plot in study.sections[0].plots}
    tree, late, plan = made["pop-efficiencies"], made["late-ranks"], made["forecast"]
    assert re.search(r"16 ranks: global \d+%, parallel \d+%, load balance \d+%", tree.description)
    assert (
        "latest on average over the median rank: rank 5 by" in late.description
        and "Stragglers: rank 5 on c2" in late.caption
    )
    assert (
        "ask for" in plan.caption and "before it had seen them" in plan.caption and "95% interval" in plan.description
    )
    assert "dynamic" in made["energy-per-sample"].description
    assert all("est." in part for part in made["energy-by-phase"].description.split(": ")[2].split(", ")[:5])
    assert "16 ranks" in made["energy-against-speedup"].description


def test_the_page_stays_small(study: Report, tmp_path: Path) -> None:
    html = write_report(study, tmp_path).read_text()
    assert len(html) < 400_000 and "<script" not in html
    assert html.count("data:image/png;base64,") == 2  # maps of arrivals, and of ranks by phases
    assert not re.search(r"""(src|href)=["'](?!#|data:image/png;base64,)""", html), "nothing is fetched"
