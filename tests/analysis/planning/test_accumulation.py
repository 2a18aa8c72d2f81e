"""Gradients accumulated over fewer micro-batches on more ranks: one job; communication hides behind the last one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hpc_train.analysis.models.measurement_table import read_table
from hpc_train.analysis.models.measurements import Measurements, Network
from hpc_train.analysis.report.notes.prediction import prediction_notes
from hpc_train.cli.main import cli
from hpc_train.core.errors import UserError
from tests.analysis.models.test_predict import measurements, mechanistic, noisy
from tests.synthetic import Recipe, write_run

NETWORK = Network(1e-5, 2e-10, 1e-5, 2e-10, "bench")
GRADIENT_BYTES = 1e8


def step_s(n: Any, micro_batches: Any) -> Any:
    """1 s of computing that the ranks share; two thirds of a micro-batch hide the all-reduce, but for 5% of it."""
    whole_s = 2 * (n - 1) * 1e-5 + 2 * (n - 1) / n * GRADIENT_BYTES * 2e-10
    return 1 / n + 0.05 * whole_s + np.maximum(0, 0.95 * whole_s - 2 / 3 / n / micro_batches)


def falling(sizes: list[int], seed: int = 0) -> tuple[Measurements, Any]:
    """(as measured, micro-batches): 16 on 1 rank, and half as many on twice the ranks."""
    micro_batches = np.maximum(16 // np.array(sizes), 1)
    times = noisy(step_s(np.array(sizes), micro_batches), seed, 0.003)
    known = measurements(
        sizes, times, weak=False, batch=1024.0, network=NETWORK, gradient_bytes=GRADIENT_BYTES, accumulate=micro_batches
    )
    return known, micro_batches


@pytest.mark.parametrize("seed", range(3))
def test_a_micro_batch_keeps_its_hiding_place_on_more_ranks(seed: int) -> None:
    known, _ = falling([1, 2, 4], seed)
    for forecast, micro_batches in zip(mechanistic(known).at([8, 16]), (2, 1), strict=True):
        truth = step_s(float(forecast.ranks), micro_batches)
        assert forecast.step_s == pytest.approx(truth, rel=0.06)
        assert forecast.step_interval_s[0] <= truth <= forecast.step_interval_s[1]


def test_sizes_that_were_not_measured_have_micro_batches_of_the_same_size() -> None:
    known, _ = falling([1, 2, 4])
    assert known.micro_batches(np.array([1, 2, 4, 8, 16, 64])).tolist() == [16, 8, 4, 2, 1, 1]
    assert known.most_whole_micro_batches == 16
    (note,) = [each for each in prediction_notes(mechanistic(known)) if "micro-batch" in each]
    assert "Up to 16 ranks" in note and "no measured size shows" in note


def test_what_each_micro_batch_costs_is_found_where_sizes_show_it() -> None:
    """5 ms a micro-batch, whose number does not fall with the samples."""
    n, micro_batches = np.array([1, 2, 4, 8, 16]), np.array([16, 16, 8, 8, 4])
    times = noisy(1 / n + 0.005 * micro_batches, 0, 0.003)
    known = measurements(n.tolist(), times, weak=False, batch=1024.0, accumulate=micro_batches, ranks_per_node=1)
    made = mechanistic(known)
    low, value, high = made.parameters["micro_batch_s"]
    assert low <= 16 * 0.005 <= high and value == pytest.approx(16 * 0.005, rel=0.25)
    (ahead,) = made.at([32])
    assert ahead.step_s == pytest.approx(1 / 32 + 0.005 * 2, rel=0.1)


def test_a_table_states_them(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("ranks,step_s,global_batch,accumulate\n1,1,64,8\n2,0.5,64,4\n4,0.25,64,\n")
    assert np.array(read_table(path).accumulate).tolist() == [8, 4, 1]
    path.write_text("ranks,step_s,global_batch,accumulate\n1,1,64,8\n2,0.5,64,4\n2,0.5,64,2\n")
    with pytest.raises(UserError, match=r"table.csv:4: accumulate = 2, and 4 in .*table.csv:3, both on 2 ranks"):
        read_table(path)


def test_runs_that_accumulate_less_on_more_ranks_are_one_job(tmp_path: Path) -> None:
    for size, accumulate in ((1, 8), (2, 4), (4, 2)):
        write_run(tmp_path, Recipe(size=size, step_s=0.08 / size + 0.001, accumulate=accumulate, steps=60))
    done = CliRunner().invoke(cli, ["plan", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0 and "Up to 8 ranks a micro-batch is taken to keep its size" in " ".join(
        done.output.split()
    )
    write_run(tmp_path, Recipe(size=4, step_s=0.02, accumulate=4, steps=60, stamp="20261124T210000Z"))
    refused = CliRunner().invoke(cli, ["plan", str(tmp_path)])
    assert isinstance(refused.exception, UserError) and "differ in size alone" in str(refused.exception)
