"""The former name of `hpc_train.train.data.dataset`, for tasks of users. It ends with the release after this one."""

from hpc_train.train.data.dataset import Batch, Split, open_order, open_split

__all__ = ["Batch", "Split", "open_order", "open_split"]
