"""Loading and comparing runs: known speeds come back, and what cannot be known is not claimed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_train.analysis.report.notes.scaling import group_notes, incomplete_notes, scaling_notes
from hpc_train.analysis.report.renderers.files import default_output
from hpc_train.analysis.report.report import make_report
from hpc_train.analysis.runs.load import load, load_all
from hpc_train.analysis.scaling.compare import Group, Scaling, compare
from hpc_train.analysis.scaling.rows import pooled_row
from hpc_train.analysis.scaling.strategies import compare_strategies
from hpc_train.core.errors import UserError
from hpc_train.core.records import BadRecord
from tests.analysis.stats.simulated import template
from tests.synthetic import SHARES, Recipe, write_run


def scaling(root: Path, *recipes: Recipe) -> Scaling:
    for recipe in recipes:
        write_run(root, recipe)
    return compare(load_all([root]))


def only_group(root: Path, *recipes: Recipe) -> Group:
    found = scaling(root, *recipes)
    assert len(found.groups) == 1
    return found.groups[0]


def cut_last_line(path: Path, num_letters: int = 9) -> None:
    path.write_text(path.read_text()[:-num_letters])


def drop_rows(path: Path, keep: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: keep + 1]))


# ---------------------------------------------------------------------------------------------- load


def test_a_whole_run_is_rebuilt_from_its_records(tmp_path: Path) -> None:
    run = load(write_run(tmp_path, Recipe(size=2, step_s=0.020, hosts=("a", "b"), joules=50.0)))
    assert run.incomplete is None and run.summary.complete
    assert run.summary.step_s == pytest.approx(0.020, rel=0.01)
    assert (run.summary.num_steps, run.summary.num_warmup, len(run.step_s)) == (210, 10, 200)
    assert run.summary.num_samples == 210 * 120
    assert run.summary.phase_share == pytest.approx(SHARES, abs=1e-4)
    assert (run.summary.joules, run.summary.energy_quality, run.summary.num_hosts) == (100.0, "measured", 2)
    assert (run.summary.loss, run.summary.test) == (0.31, {"accuracy": 0.91})


def test_runs_recorded_before_schema_3_keep_their_accuracy() -> None:
    runs = load_all([Path(__file__).parents[2] / "runs" / "mlp-mnist"])
    assert len(runs) >= 3 and all(run.incomplete is None for run in runs)
    for run in runs:
        assert run.meta["schema"] == 2
        assert run.summary.test == {"accuracy": json.loads(run.dir.summary.read_text())["test_accuracy"]}


def test_a_step_takes_the_mean_of_its_ranks(tmp_path: Path) -> None:
    directory = write_run(tmp_path, Recipe(size=2, noise=0.0))
    header, *lines = directory.timings(1).read_text().splitlines()
    slower = [line.split(",") for line in lines]
    for cells in slower:
        cells[3] = str(int(cells[3]) + 5_000_000)  # 5 ms more for data, on rank 1 alone
    directory.timings(1).write_text("\n".join([header, *(",".join(cells) for cells in slower), ""]))
    run = load(directory)
    assert run.summary.step_s == pytest.approx(0.0125)
    assert run.summary.phase_share["data"] == pytest.approx((1 + 1 + 5) / (10 + 15))


def test_a_crashed_run_is_loaded_up_to_its_common_steps(tmp_path: Path) -> None:
    directory = write_run(tmp_path, Recipe(size=3, complete=False, loss=0.7))
    drop_rows(directory.timings(0), 100)
    drop_rows(directory.timings(2), 61)
    cut_last_line(directory.timings(2))
    run = load(directory)
    assert run.summary.num_steps == 60 and not run.summary.complete
    assert run.summary.num_samples == 60 * 120
    assert run.summary.loss == 0.7
    assert run.incomplete is not None
    for words in ("no summary.json", "60 to 210 steps", "rank 2", "cut short", "60 of 210 steps"):
        assert words in run.incomplete


def test_a_truncated_last_line_marks_a_run_that_has_a_summary(tmp_path: Path) -> None:
    directory = write_run(tmp_path, Recipe())
    cut_last_line(directory.timings(0))
    run = load(directory)
    assert run.incomplete is not None and "cut short" in run.incomplete
    assert run.summary.num_steps == 209


def test_a_rank_without_a_file_is_named(tmp_path: Path) -> None:
    directory = write_run(tmp_path, Recipe(size=2))
    directory.timings(1).unlink()
    assert "no timings of rank 1" in str(load(directory).incomplete)


def test_a_bad_line_is_an_error_that_names_path_and_line(tmp_path: Path) -> None:
    directory = write_run(tmp_path, Recipe())
    lines = directory.timings(0).read_text().splitlines()
    lines[41] = lines[41].replace(",", ";", 3)
    directory.timings(0).write_text("\n".join(lines) + "\n")
    with pytest.raises(BadRecord) as error:
        load(directory)
    assert f"{directory.timings(0)}:42:" in error.value.what


def test_a_rank_that_recorded_other_steps_is_an_error(tmp_path: Path) -> None:
    directory = write_run(tmp_path, Recipe(size=2))
    lines = directory.timings(1).read_text().splitlines()
    del lines[31]
    directory.timings(1).write_text("\n".join(lines) + "\n")
    with pytest.raises(BadRecord) as error:
        load(directory)
    assert f"{directory.timings(1)}:32:" in error.value.what


@pytest.mark.parametrize(
    ("meta", "named"), [({"size": 0}, "size = 0"), ({"hosts": []}, "hosts = []"), ({"schema": 99}, "schema = 99")]
)
def test_unusable_metadata_is_named(tmp_path: Path, meta: dict[str, Any], named: str) -> None:
    directory = write_run(tmp_path, Recipe(meta=meta))
    with pytest.raises(UserError) as error:
        load(directory)
    assert str(directory.meta) in error.value.what and named in error.value.what


def test_metadata_and_summary_that_are_no_json_are_named(tmp_path: Path) -> None:
    directory = write_run(tmp_path, Recipe())
    for path in (directory.summary, directory.meta):
        path.write_text("{")
        with pytest.raises(UserError) as error:
            load(directory)
        assert str(path) in error.value.what


def test_energy_is_missing_when_one_host_has_none(tmp_path: Path) -> None:
    directory = write_run(tmp_path, Recipe(hosts=("a", "b")))
    directory.energy("b").unlink()
    summary = load(directory).summary
    assert (summary.joules, summary.energy_quality) == (None, "missing")


def test_where_a_report_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tmp_path / "runs" / "job" / name for name in ("a-np1", "b-np2")]
    assert default_output(runs) == tmp_path / "runs" / "job" / "report"
    assert default_output(runs[:1]) == runs[0] / "report"
    far_apart = [runs[0], tmp_path / "elsewhere" / "other"]
    assert default_output(far_apart) == Path("report"), "not in a folder that nobody named"
    monkeypatch.chdir(tmp_path)
    assert default_output(far_apart) == Path("report")
    assert default_output([Path("runs")]) == Path("runs/report")


def test_a_report_on_some_runs_leaves_that_of_all_as_it_is(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs", Recipe(size=size)) for size in (1, 2, 4)]
    job = runs[0].path.parent
    paths = [run.path for run in runs]
    assert default_output(paths) == default_output([job]) == job / "report", "all of them"
    some = default_output(paths[:2])
    assert some.parent == job and some.name == f"report-{paths[0].name}+{paths[1].name}"
    assert default_output([paths[2]]) == paths[2] / "report", "inside a lone run"
    others = [write_run(tmp_path / "runs", Recipe(name="other-job", size=size)).path for size in (1, 2)]
    assert default_output([job]) == job / "report"
    assert default_output([job, others[0]]).name.startswith("report-")
    assert default_output([job, others[0].parent]) == tmp_path / "runs" / "report"
    many = [write_run(tmp_path / "many", Recipe(size=size)).path for size in range(1, 12)]
    names = {default_output(many[:-1]).name, default_output(many[1:]).name, default_output(many).name}
    assert len(names) == 3 and "report" in names and max(map(len, names)) < 150


def test_an_earlier_report_among_the_paths_is_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path, Recipe())
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("")
    assert len(load_all(sorted(tmp_path.iterdir()))) == 1
    with pytest.raises(UserError):
        load_all([tmp_path / "report"])


def test_the_analysis_imports_nothing_of_the_training_half() -> None:
    code = (
        "import sys\n"
        "for name in ('mpi4py', 'torch', 'horovod', 'h5py', 'hpc_train.train'): sys.modules[name] = None\n"
        "import hpc_train.analysis.runs.load, hpc_train.analysis.scaling.compare, hpc_train.analysis.report.report\n"
        "assert 'matplotlib' not in sys.modules, 'matplotlib was imported'\n"
        "import hpc_train.analysis.report.renderers.page\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------- compare


def test_a_known_speedup_lies_in_its_interval(tmp_path: Path) -> None:
    group = only_group(tmp_path, Recipe(size=1, step_s=0.0100), Recipe(size=4, step_s=0.0040))
    one, four = group.rows
    assert not group.weak and group.baseline is one and one.is_baseline
    assert four.speedup == pytest.approx(2.5, rel=0.02)
    assert four.efficiency is not None and four.speedup is not None
    assert four.efficiency == pytest.approx(four.speedup / 4)
    assert four.speedup_interval is not None
    low, high = four.speedup_interval
    assert low < 2.5 < high and low < four.speedup < high and high - low < 0.1
    assert four.samples_per_s == pytest.approx(120 / 0.0040, rel=0.02)
    assert sum(four.phase_s.values()) == pytest.approx(0.0040, rel=0.02)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(tmp_path: Path) -> None:
    hits = 0
    for trial in range(20):
        root = tmp_path / str(trial)
        stamp = f"202611{trial:02d}T000000Z"
        group = only_group(
            root, Recipe(step_s=0.010, noise=0.1, stamp=stamp), Recipe(size=2, step_s=0.005, noise=0.1, stamp=stamp)
        )
        interval = group.rows[1].speedup_interval
        assert interval is not None
        hits += interval[0] <= 2.0 <= interval[1]
    assert hits >= 15  # of 20; at 95% fewer would happen once in 3000 times


def test_an_efficiency_above_one_is_explained(tmp_path: Path) -> None:
    group = only_group(tmp_path, Recipe(size=1), Recipe(size=2, step_s=0.004))
    (note,) = group_notes(group)
    assert note.startswith("2 ranks: ") and "efficiency above 100%" in note and "repeat the baseline" in note


def test_an_efficiency_that_may_be_below_one_needs_no_explanation(tmp_path: Path) -> None:
    recipes = [
        Recipe(size=size, step_s=step_s * factor, stamp=f"2026112{index}T210000Z")
        for size, step_s in ((1, 0.010), (2, 0.0045))
        for index, factor in enumerate((0.9, 1.1))
    ]
    group = only_group(tmp_path, *recipes)
    assert (group.rows[1].efficiency or 0) > 1.05 and not any("above 100%" in note for note in group_notes(group))


def test_a_clock_that_stood_still_leaves_no_speed() -> None:
    row = pooled_row([replace(template(), step_s=np.zeros(20))])
    assert row.step is None and row.samples_per_s is None


def test_weak_scaling_compares_throughput(tmp_path: Path) -> None:
    group = only_group(
        tmp_path, Recipe(size=1, step_s=0.010, batch_per_rank=32), Recipe(size=4, step_s=0.0125, batch_per_rank=32)
    )
    four = group.rows[1]
    assert group.weak and four.global_batch == 128
    assert four.speedup == pytest.approx(4 * 0.8, rel=0.02)
    assert four.efficiency == pytest.approx(0.8, rel=0.02)
    assert four.speedup_interval is not None
    assert four.speedup_interval[0] < 3.2 < four.speedup_interval[1]


def test_one_size_alone_has_no_speedup(tmp_path: Path) -> None:
    found = scaling(tmp_path, Recipe(size=2), Recipe(size=2, stamp="20261123T220000Z"))
    (row,) = found.groups[0].rows
    assert found.groups[0].baseline is None and len(row.runs) == 2
    assert (row.speedup, row.speedup_interval, row.efficiency) == (None, None, None)
    assert any("No baseline" in note and "2 ranks" in note for note in group_notes(found.groups[0]))
    assert any("same job on another number of ranks" in note and "220000Z-np2" in note for note in scaling_notes(found))


def test_a_baseline_of_several_ranks_is_said(tmp_path: Path) -> None:
    group = only_group(tmp_path, Recipe(size=4, step_s=0.004), Recipe(size=8, step_s=0.0025))
    assert group.rows[1].efficiency == pytest.approx(0.004 / 0.0025 * 4 / 8, rel=0.02)
    assert any("baseline is 4 ranks, not 1 rank" in note for note in group_notes(group))


def test_an_incomplete_run_is_shown_but_no_baseline(tmp_path: Path) -> None:
    group = only_group(
        tmp_path, Recipe(size=1, complete=False), Recipe(size=2, step_s=0.006), Recipe(size=4, step_s=0.004)
    )
    one, two, _ = group.rows
    assert one.incomplete and group.baseline is two and two.is_baseline
    (note,) = incomplete_notes(group)
    assert note.startswith("* incomplete: ") and "(1 rank): no summary.json" in note
    assert group.largest is group.rows[2]


def test_an_incomplete_run_is_not_pooled_with_whole_ones(tmp_path: Path) -> None:
    group = only_group(
        tmp_path,
        Recipe(size=1),
        Recipe(size=2, step_s=0.006),
        Recipe(size=2, step_s=0.030, complete=False, stamp="20261123T220000Z"),
    )
    assert [(row.size, row.incomplete) for row in group.rows] == [(1, False), (2, False), (2, True)]
    assert group.rows[1].step_s == pytest.approx(0.006, rel=0.02)


def test_incomplete_runs_alone_have_no_baseline(tmp_path: Path) -> None:
    group = only_group(tmp_path, Recipe(size=1, complete=False), Recipe(size=2, complete=False))
    assert group.baseline is None and all(row.speedup is None for row in group.rows)


def test_a_run_of_warm_up_alone_is_no_baseline(tmp_path: Path) -> None:
    recipes = [Recipe(size=size, steps=10, warmup=10) for size in (1, 2)]
    group = only_group(tmp_path, *recipes)
    assert group.baseline is None and group.rows[0].step_s is None
    assert any("warm-up" in note for note in group_notes(group))


def test_repeats_are_pooled_and_their_differences_widen_the_interval(tmp_path: Path) -> None:
    stamps = [f"20261123T21000{second}Z" for second in range(3)]
    group = only_group(
        tmp_path,
        *(
            Recipe(size=1, step_s=0.010 + 0.001 * index, stamp=stamp, joules=100.0 + index)
            for index, stamp in enumerate(stamps)
        ),
    )
    (row,) = group.rows
    assert len(row.runs) == 3 and row.step_s == pytest.approx(0.011, rel=0.02)
    assert row.step_interval_s is not None
    assert row.step_interval_s[0] < 0.0102 and row.step_interval_s[1] > 0.0118
    assert row.energy.joules == pytest.approx(101.0)
    assert row.joules_per_sample == pytest.approx(101.0 / (210 * 120))


def test_runs_of_other_seeds_are_repeats(tmp_path: Path) -> None:
    for size in (1, 2):
        for seed in (1, 2, 3):
            run = write_run(
                tmp_path, Recipe(size=size, step_s=(0.01 + 0.0001 * seed) / size, stamp=f"2026112{seed}T210000Z")
            )
            run.config.write_text(run.config.read_text().replace("seed = 0", f"seed = {seed}"))
    runs = load_all([tmp_path])
    assert sorted({run.config.seed for run in runs}) == [1, 2, 3]
    (group,) = compare(runs).groups
    assert group.label == "softmax-mnist" and [len(row.runs) for row in group.rows] == [3, 3]
    assert group.rows[1].relative_speed is not None and group.rows[1].relative_speed.between_runs
    (section,) = make_report([tmp_path]).sections
    assert "within one run" not in section.headline and "(95% interval " in section.headline


def test_a_single_run_keeps_the_interval_of_its_summary(tmp_path: Path) -> None:
    group = only_group(tmp_path, Recipe(size=1))
    summary = group.rows[0].runs[0].summary
    assert group.rows[0].step_interval_s == pytest.approx((summary.step_low_s, summary.step_high_s))


def test_different_jobs_are_not_compared_and_the_keys_are_named(tmp_path: Path) -> None:
    found = scaling(tmp_path, Recipe(size=1), Recipe(size=2, strategy="mpi", global_batch=240, step_s=0.005))
    assert len(found.groups) == 2 and all(group.baseline is None for group in found.groups)
    assert scaling_notes(found)[0] == "Not compared across groups, train.global_batch differs: 120 | 240."
    assert "same job on another number of ranks" in scaling_notes(found)[1]
    assert {group.label for group in found.groups} == {
        "softmax-mnist (train.global_batch = 120, reduce.strategy = horovod)",
        "softmax-mnist (train.global_batch = 240, reduce.strategy = mpi)",
    }


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"versions": {"torch": "2.11.0"}}, ("torch", "2.10.0 (1 rank)", "2.11.0 (2 ranks)")),
        ({"mpi": {"version": "MPICH 4.2"}}, ("MPI", "MPICH 4.2 (2 ranks)")),
        ({"cpu_model": "Xeon"}, ("CPU", "Xeon (2 ranks)")),
        ({"ranks": [{"rank": 0, "threads": 8}]}, ("threads per rank", "8 (2 ranks)")),
        ({"git": {"commit": "feed", "dirty": True}}, ("git commit", "feed with uncommitted changes (2 ranks)")),
    ],
)
def test_a_mismatch_is_named(tmp_path: Path, meta: dict[str, Any], words: tuple[str, ...]) -> None:
    group = only_group(tmp_path, Recipe(size=1), Recipe(size=2, step_s=0.005, meta=meta))
    assert group.rows[1].speedup == pytest.approx(2.0, rel=0.02)
    (note,) = [note for note in group_notes(group) if note.startswith("Configuration mismatch: ") and words[0] in note]
    assert all(word in note for word in words)


WEEK = ("20261116T210000Z", "20261123T210000Z")


def twice(root: Path, first: dict[str, Any], second: dict[str, Any]) -> Scaling:
    """A study of 1 and 2 ranks last week, and again today at another speed."""
    return scaling(
        root,
        *(Recipe(size=size, step_s=0.010 / size, stamp=WEEK[0], meta=first) for size in (1, 2)),
        *(Recipe(size=size, step_s=0.020 / size**0.5, stamp=WEEK[1], meta=second) for size in (1, 2)),
    )


TORCH = {"versions": {"torch": "2.10.0"}}


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (TORCH, {"versions": {"torch": "2.11.0"}}, ("version of torch: 2.10.0", "version of torch: 2.11.0")),
        ({"hpc_train": "0.1"}, {"hpc_train": "0.2"}, ("hpc-train: 0.1", "hpc-train: 0.2")),
        ({"git": {"commit": "aaa"}}, {"git": {"commit": "bbb"}}, ("git commit: aaa", "git commit: bbb")),
        (
            {"git": {"commit": "aaa", "dirty": True}},
            {"git": {"commit": "aaa", "dirty": False}},
            ("git commit: aaa with uncommitted changes", "git commit: aaa"),
        ),
        (
            {"git": {"commit": "aaa", "dirty": True, "changes": "11"}},
            {"git": {"commit": "aaa", "dirty": True, "changes": "22"}},
            ("uncommitted changes: 11", "uncommitted changes: 22"),
        ),
        ({"cpu_model": "Milan"}, {"cpu_model": "Genoa"}, ("CPU: Milan", "CPU: Genoa")),
        ({"kernel": "6.1"}, {"kernel": "6.2"}, ("kernel: 6.1", "kernel: 6.2")),
        ({"num_train_samples": 10}, {"num_train_samples": 20}, ("training samples: 10", "training samples: 20")),
        (
            {"environment": {"NCCL_ALGO": "ring"}},
            {"environment": {"TMPDIR": "/tmp/7"}},
            ("environment NCCL_ALGO: ring", "environment NCCL_ALGO: not set"),
        ),
    ],
)
def test_runs_on_unequal_terms_are_no_repeats(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], told: tuple[str, str]
) -> None:
    """Last week's and today's are not merged: each is compared with its own baseline, and says how it differs."""
    found = twice(tmp_path, first, second)
    groups = {group.label: group for group in found.groups}
    assert set(groups) == {f"softmax-mnist ({words})" for words in told}
    old, new = (groups[f"softmax-mnist ({words})"] for words in told)
    for group, speedup in ((old, 2.0), (new, 2**0.5)):
        assert [len(row.runs) for row in group.rows] == [1, 1]
        assert group.rows[1].speedup == pytest.approx(speedup, rel=0.02)
    name = told[0].partition(":")[0]
    assert any(note.startswith(f"Runs that differ in {name} (") for note in scaling_notes(found))


def test_runs_on_several_hosts_are_no_repeats_of_runs_on_one(tmp_path: Path) -> None:
    hosts = ("a", "b")
    found = scaling(tmp_path, Recipe(size=2), Recipe(size=2, stamp=WEEK[0], hosts=hosts), Recipe(size=1))
    assert sorted(group.label for group in found.groups) == ["softmax-mnist (hosts: 1)", "softmax-mnist (hosts: 2)"]


def test_other_settings_make_no_repeats(tmp_path: Path) -> None:
    found = scaling(tmp_path, Recipe(), Recipe(stamp=WEEK[0], steps=110))
    assert {group.label for group in found.groups} == {"softmax-mnist (steps: 110)", "softmax-mnist (steps: 210)"}


def test_one_run_more_on_other_terms_leaves_the_study_whole(tmp_path: Path) -> None:
    newer = {"versions": {"torch": "2.11.0"}}
    sizes = [Recipe(size=size, step_s=0.01 / size, stamp=WEEK[1]) for size in (1, 2, 4)]
    found = scaling(tmp_path, *sizes, Recipe(size=4, step_s=0.002, stamp=WEEK[0], meta=newer))
    first, second = found.groups
    assert [row.size for row in first.rows] == [1, 2, 4] and [row.size for row in second.rows] == [4]
    assert first.rows[2].speedup == pytest.approx(4.0, rel=0.02) and second.rows[0].speedup is None
    assert "version of torch: 2.11.0" in second.label


@pytest.mark.parametrize("missing", ["versions", "cpu_model", "git", "kernel", "environment"])
def test_what_an_old_run_did_not_write_down_is_unknown_and_no_difference(tmp_path: Path, missing: str) -> None:
    known = {"kernel": "6.1", "environment": {"UCX_TLS": "rc"}}
    write_run(tmp_path, Recipe(meta=known))
    old = write_run(tmp_path, Recipe(stamp=WEEK[0], meta=known))
    tree = json.loads(old.meta.read_text())
    del tree[missing]
    old.meta.write_text(json.dumps(tree))
    (group,) = compare(load_all([tmp_path])).groups
    assert [len(row.runs) for row in group.rows] == [2]
    if missing not in ("kernel", "environment"):
        assert any("unknown (1 rank)" in note for note in group_notes(group)), group_notes(group)


def test_an_old_run_that_may_be_either_joins_the_most(tmp_path: Path) -> None:
    metas = [TORCH, TORCH, {"versions": {"torch": "2.11.0"}}, {"versions": {}}]
    found = scaling(tmp_path, *(Recipe(stamp=f"2026112{index}T210000Z", meta=meta) for index, meta in enumerate(metas)))
    assert sorted(len(group.rows[0].runs) for group in found.groups) == [1, 3]


def test_strategies_are_compared_on_equal_terms(tmp_path: Path) -> None:
    newer = {"versions": {"torch": "2.11.0"}}
    recipes = [
        Recipe(size=2, strategy=strategy, stamp=stamp, meta=meta, step_s=step_s)
        for strategy, stamp, meta, step_s in (
            ("horovod", WEEK[0], {}, 0.010),
            ("horovod", WEEK[1], newer, 0.005),
            ("mpi", "20261124T210000Z", newer, 0.010),
        )
    ]
    (comparison,) = compare_strategies(scaling(tmp_path, *recipes).groups)
    assert {entry.strategy: entry.row.step_s for entry in comparison.entries} == {
        "horovod": pytest.approx(0.005, rel=0.02),
        "mpi": pytest.approx(0.010, rel=0.02),
    }


def test_runs_that_are_alike_have_no_notes(tmp_path: Path) -> None:
    assert group_notes(only_group(tmp_path, Recipe(size=1), Recipe(size=2, step_s=0.005))) == []


def test_estimates_and_missing_energy_are_kept_apart(tmp_path: Path) -> None:
    group = only_group(
        tmp_path,
        Recipe(size=1),
        Recipe(size=1, quality="estimated", stamp="20261123T220000Z"),
        Recipe(size=2),
        Recipe(size=2, joules=None, stamp="20261123T220000Z"),
    )
    assert group.rows[0].energy.quality == "estimated"
    assert (group.rows[1].energy.joules, group.rows[1].joules_per_sample) == (None, None)


def test_ranks_that_are_slow_in_turn_count_the_time_that_passed(tmp_path: Path) -> None:
    directory = write_run(tmp_path, Recipe(size=2, noise=0.0))
    for rank in (0, 1):
        header, *lines = directory.timings(rank).read_text().splitlines()
        rows = [line.split(",") for line in lines]
        for step, cells in enumerate(rows):
            if step % 2 == rank:
                cells[6] = str(int(cells[6]) + 20_000_000)  # waits 20 ms in reduce every other step
        directory.timings(rank).write_text("\n".join([header, *(",".join(cells) for cells in rows), ""]))
    assert load(directory).summary.step_s == pytest.approx(0.020)


def test_metadata_of_odd_shape_does_no_harm(tmp_path: Path) -> None:
    odd = {"versions": None, "mpi": "x", "git": [], "ranks": {"0": 1}, "energy": None, "cpu_model": None}
    group = only_group(tmp_path, Recipe(size=1, meta=odd), Recipe(size=2, step_s=0.005))
    assert any("CPU" in note for note in group_notes(group))
    json.dumps(group_notes(group))


def test_two_comparisons_give_the_same_numbers(tmp_path: Path) -> None:
    for size in (1, 2):
        write_run(tmp_path, Recipe(size=size, step_s=0.01 / size))
    first, second = (compare(load_all([tmp_path])).groups[0].rows[1].speedup_interval for _ in range(2))
    assert first == second and first is not None and np.isfinite(first).all()
