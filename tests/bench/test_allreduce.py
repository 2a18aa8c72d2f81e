"""hpc-train bench allreduce under a real mpirun: its tables, its file, its figures, and what it refuses."""

import json
import os
import signal
import subprocess
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from hpc_train.analysis.report.allreduce import ratio_notes, tables
from hpc_train.bench.pace import Pace
from hpc_train.core.allreduce_times import COMPRESSED, LIMITS, OURS, PEERS, Row
from tests import jobs

SIZES = [4 << 10, 16 << 10, 64 << 10]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[jobs.Ended, Path]:
    folder = tmp_path_factory.mktemp("bench")
    return jobs.run(2, "bench", "allreduce", "--min", "4K", "--max", "64K", "--repeat", 2, cwd=folder), folder


@pytest.fixture(scope="module")
def saved(done: tuple[jobs.Ended, Path]) -> dict[str, Any]:
    assert done[0].code == 0, done[0].err
    (path,) = done[1].glob("runs/bench/allreduce-*-np2.json")
    assert {each.suffix for each in path.parent.iterdir()} == {".json", ".svg", ".pdf", ".png"}
    return json.loads(path.read_text())


def test_what_plan_reads_is_saved(saved: dict[str, Any]) -> None:
    assert (saved["schema"], saved["kind"]) == (1, "allreduce")
    assert len(saved["hosts"]) == 1 and saved["mpi"] and not saved["stopped"]
    assert {fit["strategy"] for fit in saved["fits"]} == {*OURS, *COMPRESSED, *PEERS}
    for fit in saved["fits"]:
        assert (fit["ranks"], fit["nodes"], fit["ranks_per_node"]) == (2, 1, 2)
        assert fit["alpha_s"] >= 0 and fit["beta_s_per_byte"] >= 0 and fit["error"] >= 0
        assert fit["alpha_s"] + fit["beta_s_per_byte"] > 0
    assert {(row["strategy"], row["bytes"]) for row in saved["rows"]} == {
        (name, size) for name in (*OURS, *COMPRESSED, *PEERS) for size in SIZES
    }
    for name in LIMITS:
        assert [row["bytes"] for row in saved["link"][name]] == SIZES


def test_the_terminal_has_tables_ratios_and_progress(done: tuple[jobs.Ended, Path], saved: dict[str, Any]) -> None:
    out, err = done[0].out, done[0].err
    assert "2 ranks on one node: bus bandwidth in GB/s" in out
    for strategy in ("mpi", "horovod"):
        assert f"64 KiB, 2 ranks on one node: {strategy} runs at " in out
    assert "4 KiB (1 of 3 sizes)" in err and "64 KiB (3 of 3 sizes, about 0:" in err
    assert out.splitlines()[-1].endswith("-np2.png")


@pytest.mark.parametrize(
    "ranks, words, message",
    [
        (1, (), "bench allreduce needs two or more ranks"),
        (2, ("--max", "1000G"), "--max 1073741824000 bytes: each rank holds several such messages"),
        (2, ("--max", "4", "--min", "64"), "--max 4 is less than --min 64"),
        (0, ("--max", "10"), "a multiple of 4 bytes"),
        (0, ("--strategies", "mpi,nccl"), "nccl is not one of horovod, mpi,"),
        (2, ("--output", "/proc/x.json"), "/proc/x.json cannot be written"),
    ],
)
def test_a_mistake_is_one_message(tmp_path: Path, ranks: int, words: tuple[str, ...], message: str) -> None:
    done = jobs.run(ranks, "bench", "allreduce", *words, cwd=tmp_path)
    assert done.code == 2 and done.out == "", done.err
    assert message in done.err.replace("\n", " ") and "Traceback" not in done.err
    assert list(tmp_path.rglob("*.json")) == []


def test_an_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    words = jobs.command(2, "bench", "allreduce", "--strategies", "mpi,plain_mpi", "--max", "64K", "--repeat", 10_000)
    child = subprocess.Popen(words, env=jobs.environment(), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert "4 B (1 of" in child.stderr.readline()
    sleep(0.3)
    began = monotonic()
    os.kill(child.pid, signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode != 0 and monotonic() - began < 20
    assert list(tmp_path.rglob("*.*")) == []


def test_sizes_stop_growing_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr("hpc_train.bench.pace.monotonic", lambda: now[0])
    pace = Pace([1 << 20, 4 << 20, 16 << 20, 64 << 20], 60, said.append)
    for place, goes_on in enumerate((True, True, False)):
        assert pace.may_continue(place) is goes_on
        now[0] += 4.0 * 4**place
    assert pace.stopped == "stopped before 16 MiB: --minutes 1"
    assert said[1] == "4 MiB (2 of 4 sizes, about 0:05:36 left)"
    for place in range(2):
        assert Pace([4, 16], None, said.append).may_continue(place), "with --max it takes what it takes"


def test_ratios_and_limits_in_words() -> None:
    times = {"mpi": 2.0, "plain_mpi": 1.0, "horovod": 1.0, "memory": 0.1}
    rows = [Row(name, 4, 2, 2, 64 << 10, (time_s * 1e-4,) * 3) for name, time_s in times.items()]
    rows += [Row("link", 2, nodes, 2 // nodes, 64 << 10, (1e-5 * nodes,) * 3) for nodes in (1, 2)]
    first, second = ratio_notes(rows)
    assert (
        first.startswith("64 KiB, 4 ranks on 2 nodes: mpi runs at 0.50 of plain MPI_Allreduce") and "below 0.9" in first
    )
    assert "horovod runs at 1.00" in second and "below" not in second
    speeds = next(table for table in tables(rows) if table.id == "allreduce-bandwidth" and "4 ranks" in table.title)
    assert [column.title for column in speeds.columns[-3:]] == ["memory copy", "to bf16", "ping-pong"]
    assert speeds.rows[0][-1] == "3.28", "of two ranks on two nodes, since this place spans nodes"
