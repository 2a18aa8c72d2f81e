"""A GPU for each rank, as NCCL needs it."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch

from hpc_train.core.errors import UserError
from hpc_train.train.comm.context import Context


def require_gpu_per_rank(strategy: str, device: torch.device, uses_nccl: bool, context: Context) -> None:
    """Collective: ranks without a GPU take part, too. Raises UserError if NCCL would find two ranks on one GPU."""
    own = None
    if device.type == "cuda" and uses_nccl:
        own = context.world.host, str(torch.cuda.get_device_properties(device).uuid)
    context.on_all(partial(check_gpus, strategy, context.all_gather(own)))


def check_gpus(strategy: str, gpus: Sequence[tuple[str, str] | None]) -> None:
    """Raises UserError if ranks share a GPU: NCCL would end the job without naming it. gpus: (host, GPU) by rank."""
    shared = [gpu for gpu, num_ranks in Counter(gpus).items() if gpu is not None and num_ranks > 1]
    if shared:
        host, _ = shared[0]
        ranks = ", ".join(str(rank) for rank, gpu in enumerate(gpus) if gpu == shared[0])
        raise UserError(
            f"reduce.strategy = '{strategy}': ranks {ranks} share one GPU of {host}, and NCCL needs one GPU per rank",
            "Start as many ranks on a host as it has GPUs, or set reduce.strategy = 'mpi'.",
        )
