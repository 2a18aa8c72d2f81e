"""Regression with Lightning: python regression.py data/auto-mpg.h5"""

import sys

import h5py
import lightning
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


def samples(path, part):
    with h5py.File(path) as file:
        return torch.from_numpy(file[f"{part}/inputs"][:]).float(), torch.from_numpy(file[f"{part}/targets"][:]).float()


def linear(num_in, num_out):
    """With He's initial weights, as in hpc-train's mlp."""
    layer = nn.Linear(num_in, num_out)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


class Miles(lightning.LightningModule):
    def __init__(self, inputs, targets):
        super().__init__()
        for name, values in (
            ("inputs", inputs),
            ("targets", targets),
        ):  # what both are brought to mean 0 and deviation 1 by
            self.register_buffer(f"{name}_mean", values.mean(0))
            self.register_buffer(f"{name}_std", values.std(0, correction=0))
        self.layers = nn.Sequential(linear(7, 64), nn.GELU(), linear(64, 64), nn.GELU(), linear(64, 1))

    def forward(self, inputs):
        return self.layers((inputs - self.inputs_mean) / self.inputs_std).squeeze(1)

    def training_step(self, batch, number):
        inputs, targets = batch
        return functional.mse_loss(self(inputs), (targets - self.targets_mean) / self.targets_std)

    def test_step(self, batch, number):
        inputs, targets = batch
        predicted = self(inputs) * self.targets_std + self.targets_mean
        self.log("test_r2", 1 - (predicted - targets).square().sum() / (targets - targets.mean()).square().sum())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.005, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    lightning.seed_everything(0)
    train, test = (TensorDataset(*samples(sys.argv[1], part)) for part in ("train", "test"))
    trainer = lightning.Trainer(max_epochs=80, accelerator="cpu", default_root_dir="runs/lightning")
    model = Miles(*train.tensors)
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    trainer.test(model, DataLoader(test, batch_size=len(test)))
