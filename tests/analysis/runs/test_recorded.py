"""A run of four ranks on two hosts of the test cluster (whose meter is an emulated one), as it was recorded."""

import csv
import json

import numpy as np
import pytest

from hpc_train.analysis.models.measurements import from_group
from hpc_train.analysis.report.facts import gather
from hpc_train.analysis.report.report import make_report
from hpc_train.analysis.runs.load import Run, load_all
from hpc_train.analysis.runs.loop_use import loop_use
from hpc_train.core.timing_log import PHASES
from tests import jobs

ROOT = jobs.ROOT / "tests" / "runs" / "mlp-two-hosts"


@pytest.fixture(scope="module")
def run() -> Run:
    (only,) = load_all([ROOT])
    return only


def records(run: Run) -> np.ndarray:
    """(ranks, steady steps, columns) of the files, read without the package."""
    rows = []
    for path in sorted(run.dir.timings_dir.iterdir()):
        lines = list(csv.DictReader(path.open()))
        columns = ("start_ns", "arrived_ns", *(f"{phase}_ns" for phase in PHASES))
        rows.append([[int(line[name]) for name in columns] for line in lines if line["warmup"] == "0"])
    return np.array(rows)


def test_its_steps_and_phases_are_those_of_the_files(run: Run) -> None:
    spent_s = records(run)[:, :, 2:] / 1e9
    assert spent_s.shape[:2] == (4, 50) and run.incomplete is None
    assert run.step_s == pytest.approx(spent_s.sum(axis=2).mean(axis=0))
    assert run.phases_s == pytest.approx(spent_s.sum(axis=(0, 1)))
    assert run.load_balance is not None
    assert run.load_balance.phases_s == pytest.approx(spent_s.sum(axis=1))


def test_arrivals_are_ordered_on_the_clocks_of_two_hosts(run: Run) -> None:
    """Offsets of the clocks, as recorded at both ends, are taken off: then who is late agrees with who waits."""
    balance = run.load_balance
    assert balance is not None and balance.hosts == ("n1", "n1", "n2", "n2")
    arrivals = balance.arrivals
    assert arrivals is not None and arrivals.basis == "arrival" and arrivals.hosts == ("n1", "n2")
    assert arrivals.host_of.tolist() == [0, 0, 1, 1]
    offsets_ns = json.loads(run.dir.meta.read_text())["clock_offsets_ns"]
    told = np.array([offsets_ns["start"], offsets_ns["end"]]).mean(axis=0)
    arrived_s = (records(run)[:, :, 1] - told[:, None]) / 1e9
    late_s = (arrived_s - np.median(arrived_s, axis=0)).mean(axis=1)
    assert arrivals.late_s - arrivals.late_s.mean() == pytest.approx(late_s - late_s.mean(), abs=2e-3)
    assert np.corrcoef(arrivals.late_s, balance.phases_s[:, PHASES.index("reduce")])[0, 1] < -0.5


def test_a_plan_knows_its_ranks_per_node_and_the_report_what_it_used(run: Run) -> None:
    (group,) = gather([ROOT]).scaling.groups
    assert from_group(group).ranks_per_node == 2
    used = loop_use(run)
    assert used.num_cores == 2 and used.cores_busy is not None and 0 < used.cores_busy < 2
    made = make_report([ROOT])
    assert not made.guard.faults and {"use", "memory", "pop"} <= made.table_ids
    (row,) = made.rows
    assert (row["ranks"], row["num_hosts"], row["joules"]) == (4, 2, 768.0)
