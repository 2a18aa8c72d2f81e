"""Intact files, made once, that cases copy and damage."""

import shutil
from pathlib import Path

import h5py
import numpy as np

from tests import jobs
from tests.fuzz.play import Play, Server

JOB = """name = "job"
[data]
file = "data.h5"
[train]
steps = 4
global_batch = 8
lr = 0.05
log_every = 1
threads = 1
warmup_steps = 1
optimizer = "adamw"
[checkpoint]
every_steps = 2
[reduce]
strategy = "local"
"""
SAMPLES, TESTS, SHAPE, CLASSES = 48, 16, (6, 5), 3
LAYOUTS: dict[str, dict[str, object]] = {
    "plain": {},
    "gzip": {"chunks": (8, *SHAPE), "compression": "gzip", "shuffle": True},
    "lzf": {"chunks": (8, *SHAPE), "compression": "lzf", "fletcher32": True},
    "chunks": {"chunks": (7, 3, 5)},
}


def make(folder: Path, server: Server) -> None:
    """Makes data-LAYOUT.h5, prepared.h5, job.toml and runs/ with a complete run of that job with two checkpoints."""
    for name, options in LAYOUTS.items():
        write(folder / f"data-{name}.h5", options)
    (folder / "job.toml").write_text(JOB)
    rows = np.random.default_rng(1).normal(size=(60, 4))
    lines = [",".join([*map(str, row.round(3)), str(index % 2)]) for index, row in enumerate(rows)]
    (folder / "table.csv").write_text("\n".join(["a,b,c,d,kind", *lines, ""]))
    play = Play(server, folder, folder)
    play.hpc_train("prepare", "table", "prepared.h5", "--from", "table.csv", "--target", "kind", codes=(0,))
    (folder / "data.h5").symlink_to("data-plain.h5")
    play.hpc_train("train", "job.toml", codes=(0,))
    (folder / "data.h5").unlink()
    shutil.copytree(jobs.ROOT / "tests/runs/mlp-mnist", folder / "measured")  # reports are written into it


def write(path: Path, options: dict[str, object]) -> None:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for part, num_samples in (("train", SAMPLES), ("test", TESTS)):
            pictures = rng.integers(0, 256, (num_samples, *SHAPE), np.uint8)
            inputs = file.create_dataset(f"{part}/inputs", data=pictures, **options)
            inputs.attrs["scale_factor"], inputs.attrs["add_offset"] = 1 / 255, 0.0
            file[f"{part}/targets"] = np.arange(num_samples) % CLASSES
