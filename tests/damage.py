"""Damaged HDF5 files from whole ones, by seed: bytes changed where it says what it holds, ends cut, pages zeroed.

Each case runs `hpc-train` in a process of its own, forked from this one so that torch is loaded once.
"""

import os
import signal
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import h5py
import numpy as np

_PAGE = 512
_PATIENCE_S = 20


def whole_files(folder: Path) -> dict[str, Path]:
    """Small data sets of every kind that a training reads: 96 samples in 3 classes and 24 to test on, or text."""
    rng = np.random.default_rng(0)
    pictures = {
        f"{part}/inputs": (rng.integers(0, 255, (num, 6, 6)) // (1 + np.arange(num) % 3)[:, None, None]).astype(
            np.uint8
        )
        for part, num in (("train", 96), ("test", 24))
    }
    labels = {f"{part}/targets": np.arange(num) % 3 for part, num in (("train", 96), ("test", 24))}
    text = {f"{part}/inputs": rng.integers(0, 64, num, np.uint8) for part, num in (("train", 900), ("test", 300))}
    made = {
        "plain": _write(folder / "plain.h5", pictures | labels, {}),
        "new": _write(folder / "new.h5", pictures | labels, {}, libver=("v108", "v108")),
        "gzip": _write(
            folder / "gzip.h5", pictures | labels, {"chunks": True, "compression": "gzip", "fletcher32": True}
        ),
        "lzf": _write(folder / "lzf.h5", pictures | labels, {"chunks": True, "compression": "lzf", "shuffle": True}),
        "text": _write(folder / "text.h5", text, {}),
    }
    with h5py.File(made["text"], "r+") as file:
        file.attrs["vocab_size"], file.attrs["tokenizer"] = 64, "bytes"
    with h5py.File(folder / "virtual.h5", "w") as file:
        for name, values in (pictures | labels).items():
            layout = h5py.VirtualLayout(values.shape, values.dtype)
            layout[:] = h5py.VirtualSource("plain.h5", name, values.shape)
            file.create_virtual_dataset(name, layout)
    return made | {"virtual": folder / "virtual.h5"}


def _write(path: Path, arrays: dict[str, np.ndarray], packed: dict[str, Any], **how: Any) -> Path:
    with h5py.File(path, "w", **how) as file:
        for name, values in arrays.items():
            if packed and values.ndim > 1:
                made = file.create_dataset(name, data=values, **packed | {"chunks": (16, *values.shape[1:])})
            else:
                made = file.create_dataset(name, data=values)
                sums = file.create_dataset(f"checksums/{name}", data=[zlib.crc32(values.tobytes())], dtype=np.uint32)
                sums.attrs.update({"block_rows": len(values), "algorithm": "crc32"})
            if values.ndim > 1:
                made.attrs.update({"scale_factor": 1 / 255, "add_offset": 0.0})
        file.attrs["complete"] = True
    return path


def _of_values(path: Path) -> np.ndarray:
    """Whether each byte of the file is one of a data set's values, which checksums cover."""
    is_value = np.zeros(path.stat().st_size, dtype=bool)

    def mark(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or item.is_virtual:
            return
        if item.chunks:
            for row in range(0, len(item), item.chunks[0]):
                info = item.id.get_chunk_info_by_coord((row,) + (0,) * (item.ndim - 1))
                is_value[info.byte_offset : info.byte_offset + info.size] = True
        elif (at := item.id.get_offset()) is not None:
            is_value[at : at + item.nbytes] = True

    with h5py.File(path) as file:
        file.visititems(mark)
    return is_value


def damages(path: Path, seed: int) -> Iterator[tuple[str, bytes]]:
    """Without end: (what was done, the content then), as changing a few bytes of `path` that are no values."""
    rng, content = np.random.default_rng([seed, zlib.crc32(path.name.encode())]), path.read_bytes()
    says = np.flatnonzero(~_of_values(path) & (np.frombuffer(content, np.uint8) != 0))
    anywhere = np.flatnonzero(~_of_values(path))
    while True:
        data, kind = bytearray(content), rng.choice(["bit", "bit", "byte", "bytes", "cut", "page", "ones"])
        at = int(rng.choice(says if rng.random() < 0.7 else anywhere))
        if kind == "bit":
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == "byte":
            data[at] = int(rng.integers(256))
        elif kind == "bytes":
            data[at : at + 8] = rng.bytes(8)[: len(data) - at]
        elif kind == "cut":
            del data[at:]
        elif kind == "page":
            first = at // _PAGE * _PAGE
            data[first : first + _PAGE] = bytes(min(_PAGE, len(data) - first))
        else:
            data[at : at + 8] = b"\xff" * min(8, len(data) - at)
        if bytes(data) != content:
            yield f"{path.name}: {kind} at {at}", bytes(data)


@dataclass(frozen=True)
class Outcome:
    """How a command ended. signal: that ended it; 0: none. is_late: it had to be ended."""

    code: int
    signal: int
    is_late: bool
    out: str
    err: str

    @property
    def fault(self) -> str:
        """Why this is no way to end; "" where it is."""
        if self.is_late:
            return "hangs"
        if self.signal:
            return f"signal {self.signal}"
        if "Traceback" in self.err:
            return "traceback: " + self.err.strip().splitlines()[-1][:150]
        if self.code not in (0, 2) or (self.code == 2) != self.err.startswith("hpc-train: "):
            return f"exit code {self.code}: {self.err[:300]}"
        if self.code == 2 and self.err.count("hpc-train: ") != 1:
            return f"more than one message: {self.err[:500]}"
        return ""


def hpc_train(folder: Path, *words: object, patience_s: float = _PATIENCE_S) -> Outcome:
    """`hpc-train words...` in a child of this process, its current folder `folder`."""
    out, err = folder / "out", folder / "err"
    child = os.fork()
    if not child:
        _be_hpc_train(folder, out, err, words)
    until = monotonic() + patience_s
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(-1, 0, True, out.read_text(errors="replace"), err.read_text(errors="replace"))
        sleep(0.005)
    code = os.waitstatus_to_exitcode(ended[1])
    return Outcome(max(code, 0), max(-code, 0), False, out.read_text(errors="replace"), err.read_text(errors="replace"))


def _be_hpc_train(folder: Path, out: Path, err: Path, words: tuple[object, ...]) -> None:
    """Never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        for path, number in ((out, 1), (err, 2)):
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(folder)
        sys.argv = ["hpc-train", *map(str, words)]
        from hpc_train.cli.main import main

        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
