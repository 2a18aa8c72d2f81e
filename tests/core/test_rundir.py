import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir, create, find, write_atomic

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_a_run_is_named_by_time_size_and_job(tmp_path: Path) -> None:
    assert create(tmp_path, "x", 4, NOW).path == tmp_path / "x" / "20260102T030405Z-np4"
    assert create(tmp_path, "x", 4, NOW).path.name == "20260102T030405Z-np4.1", "never the same directory twice"
    assert create(tmp_path, "x", 4, NOW, job="77").path.name == "20260102T030405Z-np4-job77"


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.root = "):
        create(tmp_path / "file", "x", 1, NOW)


def test_runs_are_found_at_any_depth_once(tmp_path: Path) -> None:
    run = create(tmp_path / "runs", "x", 1, NOW)
    run.meta.write_text("{}")
    (tmp_path / "runs" / "report").mkdir()
    assert [found.path for found in find([tmp_path, run.path, tmp_path / "runs"])] == [run.path]
    for wrong, words in ((tmp_path / "none", "does not exist"), (tmp_path / "runs" / "report", "holds no run")):
        with pytest.raises(UserError, match=words):
            find([wrong])


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "summary.json"
    write_atomic(target, "first")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="could not be written: disk full"):
        write_atomic(target, "second")
    assert target.read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_benchmarks_among_runs_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "job/run/timings").mkdir(parents=True)
    (tmp_path / "job/run/meta.json").touch()
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/allreduce-20260101T000000Z-np2.json").touch()
    assert find(sorted(tmp_path.iterdir())) == [RunDir(tmp_path / "job/run")]
    with pytest.raises(UserError, match="bench holds no run directory"):
        find([tmp_path / "bench"])
