"""The environment variables that a run directory records: those that affect the speed of computing and communication.

Variables are selected by name, because people share run directories, and other variables may be secrets.
"""

import re
from collections.abc import Mapping

from hpc_train.core.redaction import variable

SLURM_NAMES = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_GPUS_ON_NODE",
    "SLURM_CLUSTER_NAME",
    "SLURM_RESTART_COUNT",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_STEP_ID",
    "SLURM_CPU_BIND",
    "SLURM_DISTRIBUTION",
    "SLURM_MPI_TYPE",
)
_PREFIXES = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_"),  # threads of a rank
    *("OMPI_MCA_", "MPICH_", "I_MPI_", "MV2_", "ROMIO_"),  # MPI
    *("UCX_", "UCC_", "FI_", "PSM2_", "PSM3_", "IPATH_", "HFI_"),  # fabrics
    *("HOROVOD_", "NCCL_", "RCCL_", "HSA_"),
    *("TORCH_", "PYTORCH_", "HDF5_", "MALLOC_"),
)
_NAMES = frozenset(
    (
        "CUDA_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "GLIBC_TUNABLES",
        "LD_PRELOAD",
        "SRUN_CPUS_PER_TASK",
        "TMPDIR",
    )
)
# mpirun's own variables for its processes: addresses, folders and keys of one launch.
_LAUNCH = re.compile(r"OMPI_MCA_(orte_|ess|pmix|plm|initial_wdir|shmem_RUNTIME)")


def recorded(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that affect speed, sorted by name; values that look like secrets are redacted."""
    return {name: variable(name, environ[name]) for name in sorted(environ) if _is_recorded(name)}


def recorded_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """Slurm's description of the job."""
    return {name: variable(name, environ[name]) for name in SLURM_NAMES if name in environ}


def _is_recorded(name: str) -> bool:
    return name in _NAMES or (name.startswith(_PREFIXES) and not _LAUNCH.match(name))
