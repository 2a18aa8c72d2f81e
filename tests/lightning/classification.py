"""Classification with Lightning: python classification.py data/mnist-5k.h5"""

import sys

import h5py
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split


def samples(path, part):
    with h5py.File(path) as file:
        pixels, labels = file[f"{part}/inputs"], file[f"{part}/targets"][:]
        inputs = torch.from_numpy(pixels[:]).float() * float(pixels.attrs["scale_factor"])
        return TensorDataset(inputs, torch.from_numpy(labels).long())


def linear(num_in, num_out):
    """With He's initial weights, as in hpc-train's mlp."""
    layer = nn.Linear(num_in, num_out)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), linear(784, 256), nn.GELU(), linear(256, 128), nn.GELU(), linear(128, 10)
        )

    def training_step(self, batch, number):
        inputs, targets = batch
        return functional.cross_entropy(self.layers(inputs), targets)

    def measure(self, batch, part):
        inputs, targets = batch
        logits = self.layers(inputs)
        self.log(f"{part}_loss", functional.cross_entropy(logits, targets))
        self.log(f"{part}_accuracy", (logits.argmax(1) == targets).float().mean())

    def validation_step(self, batch, number):
        self.measure(batch, "validation")

    def test_step(self, batch, number):
        self.measure(batch, "test")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.001, weight_decay=0.0)


if __name__ == "__main__":
    lightning.seed_everything(0)
    train, held_out = random_split(samples(sys.argv[1], "train"), [0.9, 0.1])
    best = ModelCheckpoint(monitor="validation_loss", filename="best")
    trainer = lightning.Trainer(max_epochs=20, accelerator="cpu", callbacks=[best], default_root_dir="runs/lightning")
    model = Digits()
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=500))
    trainer.test(model, DataLoader(samples(sys.argv[1], "test"), batch_size=500))
    trainer.save_checkpoint("runs/lightning/digits.ckpt")
