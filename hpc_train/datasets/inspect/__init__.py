"""Inspects HDF5 files: what they hold, whether they are intact, and how fast they are read."""
