"""A task of one's own: predicts the lower half of each image from its upper half."""

import h5py
import torch
from torch import nn


class LowerHalf:
    def __init__(self, config, context):
        with h5py.File(config.data.file) as file:
            self.images = torch.from_numpy(file["train/inputs"][:]).flatten(1) / 255
            self.unseen = torch.from_numpy(file["test/inputs"][:]).flatten(1) / 255
        self.num_samples = len(self.images)

    def model(self):
        return nn.Sequential(nn.Linear(392, 256), nn.GELU(), nn.Linear(256, 392))

    def batch(self, rows, step):  # this rank's samples of the global batch
        return self.images[rows].chunk(2, dim=1)

    def loss(self, model, batch):  # the sum over these samples
        upper, lower = batch
        return (model(upper) - lower).square().mean(dim=1).sum()

    def test_batches(self, world):  # this rank's share
        yield self.unseen[world.rank :: world.size].chunk(2, dim=1)

    def test(self, model, batch):  # how many, and the sum over them
        return len(batch[0]), {"squared_error": self.loss(model, batch).item()}
