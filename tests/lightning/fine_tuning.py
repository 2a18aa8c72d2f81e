"""Fine-tuning with Lightning: python fine_tuning.py data/fashion-mnist.h5 runs/lightning/digits.ckpt"""

import sys

import lightning
import torch
from classification import Digits, samples
from torch.utils.data import DataLoader


class Clothes(Digits):
    """The digits' model, of which the first layer stays as it is."""

    def __init__(self):
        super().__init__()
        self.layers[1].requires_grad_(False)

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.001, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    lightning.seed_everything(0)
    train, test = (samples(sys.argv[1], part) for part in ("train", "test"))
    model = Clothes.load_from_checkpoint(sys.argv[2])
    trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", default_root_dir="runs/lightning")
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    trainer.test(model, DataLoader(test, batch_size=500))
