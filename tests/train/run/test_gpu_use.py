"""A GPU whose use nobody can read is missing, and never a GPU that did nothing."""

import json
from pathlib import Path

import pytest
import torch

from hpc_train.analysis.report.report import make_report
from hpc_train.analysis.runs.load import load
from hpc_train.analysis.runs.loop_use import loop_use
from hpc_train.core.rundir import find
from hpc_train.train.run.gpu_use import GpuUse
from tests import jobs
from tests.analysis.rendered import table
from tests.synthetic import Recipe, write_run

USE = {"loop_time_s": [9.0, 9.0], "loop_cpu_s": [8.1, 8.1]}
ON_GPUS = {**USE, "peak_gpu_bytes": [3e9, 3e9], "rank_room_bytes": 42e9}


def test_no_driver_tells_nothing_of_a_gpu() -> None:
    devices = [torch.device("cpu")] + ([] if torch.cuda.is_available() else [torch.device("cuda", 0)])
    for device in devices:
        with GpuUse(device) as use:
            pass
        assert use.busy is None and use.used_bytes is None, device


def test_a_run_on_cpus_records_that_it_has_no_gpu(digits: Path, tmp_path: Path) -> None:
    words = jobs.settings(data__file=digits, run__root=tmp_path, train__steps=20, train__device="cpu")
    done = jobs.run(2, "train", jobs.CONFIGS / "mlp-mnist.toml", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    (run,) = find([tmp_path])
    meta = json.loads(run.meta.read_text())
    assert meta["loop_gpu_busy"] == meta["loop_gpu_used_bytes"] == [None, None]
    use = loop_use(load(run))
    assert use.cores_busy is not None and use.gpu_busy is None and use.gpu_busy_least is None
    made = make_report([tmp_path])
    assert made.rows[0]["gpu_busy"] is None and made.rows[0]["gpu_used_bytes"] is None
    titles = [column.title for column in table(made.sections[0], "use").columns]
    assert "cores busy" in titles and "GPU busy" not in titles


@pytest.mark.parametrize(
    ("busy", "used_bytes", "cells"),
    [
        ([0.9, 0.5], [31e9, 29e9], ("70.0%", "50.0%", "31.0 GB")),
        ([0.0, 0.0], [1e9, 1e9], ("0.0%", "0.0%", "1.00 GB")),
        ([None, None], [None, None], ("missing", "missing", "missing")),
        ([0.9, None], [31e9, None], ("missing", "missing", "missing")),
    ],
)
def test_the_table_of_use_has_each_size(
    tmp_path: Path, busy: list[float | None], used_bytes: list[float | None], cells: tuple[str, str, str]
) -> None:
    meta = {**ON_GPUS, "loop_gpu_busy": busy, "loop_gpu_used_bytes": used_bytes}
    write_run(tmp_path, Recipe(size=2, meta=meta))
    (section,) = make_report([tmp_path]).sections
    use = table(section, "use")
    assert [column.title for column in use.columns][1:4] == ["GPU busy", "least busy", "GPU memory"]
    assert use.rows[0][1:4] == cells


def test_a_run_before_gpus_were_recorded_has_no_use_of_them(tmp_path: Path) -> None:
    write_run(tmp_path, Recipe(size=2, meta=ON_GPUS))
    (section,) = make_report([tmp_path]).sections
    assert table(section, "use").rows[0][1:4] == ("missing", "missing", "missing")
