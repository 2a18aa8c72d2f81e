"""Making HDF5 data sets: where they come from, and how they are written."""
