"""Records the training loop of another program: its steps, losses and energy, in a run directory for the reports.

    from hpc_train.train.recording import recording

    with recording("my-job", global_batch=256, model=model) as recorder:
        for inputs, targets in loader:
            with recorder.step() as step:
                ...
                step.loss = loss

The loop keeps its own communication. The recorder communicates between ranks only at the beginning and at the end, so
it neither costs time in the loop nor changes how the loop fails.
"""

import os
import socket
import sys
from array import array
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import distributed, nn

from hpc_train.core.config import Loaded, from_values
from hpc_train.core.errors import UserError
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.sampling import rank_span
from hpc_train.core.settings import RECORDED, UNKNOWN_STEPS
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.placement import place_ranks
from hpc_train.train.comm.process_group import join_process_group
from hpc_train.train.comm.startup import join_mpi
from hpc_train.train.device import open_clock
from hpc_train.train.run.attempt import open_attempt
from hpc_train.train.run.recorder import Recorder

_SIZE_VARIABLES = ("WORLD_SIZE", "HOROVOD_SIZE")  # set by launchers that know no MPI


@contextmanager
def recording(
    name: str,
    *,
    global_batch: int | None = None,
    batch_per_rank: int | None = None,
    model: nn.Module | None = None,
    steps: int | None = None,
    warmup_steps: int = 10,
    log_every: int = 100,
    root: str | Path = "runs",
    watts_per_core: float = 10.0,
    timing: str = "steps",
    energy: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator["Recording"]:
    """Collective. Records a loop in `root/name/<stamp>-np<N>`, which `hpc-train report` reads; yields a `Recording`.

    The ranks are those of torch.distributed if it is initialised, else MPI's (mpirun, srun), else this process alone.

    Exactly one of global_batch (samples of all ranks in a step, for any number of ranks: strong scaling) and
    batch_per_rank (weak scaling) is required. model: its parameters are counted and its class is recorded. steps: their
    number, if known. warmup_steps: that many first steps do not count in speedups. log_every: steps between the root's
    lines. watts_per_core: assumed if no meter of the processors can be read. timing: "phases" times phases on a GPU,
    too, by waiting for it, which costs overlap. energy: further settings of a job file's section [energy], such as
    {"idle_s": 10.0, "pue": 1.2}. options: numbers, text or lists that the loop depends on (lr=0.1); reports compare
    runs in which these agree.

    Raises `UserError` for invalid arguments. An exception of the loop passes through unchanged: what was recorded until
    then is kept, and the run is incomplete.
    """
    values: dict[str, Any] = {
        "name": name,
        "task": {"kind": RECORDED, "model": _model_name(model), "options": options},
        "train": {
            "steps": UNKNOWN_STEPS if steps is None else steps,
            "global_batch": global_batch,
            "batch_per_rank": batch_per_rank,
            "log_every": log_every,
            "warmup_steps": warmup_steps,
            "timing": timing,
        },
        "reduce": {"strategy": "own"},
        "energy": {"watts_per_core": float(watts_per_core), **(energy or {})},
        "run": {"root": str(root), "progress": "plain"},  # a bar would garble the program's own lines
    }
    loaded = from_values(values, "recording()")
    with _ranks() as context, open_attempt(loaded, context, "never") as attempt:
        device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
        clock = open_clock(loaded.config.train, device)
        places = place_ranks(context, torch.get_num_threads())
        recorder = Recorder(loaded, context, places, attempt, clock, device)
        batch_size = loaded.config.train.batch_size(context.world.size)
        with recorder:
            recorder.start(0, model, {"global_batch": batch_size} | _metadata(context, device))
            loop = Recording(recorder, context.world, batch_size, log_every)
            yield loop
            recorder.stop("complete")
        num_steps, losses = loop.losses_of_all(context)
        whole = _with_steps(loaded, num_steps)
        context.on_root(lambda: recorder.rewrite(whole, losses))
        recorder.finish(loop.test)
    _exit_together()


class Recording:
    """The recorder as the loop uses it: `step()` goes around each step, from its first to its last line.

    Phases of a step may be marked: `with recorder.data`, `forward`, `backward`, `reduce`, `optimizer` and `sync`, not
    nested; `sync` is for updated weights that are sent, as by a sharded optimizer. The report then shows their times.
    Steps follow each other without a gap: time that is not marked, and time between two steps, is "other". `pause` goes
    around work that belongs to no step.

    test: results of the trained model for the report, such as recorder.test["accuracy"] = 0.98; the same on every rank,
    or set on the root alone.
    """

    def __init__(self, recorder: Recorder, world: World, batch_size: int, log_every: int) -> None:
        self._recorder, self._batch_size, self._log_every = recorder, batch_size, log_every
        start, stop = rank_span(batch_size, world.rank, world.size)
        self._step = Step(self, stop - start)
        self._unread: list[float | torch.Tensor | None] = []
        self._losses, self._num_samples = array("d"), array("q")  # of this rank
        clock = recorder.clock
        self.data, self.forward, self.backward = clock.data, clock.forward, clock.backward
        self.reduce, self.optimizer, self.sync = clock.reduce, clock.optimizer, clock.sync
        self.test: dict[str, float] = {}

    def step(self) -> "Step":
        """The next step: `with recorder.step() as step: ...`. A step that raises is not recorded."""
        return self._step

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside the block belongs to no step, as for a validation or a checkpoint. Its energy counts."""
        began_ns = perf_counter_ns()
        yield
        self._recorder.clock.exclude(perf_counter_ns() - began_ns)

    def end_step(self, loss: float | torch.Tensor | None, num_samples: int) -> None:
        """Called at the end of `with recorder.step()`."""
        if isinstance(loss, torch.Tensor):
            if loss.numel() != 1:
                raise UserError(
                    f"step.loss of step {self._recorder.num_steps_done} has the shape {tuple(loss.shape)}",
                    "Set it to one number: the mean over this rank's samples.",
                )
            loss = loss.detach().reshape(())
        step = self._recorder.num_steps_done
        self._recorder.end_step(step, loss, num_samples, self._batch_size)
        self._unread.append(loss)
        self._num_samples.append(0 if loss is None else num_samples)
        if step % self._log_every == 0:
            self._read_losses()

    def losses_of_all(self, context: Context) -> tuple[int, list[tuple[int, float]]]:
        """Collective. (number of steps, [(step, loss)]): means over all ranks' samples of the steps that set a loss.

        If ranks have taken unequal numbers of steps, the first ones, common to all, count.
        """
        self._read_losses()
        num_steps = -int(context.max(np.array([-len(self._losses)]))[0])
        num_samples = np.array(self._num_samples[:num_steps], dtype=np.float64)
        sums = np.where(num_samples > 0, np.array(self._losses[:num_steps]) * num_samples, 0.0)
        total, count = context.sum(np.stack([sums, num_samples]))
        return num_steps, [(step, total[step] / count[step]) for step in np.flatnonzero(count).tolist()]

    def _read_losses(self) -> None:
        """Converts tensors to numbers. Rarely, because each conversion makes a GPU's loop wait."""
        self._losses.extend(0.0 if loss is None else float(loss) for loss in self._unread)
        self._unread.clear()


class Step:
    """A step of the loop, which may set its attributes.

    loss: the mean over this rank's samples, as a number or a tensor with one element; None: unknown. num_samples: of
    this rank; by default its part of the global batch.
    """

    __slots__ = ("_recording", "_share", "loss", "num_samples")

    def __init__(self, recording: Recording, share: int) -> None:
        self._recording, self._share = recording, share
        self.loss: float | torch.Tensor | None = None
        self.num_samples = share

    def __enter__(self) -> Self:
        self.loss, self.num_samples = None, self._share
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._recording.end_step(self.loss, self.num_samples)


def _ranks() -> AbstractContextManager[Context]:
    """The ranks that the program's loop runs on. Raises UserError if they cannot be determined."""
    if distributed.is_available() and distributed.is_initialized():
        return join_process_group()
    job = JobEnvironment.current()
    if job.is_launched:
        return join_mpi()
    sizes = {name: os.environ.get(name, "1") for name in _SIZE_VARIABLES} | {"srun's tasks": str(job.size or 1)}
    for name, size in sizes.items():
        if size != "1":
            raise UserError(
                f"{name} = {size}: this process is one of several, but has no connection to the others",
                "Call torch.distributed.init_process_group() before recording(), or start the ranks with mpirun.",
            )
    return nullcontext(Context(World(host=socket.gethostname())))


def _exit_together() -> None:
    """Collective. Horovod, if it started MPI, ends MPI on every rank as soon as one rank's process ends.

    No rank may therefore leave before all have made their last call of MPI. MPI's own barrier does not ensure that: a
    rank may still be inside it when another has left. Horovod's barrier is waited for outside of MPI.
    """
    hvd = sys.modules.get("horovod.torch")
    if hvd is not None and hvd.is_initialized():
        hvd.barrier()


def _metadata(context: Context, device: torch.device) -> dict[str, Any]:
    """Entries of meta.json that only recorded loops have."""
    through = "MPI"
    if context.comm is None:
        through = "nothing: one process"
    elif distributed.is_available() and distributed.is_initialized():
        through = f"torch.distributed ({distributed.get_backend()})"
    return {
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "recorded": {"ranks_talk_through": through, "losses": "of rank 0, and of all ranks once the run is complete"},
    }


def _model_name(model: nn.Module | None) -> str:
    """The class of the model, or of the model inside torch's wrappers for training on several ranks."""
    if model is None:
        return "unknown"
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    return type(model.module if wrapped else model).__name__


def _with_steps(loaded: Loaded, num_steps: int) -> Loaded:
    """The configuration of a loop that has ended, whose number of steps is now known."""
    config = loaded.config
    train = config.train.model_copy(update={"steps": max(1, num_steps)})
    return replace(loaded, config=config.model_copy(update={"train": train}))
