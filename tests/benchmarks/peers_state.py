"""Checkpoints: how long the loop stands still for one, and how long a run takes to go on from it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import tomli_w

from hpc_train.core.rundir import find
from hpc_train.core.timing_log import PHASES, read_timings
from tests import jobs
from tests.benchmarks.peers_costs import first_step_s, output
from tests.benchmarks.peers_table import Line, Section
from tests.benchmarks.peers_tasks import COPIES
from tests.benchmarks.peers_turns import Failed

_READ_BYTES = 8 << 20
_EVERY = 200  # steps of 30 ms between checkpoints: the one before has been written by then
Say = Callable[[str], None]


def checkpoint(turns: int, quick: bool, folder: Path, say: Say) -> Section:
    """Stall of the loop while a state of 500 MB is taken, over a copy of that state into memory that is there."""
    megabytes, every = (32, 40) if quick else (500, _EVERY)
    say(f"checkpoint of {megabytes} MB: {turns} turns")
    copies = folder / "copies.json"
    steps = (turns + 1) * every + every // 2 + 1  # the first checkpoint and the first copy do not count
    job = _job(folder, "stall", megabytes, steps) | {"checkpoint": {"every_steps": every, "every_minutes": 0.0}}
    said = output(jobs.command(0, "train", _written(job, folder)), **{COPIES: str(copies)})
    if "left out" in said:
        raise Failed("a checkpoint was left out: the one before was still being written")
    (run,) = find([folder / "runs" / "stall"])
    timings = read_timings(run.timings(0))
    other_s = timings.phases_ns[:, PHASES.index("other")] / 1e9
    saved = every * np.arange(2, turns + 2)  # what follows the end of a step is of the next one's time
    usual_s = float(np.median(other_s))
    stalls = other_s[saved] - usual_s
    there, fresh = (np.array(each[1:]) for each in json.loads(copies.read_text()))
    meanwhile = timings.phases_ns.sum(1)[saved[0] + 1 : saved[0] + every // 4] / 1e6
    lines = [
        Line(
            f"checkpoint of {megabytes} MB: stall of the loop ({1e3 * np.median(stalls):.0f} ms) over a copy in memory "
            f"({1e3 * np.median(there):.0f} ms)",
            (stalls / there).tolist(),
            *("<=", 1.2, there.tolist()),
        ),
        Line("the same over a copy into new memory", (stalls / fresh).tolist()),
    ]
    first_s = float(other_s[every] - usual_s)
    notes = [
        f"the first checkpoint, whose memory is new, took {1e3 * first_s:.0f} ms; "
        f"steps while one is written: {np.median(meanwhile):.3g} ms, of which the task sleeps 30"
    ]
    return Section("checkpoint", lines, notes)


def resume(turns: int, quick: bool, folder: Path, say: Say) -> Section:
    """What going on from 500 MB adds to the time to the first step, over reading as many bytes from the same disk.

    Nothing of the file is in memory when either begins.
    """
    megabytes = 32 if quick else 500
    say(f"resume from {megabytes} MB: {turns} turns")
    job = _written(_job(folder, "resume", megabytes, 2) | {"checkpoint": {"keep": 1}}, folder)
    output(jobs.command(0, "train", job))
    (run,) = find([folder / "runs" / "resume"])
    (state,) = run.path.glob("checkpoints/step-*.h5")
    longer = jobs.settings(train__steps=4, checkpoint__keep=0)  # what is saved at its end is not looked at
    kept = folder / "kept"
    shutil.move(run.path, kept)  # a run that goes on is another one afterwards
    ratios, read, added = [], [], []
    for turn in range(turns + 1):
        shutil.rmtree(folder / "runs" / "resume", ignore_errors=True)
        shutil.copytree(kept, run.path)
        (run.path / "summary.json").unlink(missing_ok=True)
        read_s = _read_s(state)
        _forget(state)
        resumed_s = first_step_s(jobs.command(0, "train", job, *longer, "--resume", run.path), folder / "first", 1)
        fresh_s = first_step_s(
            jobs.command(0, "train", job, *longer, *jobs.settings(name="fresh")), folder / "first", 1
        )
        shutil.rmtree(folder / "runs" / "fresh")
        if turn:
            ratios.append((resumed_s - fresh_s) / read_s)
            read.append(read_s)
            added.append(resumed_s - fresh_s)
    rate = state.stat().st_size / np.median(read) / 1e6
    what = f"resume from {megabytes} MB: time to the first step beyond a fresh start ({np.median(added):.2f} s)"
    line = Line(f"{what} over bytes / read rate ({np.median(read):.2f} s, {rate:.0f} MB/s)", ratios, "<=", 1.5, read)
    return Section("resume", [line])


def _read_s(path: Path) -> float:
    """Seconds to read a file that is not in memory into memory that is."""
    _forget(path)
    buffer = bytearray(_READ_BYTES)
    began = perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return perf_counter() - began


def _forget(path: Path) -> None:
    """The system's page cache forgets a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _job(folder: Path, name: str, megabytes: int, steps: int) -> dict[str, Any]:
    return {
        "name": name,
        "task": {"kind": "tests.benchmarks.peers_tasks:Large", "options": {"megabytes": megabytes}},
        "train": {"steps": steps, "global_batch": 4, "lr": 1e-6, "threads": 1, "log_every": 10**6},
        "reduce": {"strategy": "local"},
        "run": {"root": str(folder / "runs"), "progress": "plain"},
    }


def _written(values: dict[str, Any], folder: Path) -> Path:
    path = folder / f"{values['name']}.toml"
    path.write_text(tomli_w.dumps(values))
    return path
