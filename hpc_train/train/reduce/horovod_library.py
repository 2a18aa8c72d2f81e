"""Horovod's library: loaded with the settings of `reduce.*`, checked against MPI and the GPUs, started and stopped."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.settings import Reduce
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import require_one_mpi
from hpc_train.train.reduce.gpus import require_gpu_per_rank


def open_horovod(settings: Reduce, model: nn.Module, context: Context) -> Any:
    """Collective. horovod.torch, loaded and not yet started. Raises UserError."""
    hvd = context.on_all(partial(load_horovod, settings))
    require_gpu_per_rank(settings.strategy, next(model.parameters()).device, bool(hvd.nccl_built()), context)
    return hvd


def start_horovod(hvd: Any, groups: Sequence[Sequence[int]] = ()) -> list[Any]:
    """Collective. Starts Horovod on all ranks, until the process ends. Returns its process set of each group of ranks.

    groups: those that will send among themselves; the same on every rank, none twice, and none of all ranks.
    Once: with cycle time and fusion threshold both fixed, Horovod 0.28.1 crashes when it starts a second time.
    """
    sets = [hvd.ProcessSet(group) for group in groups]
    if not hvd.is_initialized():
        hvd.init(process_sets=sets)
    assert all(each.process_set_id is not None for each in sets), "Horovod was started with other groups"
    return sets


def restartable_horovod(settings: Reduce) -> Any:
    """horovod.torch for `horovod_on`. Raises UserError."""
    hvd = load_horovod(settings)
    del os.environ["HOROVOD_FUSION_THRESHOLD"]  # see `start_horovod`
    return hvd


@contextmanager
def horovod_on(hvd: Any, context: Context) -> Iterator[None]:
    """Collective. Horovod and its thread on the ranks of `context`, until the end."""
    hvd.init(comm=context.comm)
    yield
    hvd.shutdown()  # collective: skipped when a rank fails alone


def load_horovod(settings: Reduce) -> Any:
    """horovod.torch on the MPI that mpi4py has started. Raises UserError; two MPIs are refused, both named."""
    # Horovod's thread looks for work once a cycle: its default of 1 ms would limit every small model.
    os.environ.setdefault("HOROVOD_CYCLE_TIME", str(settings.cycle_time_ms))
    os.environ["HOROVOD_FUSION_THRESHOLD"] = str(int(settings.fusion_threshold_mb * 2**20))  # see buckets.Bucket
    if settings.autotune:
        os.environ["HOROVOD_AUTOTUNE"] = "1"
        if settings.autotune_log_file:
            os.environ["HOROVOD_AUTOTUNE_LOG"] = settings.autotune_log_file
    if settings.hierarchical_allreduce:
        os.environ["HOROVOD_HIERARCHICAL_ALLREDUCE"] = "1"
    try:
        import horovod.torch as hvd
        import horovod.torch.mpi_lib_v2 as library
    except ImportError as error:
        raise UserError(
            f"reduce.strategy = '{settings.strategy}', and Horovod cannot be loaded on {socket.gethostname()}: {error}",
            "Run `make install`, or set reduce.strategy to mpi (or local for one process).",
        ) from None
    require_one_mpi("Horovod", library.__file__)
    return hvd
