"""Measures this program and its peers on equal work; prints a Markdown table and keeps it, with a figure.

    python -m tests.benchmarks.peers [--only ROW]... [--repeat N] [--quick]

Contenders of several ranks run side by side, all but one stopped: they take turns, a block of steps each, forwards and
backwards. A ratio is the median of the ratios of the turns (behind it, the quartiles). Where what it is held against
varies by more than 5% (the distance of its quartiles over its median) nothing is judged. The exit code is 1 where a
bound is missed, 2 where something of this program's failed. A quiet machine with 2 cores or more; 20 minutes.
"""

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click

from tests.benchmarks import peers_costs, peers_state, peers_steps
from tests.benchmarks.io_peers import install
from tests.benchmarks.peers_table import Section, draw, markdown
from tests.benchmarks.peers_turns import Failed

# Each is installed whole, with torch and numpy held as they are here.
PEERS = {
    "Lightning": ("lightning", "lightning"),
    "Accelerate": ("accelerate", "accelerate"),
    "DeepSpeed": ("deepspeed", "deepspeed"),
    "perun": ("perun", "perun"),
}
ROWS = ("efficiency", "tax", "logging", "energy", "all-reduce", "start", "checkpoint", "resume")


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(ROWS), help="Of the rows this (repeatable).")
@click.option("--repeat", default=11, type=click.IntRange(2), show_default=True, help="Turns that count.")
@click.option(
    "--output", default=Path("runs/bench"), type=click.Path(path_type=Path), show_default=True, help="Folder."
)
@click.option(
    "--venv", default=Path("runs/bench-peers"), type=click.Path(path_type=Path), show_default=True, help="Of the peers."
)
@click.option("--quick", is_flag=True, help="A trial of everything: its figures mean nothing.")
def main(only: tuple[str, ...], repeat: int, output: Path, venv: Path, quick: bool) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stopped contenders are ended, not left behind
    turns = 2 if quick else repeat
    pythons = install(venv.absolute(), say, PEERS, build_here=True)
    folder = Path(tempfile.mkdtemp(prefix="hpc-train-peers-", dir=_room()))
    sections: list[Section] = []
    failed: list[str] = []
    output.mkdir(parents=True, exist_ok=True)
    table = output / ("table-quick.md" if quick else "table.md")
    try:
        for row, measure in _rows(pythons, turns, quick, folder).items():
            if only and row not in only:
                continue
            try:
                sections += measure()
            except (Failed, subprocess.TimeoutExpired) as error:
                failed.append(f"{row} is not there: {error}")
                say(failed[-1])
            # What took many minutes is not lost with the last of them.
            table.write_text(markdown(sections, [*_facts(pythons, turns, quick), *failed]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{table.read_text()}", flush=True)
    for made in (table, *(draw(sections, table) if sections else [])):
        say(str(made))
    met = all(line.is_met for section in sections for line in section.lines)
    sys.exit(2 if failed else 0 if met or quick else 1)


def _rows(pythons: dict[str, Path], turns: int, quick: bool, folder: Path) -> dict[str, Callable[[], list[Section]]]:
    same = {"DDP-gloo": Path(sys.executable), "Horovod": Path(sys.executable)}
    few = max(2, turns // 2)  # of what takes long and varies little
    return {
        "efficiency": lambda: list(peers_steps.efficiency(same | pythons, turns, quick, folder, say)),
        "tax": lambda: [peers_steps.tax(2 * turns, quick, folder, say)],
        "logging": lambda: [peers_costs.logging(turns, quick, folder, say)],
        "energy": lambda: [peers_costs.energy(pythons.get("perun"), few, quick, folder, say)],
        "all-reduce": lambda: [peers_costs.all_reduce(turns, quick, folder, say)],
        "start": lambda: [peers_costs.start(few, quick, folder, say)],
        "checkpoint": lambda: [peers_state.checkpoint(turns, quick, folder, say)],
        "resume": lambda: [peers_state.resume(few, quick, folder, say)],
    }


def _facts(pythons: dict[str, Path], turns: int, quick: bool) -> list[str]:
    packages = ["torch", "horovod", "mpi4py", "numpy"]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {cores} cores of {_processor()}, {turns} turns; {versions}; "
        f"peers: {', '.join(_peer(name, pythons[name]) for name in pythons) or 'none installed'}."
    ]
    return ["**A trial: the figures mean nothing.**", "", *lines] if quick else lines


def _peer(name: str, python: Path) -> str:
    words = f"from importlib.metadata import version; print(version('{PEERS[name][0]}'))"
    done = subprocess.run([python, "-c", words], capture_output=True, text=True)
    return f"{name} {done.stdout.strip()}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _room() -> Path:
    """Where checkpoints and logs go: a disk, and not memory that passes for one."""
    place = Path("runs").absolute()
    place.mkdir(exist_ok=True)
    return place


def say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    main()
