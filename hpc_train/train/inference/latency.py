"""`hpc-train predict --latency N`: how long a caller waits for 1, 2, 4 ... N predictions at once, on one rank."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from time import perf_counter, time

import numpy as np
import torch

from hpc_train.core.energy_records import Energy
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plural
from hpc_train.core.inference_record import InferenceRecord, Latency, Work, write_record
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config
from hpc_train.core.signals import StopRequest
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.data.dataset import Batch
from hpc_train.train.data.device_queue import moved
from hpc_train.train.inference.meters import UseEnergy, make_folder
from hpc_train.train.inference.outputs import require_arrays
from hpc_train.train.inference.trained import Log, choose_step
from hpc_train.train.inference.use import PROGRAM, Request, Use, open_use
from hpc_train.train.run.meta_writer import now

_WARM_UP_CALLS, _WARM_UP_S = 20, 0.5  # both, before the first call that counts
_MOST_WARM_UP_S = 1.0  # however few calls that were
_ENOUGH_CALLS, _ENOUGH_S = 1000, 2.0  # both: the second is for the energy
_MOST_S = 4.0  # of one size, however few calls that were
_NUM_BATCHES = 16  # different ones, in turn
_SAMPLE_HZ = 10.0  # of the meters at least: one size may take 2 s


def measure_latency(
    run: RunDir, config: Config, request: Request, largest: int, context: Context, log: Log
) -> InferenceRecord:
    """The record of the times at batch sizes 1, 2, 4 ... `largest`. Raises UserError.

    A call begins with samples in memory, as the file stores them, and ends with predictions in memory: it scales the
    samples, copies them to the device, computes and copies back. Reading the file is not in it.
    """
    if context.world.size > 1:
        raise joint(
            UserError(
                f"--latency measures one rank, and there are {context.world.size}", "Start it without mpirun or srun."
            )
        )
    require_arrays(config, run)
    use = open_use(run, config, request, False, context, log)
    step = use.load(choose_step(run, config, request.checkpoint), context, log)
    # Threads of one call wait for each other: for few samples, or beside other work, one alone may be faster.
    num_threads = dict.fromkeys((1, use.place.num_at_once)) if use.place.device.type == "cpu" else (None,)
    folder = make_folder(run, "latency", log)
    often = config.energy.model_copy(update={"sample_hz": max(config.energy.sample_hz, _SAMPLE_HZ)})
    energy = UseEnergy(often, use.place, folder, 1, context, log)
    began, timed = now(), list[_Timed]()
    rows = use.blocks.rows
    sizes = [size for size in _powers_of_two(largest) if size <= len(rows)]
    if sizes[-1] * 2 <= largest:
        log(f"There are {len(rows):,} rows: no larger batch than {sizes[-1]} is measured")
    num_timings = len(sizes) * len(num_threads)
    most_s = _MOST_WARM_UP_S + _MOST_S  # and at most two calls more
    log(f"{plural(len(sizes), 'batch size')}, {plural(num_timings, 'timing')}: at most {num_timings * most_s:.0f} s")
    with StopRequest() as stop, energy.recorded(), torch.no_grad(), use.place.autocast():
        for size, threads in product(sizes, num_threads):
            if threads is not None:
                torch.set_num_threads(threads)
            found = _timed(size, threads, partial(_call, use, _batches(use, size)), stop)
            if stop:
                log(f"Stopped by {stop.cause} at a batch of {size}")
                break
            timed.append(found)
            by = "" if threads is None else f" by {plural(threads, 'thread')}"
            left_s = (num_timings - len(timed)) * most_s
            left = f"; at most {left_s:.0f} s left" if left_s else ""
            median_ms = np.median(found.times_s) * 1e3
            log(f"  batch {size}{by}: {plural(len(found.times_s), 'call')}, median {median_ms:.3g} ms{left}")
    used = energy.read()
    work = Work(
        began=began,
        ended=now(),
        num_ranks=1,
        hosts=[context.world.host],
        device=use.place.name,
        num_rows=sum(each.num_predictions for each in timed),
        seconds=sum(sum(each.times_s) for each in timed),
    )
    record = InferenceRecord(
        kind="latency",
        run=str(run.path.resolve()),
        step=step,
        data=use.data,
        inputs=use.samples.name,
        rows=[rows.start, rows.stop],
        batch=sizes[-1],
        work=[work],
        complete=len(timed) == len(sizes) * len(num_threads),
        latencies=[_latency(each, energy.between(each.begin_s, each.end_s)) for each in timed],
        joules=used.joules,
        energy_quality=used.quality,
        energy_source=used.source,
        program=PROGRAM,
    )
    if folder is not None:
        write_record(folder, record)
    return record


def _powers_of_two(largest: int) -> Iterator[int]:
    size = 1
    while size <= largest:
        yield size
        size *= 2


def _batches(use: Use, size: int) -> list[Batch]:
    """Different samples, read before the clock runs."""
    rows = use.blocks.rows
    starts = np.linspace(rows.start, rows.stop - size, _NUM_BATCHES).astype(int)
    return [use.samples.split.batch(np.arange(start, start + size)) for start in dict.fromkeys(starts.tolist())]


def _call(use: Use, batches: list[Batch], number: int) -> None:
    batch = batches[number % len(batches)]
    outputs = use.work.model(moved(batch, use.place.device).floats()).float()
    use.meaning.predictions(outputs, use.samples.has_inputs(batch))


@dataclass(frozen=True)
class _Timed:
    """The calls of one size. begin_s, end_s: in seconds of the time of day."""

    size: int
    num_threads: int | None
    times_s: list[float]
    begin_s: float
    end_s: float

    @property
    def num_predictions(self) -> int:
        return self.size * len(self.times_s)


def _timed(size: int, num_threads: int | None, call: Callable[[int], None], stop: StopRequest) -> _Timed:
    began_s, number = perf_counter(), 0
    while not stop and (number < _WARM_UP_CALLS or perf_counter() - began_s < _WARM_UP_S):
        call(number)
        number += 1
        if perf_counter() - began_s > _MOST_WARM_UP_S:
            break
    times_s, begin_s = list[float](), time()
    began_s = last_s = perf_counter()
    while not stop and not _is_enough(len(times_s), last_s - began_s):
        call(len(times_s))
        now_s = perf_counter()
        times_s.append(now_s - last_s)
        last_s = now_s
    return _Timed(size, num_threads, times_s, begin_s, time())


def _is_enough(num_calls: int, passed_s: float) -> bool:
    return (num_calls >= _ENOUGH_CALLS and passed_s > _ENOUGH_S) or passed_s > _MOST_S


def _latency(timed: _Timed, energy: Energy) -> Latency:
    p50_s, p95_s, p99_s = np.percentile(timed.times_s, (50, 95, 99)).tolist()
    return Latency(
        batch=timed.size,
        num_threads=timed.num_threads,
        num_calls=len(timed.times_s),
        p50_s=p50_s,
        p95_s=p95_s,
        p99_s=p99_s,
        samples_per_s=timed.num_predictions / sum(timed.times_s),
        joules_per_sample=None if energy.joules is None else energy.joules / timed.num_predictions,
        energy_quality=energy.quality,
    )
