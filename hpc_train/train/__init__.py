"""What runs on compute nodes: needs MPI, torch, Horovod and parallel HDF5."""
