"""Fine-tuning with Lightning: python fine_tuning.py data/fashion-mnist.h5 runs/lightning/digits.ckpt"""

import sys

import lightning
from classification import Digits, samples
from torch.utils.data import DataLoader

if __name__ == "__main__":
    lightning.seed_everything(0)
    train, test = (samples(sys.argv[1], part) for part in ("train", "test"))
    model = Digits.load_from_checkpoint(sys.argv[2])
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", default_root_dir="runs/lightning")
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    trainer.test(model, DataLoader(test, batch_size=500))
