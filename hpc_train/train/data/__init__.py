"""HDF5 as tasks see it: files, readers, order, batches made ahead."""
