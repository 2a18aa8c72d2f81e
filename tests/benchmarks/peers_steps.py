"""Step efficiency of this program and of its peers, and the tax of all that it does besides training."""

import csv
import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tomli_w

from hpc_train.core.rundir import RunDir, find
from tests import jobs
from tests.benchmarks.peers_arms import NAMES
from tests.benchmarks.peers_table import Line, Section
from tests.benchmarks.peers_turns import Arm, Failed, Turns, take_turns
from tests.benchmarks.peers_work import RANKS, SEED, WORKS, Work

SILENT = "no communication"
STRATEGIES = ("horovod", "mpi")
_AGREE = 1e-4  # losses of all, of themselves
_HOURS = {"run": {"progress": "plain", "stall_s": 0.0}}  # ranks stand still when it is others' turn
CHECKPOINT_EVERY_S = 600.0  # checkpoint.every_minutes, as it is by default


def efficiency(
    pythons: dict[str, Path], turns: int, quick: bool, folder: Path, say: Callable[[str], None]
) -> Iterator[Section]:
    """A section for each model: time of 2 ranks that do not communicate over that of 2 ranks that do."""
    for name, work in WORKS.items():
        say(f"step efficiency, {work.title}: {turns} turns of {_block(work, quick)} steps")
        place = folder / name
        arms = [_silent(name, work, turns, quick, place)]
        arms += [_ours(name, work, strategy, turns, quick, place) for strategy in STRATEGIES]
        arms += [peer(each, pythons[each], name, turns, quick) for each in NAMES if each in pythons]
        yield _judged(work, take_turns(arms, turns, RANKS, place, say), place, _block(work, quick))


def _judged(work: Work, found: dict[str, Turns], place: Path, block: int) -> Section:
    silent = np.array(found[SILENT].seconds)
    share = {name: silent / turns.seconds for name, turns in found.items() if name != SILENT}
    for strategy in STRATEGIES:
        found[f"ours, {strategy}"].losses = _losses(place, strategy, block, len(silent) + 1)
    ours = max((f"ours, {strategy}" for strategy in STRATEGIES), key=lambda name: np.median(share[name]))
    peers = [name for name in share if not name.startswith("ours")]
    lines = [
        Line(f"{work.title}, {name}: step efficiency, 2 ranks", share[name].tolist(), baseline=silent.tolist())
        for name in share
    ]
    for name in peers:
        pairs = np.divide(found[name].seconds, found[ours].seconds)
        lines.append(Line(f"{work.title}, {ours} over {name}", pairs.tolist(), ">", 1, silent.tolist()))
    losses = {name: turns.losses for name, turns in found.items() if name != SILENT}
    step_ms = 1e3 * np.median(silent) / block
    notes = [
        f"{step_ms:.3g} ms a step without communication, {work.global_batch // RANKS} samples a rank, "
        f"{work.optimizer}; faster of ours: {ours} (by default it is horovod)",
        "the optimizer is torch's everywhere: ours and where nothing is sent by its fused update, peers as it comes",
        _agreement(losses, f"{len(silent) + 1} turns of {block} steps"),
    ]
    return Section(f"step efficiency, {work.title}", lines, notes)


def _agreement(losses: dict[str, list[float | None]], when: str) -> str:
    """Whether the losses at the turns' ends agree, in words."""
    known = {name: np.array(values, float) for name, values in losses.items() if None not in values}
    middle = np.median(list(known.values()), axis=0)
    apart = {name: float(np.max(np.abs(values / middle - 1))) for name, values in known.items()}
    worst = max(apart, key=lambda name: apart[name])
    unlike = [f"{name} by {part:.1g}" for name, part in apart.items() if not part <= _AGREE]
    last = f"the last is {middle[-1]:.6f}"
    if unlike:
        return f"LOSSES PART after {when} ({last}): {', '.join(unlike)} of the median"
    return f"losses of all agree within {max(apart[worst], 1e-9):.1g} at the ends of {when}; {last}"


# ------------------------------------------------------------------------------------------------- contenders


def _block(work: Work, quick: bool) -> int:
    return 2 if quick else work.block


def peer(name: str, python: Path, work: str, turns: int, quick: bool) -> Arm:
    words = ["-m", "tests.benchmarks.peers_arms", name, work, turns + 1, _block(WORKS[work], quick)]
    if name == "Horovod":
        launch = jobs.command(RANKS)[:-1]
        return Arm(name, [([*launch, sys.executable, "-m", "mpi4py", *words], {})], by_mpirun=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS)}
    shared |= {"LOCAL_WORLD_SIZE": str(RANKS), "TORCHELASTIC_RUN_ID": "bench", "NODE_RANK": "0", "GROUP_RANK": "0"}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    return Arm(name, [([python, *words], env) for env in ranks])


def _silent(name: str, work: Work, turns: int, quick: bool, place: Path) -> Arm:
    """Two processes that each train on a rank's share, at the same time."""
    commands = []
    for number in range(RANKS):
        values = _job(name, work, "local", turns, quick, place, work.global_batch // RANKS)
        job = _written(values | {"name": f"local-{number}"}, place)
        commands.append((jobs.command(0, "train", job), {}))
    return Arm(SILENT, commands, is_ours=True)


def _ours(name: str, work: Work, strategy: str, turns: int, quick: bool, place: Path) -> Arm:
    job = _written(_job(name, work, strategy, turns, quick, place, work.global_batch), place)
    return Arm(f"ours, {strategy}", [(jobs.command(RANKS, "train", job), {})], is_ours=True, by_mpirun=True)


def _job(
    name: str, work: Work, strategy: str, turns: int, quick: bool, place: Path, global_batch: int
) -> dict[str, Any]:
    block = _block(work, quick)
    return {
        "name": strategy,
        "seed": SEED,
        "task": {"kind": "tests.benchmarks.peers_tasks:InMemory", "model": name, "options": {"block": block}},
        "train": {
            "steps": (turns + 1) * block + 1,
            "global_batch": global_batch,
            "optimizer": work.optimizer,
            "lr": work.lr,
            "threads": 1,
            "log_every": block,
        },
        "reduce": {"strategy": strategy},
        "checkpoint": {"keep": 0},
        "run": {**_HOURS["run"], "root": str(place / "runs")},
    }


def _written(values: dict[str, Any], place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{values['name']}.toml"
    path.write_text(tomli_w.dumps(values))
    return path


def run_of(place: Path, name: str) -> RunDir:
    (run,) = find([place / "runs" / name])
    return run


def _losses(place: Path, name: str, block: int, turns: int) -> list[float | None]:
    """The global mean loss at each turn's end."""
    with run_of(place, name).metrics.open() as file:
        of_step = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    return [of_step[turn * block - 1] for turn in range(1, turns + 1)]


# ------------------------------------------------------------------------------------------------- tax


def tax(turns: int, quick: bool, folder: Path, say: Callable[[str], None]) -> Section:
    """A bare Horovod loop over this program with HDF5, logs, energy and checkpoints; a checkpoint every ten minutes."""
    work, place = WORKS["mlp"], folder / "tax"
    block = _block(work, quick)
    say(f"tax, {work.title}: {turns} turns of {block} steps")
    place.mkdir(parents=True)
    inputs, targets = work.data()
    with h5py.File(place / "data.h5", "w") as file:
        file["train/inputs"], file["train/targets"] = inputs, targets
    values = _job("mlp", work, "horovod", turns, quick, place, work.global_batch)
    saved_turn = 1 + turns // 2
    values |= {
        "data": {"file": str(place / "data.h5")},
        "task": {
            "kind": "tests.benchmarks.peers_tasks:FromFile",
            "model": "mlp",
            "options": {"hidden": [2048, 2048, 2048]},
        },
        "checkpoint": {"every_steps": saved_turn * block + 1, "every_minutes": CHECKPOINT_EVERY_S / 60},
        "energy": {"sample_hz": 1.0},
    }
    ours = Arm("ours, horovod", [(jobs.command(RANKS, "train", _written(values, place)), {})], True, True)
    bare = peer("Horovod", Path(sys.executable), "mlp", turns, quick)
    found = take_turns([bare, ours], turns, RANKS, place, say)
    if "Horovod" not in found:
        raise Failed("the bare Horovod loop did not start: there is nothing to compare with")
    found["ours, horovod"].losses = _losses(place, "horovod", block, turns + 1)
    mine = np.array(found["ours, horovod"].seconds)
    others = [seconds for turn, seconds in enumerate(mine, 1) if turn not in (saved_turn, saved_turn + 1)]
    extra_s = max(0.0, float(np.sum(mine[saved_turn - 1 : saved_turn + 1] - np.median(others or mine))))
    whole = mine * (1 + extra_s / CHECKPOINT_EVERY_S)
    what = f"{work.title}: bare Horovod loop in memory over this program with HDF5, logs, energy, checkpoints"
    bare_s = found["Horovod"].seconds
    line = Line(what, np.divide(bare_s, whole).tolist(), ">=", 0.98, bare_s)
    energy = json.loads(run_of(place, "horovod").meta.read_text())["energy"]["meters"]
    meters = ", ".join(meter["source"] for meters in energy.values() for meter in meters)
    notes = [
        f"{1e3 * np.median(bare_s) / block:.3g} ms a bare step; a checkpoint cost {extra_s:.2g} s and is counted once "
        f"in {CHECKPOINT_EVERY_S / 60:g} minutes, the default; energy at 1 Hz by: {meters}",
        _agreement({name: turns.losses for name, turns in found.items()}, f"{turns + 1} turns of {block} steps"),
    ]
    return Section("tax", [line], notes)
