"""What a report says, in the terminal, on the page and in its files."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_train.analysis.report.records import CSV_COLUMNS
from hpc_train.analysis.report.renderers.figures import write_figures
from hpc_train.analysis.report.renderers.files import summary_tree, write_report
from hpc_train.analysis.report.renderers.markdown import to_markdown
from hpc_train.analysis.report.report import make_report
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plain
from tests.analysis.rendered import Page, page, printed, report, report_and_facts, table
from tests.synthetic import Recipe, write_run

SLOW = {"data": 0.1, "forward": 0.1, "backward": 0.2, "reduce": 0.5, "optimizer": 0.05, "other": 0.05}
ESTIMATE = {"quality": "estimated", "source": "estimate", "assumption": "10 W per busy core"}


def pair(**second: object) -> tuple[Recipe, Recipe]:
    """One rank at 10 ms and two at 6 ms a step, the two changed by `second`."""
    return Recipe(size=1, step_s=0.010), replace(Recipe(size=2, step_s=0.006), **second)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- headline


def test_the_headline_answers_first(tmp_path: Path) -> None:
    (line,) = report(tmp_path, *pair()).headlines
    assert re.fullmatch(
        r"2 ranks: 1\.6\dx over 1 rank \(95% interval [\d.-]+ within one run, 8\d% efficiency\)"
        r"; computing a sample takes 1\.20x the time; 10% of the step is exposed communication"
        r" \(that no computing hides\)",
        line,
    )


def test_the_headline_names_the_larger_loss_and_the_cores_that_ranks_share() -> None:
    """Recorded on two cores: computing suffers more (0.464) than communication (0.735)."""
    (section,) = make_report([Path("tests/runs/mlp-mnist")]).sections
    assert (
        "; computing a sample takes 2.15x the time (4 ranks share 2 cores of vm); 32% of the step is"
        in section.headline
    )
    notes = [note.text for note in section.notes]
    assert sum("share 2 cores" in note for note in notes) == 1, "2 ranks had a core each"
    slower = next(note for note in notes if "4 ranks are slower than 2 (" in note)
    assert "(0.71x the speed, 95% interval" in slower and "which fall while it pays: 2.08x" in slower
    assert table(section, "power").rows[2][-1] == "slower"


@pytest.mark.parametrize(
    ("threads", "step_s", "told"),
    [
        (
            2,
            0.004,
            "do not quote an efficiency above 100% on unequal terms (threads per rank: 2 (1 rank); 1 (2 ranks))",
        ),
        (1, 0.004, "repeat the baseline before you quote an efficiency above 100%"),
        (2, 0.006, ""),
    ],
)
def test_an_efficiency_above_100_percent_warns_in_the_headline(
    tmp_path: Path, threads: int, step_s: float, told: str
) -> None:
    baseline = Recipe(step_s=0.010, meta={"ranks": [{"rank": 0, "threads": threads}]})
    (line,) = report(tmp_path, baseline, Recipe(size=2, step_s=step_s)).headlines
    assert (told in line) if told else ("above 100%" not in line)


def test_a_slowdown_is_called_slower_and_says_what_grew(tmp_path: Path) -> None:
    (line,) = report(tmp_path, *pair(step_s=0.020, shares={**SLOW, "data": 0.2, "backward": 0.1})).headlines
    assert line.startswith(
        "2 ranks: slower than 1 rank, 0.50x its speed (95% interval 0.50-0.50 within one run, 25% efficiency)"
    )
    assert "50% of the step is exposed communication" in line
    assert re.search(r"data grew from (1\.0|0\.99)\d* to (4\.0|3\.9)\d* ms", line)
    assert "backward grew" not in line


def test_no_slowdown_is_so_many_times_over(tmp_path: Path) -> None:
    """Also without an interval, and where a loss is reached later."""
    made = report(tmp_path, *(replace(each, steps=12) for each in pair(step_s=0.020)))
    said = (printed(made), printed(made, full=False), Page(page(made, tmp_path)).text, *made.headlines)
    assert all(re.search(r"0\.[45]\d*x", each) for each in said)
    for each in said:
        assert not re.search(r"0\.\d+x\s+over", each), each
    assert made.sections[0].numbers[0].title == "Slower: the speed of 1 rank"


@pytest.mark.parametrize(
    ("cores", "num_cpus", "told"),
    [
        (1.5, 2, "; other programs kept 1.50 of the 2 cores of node01 busy"),
        (1.5, None, "; other programs kept 1.50 cores of node01 busy"),
        (1.5, 128, ""),
        (0.0, 2, ""),
    ],
)
def test_other_programs_on_a_node_are_said_in_the_first_lines(
    tmp_path: Path, cores: float, num_cpus: int | None, told: str
) -> None:
    energy = {"foreign_cores": {"node01": cores}, "num_cpus": {"node01": num_cpus} if num_cpus else {}}
    made = report(tmp_path, *pair(meta={"energy": energy}))
    assert (told in made.headlines[0]) if told else ("other programs" not in printed(made)), made.headlines
    assert not told or "other programs" in " ".join(printed(made, full=False).splitlines()[:5])


def test_recorded_hosts_that_were_shared_are_named() -> None:
    (section,) = make_report([Path("tests/runs/mlp-two-hosts")]).sections
    assert section.headline.endswith("other programs kept 1.60 cores of n2 busy")


def test_no_difference_is_not_called_a_speedup(tmp_path: Path) -> None:
    (line,) = report(tmp_path, *pair(step_s=0.010)).headlines
    assert "not measurably faster than 1 rank" in line and "95% interval" in line


def test_weak_scaling_speaks_of_throughput(tmp_path: Path) -> None:
    made = report(tmp_path, Recipe(batch_per_rank=32), Recipe(size=2, step_s=0.011, batch_per_rank=32))
    assert "over 1 rank in samples/s" in made.headlines[0]
    assert "Weak scaling, batch per rank 32" in printed(made)


def test_no_baseline_is_said_and_no_speedup_is_shown(tmp_path: Path) -> None:
    made = report(tmp_path, Recipe(size=2))
    whole = page(made, tmp_path)
    apart = re.sub(r"<svg.*?</svg>", "", whole, flags=re.DOTALL)  # ranks may lose 0% to each other, without a baseline
    assert "speedup over" not in whole.lower()
    for said in (printed(made), Page(apart).text):
        assert "no baseline" in said
        assert not re.search(r"\b1(\.0+)?x|\b100(\.0+)?%", said)
    (row,) = table(made.sections[0], "scaling").rows
    assert row[-3:] == ("no baseline", "-", "-")
    assert "no baseline, so no speedup" in made.headlines[0]


# ---------------------------------------------------------------------------------------------- terminal


def test_a_caption_explains_what_is_drawn(tmp_path: Path) -> None:
    """50 steps have no p99."""
    for root, has_p99 in ((Path("tests/runs/mlp-mnist"), False), (tmp_path, True)):
        made = make_report([root]) if not has_p99 else report(root, *pair())
        (plot,) = [plot for plot in made.sections[0].plots if plot.id == "step-distribution"]
        assert ("p99" in plot.caption) is has_p99 and "1 step in 20 is slower than p95" in plot.caption


def test_a_shared_nodes_energy_is_marked_on_every_screen() -> None:
    """Two hosts under one Slurm, whose meter counts the job step as a whole and other jobs, too."""
    (section,) = make_report([Path("tests/runs/mlp-two-hosts")]).sections
    assert section.overview is not None and section.overview.rows[0][-1].endswith("J shared")
    (energy,) = [number for number in section.numbers if number.title == "Energy per sample"]
    assert energy.value.endswith("J shared")
    by_node = table(section, "energy-by-node")
    assert by_node.columns[1].title == "of all nodes together" and by_node.rows[0][1].endswith(" shared")
    (own,) = make_report([Path("tests/runs/mlp-mnist")]).sections
    assert table(own, "energy-by-node").columns[1].title == "by node"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_cell_is_cut_short_at_any_width(tmp_path: Path, width: int) -> None:
    source = "NVML total energy counter + RAPL package-0 + RAPL dram"
    large = Recipe(size=256, step_s=0.0001234, complete=False, steps=30)
    made = report(tmp_path, *pair(source=source), large)
    text = printed(made, width)
    assert "…" not in text and "..." not in text
    assert max(len(line) for line in text.splitlines()) <= width
    for each in made.sections[0].tables:
        for row in each.rows:
            for cell, column in zip(row, each.columns, strict=True):
                words = cell.split() if column.is_text or width < 80 else [cell]
                assert all(word in text for word in words), cell


def test_the_numbers_of_a_row_stand_on_one_line(tmp_path: Path) -> None:
    made = report(tmp_path, *pair())
    lines = printed(made).splitlines()
    for each in made.sections[0].tables:
        for row in each.rows:
            assert any(line.split() == " ".join(row).split() for line in lines), row


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    owned = {"cpu_model": "\x1b]0;owned\x07"}
    made = report(tmp_path, *pair(source="\x1b[31mred\x07 [bold]x[/bold]", meta=owned))
    text = printed(made)
    assert "\x1b" not in text and "\x07" not in text
    assert "[bold]x[/bold]" in text
    assert plain("a\x1bb") == "a\N{REPLACEMENT CHARACTER}b"


# ---------------------------------------------------------------------------------------------- energy


def test_an_estimate_is_called_one_everywhere(tmp_path: Path) -> None:
    recipes = [Recipe(size=size, step_s=0.01 / size, joules=77.0, **ESTIMATE) for size in (1, 2)]
    made = report(tmp_path, *recipes)
    parsed = Page(page(made, tmp_path))
    for said in (printed(made), parsed.text):
        figures = re.findall(r"(?<![\d.])(?!0 J)[\d.]+ m?J\b(?: s\b)?(?: est\.)?", said)
        assert len(figures) >= 4
        assert all(figure.endswith("est.") for figure in figures), figures
        assert "10 W per busy core" in " ".join(said.split())
    titles = [
        value for _, name, value in parsed.attributes if name == "aria-label" and value.startswith("Energy per sample:")
    ]
    assert titles and all(value.count("est.") == 2 for value in titles)
    assert "energy per sample (mJ), estimated" in parsed.text
    lines = csv.DictReader((tmp_path / "report/scaling.csv").open())
    assert {line["energy_quality"] for line in lines} == {"estimated"}


def test_missing_energy_is_the_word_and_never_zero(tmp_path: Path) -> None:
    made = report(tmp_path, *(Recipe(size=size, step_s=0.01 / size, joules=None) for size in (1, 2)))
    html = page(made, tmp_path)
    for said in (printed(made), Page(html).text):
        assert said.count("missing") >= 4
        assert not re.search(r"\b0(\.0+)? m?J\b", said)
    assert "Energy per sample:" not in html  # no figure of nothing
    for row in csv.DictReader((tmp_path / "report/scaling.csv").open()):
        assert (row["joules"], row["joules_per_sample"], row["energy_quality"]) == ("", "", "missing")


def test_a_meter_that_counted_0_joules_is_missing_and_costs_no_other_section(tmp_path: Path) -> None:
    """Slurm's energy of a job of a second or two: less than the meter's resolution."""
    slurm = {"joules": 0.0, "source": "Slurm"}
    made = report(
        tmp_path, Recipe(size=1, **slurm), Recipe(size=2, step_s=0.006, **slurm), Recipe(size=4, step_s=0.004)
    )
    html = page(made, tmp_path)
    for said in (printed(made), Page(html).text, to_markdown(made)):
        said = " ".join(said.split())
        assert "Energy missing for 1 rank, 2 ranks: Slurm counted 0 J, less than it can resolve" in said
        assert "POP efficiencies (" in said and "120 J" in said
        assert not re.search(r"(?<![\d.])0(\.0+)? m?J\b(?!, less)", said)
    for row in list(csv.DictReader((tmp_path / "report/scaling.csv").open()))[:2]:
        assert (row["joules"], row["joules_measured"], row["joules_loop"], row["mean_w"]) == ("", "", "", "")
    assert write_figures(made, tmp_path / "figures")


def test_a_measurement_is_not_called_an_estimate(tmp_path: Path) -> None:
    text = printed(report(tmp_path, *pair()))
    assert "120 J" in text and "120 J est." not in text and "RAPL package-0" in text


# ---------------------------------------------------------------------------------------------- results


def test_every_test_measure_is_shown(tmp_path: Path) -> None:
    measures = {"loss": 1.23456, "bigram_loss": 2.5, "unigram_accuracy": 0.125}
    made = report(tmp_path, Recipe(test=measures), Recipe(size=2, test={"loss": 1.5, "return": 487.25}))
    result = table(made.sections[0], "result")
    assert [column.title for column in result.columns[4:]] == [
        "loss",
        "test loss",
        "test bigram loss",
        "test unigram accuracy",
        "test return",
    ]
    assert result.rows[0][5:] == ("1.235", "2.500", "12.50%", "-")
    assert result.rows[1][5:] == ("1.500", "-", "-", "487.2")
    write_report(made, tmp_path / "out")
    lines = list(csv.DictReader((tmp_path / "out/scaling.csv").open()))
    added = ("test_loss", "test_bigram_loss", "test_unigram_accuracy", "test_return")
    assert tuple(lines[0]) == (*CSV_COLUMNS, *added)
    assert [lines[0][name] for name in added] == ["1.23456", "2.5", "0.125", ""]
    row = json.loads((tmp_path / "out/summary.json").read_text())["groups"][0]["rows"][1]
    assert (row["test_loss"], row["test_return"]) == (1.5, 487.25) and "test_accuracy" not in row


def test_repeats_share_their_measures_and_odd_ones_are_left_out(tmp_path: Path) -> None:
    twins = [Recipe(test={"accuracy": 0.9}), Recipe(test={"accuracy": 0.8}, stamp="20261123T220000Z")]
    odd = Recipe(size=2, test={"accuracy": None, "loss": "low", "ok": True, "<b>\x1b": 0.5})  # type: ignore[dict-item]
    made, facts = report_and_facts(tmp_path, *twins, odd)
    one, two = facts.scaling.groups[0].rows
    assert one.test == {"accuracy": pytest.approx(0.85)} and two.test == {"<b>\x1b": 0.5}
    assert "\x1b" not in printed(made)
    parsed = Page(page(made, tmp_path))
    assert "b" not in parsed.tags and "test <b>\N{REPLACEMENT CHARACTER}" in parsed.text


# ---------------------------------------------------------------------------------------------- page


def test_the_page_is_well_formed_and_asks_for_nothing(tmp_path: Path) -> None:
    html = page(report(tmp_path, *pair(), Recipe(size=4, strategy="mpi")), tmp_path)
    html, num_images = re.subn(
        r'"data:image/png;base64,[A-Za-z0-9+/=\s]*"', '"#p0-0-figure_1"', html
    )  # inside the page
    assert num_images == 0  # nobody is late
    parsed = Page(html)
    assert not parsed.problems and not parsed.open
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(parsed.tags)
    fetching = ("href", "src", "xlink:href", "srcset", "action", "data", "poster", "background")
    references = [value for _, name, value in parsed.attributes if name in fetching]
    references += re.findall(r"url\(\s*['\"]?([^)'\"]*)", html)
    assert references  # the figures refer to their own parts
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert all(reference.startswith("#") and reference[1:] in ids for reference in references), references
    assert "//" not in html.replace("///", "") and "@import" not in html
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]


def test_ids_are_not_shared_between_figures(tmp_path: Path) -> None:
    parsed = Page(page(report(tmp_path, *pair(), Recipe(size=4, strategy="mpi")), tmp_path))
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) > 50
    assert len(ids) == len(set(ids))


def test_every_figure_has_a_title_a_description_and_units(tmp_path: Path) -> None:
    parsed = Page(page(report(tmp_path, *pair()), tmp_path))
    labels = [value for tag, name, value in parsed.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == parsed.tags.count("svg") == parsed.tags.count("figcaption") == 9
    assert parsed.tags.count("title") == 10
    for axis in (
        "speedup over 1 rank",
        "ranks",
        "time per step (ms)",
        "step",
        "training loss",
        "energy per sample (mJ), measured",
    ):
        assert axis in parsed.words, axis


def test_four_numbers_of_the_largest_complete_size_begin_the_page(tmp_path: Path) -> None:
    made = report(tmp_path, *pair(), Recipe(size=4, step_s=0.004, complete=False))
    speedup, rate, energy, request = made.sections[0].numbers
    row = made.rows[1]
    assert speedup.title == "Speedup over 1 rank" and speedup.value == f"{row['speedup']:.2f}x"
    assert f"{100 * row['efficiency']:.0f}% efficiency on 2 ranks, 95% interval" in speedup.detail
    assert rate.title == "Samples per second" and rate.value == f"{row['samples_per_s']:,.0f}"
    assert (energy.title, energy.detail) == ("Energy per sample", "RAPL package-0")
    assert float(energy.value.removesuffix(" mJ")) == pytest.approx(1e3 * row["joules_per_sample"], rel=5e-3)
    assert (request.title, request.value) == ("Ask for", "no advice") and "not tested" in request.detail
    text = Page(page(made, tmp_path)).text
    places = [text.index(number.value) for number in made.sections[0].numbers]
    assert places == sorted(places) and places[-1] < text.rindex(made.headlines[0])


def test_a_number_that_is_not_known_says_what_it_needs(tmp_path: Path) -> None:
    numbers = report(tmp_path, Recipe(size=2, joules=None)).sections[0].numbers
    assert [number.value for number in numbers] == ["no baseline", "11,993", "missing", "no advice"]
    assert "two sizes" in numbers[0].detail and "two sizes" in numbers[3].detail


def test_the_page_is_in_order(tmp_path: Path) -> None:
    html = page(report(tmp_path, *pair()), tmp_path)
    text = Page(html).text
    parts = ('class="numbers"', "<h1>", 'id="figures"', 'id="notes"', 'class="part"', 'id="methods"', 'id="runs"')
    places = [html.index(part) for part in parts]
    assert places == sorted(places)
    for words in ("node01", "torch 2.10.0", "Open MPI v4.1.4", "b0f1e82c0ffe", "10 of them warm-up"):
        assert words in text


def test_the_page_names_the_method_of_its_intervals(tmp_path: Path) -> None:
    """The same as the documentation: no bootstrap is drawn for a measured quantity (`stats/estimate.py`)."""
    text = Page(page(report(tmp_path, *pair()), tmp_path)).text
    assert "Student’s t of the logarithms" in text and "Welch’s t interval" in text and "ootstrap" not in text


def test_an_interval_stays_on_one_line_of_the_page(tmp_path: Path) -> None:
    made = report(tmp_path, *pair())
    html = page(made, tmp_path)
    (interval,) = re.findall(r"95% interval ([\d.]+-[\d.]+)", made.headlines[0])
    heading = re.findall(r"<h1>(.*)</h1>", html)[0]
    assert f'95% interval <span class="whole">{interval}</span>' in heading
    assert made.headlines[0] in Page(html).text


def test_hostile_names_are_text_on_the_page(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=y>'
    recipes = pair(
        source="<b>meter</b>",
        quality="estimated",
        assumption="<i>none</i> $\\frac{",
        hosts=("<u>host<u>",),
        meta={
            "name": evil,
            "cpu_model": evil,
            "git": {"commit": "<s>a</s>", "dirty": False},
            "versions": {"<q>": evil},
            "mpi": {"version": evil},
            "started": evil,
            "slurm": {"job_id": evil},
        },
    )
    parsed = Page(page(report(tmp_path, *recipes), tmp_path))
    assert not {"script", "img", "b", "i", "u", "s", "q"} & set(parsed.tags)
    assert not parsed.problems
    for words in (evil, "<b>meter</b>", "<i>none</i> $\\frac{", "<u>host<u>", "<s>a</s>"):
        assert words in parsed.text, words


def test_mismatches_and_incomplete_runs_are_told_everywhere(tmp_path: Path) -> None:
    made = report(tmp_path, *pair(meta={"versions": {"torch": "2.11.0"}}), Recipe(size=4, step_s=0.004, complete=False))
    for said in (printed(made), Page(page(made, tmp_path)).text):
        said = " ".join(said.split())
        assert "version of torch: 2.10.0 (1 and 4 ranks); 2.11.0 (2 ranks)" in said
        assert "4*" in said and "no summary.json" in said and "* incomplete" in said
    assert made.headlines[0].startswith("2 ranks")  # not the incomplete 4 ranks


def test_the_short_screen_has_the_first_note_of_each_group_and_why_a_run_is_incomplete(tmp_path: Path) -> None:
    cut = Recipe(size=4, step_s=0.004, complete=False)
    made = report(
        tmp_path, *pair(), cut, *(replace(each, name="another", global_batch=60, complete=False) for each in pair())
    )
    assert sum(section.kind == "group" for section in made.sections) == 2
    text = " ".join(printed(made, full=False).split())
    assert "softmax-mnist: * incomplete: softmax-mnist/" in text
    assert "(4 ranks): no summary.json" in text
    assert "another: * incomplete: another/" in text


def test_no_sentence_ends_with_two_full_stops(tmp_path: Path) -> None:
    """Amounts of energy may end with "est."."""
    estimated = [replace(each, **ESTIMATE) for each in pair()]
    for made in (report(tmp_path, *estimated), make_report([Path("tests/runs/mlp-mnist")])):
        assert "est." in printed(made)
        plots = [f"{plot.caption}{plot.description}" for section in made.sections for plot in section.plots]
        for said in (printed(made), printed(made, full=False), Page(page(made, tmp_path)).text, *plots):
            assert not re.search(r"(?<!\.)\.\.(?!\.)", said), re.findall(r".{60}\.\.", said)


def test_a_diverged_run_and_one_without_metrics_are_reported(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, recipe) for recipe in pair()]
    runs[0].metrics.unlink()
    runs[1].metrics.write_text("step,loss\n0,2.5\n10,nan\n20,inf\n")
    runs[1].summary.write_text('{"complete": true, "loss": null}')
    made = make_report([tmp_path])
    assert "inf" in printed(made)
    page(made, tmp_path)
    rows = json.loads((tmp_path / "report/summary.json").read_text())["groups"][0]["rows"]
    assert [row["loss"] for row in rows] == [0.31, None]
    json.dumps(summary_tree(made), allow_nan=False)


def test_runs_that_hold_no_step_are_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path, Recipe(size=2, complete=False))
    for rank in range(2):
        run.timings(rank).write_text("")
    made = make_report([tmp_path])
    assert "no steady step recorded" in made.headlines[0]
    assert "0 of 210 steps" in " ".join(printed(made).split())
    assert "no steady step recorded" in Page(page(made, tmp_path)).text


# ---------------------------------------------------------------------------------------------- files


def test_the_files_of_a_report(tmp_path: Path) -> None:
    made = report(tmp_path, *pair())
    written = write_report(made, tmp_path / "deep" / "report")
    assert written == tmp_path / "deep" / "report" / "report.html"
    names = sorted(path.name for path in written.parent.iterdir())
    assert names == ["report.html", "scaling.csv", "summary.json"]
    first = written.read_bytes()
    assert write_report(made, written.parent).read_bytes() == first  # the same runs give the same page


def test_the_csv_has_its_columns_and_base_units(tmp_path: Path) -> None:
    write_report(report(tmp_path, *pair(), Recipe(size=4, step_s=0.004, complete=False)), tmp_path / "out")
    lines = list(csv.DictReader((tmp_path / "out/scaling.csv").open()))
    assert tuple(lines[0]) == (*CSV_COLUMNS, "test_accuracy")
    for column in ("ranks", "step_s", "speedup", "efficiency", "share_reduce", "joules", "energy_quality"):
        assert column in lines[0]
    one, two, four = lines
    assert [line["ranks"] for line in lines] == ["1", "2", "4"]
    assert [line["incomplete"] for line in lines] == ["False", "False", "True"]
    assert float(two["step_s"]) == pytest.approx(0.006, rel=0.02)
    assert float(two["speedup_low"]) < 10 / 6 < float(two["speedup_high"])
    assert float(two["efficiency"]) == pytest.approx(float(two["speedup"]) / 2)
    assert (one["baseline_ranks"], one["scaling"], four["joules"]) == ("1", "strong", "120.0")
    assert float(one["share_reduce"]) == pytest.approx(0.1, abs=1e-6)


def test_the_csv_leaves_an_unknown_speedup_empty(tmp_path: Path) -> None:
    write_report(report(tmp_path, Recipe(size=2)), tmp_path / "out")
    (line,) = csv.DictReader((tmp_path / "out/scaling.csv").open())
    assert (line["speedup"], line["efficiency"], line["baseline_ranks"]) == ("", "", "")


def test_the_json_says_what_the_tables_say(tmp_path: Path) -> None:
    made, facts = report_and_facts(tmp_path, *pair())
    write_report(made, tmp_path / "out")
    tree = json.loads((tmp_path / "out/summary.json").read_text())
    assert tree == json.loads(json.dumps(summary_tree(made)))
    assert tree["headlines"] == made.headlines
    row = tree["groups"][0]["rows"][1]
    assert row["ranks"] == 2 and len(row["runs"]) == 1
    assert row["speedup"] == facts.scaling.groups[0].rows[1].speedup


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    made = report(tmp_path, Recipe())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        write_report(made, tmp_path / "file" / "report")
    assert str(tmp_path / "file" / "report") in error.value.what


def test_the_page_shows_the_largest_peak_beside_what_was_expected(tmp_path: Path) -> None:
    peaks = {
        "peak_anonymous_bytes": [700e6, 683e6],
        "peak_resident_bytes": [900e6, 880e6],
        "peak_gpu_bytes": [None] * 2,
    }
    told = {"expected_peak_bytes": [660e6, 650e6]}
    shown = Page(page(report(tmp_path, *pair(meta=peaks | told)), tmp_path)).text
    assert "700 MB of its own, 900 MB resident with files; 660 MB expected of its own" in shown


def test_cores_and_storage_are_told_with_their_rates(tmp_path: Path) -> None:
    told = {"loop_time_s": [10.0, 10.0], "loop_cpu_s": [9.0, 5.0], "loop_read_bytes": [3_000_000_000, 0]}
    used = told | {"loop_written_bytes": [20_000_000, 20_000_000]}
    old, new = pair(meta=used)
    made = report(tmp_path, old, new)
    (row,) = table(made.sections[0], "use").rows
    assert row == ("2", "0.700", "1.00", "3.00 GB", "300 MB/s", "40.0 MB", "4.00 MB/s")
    one, two = made.rows
    assert one["cores_busy"] is None and one["storage_read_bytes"] is None
    assert two["storage_read_bytes_per_s"] == pytest.approx(3e8) and two["cores_per_rank"] == 1
    damage = {"loop_cpu_s": [1.0]}, {"loop_time_s": [0, 0]}, {"loop_time_s": 7}
    for number, damaged in enumerate(damage):
        assert "use" not in report(tmp_path / f"d{number}", old, replace(new, meta=used | damaged)).table_ids
