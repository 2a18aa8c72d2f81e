"""What `hpc-train memory` tells against what ranks take: the peak of a rank's anonymous memory, which runs record.

    python -m tests.benchmarks.memory [--only WORD]

Each case is a job of a few steps under mpirun; the largest rank counts. The second error leaves out the base, which the
program takes before it has a model, so that it hides nothing.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import h5py
import numpy as np

STEPS = 4
GPT = ("gpt", {"layers": 6, "heads": 8, "width": 512, "context": 128})  # 19M weights, 76 MB
BERT = ("bert", {"layers": 6, "heads": 8, "width": 512, "context": 128})
MLP = ("mlp", {"hidden": [3072, 2048, 2048]})  # 20M, 80 MB
RESNET = ("resnet", {"depth": 50, "width": 64, "stem": "small"})  # 24M, 94 MB
UNET = ("unet", {"levels": 3, "width": 32})  # 1.9M, 8 MB: what counts are activations
VGG = ("vgg", {"depth": 11, "width": 64, "hidden": [2048, 2048], "dropout": 0.0})  # 15M, 58 MB


class Case(NamedTuple):
    """A job on `ranks` ranks, and keys beside `train.batch_per_rank` and the model's."""

    model: tuple[str, dict[str, Any]]
    ranks: int
    batch: int  # of a rank
    strategy: str
    stage: int = 1
    keys: dict[str, Any] = {}  # noqa: RUF012  # never changed

    @property
    def label(self) -> str:
        strategy = f"stage {self.stage}" if self.strategy == "sharded" else self.strategy
        more = ", ".join(f"{key.partition('.')[2]} = {value}" for key, value in self.keys.items())
        return f"{self.model[0]:7}{self.ranks:2} {strategy:8} {more}"


BF16 = {"train.precision": "bf16"}
RECOMPUTED = {"train.activation_checkpointing": True}
CASES = [
    Case(GPT, 1, 8, "local"),
    Case(GPT, 1, 8, "local", keys=BF16),
    Case(GPT, 1, 32, "local", keys=RECOMPUTED),
    Case(GPT, 2, 16, "mpi", keys={"train.accumulate": 4}),
    Case(GPT, 2, 8, "horovod"),
    Case(GPT, 2, 8, "sharded", 1),
    Case(GPT, 2, 8, "sharded", 2),
    Case(GPT, 2, 8, "sharded", 3),
    Case(GPT, 4, 4, "sharded", 3),
    Case(GPT, 2, 8, "sharded", 3, {"train.accumulate": 2, **BF16, **RECOMPUTED}),
    Case(BERT, 2, 8, "mpi", keys={"train.optimizer": "sgd"}),
    Case(BERT, 2, 8, "sharded", 2, {"train.clip_norm": 1.0}),
    Case(MLP, 2, 256, "mpi", keys={"train.optimizer": "sgd", "train.momentum": 0.0}),
    Case(MLP, 4, 256, "sharded", 1),
    Case(MLP, 2, 256, "sharded", 3),
    Case(RESNET, 2, 16, "mpi", keys={"train.optimizer": "sgd"}),
    Case(RESNET, 1, 16, "local", keys=BF16),
    Case(VGG, 2, 32, "sharded", 3),
    Case(UNET, 1, 8, "local"),
    Case(UNET, 2, 8, "mpi", keys=RECOMPUTED),
    Case(UNET, 2, 8, "sharded", 3, BF16),
]
FAST = [CASES[12], CASES[14], CASES[18]]


def write_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with h5py.File(folder / "images.h5", "w") as file:
        file["train/inputs"] = rng.random((4096, 32, 32, 3), np.float32)
        file["train/targets"] = rng.integers(0, 10, 4096)
    with h5py.File(folder / "fields.h5", "w") as file:
        file["train/inputs"] = file["train/targets"] = rng.random((64, 2, 96, 128), np.float32)
    text = folder / "text"
    text.mkdir()
    for path in Path(json.__file__).parent.glob("*.py"):  # Python's own source: nothing to fetch
        shutil.copy(path, text)
    run([*PROGRAM, "prepare", "text", str(folder / "text.h5"), "--from", str(text)])


def job_file(case: Case, folder: Path) -> Path:
    name, options = case.model
    kinds = {"gpt": "language", "bert": "masked_language", "unet": "regression"}
    files = {"gpt": "text.h5", "bert": "text.h5", "unet": "fields.h5"}
    values = {
        "name": "memory",
        "data.file": str(folder / files.get(name, "images.h5")),
        "task.kind": kinds.get(name, "classification"),
        "task.model": name,
        "train.steps": STEPS,
        "train.batch_per_rank": case.batch,
        "train.optimizer": "adamw",
        "train.lr": 1e-4,
        "train.threads": 1,
        "reduce.strategy": case.strategy,
        "checkpoint.keep": 0,
        "run.root": str(folder / "runs"),
        **({"reduce.stage": case.stage} if case.strategy == "sharded" else {}),
        **case.keys,
    }
    shown = ", ".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()] + [f"task.options = {{ {shown} }}"]
    path = folder / "job.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


PROGRAM = [sys.executable, "-m", "hpc_train"]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def told(case: Case, folder: Path) -> dict[str, int]:
    """A rank's bytes by part, as the command prints them."""
    words = ["memory", str(job_file(case, folder)), "--ranks", str(case.ranks), "--json"]
    return dict(json.loads(run([*PROGRAM, *words]))["rank_bytes"])


def measured(case: Case, folder: Path) -> int:
    """The largest peak of a rank of the job, in bytes."""
    mpirun = ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none", "-n", str(case.ranks)]
    run([*mpirun, *PROGRAM, "train", str(job_file(case, folder))])
    (meta,) = (folder / "runs").rglob("meta.json")
    peaks = json.loads(meta.read_text())["peak_anonymous_bytes"]
    shutil.rmtree(folder / "runs")
    return int(max(peaks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--parts", action="store_true")
    chosen = parser.parse_args()
    errors = []
    print(f"{'told, MB':>9} {'measured':>9} {'error':>7} {'without base':>13}  case", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        for case in CASES:
            if chosen.only not in case.label:
                continue
            parts, peak = told(case, folder), measured(case, folder)
            total, base = parts["total"], parts["base"]
            errors.append(total / peak - 1)
            without = (total - base) / (peak - base) - 1
            print(
                f"{total / 1e6:9,.0f} {peak / 1e6:9,.0f} {errors[-1]:+7.1%} {without:+13.1%}  {case.label}", flush=True
            )
            if chosen.parts:
                print("   ", {key: round(value / 1e6) for key, value in parts.items()}, flush=True)
    sizes = sorted(map(abs, errors))
    print(f"{len(sizes)} cases: the largest error {sizes[-1]:.1%}, the median {median(sizes):.1%}")


if __name__ == "__main__":
    main()
