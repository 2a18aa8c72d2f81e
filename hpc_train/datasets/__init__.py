"""Data sets: made, inspected, and copied to nodes. Needs MPI and parallel HDF5."""
