"""What every other folder may use: values, maths, files, output and signals. No MPI, torch, Horovod or h5py."""
