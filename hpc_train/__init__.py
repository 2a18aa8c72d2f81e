"""hpc-train: train on 1 to thousands of MPI ranks, and learn where every second and joule went."""

__version__ = "0.1.0"
