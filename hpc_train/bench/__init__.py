"""Micro-benchmarks of storage and of all-reduce, under mpirun."""
