"""What a checkpoint that all ranks write costs, over what the machine can do with the same bytes.

    python -m tests.benchmarks.checkpoints [--ranks 2 4] [--megabytes 1000] [--rounds 5] [--folder DIR]

Rows, for each number of ranks, of a state of GPT-like tensors that the ranks hold in parts, as at stage 3:

- rate over raw: `save_now`, over as many processes that `pwrite` the same bytes in pieces of 4 MiB and sync
- stall: how long `save` keeps the loop waiting, over copying the rank's share into memory that is there
- memory: the peak of a rank's anonymous memory in a save beside the one before it, over its share
- resume: loading, over reading the rank's share of the file; neither from the page cache
- DCP save, DCP load: torch.distributed.checkpoint over gloo, with the same tensors as DTensors and its files synced,
  over this program's time

Each round takes all of them in turn, the writes in another order each time and with nothing left to be written. Figures
are medians over rounds, with the smallest and the largest.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

BARS = {"rate over raw": (">=", 0.9), "stall": ("<=", 1.2), "memory": ("<=", 1.1), "resume": ("<=", 1.5)}
PEERS = {"DCP save": (">=", 1.0), "DCP load": (">=", 1.0)}
LAYERS, PIECE_BYTES = 12, 4 << 20


# ------------------------------------------------------------------------------------------------- a rank's part


def rank_main(folder: Path, megabytes: int, rounds: int) -> None:
    from hpc_train.core.rundir import RunDir
    from hpc_train.core.settings import Checkpoint
    from hpc_train.train.comm.startup import open_context
    from hpc_train.train.run.checkpoint.copy import HostCopy
    from hpc_train.train.run.checkpoint.saver import Saver

    with open_context(use_mpi=True) as context, context.duplicate() as own:
        share = _share(context, megabytes)
        num_bytes = sum(part.numbers.nbytes for part in share.parts)
        run = RunDir(folder)
        context.on_root(lambda: run.checkpoints_dir.mkdir(exist_ok=True))
        copy, figures, dcp = HostCopy(), [], _Dcp(context, folder / "dcp", share)
        copy.take(share.parts)
        with Saver(run, Checkpoint(keep=1), {}, own, print) as saver:
            for number in range(rounds + 1):
                writes = [
                    lambda: _write_raw(folder, context, share.parts),
                    partial(saver.save_now, 2 * number + 1, share),
                    dcp.save,
                ]
                first = number % len(writes)  # none always comes after the same other
                written_s = {}
                for which in [*range(first, len(writes)), *range(first)]:
                    _settle(context)
                    written_s[which] = _timed(context, writes[which])
                raw_s, saved_s, dcp_saved_s = written_s[0], written_s[1], written_s[2]
                _settle(context)
                copy_s = _timed(context, lambda: copy.take(share.parts))
                memory = _Peak()
                stall_s = _timed(context, partial(saver.save, 2 * number + 2, share))
                saver._finish()
                added = memory.end()
                path = run.checkpoint(2 * number + 2)
                context.on_root(partial(_leave_cache, path))
                read_s = _timed(context, partial(_read_raw, path, context, share.parts))
                context.on_root(partial(_leave_cache, path))
                load_s = _timed(context, lambda: _load(run, context, share))
                context.on_root(dcp.leave_cache)
                dcp_load_s = _timed(context, dcp.load)
                rate = sum(context.all_gather(num_bytes)) / saved_s / 1e6
                figures.append(
                    {
                        "rate over raw": raw_s / saved_s,
                        "stall": stall_s / copy_s,
                        "memory": max(context.all_gather((num_bytes + added) / num_bytes)),
                        "resume": load_s / read_s,
                        "DCP save": dcp_saved_s / saved_s,
                        "DCP load": dcp_load_s / load_s,
                        "DCP files": dcp.num_files,
                        "MB/s": rate,
                        "stall ms": 1e3 * stall_s,
                    }
                )
        if context.world.is_root:
            (folder / "figures.json").write_text(json.dumps(figures[1:]))  # the first round's memory is new


def _share(context: Any, megabytes: int) -> Any:
    """Weights and two moments of a GPT's blocks, each tensor cut among the ranks."""
    import torch

    from hpc_train.train.run.checkpoint.encoding import data_set_name
    from hpc_train.train.run.checkpoint.shares import Part, Share

    width = int((megabytes * 1e6 / 3 / 4 / LAYERS / 12) ** 0.5)
    shapes = {
        "qkv": (3 * width, width),
        "out": (width, width),
        "wide": (4 * width, width),
        "narrow": (width, 4 * width),
    }
    rank, size = context.world.rank, context.world.size
    parts = []
    model: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    for name, shape in ((f"blocks.{block}.{name}", shape) for block in range(LAYERS) for name, shape in shapes.items()):
        model[name] = torch.empty(shape, device="meta")
        kept = {key: torch.empty(shape, device="meta") for key in ("exp_avg", "exp_avg_sq")}
        optimizer[name] = {"step": torch.tensor(1.0), **kept}
        num = shape[0] * shape[1]
        begin, end = num * rank // size, num * (rank + 1) // size
        for keys in (("model",), ("optimizer", "exp_avg"), ("optimizer", "exp_avg_sq")):
            parts.append(Part(data_set_name(*keys, name), begin, torch.rand(end - begin)))
    state = {"model": model, "optimizer": optimizer, "loss_scale": [1.0, 0, 0], "task": {}}
    return Share(state if context.world.is_root else None, parts)


def _settle(context: Any) -> None:
    """Collective. Waits until nothing is left to be written: one write's dirty pages would slow the next."""
    context.on_root(os.sync)


def _timed(context: Any, work: Callable[[], Any]) -> float:
    """Seconds of the slowest rank, from a common start."""
    context.barrier()
    began_s = time.perf_counter()
    work()
    return float(max(context.all_gather(time.perf_counter() - began_s)))


def _write_raw(folder: Path, context: Any, parts: list[Any]) -> None:
    from hpc_train.train.run.checkpoint.ranges import bytes_of

    lengths = context.all_gather(sum(part.numbers.nbytes for part in parts))
    at = sum(lengths[: context.world.rank])
    path = folder / "raw.bin"
    if context.world.is_root:
        path.unlink(missing_ok=True)
        path.touch()
        os.truncate(path, sum(lengths))
    context.barrier()
    handle = os.open(path, os.O_WRONLY)
    for part in parts:
        data = bytes_of(part.numbers)
        for begin in range(0, len(data), PIECE_BYTES):
            at += os.pwrite(handle, data[begin : begin + PIECE_BYTES], at)
    os.fsync(handle)
    os.close(handle)
    context.barrier()


def _read_raw(path: Path, context: Any, parts: list[Any]) -> None:
    """As many bytes as the rank's share, into the same memory."""
    from hpc_train.train.run.checkpoint.ranges import bytes_of

    handle = os.open(path, os.O_RDONLY)
    at = context.world.rank * sum(part.numbers.nbytes for part in parts)
    for part in parts:
        data = bytes_of(part.numbers)
        for begin in range(0, len(data), PIECE_BYTES):
            at += os.preadv(handle, [data[begin : begin + PIECE_BYTES]], at)
    os.close(handle)


def _load(run: Any, context: Any, share: Any) -> None:
    from hpc_train.core.world import World
    from hpc_train.train.comm.context import Context
    from hpc_train.train.run.checkpoint.restore import Plan, Replicated, Wanted, load_newest

    def plan(state: dict[str, Any]) -> Plan:
        stored = {f"model/{name}": each for name, each in state["model"].items()}
        for name, kept in state["optimizer"].items():
            stored |= {f"optimizer/{key}/{name}": each for key, each in kept.items()}
        return Plan(
            [Replicated(Context(World()), [Wanted(stored[name], at, into) for name, at, into in share.parts])], list
        )

    load_newest(run, context, lambda state, manifest: None, plan, print)


def _leave_cache(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


class _Dcp:
    """The same state in torch.distributed.checkpoint: each tensor is cut among the ranks along its first axis."""

    def __init__(self, context: Any, path: Path, share: Any) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        from tests.hdfs import free_ports

        rank, size = context.world.rank, context.world.size
        address = context.on_root(lambda: f"tcp://127.0.0.1:{free_ports(1)[0]}")
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
        mesh = init_device_mesh("cpu", (size,))
        self._path, self._context = path, context
        shapes = context.on_root(lambda: {name: tuple(each.shape) for name, each in share.state["model"].items()})
        self._state = {
            f"{kind}.{name}": distribute_tensor(torch.rand(shape), mesh, [Shard(0)])
            for name, shape in shapes.items()
            for kind in ("model", "exp_avg", "exp_avg_sq")
        }

    def save(self) -> None:
        from torch.distributed import checkpoint

        if self._context.world.is_root:
            shutil.rmtree(self._path, ignore_errors=True)  # as the checkpoint before is removed
        self._context.barrier()
        writer = checkpoint.FileSystemWriter(self._path, single_file_per_rank=True, sync_files=True, overwrite=True)
        checkpoint.save(self._state, storage_writer=writer)

    def load(self) -> None:
        from torch.distributed import checkpoint

        checkpoint.load(self._state, storage_reader=checkpoint.FileSystemReader(self._path))

    @property
    def num_files(self) -> int:
        return sum(each.is_file() for each in self._path.rglob("*"))

    def leave_cache(self) -> None:
        for each in self._path.rglob("*"):
            _leave_cache(each)


class _Peak:
    """How far this process's anonymous memory rises, in bytes."""

    def __init__(self) -> None:
        self._begun = self._most = _anonymous_bytes()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ends.wait(0.002):
            self._most = max(self._most, _anonymous_bytes())

    def end(self) -> int:
        self._ends.set()
        self._thread.join()
        return self._most - self._begun


def _anonymous_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the file system to measure")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rank:
        rank_main(chosen.folder, chosen.megabytes, chosen.rounds)
        return
    print(f"state of {chosen.megabytes} MB, {chosen.rounds} rounds: median (smallest to largest)\n")
    print(
        f"| ranks | {' | '.join(BARS | PEERS)} | DCP files | MB/s | stall ms |\n|---|{'---|' * (len(BARS | PEERS) + 3)}"
    )
    for ranks in chosen.ranks:
        folder = Path(tempfile.mkdtemp(dir=chosen.folder))
        try:
            words = ["--rank", "--folder", folder, "--megabytes", chosen.megabytes, "--rounds", chosen.rounds]
            command = ["mpirun", "--quiet", "-n", ranks, "--oversubscribe", "--bind-to", "none", sys.executable]
            subprocess.run([str(word) for word in [*command, "-m", __spec__.name, *words]], check=True)
            print(f"| {ranks} | {' | '.join(_cells(json.loads((folder / 'figures.json').read_text())))} |", flush=True)
        finally:
            shutil.rmtree(folder)
    print("\nbars: " + ", ".join(f"{name} {sign} {bar}" for name, (sign, bar) in (BARS | PEERS).items()))


def _cells(figures: list[dict[str, float]]) -> list[str]:
    columns = {name: [each[name] for each in figures] for name in figures[0]}
    return [f"{median(each):.3g} ({min(each):.3g} to {max(each):.3g})" for each in columns.values()]


if __name__ == "__main__":
    main()
