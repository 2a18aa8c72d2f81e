"""The data of the benchmark of reading: pictures whose first bytes say which they are, and tokens.

    python -m tests.benchmarks.io_data FOLDER SAMPLES

One file has them contiguous, one in chunks packed by gzip as `hpc-train prepare --compress gzip:4` lays them.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

SHAPE = (128, 128, 3)  # 48 KiB
CHUNK_ROWS = (1 << 20) // (128 * 128 * 3)
NUM_CLASSES = 10
_BLOCK = 256


def blocks(num_samples: int) -> Iterator[np.ndarray]:
    """Pictures of noise in 16 shades, of which gzip leaves about half; the first 4 bytes are the sample's number."""
    noise = np.random.default_rng(0)
    for first in range(0, num_samples, _BLOCK):
        rows = noise.integers(0, 16, (min(_BLOCK, num_samples - first), *SHAPE), np.uint8)
        numbers = np.arange(first, first + len(rows), dtype="<u4")
        rows.reshape(len(rows), -1)[:, :4] = numbers[:, None].view(np.uint8)
        yield rows


def numbers(pictures: np.ndarray) -> np.ndarray:
    """Which samples a batch holds."""
    return np.ascontiguousarray(pictures.reshape(len(pictures), -1)[:, :4]).view("<u4")[:, 0]


def make(folder: Path, num_samples: int) -> None:
    packed = {"chunks": (CHUNK_ROWS, *SHAPE), "compression": "gzip", "compression_opts": 4, "fletcher32": True}
    for name, num, options in (
        ("contiguous", num_samples, {}),
        ("gzip", num_samples, packed),
        ("warm", min(num_samples, 2 * CHUNK_ROWS), packed),
    ):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            inputs = file.create_dataset("train/inputs", (num, *SHAPE), np.uint8, **options)
            inputs.attrs.update({"scale_factor": 1 / 255, "add_offset": 0.0})
            first = 0
            for rows in blocks(num):
                inputs[first : first + len(rows)] = rows
                first += len(rows)
            file["train/targets"] = np.arange(num) % NUM_CLASSES
    with h5py.File(folder / "tokens.h5", "w") as file:
        file.attrs["vocab_size"] = 256
        file["train/inputs"] = np.random.default_rng(1).integers(0, 256, num_samples * 256, np.uint8)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]))
