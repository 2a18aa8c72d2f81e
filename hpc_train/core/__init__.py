"""Pure values and maths: no MPI, torch, Horovod or h5py."""
