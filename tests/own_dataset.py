"""A torch Dataset of one's own: handwritten digits of scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset


class Digits(Dataset):
    def __init__(self, train=True):
        pictures, labels = load_digits(return_X_y=True)
        rows = slice(1500) if train else slice(1500, None)
        self.pictures, self.labels = pictures[rows].reshape(-1, 8, 8), labels[rows]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):  # called by several threads at once
        picture = torch.tensor(self.pictures[index], dtype=torch.float32) / 16
        return picture, int(self.labels[index])
