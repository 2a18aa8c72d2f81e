"""The figures of a report: as files for a proposal, with their words, and honest about the laws beside them."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hpc_train.analysis.report.facts import gather
from hpc_train.analysis.report.model import Report
from hpc_train.analysis.report.notes.laws import law_text
from hpc_train.analysis.report.plots.canvas import COLUMN_WIDTH, figure_files, thinned
from hpc_train.analysis.report.renderers.figures import unique_prefixes, write_figures
from hpc_train.analysis.report.renderers.files import write_report
from hpc_train.analysis.report.report import make_report
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.laws import fitted
from hpc_train.core.errors import UserError
from tests.analysis.rendered import report, report_and_facts
from tests.synthetic import Recipe, write_run


def group_of(root: Path, *steps: tuple[int, float], **every: object) -> Group:
    """A group of one run each of so many ranks and seconds a step, with hardly any noise."""
    recipes = [Recipe(size=size, step_s=step_s, noise=1e-4, steps=60) for size, step_s in steps]
    _, facts = report_and_facts(root, *(replace(recipe, **every) for recipe in recipes))  # type: ignore[arg-type]
    return facts.scaling.groups[0]


# ---------------------------------------------------------------------------------------------- laws


def test_amdahls_serial_part_is_found(tmp_path: Path) -> None:
    group = group_of(tmp_path, *((size, 0.1 * (0.2 + 0.8 / size)) for size in (1, 2, 4, 8)))
    law = fitted(group)
    assert law is not None and law.name == "Amdahl" and law.num_sizes == 4
    assert law.serial == pytest.approx(0.2, abs=0.002) and law.worst < 0.01
    assert law.speedup(1.0) == 1 and law.speedup(8.0) == pytest.approx(1 / (0.2 + 0.1), rel=0.01)
    assert law_text(group).endswith("fitted to 4 sizes, which it misses by less than 1%.")


def test_gustafsons_serial_part_is_found_relative_to_a_baseline_of_two_ranks(tmp_path: Path) -> None:
    # Scaled speedup over 2 ranks s + (1 - s) p / 2, so a step takes (p / 2) / S.
    times = {size: 0.01 * (size / 2) / (0.1 + 0.9 * size / 2) for size in (2, 4, 8)}
    group = group_of(tmp_path, *times.items(), batch_per_rank=32)
    law = fitted(group)
    assert law is not None and law.name == "Gustafson" and law.serial == pytest.approx(0.1, abs=0.002)
    assert "Gustafson's law with a serial part of 10.0% of the baseline's time" in law_text(group)


def test_a_law_through_two_points_says_so_and_is_measured_against_those_it_misses(tmp_path: Path) -> None:
    two = group_of(tmp_path / "a", (1, 0.01), (2, 0.006))
    assert "drawn through both measurements, so nothing checks it" in law_text(two)
    kink = group_of(tmp_path / "b", (1, 0.010), (2, 0.005), (4, 0.005))  # which Amdahl's law does not describe
    law = fitted(kink)
    assert law is not None and law.worst > 0.1 and "misses by up to" in law_text(kink)


@pytest.mark.parametrize(
    ("times", "why"),
    [
        (((1, 0.01), (2, 0.004)), "show no serial part"),
        (((1, 0.01), (2, 0.015)), "describes no speedup below 1"),
        (((1, 0.01),), ""),
    ],
)
def test_no_law_is_drawn_where_none_fits(tmp_path: Path, times: tuple[tuple[int, float], ...], why: str) -> None:
    group = group_of(tmp_path, *times)
    assert fitted(group) is None
    assert why in law_text(group) if why else law_text(group) == ""


def test_an_incomplete_size_takes_no_part_in_a_law(tmp_path: Path) -> None:
    for recipe in (Recipe(), Recipe(size=2, step_s=0.006), Recipe(size=4, step_s=0.1, complete=False)):
        write_run(tmp_path, recipe)
    law = fitted(gather([tmp_path]).scaling.groups[0])
    assert law is not None and law.num_sizes == 2 and law.serial == pytest.approx(0.2, abs=0.03)


# ---------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path, list[Path]]:
    """A job at two sizes, and its figures' files."""
    root = tmp_path_factory.mktemp("figures")
    job = {"name": "My.Job_2", "assumption": "<b>", "quality": "estimated"}
    made = report(
        root / "runs",
        Recipe(steps=40, step_s=0.02, **job),  # type: ignore[arg-type]
        Recipe(steps=40, size=2, step_s=0.002, **job),  # type: ignore[arg-type]
    )
    return made, root / "proposal", write_figures(made, root / "proposal")


def test_every_figure_is_a_pdf_and_an_svg_whose_name_says_what_it_is(written: tuple[Report, Path, list[Path]]) -> None:
    made, folder, paths = written
    expected = [plot.id for section in made.sections for plot in section.plots]
    first = ["speedup", "time-per-step", "share-of-step", "step-times", "step-distribution", "pop-efficiencies"]
    energy = ["energy-per-sample", "energy-by-phase", "energy-against-speedup"]
    assert expected == [*first, "training-loss", *energy]
    assert [path.suffix for path in paths] == [".pdf", ".svg"] * len(expected)
    assert len({path.name for path in paths}) == 2 * len(expected)
    assert all(re.fullmatch(r"[a-z0-9-]+\.(pdf|svg)", path.name) for path in paths)
    assert [path.stem for path in paths[::2]] == [f"my-job-2-{name}" for name in expected]
    captions = (folder / "captions.md").read_text()
    assert all(path.stem in captions for path in paths)
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths} | {"captions.md"}


def test_files_are_one_column_wide_hold_their_fonts_and_ask_for_nothing(
    written: tuple[Report, Path, list[Path]],
) -> None:
    for path in written[2]:
        data = path.read_bytes()
        if path.suffix == ".pdf":
            box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", data)
            assert box is not None and float(box[1]) == pytest.approx(72 * COLUMN_WIDTH, abs=0.5)
            assert b"/FontFile2" in data and b"/Type3" not in data, "TrueType, embedded"
            assert b"/CreationDate" not in data
        else:
            text = data.decode()
            assert "<text" not in text and "<script" not in text, "letters are outlines"
            assert f'width="{72 * COLUMN_WIDTH:.1f}' in text
            assert re.search(r"<svg [^>]*><title>[^<]{20,}</title>", text), "words for those who do not see it"
            references = re.findall(r'(?:href=|url\()"?([^")]*)', text)
            assert all(each.startswith(("#", "data:image/png;base64,")) for each in references), path.name


def test_the_same_runs_give_the_same_files(written: tuple[Report, Path, list[Path]]) -> None:
    again = figure_files(written[0].sections[0].plots[0])
    assert [again["pdf"], again["svg"]] == [path.read_bytes() for path in written[2][:2]]


def test_jobs_that_look_alike_do_not_write_over_each_other(tmp_path: Path) -> None:
    made = report(tmp_path, Recipe(steps=40, name="a.b"), Recipe(steps=40, name="a-b", global_batch=60))
    assert unique_prefixes([section.label for section in made.sections])[:2] == ["a-b", "a-b--2"]


def test_every_figure_has_its_words_and_units(written: tuple[Report, Path, list[Path]]) -> None:
    from matplotlib.figure import Figure

    for section in written[0].sections:
        for plot in section.plots:
            axes = Figure().subplots()
            plot.paint(axes)
            labels = f"{axes.get_xlabel()} {axes.get_ylabel()}"
            assert re.search(r"\((ms|us|%|in %|J|mJ|B|kB|MB)\)|ranks?|step", labels), plot.id
            assert len(plot.description) > 20 and len(plot.caption) > 20
            assert axes.get_title() == "", "a caption says what a title would"


def test_a_report_without_steps_has_no_figures_and_a_bad_folder_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", Recipe(joules=None, complete=False))
    run.timings(0).write_text("")
    run.metrics.unlink()
    made = make_report([tmp_path / "runs"])
    assert write_figures(made, tmp_path / "none") == [] and not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_figures(report(tmp_path / "more", Recipe(steps=40)), tmp_path / "file" / "figures")


# ---------------------------------------------------------------------------------------------- many sizes


def test_labels_keep_their_distance_and_the_last_is_there() -> None:
    places = np.log2([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]).tolist()
    kept = thinned(places, 0.7)
    assert kept[-1] == len(places) - 1
    assert all(places[b] - places[a] >= 0.7 for a, b in pairwise(kept))
    assert thinned([3.0], 1.0) == [0] and thinned([], 1.0) == []


def test_many_repeats_stay_a_small_page(tmp_path: Path) -> None:
    recipes = [
        Recipe(size=size, steps=60, stamp=f"20261123T21{repeat:02}00Z") for size in (1, 2) for repeat in range(7)
    ]
    made = report(tmp_path, *recipes)
    (loss,) = [plot for plot in made.sections[0].plots if plot.id == "training-loss"]
    assert "12 of 14 runs are drawn" in loss.caption
    assert write_report(made, tmp_path / "out").stat().st_size < 300_000


def test_many_groups_have_few_figures_each_on_the_page_and_all_in_files(tmp_path: Path) -> None:
    batches = (60, 120, 180, 240)
    recipes = [Recipe(steps=40, global_batch=batch, stamp=f"20261123T{batch:03}000Z") for batch in batches]
    html = write_report(report(tmp_path, *recipes), tmp_path / "out").read_text()
    assert "The first figures of this group" in html
