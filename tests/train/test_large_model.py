"""A model whose weights, gradients and moments are three times what a rank may hold, from first step to export."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors
import torch

from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import RunDir, find
from hpc_train.train.models.gpt import Gpt
from tests import jobs

SIZE = {"layers": 96, "heads": 6, "width": 384, "context": 8}
TINY = {"layers": 1, "heads": 1, "width": 8, "context": 8}
RANKS, TIMES = 4, 3
STEPS, EVERY = 6, 3


def num_parameters() -> int:
    with torch.device("meta"):
        return sum(each.numel() for each in Gpt(256, **SIZE).parameters())


def data_bytes(word: str) -> int:
    """What counts against RLIMIT_DATA of the process with `word` in its command line that has most of it."""
    found = [0]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if word in command and "mpirun" not in command:
                found += [int(each) << 10 for each in re.findall(r"VmData:\s+(\d+)", (process / "status").read_text())]
        except OSError:
            continue  # it has ended
    return max(found)


class Jobs:
    """Jobs on the same data, each rank of which may have `limit` bytes of data, if that is set."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.limit = folder, 0
        with h5py.File(folder / "tokens.h5", "w") as file:
            for part in ("train", "test"):
                file[f"{part}/inputs"] = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint8)
            file.attrs["vocab_size"] = 256

    def start(self, ranks: int, *words: object) -> subprocess.Popen[str]:
        launcher = ["mpirun", "--quiet", "-n", str(ranks), "--oversubscribe", "--bind-to", "none"] if ranks else []
        limit = ["prlimit", f"--data={self.limit}"] if self.limit else []
        line = [*launcher, *limit, str(jobs.HPC_TRAIN), *map(str, words)]
        return subprocess.Popen(
            line,
            cwd=self.folder,
            env=jobs.environment(MALLOC_ARENA_MAX="2", MALLOC_MMAP_THRESHOLD_=str(1 << 20)),  # few gaps in the heap
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def train(self, ranks: int, name: str, size: dict[str, int], *more: str) -> subprocess.Popen[str]:
        options = ", ".join(f"{key} = {value}" for key, value in size.items())
        (self.folder / f"{name}.toml").write_text(
            f'name = "{name}"\n[data]\nfile = "tokens.h5"\n[task]\nkind = "language"\nmodel = "gpt"\n'
            f"options = {{ {options} }}\n[train]\nsteps = {STEPS}\nglobal_batch = {RANKS}\n"
            'optimizer = "adamw"\nlr = 1e-4\nthreads = 1\n[checkpoint]\n'
            f'every_steps = {EVERY}\n[run]\nroot = "runs"\nprogress = "plain"\n[reduce]\n'
            + ('strategy = "sharded"\nstage = 3\n' if ranks > 1 else 'strategy = "local"\n')
        )
        return self.start(ranks, "train", f"{name}.toml", *more)


@pytest.mark.slow
def test_it_trains_saves_is_killed_resumes_and_is_exported(tmp_path: Path) -> None:
    chain = Jobs(tmp_path)
    tiny, base = chain.train(RANKS, "tiny", TINY), 0
    while tiny.poll() is None:
        base = max(base, data_bytes("tiny.toml"))
        time.sleep(0.01)
    assert tiny.returncode == 0, tiny.communicate()[0]
    chain.limit = base + 16 * num_parameters() // TIMES

    begun = chain.train(RANKS, "large", SIZE)
    saved = tmp_path / "runs/large"
    while begun.poll() is None and not list(saved.glob(f"*/checkpoints/step-{EVERY:08}.h5")):
        time.sleep(0.05)
    assert begun.poll() is None, begun.communicate()[0]
    os.killpg(begun.pid, signal.SIGKILL)
    begun.communicate()
    (run,) = [RunDir(path) for path in saved.iterdir()]

    resumed = chain.train(RANKS, "large", SIZE, "--resume", "auto")
    out, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0 and f"Continuing at step {EVERY}" in out, out
    # Its quarter and a copy of weights and moments are 7/16 of the whole; a rank may have a third.
    assert f"No memory for a copy of what {RANKS} ranks save" in out
    assert find([saved]) == [run]
    steps, losses = read_metrics(run.metrics)
    assert steps == list(range(STEPS)) and np.isfinite(losses).all()

    exported = chain.start(0, "export", run.path, tmp_path / "large.safetensors", "--names", "ours")
    assert exported.wait(timeout=300) == 0, exported.communicate()[0]
    with safetensors.safe_open(tmp_path / "large.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == num_parameters()  # noqa: SIM118

    alone = chain.train(1, "alone", SIZE)
    out, _ = alone.communicate(timeout=300)
    assert alone.returncode == 2 and "this job needs 2.73 GB a rank" in out and "Start 4 ranks or more" in out, out
