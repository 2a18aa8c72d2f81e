"""Predicted against measured memory of a rank: `hpc-train memory`, and the peak that runs record in meta.json.

Usage: python tests/benchmarks/memory.py TOKENS.h5 IMAGES.h5 (made by `prepare python-source` and `prepare mnist-5k`).
Both are resident memory; the prediction's base is the command's own process, without MPI.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "hpc_train"]
GPT = "task.options={layers=8, heads=8, width=512, context=128}"
MLP = "task.options={hidden=[4096, 4096]}"
ADAMW, SGD = "train.optimizer=adamw", "train.optimizer=sgd"
CASES = [
    ("gpt-text", 1, "local", [GPT, ADAMW]),
    ("gpt-text", 1, "local", [GPT, ADAMW, "train.precision=bf16"]),
    ("gpt-text", 1, "local", [GPT, ADAMW, "train.accumulate=4"]),
    ("gpt-text", 1, "local", [GPT, ADAMW, "train.activation_checkpointing=true"]),
    ("gpt-text", 1, "local", [GPT, SGD]),
    ("gpt-text", 2, "mpi", [GPT, ADAMW]),
    ("gpt-text", 2, "horovod", [GPT, ADAMW]),
    ("gpt-text", 2, "sharded", [GPT, ADAMW]),
    ("gpt-text", 2, "sharded", [GPT, ADAMW, "reduce.stage=2"]),
    ("gpt-text", 2, "sharded", [GPT, ADAMW, "reduce.stage=3"]),
    ("bert-text", 1, "local", [GPT, ADAMW]),
    ("mlp-mnist", 1, "local", [MLP, ADAMW]),
    ("mlp-mnist", 2, "mpi", [MLP, ADAMW]),
    ("mlp-mnist", 2, "sharded", [MLP, ADAMW]),
    ("softmax-mnist", 1, "local", [SGD]),
    ("resnet-fashion", 1, "local", [SGD]),
]


def settings(words: list[str]) -> list[str]:
    return [part for word in words for part in ("--set", word)]


def main(tokens: str, images: str) -> None:
    for name, ranks, strategy, keys in CASES:
        with tempfile.TemporaryDirectory() as root:
            data = tokens if "text" in name else images
            words = settings([f"data.file={data}", f"reduce.strategy={strategy}", f"run.root={root}", "train.steps=3"])
            words += settings(
                [
                    *keys,
                    "checkpoint.keep=0",
                    "data.test_inputs=none",
                    "train.schedule=constant",
                    "train.lr_warmup_steps=0",
                ]
            )
            job = str(ROOT / "configs" / f"{name}.toml")
            made = subprocess.run(
                [*PROGRAM, "memory", job, "--ranks", str(ranks), "--json", *words], capture_output=True, text=True
            )
            launch = ["mpirun", "--quiet", "-n", str(ranks), "--oversubscribe", "--bind-to", "none", *PROGRAM]
            ran = subprocess.run([*launch, "train", job, *words], capture_output=True, text=True)
            label = f"{name:15} {ranks} {strategy:8} {', '.join(keys)}"
            if made.returncode or ran.returncode:
                print(label, (made.stderr if made.returncode else ran.stderr)[-300:], flush=True)
                continue
            needed = json.loads(made.stdout)["rank_bytes"]
            (meta,) = Path(root).rglob("meta.json")
            peak = max(json.loads(meta.read_text())["peak_resident_bytes"])
            told = needed["total"]
            print(f"{told / 1e6:8.0f} {peak / 1e6:8.0f} MB {told / peak - 1:+7.1%}  {label}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
