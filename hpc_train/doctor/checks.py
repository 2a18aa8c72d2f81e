"""All checks, in the order in which they are made: what later ones stand on comes first."""

from hpc_train.doctor import hardware, job, network, room, software, storage
from hpc_train.doctor.check import Check

_NETWORK = "export OMPI_MCA_btl_tcp_if_include=INTERFACE   # one that hosts share: ip -br addr; is there a firewall?"
_FILES = "--set run.root=FOLDER   # df FOLDER: a server that does not answer makes every look at its files wait"

CHECKS = (
    Check("installed", software.look_installed, software.judge_installed, (), 600.0, software.SLOW_FILES),
    Check("one MPI", software.look_mpi, software.judge_mpi, ("mpi4py",), 120.0, "rm -r .venv && make install   # anew"),
    Check("threads of MPI", software.look_threads, software.judge_threads, ("mpi4py",), 30.0, _NETWORK),
    Check("all-reduce", network.look_all_reduce, network.judge_all_reduce, ("mpi4py",), 30.0, _NETWORK),
    Check("transport", network.look_transport, network.judge_transport, ("mpi4py",), 30.0, _NETWORK),
    Check("cores", hardware.look_cores, hardware.judge_cores, (), 30.0, "top"),
    Check(
        "convolutions",
        hardware.look_convolutions,
        hardware.judge_convolutions,
        ("torch",),
        90.0,
        "export ONEDNN_MAX_CPU_ISA=AVX2   # does it end so?",
    ),
    Check("GPU", hardware.look_gpu, hardware.judge_gpu, ("torch",), 60.0, "nvidia-smi   # a GPU that does not answer"),
    Check("Horovod", software.look_horovod, software.judge_horovod, ("mpi4py", "torch", "horovod"), 60.0, _NETWORK),
    Check("parallel file", storage.look_parallel_file, storage.judge_parallel_file, ("h5py",), 30.0, _FILES),
    Check("file locks", storage.look_locks, storage.judge_locks, (), 30.0, _FILES),
    Check("stripes", room.look_stripes, room.judge_stripes, (), 30.0, _FILES),
    Check("disk space", room.look_room, room.judge_room, ("torch", "h5py"), 30.0, _FILES),
    Check("energy meters", hardware.look_meters, hardware.judge_meters, (), 30.0, "nvidia-smi"),
    Check("Slurm", job.look_slurm, job.judge_slurm),
    Check("clocks", job.look_clocks, job.judge_clocks, ("mpi4py",), 30.0, _NETWORK),
    Check("fork", job.look_fork, job.judge_fork, (), 30.0, "export RDMAV_FORK_SAFE=1 IBV_FORK_SAFE=1"),
)
