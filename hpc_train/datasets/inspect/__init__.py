"""Looking at HDF5 files: what they hold, whether they are whole, how fast they read."""
