"""The former name of `hpc_train.analysis.runs.load`. It ends with the release after this one."""

from hpc_train.analysis.runs.load import Run, load_all

__all__ = ["Run", "load_all"]
