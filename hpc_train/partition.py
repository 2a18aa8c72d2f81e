"""The former name of `hpc_train.core.sampling`, for tasks of users. It ends with the release after this one."""

from hpc_train.core.sampling import Indices, Order, row_noise

__all__ = ["Indices", "Order", "row_noise"]
