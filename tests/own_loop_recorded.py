"""A training loop like many others: DistributedDataParallel on handwritten digits; `own_loop.py`, recorded."""

import sys

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hpc_train.train.recording import recording


def main(path: str, num_epochs: int) -> None:
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    digits = np.load(path)
    dataset = TensorDataset(torch.from_numpy(digits["inputs"]), torch.from_numpy(digits["targets"]))
    sampler = DistributedSampler(dataset, drop_last=True)
    loader = DataLoader(dataset, 256 // distributed.get_world_size(), sampler=sampler, drop_last=True)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(784, 512), nn.GELU(), nn.Linear(512, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    with recording("own-loop", global_batch=256, model=model) as recorder:
        for epoch in range(num_epochs):
            sampler.set_epoch(epoch)
            for inputs, targets in loader:
                with recorder.step() as step:
                    loss = nn.functional.cross_entropy(model(inputs), targets)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    step.loss = loss

    distributed.destroy_process_group()


main(sys.argv[1], int(sys.argv[2]))
