"""A peer of the benchmark, one rank of it, in a process of its own.

    python -m tests.benchmarks.peers_arms NAME WORK TURNS BLOCK

Each is written as its own documentation has it, with what helps it: buffers of batch normalisation are not sent (here
they are not, either), Horovod has the cycle time and the yielding MPI that this program gives it. Data lie in memory,
rows are drawn before the first step, and nothing is logged.
"""

import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from tests.benchmarks.peers_gate import Gate
from tests.benchmarks.peers_work import RANKS, WORKS, Data, Work, loss

Step = Callable[[Any], torch.Tensor]  # trains on a batch; its loss, not waited for
NAMES = ("DDP-gloo", "Horovod", "Lightning", "Accelerate", "DeepSpeed")


def ddp(work: Work) -> Step:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", timeout=timedelta(hours=5))
    model = DistributedDataParallel(work.model(), broadcast_buffers=False)
    optimizer = work.new_optimizer(model)

    def step(batch: Any) -> torch.Tensor:
        found = loss(model, batch)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        return found.detach()

    return step


def horovod(work: Work) -> Step:
    os.environ |= {"HOROVOD_CYCLE_TIME": "0.1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    import horovod.torch as hvd

    hvd.init()
    model = work.model()
    optimizer = hvd.DistributedOptimizer(work.new_optimizer(model), named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    def step(batch: Any) -> torch.Tensor:
        found = loss(model, batch)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        return found.detach()

    return step


def accelerate(work: Work) -> Step:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    given = [
        DistributedDataParallelKwargs(broadcast_buffers=False),
        InitProcessGroupKwargs("gloo", timeout=timedelta(hours=5)),
    ]
    accelerator = Accelerator(cpu=True, kwargs_handlers=given)
    assert accelerator.num_processes == RANKS, f"{accelerator.num_processes} ranks"
    model = work.model()
    model, optimizer = accelerator.prepare(model, work.new_optimizer(model))

    def step(batch: Any) -> torch.Tensor:
        found = loss(model, batch)
        accelerator.backward(found)
        optimizer.step()
        optimizer.zero_grad()
        return found.detach()

    return step


def deepspeed(work: Work) -> Step:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed as ds

    ds.init_distributed(dist_backend="gloo", timeout=timedelta(hours=5), verbose=False)
    model = work.model()
    # Clipping is on by default, and would be another training.
    config = {
        "gradient_clipping": 0.0,
        "train_batch_size": work.global_batch,
        "train_micro_batch_size_per_gpu": work.global_batch // RANKS,
    }
    engine, *_ = ds.initialize(
        model=model,
        optimizer=work.new_optimizer(model),
        config=config | {"steps_per_print": 10**9, "zero_allow_untested_optimizer": True},
    )

    def step(batch: Any) -> torch.Tensor:
        found = loss(engine, batch)
        engine.backward(found)
        engine.step()
        return found.detach()

    return step


def lightning(work: Work, data: Data, gate: Gate, rows: list[np.ndarray]) -> None:
    """Its Trainer owns the loop: the gate is at the beginning of its training step."""
    import lightning as pl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.last = work.model(), None

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            gate.step(number, self.last)
            found = loss(self.model, batch)
            self.last = found.detach()
            return found

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return work.new_optimizer(self.model)

    class Batches(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return map(data.batch, rows)

    strategy = DDPStrategy(process_group_backend="gloo", broadcast_buffers=False, timeout=timedelta(hours=5))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        plugins=[TorchElasticEnvironment()],
        max_epochs=1,
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Batches(), batch_size=None))


def main(name: str, title: str, turns: int, block: int) -> None:
    torch.set_num_threads(1)
    work, steps = WORKS[title], turns * block + 1  # the last step ends the last block
    data, rank = Data(work), int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0)))
    gate, rows = Gate(rank, block), list(work.rows(rank, RANKS, steps))
    if name == "Lightning":
        lightning(work, data, gate, rows)
        return
    makes = {"DDP-gloo": ddp, "Horovod": horovod, "Accelerate": accelerate, "DeepSpeed": deepspeed}
    step, last = makes[name](work), None
    for number in range(steps):
        gate.step(number, last)
        last = step(data.batch(rows[number]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
