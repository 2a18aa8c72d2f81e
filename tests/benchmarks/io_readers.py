"""A contender of the benchmark of reading, in a process of its own.

    python -m tests.benchmarks.io_readers NAME FOLDER

It says "ready", then goes through all samples once, shuffled, in batches of 32, for each line on standard input, and
says how long that took. Each batch is in memory and its first bytes are read; that every sample came once is checked.
"""

import json
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np

from tests.benchmarks.io_data import SHAPE, blocks, numbers

BATCH = 32
_SHARDS = 16
_MEMORY_MB = 512
PACKED_SHARE = 8  # reading packed chunks may hold a part of the data as large as 1 over this: no epoch finds the last
Pass = Callable[[int], Iterable[Any]]  # the epoch's number -> its batches


# ------------------------------------------------------------------------------------------ ours, and the bounds


def ours(path: Path, memory_mb: int = _MEMORY_MB) -> Pass:
    """As a training's loop on one rank gets them: order, reading, and what is made ahead."""
    import torch

    from hpc_train.core.sampling import BatchSampler
    from hpc_train.core.settings import Config
    from hpc_train.core.world import World
    from hpc_train.train.comm.context import Context
    from hpc_train.train.data.batches import Batches
    from hpc_train.train.data.dataset import open_order, open_split
    from hpc_train.train.data.files import open_files

    config = Config.model_validate(
        {"name": "x", "data": {"file": str(path), "memory_mb": memory_mb}, "train": {"steps": 1, "global_batch": BATCH}}
    )
    files = open_files(config, Context(World()))
    split = open_split(files, "train/inputs", "train/targets", ("data.inputs", "data.targets"))
    sampler = BatchSampler(open_order(split.inputs, len(split), config), BATCH, seed=0)
    task: Any = SimpleNamespace(batch=split.batch, prefetch=split.prefetch, in_step=False)
    per_epoch = -(-len(split) // BATCH)

    def go(epoch: int) -> Iterator[Any]:
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        with closing(Batches(task, sampler, steps, 1, torch.device("cpu"))) as batches:
            for (batch,), _, _ in batches:
                yield batch.inputs.numpy()

    return go


def mapped(path: Path) -> np.ndarray:
    """The pictures of the contiguous file as a raw memory map of the same pages."""
    with h5py.File(path, "r") as file:
        inputs = file["train/inputs"]
        return np.memmap(path, inputs.dtype, "r", offset=inputs.id.get_offset(), shape=inputs.shape)


def take(path: Path, reuse: bool) -> Pass:
    """np.take on the raw memory map; rows are drawn before the clock runs. reuse: into one buffer again and again."""
    values = mapped(path)
    rows = np.random.default_rng(0).permutation(len(values))
    out = np.empty((BATCH, *SHAPE), np.uint8)

    def go(epoch: int) -> Iterator[Any]:
        for first in range(0, len(rows), BATCH):
            some = rows[first : first + BATCH]
            if reuse:
                yield np.take(values, some, axis=0, out=out[: len(some)], mode="clip")
            else:
                yield np.take(values, some, axis=0)

    return go


def decompressor(path: Path) -> Callable[[], None]:
    """All chunks, packed and in memory, decompressed by as many threads as reading has, and thrown away."""
    from hpc_train.core.world import World
    from hpc_train.train.comm.context import Context
    from hpc_train.train.data import filters
    from hpc_train.train.data.files import num_decode_threads

    with h5py.File(path, "r") as file:
        inputs = file["train/inputs"].id
        corners = [inputs.get_chunk_info(number).chunk_offset for number in range(inputs.get_num_chunks())]
        packed = [memoryview(inputs.read_direct_chunk(corner)[1])[:-4] for corner in corners]  # less their checksums
        num_bytes = int(np.prod(file["train/inputs"].chunks))
    threads = ThreadPoolExecutor(num_decode_threads(Context(World())))

    def go() -> None:
        for data in threads.map(lambda data: filters._inflate(data, num_bytes), packed):
            assert len(data) == num_bytes

    return go


# ------------------------------------------------------------------------------------------------- peers


class _Samples:
    """A torch Dataset of one sample at a time, by h5py or by a raw memory map."""

    def __init__(self, path: Path, by_h5py: bool) -> None:
        self._path, self._by_h5py, self._values = path, by_h5py, None
        self._len = len(mapped(path))

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, row: int) -> Any:
        import torch

        if self._values is None:  # in the worker that reads
            self._values = h5py.File(self._path, "r")["train/inputs"] if self._by_h5py else mapped(self._path)
        return torch.from_numpy(np.array(self._values[row]))


def dataloader(path: Path, by_h5py: bool, num_workers: int) -> Pass:
    from torch.utils.data import DataLoader

    loader = DataLoader(
        *(_Samples(path, by_h5py), BATCH), shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    return lambda epoch: (batch.numpy() for batch in loader)


def webdataset(folder: Path, num_samples: int) -> Pass:
    import webdataset

    place, count = folder / "webdataset", 0
    place.mkdir()
    writers = [webdataset.TarWriter(str(place / f"{number:03}.tar")) for number in range(_SHARDS)]
    for rows in blocks(num_samples):
        for row in rows:
            writers[count % _SHARDS].write({"__key__": f"{count:07}", "x": row.tobytes()})
            count += 1
    for writer in writers:
        writer.close()
    data = webdataset.WebDataset(sorted(map(str, place.glob("*.tar"))), shardshuffle=_SHARDS, empty_check=False)
    pictures = data.shuffle(1000).map(lambda sample: np.frombuffer(sample["x"], np.uint8).reshape(SHAPE))
    return lambda epoch: pictures.batched(BATCH, collation_fn=np.stack)


def streaming(folder: Path, num_samples: int) -> Pass:
    # Its pictures' data sets ask for torchvision, of which there is no build for every torch; they are not used here.
    sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
    import streaming
    from torch.utils.data import DataLoader

    place = str(folder / "streaming")
    with streaming.MDSWriter(out=place, columns={"x": f"ndarray:uint8:{','.join(map(str, SHAPE))}"}) as writer:
        for rows in blocks(num_samples):
            for row in rows:
                writer.write({"x": row})
    streaming.base.util.clean_stale_shared_memory()
    loader = DataLoader(streaming.StreamingDataset(local=place, shuffle=True, batch_size=BATCH), BATCH)
    return lambda epoch: (batch["x"].numpy() for batch in loader)


def litdata(folder: Path, num_samples: int) -> Pass:
    import litdata
    import torch

    place = str(folder / "litdata")
    litdata.optimize(
        fn=_pictures,
        inputs=[(first, num_samples) for first in range(0, num_samples, 256)],
        output_dir=place,
        num_workers=1,
        chunk_bytes="64MB",
        start_method="fork",
    )
    data = litdata.StreamingDataset(place, shuffle=True, drop_last=False)
    loader = litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=0)
    return lambda epoch: (batch.numpy() if isinstance(batch, torch.Tensor) else batch for batch in loader)


def _pictures(span: tuple[int, int]) -> Iterator[np.ndarray]:
    first, num_samples = span
    for number, rows in enumerate(blocks(num_samples)):
        if number == first // 256:
            yield from rows


# ------------------------------------------------------------------------------------------------- the child


def packed_budget_mb(num_samples: int) -> int:
    """data.memory_mb for reading packed chunks."""
    return max(4, num_samples * int(np.prod(SHAPE)) // PACKED_SHARE >> 20)


def open_pass(name: str, folder: Path) -> Pass:
    path = folder / "contiguous.h5"
    num_samples = len(mapped(path))
    makes: dict[str, Callable[[], Pass]] = {
        "ours": lambda: ours(path),
        "ours, gzip": lambda: ours(folder / "gzip.h5", packed_budget_mb(num_samples)),
        "np.take": lambda: take(path, reuse=False),
        "np.take, one buffer": lambda: take(path, reuse=True),
        "DataLoader+h5py": lambda: dataloader(path, True, 0),
        "DataLoader+h5py, 2 workers": lambda: dataloader(path, True, 2),
        "DataLoader+memmap": lambda: dataloader(path, False, 0),
        "WebDataset": lambda: webdataset(folder, num_samples),
        "mosaicml-streaming": lambda: streaming(folder, num_samples),
        "litdata": lambda: litdata(folder, num_samples),
    }
    return makes[name]()


def timed(go: Pass, epoch: int, num_samples: int) -> float:
    found = []
    began = perf_counter()
    for batch in go(epoch):
        found.append(numbers(batch))
    seconds = perf_counter() - began
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(num_samples)), "not every sample came once"
    return seconds


def main(name: str, folder: Path) -> None:
    said = sys.stdout
    sys.stdout = sys.stderr  # what libraries print
    num_samples = len(mapped(folder / "contiguous.h5"))
    if name == "decompressor":
        run = decompressor(folder / "gzip.h5")
    else:
        go = open_pass(name, folder)
    print("ready", file=said, flush=True)
    for epoch, _ in enumerate(sys.stdin):
        if name == "decompressor":
            began = perf_counter()
            run()
            seconds = perf_counter() - began
        else:
            seconds = timed(go, epoch, num_samples)
        print(json.dumps(seconds), file=said, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
