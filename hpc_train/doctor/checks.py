"""All checks in order: what later ones depend on comes first."""

from hpc_train.doctor import disk_space, hardware, job, memory, network, software, storage
from hpc_train.doctor.check import Check

_NETWORK = "export OMPI_MCA_btl_tcp_if_include=INTERFACE   # one that hosts share: ip -br addr; is there a firewall?"
_FILES = "--set run.root=FOLDER   # df FOLDER: an unresponsive file server blocks every access"
_INSTALL = "rm -r .venv && make install"
_ONEDNN = "export ONEDNN_MAX_CPU_ISA=AVX2   # does the crash disappear?"
_GPU = "nvidia-smi   # a GPU that does not respond"
_FORK = "export RDMAV_FORK_SAFE=1 IBV_FORK_SAFE=1"
_MPI = ("mpi4py",)
_HOROVOD = ("mpi4py", "torch", "horovod")

CHECKS = (
    Check("installed", software.probe_installed, software.evaluate_installed, software.SLOW_FILES, limit_s=600.0),
    Check("one MPI", software.probe_mpi, software.evaluate_mpi, _INSTALL, _MPI, limit_s=120.0),
    Check("threads of MPI", software.probe_threads, software.evaluate_threads, _NETWORK, _MPI),
    Check("all-reduce", network.probe_all_reduce, network.evaluate_all_reduce, _NETWORK, _MPI),
    Check("transport", network.probe_transport, network.evaluate_transport, _NETWORK, _MPI),
    Check("cores", hardware.probe_cores, hardware.evaluate_cores, "top"),
    Check(
        "convolutions", hardware.probe_convolutions, hardware.evaluate_convolutions, _ONEDNN, ("torch",), limit_s=90.0
    ),
    Check("GPU", hardware.probe_gpu, hardware.evaluate_gpu, _GPU, ("torch",), limit_s=60.0),
    Check("Horovod", software.probe_horovod, software.evaluate_horovod, _NETWORK, _HOROVOD, limit_s=60.0),
    Check("parallel file", storage.probe_parallel_file, storage.evaluate_parallel_file, _FILES, ("h5py",)),
    Check("file locks", storage.probe_locks, storage.evaluate_locks, _FILES),
    Check("stripes", storage.probe_stripes, storage.evaluate_stripes, _FILES),
    Check("disk space", disk_space.probe_disk_space, disk_space.evaluate_disk_space, _FILES, ("torch", "h5py")),
    Check("memory", memory.probe_memory, memory.evaluate_memory, "free -g", ("torch", "h5py"), limit_s=60.0),
    Check("energy meters", hardware.probe_meters, hardware.evaluate_meters, "nvidia-smi"),
    Check("Slurm", job.probe_slurm, job.evaluate_slurm, ""),
    Check("clocks", job.probe_clocks, job.evaluate_clocks, _NETWORK, _MPI),
    Check("fork", job.probe_fork, job.evaluate_fork, _FORK),
)
